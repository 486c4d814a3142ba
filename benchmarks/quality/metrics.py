"""Quality measures on label maps: pure functions on NumPy arrays.

A label map is ``(H, W)`` of any integer type or bool. In measures of regions a number only names
its region. Areas and counts are int64, scores are float; higher is better, except in
`variation_of_information`. Functions of two label maps raise InputError if a map has another type
or the two shapes differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from runtime.errors import InputError
from runtime.opencv import cv2


class Paired(NamedTuple):
    """On how many pictures score ``a`` is above, equal to, below ``b``; the mean of ``a - b``."""

    wins: int
    ties: int
    losses: int
    mean: float


def confusion(
    prediction: np.ndarray, truth: np.ndarray, classes: int, *, ignore: int | None = None
) -> np.ndarray:
    """Count pixels by predicted class (row) and true class (column).

    The counts of several pictures can be added.

    Parameters
    ----------
    prediction : (H, W) integer. Numbers outside [0, classes) are errors; the last row counts them.
    truth : (H, W) integer in [0, classes); pixels with the value `ignore` are not counted.

    Returns
    -------
    (classes + 1, classes) int64.

    Raises
    ------
    InputError : a true class is out of range.
    """
    _check_maps(prediction, truth)
    valid = _valid(truth, ignore)
    found, real = prediction[valid].astype(np.int64), truth[valid].astype(np.int64)
    if real.size and not (0 <= real.min() and real.max() < classes):
        raise InputError(
            f"truth: expected [0, {classes}) or {ignore=}, got [{real.min()}, {real.max()}]",
            fix="pass the number of classes, and the value of pixels without a class as ignore",
        )
    found[(found < 0) | (found >= classes)] = classes
    counts = np.bincount(found * classes + real, minlength=(classes + 1) * classes)
    return counts.reshape(classes + 1, classes)


def miou(counts: np.ndarray) -> float:
    """Mean over classes of TP / (TP + FP + FN) (Everingham et al., VOC, IJCV 2015), in [0, 1].

    `counts` is from `confusion`. A class that is neither true nor predicted anywhere is left out;
    FP counts only pixels whose truth is valid. NaN when no class is left.
    """
    hits = np.diag(counts)
    union = counts.sum(axis=0) + counts[:-1].sum(axis=1) - hits
    seen = union > 0
    return float((hits[seen] / union[seen]).mean()) if seen.any() else float("nan")


def accuracy(counts: np.ndarray) -> float:
    """Share of valid pixels with the right class, in [0, 1]; NaN when there are none."""
    total = counts.sum()
    return float(np.trace(counts) / total) if total else float("nan")


def binary_iou(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Region similarity J of DAVIS (Perazzi et al., CVPR 2016): IoU of two (H, W) bool masks.

    Two empty masks agree: 1.0.
    """
    _check_maps(prediction, truth)
    found, real = prediction.astype(bool), truth.astype(bool)
    union = (found | real).sum()
    return float((found & real).sum() / union) if union else 1.0


def boundaries(labels: np.ndarray) -> np.ndarray:
    """Mark where labels change: the pixels whose right or lower neighbour has another label.

    Returns (H, W) bool; of two pixels with different labels only the left or upper one is marked.
    """
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    edge[:-1] |= labels[1:] != labels[:-1]
    return edge


def boundary_f(
    prediction: np.ndarray, truth: np.ndarray, *, tolerance: int = 2, ignore: int | None = None
) -> float:
    """F-measure of label changes, in [0, 1] (after Csurka et al., BMVC 2013).

    Precision is the share of predicted boundary pixels that have a true boundary pixel at most
    `tolerance` px away (Euclidean). Recall is the share of true boundary pixels that have a
    predicted one so near. One pixel may match many. Boundary pixels at most max(`tolerance`, 1) px
    from a pixel `ignore` are removed from both maps first. The score is 1.0 if neither map has a
    boundary, and 0.0 if only one has.
    """
    _check_maps(prediction, truth)
    far = ~_within(~_valid(truth, ignore), max(tolerance, 1))
    found, real = boundaries(prediction) & far, boundaries(truth) & far
    if not (found.any() and real.any()):
        return float(found.any() == real.any())
    precision = _within(real, tolerance)[found].mean()
    recall = _within(found, tolerance)[real].mean()
    return float(2 * precision * recall / max(precision + recall, 1e-12))


def band_accuracy(
    prediction: np.ndarray, truth: np.ndarray, *, width: int = 5, ignore: int | None = None
) -> float:
    """Pixel accuracy at most `width` px (Euclidean) from a change of true labels, in [0, 1].

    The trimap measure of Kohli, Ladicky and Torr (IJCV 2009). Changes of labels at most 1 px from a
    pixel `ignore` are no boundaries. NaN when the band is empty.
    """
    _check_maps(prediction, truth)
    valid = _valid(truth, ignore)
    edge = boundaries(truth) & ~_within(~valid, 1)
    band = _within(edge, width) & valid
    return float((prediction[band] == truth[band]).mean()) if band.any() else float("nan")


