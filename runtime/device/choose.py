"""From a device's name to its module. A device is a module; all offer the same functions."""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

from runtime.checks import check_count
from runtime.device.driver import (
    BUILD,
    build_for,
    cuda_devices,
    cuda_problem,
    no_code_for,
    old_driver,
    parse_device,
)
from runtime.errors import DeviceError, MissingBackend, SdkError


def devices() -> list[str]:
    """Devices that this machine can use; "cuda" where at least one GPU can run the CUDA module."""
    try:
        module = cuda_module()
        compiled, problem = module.architectures(), _driver_problem(module)
        able = problem is None and not all(no_code_for(gpu, compiled) for gpu in cuda_devices())
    except (MissingBackend, DeviceError):  # no module; a GPU that cannot be described
        able = False
    return ["cpu", "cuda"] if able else ["cpu"]


def isas() -> list[str]:
    """Instruction sets that the CPU core can use here, slowest first."""
    return module_of("cpu").isas()


def isa() -> str:
    """The instruction set in use: the best, or what the environment variable SEG_ISA names."""
    try:
        return module_of("cpu").isa()
    except RuntimeError as error:
        raise DeviceError(str(error), fix="unset SEG_ISA, or set it to one of these") from None


def module_of(device: str) -> ModuleType:
    """The module that computes on ``device``: "cpu", "cuda", or one GPU of several, "cuda:1".

    Raises
    ------
    InputError : there is no such name. MissingBackend : its module is not built; no driver or GPU.
    DeviceError : no GPU has this number, or the module has no code for it.
    """
    kind, index = parse_device(device)
    if kind == "cuda":
        return _cuda(index)
    try:
        from runtime import _core
    except ImportError as error:
        raise MissingBackend(
            f"the C++ core is not built ({error})", fix="pip install -e .   (in a clone; or: make)"
        ) from error
    return _core


def cuda_module() -> ModuleType:
    """The CUDA module, if it is built. Importing it needs no driver and asks for none."""
    try:
        import runtime._cuda as module
    except ImportError as error:
        raise MissingBackend(
            f"the CUDA module is not built ({error})",
            fix=BUILD,
        ) from error
    return module


def default_threads() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache  # a driver's answers stay; what raises is asked again
def _cuda(index: int) -> ModuleType:
    """The CUDA module, once it is known that this GPU can run it."""
    module = cuda_module()
    if problem := _driver_problem(module):
        raise problem
    gpus = cuda_devices()
    if index >= len(gpus):
        here = ", ".join(f"cuda:{gpu.index} ({gpu.name})" for gpu in gpus)
        raise DeviceError(f"there is no cuda:{index}; here is {here}", fix="name one of these")
    if why := no_code_for(gpus[index], module.architectures()):
        raise DeviceError(why, fix=build_for(gpus[index].compute_capability))
    return module


def _driver_problem(module: ModuleType) -> SdkError | None:
    """Why the driver can run nothing of the module's on any GPU."""
    return cuda_problem() or old_driver(module.runtime_version())


def thread_count(threads: int | None) -> int:
    """``threads`` as a checked number; all processors when None."""
    return default_threads() if threads is None else check_count("threads", threads, 1, 1024)
