"""python -m runtime build: engines for this machine, stale ones, timing caches, refusals."""

import signal
import subprocess
import sys
from pathlib import Path

import fake_tensorrt
import pytest
from runtime_commands import answer, change, contents, no_gpu, text

from runtime.bundle import engines
from runtime.bundle.manifest import file_entry
from runtime.bundle.read import Bundle
from runtime.device.driver import CudaDevice
from runtime.errors import DeviceError

ROOT = Path(__file__).resolve().parents[2]


# build


def test_build_finishes_the_engines_here(capsys, bundle):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX builds the engines")
    before = contents(bundle)
    code, out, err = text(capsys, "build", bundle, "--dry-run")
    assert code == 0 and out.count("would build") == 2 and "why: the bundle has none" in out
    assert contents(bundle) == before and err == ""

    code, out, err = text(capsys, "build", bundle)
    assert code == 0 and out.count("\nbuilt  ") + out.startswith("built ") == 2
    assert out.endswith(f"\nnext         python -m runtime check {bundle}\n")
    assert "100% fp32" in out and "2 built, 0 up to date" in out
    assert "build refine_step with TensorRT for RTX (the bundle has none) ..." in err
    assert err.count("  100 % ") == 2 and "\r" not in err
    engines = Bundle.open(bundle).manifest["engines"]
    assert {e["graph"] for e in engines} == {"refine_step", "refine_map"}
    Bundle.open(bundle).check_files()

    after = contents(bundle)
    code, document = answer(capsys, "build", bundle)
    assert code == 0 and document["built"] == document["to_build"] == []
    assert document["up_to_date"] == [e["key"] for e in engines]
    assert contents(bundle) == after

    (bundle / engines[0]["file"]).write_bytes(b"damaged")
    code, document = answer(capsys, "build", bundle)
    assert code == 0 and [e["key"] for e in document["built"]] == [engines[0]["key"]]
    assert "has 7 bytes" in document["to_build"][0]["why"]
    assert contents(bundle).keys() == after.keys()
    Bundle.open(bundle).check_files()


def test_build_force_builds_again(capsys, with_engines):
    code, document = answer(capsys, "build", with_engines, "--force", "--dry-run")
    assert code == 0 and [e["why"] for e in document["to_build"]] == ["--force"] * 2


@pytest.mark.parametrize(
    ("edit", "options", "why"),
    [
        ({"version": "1.6.0.2"}, [], "TensorRT for RTX 1.6.0.2 -> {version}"),
        ({}, ["--compute-capability", "8.9,sm_120"], "compute capability 8.6 -> 8.9, 12.0"),
        ({}, ["--workspace", "1.5"], f"workspace None -> {3 * 2**29}"),
        ({"shapes": {}}, [], "other shapes"),
        ({}, [], "the graph has changed"),
    ],
)
def test_build_says_why_an_engine_is_stale(capsys, with_engines, edit, options, why):
    def make_stale(manifest):
        for engine in manifest["engines"]:
            engine |= {"key": engine["key"][::-1], **edit}

    change(with_engines, make_stale)
    code, document = answer(capsys, "build", with_engines, "--dry-run", *options)
    import tensorrt_rtx

    assert code == 0
    assert [e["why"] for e in document["to_build"]] == [
        why.format(version=tensorrt_rtx.__version__)
    ] * 2


def test_ctrl_c_leaves_the_bundle_as_it_was(bundle):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX builds the engines")
    before = contents(bundle)
    command = [sys.executable, "-u", "-m", "runtime", "build", str(bundle)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as child:
        said = ""
        while "%" not in said:
            said = child.stderr.readline()
            assert said
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=300)
    assert child.returncode == 130 and "error: interrupted" in err and "Traceback" not in err
    assert contents(bundle) == before


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (DeviceError("out", fix="more"), 1), (MemoryError(), 1)],
)
def test_a_build_that_fails_adds_nothing(capsys, monkeypatch, bundle, error, code):
    """Not even the engine that was done before."""
    pytest.importorskip("tensorrt_rtx", reason="its version is in the keys")
    done = []

    def fail_at_second(entry, *_, **__):
        if done:
            raise error
        done.append(entry)
        plan = b"plan"
        file = file_entry(entry["file"], plan)
        ports = {"inputs": [], "outputs": [], "receipt": {}, "seconds": 1}
        return {**entry, **file, **ports}, plan, None

    monkeypatch.setattr(engines, "build", fail_at_second)
    before = contents(bundle)
    assert answer(capsys, "build", bundle)[0] == code
    assert len(done) == 1 and contents(bundle) == before


@pytest.fixture
def device_build(monkeypatch, gpu):
    """TensorRT on a pretended device: building gives a plan, and times longer by one byte."""
    monkeypatch.setattr(engines, "cuda_devices", lambda: [CudaDevice(0, "Orin", "8.7", 1, 1)])
    fake_tensorrt.install(monkeypatch)
    seen = []

    def pretend(entry, data, precision, *, device, timing_cache, progress):
        seen.append((entry["graph"], device, timing_cache))
        progress("Building", 1.0)
        plan = entry["graph"].encode()
        file = file_entry(entry["file"], plan)
        ports = {"inputs": [], "outputs": [], "receipt": {}, "seconds": 1}
        times = None if timing_cache is None else timing_cache + b"t"
        return {**entry, **file, **ports}, plan, times

    monkeypatch.setattr(engines, "build", pretend)
    return seen


