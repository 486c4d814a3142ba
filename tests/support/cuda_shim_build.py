"""Compiles runtime._cuda for the host: its sources on cuda_shim.h instead of the CUDA runtime.

Objects and the module are kept in build/shim under a hash of all that they are made of, so that
only what has changed is compiled again.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "runtime/csrc"
CACHE = ROOT / "build/shim"
COMPILER = os.environ.get("CXX", "g++")
MOST_KEPT = 100  # files in the cache; the oldest are removed

# cuda_filter.cpp includes guided_filter.cu with less scratch memory, and adds functions for tests.
KERNELS = sorted(p for p in (CSRC / "cuda").glob("*.cu") if p.name != "guided_filter.cu")
BINDINGS = [CSRC / f"python/{name}.cpp" for name in ("cuda", "cuda_refiner", "arrays")]
OF_TESTS = [HERE / "cuda_filter.cpp", HERE / "cuda_hooks.cpp"]
HEADERS = sorted([*CSRC.glob("*.h"), *CSRC.rglob("cuda/*.*h"), *CSRC.glob("python/*.h")])


def digest(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def contents(paths):
    return [(path.name, path.read_bytes()) for path in paths]


def replaced(path, make):
    """Let ``make`` write a file under another name and then rename it, for other processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.stem}.{os.getpid()}{path.suffix}")
    make(half)
    half.replace(path)


@contextlib.contextmanager
def locked(folder):
    """Let one process at a time compile; another one then finds what it needs in the cache."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def forget_the_oldest(folder):
    """Remove all but the newest files of the cache."""
    files = sorted(folder.glob("*.*"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in files[MOST_KEPT:]:
        path.unlink(missing_ok=True)


def run(command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def shim_flags(*, optimise=True):
    """The flags of a source that includes the shim; with Python's sanitizers, if it has any."""
    flags = ["-std=c++17", "-O2" if optimise else "-O0", "-fPIC", "-fvisibility=hidden", "-pthread"]
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        flags += ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return [*flags, "-include", HERE / "cuda_shim.h"]


@functools.cache
def built(cache=CACHE):
    """Return the path of the module, which is compiled where the cache does not have it."""
    pybind11 = pytest.importorskip("pybind11", reason="pip install pybind11")
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER}")
    compiler = subprocess.run([COMPILER, "--version"], capture_output=True, text=True).stdout
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    common = digest(
        compiler, suffix, pybind11.__version__, contents([*HEADERS, HERE / "cuda_shim.h"])
    )
    places = ["-I", pybind11.get_include(), "-I", sysconfig.get_paths()["include"]]
    places += ['-DSEG_CUDA_ARCHITECTURES="7.5 9.0 9.0+ptx"']
    jobs = []
    for source in [*BINDINGS, *OF_TESTS, *KERNELS]:
        flags = [*shim_flags(optimise=source not in BINDINGS), *places]
        inside = [source, CSRC / "cuda/guided_filter.cu"] if source in OF_TESTS else [source]
        key = digest(common, list(map(str, flags)), contents(inside))
        jobs.append((cache / f"{source.stem}-{key}.o", [*flags, "-x", "c++", "-c", source]))

    def compile_one(job):
        out, arguments = job
        if not out.exists():
            replaced(out, lambda half: run([COMPILER, *arguments, "-o", half]))

    module = cache / f"module-{digest([out.name for out, _ in jobs])}{suffix}"
    with locked(cache):
        if not module.exists():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compile_one, jobs))
            sanitizers = [f for f in shim_flags() if str(f).startswith("-fsanitize=")]
            objects = [out for out, _ in jobs]
            link = [COMPILER, "-shared", "-pthread", *sanitizers, *objects]
            replaced(module, lambda half: run([*link, "-o", half]))
            forget_the_oldest(cache)
    return module
