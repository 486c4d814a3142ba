"""The doctor's report: machines are planted (libraries, packages, drivers) and must be seen."""

import json
import os
import shutil
import subprocess
import sys
import types
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest

from runtime import backend, device, doctor
from runtime.errors import DeviceError, MissingBackend

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
CUDA_MODULE = backend.cuda_module  # before any test replaces it


def compile_c(source, path, *flags):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) to make a library with")
    command = [compiler, "-w", "-x", "c", "-", "-x", "none", "-o", str(path), *map(str, flags)]
    subprocess.run(command, input=source, text=True, check=True)


def plant_library(path, version):
    """A library that exports its version as TensorRT's do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    symbol = "int tensorrt_version_" + version.replace(".", "_") + ";"
    compile_c(symbol, path, "-shared", "-fPIC", f"-Wl,-soname,{path.name}")
    return str(path)


def plant_program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def plant_distribution(folder, name, version, top_level=None, files=()):
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if top_level:
        (info / "top_level.txt").write_text(f"{top_level}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def module(state="ready", version="", providers=(), mapped=(), error="", file=None):
    facts = {"state": state, "version": version, "providers": list(providers), "error": error}
    return facts | {"mapped": list(mapped), "file": file}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine that has both native modules and OpenCV, else nothing; tests add to ``modules``."""
    modules = {name: module("absent") for name in doctor._MODULES} | {"cv2": module()}
    monkeypatch.setattr(doctor, "_probe", lambda name: dict(modules[name.split(".")[0]]))
    monkeypatch.setattr(doctor, "owners_of_modules", dict)
    plant_cuda_module(monkeypatch, ["8.6", "9.0", "9.0+ptx"])
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not p.endswith("-packages")])
    monkeypatch.setattr(device, "_DRIVER", str(tmp_path / "libcuda.so.1"))
    monkeypatch.setattr(device, "_TEGRA_RELEASE", tmp_path / "none")
    monkeypatch.setattr(device, "_TREE_MODEL", tmp_path / "none")
    monkeypatch.setattr(device, "platform_tag", lambda: "linux-x86_64")
    tools = tmp_path / "tools"
    tools.mkdir()
    plant_program(tools / "ldconfig", "exit 1")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    monkeypatch.delenv("SEG_ISA", raising=False)
    return modules


def plant_gpu(monkeypatch, capability="8.6", name="NVIDIA GeForce RTX 3060"):
    gpu = device.CudaDevice(0, name, capability, 12 * GIB, 10 * GIB)
    monkeypatch.setattr(device, "cuda_problem", lambda: None)
    monkeypatch.setattr(device, "cuda_devices", lambda: [gpu])
    monkeypatch.setattr(device, "cuda_driver_version", lambda: "12.6")


def plant_cuda_module(monkeypatch, compiled):
    module = types.SimpleNamespace(architectures=lambda: compiled, runtime_version=lambda: 12060)
    monkeypatch.setattr(backend, "cuda_module", lambda: module)


def kinds(report, word):
    """Kinds of the problems that speak of ``word``."""
    return [p["kind"] for p in report["problems"] if word in p["what"]]


def problem(report, word):
    (found,) = [p for p in report["problems"] if word in p["what"]]
    return found


# This machine, as it is


def test_this_machine_is_reported_without_importing_anything_heavy(tmp_path):
    program = (
        "import json, sys\nfrom runtime import doctor\nreport = doctor.report()\n"
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
    assert report["package"]["target"] == "base" and report["targets"]["cpu"]["ready"]
    assert report["modules"]["cv2"]["state"] == "ready" and report["python"]["version"] in text
    assert f"base (of {', '.join(report['package']['targets'])}), SEG_ISA=base" in text
    for found in report["problems"]:
        assert found["kind"] in ("missing", "clash", "broken") and found["what"] and found["fix"]


def test_tensorrt_for_rtx_of_this_machine_is_found_with_its_library():
    facts = doctor._probe("tensorrt_rtx")
    if facts["state"] == "absent":
        pytest.skip("tensorrt_rtx is not installed")
    (library,) = [
        lib
        for lib in doctor._libraries({"tensorrt_rtx": facts}, None)
        if "tensorrt_rtx" in lib["loaded_by"]
    ]
    assert library["version"].startswith(facts["version"].split("+")[0])
    assert library["family"] == "libtensorrt_rtx" and "wheel" in library["found_by"]


def test_an_unknown_instruction_set_is_broken_and_has_a_fix():
    program = "import json; from runtime import doctor; print(json.dumps(doctor._package({})))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SEG_ISA": "mmx"}
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment)
    facts = json.loads(output.stdout)
    assert "mmx" in facts["error"] and facts["isa"] == "mmx" and "SEG_ISA" in facts["fix"]


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


