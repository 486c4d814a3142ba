"""Fixtures of runtime._cuda on the host: cuda_shim.h replaces the CUDA runtime.

Device memory is host memory there, so that tests can read it. With the methods of Cudart, a test
makes functions of the CUDA runtime fail and reads what was called.
"""

import ctypes
import functools
import importlib.util
import sys

import pytest
from cuda_shim_build import built

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


class Cudart:
    """The functions of cuda_hooks.cpp, which change the CUDA runtime of cuda_shim.h."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.allocations_left.restype = ctypes.c_size_t
        self.library.waits.restype = ctypes.c_size_t
        self.library.synchronisations.restype = ctypes.c_size_t

    def plant(self, code, *, sticky=False, spared=0):
        """Make a call of the CUDA runtime return ``code``, after ``spared`` calls that succeed.

        With ``sticky``, all calls after it return ``code`` as well.
        """
        self.library.plant(code, int(sticky), ctypes.c_size_t(spared))

    def planted(self):
        """Return the code that the next call will return."""
        return self.library.planted()

    def recover(self):
        """Undo :meth:`plant`, and make the module forget that the GPU was lost."""
        self.plant(0)
        self.library.recover()

    def round_nothing(self, exact):
        """Make tensor cores compute in float32."""
        self.library.round_nothing(exact)

    def favour_the_first_stream(self, yes):
        """Run the work of a graph's first stream as early as allowed, or as late as allowed."""
        self.library.favour_the_first_stream(yes)

    def forbid_capture(self, code):
        """Make the begin of a capture return ``code``; 0 means success."""
        self.library.forbid_capture(code)

    def compile_for(self, ptx):
        """Make kernels report that they were compiled for this architecture: 90 is 9.0."""
        self.library.compile_for(ptx)

    def empty_pool(self):
        """Free the blocks of device and page-locked memory that no array uses."""
        self.library.empty_pool()

    def allow_allocations(self, count):
        """Let so many calls of cudaMalloc succeed; later ones fail."""
        self.library.allow_allocations(ctypes.c_size_t(count))

    def allocations_left(self):
        """Return how many calls of cudaMalloc may still succeed."""
        return self.library.allocations_left()

    def keep_busy(self, stream):
        """Make the events of this stream never complete; None means of no stream."""
        self.library.keep_busy(ctypes.c_void_p(2**64 - 1 if stream is None else stream))

    def lie_on_device(self, device):
        """Make the runtime report that all memory is on this device; -1 means on the host."""
        self.library.lie_on_device(device)

    def synchronisations(self):
        """Return how often the host has waited for a stream."""
        return self.library.synchronisations()

    def shared_memory(self):
        """Return the most bytes of shared memory that a launch of each kernel has asked for since
        the last call."""
        told = ctypes.create_string_buffer(1 << 16)
        self.library.shared_memory(told, ctypes.c_size_t(len(told)))
        pairs = (pair.split("=") for pair in told.value.decode().split(";") if pair)
        return {name: int(taken) for name, taken in pairs}

    def current_device(self):
        """Return the current device."""
        return self.library.current_device()

    def waits(self):
        """Return (waiting stream, awaited other stream) of all waits since the last call."""
        out = (ctypes.c_void_p * 2000)()
        count = self.library.waits(out, 1000)
        pairs = [(out[2 * i] or 0, out[2 * i + 1] or 0) for i in range(count)]
        return [(waiting, awaited) for waiting, awaited in pairs if waiting != awaited]


@functools.cache
def loaded(path):
    """Return the module, which a process loads only once, and the CUDA runtime below it."""
    spec = importlib.util.spec_from_file_location(
        "played._cuda", path
    )  # the name of its init function ends in _cuda
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, Cudart(path)


def install(monkeypatch, module):
    """Make ``module`` the module of device "cuda"."""
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
def cuda_path():
    """Return the path of the module, for tests that start another Python process."""
    return built()


@pytest.fixture
def cudart(cuda_path):
    """Return the CUDA runtime of the host; its settings are reset after the test."""
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
    """Return the module that device="cuda" uses during the test."""
    module = loaded(cuda_path)[0]
    install(monkeypatch, module)
    return module
