"""Golden vectors: the same answers on the same device, and every way to have others is seen."""

import json
from dataclasses import replace

import numpy as np
import pytest
from cases import case

from runtime.bundle import golden
from runtime.bundle.read import Bundle
from runtime.core import parameters
from runtime.core.config import RefineConfig
from runtime.core.refiner import Refiner
from runtime.engines.onnx import OnnxEngine
from runtime.errors import BundleError
from runtime.prior.kmeans import KMeansPrior
from runtime.prior.network import NetworkPrior
from runtime.tensors import load_tensors

onnx = pytest.importorskip("onnx", reason="the networks are made with onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")
pytest.importorskip("safetensors", reason="needs safetensors: pip install safetensors")

from bundles import (  # noqa: E402
    CONFIG,
    PREPROCESS,
    golden_of,
    native,
    nearest_colour,
    picture,
    tensors,
    tiny_bundle,
)
from permissions import obeyed  # noqa: E402

EXPORT = r"\n  fix: export the bundle again$"


def network_prior(data=None, preprocess=PREPROCESS, **options):
    return NetworkPrior(OnnxEngine(data or nearest_colour(), threads=1), preprocess, **options)


def made(prior=None, config=CONFIG, shot=None, size=None):
    shot = picture() if shot is None else shot
    return golden_of(shot, prior or network_prior(), config, native(config), size=size)


def compare(arrays, steps, prior=None, config=CONFIG, refiner=None, **options):
    return golden.compare(
        arrays, steps, prior or network_prior(), config, refiner or native(config), **options
    )


def test_the_same_device_gives_the_same_answers():
    for objective in ["residual", "dynaguide", "dynaseg"]:
        for prior in [KMeansPrior(3), None]:
            with case(prior, objective):
                config = RefineConfig(objective=objective, channels=5, steps=3, scale=0.5)
                arrays, steps = made(prior, config)
                assert steps == 3 and arrays["labels"].shape == (12, 16)
                names = {"picture", "guide", "labels", "losses"}
                assert set(arrays) == names | (set() if prior else {"input"})
                assert arrays["losses"].shape == (3,)
                arrays = load_tensors(tensors(arrays), "golden")
                wanted = {"prior": 1.0, "labels": 1.0, "losses": 0.0} | (
                    {} if prior else {"input": 0.0}
                )
                assert compare(arrays, steps, prior, config) == wanted


def test_long_refinements_are_cut_short():
    config, ten = replace(CONFIG, steps=1000), native(replace(CONFIG, steps=10))
    arrays, steps = golden_of(picture(), network_prior(), config, ten)
    assert steps == 10 == len(arrays["losses"]) == 10
    assert compare(arrays, steps, config=config, refiner=ten)["labels"] == 1
    config, one = replace(CONFIG, steps=0), native(replace(CONFIG, steps=1))
    arrays, steps = golden_of(picture(), network_prior(), config, one)
    assert steps == len(arrays["losses"]) == 1  # the losses are compared in any case
    assert compare(arrays, steps, config=config, refiner=one)["losses"] == 0


def test_labels_are_the_guides_classes():
    """Residual refines the classes in use; golden labels keep their numbers."""

    def prior(shot, low):
        guide = np.zeros((24, 32, 9), np.float32)
        guide[:, :16, 4] = guide[:, 16:, 7] = 1
        return guide

    arrays, steps = made(prior)
    assert set(np.unique(arrays["labels"])) == {4, 7}
    assert compare(arrays, steps, prior)["labels"] == 1


