"""Checks of arguments. A message names the argument, its value, what was wanted, and the fix.

With ``gpu=True`` a check accepts arrays of runtime._cuda as well. It checks their shape and dtype
only: a conversion or a search for NaN would make the program wait for the GPU.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from runtime.errors import InputError

_Function = TypeVar("_Function", bound=Callable[..., Any])
_DLPACK_CUDA = 2  # DLPack's number for a GPU's memory


class UnknownGuide(InputError):
    """The guide is unknown (-1, or zero in all classes) at every pixel; or a guide on a GPU, whose
    values are not checked, has NaN."""


def on_gpu(value: Any) -> bool:
    """Whether ``value`` is an array on a GPU, of PyTorch, CuPy, JAX, Numba or runtime._cuda."""
    if isinstance(value, np.ndarray):
        return False
    if hasattr(value, "__dlpack_device__") and value.__dlpack_device__()[0] == _DLPACK_CUDA:
        return True
    return hasattr(value, "__cuda_array_interface__")


def check_host(name: str, value: Any) -> np.ndarray:
    """Return ``value`` as a NumPy array.

    Raises
    ------
    InputError : ``value`` is on a GPU; this function does not copy it to the host.
    """
    if on_gpu(value):
        raise InputError(
            f"{name} is on a GPU; wanted an array of NumPy",
            fix="use device='cuda', or copy it first: x.cpu() in PyTorch, x.get() in CuPy",
        )
    return np.asarray(value)


def check_gpu_dtype(name: str, array: Any, dtype: type, wanted: str) -> Any:
    """Check the dtype of an array on a GPU, and return the array.

    Parameters
    ----------
    name, wanted : what the message calls the array, and what it says was wanted.

    Raises
    ------
    InputError : ``array`` has another dtype. Arrays on a GPU are not converted.
    """
    if array.dtype != dtype:
        raise InputError(
            f"{name} has dtype {array.dtype}; wanted {wanted}",
            fix="convert it first: arrays on a GPU are not converted",
        )
    return array


def check_image(image: Any, name: str = "image", *, gpu: bool = False) -> np.ndarray:
    """Return ``image`` as (H, W, 3) float32 in [0, 1], C-contiguous.

    Values may exceed [0, 1] by 0.001; they are not clipped.

    Raises
    ------
    InputError : another shape, dtype or range, NaN, or an array on a GPU without ``gpu``.
    """
    array = _check_float(name, image, "(H, W, 3) float32 RGB in [0, 1]", gpu=gpu)
    if array.ndim != 3 or array.shape[2] != 3:
        raise InputError(f"{name} has shape {array.shape}; wanted (H, W, 3)")
    if isinstance(array, np.ndarray) and (array.min() < -1e-3 or array.max() > 1 + 1e-3):
        raise InputError(
            f"{name} has values from {array.min():g} to {array.max():g}; wanted [0, 1]",
            fix="divide 8-bit pictures by 255",
        )
    return array


def _check_float(
    name: str,
    value: Any,
    wanted: str,
    *,
    finite: bool = True,
    gpu: bool = False,
    levels: bool = False,
) -> np.ndarray:
    """Return ``value`` as a C-contiguous float32 array; with ``levels``, uint8 is not converted."""
    if gpu and on_gpu(value):
        dtype = np.uint8 if levels and value.dtype == np.uint8 else np.float32
        return check_gpu_dtype(name, value, dtype, wanted)
    array = check_host(name, value)
    if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise InputError(f"{name} has dtype {array.dtype}; wanted {wanted}")
    if array.size == 0:
        raise InputError(f"{name} has shape {array.shape}, which holds nothing; wanted {wanted}")
    if levels and array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    array = np.ascontiguousarray(array, np.float32)
    if finite:
        check_finite(name, array)
    return array


def check_finite(name: str, array: np.ndarray) -> None:
    """Check that ``array`` has neither NaN nor infinity.

    Raises
    ------
    InputError : the array has such values; the message contains their number.
    """
    if not np.isfinite(array).all():
        raise InputError(
            f"{name} has {int((~np.isfinite(array)).sum())} NaN or infinite values",
            fix=f"clean it first, e.g. numpy.nan_to_num({name})",
        )


def check_planes(
    name: str,
    value: Any,
    channels: tuple[int, ...] | None = None,
    finite: bool = True,
    *,
    gpu: bool = False,
    levels: bool = False,
) -> np.ndarray:
    """Return ``value`` as (H, W, K) float32, C-contiguous; (H, W) becomes (H, W, 1).

    Parameters
    ----------
    channels : the values of K that are allowed; None allows all.
    finite : whether NaN and infinity are refused.
    gpu : whether an array on a GPU is allowed.
    levels : whether uint8 is allowed; it is not converted.

    Raises
    ------
    InputError : another shape or dtype, NaN, or an array on a GPU without ``gpu``.
    """
    wanted = f"(H, W) or (H, W, K) float32{' or uint8' * levels}"
    array = _check_float(name, value, wanted, finite=finite, gpu=gpu, levels=levels)
    if array.ndim == 2:
        array = array.reshape(*array.shape, 1)
    if array.ndim != 3 or (channels and array.shape[2] not in channels):
        allowed = "K" if channels is None else " or ".join(map(str, channels))
        raise InputError(f"{name} has shape {array.shape}; wanted (H, W) or (H, W, {allowed})")
    return array


def check_bytes(name: str, picture: Any, *, gpu: bool = False) -> Any:
    """Return ``picture``, (H, W, 3) uint8 with H, W >= 1. On a GPU, it is returned as it is.

    Raises
    ------
    InputError : another shape or dtype, or an array on a GPU without ``gpu``.
    """
    if not (gpu and on_gpu(picture)):
        picture = check_host(name, picture)
    size = picture.shape
    if picture.dtype != np.uint8 or len(size) != 3 or size[2] != 3 or 0 in size:
        raise InputError(
            f"{name} is {size} {picture.dtype}; wanted (H, W, 3) uint8 with H, W >= 1",
            fix="convert it: grey by np.stack([x] * 3, -1), RGBA by x[..., :3], levels from 0 to 1 "
            "by np.uint8(x * 255)",
        )
    return picture


def check_out(out: Any, shape: tuple[int, ...], **read: np.ndarray) -> np.ndarray:
    """Return ``out``, an array that a result is written to, as a plain array of NumPy.

    Parameters
    ----------
    read : arrays by name that are read until the end, so that ``out`` may be no part of them.

    Raises
    ------
    InputError : ``out`` is no float32 array of this shape, not C-contiguous or aligned, may not be
        written to, or shares memory with one of ``read``.
    """
    if not isinstance(out, np.ndarray) or out.dtype != np.float32 or out.shape != shape:
        found = f"{out.shape} {out.dtype}" if isinstance(out, np.ndarray) else type(out).__name__
        raise InputError(f"out is {found}; wanted {shape} float32")
    if not (out.flags.c_contiguous and out.flags.aligned and out.flags.writeable):
        raise InputError("out is not C-contiguous or aligned, or may not be written to")
    for name, array in read.items():
        if np.may_share_memory(out, array):
            raise InputError(f"out shares memory with the {name}, which is read until the end")
    return np.asarray(out)  # also of np.memmap


def check_guide(guide: Any, height: int, width: int, *, gpu: bool = False) -> np.ndarray:
    """Return ``guide`` as (H, W, C) float32 probabilities, or as (H, W) int32 labels.

    The probabilities of a pixel are scaled to sum 1; a pixel of zeros is unknown. The label -1 is
    unknown. An array on a GPU must have this form already: only its shape and dtype are checked.

    Raises
    ------
    InputError : another shape or dtype, NaN, negative values, labels out of -1 to 4095, or an array
        on a GPU without ``gpu``.
    UnknownGuide : every pixel is unknown.
    """
    array = guide if gpu and on_gpu(guide) else check_host("guide", guide)
    wanted = f"({height}, {width}, C) probabilities or ({height}, {width}) integer labels"
    if array.ndim not in (2, 3) or array.shape[:2] != (height, width) or 0 in array.shape:
        raise InputError(f"guide has shape {array.shape}; wanted {wanted}")
    if not isinstance(array, np.ndarray):
        dtype = np.int32 if array.ndim == 2 else np.float32
        return check_gpu_dtype("guide", array, dtype, f"{wanted}, {dtype.__name__}")
    if array.ndim == 2:
        if array.dtype.kind not in "iu":
            raise InputError(f"guide has dtype {array.dtype}; labels must be integers")
        if array.min() < -1 or array.max() >= 4096:
            raise InputError(
                f"guide has labels from {array.min()} to {array.max()}; wanted -1 to 4095",
                fix="number the classes 0, 1, ... and use -1 for unknown",
            )
        if array.max() < 0:
            raise UnknownGuide("guide is unknown (-1) everywhere; it has no class for any pixel")
        return np.ascontiguousarray(array, np.int32)
    array = _check_float("guide", array, wanted)
    if array.min() < 0:
        raise InputError(
            f"guide has negative values (smallest {array.min():g}); wanted probabilities",
            fix="apply a soft-max to scores first",
        )
    return scaled_to_one(array)


def scaled_to_one(guide: np.ndarray) -> np.ndarray:
    """Scale (H, W, C) float32, which has no negative values, so that each pixel sums to 1. A pixel
    of zeros is unchanged.

    Raises
    ------
    UnknownGuide : all pixels are zero.
    """
    total = sum_classes(guide)
    if total.max() <= 0:
        raise UnknownGuide("guide is zero (unknown) everywhere; it has no class for any pixel")
    return guide / np.where(total > 0, total, 1)


def sum_classes(array: np.ndarray) -> np.ndarray:
    """Return (H, W, 1), the sums over the last axis of (H, W, C) float32.

    ``array.sum(-1, keepdims=True)`` is several times slower, because the last axis is short.
    """
    return np.einsum("hwc->hw", array)[..., None]


def as_number(value: Any) -> int | float | None:
    """Return a number as an int or a float of Python. The numbers are ints and floats of Python,
    and integers and floats of NumPy: its scalars and its arrays without axes.

    Returns
    -------
    None for any other value: True and False, complex numbers, text, an array with axes. A float
    remains a float, even if it is whole, such as 512.0.
    """
    if isinstance(value, (np.generic, np.ndarray)):
        if value.ndim or value.dtype.kind not in "iuf":
            return None
        return int(value) if value.dtype.kind in "iu" else float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if isinstance(value, int) else float(value)


def as_numbers(value: Any) -> Any:
    """Return a list, a tuple or a NumPy array with one axis as a tuple. Its numbers, and ``value``
    itself if it is a number, become numbers of Python; all else is unchanged.

    Example
    -------
    >>> as_numbers(np.array([512, 512]))
    (512, 512)
    """
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim == 1):
        return tuple(map(as_numbers, value))
    number = as_number(value)
    return value if number is None else number


def shown_value(value: Any) -> str:
    """Return ``repr(value)`` for a message: one line of at most 100 characters."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # Python writes no integer of more than 4300 digits
        if isinstance(value, int):
            return f"an integer of {value.bit_length()} bits"
        return f"a {type(value).__name__} that is too long to print"
    return text if len(text) <= 100 else f"{text[:90]}..."