def test_the_timing_cache_is_read_and_rewritten(capsys, bundle, tmp_path, device_build):
    cache = tmp_path / "times.cache"
    options = ["--target", "trt", "--timing-cache", cache]
    assert answer(capsys, "build", bundle, *options)[0] == 0
    assert [times for _, _, times in device_build] == [b"", b"t"] and cache.read_bytes() == b"tt"
    code, document = answer(capsys, "build", bundle, *options, "--force")
    assert code == 0 and cache.read_bytes() == b"tttt"
    assert {e["gpu_name"] for e in document["built"]} == {"Orin"}
    assert len(Bundle.open(bundle).manifest["engines"]) == 2  # of the same keys: replaced
    assert sorted(p.name for p in tmp_path.iterdir()) == ["times.cache", "tiny.bundle"]


def test_a_timing_cache_that_cannot_be_used(capsys, bundle, tmp_path, device_build):
    none = tmp_path / "none" / "cache"
    code, document = answer(capsys, "build", bundle, "--target", "trt", "--timing-cache", none)
    assert code == 1 and "has no folder" in document["error"] and not device_build
    code, document = answer(capsys, "build", bundle, "--target", "trt", "--timing-cache", tmp_path)
    assert code == 1 and "cannot be read" in document["error"] and not device_build


def test_a_timing_cache_is_refused_for_rtx(capsys, bundle, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="it is asked for its version")
    code, document = answer(capsys, "build", bundle, "--timing-cache", tmp_path / "c")
    assert code == 1 and "timing-cache is for target trt" in document["error"]


def test_targets_that_cannot_be_built_here_are_named(capsys, bundle, monkeypatch, device_build):
    """The recipe's targets are built as far as this machine can."""
    change(bundle, lambda m: m["recipe"].update(targets=["trt", "rtx"]))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    code, out, err = text(capsys, "build", bundle)
    assert code == 0 and out.count("TensorRT 10.3.0 for Orin alone") == 2
    assert "not built here: rtx: tensorrt_rtx is needed" in err
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    code, _, err = text(capsys, "build", bundle)
    assert code == 4 and "tensorrt is needed" in err and "\n  fix: pip install" in err


def test_a_bundle_for_onnx_alone_gets_engines_of_tensorrt_if_it_is_here(
    capsys, bundle, monkeypatch, device_build
):
    change(bundle, lambda m: m["recipe"].update(targets=["onnx"]))
    code, document = answer(capsys, "build", bundle)
    assert code == 0 and {e["runtime"] for e in document["built"]} == {"tensorrt"}
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    code, document = answer(capsys, "build", bundle)
    assert code == 4 and "names no target with engines" in document["error"]
    assert document["fix"].endswith("or choose --target rtx")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--device", "cpu"], "engines are built on a GPU"),
        (["--device", "cuda:7"], "device is 7; wanted 0 to 0"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--workspace", "much"], "workspace is 'much'; wanted GiB"),
        (["--workspace", "0"], "workspace is '0'"),
        (["--compute-capability", "8.6,new"], "compute-capability is 'new'"),
    ],
)
def test_build_refuses_values(capsys, bundle, gpu, options, match):
    code, document = answer(capsys, "build", bundle, *options)
    assert code == 1 and match in document["error"]


@no_gpu
@pytest.mark.parametrize(("given", "match"), [("9.0", "cannot build"), ("", "needs to know")])
def test_build_refuses_gpus_that_rtx_does_not_know(capsys, bundle, given, match):
    pytest.importorskip("tensorrt_rtx", reason="it is asked what it knows")
    code, document = answer(capsys, "build", bundle, "--dry-run", "--compute-capability", given)
    assert code == 1 and match in document["error"] and document["fix"]


@pytest.mark.parametrize(
    "changes",
    [
        {"shapes": {"refine_step": {"image": 5}, "refine_map": {}}},
        {"shapes": {"refine_step": {"image": [[1], [1]]}, "refine_map": {}}},
        {"shapes": {"refine_step": {"image": [[1, "x"], [1, 1], [1, 1]]}, "refine_map": {}}},
        {"shapes": {"refine_step": {"image": [[1], [1, 1], [1]]}, "refine_map": {}}},
        {"shapes": {"refine_step": {"image": [[-1], [-1], [-1]]}, "refine_map": {}}},
        {"compute_capabilities": {"8.6": 1}},
        {"compute_capabilities": [8.6]},
        {"workspace": "2G"},
        {"level": True},
        {"dynamic": "no"},
        {"targets": [["rtx"]]},
    ],
)
def test_build_refuses_recipes_that_say_something_else(capsys, bundle, changes):
    change(bundle, lambda m: m["recipe"].update(changes))
    code, document = answer(capsys, "build", bundle)
    assert code == 5 and "recipe does not say" in document["error"]


def test_build_needs_a_recipe(capsys, bundle):
    change(bundle, lambda m: m["recipe"].pop("shapes"))
    code, document = answer(capsys, "build", bundle)
    assert code == 5 and "recipe does not say" in document["error"]
