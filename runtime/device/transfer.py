"""Copies to a GPU, events on the CUDA module's stream, and GPU memory that several libraries use.

An array on a GPU is a ``runtime._cuda.Array`` with ``shape``, ``dtype`` and ``numpy()``. For the
device "cpu", `upload` and `as_device_array` return the array unchanged and `record_event` returns
None, so that callers need no branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from runtime.checks import on_gpu
from runtime.device.choose import module_of
from runtime.device.driver import parse_device
from runtime.errors import InputError

MOST_ROWS = 65535  # the largest size of a CUDA grid along y; kernels use one y for each row


def upload(picture: np.ndarray, device: str) -> Any:
    """Copy a picture to a device once, so that several functions can use the copy.

    Parameters
    ----------
    picture : (H, W, 3) uint8 RGB.
    device : the name of a device. "cpu" returns ``picture`` itself.

    Returns
    -------
    (H, W, 3) uint8: ``runtime._cuda.Array`` on a GPU.

    Raises
    ------
    InputError : the picture has more than MOST_ROWS rows, or ``device`` is no device.
    MissingBackend, DeviceError : the GPU cannot be used; see :func:`module_of`.
    """
    kind, index = parse_device(device)
    if kind == "cpu":
        return picture
    check_rows("picture", picture)
    return module_of(device).to_device(picture, device=index)


def check_rows(name: str, array: Any) -> None:
    """Check that a CUDA grid can cover the rows of an array.

    Raises
    ------
    InputError : ``array`` has more than MOST_ROWS rows; the message calls it ``name``.
    """
    if array.shape[0] > MOST_ROWS:
        raise InputError(
            f"{name} has {array.shape[0]} rows; a GPU takes {MOST_ROWS} at most",
            fix="use device='cpu', or cut the picture into tiles",
        )


def record_event(device: str) -> Any:
    """Record an event on the CUDA module's stream and return it; on "cpu" return None.

    ``a.until(b)`` waits for event b and returns the milliseconds of the GPU's clock from a to b.
    """
    kind, index = parse_device(device)
    return None if kind == "cpu" else module_of(device).mark(index)


class Buffer:
    """A view of GPU memory that another object owns; it is valid until the owner's next run.

    Other libraries read the memory through ``__cuda_array_interface__``.

    Parameters
    ----------
    address : of the first element, in the GPU's memory.
    shape, dtype : of the array; its elements lie in C order without gaps.
    numpy : returns a copy of the array on the host.
    """

    def __init__(
        self, address: int, shape: Sequence[int], dtype: Any, numpy: Callable[[], np.ndarray]
    ) -> None:
        self.shape, self.dtype, self.numpy = tuple(shape), np.dtype(dtype), numpy
        self.__cuda_array_interface__ = {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def own_stream(index: int) -> int:
    """Return the CUDA module's stream on GPU ``index``, a cudaStream_t as an integer.

    Work that another library queues on this stream runs in order with the module's own work.
    """
    return int(module_of(f"cuda:{index}").stream(index))


def wait_for_stream(index: int) -> None:
    """Wait until all work on the CUDA module's stream on GPU ``index`` is done."""
    event = record_event(f"cuda:{index}")
    event.until(event)


def as_device_array(name: str, array: Any, device: str) -> Any:
    """Wrap a GPU array of any library as an array of the CUDA module, without a copy.

    Parameters
    ----------
    name : the array's name in messages.
    array : an array on a GPU. Anything else is returned unchanged.
    device : the name of a device; with "cpu" every array is returned unchanged.
    """
    kind, index = parse_device(device)
    if kind == "cpu" or not on_gpu(array):
        return array
    return module_of(device).as_array(array, name, device=index)


def module_of_array(array: Any) -> Any:
    """Return the CUDA module, after a check of the GPU that contains ``array``, a
    ``runtime._cuda.Array``."""
    return module_of(f"cuda:{array.device}")
