"""python -m runtime build: engines for this machine, stale ones, timing caches, refusals."""

import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import fake_tensorrt
import pytest
from cases import case
from runtime_commands import answer, change, contents, no_gpu, text

from runtime.bundle import engines
from runtime.bundle.manifest import MANIFEST, file_entry
from runtime.bundle.read import Bundle
from runtime.device.driver import CudaDevice
from runtime.errors import DeviceError

ROOT = Path(__file__).resolve().parents[2]


# build


def test_build_finishes_the_engines_here(capsys, first_build, with_engines):
    code, out, err = first_build.dry_run
    assert (
        code == 0 and out.count("would build") == 2 and "why: the bundle has no such engine" in out
    )
    assert first_build.unchanged and err == ""

    bundle = first_build.place
    code, out, err = first_build.run
    assert code == 0 and out.count("\nbuilt  ") + out.startswith("built ") == 2
    assert out.endswith(f"\nnext         python -m runtime check {bundle}\n")
    assert "100% fp32" in out and "2 built, 0 up to date" in out
    assert "build refine_step with TensorRT for RTX (the bundle has no such engine) ..." in err
    assert err.count("  100 % ") == 2 and "\r" not in err
    engines = Bundle.open(bundle).manifest["engines"]
    assert {e["graph"] for e in engines} == {"refine_step", "refine_map"}
    Bundle.open(bundle).check_files()

    bundle = with_engines  # a copy, which may change
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


def test_build_says_why_an_engine_is_built_again(capsys, with_engines):
    import tensorrt_rtx

    code, document = answer(capsys, "build", with_engines, "--force", "--dry-run")
    assert code == 0 and [e["why"] for e in document["to_build"]] == ["--force"] * 2
    whole, here = (with_engines / MANIFEST).read_bytes(), tensorrt_rtx.__version__
    for edit, options, why in [
        ({"version": "1.6.0.2"}, [], f"TensorRT for RTX 1.6.0.2 -> {here}"),
        ({}, ["--compute-capability", "8.9,sm_120"], "compute capability 8.6 -> 8.9, 12.0"),
        ({}, ["--workspace", "1.5"], f"workspace None -> {3 * 2**29}"),
        ({"shapes": {}}, [], "other shapes"),
        (
            {"version": "1.6.0.2", "shapes": {}},
            ["--workspace", "1"],
            f"TensorRT for RTX 1.6.0.2 -> {here}; workspace None -> {2**30}; other shapes",
        ),
        ({}, [], "the graph has changed"),
    ]:

        def make_stale(manifest, edit=edit):
            for engine in manifest["engines"]:
                engine |= {"key": engine["key"][::-1], **edit}

        with case(why):
            (with_engines / MANIFEST).write_bytes(whole)
            change(with_engines, make_stale)
            code, document = answer(capsys, "build", with_engines, "--dry-run", *options)
            assert code == 0 and [e["why"] for e in document["to_build"]] == [why] * 2


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


def test_a_build_that_fails_adds_nothing(capsys, monkeypatch, bundle):
    """Not even the engine that was done before."""
    pytest.importorskip("tensorrt_rtx", reason="its version is in the keys")
    before = contents(bundle)
    for error, code in [
        (KeyboardInterrupt(), 130),
        (DeviceError("out", fix="more"), 1),
        (MemoryError(), 1),
    ]:
        done = []

        def fail_at_second(entry, *_, done=done, error=error, **__):
            if done:
                raise error
            done.append(entry)
            plan = b"plan"
            file = file_entry(entry["file"], plan)
            ports = {"inputs": [], "outputs": [], "receipt": {}, "seconds": 1}
            return {**entry, **file, **ports}, plan, None

        monkeypatch.setattr(engines, "build", fail_at_second)
        with case(type(error).__name__):
            assert answer(capsys, "build", bundle)[0] == code
            assert len(done) == 1 and contents(bundle) == before


class Seen(list):
    """The builds, and the library's stand-in as ``fake``."""


@pytest.fixture
def device_build(monkeypatch, gpu):
    """TensorRT on a pretended device: building gives a plan, and times longer by one byte."""
    monkeypatch.setattr(engines, "cuda_devices", lambda: [CudaDevice(0, "Orin", "8.7", 1, 1)])
    seen = Seen()
    seen.fake = fake_tensorrt.install(monkeypatch)

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


