"""What the doctor finds of TensorRT, Python modules and distributions, planted one by one."""

import shutil
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
from cases import case
from planted_machines import (
    compile_c,
    kinds,
    module,
    plant_gpu,
    plant_library,
    plant_program,
    problem,
)

from runtime.tools import doctor, probe

ROOT = Path(__file__).resolve().parents[2]


def plant_distribution(folder, name, version, top_level=None, files=()):
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if top_level:
        (info / "top_level.txt").write_text(f"{top_level}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


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


def test_python_bindings_that_differ_from_the_library_they_load(machine, tmp_path):
    library = plant_library(tmp_path / "libnvinfer.so.10", "10.3.0.30")
    machine["tensorrt"] = module(version="10.7.0", mapped=[library])
    report = doctor.report()
    clash = problem(report, "Python's tensorrt is 10.7.0, but the library that it loads, ")
    assert clash["kind"] == "clash" and clash["what"].endswith("is 10.3.0.30")
    machine["tensorrt"] = module(version="10.3.0", mapped=[library])
    assert not kinds(doctor.report(), "the library that it loads")


def test_one_version_in_two_places_does_not_disagree(machine, monkeypatch, tmp_path):
    for folder in ("a", "b"):
        plant_library(tmp_path / folder / "libnvinfer.so.10", "10.3.0.30")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}/a:{tmp_path}/b")
    report = doctor.report()
    assert len(report["libraries"]) == 2 and not kinds(report, "several versions")


def test_versions_of_libraries_come_from_the_symbol_then_from_the_name(tmp_path):
    symbol = plant_library(tmp_path / "libnvinfer.so.10.9.9", "10.3.0.30")
    assert probe._library_version(symbol) == "10.3.0.30"
    named = tmp_path / "libnvinfer.so.8.6.1"
    named.write_bytes(b"no symbol")
    assert probe._library_version(str(named)) == "8.6.1"
    for name, content in (("libnvinfer.so.10", b"no symbol"), ("libnvinfer.so.8.6.2", b"")):
        (tmp_path / name).write_bytes(content)
        assert probe._library_version(str(tmp_path / name)) is None


def test_trtexec_names_the_library_it_links(machine, monkeypatch, tmp_path):
    assert doctor.report()["trtexec"] is None
    plant_program(tmp_path / "tools/trtexec", "exit 1")  # it links nothing: nothing is guessed
    report = doctor.report()
    assert report["trtexec"]["library"] is None and report["libraries"] == []
    assert "links no TensorRT; it loads one when it runs" in doctor.render(report)
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


# Python modules, really imported


@pytest.fixture
def plant_module(monkeypatch, tmp_path):
    """Plant a module ``tensorrt`` that hides any other."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # each source is read anew

    def plant(source):
        folder = tmp_path / "site/tensorrt"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text(source)
        return probe.probe("tensorrt")

    return plant


def test_modules_say_version_and_libraries_or_that_they_are_absent(plant_module, tmp_path):
    library = plant_library(tmp_path / "libnvinfer.so.10", "10.3.0.30")
    facts = plant_module(
        f"import ctypes\nprint('hello')\n__version__ = '10.3.0'\nctypes.CDLL({library!r})\n"
    )
    assert (facts["state"], facts["version"]) == ("ready", "10.3.0")
    assert library in facts["mapped"] and facts["file"].endswith("site/tensorrt/__init__.py")
    assert probe.probe("a_module_that_nobody_has")["state"] == "absent"
    assert probe.probe("a_module_that_nobody_has.driver")["state"] == "absent"


def test_a_module_that_fails_to_import_or_hangs_is_broken(plant_module, monkeypatch):
    for source, error in [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
        ("import os\nos.kill(os.getpid(), 40)", "ended by signal 40"),
        ("raise ImportError('libnvinfer.so.10: cannot open')", "libnvinfer.so.10: cannot open"),
        ("import a_module_that_nobody_has", "No module named 'a_module_that_nobody_has'"),
        ("import sys\nsys.exit()", "the import ends the interpreter"),
        ("import sys\nsys.exit(7)", "the import ended with exit code 7"),
    ]:
        with case(error):
            facts = plant_module(source)
            assert facts["state"] == "broken" and error in facts["error"]
    monkeypatch.setattr(probe, "_SECONDS", 0.5)
    facts = plant_module("import time\ntime.sleep(60)")
    assert facts["state"] == "broken" and "did not finish in 0.5 s" in facts["error"]


NULL = """
__version__ = "10.13.3"
class ILogger:
    WARNING, ERROR, INTERNAL_ERROR = 1, 2, 3
