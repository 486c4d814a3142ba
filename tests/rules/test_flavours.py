"""OpenCV and ONNX Runtime: whichever flavour is installed is used, and none is required.

A folder in front of Python's path contains files that stand for a library that is missing or fails.
``flavours.sh`` installs the wheel with real flavours.
"""

import logging
import os
import re
import subprocess
import sys
import types

import pytest
from cases import case
from one_layer_networks import nearest_colour, save
from source_rules import ROOT

from runtime.errors import MissingBackend
from runtime.flavours import LIBRARIES, check_version, import_fix, missing
from runtime.tools import probe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ABSENT = 'raise ModuleNotFoundError("No module named {0!r}", name={0!r})'
NO_OPENCV = r"OpenCV is not installed\n  fix: pip install 'dynaguide-edge\[run\]'; or, to keep an "


@pytest.fixture
def python(tmp_path):
    """Runs Python with files instead of libraries; returns exit code, stdout and stderr."""
    (tmp_path / "first").mkdir()

    def run(*words, **files):
        for name, text in files.items():
            text = ABSENT.format(name) if text is None else text
            (tmp_path / "first" / f"{name}.py").write_text(text)
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'first'}:{ROOT}"}
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        return done.returncode, done.stdout, done.stderr

    return run


# What the wheel requires


def test_the_wheel_requires_no_flavour_and_one_extra_names_them():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements):
        return {re.match(r"[\w-]+(\[.*\])?", line)[0] for line in requirements}

    assert names(project["dependencies"]) == {"numpy", "safetensors", "tqdm"}
    extras = project["optional-dependencies"]
    lowest = {"opencv-python": "4.8", "onnxruntime-gpu": "1.18", "onnxruntime": "1.18"}
    assert names(extras["run"]) == set(lowest)
    for line in extras.pop("run"):
        assert line.split(";")[0].startswith(f"{min(names([line]))}>={lowest[min(names([line]))]}")
        assert ("!=1.27.0" in line) == line.startswith("onnxruntime-gpu")
    flavours = {name for library in LIBRARIES.values() for name in library.flavours}
    for name, requirements in extras.items():
        with case(name):
            assert not names(requirements) & flavours and "[run" not in " ".join(requirements)
    assert {name: library.lowest for name, library in LIBRARIES.items()} == {
        "cv2": lowest["opencv-python"],
        "onnxruntime": lowest["onnxruntime"],
    }


# A library is missing


def test_command_lines_without_opencv_say_what_to_install(python, tmp_path):
    for words in (
        ["sdk", "demo"],
        ["sdk", "predict", "x.png", "--json"],
        ["export", "--model", "kmeans"],
        ["benchmarks", "latency"],
        ["benchmarks", "photo"],
    ):
        with case(*words):
            code, _, errors = python("-m", *words, cv2=None)
            assert code == 4 and re.search(f"^error: {NO_OPENCV}", errors, re.M), errors
            assert "Traceback" not in errors and "opencv-contrib-python-headless" in errors


def test_packages_without_opencv_raise_where_they_need_it(python):
    program = """
import numpy as np, runtime, sdk
from runtime.core.resize import resize
from sdk import InputError, RefineConfig
for work in (
    lambda: sdk.Segmenter,
    lambda: exec("from sdk import Result"),
    lambda: resize(np.zeros((8, 8, 3), np.uint8), 4, 4),
):
    try:
        work()
    except sdk.MissingBackend as error:
        print(error)
assert runtime.guided_filter(np.zeros((8, 8, 3)), np.zeros((8, 8))).shape == (8, 8)
assert not hasattr(sdk, "no_such_name")
"""
    code, output, errors = python("-c", program, cv2=None)
    assert code == 0 and len(re.findall(NO_OPENCV, output)) == 3, errors


def test_without_onnx_runtime_only_networks_are_refused(python, tmp_path):
    network = save(tmp_path / "m.onnx", *nearest_colour())
    photo = ROOT / "docs/images/demo.jpg"
    predict = ["-m", "sdk", "predict", photo, "-o", tmp_path / "out"]
    assert python(*predict, onnxruntime=None)[0] == 0
    code, _, errors = python(*predict, "--prior", network)
    assert code == 4 and "ONNX Runtime is needed to run m.onnx" in errors
    assert "  fix: pip install onnxruntime   (or onnxruntime-gpu; 'dynaguide-edge[run]' " in errors
    # The library of onnxruntime-gpu 1.27.0 is linked to CUDA 13.
    why = "libcudart.so.13: cannot open shared object file: No such file or directory"
    code, _, errors = python(
        *predict, "--prior", network, onnxruntime=f'raise ImportError("{why}")'
    )
    assert code == 4 and why in errors and "fix: pip install 'onnxruntime-gpu!=1.27.0'" in errors