@pytest.mark.parametrize(
    "version, ready",
    [
        *[(version, True) for version in ("10.3.0", "10.3.0.30", "11.4.0.106")],
        *[(version, False) for version in ("10.2.0", "8.6.1", "12.0.0", "0.0.1", "", "dev")],
    ],
)
def test_versions_of_tensorrt(machine, monkeypatch, version, ready):
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
    assert "here is 9.0" in verdict["why"] and verdict["fix"] == "use target trt"


def test_a_driver_that_fails_is_broken_not_missing(machine, monkeypatch):
    failing = DeviceError("the CUDA driver does not start: cuInit gives 803", fix="restart")
    monkeypatch.setattr(device, "cuda_problem", lambda: failing)
    found = problem(doctor.report(), "cuInit gives 803")
    assert found == {
        "kind": "broken",
        "what": "the CUDA driver does not start: cuInit gives 803",
        "fix": "restart",
    }


def test_a_gpu_that_cannot_be_described_is_broken(machine, monkeypatch):
    def fail():
        raise DeviceError("the CUDA driver fails: cuDeviceGetName gives 4", fix="nvidia-smi")

    monkeypatch.setattr(device, "cuda_problem", lambda: None)
    monkeypatch.setattr(device, "cuda_devices", fail)
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


@pytest.mark.parametrize("platform, fix", [("linux-x86_64", "-gpu"), ("linux-aarch64", "use targ")])
def test_an_onnx_runtime_without_cuda(machine, monkeypatch, platform, fix):
    plant_gpu(monkeypatch)
    monkeypatch.setattr(device, "platform_tag", lambda: platform)
    machine["onnxruntime"] = module(providers=["CPUExecutionProvider"])
    verdict = doctor.report()["targets"]["onnx on cuda"]
    assert verdict["why"] == "this ONNX Runtime has no CUDA provider, only CPUExecutionProvider"
    assert fix in verdict["fix"]


def test_a_core_that_is_not_built(machine, monkeypatch):
    def fail():
        raise MissingBackend("the C++ core is not built (no _core)", fix="pip install .")

    monkeypatch.setattr(backend, "targets", fail)
    report = doctor.report()
    assert problem(report, "core is not built")["kind"] == "broken"
    assert report["targets"]["cpu"] == {
        "ready": False,
        "why": "the C++ core is not built (no _core)",
        "fix": "pip install .",
    }
    assert "the C++ core is not built (no _core)" in doctor.render(report)


def test_what_the_cuda_module_is_compiled_for_without_a_gpu(machine):
    report = doctor.report()
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
    text = doctor.render(report)
    assert "CUDA module       for compute capability 8.6, 9.0, 9.0+ptx\n" in text


def test_a_gpu_that_the_cuda_module_runs_on(machine, monkeypatch):
    plant_gpu(monkeypatch)
    report = doctor.report()
    assert report["cuda_module"]["runs_on"] == ["cuda:0"] and not kinds(report, "has code for")
    assert report["targets"]["cuda"]["ready"]
    assert "8.6, 9.0, 9.0+ptx; runs on cuda:0\n" in doctor.render(report)


def test_a_gpu_that_the_cuda_module_has_no_code_for(machine, monkeypatch):
    plant_gpu(monkeypatch, "7.5", "Tesla T4")
    report = doctor.report()
    found = problem(report, "cuda:0 (Tesla T4, compute capability 7.5) is not among those")
    assert found["kind"] == "missing" and "SEG_CUDA_ARCHS=75 pip install" in found["fix"]
    assert report["cuda_module"]["runs_on"] == []
    assert "is not among those this build has code for" in report["targets"]["cuda"]["why"]
    assert "; runs on no GPU that is here\n" in doctor.render(report)