def is_count(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether ``value`` is a whole number in [low, high], as :func:`as_number` defines numbers."""
    number = as_number(value)
    return isinstance(number, int) and low <= number <= high


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether ``value`` is a number in [low, high], as :func:`as_number` defines numbers; NaN is
    not."""
    number = as_number(value)
    return number is not None and low <= number <= high


def check_count(name: str, value: Any, low: int, high: int) -> int:
    """Return ``value``, a whole number in [low, high], as an int of Python.

    Raises
    ------
    InputError : ``value`` is no whole number, as :func:`as_number` defines numbers, or is out of
        range.
    """
    number = as_number(value)
    if not isinstance(number, int):
        whole = number is not None and number.is_integer()  # such as 512.0
        raise InputError(
            f"{name} is {shown_value(value)}; wanted a whole number",
            fix=f"int({name})" if whole else "",
        )
    if not low <= number <= high:
        raise InputError(f"{name} is {shown_value(number)}; wanted {low} to {high}")
    return number


def check_positive(name: str, value: Any) -> float:
    """Return ``value``, a finite number above zero, as a float.

    Raises
    ------
    InputError : ``value`` is no number, as :func:`as_number` defines numbers, is not above zero,
        NaN or infinite.
    """
    number = as_number(value)
    try:
        number = math.nan if number is None else float(number)
    except OverflowError:  # the integer is larger than the largest float
        number = math.inf
    if not 0 < number < math.inf:
        raise InputError(f"{name} is {shown_value(value)}; wanted a number above 0")
    return number


def renamed(**names: str) -> Callable[[_Function], _Function]:
    """Make a decorator for a function whose arguments have new names. ``names`` maps each old name
    to the new one; an old name works for one more release, with a DeprecationWarning.

    Example: ``@renamed(guide="guidance")``.
    """

    def decorate(function: _Function) -> _Function:
        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            for old, new in names.items():
                if old in options:
                    name = function.__qualname__.removesuffix(".__init__")
                    if new in options:
                        raise InputError(
                            f"{name} got {old} and {new}, its new name; leave out {old}"
                        )
                    message = (
                        f"the argument {old} of {name} is now {new}; the next release has no {old}"
                    )
                    warnings.warn(message, DeprecationWarning, stacklevel=2)
                    options[new] = options.pop(old)
            return function(*arguments, **options)

        return call  # type: ignore[return-value]

    return decorate
