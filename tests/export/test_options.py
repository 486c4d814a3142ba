"""Options of the exporter: each is honoured, stored for the device, or refused with a reason."""

import sys
from pathlib import Path

import pytest
from cases import case

pytest.importorskip("onnx", reason="the graphs are made with onnx: pip install onnx")

from exporting import export, needs_rtx

from export import pack
from export.options import ExportOptions, check_use
from runtime.bundle import engines
from runtime.bundle.read import Bundle
from runtime.device.driver import CudaDevice
from runtime.engines.recipe import EngineRecipe
from runtime.errors import DeviceError, InputError
from sdk import Segmenter

# Which engines are built


@needs_rtx
def test_turing_gets_an_engine_of_its_prior(tmp_path, checkpoint_onnx, photos, photo):
    """TensorRT for RTX has no FP32 matrix products for Turing, and the refinement needs them."""
    words = ("--model", checkpoint_onnx, "--pictures", photos, "-q", "-o", tmp_path / "b")
    words += ("--target", "rtx", "--compute-capability", "7.5,8.6", "--half")
    ended = export(*words)
    assert ended.refused(1, "has no FP32 matrix products for Turing (compute capability 7.5)")
    assert "  fix: export with --engines prior; refine_backend='native' " in ended.err
    assert ended.err.endswith("; or leave 7.5 out of --compute-capability\n")
    assert not (tmp_path / "b").exists()
    assert export(*words, "--engines", "prior").code == 0
    bundle = Bundle.open(tmp_path / "b")
    (engine,) = bundle.manifest["engines"]
    assert engine["graph"] == "prior" and engine["compute_capabilities"] == ["7.5", "8.6"]
    assert bundle.manifest["recipe"]["engines"] == "prior"
    assert set(bundle.manifest["graphs"]) == {"prior", "refine_step", "refine_map"}
    for refined_by in ("native", "onnx"):
        seg = Segmenter(tmp_path / "b", refine_backend=refined_by)
        assert seg(photo).labels.shape == photo.shape[:2]
        assert seg.info()["self_test"]["labels"] == 1


def test_engines_of_the_refinement_for_turing_are_refused_before_the_work(
    tmp_path, plain, monkeypatch
):
    """The fix names no option that is refused, or that was chosen already. The targets are checked
    also where TensorRT for RTX is not installed."""
    monkeypatch.setattr(pack, "choose_pictures", None)
    half = "fix: export with --engines prior and an FP16 network (--half"
    for words, fix in [
        (plain[0], half + "); refine_backend='native' (the default) refines without an engine\n"),
        ((*plain[0], "--half"), "fix: export with --engines prior; refine_backend='native' "),
        ((*plain[0], "--int8", "--half", "--data", tmp_path), half + ", without --int8); "),
        ((*plain[0], "--engines", "refine"), "fix: export with --target onnx; refine_backend="),
        (("--model", "kmeans"), "fix: export with --target onnx; refine_backend='native' "),
    ]:
        words = (*words, "--target", "rtx", "--compute-capability", "7.5", "-q")
        for installed in (True, False):
            with case(installed, *map(str, words)), monkeypatch.context() as patch:
                if not installed:
                    patch.setitem(sys.modules, "tensorrt_rtx", None)
                ended = export(*words, "-o", tmp_path / "b")
                assert ended.refused(1, "for Turing (compute capability 7.5), and", fix)
    gpu = CudaDevice(0, "Tesla T4", "7.5", 2**33, 2**32)
    monkeypatch.setattr(engines, "cuda_devices", lambda: [gpu])
    with pytest.raises(InputError, match=r"Turing(.|\n)*without an engine$"):
        engines.check_targets(["rtx"], [], ["refine_map"])
    engines.check_targets(["rtx"], [], ["prior"])


# Options that would have no effect

