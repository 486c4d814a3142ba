"""Operations on class maps that lie on a GPU; the same functions as in ``classes_host``.

Arrays on the GPU are those of the CUDA module (``runtime._cuda.Array``): shape, dtype, ``numpy()``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.device.transfer import module_of_array


def shares(guide: Any) -> np.ndarray:
    """(C,) float64: the mean of each class of a guide (h, w, C) on the GPU; NaN for a class that
    has a NaN."""
    parts = module_of_array(guide).class_sums(guide, device=guide.device).numpy()
    return parts.astype(np.float64).sum(1) / (guide.shape[0] * guide.shape[1])


def take(guide: Any, classes: np.ndarray, normalised: bool) -> Any:
    """(h, w, K) on the GPU: the columns ``classes`` of scores (h, w, C). ``normalised``: each pixel
    is scaled to sum 1 where it is not all zero."""
    columns = np.ascontiguousarray(classes, np.int32)
    return module_of_array(guide).take_classes(guide, columns, normalised, device=guide.device)


def merge(scores: Any, to: np.ndarray, count: int) -> Any:
    """(h, w, count) from (h, w, C) on the GPU: column k is added to column to[k], unless that is
    negative."""
    to = np.ascontiguousarray(to, np.int32)
    return module_of_array(scores).merge_classes(scores, to, count, device=scores.device)


def keep(scores: Any, guide: Any, mask: np.ndarray) -> Any:
    """Scores (h, w, C) on the GPU, which are set in place to the guide's values where the (h, w)
    mask is. The result is an Array of the same memory."""
    mask = np.ascontiguousarray(mask)
    return module_of_array(scores).keep_pixels(scores, guide, mask, device=scores.device)


def hard(guide: Any) -> tuple[Any, Any]:
    """(h, w) int32: the first of the largest classes of (h, w, C), -1 where all are zero, -2 where
    one is NaN; and (h, w) float32, the value of that class. All are on the GPU."""
    return module_of_array(guide).hard_labels(guide, device=guide.device)


def pairs(labels: Any, hard: Any, clusters: int, classes: int) -> np.ndarray:
    """(clusters, classes) int32: how many pixels of two (h, w) int32 maps on the GPU have both;
    other labels do not count."""
    core = module_of_array(labels)
    return core.pair_counts(labels, hard, clusters, classes, device=labels.device).numpy()


def colour_counts(picture: Any) -> np.ndarray:
    """(512,) int32: pixels of each of 8 x 8 x 8 colours of (h, w, 3) float32 in [0, 1] on the
    GPU."""
    return module_of_array(picture).colour_counts(picture, device=picture.device).numpy()


def winners(scores: Any) -> np.ndarray:
    """The classes that are the largest of some pixel of (h, w, C) on the GPU, ascending."""
    return np.flatnonzero(module_of_array(scores).winners(scores, device=scores.device).numpy())
