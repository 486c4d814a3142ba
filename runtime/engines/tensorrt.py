"""Load TensorRT's Python packages and PyCUDA, and pass TensorRT's log to Python's."""

from __future__ import annotations

import functools
import logging
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.device.driver import CudaDevice, cuda_absence, cuda_driver_version, cuda_problem
from runtime.errors import DeviceError, InputError, MissingBackend, first_line

REBUILD = "python -m runtime build BUNDLE"
INSTALL = {
    "tensorrt": "pip install 'dynaguide-edge[trt]'; on a Jetson it comes with JetPack: apt-get "
    "install python3-libnvinfer, and a venv made with --system-site-packages",
    "tensorrt_rtx": "pip install 'dynaguide-edge[rtx]'",
}
VERSIONS = ((10, 3), (12,))  # of TensorRT: the first supported one, and the first unsupported one
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # of TensorRT for RTX 1.7
LOG = logging.getLogger("dg.tensorrt")
_OLD_DRIVER = re.compile(r"CUDA initialization failure with error: 35\b")


def load_tensorrt(runtime: str) -> Any:
    """The module ``tensorrt`` or ``tensorrt_rtx``, of a version that this package supports.

    Parameters
    ----------
    runtime : "tensorrt" or "tensorrt_rtx".

    Raises
    ------
    InputError : another name.
    MissingBackend : the module is not installed, lacks its libraries, or has another version.
    """
    if runtime not in INSTALL:
        raise InputError(f"runtime is {runtime!r}; wanted 'tensorrt' or 'tensorrt_rtx'")
    trt: Any
    try:
        if runtime == "tensorrt":
            import tensorrt

            trt = tensorrt
        else:
            import tensorrt_rtx

            trt = tensorrt_rtx
    except (ImportError, OSError) as error:  # OSError: a library of the module is missing
        raise MissingBackend(f"{runtime} is needed, but {error}", fix=INSTALL[runtime]) from error
    version = str(getattr(trt, "__version__", "of an unknown version"))
    if not hasattr(trt, "Builder") or (runtime == "tensorrt" and not is_known(version)):
        raise MissingBackend(
            f"{runtime} {version} is installed; wanted TensorRT 10.3 or later, below 12",
            fix=INSTALL[runtime],
        )
    return trt


def is_known(version: str) -> bool:
    """Whether this package supports a version of TensorRT, for example "10.3.0"."""
    lowest, below = VERSIONS
    return lowest <= tuple(map(int, re.findall(r"\d+", version)[:2])) < below


def supported_compute_capabilities() -> list[str]:
    """The compute capabilities that the installed TensorRT for RTX builds for: ["7.5", "8.0", ...].

    Raises
    ------
    MissingBackend : TensorRT for RTX is not installed.
    """
    names = dir(load_tensorrt("tensorrt_rtx").ComputeCapability)
    numbers = sorted(int(name[2:]) for name in names if re.fullmatch(r"SM\d+", name))
    return [f"{number // 10}.{number % 10}" for number in numbers]


def rtx_targets(asked: Sequence[str], gpu: CudaDevice | None) -> tuple[str, ...]:
    """The compute capabilities that TensorRT for RTX builds for.

    Parameters
    ----------
    asked : for example ["8.6", "8.9"]; empty for that of ``gpu``.
    gpu : the GPU of this machine; None without one.

    Raises
    ------
    InputError : no compute capability, or one that TensorRT for RTX cannot build for.
    MissingBackend : TensorRT for RTX is not installed.
    """
    targets = tuple(dict.fromkeys(asked))
    if not targets:
        if gpu is None:
            raise InputError(
                "TensorRT for RTX needs to know the GPUs to build for: no compute capability "
                f"names one, and there is none here to ask: {cuda_absence()}",
                fix="name the GPUs to build for: --compute-capability 8.6,8.9,12.0",
            )
        targets = (gpu.compute_capability,)
    known = supported_compute_capabilities()
    strange = [target for target in targets if target not in known]
    if strange:
        raise InputError(
            f"TensorRT for RTX cannot build for compute capability {', '.join(strange)}; it knows "
            f"{', '.join(known)}",
            fix=f"Orin (8.7), Thor and Hopper (9.0) need --target trt on the device: {REBUILD}",
        )
    return targets