def test_a_cuda_module_that_is_not_built_is_missed_only_beside_a_gpu(machine, monkeypatch):
    monkeypatch.setattr(backend, "cuda_module", CUDA_MODULE)
    monkeypatch.setitem(sys.modules, "runtime._cuda", None)
    report = doctor.report()
    assert not report["cuda_module"]["built"] and not kinds(report, "CUDA module")
    text = doctor.render(report)
    assert "CUDA module       the CUDA module is not built (" in text
    assert "; device='cuda' needs it: pip install -e .   (in a clone, with nvcc on PATH)\n" in text
    plant_gpu(monkeypatch)
    found = problem(doctor.report(), "the CUDA module is not built")
    assert found["kind"] == "missing" and "with nvcc on PATH" in found["fix"]


def test_a_cuda_module_that_cannot_be_loaded_is_broken(machine, monkeypatch):
    def fail():
        raise MissingBackend("the CUDA module is not built (undefined symbol)", fix="build it")

    monkeypatch.setattr(backend, "cuda_module", fail)
    found = problem(doctor.report(), "undefined symbol")
    assert (found["kind"], found["fix"]) == ("broken", "build it")


# Jetson


@pytest.fixture
def jetson(machine, monkeypatch, tmp_path):
    release, model = tmp_path / "release", tmp_path / "model"
    release.write_text("# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic\n")
    model.write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    monkeypatch.setattr(device, "_TEGRA_RELEASE", release)
    monkeypatch.setattr(device, "_TREE_MODEL", model)
    monkeypatch.setattr(device, "platform_tag", lambda: "linux-aarch64")
    plant_program(tmp_path / "tools/nvpmodel", "echo 'NV Power Mode: 15W'; echo 0")
    monkeypatch.setattr(doctor, "_CPUFREQ", tmp_path / "cpufreq")
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


def test_a_jetson_whose_clocks_move_and_whose_mode_is_not_readable(jetson):
    (jetson / "cpufreq/policy4/scaling_min_freq").write_text("729600\n")
    plant_program(jetson / "tools/nvpmodel", "echo 'permission denied' >&2; exit 1")
    report = doctor.report()
    assert report["jetson"]["clocks_locked"] is False and report["jetson"]["power_mode"] is None
    assert "mode unknown, clocks not locked: sudo jetson_clocks\n" in doctor.render(report)
    shutil.rmtree(jetson / "cpufreq")
    assert doctor.report()["jetson"]["clocks_locked"] is None


@pytest.mark.parametrize(
    "release, line",
    [
        ("R35 (release), REVISION: 4.1", "JetPack 5"),
        ("R38 (release), REVISION: 2.0", "JetPack 7"),
        ("R99 (release), REVISION: 0.0", "not a JetPack line"),
    ],
)
def test_jetpack_lines(jetson, release, line):
    (jetson / "release").write_text(f"# {release}, GCID: 1\n")
    assert doctor.report()["jetson"]["jetpack"].startswith(line)


# TensorRT libraries


