"""The classes of a guide: which of them take part in a refinement, and the class of each cluster.

All functions but :func:`match_classes` compute on the device of their array, with the module that
:func:`classes_of` returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from runtime.checks import UnknownGuide, check_count, on_gpu
from runtime.core import classes_cuda, classes_host
from runtime.device.choose import module_of
from runtime.errors import InputError

MIN_SHARE = 5e-4  # residual keeps the classes that hold more than this share of the picture


def classes_of(array: Any) -> ModuleType:
    """Return the module for the device of ``array``: ``classes_host`` or ``classes_cuda``."""
    return classes_cuda if on_gpu(array) else classes_host


def known_shares(guide: Any) -> np.ndarray:
    """Return (C,) float64: the share of each class in a guide, on the host or on a GPU.

    Raises
    ------
    UnknownGuide : the guide is zero everywhere, or has NaN.
    """
    share = classes_of(guide).shares(guide)
    if not (share.size and share.max() > 0):
        raise UnknownGuide("guide is zero (unknown) everywhere, or has NaN")
    return share


def frequent_classes(guide: Any) -> np.ndarray:
    """Return (K,) int32: the classes that hold more than MIN_SHARE of a checked guide.

    If the largest share is below 2 MIN_SHARE, half of the largest share is the limit instead, so
    that at least one class remains.

    Raises
    ------
    UnknownGuide : the guide is zero everywhere, or has NaN.
    """
    share = known_shares(guide)
    return np.flatnonzero(share > min(MIN_SHARE, share.max() / 2)).astype(np.int32)


def restricted(guide: Any, classes: np.ndarray) -> Any:
    """Return (H, W, K) float32, the probabilities of the K ``classes`` alone, on the device of the
    guide. Each pixel sums to 1, or is all zero where the guide has none of these classes."""
    return classes_of(guide).take(guide, classes, True)


def match_classes(guide: np.ndarray, maps: Sequence[np.ndarray], classes: np.ndarray) -> np.ndarray:
    """Renumber the classes of a guide so that they fit earlier labels. The classes have no fixed
    meaning, as those of k-means. All arrays are on the host.

    Parameters
    ----------
    guide : (H, W, C) float32 probabilities or (H, W) int32 labels with -1 = unknown.
    maps : (H, W) int32, the earlier label maps; labels that are not in ``classes`` do not count.
    classes : (K,) int32, the earlier classes: distinct, at least 0.

    Returns
    -------
    A guide of the same kind. Its classes get the numbers in ``classes`` for which the sum of
    overlaps is largest (Hungarian method); further classes get the smallest numbers that are not in
    ``classes``. Classes that :func:`frequent_classes` omits are removed: their labels become -1,
    and the probabilities of the other classes are scaled to sum 1.

    Raises
    ------
    UnknownGuide : the guide is zero everywhere, or has NaN.
    """
    own = frequent_classes(guide)
    soft = restricted(guide, own)
    earlier = sum((labels[..., None] == classes).astype(np.float32) for labels in maps)
    overlap = soft.reshape(-1, len(own)).T @ earlier.reshape(-1, len(classes))
    cost = -overlap.astype(np.float64)
    core = module_of("cpu")
    ids = np.full(len(own), -1, np.int32)
    if len(own) <= len(classes):
        pairs = np.arange(len(own)), np.asarray(core.assign(cost))
    else:
        pairs = np.asarray(core.assign(np.ascontiguousarray(cost.T))), np.arange(len(classes))
    ids[pairs[0]] = classes[pairs[1]]
    free = np.setdiff1d(np.arange(len(own) + int(classes.max()) + 1), classes)
    ids[ids < 0] = free[: int((ids < 0).sum())]
    if guide.ndim == 2:
        table = np.full(max(int(guide.max()), int(own.max())) + 2, -1, np.int32)
        table[own] = ids
        return table[guide]
    out = np.zeros((*guide.shape[:2], int(ids.max()) + 1), np.float32)
    out[..., ids] = soft
    return out


def majority_classes(labels: np.ndarray, guide: np.ndarray | None, clusters: int) -> np.ndarray:
    """Return (K,) int32: the class of the guide that each cluster overlaps most, -1 for a cluster
    that overlaps none.

    Parameters
    ----------
    labels : (H, W) int32, the cluster of each pixel, on the host or an array of the CUDA module.
    guide : (H, W, C) float32 probabilities or (H, W) int32 labels with -1 = unknown; None gives no
        cluster a class. Probabilities may be an array of the CUDA module if ``labels`` is one.
    clusters : K, from 1 to 4096; larger than all labels.

    Raises
    ------
    InputError : maps of different sizes, labels that are no integers from 0 to K - 1, or a guide
        without two or three dimensions. Values of arrays on a GPU are not checked.

    Example
    -------
    >>> classes = runtime.majority_classes(result.labels, guide, result.scores.shape[2])
    """
    check_count("clusters", clusters, 1, 4096)
    if guide is None:
        return np.full(clusters, -1, np.int32)
    if not (on_gpu(labels) and on_gpu(guide) and guide.ndim == 3):
        labels, guide = np.asarray(labels), np.asarray(guide)
    if len(labels.shape) != 2 or labels.shape != guide.shape[:2] or len(guide.shape) > 3:
        raise InputError(
            f"labels have shape {labels.shape}, guide {guide.shape}; wanted (H, W) and (H, W, C) "
            "or (H, W)"
        )
    if isinstance(labels, np.ndarray) and labels.size:
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= clusters:
            raise InputError(
                f"labels are {labels.dtype} from {labels.min()} to {labels.max()}; wanted integers "
                f"from 0 to {clusters - 1}"
            )
    module = classes_of(guide)
    hard, _ = module.hard(guide)
    count = guide.shape[2] if guide.ndim == 3 else max(1, int(hard.max()) + 1)
    table = module.pairs(labels, hard, clusters, count)
    return np.where(table.any(1), table.argmax(1), -1).astype(np.int32)


def prior_scores(guide: Any) -> tuple[Any, np.ndarray]:
    """Return the classes of a guide that occur somewhere: their probabilities (H, W, K) float32, on
    the device of the guide, and their numbers (K,) int32.

    Raises
    ------
    UnknownGuide : the guide is zero everywhere, or has NaN.
    """
    classes = np.flatnonzero(known_shares(guide)).astype(np.int32)
    return classes_of(guide).take(guide, classes, False), classes


def merge_columns(scores: Any, classes: np.ndarray) -> tuple[Any, np.ndarray]:
    """Add up the columns of scores (H, W, K) that have the same class.

    Columns without a class (-1: the guide is unknown at all pixels of the cluster) are removed.

    Returns
    -------
    The scores, and the class of each of their columns.
    """
    kept = np.unique(classes[classes >= 0])
    if len(kept) == len(classes):
        return scores, classes
    to = np.where(classes >= 0, np.searchsorted(kept, classes), -1)
    return classes_of(scores).merge(scores, to, len(kept)), kept


def winning_columns(scores: Any, classes: np.ndarray, labels: Any = None) -> tuple[Any, np.ndarray]:
    """Keep the columns of scores (H, W, K) that are the largest at some pixel.

    Upsampling could make another column the largest only at a place between pixels that are won by
    different columns, where the scores of these columns are about equal.

    Parameters
    ----------
    classes : (K,) int32, the class of each column.
    labels : (H, W) int32, the arg max of the scores, if the caller has computed it.

    Returns
    -------
    The scores of these columns, and their classes.
    """
    module = classes_of(scores)
    if isinstance(labels, np.ndarray):
        found = np.flatnonzero(np.bincount(labels.ravel()))
    else:
        found = module.winners(scores)
    if len(found) < len(classes):
        scores = module.take(scores, found, False)
    return scores, classes[found]
