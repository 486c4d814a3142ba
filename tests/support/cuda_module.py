"""runtime._cuda for the host: its own sources on cuda_shim.h, in place of the CUDA runtime.

Device memory is host memory there, so that tests can look into it; ``cuda.planted`` and the like
let them make the runtime fail.
"""

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import runtime
import runtime.core.classes
import runtime.core.guided_filter
import runtime.core.refiner
import runtime.core.regions
import runtime.device.transfer
import runtime.engines.graph_refiner
import runtime.prior.network
from runtime.device import choose
from runtime.device.driver import parse_device

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "runtime/csrc/cuda"
COMPILER = os.environ.get("CXX", "g++")

# What the tests do to the runtime that is played.
HOOKS = (
    f'#include "{CUDA}/memory.h"'
    + """
#define HOOK extern "C" __attribute__((visibility("default")))
HOOK void plant(int code, int sticky, size_t spared) {
  shim::spared = spared;
  shim::planted = static_cast<cudaError_t>(code);
  shim::sticky = sticky != 0;
}
HOOK int planted() { return shim::planted; }
HOOK void round_nothing(bool exact) {
  shim::exact = exact;
  shim::pairs = {};
}
HOOK void favour_the_first_stream(bool yes) { shim::favour_the_first = yes; }
HOOK void forbid_capture(int code) { shim::no_capture = static_cast<cudaError_t>(code); }
HOOK void compile_for(int ptx) { shim::compiled_for = ptx; }
HOOK void recover() {
  shim::last = cudaSuccess;
  seg::cuda::lost = false;
}
HOOK void allow_allocations(size_t n) { shim::allocations_left = n; }
HOOK size_t allocations_left() { return shim::allocations_left; }
HOOK void keep_busy(void* stream) { shim::busy = stream; }
HOOK void lie_on_device(int device) { shim::memory_device = device; }
HOOK size_t synchronisations() { return shim::synchronisations; }
HOOK void shared_memory(char* out, size_t size) {
  std::string told;
  for (const auto& [name, bytes] : shim::most_shared)
    told += name + "=" + std::to_string(bytes) + ";";
  std::snprintf(out, size, "%s", told.c_str());
  shim::most_shared.clear();
}
HOOK int current_device() { return shim::device; }
HOOK size_t waits(void** out, size_t most) {
  size_t n = 0;
  for (const auto& [waiting, awaited] : shim::waits)
    if (n < most) out[2 * n] = waiting, out[2 * n + 1] = awaited, ++n;
  shim::waits.clear();
  return n;
}
"""
)


class Cudart:
    """What a test does to the CUDA runtime that is played."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.allocations_left.restype = ctypes.c_size_t
        self.library.waits.restype = ctypes.c_size_t
        self.library.synchronisations.restype = ctypes.c_size_t

    def plant(self, code, *, sticky=False, spared=0):
        """Make the next call of the runtime, but for the ``spared`` ones before it, answer
        ``code``; ``sticky``: all further ones too."""
        self.library.plant(code, int(sticky), ctypes.c_size_t(spared))

    def planted(self):
        """What the next call will answer."""
        return self.library.planted()

    def recover(self):
        """Undo :meth:`plant`, and what the module remembers of a fault."""
        self.plant(0)
        self.library.recover()

    def round_nothing(self, exact):
        """Have tensor cores compute in float32."""
        self.library.round_nothing(exact)

    def favour_the_first_stream(self, yes):
        """Whether a graph's first stream runs ahead of the others, as far as it may, or behind."""
        self.library.favour_the_first_stream(yes)

    def forbid_capture(self, code):
        """Let beginning to capture answer ``code``; 0: succeed."""
        self.library.forbid_capture(code)

    def compile_for(self, ptx):
        """Say that kernels were compiled for this architecture: 90 is 9.0."""
        self.library.compile_for(ptx)

    def allow_allocations(self, count):
        """Let so many calls of cudaMalloc succeed."""
        self.library.allow_allocations(ctypes.c_size_t(count))

    def allocations_left(self):
        """How many are left of them."""
        return self.library.allocations_left()

    def keep_busy(self, stream):
        """Let events on this stream never come to pass; None: on no stream."""
        self.library.keep_busy(ctypes.c_void_p(2**64 - 1 if stream is None else stream))

    def lie_on_device(self, device):
        """Have the runtime say that all memory lies there; -1: on the host."""
        self.library.lie_on_device(device)

    def synchronisations(self):
        """How often a stream was waited for, so far."""
        return self.library.synchronisations()

    def shared_memory(self):
        """The most bytes of shared memory that a launch of each kernel has asked for since the last
        time."""
        told = ctypes.create_string_buffer(1 << 16)
        self.library.shared_memory(told, ctypes.c_size_t(len(told)))
        pairs = (pair.split("=") for pair in told.value.decode().split(";") if pair)
        return {name: int(taken) for name, taken in pairs}

    def current_device(self):
        """The device that is current."""
        return self.library.current_device()

    def waits(self):
        """(waiting stream, awaited other stream) of all waits since the last call."""
        out = (ctypes.c_void_p * 2000)()
        count = self.library.waits(out, 1000)
        pairs = [(out[2 * i] or 0, out[2 * i + 1] or 0) for i in range(count)]
        return [(waiting, awaited) for waiting, awaited in pairs if waiting != awaited]


