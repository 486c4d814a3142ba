"""Fixtures of the tests of the tools.

Modules that need onnx are imported by the fixtures that use them, because a test that does not
need it can run without it.
"""

import contextlib
import io
import os
import shutil
import sys
import types
from pathlib import Path

import pytest
from planted_machines import module, plant_cuda_module, plant_program

from runtime.__main__ import main
from runtime.bundle.write import write_bundle
from runtime.device import driver
from runtime.device.driver import CudaDevice
from runtime.tools import probe


@pytest.fixture(scope="session")
def templates(tmp_path_factory):
    """Two valid bundles without engines, with a recipe: "kmeans" and "network"."""
    from bundles import tiny_parts
    from runtime_commands import shapes

    folder = tmp_path_factory.mktemp("templates")
    for name in ("kmeans", "network"):
        manifest, files = tiny_parts(with_network=name == "network")
        for engine in manifest["engines"]:
            del files[engine["file"]]
        manifest["engines"] = []
        manifest["recipe"] |= {
            "command": "python -m export --model tiny --target onnx,rtx",
            "targets": ["onnx", "rtx"],
            "compute_capabilities": ["8.6"],
            "shapes": shapes(manifest["graphs"]),
        }
        write_bundle(folder / name, manifest, files)
    return folder


@pytest.fixture
def bundle(templates, tmp_path):
    """A copy of the k-means bundle's folder."""
    return Path(shutil.copytree(templates / "kmeans", tmp_path / "tiny.bundle"))


def said(*words):
    """Exit code, stdout and stderr of a command, for fixtures that several tests share."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def first_build(templates, tmp_path_factory):
    """The k-means bundle after its engines were built, and what the two commands said."""
    from runtime_commands import contents

    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX builds the engines")
    place = tmp_path_factory.mktemp("built") / "tiny.bundle"
    shutil.copytree(templates / "kmeans", place)
    before = contents(place)
    dry_run = said("build", place, "--dry-run")
    unchanged = contents(place) == before
    return types.SimpleNamespace(
        place=place, dry_run=dry_run, unchanged=unchanged, run=said("build", place)
    )


@pytest.fixture(scope="session")
def built(first_build):
    """The k-means bundle with real engines of TensorRT for RTX. Tests must not change it."""
    assert first_build.run[0] == 0
    return first_build.place


@pytest.fixture
def with_engines(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "tiny.bundle"))


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU, for the loader and the command line."""
    found = [CudaDevice(0, "Pretended", "8.6", 2**33, 2**32)]
    for name in ("runtime.bundle.open", "runtime.tools.check"):
        monkeypatch.setattr(f"{name}.cuda_problem", lambda: None)
    for name in ("runtime.bundle.open", "runtime.tools.check", "runtime.bundle.engines"):
        monkeypatch.setattr(f"{name}.cuda_devices", lambda: found)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine that has both native modules and OpenCV, else nothing; tests add to ``modules``."""
    modules = {name: module("absent") for name in probe.MODULES} | {"cv2": module()}
    mapped = probe.mapped_libraries
    before = set(mapped())  # what other tests have loaded into this process is not of the machine
    monkeypatch.setattr(probe, "mapped_libraries", lambda: [p for p in mapped() if p not in before])
    monkeypatch.setattr(probe, "probe", lambda name: dict(modules[name.split(".")[0]]))
    monkeypatch.setattr(probe, "owners_of_modules", dict)
    plant_cuda_module(monkeypatch, ["8.6", "9.0", "9.0+ptx"])
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not p.endswith("-packages")])
    monkeypatch.setattr(driver, "_DRIVER", str(tmp_path / "libcuda.so.1"))
    monkeypatch.setattr(driver, "_TEGRA_RELEASE", tmp_path / "none")
    monkeypatch.setattr(driver, "_TREE_MODEL", tmp_path / "none")
    monkeypatch.setattr(driver, "platform_tag", lambda: "linux-x86_64")
    tools = tmp_path / "tools"
    tools.mkdir()
    plant_program(tools / "ldconfig", "exit 1")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    monkeypatch.delenv("SEG_ISA", raising=False)
    return modules