class Builder:
    def __init__(self, log):
        log.log(ILogger.WARNING, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")
"""


def test_tensorrt_is_started_not_only_imported(plant_module):
    facts = plant_module(NULL)
    assert facts["state"] == "unstarted" and facts["version"] == "10.13.3" and facts["fix"]
    assert "its log says: CUDA initialization failure with error: 35" in facts["error"]
    starts = NULL.replace("        raise", "        return\n        raise")
    assert plant_module(starts)["state"] == "ready"
    crash = "        import os; os.kill(os.getpid(), 11)\n        raise"
    facts = plant_module(NULL.replace("        raise", crash))
    assert (facts["state"], facts["version"]) == ("unstarted", "10.13.3")
    assert facts["error"] == "starting it is ended by SIGSEGV"


def test_a_tensorrt_that_does_not_start_is_not_ready(machine, monkeypatch):
    machine["tensorrt"] = module("unstarted", "10.13.3", error="it makes no Builder")
    machine["pycuda"] = module()
    report = doctor.report()  # without a GPU that is not its fault
    assert not kinds(report, "does not start")
    assert report["targets"]["trt"]["why"].startswith("no GPU: no CUDA driver")
    assert "TensorRT          10.13.3, does not start here\n" in doctor.render(report)
    plant_gpu(monkeypatch)
    machine["tensorrt"]["fix"] = "update the driver"
    machine["tensorrt_rtx"] = module("unstarted", "1.7", error="it makes no Builder")
    report = doctor.report()
    why = "TensorRT is installed but does not start: it makes no Builder"
    assert report["targets"]["trt"] == {"ready": False, "why": why, "fix": "update the driver"}
    assert kinds(report, "TensorRT is installed but does not") == ["broken"]
    assert kinds(report, "RTX is installed but does not start") == ["broken"]
    assert not report["targets"]["rtx build"]["ready"]
    assert not report["targets"]["rtx run"]["ready"]


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
    monkeypatch.setattr(probe, "probe", lambda name: asked.append(name) or module("absent"))
    doctor.report()
    plant_gpu(monkeypatch)
    doctor.report()
    assert [name for name in asked if "pycuda" in name] == ["pycuda", "pycuda.driver"]


# Distributions


OWNERS = probe.owners_of_modules  # before any test replaces it


@pytest.fixture
def site(machine, monkeypatch, tmp_path):
    """A folder for planted distributions, besides which none are installed."""
    monkeypatch.setattr(probe, "owners_of_modules", OWNERS)
    only_planted = partial(metadata.distributions, path=[str(tmp_path / "site")])
    monkeypatch.setattr(metadata, "distributions", only_planted)
    plant_distribution(tmp_path / "site", "dynaguide-edge", "0.1.0", "sdk\nruntime\nexport")
    return tmp_path / "site"


def test_other_owners_of_our_import_names_are_found(site):
    report = doctor.report()
    assert report["package"]["version"] == "0.1.0" and not kinds(report, "import name")
    assert report["owners"]["sdk"] == ["dynaguide-edge"] and report["owners"]["benchmarks"] == []
    clash = {
        "kind": "clash",
        "what": "the import name 'sdk' is also installed by some-sdk",
        "fix": "pip uninstall some-sdk; pip install --force-reinstall --no-deps dynaguide-edge",
    }
    for where in ({"top_level": "sdk"}, {"files": ["sdk/__init__.py", "x.py"]}):
        with case(where):
            plant_distribution(site, "Some_SDK", "2.0", **where)
            report = doctor.report()
            assert report["owners"]["sdk"] == ["dynaguide-edge", "some-sdk"]
            assert problem(report, "import name") == clash
            shutil.rmtree(site / "Some_SDK-2.0.dist-info")


def test_remains_of_distributions_do_not_hide_the_others(site, machine):
    (site / "~umpy-1.0.dist-info").mkdir()
    (site / "bad-1.0.dist-info").mkdir()
    (site / "bad-1.0.dist-info/METADATA").write_bytes(b"\xff\xfe\0\x80")
    plant_distribution(site, "foreign", "1.0", "runtime")
    machine["pycuda"] = module()
    plant_distribution(site, "pycuda", "2025.1", "pycuda")
    report = doctor.report()
    assert report["owners"]["runtime"] == ["dynaguide-edge", "foreign"]
    # A version that the module does not tell is that of its distribution.
    assert report["modules"]["pycuda"]["version"] == "2025.1"


def test_two_onnx_runtimes_and_two_opencvs_over_each_other(site, machine):
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
    for name in ("opencv-python", "opencv-python-headless"):
        plant_distribution(site, name, "4.10.0", "cv2")
    assert kinds(doctor.report(), "'cv2'") == ["clash"]
