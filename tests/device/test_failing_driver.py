"""A driver that is there and fails is not the same as no GPU: every caller reports it."""

import ctypes

import pytest
from bundles import tiny_bundle, tiny_parts
from cases import case

import runtime
from runtime.bundle import engines
from runtime.bundle.engines import check_targets, wanted_engines
from runtime.bundle.write import write_bundle
from runtime.core import refiner
from runtime.device import driver
from runtime.device.driver import cuda_devices, cuda_problem
from runtime.engines import tensorrt
from runtime.engines.recipe import EngineRecipe
from runtime.errors import DeviceError, MissingBackend
from runtime.tools import probe

WHY = "the CUDA driver does not start: cuInit returns 803"


class Failing:
    """What ctypes makes of a driver whose kernel module is of another version."""

    def cuInit(self, flags):
        return 803

    def cuDriverGetVersion(self, version):
        version._obj.value = 12060
        return 0

    def cuGetErrorName(self, code, name):
        name._obj.value = b"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"
        return 0


@pytest.fixture
def failing(monkeypatch):
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: Failing())


@pytest.fixture
def absent(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver.ctypes, "CDLL", missing)


@pytest.fixture
def rtx(monkeypatch):
    """Some TensorRT, which need not be installed."""
    fake = type("TensorRT", (), {"__version__": "1.7.1.116"})
    monkeypatch.setattr(engines, "load_tensorrt", lambda runtime: fake)
    monkeypatch.setattr(engines, "make", lambda trt, kind: None)  # the library itself starts
    monkeypatch.setattr(tensorrt, "supported_compute_capabilities", lambda: ("8.6", "8.9"))


def manifest(*capabilities, targets=("rtx",)):
    made, files = tiny_parts()
    made["recipe"] |= {"compute_capabilities": list(capabilities), "targets": list(targets)}
    return made, files


def test_the_list_of_gpus_is_an_error(failing):
    with pytest.raises(DeviceError, match=rf"^{WHY}.*\n  fix: restart the machine"):
        cuda_devices()
    assert isinstance(cuda_problem(), DeviceError)


def test_without_a_driver_the_list_is_empty(absent):
    assert cuda_devices() == [] and isinstance(cuda_problem(), MissingBackend)


def test_the_doctor_says_broken_and_devices_names_the_cpu(failing):
    facts = probe.cuda_facts()
    assert facts["broken"] and facts["absence"].startswith(WHY) and facts["devices"] == []
    assert facts["driver"] == "12.6" and runtime.devices() == ["cpu"]


def test_precision_on_a_gpu(failing):
    """It was taken as if the GPU could do it."""
    with pytest.raises(DeviceError, match=WHY):
        refiner.check_precision("cuda", "fp16")
    refiner.check_precision("cpu", "fp32")


def test_engines_for_named_gpus_need_no_driver(failing, rtx):
    made, _ = manifest("8.6")
    check_targets(["rtx"], ["8.6"])
    recipes = EngineRecipe.from_manifest(made)
    (entry,) = wanted_engines(recipes, {"refine_map": b"graph"}, "rtx")
    assert entry["compute_capabilities"] == ["8.6"]


def test_engines_for_this_gpu_need_one(failing, rtx):
    for target in ["rtx", "trt"]:
        with case(target):
            made, _ = manifest()
            with pytest.raises(DeviceError, match=WHY):
                wanted_engines(EngineRecipe.from_manifest(made), {"refine_map": b"graph"}, target)


def test_the_gpu_to_build_for_cannot_be_asked(failing, rtx):
    with pytest.raises(DeviceError, match=WHY):
        check_targets(["rtx"], [])


def test_building_on_a_gpu_fails(failing, rtx, tmp_path, capsys):
    from runtime.__main__ import main

    place = tmp_path / "x.bundle"
    write_bundle(place, *manifest("8.6"))
    assert main(["build", str(place), "--target", "trt"]) == 1
    assert f"error: {WHY}" in capsys.readouterr().err
    assert main(["build", str(place), "--target", "rtx", "--dry-run"]) == 0
    assert "would build" in capsys.readouterr().out


def test_targets_that_need_the_gpu_are_named_and_the_others_built(failing, rtx, tmp_path, capsys):
    from runtime.__main__ import main

    write_bundle(tmp_path / "x.bundle", *manifest("8.6", targets=("rtx", "trt")))
    assert main(["build", str(tmp_path / "x.bundle"), "--dry-run"]) == 0
    said = capsys.readouterr()
    assert f"not built here: trt: {WHY}" in said.err and "would build" in said.out


def test_an_engine_for_named_gpus_is_built_and_the_driver_reported(failing, monkeypatch, caplog):
    from runtime.engines import tensorrt_build

    def stop(runtime, recipe, gpu):
        raise RuntimeError(f"{runtime} for {recipe.compute_capabilities} on {gpu}")

    monkeypatch.setattr(tensorrt_build, "load_tensorrt", lambda runtime: None)
    monkeypatch.setattr(tensorrt_build, "_targets", stop)
    with pytest.raises(RuntimeError, match=r"tensorrt_rtx for \('8.6',\) on None"):
        recipe = EngineRecipe(compute_capabilities=("8.6",))
        tensorrt_build.build_engine(b"", recipe, runtime="tensorrt_rtx")
    assert WHY in caplog.text
    for options in ({"runtime": "tensorrt"}, {"runtime": "tensorrt_rtx"}):
        with pytest.raises(DeviceError, match=WHY):
            tensorrt_build.build_engine(b"", EngineRecipe(), **options)


def test_check_makes_the_checks_on_the_cpu_and_names_the_problem(failing, tmp_path, capsys):
    from runtime.__main__ import main

    bundle = tiny_bundle(tmp_path / "x.bundle")
    assert main(["check", str(bundle.path)]) == 1  # it has an engine, which cannot be tried
    out = " ".join(capsys.readouterr().out.split())
    assert f"GPUs cannot be used: {WHY}" in out and "golden, refined by onnx ok" in out
    assert f"FAILED: {WHY}" in out


def test_an_export_keeps_the_bundle_and_says_what_fails(failing, rtx, tmp_path, capsys):
    pytest.importorskip("skimage", reason="the demo photo is scikit-image's")
    from export.__main__ import main

    out = tmp_path / "it is.bundle"
    assert main(["--target", "trt", "--imgsz", "48", "64", "-o", str(out), "-q"]) == 1
    said = capsys.readouterr().err
    assert f"the engines are not built: {WHY}" in said and "fix: restart the machine" in said
    assert said.endswith(f"; then: python -m runtime build '{out}'\n")
    assert (out / "manifest.json").is_file()


def test_the_fake_is_called_as_ctypes_calls():
    version = ctypes.c_int()
    Failing().cuDriverGetVersion(ctypes.byref(version))
    assert version.value == 12060