@functools.cache
def bridge_log(trt: Any) -> Any:
    """The TensorRT logger that writes to Python's logger "dg.tensorrt" and stores the last
    messages.

    A process has one such logger, because TensorRT ignores a second one while the first is in use.
    Errors and warnings keep their level; all other messages become DEBUG. ``lines`` contains the
    last 50 errors and warnings since ``clear()``. ``summary()`` returns the first three errors, of
    which the first is the cause, and the last one; without errors, the lines.

    Parameters
    ----------
    trt : the module tensorrt or tensorrt_rtx.
    """

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: deque[str] = deque(maxlen=50)
            self.errors: list[str] = []

        def clear(self) -> None:
            self.lines.clear()
            self.errors.clear()

        def log(self, severity: Any, message: str) -> None:
            level = logging.DEBUG
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                level = logging.ERROR
                self.errors = [*self.errors[:3], message]
            elif severity == trt.ILogger.WARNING:
                level = logging.WARNING
            if level > logging.DEBUG:
                self.lines.append(message)
            LOG.log(level, "%s", message)

        def summary(self) -> str:
            messages = self.errors or self.lines
            return "; then ".join(line[:400] for line in messages) or "it does not say why"

    return Log()


def make(trt: Any, kind: str, *arguments: Any) -> Any:
    """Make one of the objects by which TensorRT starts.

    Parameters
    ----------
    trt : the module tensorrt or tensorrt_rtx.
    kind : "Builder", "Runtime" or "OnnxParser".
    arguments : of the constructor, without the log, which is always that of :func:`bridge_log`.

    Raises
    ------
    DeviceError : the library cannot start, as with a driver that is too old for it.

    Examples
    --------
    >>> builder = make(load_tensorrt("tensorrt_rtx"), "Builder")
    """
    try:
        return getattr(trt, kind)(*arguments, bridge_log(trt))
    except (TypeError, RuntimeError) as error:  # TypeError: the library returned a null pointer
        raise _does_not_start(trt, kind, error) from error


def _does_not_start(trt: Any, kind: str, error: Exception) -> DeviceError:
    """The error to raise if the library cannot make an object."""
    runtime, lines = trt.__name__, [line[:400] for line in bridge_log(trt).lines]
    package = runtime.replace("_", "-")
    driver, problem, wheels = cuda_driver_version(), cuda_problem(), _wheels(trt)
    built = next(iter(wheels.values())) if len(set(wheels.values())) == 1 else None
    said = "; then ".join(lines[-3:]) or "nothing"
    fix = "close what else uses the GPU and its memory; then: python -m runtime doctor"
    if driver is not None and built is not None and int(driver.partition(".")[0]) < built:
        wanted = f"{package}-cu{driver.partition('.')[0]}"
        wanted += ">=10.3,<12" if runtime == "tensorrt" else ""
        fix = (
            f"update NVIDIA's driver, or use the wheel for its CUDA version: pip uninstall -y "
            f"{package} {' '.join(wheels)}; pip install '{wanted}'"
        )
    elif problem is not None:
        fix = problem.fix
    elif _OLD_DRIVER.search(said):
        fix = "update NVIDIA's driver"
    facts = [
        f"{runtime} {trt.__version__} does not start: it makes no {kind}, and its log says: {said} "
        f"({first_line(error)})",
        "error 35 means that the driver is missing or too old" if _OLD_DRIVER.search(said) else "",
        re.sub("^no ", "this machine has no ", problem.message) if problem else "",
        f"the driver runs CUDA {driver}" if driver else "",
        f"{runtime} was built for CUDA {built}" if built else "",
    ]
    return DeviceError("; ".join(filter(None, facts)), fix=fix)


def _wheels(trt: Any) -> dict[str, int]:
    """The wheels beside the module, each with the major version of CUDA that it was built for:
    {"tensorrt-cu12": 12, "tensorrt-cu12-libs": 12}. Only the name of a wheel contains it."""
    file = getattr(trt, "__file__", None)
    found = {}
    for folder in Path(file).parents[:2] if file else ():  # of a module, and of a package
        for place in sorted(folder.glob("*.dist-info")):
            pattern = rf"({trt.__name__}_cu(\d+)(?:_libs|_bindings)?)-.*"
            if wheel := re.fullmatch(pattern, place.name):
                found[wheel[1].replace("_", "-")] = int(wheel[2])
    return found


def load_pycuda() -> Any:
    """The module pycuda.driver, initialised.

    Raises
    ------
    MissingBackend : PyCUDA is not installed, or there is no CUDA driver.
    """
    try:
        import pycuda.driver as cuda
    except ImportError as error:  # also where the driver's library is missing
        raise MissingBackend(
            f"PyCUDA is needed to run engines, but {error}",
            fix="pip install pycuda; for a missing libcuda install NVIDIA's driver",
        ) from error
    try:
        cuda.init()
    except cuda.Error as error:
        raise MissingBackend(
            f"PyCUDA does not start: {error}", fix="python -m runtime doctor"
        ) from error
    return cuda