def test_libraries_are_found_in_all_places_once_and_their_disagreement_is_marked(
    machine, monkeypatch, tmp_path
):
    wheel = plant_library(tmp_path / "site/tensorrt_libs/libnvinfer.so.10", "10.7.0.23")
    system = plant_library(tmp_path / "usr/libnvinfer.so.10.3.0", "10.3.0.30")
    (tmp_path / "usr/libnvinfer.so.10").symlink_to("libnvinfer.so.10.3.0")
    plant_library(tmp_path / "usr/libnvinfer_plugin.so.10", "10.3.0.30")  # another family
    listing = f"2 libs found\\n\\tlibnvinfer.so.10 (libc6) => {tmp_path}/usr/libnvinfer.so.10"
    plant_program(tmp_path / "tools/ldconfig", f"printf '{listing}\\n'")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}/nowhere::{tmp_path}/usr")
    machine["tensorrt"] = module(version="10.7.0.23", mapped=[wheel])
    report = doctor.report()
    libraries = {lib["path"]: lib for lib in report["libraries"] if str(tmp_path) in lib["path"]}
    assert libraries == {
        wheel: {
            "path": wheel,
            "family": "libnvinfer",
            "version": "10.7.0.23",
            "found_by": ["wheel"],
            "loaded_by": ["tensorrt"],
        },
        system: {
            "path": system,
            "family": "libnvinfer",
            "version": "10.3.0.30",
            "found_by": ["LD_LIBRARY_PATH", "ldconfig"],
            "loaded_by": [],
        },
    }
    clash = problem(report, "several versions")
    assert clash["kind"] == "clash" and clash["fix"]
    assert f"10.3.0.30 in {system}" in clash["what"] and f"10.7.0.23 in {wheel}" in clash["what"]
    assert clash["what"].endswith("; Python loads 10.7.0.23")
    text = doctor.render(report)
    assert f"10.7.0.23  {wheel}  (wheel)  <- tensorrt\n" in text
    assert f"10.3.0.30  {system}  (LD_LIBRARY_PATH, ldconfig)\n" in text


def test_one_version_in_two_places_does_not_disagree(machine, monkeypatch, tmp_path):
    for folder in ("a", "b"):
        plant_library(tmp_path / folder / "libnvinfer.so.10", "10.3.0.30")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}/a:{tmp_path}/b")
    report = doctor.report()
    assert len(report["libraries"]) == 2 and not kinds(report, "several versions")


def test_python_bindings_that_differ_from_the_library_they_load(machine, tmp_path):
    library = plant_library(tmp_path / "libnvinfer.so.10", "10.3.0.30")
    machine["tensorrt"] = module(version="10.7.0", mapped=[library])
    report = doctor.report()
    clash = problem(report, "Python's tensorrt is 10.7.0, but the library that it loads, ")
    assert clash["kind"] == "clash" and clash["what"].endswith("is 10.3.0.30")
    machine["tensorrt"] = module(version="10.3.0", mapped=[library])
    assert not kinds(doctor.report(), "the library that it loads")


def test_versions_of_libraries_come_from_the_symbol_then_from_the_name(tmp_path):
    symbol = plant_library(tmp_path / "libnvinfer.so.10.9.9", "10.3.0.30")
    assert doctor._library_version(symbol) == "10.3.0.30"
    named = tmp_path / "libnvinfer.so.8.6.1"
    named.write_bytes(b"no symbol")
    assert doctor._library_version(str(named)) == "8.6.1"
    for name, content in (("libnvinfer.so.10", b"no symbol"), ("libnvinfer.so.8.6.2", b"")):
        (tmp_path / name).write_bytes(content)
        assert doctor._library_version(str(tmp_path / name)) is None


def test_trtexec_names_the_library_it_links(machine, monkeypatch, tmp_path):
    assert doctor.report()["trtexec"] is None
    library = plant_library(tmp_path / "old/libnvinfer.so.10", "10.3.0.30")
    links = ["-Wl,--no-as-needed", library, f"-Wl,-rpath,{tmp_path}/old"]
    compile_c("int main() { return 1; }", tmp_path / "tools/trtexec", *links)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}/new")
    plant_library(tmp_path / "new/libnvinfer.so.11", "11.4.0.106")
    report = doctor.report()
    path = str(tmp_path / "tools/trtexec")
    assert report["trtexec"] == {"path": path, "library": library}
    (linked,) = [lib for lib in report["libraries"] if lib["path"] == library]
    assert linked["loaded_by"] == ["trtexec"] and linked["found_by"] == []
    assert kinds(report, "several versions") == ["clash"]
    text = doctor.render(report)
    assert f"{path}, links {library}\n" in text
    assert f"10.3.0.30  {library}  (not on a search path)  <- trtexec\n" in text


def test_a_trtexec_that_links_nothing_is_not_guessed_at(machine, tmp_path):
    plant_program(tmp_path / "tools/trtexec", "exit 1")
    report = doctor.report()
    assert report["trtexec"]["library"] is None and report["libraries"] == []
    assert "links no TensorRT: it opens one when it runs" in doctor.render(report)