NO_EFFECT = [  # options, what the refusal says
    ({"data": (Path("."),)}, "data is for int8 only.*add --int8"),
    ({"fraction": 0.5}, "fraction is a share of the pictures that calibrate int8.*add --int8"),
    ({"min_shape": (32, 32)}, "are for dynamic shapes.*add --dynamic"),
    ({"max_shape": (32, 32)}, "are for dynamic shapes.*add --dynamic"),
    ({"timing_cache": Path("t")}, "timing-cache is for target trt.*leave --timing-cache out"),
    ({"timing_cache": Path("t"), "targets": ("onnx", "rtx")}, "timing-cache is for target trt"),
    ({"device": 1}, "device is 1, the GPU that engines are built on; target onnx has none"),
    ({"engine": EngineRecipe(compute_capabilities=("8.6",))}, "is for target rtx"),
    ({"engine": EngineRecipe(compute_capabilities=("8.6",)), "targets": ("trt",)}, "target rtx"),
    ({"engines": "step"}, "engines is 'step'; wanted one of all, prior, refine"),
]
EFFECT = [  # what is similar and has an effect, now or for python -m runtime build
    {"data": (Path("."),), "int8": True, "fraction": 0.5},
    {"min_shape": (32, 32), "max_shape": (64, 64), "dynamic": True},
    {"timing_cache": Path("t"), "targets": ("rtx", "trt")},
    {"device": 1, "targets": ("rtx",)},
    {"engine": EngineRecipe(compute_capabilities=("8.6",)), "targets": ("trt", "rtx")},
    {"engine": EngineRecipe(workspace=2**30, level=3), "engines": "prior"},
]


def test_options_without_effect_are_refused():
    for options, message in NO_EFFECT:
        with case(str(options)), pytest.raises(InputError, match=f"(?s){message}"):
            ExportOptions(**options)
    for options in EFFECT:
        ExportOptions(**options)


def test_options_without_effect_on_a_model_are_refused(tmp_path, plain):
    """They are refused before anything is exported."""
    kmeans, network = ("--model", "kmeans"), plain[0]
    for words, message in [
        ((*network, "--opset", 17), "opset is for PyTorch modules; colours is an ONNX file"),
        ((*kmeans, "--opset", 17), "opset is for PyTorch modules; kmeans has no network"),
        ((*kmeans, "--min-agreement", 0.9), "min-agreement is for networks; kmeans has no"),
        ((*kmeans, "--engines", "prior"), "engines is 'prior'; kmeans has no network"),
        ((*kmeans, "--seed", 3, "--init", "w.safetensors"), "seed draws the initial weights"),
        ((*network, "--timing-cache", tmp_path / "t", "--target", "rtx"), "is for target trt"),
        ((*network, "--fraction", 0.5), "fraction is a share"),
    ]:
        with case(*map(str, words)):
            assert export(*words, "-q", "-o", tmp_path / "b").refused(1, message, "fix: ")
            assert not list(tmp_path.iterdir())


def test_output_is_not_the_name_of_the_bundle():
    kinds = "(choose from logits, probabilities, labels)"
    for text, message in [
        ("city.bundle", f"'city.bundle' {kinds}; -o names the bundle\n"),
        ("out/city", f"'out/city' {kinds}; -o names the bundle\n"),
        ("logit", f"'logit' {kinds}\n  fix: did you mean logits?"),
    ]:
        with case(text):
            ended = export("--model", "x.onnx", "--output", text)
            assert ended.refused(2, f"argument --output: invalid choice: {message}")


def test_opset_has_an_effect_on_modules():
    class Model:
        name, module, preprocess = "own", object(), object()

    check_use(ExportOptions(opset=17, min_agreement=0.9, engines="prior"), Model())


def test_options_of_the_builder_are_stored_for_the_device(tmp_path, photos):
    """K-means has no input size, but its bundle is made for pictures of one size."""
    words = ("--model", "kmeans", "--imgsz", "48x72", "--workspace", "1", "--opt-level", "2")
    words += ("--engines", "refine", "--pictures", photos, "-q", "-o", tmp_path / "b")
    assert export(*words).code == 0
    recipe = Bundle.open(tmp_path / "b").manifest["recipe"]
    assert (recipe["workspace"], recipe["level"], recipe["engines"]) == (2**30, 2, "refine")
    assert recipe["shapes"]["refine_step"]["image"] == [[1, 3, 24, 36]] * 3


def test_a_gpu_that_does_not_exist_is_refused_before_the_work(tmp_path, plain, monkeypatch):
    words = (*plain[0], "--device", "cuda:1", "-q", "-o", tmp_path / "b")
    gpu = [CudaDevice(0, "Pretended", "8.6", 2**33, 2**32)]
    for gpus, message in [(gpu, "device is 1; wanted 0 to 0"), ([], "device is 1; no GPU: ")]:
        for target in (["trt"], ["rtx", "--compute-capability", "8.6"]):
            with case(len(gpus), target[0]):
                monkeypatch.setattr(engines, "cuda_devices", lambda gpus=gpus: gpus)
                assert export(*words, "--target", *target).refused(1, message)
    assert not (tmp_path / "b").exists()

    def fails():
        raise DeviceError("the driver fails")

    monkeypatch.setattr(engines, "cuda_devices", fails)
    engines.check_device(["trt"], 1)  # the driver's error is reported where it matters
