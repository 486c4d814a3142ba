"""A run of train boosting as a bundle: background and object, with a head whose mask is known."""

import json

import numpy as np
import pytest
from bundles import tiny_parts
from cases import case
from drawn_pictures import COLOURS
from exporting import export
from trained_runs import backbone, method, replace_backbones, write_run

from export.models.load import load_model
from export.models.trained import trained
from runtime.__main__ import main as runtime_main
from runtime.bundle.manifest import parse_manifest, seal
from runtime.bundle.read import Bundle
from runtime.errors import BundleError, InputError
from sdk.__main__ import main as dg

torch = pytest.importorskip("torch", reason="heads are trained by torch: pip install torch")
Image = pytest.importorskip("PIL.Image", reason="pictures are written by Pillow")

from export.train.boosting import Boosting, BoostingConfig  # noqa: E402 (after importorskip)


@pytest.fixture(autouse=True)
def colours(monkeypatch):
    replace_backbones(monkeypatch)


def seeing_red():
    """Boosting whose masks are the share of the first colour: all layers copy its channel."""
    made = Boosting(BoostingConfig(), backbone())
    head = made.module
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.reduce.weight[0, 0] = 1
        for layer in (head.to_coarse, head.to_fine):
            layer.weight[0, 0], layer.bias[0] = 12, -6
        for part in head.stages.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.weight.fill_(1)
            elif isinstance(part, torch.nn.Conv2d):
                part.weight[0, 0, 1, 1] = 1
    return made


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "red", [tmp_path], made=seeing_red())


def patch(top, left, size=32, side=96):
    """A square of the first colour on the second, with noise; and where it is."""
    truth = np.ones((side, side), int)
    truth[top : top + size, left : left + size] = 0
    noise = np.random.default_rng(top).integers(-20, 21, (side, side, 3))
    return np.clip(COLOURS[truth] + noise, 0, 255).astype(np.uint8), (truth == 0).astype(int)