@functools.cache
def built(folder):
    """The path of the module, compiled for the host; with the sanitizers that Python was started
    with."""
    pybind11 = pytest.importorskip("pybind11", reason="pip install pybind11")
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER}")
    (folder / "hooks.cpp").write_text(HOOKS)
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-pthread"]
    flags += ["-include", HERE / "cuda_shim.h", "-I", pybind11.get_include()]
    flags += ["-I", sysconfig.get_paths()["include"], '-DSEG_CUDA_ARCHITECTURES="7.5 9.0 9.0+ptx"']
    sanitizers = []
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    bindings = [CUDA.parent / f"python/{name}.cpp" for name in ("cuda", "cuda_refiner", "arrays")]
    sources = [*bindings, *sorted(CUDA.glob("*.cu")), folder / "hooks.cpp"]
    todo = [(s, folder / f"{s.stem}.o") for s in sources]
    command = [COMPILER, *flags, *sanitizers, "-x", "c++", "-c"]
    running = [subprocess.Popen([*command, source, "-o", object_]) for source, object_ in todo]
    assert [r.wait() for r in running] == [0] * len(running)
    out = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    objects = [object_ for _, object_ in todo]
    subprocess.run([COMPILER, "-shared", "-pthread", *sanitizers, *objects, "-o", out], check=True)
    return out


@functools.cache
def loaded(path):
    """The module, which a process can load once only, and the runtime under it."""
    spec = importlib.util.spec_from_file_location("played._cuda", path)  # of each name there is one
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, Cudart(path)


def install(monkeypatch, module):
    """Make it the module of device "cuda"."""
    real = choose.module_of

    def module_of(device):
        return module if parse_device(device)[0] == "cuda" else real(device)

    monkeypatch.setitem(sys.modules, "runtime._cuda", module)
    monkeypatch.setattr(runtime, "_cuda", module, raising=False)
    monkeypatch.setattr(choose, "devices", lambda: ["cpu", "cuda"])
    for name, user in list(sys.modules.items()):
        if name.startswith("runtime.") and getattr(user, "module_of", None) is real:
            monkeypatch.setattr(user, "module_of", module_of)


@pytest.fixture(scope="session")
def cuda_path(tmp_path_factory):
    """Where the module is, for tests that start a Python of their own."""
    folder = tmp_path_factory.getbasetemp() / "cuda_module"
    folder.mkdir(exist_ok=True)
    return built(folder)


@pytest.fixture
def cudart(cuda_path):
    """The runtime that is played, as it was when the test is over."""
    played = loaded(cuda_path)[1]
    played.waits()
    yield played
    played.recover()
    played.round_nothing(False)
    played.favour_the_first_stream(True)
    played.forbid_capture(0)
    played.compile_for(90)
    played.allow_allocations(2**62)
    played.keep_busy(None)
    played.lie_on_device(0)


@pytest.fixture
def cuda(cuda_path, monkeypatch):
    """runtime._cuda, which device="cuda" means during the test."""
    module = loaded(cuda_path)[0]
    install(monkeypatch, module)
    return module
