"""List the devices and instruction sets of this machine, and return the native module of a device.

The module of the CPU and the CUDA module have the guided filter, joint upsampling and the refiner
under the same names. Each also has functions of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
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
        if isinstance(error.__cause__, KeyboardInterrupt):  # Ctrl-C while the module was loaded
            raise error.__cause__ from None
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
    """Return the number of threads that can compute at the same time: :func:`processors`, or less
    if :func:`cpu_limit` is smaller; 1.5 processors give 2 threads.

    PYTHON_CPU_COUNT, which Python 3.13 has, does not change it.
    """
    limit = cpu_limit()
    return processors() if limit is None else min(processors(), max(1, math.ceil(limit)))


def processors() -> int:
    """Return the number of processors on which this process may run. Where Python has no
    ``os.sched_getaffinity``, return the number of all processors, or 1 if that is unknown."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_limit(root: Path = Path("/")) -> float | None:
    """Return how many processors' time the control groups of Linux allow this process, as Docker's
    --cpus and the CPU limits of Kubernetes set it: 1.5 means three seconds of processor time in two
    seconds. It is the smallest limit of the process's groups and of all groups above them; None if
    no group has a limit.

    Parameters
    ----------
    root : the folder that contains proc and sys.
    """
    limits = []
    for folder in _cpu_groups(root):
        # Version 2 has both numbers in one file. "max" and -1 are no limit.
        words = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        if len(words) == 2 and all(word.isascii() and word.isdigit() for word in words):
            quota, period = map(int, words)
            if quota and period:
                limits.append(quota / period)
    return min(limits, default=None)


def _cpu_groups(root: Path) -> Iterator[Path]:
    """Yield the folders of the process's control groups that can limit processors.

    A line of /proc/self/cgroup is "number:controllers:path"; version 2 has number 0 and no
    controllers. In a container the path may be that of the host, which does not exist here; then
    the folders above it, up to the container's own, contain the limit.
    """
    base = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        group = PurePosixPath(path.lstrip("/"))
        if number == "0" or "cpu" in controllers.split(","):
            names = ("", "unified") if number == "0" else (controllers, "cpu")
            for place in (base / name for name in names):
                yield from (place / folder for folder in (group, *group.parents))


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    """Return the text of a file, or "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


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