def test_the_prior_of_a_run(run):
    for mask, side in (("fine", 64), ("coarse", 8), (None, 64)):
        model = load_model(str(run), mask=mask)
        assert (model.name, model.output) == ("red", "probabilities")
        assert model.names == ["background", "object"]
        picture, truth = patch(0, 32, 32, 64)
        with torch.no_grad():
            out = model.module(torch.from_numpy(model.preprocess(picture)))
        assert out.shape == (1, 2, side, side) and torch.allclose(out.sum(1), torch.ones(1))
        found = out[0].argmax(0).numpy()
        assert (found == truth[:: 64 // side, :: 64 // side]).mean() > 0.95
        assert model.training["mask"] == (mask or "fine")
        assert not any(part.training for part in model.module.modules())


def test_the_smaller_region_is_the_object_of_each_picture(run):
    model = load_model(str(run))
    pictures = [patch(0, 0, 40, 64)[0], patch(0, 0, 60, 64)[0]]  # 39 % and 88 % of the picture
    batch = torch.from_numpy(np.concatenate([model.preprocess(p) for p in pictures]))
    with torch.no_grad():
        small, large = model.module(batch).argmax(1).numpy()
    assert small[10, 10] == 1 and small[60, 60] == 0
    assert large[10, 10] == 0 and large[62, 62] == 1


def test_what_the_manifest_will_store(run):
    training = load_model(str(run), flip=True, mask="coarse").training
    assert training.pop("backbone") == backbone(source="colours.pth").entry()
    settings = json.loads(json.dumps(seeing_red().settings()))
    assert training.pop("settings") == settings
    assert training == {
        "method": "boosting",
        "step": 3,
        "steps": 3,
        "select": "last",
        "labels_used": [],
        "views": {"size": 64},
        "pictures": 4,
        "seed": 7,
        "flip": True,
        "mask": "coarse",
    }
    good = tiny_parts(with_network=True)[0]

    def parsed(**changes):
        model = good["model"] | {"training": trained(run).training | changes}
        return parse_manifest(json.dumps(seal(good | {"model": model})).encode(), "m")

    assert parsed()["model"]["training"] == trained(run).training
    parsed(views={"size": 64, "crops": "centre"})  # as older versions wrote it
    for changes, text in (
        ({"mask": "finest"}, r"training\.mask is 'finest'"),
        ({"flip": 1}, r"training\.flip"),
        ({"labels_used": ["names"]}, r"training\.labels_used\[0\]"),
        ({"names": None}, r"unknown \['names'\]"),
        ({"method": "segunify"}, r"lacks \['names'\] or has unknown \['mask'\]"),
        ({"method": "refine"}, "lacks"),
        ({"method": ["boosting"]}, "lacks"),
    ):
        with case(changes), pytest.raises(BundleError, match=text):
            parsed(**changes)


def test_options_of_other_runs(run, tmp_path):
    other = write_run(tmp_path / "city", [tmp_path], made=method())
    with pytest.raises(InputError, match=r"mask is for runs of boosting; .*city.* of segunify\n"):
        load_model(str(other), mask="coarse")
    ended = export("--model", "kmeans", "--mask", "fine", "-o", tmp_path / "b")
    ended.refused(1, "mask is for runs of the trainer only; model is 'kmeans'")
    assert load_model(str(run), flip=True).module.flip


def test_a_bundle_from_a_run_to_a_picture(run, tmp_path, capsys):
    folder, out = tmp_path / "pictures", tmp_path / "red.bundle"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(patch(16 * i, 40)[0]).save(folder / f"{i}.png")
    words = ("--mask", "coarse", "--flip", "--pictures", folder, "-q", "-o", out)
    ended = export("--model", run, *words)
    assert ended.code == 0, ended.err
    manifest = Bundle.open(out).manifest
    assert manifest["classes"] == ["background", "object"]
    assert manifest["model"]["training"]["mask"] == "coarse"
    assert runtime_main(["check", str(out)]) == runtime_main(["inspect", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "training boosting on colours (tokens), 4 pictures, step 3 of 3 (the last), seed 7; labels "
        "used for nothing; coarse mask; averaged with the mirror image licence"
    ) in said
    picture, truth = patch(24, 48)
    Image.fromarray(picture).save(tmp_path / "new.png")
    words = ["predict", str(tmp_path / "new.png"), "--prior", str(out), "-o", str(tmp_path)]
    assert dg([*words, "--json"]) == 0
    (document,) = json.loads(capsys.readouterr().out)
    assert {s["name"] for s in document["segments"]} == {"background", "object"}
    labels = np.asarray(Image.open(document["labels"]))
    assert (labels == truth).mean() > 0.97


def test_a_run_of_the_command_line(tmp_path, monkeypatch):
    """What train boosting writes is what the export reads."""
    monkeypatch.undo()  # the trainer needs the rest of the module, too
    monkeypatch.setattr("export.backbones.load.load_backbone", lambda *_: backbone())
    folder, run = tmp_path / "pictures", tmp_path / "trained"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(patch(16 * i, 40)[0]).save(folder / f"{i}.png")
    words = ("--data", folder, "--backbone", "colours", "--imgsz", 64, "--batch", 2, "--steps", 1)
    ended = export("train", "boosting", *words, "--no-eq", "-q", "-o", run)
    assert ended.code == 0, ended.err
    model = load_model(str(run), imgsz=(96, 96))
    assert model.training["settings"]["eq"] is False and model.training["views"]["size"] == 64
    good = tiny_parts(with_network=True)[0]
    entry = good["model"] | {"training": json.loads(json.dumps(model.training))}
    parse_manifest(json.dumps(seal(good | {"model": entry})).encode(), "m")
    with torch.no_grad():
        out = model.module(torch.from_numpy(model.preprocess(patch(0, 0)[0])))
    assert out.shape == (1, 2, 96, 96) and torch.allclose(out.sum(1), torch.ones(1))
