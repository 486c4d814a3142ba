"""The doctor's report: machines are planted (libraries, packages, drivers) and must be seen."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import case
from permissions import obeyed
from planted_machines import (
    compile_c,
    kinds,
    module,
    plant_gpu,
    plant_library,
    plant_program,
    problem,
)

from runtime.device import choose, driver
from runtime.errors import DeviceError, MissingBackend
from runtime.tools import doctor, probe

ROOT = Path(__file__).resolve().parents[2]

CUDA_MODULE = choose.cuda_module  # before any test replaces it


# This machine, as it is


def test_this_machine_is_reported_without_importing_anything_heavy(tmp_path):
    program = (
        "import json, sys\nfrom runtime.tools import doctor\nreport = doctor.report()\n"
        "text = doctor.render(report)\n"
        "print(json.dumps([report, text, sorted({n.split('.')[0] for n in sys.modules})]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SEG_ISA": "base"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report, text, loaded = json.loads(done.stdout)
    heavy = {"torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "cv2", "pycuda"}
    assert not heavy & set(loaded)
    assert report["package"]["isa"] == "base" and report["targets"]["cpu"]["ready"]
    assert report["modules"]["cv2"]["state"] == "ready" and report["python"]["version"] in text
    assert f"base (of {', '.join(report['package']['isas'])}), SEG_ISA=base" in text
    assert report["processors"] == {
        "usable": choose.processors(),
        "limit": choose.cpu_limit(),
        "threads": choose.default_threads(),
    }
    report["processors"] = {"usable": 8, "limit": 1.5, "threads": 2}
    limited = "8, threads by default: 2 (the control group of this process allows 1.5 processors)"
    assert f"\nprocessors        {limited}\n" in doctor.render(report)
    for found in report["problems"]:
        assert found["kind"] in ("missing", "clash", "broken") and found["what"] and found["fix"]


def test_tensorrt_for_rtx_of_this_machine_is_found_with_its_library():
    facts = probe.probe("tensorrt_rtx")
    if facts["state"] == "absent":
        pytest.skip("tensorrt_rtx is not installed")
    (library,) = [
        lib
        for lib in probe.library_facts({"tensorrt_rtx": facts}, None)
        if "tensorrt_rtx" in lib["loaded_by"]
    ]
    assert library["version"].startswith(facts["version"].split("+")[0])
    assert library["family"] == "libtensorrt_rtx" and "wheel" in library["found_by"]


def test_an_unknown_instruction_set_is_broken_and_has_a_fix():
    program = (
        "import json; from runtime.tools import probe; print(json.dumps(probe.package_facts({})))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SEG_ISA": "mmx"}
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment)
    facts = json.loads(output.stdout)
    assert "mmx" in facts["error"] and facts["SEG_ISA"] == "mmx" and "SEG_ISA" in facts["fix"]


# Machines


def test_a_bare_machine_lists_what_is_missing_each_with_its_line(machine):
    report = doctor.report()
    json.dumps(report)
    assert {p["kind"] for p in report["problems"]} == {"missing"}
    fixes = {p["what"]: p["fix"] for p in report["problems"]}
    assert fixes["ONNX Runtime is not installed"] == "pip install onnxruntime-gpu"
    assert fixes["TensorRT is not installed"] == "pip install 'tensorrt>=10.3,<12'"
    assert fixes["TensorRT for RTX is not installed"] == "pip install tensorrt-rtx-cu13"
    assert "CUDA toolkit" in fixes["PyCUDA is not installed"]
    assert "docker run --gpus all" in problem(report, "no CUDA driver: ")["fix"]
    assert [name for name, v in report["targets"].items() if v["ready"]] == ["cpu"]
    text = doctor.render(report)
    assert "  cpu:            ready\n" in text
    assert "  trt:            TensorRT is not installed\n" in text
    assert "  missing: PyCUDA is not installed\n    fix: PATH=" in text
    assert report["package"]["version"] is None and not kinds(report, "dynaguide")
    assert f"not installed, in {ROOT / 'runtime'}" in text
    assert report["cuda_module"] == {
        "built": True,
        "compiled": ["8.6", "9.0", "9.0+ptx"],
        "runs_on": [],
        "refused": [],
        "error": "",
        "fix": "",
        "broken": False,
    }
    assert not kinds(report, "CUDA module") and not kinds(report, "has code for")
    assert "CUDA module       for compute capability 8.6, 9.0, 9.0+ptx\n" in text


def test_a_machine_that_builds_but_has_no_gpu(machine):
    machine["onnxruntime"] = module(providers=["CPUExecutionProvider"])
    machine["tensorrt_rtx"] = module(version="1.7.1.116")
    report = doctor.report()
    text = doctor.render(report)
    assert "  onnx:           ready\n" in text and "  rtx build:      ready\n" in text
    assert "  rtx run:        no GPU: no CUDA driver: " in text
    assert not report["targets"]["onnx on cuda"]["ready"]


def test_a_machine_that_has_everything(machine, monkeypatch):
    plant_gpu(monkeypatch)
    machine["onnxruntime"] = module(providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    machine["tensorrt_rtx"] = module(version="1.7.1.116")
    machine["tensorrt"] = module(version="10.3.0")
    machine["pycuda"] = module(version="2025.1")
    report = doctor.report()
    assert report["problems"] == []
    assert all(v == {"ready": True, "why": "", "fix": ""} for v in report["targets"].values())
    text = doctor.render(report)
    gpu = "NVIDIA GeForce RTX 3060, compute capability 8.6, 10.0 of 12.0 GiB free"
    assert gpu in text and "CUDA 12.6" in text and text.endswith("\n\nno problems")
    assert report["cuda_module"]["runs_on"] == ["cuda:0"]
    assert "8.6, 9.0, 9.0+ptx; runs on cuda:0\n" in text


def test_versions_of_tensorrt(machine, monkeypatch):
    for version, ready in [
        *[(version, True) for version in ("10.3.0", "10.3.0.30", "11.4.0.106")],
        *[(version, False) for version in ("10.2.0", "8.6.1", "12.0.0", "0.0.1", "", "dev")],
    ]:
        with case(version):
            plant_gpu(monkeypatch)
            machine["tensorrt"], machine["pycuda"] = module(version=version), module()
            report = doctor.report()
            assert report["targets"]["trt"]["ready"] == ready
            assert kinds(report, "wanted 10.3 up to 11") == ([] if ready else ["broken"])
            if not ready:
                assert "pip uninstall tensorrt" in report["targets"]["trt"]["fix"]


def test_a_gpu_that_tensorrt_for_rtx_does_not_know(machine, monkeypatch):
    plant_gpu(monkeypatch, "9.0", "NVIDIA H100")
    machine["tensorrt_rtx"], machine["pycuda"] = module(), module()
    verdict = doctor.report()["targets"]["rtx run"]
    assert "this machine has 9.0" in verdict["why"] and verdict["fix"] == "use target trt"


def test_a_driver_that_fails_is_broken_not_missing(machine, monkeypatch):
    failing = DeviceError("the CUDA driver does not start: cuInit gives 803", fix="restart")
    monkeypatch.setattr(driver, "cuda_problem", lambda: failing)
    found = problem(doctor.report(), "cuInit gives 803")
    assert found == {
        "kind": "broken",
        "what": "the CUDA driver does not start: cuInit gives 803",
        "fix": "restart",
    }

    def fail():
        raise DeviceError("the CUDA driver fails: cuDeviceGetName gives 4", fix="nvidia-smi")

    monkeypatch.setattr(driver, "cuda_problem", lambda: None)
    monkeypatch.setattr(driver, "cuda_devices", fail)
    assert kinds(doctor.report(), "cuDeviceGetName gives 4") == ["broken"]


def test_an_onnx_runtime_whose_cuda_libraries_are_absent(machine, monkeypatch, tmp_path):
    capi = tmp_path / "onnxruntime/capi"
    plant_library(tmp_path / "libcublas_of_a_test.so.1", "0.0.0")
    capi.mkdir(parents=True)
    provider = capi / "libonnxruntime_providers_cuda.so"
    needs = ["-shared", "-fPIC", "-Wl,--no-as-needed", tmp_path / "libcublas_of_a_test.so.1"]
    compile_c("int x;", provider, *needs)
    file = str(capi.parent / "__init__.py")
    machine["onnxruntime"] = module(providers=["CUDAExecutionProvider"], file=file)
    assert kinds(doctor.report(), "cublas") == []  # without a GPU nobody needs them
    plant_gpu(monkeypatch)
    report = doctor.report()
    why = "ONNX Runtime's CUDA provider needs libcublas_of_a_test.so.1"
    assert report["targets"]["onnx on cuda"]["why"] == why and report["targets"]["onnx"]["ready"]
    assert problem(report, "cublas")["kind"] == "missing"
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert doctor.report()["targets"]["onnx on cuda"]["ready"]


def test_an_onnx_runtime_without_cuda(machine, monkeypatch):
    why = "ONNX Runtime has no CUDA provider, only CPUExecutionProvider"
    for platform, fix in [("linux-x86_64", "-gpu"), ("linux-aarch64", "use targ")]:
        with case(platform, fix):
            plant_gpu(monkeypatch)
            monkeypatch.setattr(driver, "platform_tag", lambda platform=platform: platform)
            machine["onnxruntime"] = module(providers=["CPUExecutionProvider"])
            verdict = doctor.report()["targets"]["onnx on cuda"]
            assert verdict["why"] == why and fix in verdict["fix"]


def test_a_core_that_is_not_built(machine, monkeypatch):
    def fail():
        raise MissingBackend("the C++ core is not built (no _core)", fix="pip install .")

    monkeypatch.setattr(choose, "isas", fail)
    report = doctor.report()
    assert problem(report, "core is not built")["kind"] == "broken"
    assert report["targets"]["cpu"] == {
        "ready": False,
        "why": "the C++ core is not built (no _core)",
        "fix": "pip install .",
    }
    assert "the C++ core is not built (no _core)" in doctor.render(report)


def test_a_gpu_that_the_cuda_module_has_no_code_for(machine, monkeypatch):
    plant_gpu(monkeypatch, "7.5", "Tesla T4")
    report = doctor.report()
    found = problem(report, "cuda:0 (Tesla T4) has compute capability 7.5; this build")
    assert found["kind"] == "missing" and "SEG_CUDA_ARCHS=75 pip install" in found["fix"]
    assert report["cuda_module"]["runs_on"] == []
    assert "; this build has code for " in report["targets"]["cuda"]["why"]
    assert "; runs on no GPU of this machine\n" in doctor.render(report)


def test_a_cuda_module_is_missed_beside_a_gpu_only_and_a_damaged_one_is_broken(
    machine, monkeypatch
):
    monkeypatch.setattr(choose, "cuda_module", CUDA_MODULE)
    monkeypatch.setitem(sys.modules, "runtime._cuda", None)
    report = doctor.report()
    assert not report["cuda_module"]["built"] and not kinds(report, "CUDA module")
    text = doctor.render(report)
    assert "CUDA module       the CUDA module is not built (" in text
    assert (
        "; device='cuda' needs it: SEG_CUDA=1 pip install -e .   (in a clone, with nvcc on PATH)\n"
        in text
    )
    plant_gpu(monkeypatch)
    found = problem(doctor.report(), "the CUDA module is not built")
    assert found["kind"] == "missing" and "with nvcc on PATH" in found["fix"]

    def fail():
        raise MissingBackend("the CUDA module is not built (undefined symbol)", fix="build it")

    monkeypatch.setattr(choose, "cuda_module", fail)
    found = problem(doctor.report(), "undefined symbol")
    assert (found["kind"], found["fix"]) == ("broken", "build it")


# Jetson


@pytest.fixture
def jetson(machine, monkeypatch, tmp_path):
    release, model = tmp_path / "release", tmp_path / "model"
    release.write_text("# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic\n")
    model.write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    monkeypatch.setattr(driver, "_TEGRA_RELEASE", release)
    monkeypatch.setattr(driver, "_TREE_MODEL", model)
    monkeypatch.setattr(driver, "platform_tag", lambda: "linux-aarch64")
    plant_program(tmp_path / "tools/nvpmodel", "echo 'NV Power Mode: 15W'; echo 0")
    monkeypatch.setattr(probe, "_CPUFREQ", tmp_path / "cpufreq")
    for n in (0, 4):
        policy = tmp_path / f"cpufreq/policy{n}"
        policy.mkdir(parents=True)
        (policy / "scaling_min_freq").write_text("1510400\n")
        (policy / "scaling_max_freq").write_text("1510400\n")
    return tmp_path


def test_a_jetson_with_its_release_mode_and_clocks(jetson):
    report = doctor.report()
    assert report["jetson"] == {
        "model": "NVIDIA Jetson Orin Nano Developer Kit",
        "l4t": "36.4.0",
        "jetpack": "JetPack 6: TensorRT 10.3",
        "power_mode": "15W",
        "clocks_locked": True,
    }
    assert "python3-libnvinfer" in problem(report, "TensorRT is not")["fix"]
    assert "--system-site-packages" in report["targets"]["trt"]["fix"]
    assert not kinds(report, "RTX")  # it does not run on Jetson
    text = doctor.render(report)
    assert "NVIDIA Jetson Orin Nano Developer Kit, L4T 36.4.0, JetPack 6: TensorRT 10.3" in text
    assert "mode 15W, clocks locked\n" in text

    (jetson / "cpufreq/policy4/scaling_min_freq").write_text("729600\n")
    plant_program(jetson / "tools/nvpmodel", "echo 'permission denied' >&2; exit 1")
    report = doctor.report()
    assert report["jetson"]["clocks_locked"] is False and report["jetson"]["power_mode"] is None
    assert "mode unknown, clocks not locked: sudo jetson_clocks\n" in doctor.render(report)
    shutil.rmtree(jetson / "cpufreq")
    assert doctor.report()["jetson"]["clocks_locked"] is None
    for release, line in [
        ("R35 (release), REVISION: 4.1", "JetPack 5"),
        ("R38 (release), REVISION: 2.0", "JetPack 7: TensorRT 10, or 11.4.1 and later from "),
        ("R99 (release), REVISION: 0.0", "a JetPack that this version does not know"),
    ]:
        with case(release, line):
            (jetson / "release").write_text(f"# {release}, GCID: 1\n")
            assert doctor.report()["jetson"]["jetpack"].startswith(line)


def test_a_jetson_whose_opencv_is_that_of_pip(jetson, machine):
    build = "  GUI:                           GTK3\n    GStreamer:                   {}\n"
    for gstreamer, found in [("NO", ["clash"]), ("YES (1.20.3)", [])]:
        with case(gstreamer):
            machine["cv2"] = module(version="4.8.0") | {"build": build.format(gstreamer)}
            assert kinds(doctor.report(), "JetPack's OpenCV has it") == found
    text = doctor.render(doctor.report())
    assert "OpenCV            4.8.0, windows, GStreamer\n" in text


# Cache


def test_the_cache_folder_is_tried_and_a_relative_one_is_ignored(machine, monkeypatch, tmp_path):
    facts = probe.cache_facts()
    assert facts == {"folder": str(tmp_path / "cache/dynaguide-edge"), "error": ""}
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("here", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert probe.cache_facts()["folder"] == str(tmp_path / ".cache/dynaguide-edge")


def test_a_cache_folder_that_cannot_be_written_and_no_home_folder(machine, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file/cache"))
    report = doctor.report()
    found = problem(report, "cannot be written")
    assert found["kind"] == "broken" and "XDG_CACHE_HOME" in found["fix"]
    assert found["what"] in doctor.render(report)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)

    def nobody(_):
        raise KeyError("no such user")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    report = doctor.report()
    assert problem(report, "there is no home folder")["kind"] == "broken"
    assert report["cache"]["folder"] == ""


def test_a_read_only_cache_folder(machine, monkeypatch, tmp_path):
    (tmp_path / "sealed").mkdir(mode=0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "sealed"))
    with obeyed():
        assert "cannot be written" in probe.cache_facts()["error"]


# Commands


def test_a_command_that_is_not_there_gives_no_output():
    code, output, error = probe.run(["/no/such/program"])
    assert (code, output) == (127, "") and "No such file" in error


def test_the_command_also_where_the_caller_has_closed_its_streams():
    """Three processes at the same time; the one with an open stdout reports this machine."""
    processes = {
        closed: subprocess.Popen(
            ["sh", "-c", f"{sys.executable} -m runtime doctor --json {closed}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for closed in (">&-", "2>&-", ">&- 2>&-")
    }
    answers = {closed: process.communicate(timeout=600) for closed, process in processes.items()}
    report = json.loads(answers["2>&-"][0])
    assert report["targets"]["cpu"]["ready"] and "problems" in report
    code = int(any(p["kind"] == "broken" for p in report["problems"]))
    for closed, process in processes.items():
        with case(closed):
            assert process.returncode == code == 0 and answers[closed][1] == ""