def test_the_timing_cache_is_read_and_rewritten_or_refused(capsys, bundle, tmp_path, device_build):
    none = tmp_path / "none" / "cache"
    for cache, match in [(none, "has no folder"), (tmp_path, "is a folder")]:
        words = ["--target", "trt", "--timing-cache", cache]
        with case(match):
            code, document = answer(capsys, "build", bundle, *words)
            assert code == 1 and match in document["error"] and not device_build
    cache = tmp_path / "times.cache"
    options = ["--target", "trt", "--timing-cache", cache]
    assert answer(capsys, "build", bundle, *options)[0] == 0
    assert [times for _, _, times in device_build] == [b"", b"t"] and cache.read_bytes() == b"tt"
    code, document = answer(capsys, "build", bundle, *options, "--force")
    assert code == 0 and cache.read_bytes() == b"tttt"
    assert {e["gpu_name"] for e in document["built"]} == {"Orin"}
    assert len(Bundle.open(bundle).manifest["engines"]) == 2  # of the same keys: replaced
    assert sorted(p.name for p in tmp_path.iterdir()) == ["times.cache", "tiny.bundle"]


def test_a_timing_cache_is_refused_for_rtx(capsys, bundle, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="it is asked for its version")
    code, document = answer(capsys, "build", bundle, "--timing-cache", tmp_path / "c")
    assert code == 1 and "timing-cache is for target trt" in document["error"]


def test_targets_that_cannot_be_built_here_are_named(capsys, bundle, monkeypatch, device_build):
    """The recipe's targets are built as far as this machine can."""
    change(bundle, lambda m: m["recipe"].update(targets=["trt", "rtx"]))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    code, out, err = text(capsys, "build", bundle)
    assert code == 0 and out.count("TensorRT 10.3.0 for Orin only") == 2
    assert "not built here: rtx: tensorrt_rtx is needed" in err
    code, document = answer(capsys, "build", bundle)
    assert code == 0 and [e["target"] for e in document["not_built_here"]] == ["rtx"]
    assert "tensorrt_rtx is needed" in document["not_built_here"][0]["error"]
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    code, _, err = text(capsys, "build", bundle)
    assert code == 4 and "tensorrt is needed" in err and "\n  fix: pip install" in err
    assert "names no target" not in err and "--target rtx" not in err


def test_an_engine_of_the_other_library_is_not_a_stale_one(capsys, with_engines, device_build):
    before = len(Bundle.open(with_engines).manifest["engines"])
    words = ("build", with_engines, "--target", "trt")
    code, document = answer(capsys, *words, "--dry-run")
    assert code == 0
    assert {e["why"] for e in document["to_build"]} == {"the bundle has no such engine"}
    assert answer(capsys, *words)[0] == 0
    assert len(Bundle.open(with_engines).manifest["engines"]) == 2 * before


def test_a_library_that_cannot_start_is_a_device_error(capsys, bundle, monkeypatch, device_build):
    """It ended in a Python traceback: the binding raises a TypeError. Other targets are built."""
    change(bundle, lambda m: m["recipe"].update(targets=["trt", "rtx"]))
    before, fake = contents(bundle), device_build.fake
    fake.refuse, fake.says = {"Builder"}, "CUDA initialization failure with error: 35"
    code, document = answer(capsys, "build", bundle, "--target", "trt")
    assert code == 1 and "tensorrt 10.3.0 does not start: it makes no Builder" in document["error"]
    assert fake.says in document["error"] and document["fix"]
    assert contents(bundle) == before and not device_build
    rtx = sys.modules["tensorrt_rtx"]
    monkeypatch.setattr(rtx, "Builder", lambda log: object())
    monkeypatch.setattr(rtx, "ComputeCapability", types.SimpleNamespace(SM86=1), raising=False)
    code, out, err = text(capsys, "build", bundle)
    assert code == 0 and out.count("TensorRT for RTX 10.3.0") == 2
    assert "not built here: trt: tensorrt 10.3.0 does not start" in err


