"""Exceptions for the error codes of the CUDA runtime: what happened, and what to do."""

from __future__ import annotations

from runtime.device.driver import (
    FIXES,
    NO_DEVICE,
    CudaDevice,
    build_for,
    cuda_devices,
    cuda_driver_version,
    no_code_for,
    no_gpu,
    too_old,
)
from runtime.errors import DeviceError

# Error codes of the CUDA runtime, from driver_types.h.
OUT_OF_MEMORY, _OLD_DRIVER, _BAD_DEVICE, _NO_CODE, _NEW_PTX = 2, 35, 101, 209, 222
_HARDWARE = {  # faults of the GPU's hardware
    214: "its memory has an error that ECC cannot correct",
    220: "its NVLink has an error that cannot be corrected",
    226: "its memory has an error",
}
# After one of these errors the process cannot use its GPU any more.
CUDA_FAULTS = frozenset(
    (*_HARDWARE, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911)
)


def cuda_error(code: int, call: str, device: int) -> DeviceError:
    """Return the exception for a call of the CUDA runtime that failed.

    Parameters
    ----------
    code : a cudaError_t.
    call : the call, with the CUDA runtime's name and text of the error.
    device : the GPU's number.
    """
    message, fix = _explained(code, device)
    return DeviceError(f"{message} ({call})", fix=fix)


def cuda_lost(call: str) -> DeviceError:
    """Return the exception for a use of a GPU after one of CUDA_FAULTS.

    Parameters
    ----------
    call : the call that failed first, as for :func:`cuda_error`.
    """
    return DeviceError(
        f"the GPU was lost by an earlier error: {call}; this process cannot use it any more",
        fix="restart the process",
    )


def _explained(code: int, device: int) -> tuple[str, str]:
    """Return the message and the fix for a cudaError_t on GPU ``device``."""
    gpu = f"GPU {device}"
    if code == OUT_OF_MEMORY:
        return f"{gpu} is out of memory{_memory(device)}", (
            "use a smaller scale or max_pixels, or fewer streams; close other processes that "
            "nvidia-smi lists"
        )
    if code in (_NO_CODE, _NEW_PTX):
        from runtime import _cuda  # This module made the call, so it is built.

        found, compiled = _found(device), _cuda.architectures()
        why = found and no_code_for(found, compiled)
        return (
            why or f"{gpu} and its driver cannot run the code of this build: {', '.join(compiled)}",
            build_for(found.compute_capability if found else "<its compute capability>"),
        )
    if code == _OLD_DRIVER:
        version = cuda_driver_version()
        if version is None:
            return "there is no CUDA driver", "install NVIDIA's driver"
        from runtime import _cuda

        return too_old(version, _cuda.runtime_version())
    if code == NO_DEVICE:
        error = no_gpu()
        return error.message, error.fix
    if code == _BAD_DEVICE:
        return f"there is no {gpu}", (
            "run nvidia-smi to list the GPUs; numbers begin at 0 and count only the GPUs that "
            "CUDA_VISIBLE_DEVICES names"
        )
    if code in _HARDWARE:
        return f"{gpu} is broken: {_HARDWARE[code]}", (
            "restart the process; if the error happens again, reset or replace the GPU: "
            "nvidia-smi -q"
        )
    if code in CUDA_FAULTS:
        return f"this process has lost its context on {gpu} and cannot use the GPU any more", (
            "restart the process, and report the error"
        )
    return f"{gpu} fails", FIXES.get(code, "run nvidia-smi and read its error")


def _found(device: int) -> CudaDevice | None:
    """Return the driver's description of a GPU; None if the driver cannot describe it."""
    try:
        return next((d for d in cuda_devices() if d.index == device), None)
    except DeviceError:
        return None


def _memory(device: int) -> str:
    """Return the end of a message, with the free and the whole memory of a GPU; "" if the driver
    cannot describe the GPU."""
    found = _found(device)
    if found is None:
        return ""
    free, total = found.free_bytes / 2**30, found.memory_bytes / 2**30
    return f": {free:.1f} of {total:.1f} GiB are free"