# Python modules, really imported


@pytest.fixture
def plant_module(monkeypatch, tmp_path):
    """Plant a module ``tensorrt`` that hides any other."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))

    def plant(source):
        folder = tmp_path / "site/tensorrt"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(source)
        return doctor._probe("tensorrt")

    return plant


def test_an_imported_module_says_version_and_libraries(plant_module, tmp_path):
    library = plant_library(tmp_path / "libnvinfer.so.10", "10.3.0.30")
    facts = plant_module(
        f"import ctypes\nprint('hello')\n__version__ = '10.3.0'\nctypes.CDLL({library!r})\n"
    )
    assert (facts["state"], facts["version"]) == ("ready", "10.3.0")
    assert library in facts["mapped"] and facts["file"].endswith("site/tensorrt/__init__.py")


@pytest.mark.parametrize(
    "source, error",
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
        ("import os\nos.kill(os.getpid(), 40)", "ended by signal 40"),
        ("raise ImportError('libnvinfer.so.10: cannot open')", "libnvinfer.so.10: cannot open"),
        ("import a_module_that_nobody_has", "No module named 'a_module_that_nobody_has'"),
        ("import sys\nsys.exit()", "importing it ends the interpreter"),
        ("import sys\nsys.exit(7)", "it ended with 7"),
    ],
)
def test_a_module_that_fails_to_import_is_broken(plant_module, source, error):
    facts = plant_module(source)
    assert facts["state"] == "broken" and error in facts["error"]


def test_a_module_that_hangs_is_broken(plant_module, monkeypatch):
    monkeypatch.setattr(doctor, "_SECONDS", 0.5)
    facts = plant_module("import time\ntime.sleep(60)")
    assert facts["state"] == "broken" and "did not finish in 0.5 s" in facts["error"]


def test_an_absent_module_is_absent():
    assert doctor._probe("a_module_that_nobody_has")["state"] == "absent"
    assert doctor._probe("a_module_that_nobody_has.driver")["state"] == "absent"


def test_a_broken_module_is_a_problem_with_a_fix(machine):
    machine["cv2"] = module("broken", error="libGL.so.1: cannot open shared object file")
    machine["onnxruntime"] = module("broken", error="importing it is ended by SIGSEGV")
    report = doctor.report()
    assert not report["targets"]["cpu"]["ready"] and not report["targets"]["onnx"]["ready"]
    found = problem(report, "OpenCV is installed but cannot be imported: libGL.so.1")
    assert found["kind"] == "broken" and "apt-get install libgl1" in found["fix"]
    assert kinds(report, "ended by SIGSEGV") == ["broken"]
    assert "broken: importing it is ended by SIGSEGV" in doctor.render(report)


def test_pycuda_is_loaded_whole_only_beside_a_driver(machine, monkeypatch):
    asked = []
    monkeypatch.setattr(doctor, "_probe", lambda name: asked.append(name) or module("absent"))
    doctor.report()
    plant_gpu(monkeypatch)
    doctor.report()
    assert [name for name in asked if "pycuda" in name] == ["pycuda", "pycuda.driver"]


# Distributions


OWNERS = doctor.owners_of_modules  # before any test replaces it


@pytest.fixture
def site(machine, monkeypatch, tmp_path):
    """A folder for planted distributions, besides which none are installed."""
    monkeypatch.setattr(doctor, "owners_of_modules", OWNERS)
    only_planted = partial(metadata.distributions, path=[str(tmp_path / "site")])
    monkeypatch.setattr(metadata, "distributions", only_planted)
    plant_distribution(tmp_path / "site", "dynaguide-edge", "0.1.0", "sdk\nruntime\nexport")
    return tmp_path / "site"


def test_our_own_distribution_is_no_double_owner(site):
    report = doctor.report()
    assert report["package"]["version"] == "0.1.0" and not kinds(report, "import name")
    assert report["owners"]["sdk"] == ["dynaguide-edge"] and report["owners"]["benchmarks"] == []


@pytest.mark.parametrize("where", [{"top_level": "sdk"}, {"files": ["sdk/__init__.py", "x.py"]}])
def test_double_owners_of_our_import_names_are_found(site, where):
    plant_distribution(site, "Some_SDK", "2.0", **where)
    report = doctor.report()
    assert report["owners"]["sdk"] == ["dynaguide-edge", "some-sdk"]
    assert problem(report, "import name") == {
        "kind": "clash",
        "what": "the import name 'sdk' is also installed by some-sdk",
        "fix": "pip uninstall some-sdk; pip install --force-reinstall --no-deps dynaguide-edge",
    }


def test_two_onnx_runtimes_over_each_other(site, machine):
    machine["onnxruntime"] = module(version="1.20.0", providers=["CPUExecutionProvider"])
    plant_distribution(site, "onnxruntime-gpu", "1.20.0", "onnxruntime")
    assert not kinds(doctor.report(), "over each other")
    plant_distribution(site, "onnxruntime", "1.18.0", "onnxruntime")
    report = doctor.report()
    clash = problem(report, "over each other")
    assert clash["kind"] == "clash" and "onnxruntime and onnxruntime-gpu" in clash["what"]
    fix = "pip uninstall -y onnxruntime onnxruntime-gpu; pip install onnxruntime-gpu"
    assert clash["fix"] == fix
    text = doctor.render(report)
    assert "onnxruntime 1.18.0" in text and "onnxruntime-gpu 1.20.0" in text


def test_two_opencvs_over_each_other(site):
    for name in ("opencv-python", "opencv-python-headless"):
        plant_distribution(site, name, "4.10.0", "cv2")
    assert kinds(doctor.report(), "'cv2'") == ["clash"]


def test_remains_of_distributions_do_not_hide_the_others(site):
    (site / "~umpy-1.0.dist-info").mkdir()
    (site / "bad-1.0.dist-info").mkdir()
    (site / "bad-1.0.dist-info/METADATA").write_bytes(b"\xff\xfe\0\x80")
    plant_distribution(site, "foreign", "1.0", "runtime")
    assert doctor.report()["owners"]["runtime"] == ["dynaguide-edge", "foreign"]


def test_a_version_that_the_module_does_not_tell_comes_from_its_distribution(site, machine):
    machine["pycuda"] = module()
    plant_distribution(site, "pycuda", "2025.1", "pycuda")
    assert doctor.report()["modules"]["pycuda"]["version"] == "2025.1"


def test_a_source_tree_that_is_not_installed(machine):
    report = doctor.report()
    assert report["package"]["version"] is None and not kinds(report, "dynaguide")
    assert f"not installed, in {ROOT / 'runtime'}" in doctor.render(report)


# Cache


def test_the_cache_folder_is_tried_and_nothing_is_left(machine, monkeypatch, tmp_path):
    facts = doctor._cache()
    assert facts == {"folder": str(tmp_path / "cache/dynaguide-edge"), "error": ""}
    assert not (tmp_path / "cache").exists()


def test_a_relative_cache_folder_is_ignored(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("here", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert doctor._cache()["folder"] == str(tmp_path / ".cache/dynaguide-edge")


def test_a_cache_folder_that_cannot_be_written(machine, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file/cache"))
    report = doctor.report()
    found = problem(report, "cannot be written")
    assert found["kind"] == "broken" and "XDG_CACHE_HOME" in found["fix"]
    assert found["what"] in doctor.render(report)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_a_read_only_cache_folder(machine, monkeypatch, tmp_path):
    (tmp_path / "sealed").mkdir(mode=0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "sealed"))
    assert "cannot be written" in doctor._cache()["error"]


def test_no_home_folder(machine, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)

    def nobody(_):
        raise KeyError("no such user")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    report = doctor.report()
    assert problem(report, "there is no home folder")["kind"] == "broken"
    assert report["cache"]["folder"] == ""


# Commands


def test_a_command_that_is_not_there_gives_no_output():
    code, output, error = doctor._run(["/no/such/program"])
    assert (code, output) == (127, "") and "No such file" in error


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_the_caller_has_closed(closed):
    command = f"{sys.executable} -m runtime doctor --json {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == ""
