"""From a device's name to its module. A device is a module; all offer the same functions."""

from __future__ import annotations

import os
from types import ModuleType

from runtime.errors import DeviceError, InputError, MissingBackend


def devices() -> list[str]:
    """Devices that this machine can use."""
    return ["cpu"]


def targets() -> list[str]:
    """Instruction sets that the CPU core can use here, slowest first."""
    return backend("cpu").targets()


def target() -> str:
    """The instruction set in use: the best, or what the environment variable SEG_ISA names."""
    try:
        return backend("cpu").target()
    except RuntimeError as error:
        raise DeviceError(str(error), fix="unset SEG_ISA, or set it to one of these") from None


def backend(device: str) -> ModuleType:
    """The module that computes on ``device``."""
    if device == "cuda":
        raise MissingBackend(
            "device 'cuda' is not in this build: it has the CPU core only", fix="use device='cpu'"
        )
    if device != "cpu":
        raise InputError(f"device is {device!r}; wanted 'cpu' or 'cuda'")
    try:
        from runtime import _core
    except ImportError as error:
        raise MissingBackend(
            f"the C++ core is not built ({error})", fix="pip install -e .   (in a clone; or: make)"
        ) from error
    return _core


def default_threads() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
