"""List the devices and instruction sets of this machine, and return the native module of a device.

The module of the CPU and the CUDA module have the guided filter, joint upsampling and the refiner
under the same names. Each also has functions of its own.
"""

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
    """List the devices that this machine can use.

    Returns
    -------
    ["cpu"], or ["cpu", "cuda"] if at least one GPU can run the CUDA module.

    Example
    -------
    >>> device = runtime.devices()[-1]
    """
    try:
        module = cuda_module()
        compiled, problem = module.architectures(), _driver_problem(module)
        able = problem is None and not all(no_code_for(gpu, compiled) for gpu in cuda_devices())
    except (MissingBackend, DeviceError):  # the module is not built, or the driver fails
        able = False
    return ["cpu", "cuda"] if able else ["cpu"]


def isas() -> list[str]:
    """List the instruction sets that the C++ core can use on this CPU, slowest first.

    Raises
    ------
    MissingBackend : the C++ core is not built.

    Example
    -------
    >>> runtime.isas()  # on x86-64: "base" (SSE2), and "avx2" and "avx512" if the CPU has them
    """
    return module_of("cpu").isas()


def isa() -> str:
    """Return the instruction set in use: the fastest, or the one that SEG_ISA names.

    Raises
    ------
    DeviceError : the environment variable SEG_ISA names no instruction set of :func:`isas`.
    MissingBackend : the C++ core is not built.

    Example
    -------
    >>> runtime.isa() in runtime.isas()
    True
    """
    try:
        return module_of("cpu").isa()
    except RuntimeError as error:
        raise DeviceError(
            str(error), fix="unset SEG_ISA, or set it to one of these names"
        ) from None


def module_of(device: str) -> ModuleType:
    """Return the native module that computes on a device.

    Parameters
    ----------
    device : "cpu", "cuda" (the first GPU), or one GPU by its number: "cuda:1" or "1".

    Raises
    ------
    InputError : ``device`` is not the name of a device.
    MissingBackend : the module is not built, or the machine has no CUDA driver or no GPU.
    DeviceError : the driver fails or is too old, no GPU has this number, or the module contains no
        code for this GPU.
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
    """Import the CUDA module and return it. The import works without a CUDA driver.

    Raises
    ------
    MissingBackend : the CUDA module is not built.
    """
    try:
        import runtime._cuda as module
    except ImportError as error:
        # Without a GPU, a build compiles no CUDA unless SEG_CUDA says so.
        fix = BUILD if cuda_problem() is None else f"SEG_CUDA=1 {BUILD}"
        raise MissingBackend(f"the CUDA module is not built ({error})", fix=fix) from error
    return module


def default_threads() -> int:
    """Return the number of processors that this process may use. Where Python has no
    ``os.sched_getaffinity``, return the number of all processors, or 1 if that is unknown."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache  # Python does not cache an exception: after an error the next call asks the driver again.
def _cuda(index: int) -> ModuleType:
    """Return the CUDA module after checking that GPU ``index`` can run it."""
    if problem := cuda_problem():
        raise problem
    module = cuda_module()
    if problem := _driver_problem(module):
        raise problem
    gpus = cuda_devices()
    if index >= len(gpus):
        names = ", ".join(f"cuda:{gpu.index} ({gpu.name})" for gpu in gpus)
        raise DeviceError(
            f"there is no cuda:{index}; this machine has {names}", fix="use one of these GPUs"
        )
    if why := no_code_for(gpus[index], module.architectures()):
        raise DeviceError(why, fix=build_for(gpus[index].compute_capability))
    return module


def _driver_problem(module: ModuleType) -> SdkError | None:
    """Return the error that says why no GPU can run the CUDA module, or None if the driver is
    usable. The reasons: the driver is missing, fails, finds no GPU or is too old."""
    return cuda_problem() or old_driver(module.runtime_version())


def thread_count(threads: int | None) -> int:
    """Check a number of threads and return it.

    Parameters
    ----------
    threads : 1 to 1024. For None, the result is :func:`default_threads`.

    Raises
    ------
    InputError : ``threads`` is not a whole number in this range.
    """
    return default_threads() if threads is None else check_count("threads", threads, 1, 1024)