def test_build_follows_the_choice_of_engines(capsys, templates, tmp_path, device_build):
    bundle = Path(shutil.copytree(templates / "network", tmp_path / "network.bundle"))
    for chosen, wanted in [
        ("prior", ["prior"]),
        ("refine", ["refine_step", "refine_map"]),
        ("all", ["refine_step", "refine_map", "prior"]),
        ("some", None),
        (["prior"], None),
    ]:
        with case(str(chosen)):
            change(bundle, lambda m, chosen=chosen: m["recipe"].update(engines=chosen))
            words = ("--target", "trt", "--dry-run")
            code, document = answer(capsys, "build", bundle, *words)
            if wanted is None:
                assert code == 5 and "wanted one of all, prior, refine" in document["error"]
            else:
                assert code == 0 and [e["graph"] for e in document["to_build"]] == wanted


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


def test_build_refuses_values(capsys, bundle, gpu):
    for options, match in [
        (["--device", "cpu"], "engines are built on a GPU"),
        (["--device", "cuda:7"], "device is 7; wanted 0 to 0"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--workspace", "much"], "workspace is 'much'; wanted GiB"),
        (["--workspace", "0"], "workspace is '0'"),
        (["--compute-capability", "8.6,new"], "compute-capability is 'new'"),
    ]:
        with case(*options):
            code, document = answer(capsys, "build", bundle, *options)
            assert code == 1 and match in document["error"]


def test_options_without_effect_are_refused(capsys, bundle, gpu):
    for words, match in [
        (
            ["--target", "trt", "--compute-capability", "8.6"],
            "compute-capability is for target rtx",
        ),
        (["--target", "rtx", "--timing-cache", "t"], "timing-cache is for target trt"),
    ]:
        with case(*words):
            code, document = answer(capsys, "build", bundle, *words)
            assert code == 1 and match in document["error"] and document["fix"]


@no_gpu
def test_build_refuses_a_gpu_that_is_not_there(capsys, bundle):
    code, document = answer(capsys, "build", bundle, "--target", "rtx", "--device", "1")
    assert code == 1 and "device is 1; no GPU: " in document["error"]


@no_gpu
def test_build_refuses_gpus_that_rtx_does_not_know(capsys, bundle):
    pytest.importorskip("tensorrt_rtx", reason="it is asked what it knows")
    for given, match in [("9.0", "cannot build"), ("", "needs to know")]:
        with case(given):
            code, document = answer(
                capsys, "build", bundle, "--dry-run", "--compute-capability", given
            )
            assert code == 1 and match in document["error"] and document["fix"]


def test_build_refuses_the_refinement_for_turing(capsys, bundle):
    pytest.importorskip("tensorrt_rtx", reason="it is asked for its version")
    words = ("--dry-run", "--compute-capability", "7.5,8.6")
    code, document = answer(capsys, "build", bundle, *words)
    assert code == 1 and "for Turing (compute capability 7.5), and the ref" in document["error"]
    assert document["fix"].startswith("export with --target onnx; refine_backend='native' ")
    assert document["fix"].endswith("; or leave 7.5 out of --compute-capability")


def test_build_refuses_recipes_that_say_something_else(capsys, bundle):
    whole = (bundle / MANIFEST).read_bytes()
    for changes in [
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
        "no shapes",
    ]:

        def edit(manifest, changes=changes):
            if changes == "no shapes":
                manifest["recipe"].pop("shapes")
            else:
                manifest["recipe"].update(changes)

        with case(changes):
            (bundle / MANIFEST).write_bytes(whole)
            change(bundle, edit)
            code, document = answer(capsys, "build", bundle)
            assert code == 5 and "recipe does not say" in document["error"]


def test_the_library_starts_on_the_gpu_that_builds(capsys, bundle, monkeypatch, device_build):
    """GPU 0 may be full or reserved when another one was chosen."""
    gpus = [CudaDevice(i, "Pretended", "8.7", 2**33, 2**32) for i in range(2)]
    monkeypatch.setattr(engines, "cuda_devices", lambda: gpus)
    device_build.fake.capabilities = [(8, 7), (8, 7)]
    started_on = []

    def builder(log):
        started_on.append(device_build.fake.contexts)

    monkeypatch.setattr(sys.modules["tensorrt"], "Builder", builder)
    for device, contexts in (("0", 0), ("cuda:1", 1)):  # of PyCUDA; GPU 0 needs none
        code, _ = answer(capsys, "build", bundle, "--target", "trt", "--device", device)
        assert code == 0 and started_on.pop() == contexts
    assert device_build.fake.contexts == 0
