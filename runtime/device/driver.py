"""Ask the CUDA driver, through ctypes, which GPUs this machine has, or why no GPU can be used.

The functions need neither the CUDA toolkit nor PyTorch. The import of this file does not load the
driver.
"""

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
# Numbers of device attributes and error codes in cuda.h.
_INTEGRATED, _CC_MAJOR, _CC_MINOR = 18, 75, 76
NO_DEVICE = 100
FIXES = {  # by error code of cuInit and of the CUDA runtime
    34: "take the toolkit's stubs folder out of LD_LIBRARY_PATH",
    802: "start the fabric manager: systemctl start nvidia-fabricmanager",
    803: "restart the machine: the driver was updated, but its old kernel module still runs",
    804: "remove the cuda-compat package, or update the driver",
    999: "check that /dev/nvidia* exist and can be opened; after a suspend: modprobe -r nvidia_uvm",
}


@dataclass(frozen=True)
class CudaDevice:
    """A GPU, as the CUDA driver describes it.

    Parameters
    ----------
    index : the driver's number of the GPU, from 0.
    name : as "NVIDIA H200".
    compute_capability : as "8.6".
    memory_bytes : all memory of the GPU.
    free_bytes : the free memory; 0 if the driver cannot create a context on the GPU.
    """

    index: int
    name: str
    compute_capability: str
    memory_bytes: int
    free_bytes: int


def parse_device(device: str | int) -> tuple[str, int]:
    """Split the name of a device into its kind and its index.

    Parameters
    ----------
    device : "cpu", "cuda", "cuda:1", or the number of a GPU alone: "1" or 1.

    Returns
    -------
    ("cpu", 0) or ("cuda", index). The function does not check that this GPU exists.

    Raises
    ------
    InputError : ``device`` is anything else.
    """
    if device == "cpu":
        return "cpu", 0
    found = re.fullmatch(r"cuda(?::([0-9]{1,3}))?|([0-9]{1,3})", str(device))
    if found is None:
        raise InputError(
            f"device is {device!r}; wanted 'cpu', 'cuda', or a GPU's number as in 'cuda:1' or '1'",
            fix="python -m runtime doctor   (lists the GPUs of this machine)",
        )
    return "cuda", int(found[1] or found[2] or 0)


def cuda_absence() -> str:
    """Return a sentence that says why no GPU can be used, or "" if one can."""
    problem = cuda_problem()
    return problem.message if problem else ""


def cuda_problem() -> SdkError | None:
    """Return the error that says why no GPU can be used, or None if one can.

    Returns
    -------
    MissingBackend if the machine has no CUDA driver or no GPU; DeviceError if the driver fails.
    """
    try:
        _driver()
    except SdkError as error:
        return error
    return None


def cuda_driver_version() -> str | None:
    """Return the newest CUDA version that the driver can run, as "13.0"; None if there is no driver
    or its call fails."""
    version = ctypes.c_int()
    try:
        _call(_library(), "cuDriverGetVersion", ctypes.byref(version))
    except SdkError:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def old_driver(needed: int) -> DeviceError | None:
    """Return the error for a driver that is too old for the code of a CUDA toolkit.

    A driver runs the code of toolkits whose major version is at most the driver's. The result is
    None if the driver can run the code, or if the driver's version is unknown.

    Parameters
    ----------
    needed : the version of the toolkit; 13000 is 13.0.
    """
    version = cuda_driver_version()
    if version is None or int(version.partition(".")[0]) >= needed // 1000:
        return None
    message, fix = too_old(version, needed)
    return DeviceError(message, fix=fix)


def too_old(version: str, needed: int) -> tuple[str, str]:
    """Return the message and the fix for a driver that is too old.

    Parameters
    ----------
    version : the newest CUDA version that the driver can run, as "12.9".
    needed : the CUDA version that the build needs; 13000 is 13.0.
    """
    return (
        f"the driver is too old: it runs CUDA {version}, this build needs "
        f"{needed // 1000}.{needed % 1000 // 10}",
        f"update NVIDIA's driver, or build with a toolkit of CUDA {version} or older",
    )


def cuda_devices() -> list[CudaDevice]:
    """List all GPUs that the driver shows to this process, in the driver's order.

    To learn how much memory of a discrete GPU is free, the function creates a context on it and
    releases the context at once. An integrated GPU (Jetson) shares the machine's memory: its free
    memory is the machine's available memory.

    Returns
    -------
    The GPUs; an empty list without a driver or a GPU.

    Raises
    ------
    DeviceError : the driver does not start, or cannot describe a GPU.
    """
    try:
        driver = _driver()
    except MissingBackend:
        return []
    count = ctypes.c_int()
    _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    return [_describe(driver, index) for index in range(count.value)]


