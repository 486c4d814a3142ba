"""Questions to a guide's classes: which ones matter, which a cluster overlaps, how they are renumbered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.checks import UnknownGuide, on_gpu, sum_classes
from runtime.core.classes_cuda import hard, pairs, shares, take
from runtime.device.choose import backend

MIN_SHARE = 5e-4  # residual keeps the classes that hold more than this share of the picture


def known_shares(guide: Any) -> np.ndarray:
    """(C,) float64 means of a guide (H, W, C) on a GPU that is no NaN and not all zero."""
    share = shares(guide)
    if not share.max() > 0:
        raise UnknownGuide("guide is zero (unknown) everywhere, or has NaN")
    return share


def frequent_classes(guide: np.ndarray) -> np.ndarray:
    """(K,) int32: the classes that hold more than MIN_SHARE of a checked guide, also of one on a
    GPU."""
    if on_gpu(guide):
        share = known_shares(guide)
    elif guide.ndim == 2:
        share = np.bincount(guide[guide >= 0]) / guide.size
    else:
        share = guide.mean((0, 1), dtype=np.float64)
    return np.flatnonzero(share > min(MIN_SHARE, share.max() / 2)).astype(np.int32)


def restricted(guide: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """(H, W, K) float32 probabilities of ``classes`` alone: each pixel sums to 1, or is all zero
    where the guide knows none of them. On the GPU if the guide is."""
    if on_gpu(guide):
        return take(guide, classes, True)
    if guide.ndim == 2:  # label -> column; others and unknown ones to the last row, which is zero
        column = np.full(max(guide.max(), classes.max()) + 2, len(classes))
        column[classes] = np.arange(len(classes))
        return np.eye(len(classes) + 1, len(classes), dtype=np.float32)[column[guide]]
    soft = guide.take(classes, -1, mode="clip")
    soft[..., classes >= guide.shape[2]] = 0
    total = sum_classes(soft)
    return soft / np.where(total > 0, total, 1)


def match_classes(guide: np.ndarray, maps: Sequence[np.ndarray], classes: np.ndarray) -> np.ndarray:
    """The guide of a prior whose classes have no meaning of their own, renumbered.

    Parameters
    ----------
    guide : (H, W, C) float32 probabilities or (H, W) int32 labels with -1 = unknown.
    maps : (H, W) int32 segmentations into ``classes``, others and -1 being of none.
    classes : (K,) int32, distinct, at least 0.

    Returns
    -------
    A guide of the same kind. Its classes have the numbers of ``classes``, such that the overlap is
    the largest in sum (Hungarian method), and further ones only where there are more of them.
    """
    own = frequent_classes(guide)
    soft = restricted(guide, own)
    onto = sum((labels[..., None] == classes).astype(np.float32) for labels in maps)
    overlap = soft.reshape(-1, len(own)).T @ onto.reshape(-1, len(classes))
    cost = -overlap.astype(np.float64)
    core = backend("cpu")
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
    """(K,) int32: the guide class that each cluster overlaps most, -1 for clusters without one.

    ``labels`` are (H, W) int32 below K = ``clusters``; ``guide`` is (H, W, C) float32 probabilities
    or (H, W) int32 labels with -1 = unknown, or None. Labels and probabilities may both be arrays
    of the CUDA module."""
    if guide is None:
        return np.full(clusters, -1, np.int32)
    if on_gpu(labels) and on_gpu(guide) and guide.ndim == 3:
        table = pairs(labels, hard(guide)[0], clusters, guide.shape[2])
    else:
        labels, guide = np.asarray(labels), np.asarray(guide)
        hard = guide if guide.ndim == 2 else np.where(guide.sum(-1) > 0, guide.argmax(-1), -1)
        known = hard >= 0
        count = max(1, int(hard.max()) + 1)
        pairs = labels[known].astype(np.int64) * count + hard[known]
        table = np.bincount(pairs, minlength=clusters * count).reshape(clusters, count)
    return np.where(table.any(1), table.argmax(1), -1).astype(np.int32)
