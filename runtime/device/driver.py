"""Which GPU is here, asked of the CUDA driver itself: no toolkit, no PyTorch, nothing at import."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import DeviceError, InputError, MissingBackend, SdkError

_DRIVER = "libcuda.so.1"
_TEGRA_RELEASE = Path("/etc/nv_tegra_release")
_TREE_MODEL = Path("/proc/device-tree/model")
_MEMINFO = Path("/proc/meminfo")
# Values of cuda.h.
_INTEGRATED, _CC_MAJOR, _CC_MINOR = 18, 75, 76
NO_DEVICE = 100
FIXES = {  # of what cuInit answers, by the code that means it
    34: "take the toolkit's stubs folder out of LD_LIBRARY_PATH",
    802: "start the fabric manager: systemctl start nvidia-fabricmanager",
    803: "restart the machine: the driver was updated, its kernel module not yet",
    804: "remove the cuda-compat package, or update the driver",
    999: "see that /dev/nvidia* exist and may be opened; after a suspend: modprobe -r nvidia_uvm",
}


@dataclass(frozen=True)
class CudaDevice:
    """A GPU. Memory is in bytes; ``free_bytes`` is 0 where the driver gives no context."""

    index: int
    name: str
    compute_capability: str
    memory_bytes: int
    free_bytes: int


def parse_device(device: str | int) -> tuple[str, int]:
    """Kind and index of a device's name.

    Parameters
    ----------
    device : "cpu", "cuda", "cuda:1", or a GPU's number alone: "1".

    Returns
    -------
    ("cpu", 0) or ("cuda", index). Whether that GPU exists is not asked.

    Raises
    ------
    InputError : anything else.
    """
    if device == "cpu":
        return "cpu", 0
    found = re.fullmatch(r"cuda(?::([0-9]{1,3}))?|([0-9]{1,3})", str(device))
    if found is None:
        raise InputError(
            f"device is {device!r}; wanted 'cpu', 'cuda', or a GPU's number as in 'cuda:1' or '1'"
        )
    return "cuda", int(found[1] or found[2] or 0)


def cuda_absence() -> str:
    """One sentence that says why no GPU can be used; empty where one can."""
    problem = cuda_problem()
    return problem.message if problem else ""


def cuda_problem() -> SdkError | None:
    """Why no GPU can be used, with the fix; None where one can.

    MissingBackend: there is no driver, or no GPU. DeviceError: there is a driver, which fails.
    """
    try:
        _driver()
    except SdkError as error:
        return error
    return None


def cuda_driver_version() -> str | None:
    """The newest CUDA that the driver can run, as "13.0"; None without a driver."""
    version = ctypes.c_int()
    try:
        _call(_library(), "cuDriverGetVersion", ctypes.byref(version))
    except SdkError:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def old_driver(needed: int) -> DeviceError | None:
    """Why what is built with this CUDA (13000 is 13.0) cannot run on the driver; None where it can:
    a driver runs all that toolkits of its own major version, or older ones, have built."""
    version = cuda_driver_version()
    if version is None or int(version.partition(".")[0]) >= needed // 1000:
        return None
    what, fix = too_old(version, needed)
    return DeviceError(what, fix=fix)


def too_old(version: str, needed: int) -> tuple[str, str]:
    """What is wrong with a driver that runs this CUDA version at most, and the fix."""
    return (
        f"the driver is too old: it runs CUDA {version}, this build needs "
        f"{needed // 1000}.{needed % 1000 // 10}",
        f"update NVIDIA's driver, or build with a toolkit of CUDA {version} or older",
    )


def cuda_devices() -> list[CudaDevice]:
    """All GPUs that the driver shows this process, in the driver's order; without a driver or a GPU
    an empty list.

    A discrete GPU gets a context for a moment, to ask how much of its memory is free. An integrated
    one (Jetson) shares the machine's memory: what is available of that is free.

    Raises
    ------
    DeviceError : there is a driver, but it does not start or cannot describe a GPU. That is not
        the same as no GPU.
    """
    try:
        driver = _driver()
    except MissingBackend:
        return []
    count = ctypes.c_int()
    _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    return [_describe(driver, index) for index in range(count.value)]


def l4t() -> str | None:
    """Release of NVIDIA's Linux for Tegra, as "36.4.0"; None where this is no Jetson."""
    text = _text(_TEGRA_RELEASE)
    found = re.search(r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", text)
    return f"{found[1]}.{found[2]}" if found else None


def jetson_model() -> str | None:
    """The board's name, as "NVIDIA Jetson AGX Orin Developer Kit"; None where this is no Jetson."""
    name = _text(_TREE_MODEL).strip("\0 \n")
    return name if re.search("nvidia|jetson", name, re.IGNORECASE) else None


def platform_tag() -> str:
    """System and processor, as "linux-x86_64"."""
    return f"{sys.platform}-{platform.machine()}"


def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(_DRIVER)
    except OSError as error:
        raise MissingBackend(
            f"no CUDA driver: {error}",
            fix="install NVIDIA's driver; in a container: docker run --gpus all "
            "(Jetson: --runtime nvidia)",
        ) from error


def _driver() -> ctypes.CDLL:
    """The driver, initialised and with at least one GPU."""
    library = _library()
    code = _function(library, "cuInit")(0)
    if code == NO_DEVICE:
        raise no_gpu()
    if code:
        raise DeviceError(
            f"the CUDA driver does not start: cuInit gives {code} ({_error_name(library, code)})",
            fix=FIXES.get(code, "see what nvidia-smi says; update the driver"),
        )
    count = ctypes.c_int()
    _call(library, "cuDeviceGetCount", ctypes.byref(count))
    if count.value < 1:
        raise no_gpu()
    return library


def no_gpu() -> MissingBackend:
    """The error for a driver that shows this process no GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    return MissingBackend(
        f"the CUDA driver finds no GPU{why}",
        fix="see what nvidia-smi lists; check CUDA_VISIBLE_DEVICES and the container's --gpus",
    )


def _describe(driver: ctypes.CDLL, index: int) -> CudaDevice:
    device, number = ctypes.c_int(), ctypes.c_int()
    name, total = ctypes.create_string_buffer(256), ctypes.c_size_t()
    _call(driver, "cuDeviceGet", ctypes.byref(device), index)
    _call(driver, "cuDeviceGetName", name, len(name), device)
    _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(total), device)
    attributes = []
    for attribute in (_CC_MAJOR, _CC_MINOR, _INTEGRATED):
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
        attributes.append(number.value)
    major, minor, integrated = attributes
    free = _memory_available() if integrated else _memory_free(driver, device)
    text = name.value.decode(errors="replace")
    return CudaDevice(index, text, f"{major}.{minor}", total.value, free)


def _memory_free(driver: ctypes.CDLL, device: ctypes.c_int) -> int:
    """Free bytes of a GPU; 0 if it gives no context: full, or reserved for another process."""
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    try:
        _call(driver, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    except DeviceError:
        return 0
    try:
        _call(driver, "cuCtxPushCurrent_v2", context)
        try:
            _call(driver, "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        finally:
            _call(driver, "cuCtxPopCurrent_v2", ctypes.byref(context))
    finally:
        _call(driver, "cuDevicePrimaryCtxRelease_v2", device)
    return free.value


def _memory_available() -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(_MEMINFO), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def _call(library: ctypes.CDLL, name: str, *arguments: Any) -> None:
    code = _function(library, name)(*arguments)
    if code:
        raise DeviceError(
            f"the CUDA driver fails: {name} gives {code} ({_error_name(library, code)})",
            fix="see what nvidia-smi says",
        )


def _function(library: ctypes.CDLL, name: str) -> Any:
    try:
        return getattr(library, name)
    except AttributeError as error:
        raise DeviceError(
            f"{_DRIVER} is no usable CUDA driver: {error}", fix="install NVIDIA's driver"
        ) from error


def _error_name(library: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    try:
        _function(library, "cuGetErrorName")(code, ctypes.byref(text))
    except DeviceError:
        return "unnamed"
    return (text.value or b"unnamed").decode(errors="replace")


def _text(path: Path) -> str:
    """What the file says; nothing if it is not there."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


BUILD = "pip install -e .   (in a clone, with nvcc on PATH)"


def no_code_for(gpu: CudaDevice, compiled: Sequence[str]) -> str:
    """One sentence that says why ``gpu`` cannot run what is compiled in; empty where it can.

    Parameters
    ----------
    compiled : compute capabilities: "8.6" is machine code, which runs on that major version, from
        that minor version on; "12.0+ptx" is PTX, which the driver compiles for that and all above.
    """
    have = _version(gpu.compute_capability)
    for name in compiled:
        code = _version(name.removesuffix("+ptx"))
        if code <= have and (name.endswith("+ptx") or code[0] == have[0]):
            return ""
    known = ", ".join(name for name in compiled if not name.endswith("+ptx"))
    newer = " and newer" * any(name.endswith("+ptx") for name in compiled)
    return (
        f"cuda:{gpu.index} ({gpu.name}, compute capability {gpu.compute_capability}) is not among "
        f"those this build has code for: {known}{newer}"
    )


def build_for(capability: str) -> str:
    """The line that builds the CUDA module for this compute capability."""
    line = f"SEG_CUDA_ARCHS={capability.replace('.', '')} {BUILD}"
    old = re.fullmatch(r"\d+\.\d+", capability) and _version(capability) < (7, 5)
    return f"{line}; that takes a CUDA 12 toolkit, for 13 begins at 7.5" if old else line


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)