def l4t() -> str | None:
    """Return the release of NVIDIA's Linux for Tegra, as "36.4.0"; None if this is no Jetson."""
    text = _text(_TEGRA_RELEASE)
    found = re.search(r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", text)
    return f"{found[1]}.{found[2]}" if found else None


def jetson_model() -> str | None:
    """Return the board's name, as "NVIDIA Jetson AGX Orin Developer Kit"; None if no Jetson."""
    name = _text(_TREE_MODEL).strip("\0 \n")
    return name if re.search("nvidia|jetson", name, re.IGNORECASE) else None


def platform_tag() -> str:
    """Return the operating system and the processor's architecture, as "linux-x86_64"."""
    return f"{sys.platform}-{platform.machine()}"


def _library() -> ctypes.CDLL:
    """Load the driver's library; the driver is not initialised."""
    try:
        return ctypes.CDLL(_DRIVER)
    except OSError as error:
        raise MissingBackend(
            f"no CUDA driver: {error}",
            fix="install NVIDIA's driver; in a container: docker run --gpus all "
            "(Jetson: --runtime nvidia)",
        ) from error


def _driver() -> ctypes.CDLL:
    """Load and initialise the driver, and check that it shows at least one GPU."""
    library = _library()
    code = _function(library, "cuInit")(0)
    if code == NO_DEVICE:
        raise no_gpu()
    if code:
        raise DeviceError(
            f"the CUDA driver does not start: cuInit returns {code} ({_error_name(library, code)})",
            fix=FIXES.get(code, "run nvidia-smi and read its error; update the driver"),
        )
    count = ctypes.c_int()
    _call(library, "cuDeviceGetCount", ctypes.byref(count))
    if count.value < 1:
        raise no_gpu()
    return library


def no_gpu() -> MissingBackend:
    """Return the error for a driver that shows no GPU to this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    return MissingBackend(
        f"the CUDA driver finds no GPU{why}",
        fix="list the GPUs with nvidia-smi; check CUDA_VISIBLE_DEVICES and the container's --gpus",
    )


def _describe(driver: ctypes.CDLL, index: int) -> CudaDevice:
    """Ask the driver for all that CudaDevice contains about GPU ``index``."""
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
    """Return the free bytes of a GPU; 0 if the driver cannot create a context on it.

    The driver refuses a context if the memory is full or another process reserves the GPU.
    """
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
    """Return the machine's available memory in bytes; 0 if /proc/meminfo does not contain it."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(_MEMINFO), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def _call(library: ctypes.CDLL, name: str, *arguments: Any) -> None:
    """Call a function of the driver, and raise a DeviceError if it returns an error code."""
    code = _function(library, name)(*arguments)
    if code:
        raise DeviceError(
            f"the CUDA driver fails: {name} returns {code} ({_error_name(library, code)})",
            fix="run nvidia-smi and read its error",
        )


def _function(library: ctypes.CDLL, name: str) -> Any:
    """Return a function of the driver by its name; raise a DeviceError if the library lacks it."""
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
    """Return the text of a file, or "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


BUILD = "pip install -e .   (in a clone, with nvcc on PATH)"


def no_code_for(gpu: CudaDevice, compiled: Sequence[str]) -> str:
    """Return a sentence that says why ``gpu`` cannot run the compiled code, or "" if it can.

    Parameters
    ----------
    gpu : the GPU.
    compiled : the compute capabilities of the compiled code. "8.6" is machine code: it runs on GPUs
        of the same major version (8) with this minor version (6) or a higher one. "12.0+ptx" is
        PTX: the driver compiles it for compute capability 12.0 and all higher ones.
    """
    have = _version(gpu.compute_capability)
    for name in compiled:
        code = _version(name.removesuffix("+ptx"))
        if code <= have and (name.endswith("+ptx") or code[0] == have[0]):
            return ""
    known = ", ".join(name for name in compiled if not name.endswith("+ptx"))
    newer = " and newer" * any(name.endswith("+ptx") for name in compiled)
    return (
        f"cuda:{gpu.index} ({gpu.name}) has compute capability {gpu.compute_capability}; "
        f"this build has code for {known}{newer}"
    )


def build_for(capability: str) -> str:
    """Return the command that builds the CUDA module for a compute capability, as "8.6". Below 7.5
    the result also says which toolkit is needed."""
    line = f"SEG_CUDA_ARCHS={capability.replace('.', '')} {BUILD}"
    old = re.fullmatch(r"\d+\.\d+", capability) and _version(capability) < (7, 5)
    return f"{line}; use a CUDA 12 toolkit: CUDA 13 supports 7.5 and higher only" if old else line


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)
