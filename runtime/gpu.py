"""What crosses to a GPU, and what is done there between a network, the refinement and the filter.

Arrays on the GPU are those of the CUDA module (``runtime._cuda.Array``): shape, dtype, ``numpy()``.
On "cpu" a picture stays what it is, so that one caller serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from runtime.backend import backend
from runtime.checks import on_gpu
from runtime.device import parse_device
from runtime.errors import InputError
from runtime.resize import resize

MOST_ROWS = 65535  # of a picture, for grids end there


def upload(picture: np.ndarray, device: str) -> Any:
    """The (H, W, 3) uint8 picture on the device, for several functions to take; itself on "cpu"."""
    kind, index = parse_device(device)
    if kind == "cpu":
        return picture
    check_rows("picture", picture)
    return backend(device).to_device(picture, device=index)


def check_rows(name: str, array: Any) -> None:
    """InputError where an array has more rows than grids have blocks."""
    if array.shape[0] > MOST_ROWS:
        raise InputError(f"{name} has {array.shape[0]} rows; a GPU takes {MOST_ROWS} at most")


def mark(device: str) -> Any:
    """The moment that the module's stream on a GPU has come to; ``a.until(b)`` are milliseconds of
    its own clock. None on "cpu"."""
    kind, index = parse_device(device)
    return None if kind == "cpu" else backend(device).mark(index)


def working_picture(picture: Any, height: int, width: int) -> Any:
    """(height, width, 3) float32 in [0, 1], where the picture of :func:`upload` is: averaged down,
    or interpolated where a side grows (:func:`runtime.resize.resize`)."""
    if isinstance(picture, np.ndarray):
        return resize(picture, height, width).astype(np.float32) / 255
    return _core(picture).working_picture(picture, height, width, device=picture.device)


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
    return int(backend(f"cuda:{index}").stream(index))


def wait(index: int) -> None:
    """Until that stream has run dry."""
    now = mark(f"cuda:{index}")
    now.until(now)


def network_input(
    picture: Any, size: tuple[int, int], mean: Any, std: Any, bgr: bool, to: Buffer | None = None
) -> Any:
    """What :class:`runtime.preprocess.Preprocess` makes of the uploaded picture: (1, 3, h, w)
    float32 on the GPU, (h, w) = size; in ``to``, if that is given."""
    return _core(picture).network_input(picture, *size, mean, std, bgr, to, device=picture.device)


def soft_guide(scores: Any, exponents: bool, index: int) -> Any:
    """(1, C, h, w) float32 scores on GPU ``index`` as a guide (h, w, C) there: their soft-max if
    ``exponents``, else they are probabilities. NaN in each pixel where they are not finite, or no
    probabilities."""
    return backend(f"cuda:{index}").soft_guide(scores, exponents, device=index)


def resized(planes: Any, size: tuple[int, int]) -> Any:
    """(h, w, C) float32 on the GPU at another size, (height, width, C), as
    :func:`runtime.resize.resize` has it."""
    if planes.shape[:2] == tuple(size):
        return planes
    return _core(planes).resize_planes(planes, *size, device=planes.device)


def taken(name: str, array: Any, device: str) -> Any:
    """An array that lies on this GPU as the module's own, whoever made it; others as they are."""
    kind, index = parse_device(device)
    if kind == "cpu" or not on_gpu(array):
        return array
    return backend(device).as_array(array, name, device=index)


def class_shares(guide: Any) -> np.ndarray:
    """(C,) float64 means of a guide (h, w, C) on the GPU; NaN where it has one."""
    parts = _core(guide).class_sums(guide, device=guide.device).numpy()
    return parts.astype(np.float64).sum(1) / (guide.shape[0] * guide.shape[1])


def take_classes(guide: Any, classes: np.ndarray, normalised: bool) -> Any:
    """The columns ``classes`` of (h, w, C) on the GPU; each pixel made to sum to 1, where they are
    not all zero, if ``normalised``."""
    columns = np.ascontiguousarray(classes, np.int32)
    return _core(guide).take_classes(guide, columns, normalised, device=guide.device)


def merge_classes(scores: Any, to: np.ndarray, count: int) -> Any:
    """(h, w, count) from (h, w, C) on the GPU: column k is added to column to[k], unless that is
    negative."""
    to = np.ascontiguousarray(to, np.int32)
    return _core(scores).merge_classes(scores, to, count, device=scores.device)


def keep_pixels(scores: Any, guide: Any, mask: np.ndarray) -> Any:
    """In place: scores (h, w, C) on the GPU become the guide's where the (h, w) mask is set. The
    result is the same memory, complete when that is done."""
    mask = np.ascontiguousarray(mask)
    return _core(scores).keep_pixels(scores, guide, mask, device=scores.device)


def hard_labels(guide: Any) -> tuple[Any, Any]:
    """(h, w) int32: the first largest class of (h, w, C) on the GPU, -1 where all are zero, -2
    where one is NaN; and (h, w) float32, its value. Both there."""
    return _core(guide).hard_labels(guide, device=guide.device)


def pair_counts(labels: Any, hard: Any, clusters: int, classes: int) -> np.ndarray:
    """(clusters, classes) int32: how many pixels of two (h, w) int32 maps on the GPU have both;
    other labels do not count."""
    core = _core(labels)
    return core.pair_counts(labels, hard, clusters, classes, device=labels.device).numpy()


def colour_counts(picture: Any) -> np.ndarray:
    """(512,) int32: pixels of each of 8 x 8 x 8 colours of (h, w, 3) float32 in [0, 1] on the
    GPU."""
    return _core(picture).colour_counts(picture, device=picture.device).numpy()


def winners(scores: Any) -> np.ndarray:
    """The classes that are the largest of some pixel of (h, w, C) on the GPU, ascending."""
    return np.flatnonzero(_core(scores).winners(scores, device=scores.device).numpy())


def _core(array: Any) -> Any:
    return backend(f"cuda:{array.device}")