def contingency(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Count the pixels that each predicted region (row) shares with each true one (column).

    Returns (predicted regions, true regions) int64, both in ascending order of their numbers.
    Memory grows with the largest difference of the numbers, so they should have no gaps, as from
    `runtime.connected_regions`.
    """
    _check_maps(prediction, truth)
    row, column = _rank(prediction), _rank(truth)
    shape = row.max() + 1, column.max() + 1
    return np.bincount(row * shape[1] + column, minlength=shape[0] * shape[1]).reshape(shape)


def overlaps(table: np.ndarray) -> np.ndarray:
    """The IoU of each predicted region (row) with each true one (column), from the shared pixels
    that :func:`contingency` counts."""
    union = table.sum(axis=1, keepdims=True) + table.sum(axis=0) - table
    return table / np.maximum(union, 1)


def covering(prediction: np.ndarray, annotators: Sequence[np.ndarray]) -> float:
    """Covering of the true regions by the predicted ones (Arbelaez et al., TPAMI 2011), in (0, 1].

    For each true region, the best IoU of any predicted region. The score is the mean of these IoUs,
    weighted by the areas of the true regions, averaged over `annotators` (label maps).
    """
    tables = _tables(prediction, annotators)
    return float(np.mean([np.average(_best(table), weights=table.sum(axis=0)) for table in tables]))


def probabilistic_rand(prediction: np.ndarray, annotators: Sequence[np.ndarray]) -> float:
    """Probabilistic Rand index (Unnikrishnan, Pantofaru and Hebert, TPAMI 2007), in [0, 1].

    The share of pairs of pixels on which both maps agree whether the two pixels are in one region,
    averaged over `annotators`. It is 1.0 for a single pixel, which has no pairs.
    """
    return float(np.mean([_rand(table) for table in _tables(prediction, annotators)]))


def variation_of_information(prediction: np.ndarray, annotators: Sequence[np.ndarray]) -> float:
    """H(prediction | truth) + H(truth | prediction) in nats (Meila, J. Multivariate Anal. 2007).

    The mean over `annotators`. It is at least 0; 0 means the same regions.
    """
    return float(np.mean([_variation(table) for table in _tables(prediction, annotators)]))


def best_iou(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Largest IoU of any predicted region with each true label, in ascending order of labels.

    Returns (true labels,) float64 in (0, 1]. One region can be the best for several labels.
    """
    return _best(contingency(prediction, truth))


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Compare two lists of scores of the same pictures; a win is ``a > b``.

    Pictures whose two scores are NaN, because the measure is undefined for them, are left out.

    Raises
    ------
    InputError : the lists differ in length, or only one of the two scores of a picture is NaN.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape or (np.isnan(first) != np.isnan(second)).any():
        raise InputError(
            "a, b: expected equally many scores, with NaN in the same places",
            fix="compare scores of the same pictures and the same measure",
        )
    delta = (first - second)[~np.isnan(first)]
    mean = float(delta.mean()) if delta.size else float("nan")
    return Paired(int((delta > 0).sum()), int((delta == 0).sum()), int((delta < 0).sum()), mean)


def _tables(prediction: np.ndarray, annotators: Sequence[np.ndarray]) -> list[np.ndarray]:
    if len(annotators) == 0:
        raise InputError(
            "annotators: expected at least one label map, got none", fix="leave the picture out"
        )
    return [contingency(prediction, truth) for truth in annotators]


def _rank(labels: np.ndarray) -> np.ndarray:
    """Renumber labels 0, 1, ... in ascending order: (H * W,) int64. It is faster than np.unique."""
    shifted = labels.ravel().astype(np.int64) - int(labels.min())
    return (np.cumsum(np.bincount(shifted) > 0) - 1)[shifted]


# Measures of one table of shared pixels, as contingency returns it.


def _best(table: np.ndarray) -> np.ndarray:
    return overlaps(table).max(axis=0)


def _rand(table: np.ndarray) -> float:
    pixels = int(table.sum())
    pairs = pixels * (pixels - 1) / 2
    together = (table**2).sum()
    apart = ((table.sum(axis=0) ** 2).sum() + (table.sum(axis=1) ** 2).sum()) / 2 - together
    return 1 - apart / pairs if pairs else 1.0


def _variation(table: np.ndarray) -> float:
    joint = _entropy(table)
    return max(2 * joint - _entropy(table.sum(axis=0)) - _entropy(table.sum(axis=1)), 0.0)


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _within(mask: np.ndarray, radius: int) -> np.ndarray:
    """Dilate by a disc: mark the pixels whose Euclidean distance to a set pixel is <= `radius`."""
    if radius < 0:
        raise InputError(f"tolerance, width: must be at least 0, got {radius}", fix="use 2")
    squares = np.arange(-radius, radius + 1) ** 2
    disc = (squares[:, None] + squares <= radius**2).astype(np.uint8)
    return cv2.dilate(mask.astype(np.uint8), disc).astype(bool)


def _valid(truth: np.ndarray, ignore: int | None) -> np.ndarray:
    return np.ones(truth.shape, bool) if ignore is None else truth != ignore


def _check_maps(prediction: np.ndarray, truth: np.ndarray) -> None:
    for name, labels in ("truth", truth), ("prediction", prediction):
        if labels.ndim != 2 or labels.dtype.kind not in "biu" or labels.shape != truth.shape:
            raise InputError(
                f"{name}: expected (H, W) integers or bool, of the same shape as truth"
                f" {truth.shape}, got {labels.shape} {labels.dtype}",
                fix="resize the labels with cv2.INTER_NEAREST, or convert them to integers",
            )
