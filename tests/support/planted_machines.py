"""Libraries, programs, distributions and GPUs that are planted for the doctor to find."""

import shutil
import subprocess
import types

import pytest

from runtime.device import choose, driver

GIB = 2**30


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


def module(state="ready", version="", providers=(), mapped=(), error="", file=None):
    facts = {"state": state, "version": version, "providers": list(providers), "error": error}
    return facts | {"mapped": list(mapped), "file": file}


def plant_gpu(monkeypatch, capability="8.6", name="NVIDIA GeForce RTX 3060"):
    gpu = driver.CudaDevice(0, name, capability, 12 * GIB, 10 * GIB)
    monkeypatch.setattr(driver, "cuda_problem", lambda: None)
    monkeypatch.setattr(driver, "cuda_devices", lambda: [gpu])
    monkeypatch.setattr(driver, "cuda_driver_version", lambda: "12.6")


def plant_cuda_module(monkeypatch, compiled):
    module = types.SimpleNamespace(architectures=lambda: compiled, runtime_version=lambda: 12060)
    monkeypatch.setattr(choose, "cuda_module", lambda: module)


def kinds(report, word):
    """Kinds of the problems that speak of ``word``."""
    return [p["kind"] for p in report["problems"] if word in p["what"]]


def problem(report, word):
    (found,) = [p for p in report["problems"] if word in p["what"]]
    return found
