"""Operations on class maps that lie on a GPU; the same functions as in ``classes_host``.

Guides, scores and label maps are arrays of the CUDA module (``runtime._cuda.Array``, with shape,
dtype and ``numpy()``), as arguments and as results. NumPy arrays are on the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.device.transfer import module_of_array


def shares(guide: Any) -> np.ndarray:
    """Return (C,) float64: the mean of each class of a guide (h, w, C); NaN for a class that has a
    NaN."""
    parts = module_of_array(guide).class_sums(guide, device=guide.device).numpy()
    return parts.astype(np.float64).sum(1) / (guide.shape[0] * guide.shape[1])


def take(guide: Any, classes: np.ndarray, normalised: bool) -> Any:
    """Return (h, w, K) float32: the columns ``classes`` of scores (h, w, C).

    Columns of classes that the scores do not have are zero. ``normalised`` scales each pixel to sum
    1, unless it is all zero.
    """
    columns = np.ascontiguousarray(classes, np.int32)
    return module_of_array(guide).take_classes(guide, columns, normalised, device=guide.device)


def merge(scores: Any, to: np.ndarray, count: int) -> Any:
    """Return (h, w, count): column k of scores (h, w, C) is added to column to[k], or to none if
    to[k] is negative."""
    to = np.ascontiguousarray(to, np.int32)
    return module_of_array(scores).merge_classes(scores, to, count, device=scores.device)


def keep(scores: Any, guide: Any, mask: np.ndarray) -> Any:
    """Set scores (h, w, C) in place to the guide's values where ``mask`` is True, which is (h, w)
    bool on the host. The result is an array of the same memory."""
    mask = np.ascontiguousarray(mask)
    return module_of_array(scores).keep_pixels(scores, guide, mask, device=scores.device)


def hard(guide: Any) -> tuple[Any, Any]:
    """Return (h, w) int32: the class with the largest value in (h, w, C), the first one of equals,
    -1 where all are zero, -2 where one is NaN; and (h, w) float32, the value of that class."""
    return module_of_array(guide).hard_labels(guide, device=guide.device)


def pairs(labels: Any, hard: Any, clusters: int, classes: int) -> np.ndarray:
    """Return (clusters, classes) int32: entry (k, c) is the number of pixels with k in ``labels``
    and c in ``hard``, two (h, w) int32 maps. Other numbers in the maps do not count."""
    core = module_of_array(labels)
    return core.pair_counts(labels, hard, clusters, classes, device=labels.device).numpy()


def colour_counts(picture: Any) -> np.ndarray:
    """Return (512,) int32: the number of pixels of each of 8 x 8 x 8 colours of a picture, which is
    (h, w, 3) float32 in [0, 1]."""
    return module_of_array(picture).colour_counts(picture, device=picture.device).numpy()


def winners(scores: Any) -> np.ndarray:
    """Return the classes that have the largest score of some pixel of (h, w, C), ascending."""
    return np.flatnonzero(module_of_array(scores).winners(scores, device=scores.device).numpy())
