"""Copies to a GPU, events, and memory that several libraries share.

Arrays on the GPU are those of the CUDA module (``runtime._cuda.Array``): shape, dtype, ``numpy()``.
On "cpu" a picture is returned unchanged, so that one caller serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from runtime.checks import on_gpu
from runtime.device.choose import module_of
from runtime.device.driver import parse_device
from runtime.errors import InputError

MOST_ROWS = 65535  # of a picture, for grids end there


def upload(picture: np.ndarray, device: str) -> Any:
    """The (H, W, 3) uint8 picture on the device, for several functions to take; itself on "cpu"."""
    kind, index = parse_device(device)
    if kind == "cpu":
        return picture
    check_rows("picture", picture)
    return module_of(device).to_device(picture, device=index)


def check_rows(name: str, array: Any) -> None:
    """InputError where an array has more rows than grids have blocks."""
    if array.shape[0] > MOST_ROWS:
        raise InputError(f"{name} has {array.shape[0]} rows; a GPU takes {MOST_ROWS} at most")


def mark(device: str) -> Any:
    """The moment that the module's stream on a GPU has come to; ``a.until(b)`` are milliseconds of
    its own clock. None on "cpu"."""
    kind, index = parse_device(device)
    return None if kind == "cpu" else module_of(device).mark(index)


class Buffer:
    """Memory on a GPU that somebody else owns, for others to take by
    ``__cuda_array_interface__``; ``numpy`` gives a copy. Good until the owner's next run."""

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
    """The CUDA module's cudaStream_t on GPU ``index``, for others to work on in line with it."""
    return int(module_of(f"cuda:{index}").stream(index))


def wait(index: int) -> None:
    """Until that stream has run dry."""
    now = mark(f"cuda:{index}")
    now.until(now)


def taken(name: str, array: Any, device: str) -> Any:
    """An array that lies on this GPU as the module's own, whoever made it; others as they are."""
    kind, index = parse_device(device)
    if kind == "cpu" or not on_gpu(array):
        return array
    return module_of(device).as_array(array, name, device=index)


def core_of(array: Any) -> Any:
    """The CUDA module for the GPU that holds ``array``."""
    return module_of(f"cuda:{array.device}")
