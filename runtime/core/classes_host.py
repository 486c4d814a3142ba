"""Operations on class maps in NumPy; the same functions as in ``classes_cuda``."""

from __future__ import annotations

import numpy as np

from runtime.checks import sum_classes


def shares(guide: np.ndarray) -> np.ndarray:
    """Return (C,) float64: the share of each class in a guide, (H, W, C) float32 probabilities or
    (H, W) int32 labels with -1 = unknown. For labels, C is the largest label plus 1."""
    if guide.ndim == 2:
        return np.bincount(guide[guide >= 0]) / guide.size
    return guide.mean((0, 1), dtype=np.float64)


def take(scores: np.ndarray, classes: np.ndarray, normalised: bool) -> np.ndarray:
    """Return (H, W, K) float32: the columns ``classes`` of scores (H, W, C), or of the one-hot form
    of labels (H, W).

    Columns of classes that the scores do not have are zero. ``normalised`` scales each pixel to sum
    1, unless it is all zero.
    """
    if scores.ndim == 2:  # other labels and -1 select the last row of the table, which is zero
        column = np.full(max(scores.max(), classes.max()) + 2, len(classes))
        column[classes] = np.arange(len(classes))
        return np.eye(len(classes) + 1, len(classes), dtype=np.float32)[column[scores]]
    taken = scores.take(classes, -1, mode="clip")
    taken[..., classes >= scores.shape[2]] = 0
    if not normalised:
        return taken
    total = sum_classes(taken)
    return taken / np.where(total > 0, total, 1)


def merge(scores: np.ndarray, to: np.ndarray, count: int) -> np.ndarray:
    """Return (H, W, count): column k of scores (H, W, C) is added to column to[k], or to none if
    to[k] is negative."""
    table = (to[:, None] == np.arange(count)).astype(np.float32)
    return scores @ table


def keep(scores: np.ndarray, guide: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Set scores (H, W, C) in place to the guide's values where ``mask``, (H, W) bool, is True."""
    scores[mask] = guide[mask]
    return scores


def hard(guide: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (H, W) int32: the class with the largest value in a guide, the first one of equals, -1
    where all are zero; and (H, W) float32, the value of that class. A guide of labels is returned
    itself, with the value 1, or 0 where it is -1."""
    if guide.ndim == 2:
        return guide, (guide >= 0).astype(np.float32)
    best = guide.argmax(-1)
    share = np.take_along_axis(guide, best[..., None], -1)[..., 0]
    return np.where(share > 0, best, -1).astype(np.int32), share


def pairs(labels: np.ndarray, hard: np.ndarray, clusters: int, classes: int) -> np.ndarray:
    """Return (clusters, classes): entry (k, c) is the number of pixels with k in ``labels`` and c
    in ``hard``, two (H, W) int32 maps. Pixels with a negative number in ``hard`` do not count."""
    known = hard >= 0
    index = labels[known].astype(np.int64) * classes + hard[known]
    return np.bincount(index, minlength=clusters * classes).reshape(clusters, classes)


def winners(scores: np.ndarray) -> np.ndarray:
    """Return the classes that have the largest score of some pixel of (H, W, C), ascending."""
    return np.flatnonzero(np.bincount(scores.argmax(-1).ravel()))


def colour_counts(picture: np.ndarray) -> np.ndarray:
    """Return (512,): the number of pixels of each of 8 x 8 x 8 colours of a picture, which is
    (H, W, 3) float32 in [0, 1]."""
    bins = np.minimum((picture * 8).astype(np.int32), 7)
    flat = (bins[..., 0] * 64 + bins[..., 1] * 8 + bins[..., 2]).ravel()
    return np.bincount(flat, minlength=512)
