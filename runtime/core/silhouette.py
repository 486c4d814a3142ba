"""DynaSeg's silhouette phase: the number of clusters that the picture's colours form."""

from __future__ import annotations

import numpy as np

SAMPLES = 2000  # most pixels that are clustered
COUNTS = range(3, 27)  # the numbers of clusters that are compared


def best_cluster_count(image: np.ndarray) -> int:
    """Return the k in 3..26 whose k-means clustering of the pixels has the best mean silhouette.

    DynaSeg (Guermazi et al. 2024) stops at this number of labels. Pixels are clustered, as the
    paper's figure shows; the public code clusters rows of the picture. At most SAMPLES pixels,
    spread evenly, are used, in CIE Lab. The result is deterministic.

    Parameters
    ----------
    image : (H, W, 3) float32 RGB in [0, 1].

    Returns
    -------
    k; 1 if the samples have fewer than 3 distinct colours.
    """
    from runtime.opencv import cv2

    lab = cv2.cvtColor(image, cv2.COLOR_RGB2Lab).reshape(-1, 3)
    points = lab[np.linspace(0, len(lab) - 1, min(SAMPLES, len(lab))).astype(int)]
    distinct = distinct_rows(points)
    if distinct < COUNTS.start:
        return 1
    square = (points**2).sum(1)
    distance = np.sqrt(
        np.maximum(square[:, None] + square[None, :] - 2 * points @ points.T, 0)
    ).astype(np.float32)
    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 30, 0.1)
    best, best_score = COUNTS.start, -2.0
    for k in COUNTS:
        if k > distinct:
            break
        cv2.setRNGSeed(0)
        _, labels, _ = cv2.kmeans(
            points, k, np.zeros(0, np.int32), criteria, 3, cv2.KMEANS_PP_CENTERS
        )
        score = mean_silhouette(distance, np.ravel(labels))
        if score > best_score:
            best, best_score = k, score
    return best


def mean_silhouette(distance: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean of (b - a) / max(a, b) over all points (Rousseeuw 1987).

    a is a point's mean distance to the other members of its cluster, b its mean distance to the
    members of the nearest other cluster. The point of a one-point cluster counts 0. ``distance`` is
    (n, n), ``labels`` (n,).
    """
    one_hot = np.eye(labels.max() + 1, dtype=distance.dtype)[labels]
    size = one_hot.sum(0)
    total = distance @ one_hot
    rows = np.arange(len(labels))
    own = size[labels]
    a = total[rows, labels] / np.maximum(own - 1, 1)
    mean = np.where(size > 0, total / np.maximum(size, 1), np.inf)
    mean[rows, labels] = np.inf
    b = mean.min(1)
    with np.errstate(invalid="ignore"):
        s = np.where(own > 1, (b - a) / np.maximum(np.maximum(a, b), 1e-12), 0)
    return float(np.where(np.isfinite(s), s, 0).mean())


def distinct_rows(array: np.ndarray) -> int:
    """Return the number of different rows of a 2-D array. ``numpy.unique`` is slower, and turns a
    Ctrl-C during its comparisons into a TypeError."""
    ordered = array[np.lexsort(array.T)]
    return 1 + int(np.count_nonzero((ordered[1:] != ordered[:-1]).any(1)))
