"""Operations on class maps in NumPy; the same functions as in ``classes_cuda``."""

from __future__ import annotations

import numpy as np

from runtime.checks import sum_classes


def shares(guide: np.ndarray) -> np.ndarray:
    """(C,) float64: the mean of each class of a guide, (H, W, C) float32 probabilities or (H, W)
    int32 labels with -1 = unknown."""
    if guide.ndim == 2:
        return np.bincount(guide[guide >= 0]) / guide.size
    return guide.mean((0, 1), dtype=np.float64)


def take(scores: np.ndarray, classes: np.ndarray, normalised: bool) -> np.ndarray:
    """(H, W, K) float32: the columns ``classes`` of scores (H, W, C), or the same of labels (H, W).

    Classes that the scores do not have are zero. ``normalised``: each pixel is scaled to sum 1
    where it is not all zero."""
    if scores.ndim == 2:  # other labels and -1 take the last row, which is zero
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
    """(H, W, count) from (H, W, C): column k is added to column to[k], unless that is negative."""
    table = (to[:, None] == np.arange(count)).astype(np.float32)
    return scores @ table


def keep(scores: np.ndarray, guide: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Scores (H, W, C), which are set in place to the guide's values where the (H, W) mask is."""
    scores[mask] = guide[mask]
    return scores


def hard(guide: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) int32: the first of the largest classes of a guide, -1 = unknown; and (H, W) float32:
    the value of that class."""
    if guide.ndim == 2:
        return guide, (guide >= 0).astype(np.float32)
    best = guide.argmax(-1)
    share = np.take_along_axis(guide, best[..., None], -1)[..., 0]
    return np.where(share > 0, best, -1).astype(np.int32), share


def pairs(labels: np.ndarray, hard: np.ndarray, clusters: int, classes: int) -> np.ndarray:
    """(clusters, classes): how many pixels of two (H, W) int32 maps have both; pixels with a
    negative number in ``hard`` do not count."""
    known = hard >= 0
    index = labels[known].astype(np.int64) * classes + hard[known]
    return np.bincount(index, minlength=clusters * classes).reshape(clusters, classes)


def winners(scores: np.ndarray) -> np.ndarray:
    """The classes that are the largest of some pixel of (H, W, C), ascending."""
    return np.flatnonzero(np.bincount(scores.argmax(-1).ravel()))


def colour_counts(picture: np.ndarray) -> np.ndarray:
    """(512,): pixels of each of 8 x 8 x 8 colours of (H, W, 3) float32 in [0, 1]."""
    bins = np.minimum((picture * 8).astype(np.int32), 7)
    flat = (bins[..., 0] * 64 + bins[..., 1] * 8 + bins[..., 2]).ravel()
    return np.bincount(flat, minlength=512)