def test_the_doctor_works_without_both(python):
    code, output, errors = python("-m", "runtime", "doctor", cv2=None, onnxruntime=None)
    assert code == 0, errors
    assert "OpenCV            not installed" in output
    assert "ONNX Runtime      not installed" in output
    assert "missing: OpenCV is not installed\n    fix: pip install opencv-python " in output


# A library is broken or too old


def test_an_opencv_that_cannot_be_loaded_has_a_fix(python):
    missing_library = "libGL.so.1: cannot open shared object file: No such file or directory"
    headless = "apt-get install libgl1 libglib2.0-0, or pip uninstall -y opencv-python "
    for error, fix in [
        (f"ImportError({missing_library!r})", headless),
        ("ImportError('numpy.core.multiarray failed to import')", "pip install 'numpy<2'"),
        ("AttributeError('no attribute DictValue')", "pip uninstall -y opencv-python "),
    ]:
        with case(error):
            code, _, errors = python("-m", "sdk", "demo", cv2=f"raise {error}")
            said = "error: OpenCV is installed but cannot be imported: "
            assert code == 4 and said in errors and f"\n  fix: {fix}" in errors
            assert "Traceback" not in errors
            code, output, _ = python("-m", "runtime", "doctor")
            assert code == 1 and f"    fix: {fix}" in output


def test_the_doctor_describes_an_old_opencv(python):
    build = "  GUI:                           NONE\n    GStreamer:                   YES (1.20.3)\n"
    old = f"__version__ = '4.5.4'\ndef getBuildInformation():\n    return {build!r}\n"
    code, output, _ = python("-m", "runtime", "doctor", cv2=old)
    assert code == 0 and re.search(
        r"OpenCV            4.5.4 \(.*\), no windows \(headless\), GStreamer\n", output
    )
    why = "OpenCV 4.5.4 is older than 4.8, the lowest supported version"
    assert f"clash: {why}\n    fix: pip install 'opencv-" in output


def test_an_old_library_is_reported_and_a_folder_without_module_is_missing(caplog):
    caplog.set_level(logging.WARNING, "dg.flavours")
    for name, version, old in [
        *[("cv2", version, False) for version in ("4.8.0", "4.10.0.84", "5.0.0-pre", "unknown")],
        *[("cv2", "4.7.0", True), ("cv2", "3.20", True)],
        *[("onnxruntime", "1.18.0", False), ("onnxruntime", "2.0.0+cu13", False)],
        ("onnxruntime", "1.9.0", True),
    ]:
        with case(name, version):
            caplog.clear()
            for _ in range(2):  # it is reported once
                check_version(name, types.SimpleNamespace(__version__=version, __file__="cv2.so"))
            assert len(caplog.messages) == int(old)
            if old:
                assert re.search(rf"{version} is older than .*; install a new", caplog.messages[0])
    folder = types.ModuleType("cv2")
    folder.__path__ = ["/site/cv2"]
    with pytest.raises(MissingBackend, match=r"(?s)\['/site/cv2'\] does not contain it.*uninstall"):
        check_version("cv2", folder)


def test_the_doctor_sees_a_folder_without_module(monkeypatch, tmp_path):
    (tmp_path / "left_behind/data").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    facts = probe.probe("left_behind")
    assert facts["state"] == "broken" and "left_behind'] does not contain it" in facts["error"]


def test_an_onnx_runtime_that_fails_otherwise_is_installed_again():
    error = missing("onnxruntime", ImportError("cannot import name 'x'"))
    assert error.message.endswith("is installed but cannot be imported: cannot import name 'x'")
    assert error.fix.startswith("pip uninstall -y onnxruntime onnxruntime-gpu; pip install ")
    absent = ModuleNotFoundError("No module named 'flatbuffers'", name="flatbuffers")
    assert import_fix("onnxruntime", absent) == error.fix