def test_hard_guides():
    def prior(shot, low):
        return (np.arange(24 * 32).reshape(24, 32) // 256).astype(np.int32)

    arrays, steps = made(prior)
    assert compare(arrays, steps, prior) == {"prior": 1, "labels": 1, "losses": 0}


def test_trained_weights_are_started_from():
    state = parameters.initial_state(CONFIG, 3)
    state["conv3.bias"] = np.array([0, 9, 0], np.float32)  # all of one class

    def trained(height, width, classes):
        refiner = Refiner(height, width, classes=len(classes), **CONFIG.options())
        refiner.load_state_dict(parameters.select_classes(CONFIG, state, classes))
        return refiner

    arrays, steps = golden_of(picture(), network_prior(), CONFIG, trained, warm=True)
    assert compare(arrays, steps, refiner=trained, warm=True)["labels"] == 1
    with pytest.raises(BundleError, match=r"does not give its golden answers.*: labels 0"):
        compare(arrays, steps)
    with pytest.raises(BundleError, match=r"does not give its golden answers.*: labels 0"):
        compare(arrays, steps, refiner=trained)  # cold: from the seed


# What is seen


def test_a_changed_weight():
    arrays, steps = made()
    model = onnx.load_from_string(nearest_colour())
    weight = np.frombuffer(model.graph.initializer[0].raw_data, np.float32).copy()
    weight[0] = -weight[0]
    model.graph.initializer[0].raw_data = weight.tobytes()
    with pytest.raises(BundleError, match=r"golden answers on this device: prior 0\.\d{4} \(want"):
        compare(arrays, steps, network_prior(model.SerializeToString()))


def test_another_refinement():
    shot = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    unsure = network_prior(nearest_colour(0.3))
    arrays, steps = made(unsure, shot=shot)
    assert compare(arrays, steps, unsure)["labels"] == 1
    for other in (replace(CONFIG, lr=5.0), replace(CONFIG, lam=1000.0, lr=0.5)):
        with pytest.raises(BundleError, match=r"golden answers on this device: labels 0\.\d{4}"):
            compare(arrays, steps, unsure, other)


def test_a_refinement_that_does_nothing():
    """Its labels may be right all the same: those of the prior."""
    config = replace(CONFIG, steps=10, lr=0.3)
    arrays, steps = made(config=config)

    def idle(height, width, classes):
        return Refiner(height, width, classes=len(classes), **config.options() | {"lr": 0.0})

    with pytest.raises(BundleError, match=r"on this device: losses 0\.\d{4} .*losses within 2%"):
        compare(arrays, steps, config=config, refiner=idle)
    arrays, steps = made()
    with pytest.raises(BundleError, match=r"losses 1\.0000"):
        compare(arrays | {"losses": arrays["losses"][:0]}, steps)
    with pytest.raises(BundleError, match=r"losses 0\.0500"):
        compare(arrays | {"losses": arrays["losses"] / np.float32(1.05)}, steps)
    assert compare(arrays | {"losses": arrays["losses"][:2]}, steps)["losses"] == 0


def test_another_preprocessing():
    for other in [
        {"mean": (0.5, 0.5, 0.5)},
        {"mean": (0.485, 0.456, 0.430)},
        {"std": (0.2, 0.2, 0.2)},
        {"color": "bgr"},
    ]:
        with case(other):
            arrays, steps = made()
            with pytest.raises(
                BundleError, match=r"on this device: input \d+\.\d{4}.*within 0\.05"
            ):
                compare(arrays, steps, network_prior(preprocess=replace(PREPROCESS, **other)))


def test_a_shifted_guide():
    arrays, steps = made()
    shifted = np.roll(arrays["guide"], 1, axis=1)
    with pytest.raises(BundleError, match=r"on this device: prior 0\.\d{4}"):
        compare(arrays | {"guide": shifted}, steps)


def test_a_picture_whose_colours_are_swapped():
    arrays, steps = made()
    swapped = np.ascontiguousarray(arrays["picture"][..., ::-1])
    with pytest.raises(BundleError, match=r"device: input \d+\.\d{4}, prior 0\.\d{4}"):
        compare(arrays | {"picture": swapped}, steps)


def test_what_another_device_may_differ_by():
    arrays, steps = made()
    labels = arrays["labels"].copy()
    labels.flat[:7] += 1  # of 768
    near = arrays | {"labels": labels, "input": arrays["input"] + np.float32(0.04)}
    result = compare(near, steps)
    assert 0.99 < result["labels"] < 1 and 0.03 < result["input"] < 0.05
    labels.flat[:8] = 9
    with pytest.raises(BundleError, match=r"this device: labels 0.9896 .*\n  fix: python -m run"):
        compare(near, steps)


# What is no golden vector


OTHER_KINDS = [
    {"picture": None},
    {"guide": None},
    {"labels": None},
    {"picture": np.zeros((24, 32, 3), np.float32)},
    {"picture": np.zeros((24, 32), np.uint8)},
    {"picture": np.zeros((24, 32, 4), np.uint8)},
    {"picture": np.zeros((0, 32, 3), np.uint8)},
    {"guide": np.zeros((24, 32, 3), np.float64)},
    {"guide": np.zeros(24, np.float32)},
    {"guide": np.zeros((24, 0), np.int32)},
    {"labels": np.zeros((24, 32), np.int64)},
    {"losses": None},
    {"losses": np.zeros(3)},
    {"losses": np.zeros(4, np.float32)},
    {"losses": np.zeros((3, 1), np.float32)},
    {"losses": np.full(3, np.nan, np.float32)},
]


def test_arrays_of_another_kind():
    for change in OTHER_KINDS:
        (array,) = change.values()
        with case(*change, getattr(array, "shape", None), getattr(array, "dtype", None)):
            arrays, steps = made()
            arrays = {k: v for k, v in (arrays | change).items() if v is not None}
            with pytest.raises(
                BundleError, match=f"x: an array of the golden vectors is mis.*{EXPORT}"
            ):
                compare(arrays, steps, name="x")


def test_an_input_that_does_not_fit():
    for wrong in [
        None,
        np.zeros((1, 3, 24, 31), np.float32),
        np.zeros((1, 3, 24, 32)),
        np.full((1, 3, 24, 32), np.nan, np.float32),
    ]:
        with case(getattr(wrong, "shape", None), getattr(wrong, "dtype", None)):
            arrays, steps = made()
            arrays = {k: v for k, v in (arrays | {"input": wrong}).items() if v is not None}
            with pytest.raises(BundleError, match=f"input does not fit the preprocessing{EXPORT}"):
                compare(arrays, steps)


def test_shapes_that_differ():
    arrays, steps = made()
    with pytest.raises(BundleError, match=rf"prior returns \(24, 32, 3\), golden is.*2\){EXPORT}"):
        compare(arrays | {"guide": arrays["guide"][..., :2]}, steps)
    with pytest.raises(BundleError, match="does not give its golden answers"):
        compare(arrays | {"labels": arrays["labels"][:9, :9]}, steps)  # refined at that size
    for labels in (arrays["labels"][0], arrays["labels"][:0]):
        with pytest.raises(BundleError, match=f"has a wrong shape or type{EXPORT}"):
            compare(arrays | {"labels": labels}, steps)


def test_engines_of_one_size_fix_the_working_size():
    arrays, steps = made(size=(12, 20))
    assert arrays["labels"].shape == (12, 20)
    assert compare(arrays, steps)["labels"] == 1


def test_guides_that_cannot_be_used():
    arrays, steps = made()
    with pytest.raises(BundleError, match=f"cannot be run: guide has 2304 NaN or infi.*{EXPORT}"):
        compare(arrays | {"guide": arrays["guide"] * np.float32(np.nan)}, steps)
    with pytest.raises(BundleError, match=f"cannot be run: guide has negative values.*{EXPORT}"):
        compare(arrays | {"guide": -arrays["guide"]}, steps)
    huge = np.full((24, 32), 2**31 - 1, np.int32)  # never allocated
    with pytest.raises(BundleError, match=f"cannot be run: guide has labels from .*{EXPORT}"):
        compare(arrays | {"guide": huge}, steps, lambda shot, low: huge)


def test_networks_that_fail():
    for scale in [np.nan, 1e39]:
        with case(scale):
            arrays, steps = made()
            with (
                np.errstate(over="ignore"),
                pytest.raises(BundleError, match=f"be run: .* NaN or infinite scores.*{EXPORT}"),
            ):
                compare(arrays, steps, network_prior(nearest_colour(scale)))
            other = replace(PREPROCESS, height=25)
            arrays["input"] = np.zeros((1, 3, 25, 32), np.float32)
            with pytest.raises(
                BundleError, match=rf"cannot be run: .*fails on \(1, 3, 25, 32\).*{EXPORT}"
            ):
                compare(arrays, steps, network_prior(preprocess=other))


def test_inputs_too_large_to_make():
    arrays, steps = made()
    huge = replace(PREPROCESS, height=2**15, width=2**15)
    with pytest.raises(BundleError, match=f"cannot be run: .*32768 x 32768 pixels.*{EXPORT}"):
        compare(arrays, steps, network_prior(preprocess=huge))


# What has been passed is remembered


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_remembered_by_bundle_and_backend(tmp_path, cache):
    one = tiny_bundle(tmp_path / "one.bundle")
    two = Bundle(one.path, one.manifest | {"sha256": "1" * 64})
    assert not golden.was_passed(one, "cpu", "native")
    golden.remember(one, {"prior": 1.0}, "cpu", "native")
    assert golden.was_passed(one, "cpu", "native")
    moved = one.path.rename(tmp_path / "elsewhere")
    assert golden.was_passed(Bundle.open(moved), "cpu", "native")
    for bundle, by in ((two, ("cpu", "native")), (one, ("cuda", "native")), (one, ("cpu",)),
                       (one, ()), (one, ("cpu", "native", "x"))):  # fmt: skip
        assert not golden.was_passed(bundle, *by), by
    (receipt,) = (cache / "dynaguide-edge/golden").iterdir()  # nothing half-written stays
    assert json.loads(receipt.read_text()) == {"bundle": "one.bundle", "prior": 1.0}
    golden.remember(one, {"prior": 0.995}, "cpu", "native")
    assert json.loads(receipt.read_text())["prior"] == 0.995


def test_without_a_cache_it_is_run_again(tmp_path, cache):
    bundle = tiny_bundle(tmp_path / "x.bundle")
    cache.write_text("a file")  # root, too, cannot make a folder in it
    golden.remember(bundle, {"prior": 1.0}, "cpu")
    assert not golden.was_passed(bundle, "cpu") and cache.read_text() == "a file"
    cache.unlink()
    cache.symlink_to(cache.name)
    golden.remember(bundle, {"prior": 1.0}, "cpu")
    assert not golden.was_passed(bundle, "cpu")


def test_an_unwritable_cache(tmp_path, cache, caplog):
    bundle = tiny_bundle(tmp_path / "x.bundle")
    cache.mkdir(mode=0o500)
    with obeyed():
        golden.remember(bundle, {"prior": 1.0}, "cpu")
    assert not golden.was_passed(bundle, "cpu")
    assert "x.bundle is tested again when it is loaded the next time: " in caplog.text
    assert "golden cannot be written: Permission denied" in caplog.text


def test_where_the_cache_is(tmp_path, monkeypatch):
    bundle = tiny_bundle(tmp_path / "x.bundle")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert golden.cache_folder() == tmp_path / "home/.cache/dynaguide-edge"
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # as if it were not set
    assert golden.cache_folder() == tmp_path / "home/.cache/dynaguide-edge"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(golden.Path, "home", _no_home)
    assert golden.cache_folder() is None
    golden.remember(bundle, {}, "cpu")
    assert not golden.was_passed(bundle, "cpu")


def _no_home():
    raise RuntimeError("Could not determine home directory.")
