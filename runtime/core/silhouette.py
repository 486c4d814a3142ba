"""DynaSeg's silhouette phase: how many clusters the picture's colours fall into."""

from __future__ import annotations

import numpy as np

SAMPLES = 2000
COUNTS = range(3, 27)


def best_cluster_count(image: np.ndarray) -> int:
    """The k in 3..26 whose k-means clustering of the pixels has the best mean silhouette.

    The stop rule of DynaSeg (Guermazi et al. 2024). Pixels are clustered, as the paper's figure
    shows; the public code clusters rows of the picture. At most 2,000 pixels, spread evenly, are
    used, in CIE Lab. The result is deterministic.

    Parameters
    ----------
    image : (H, W, 3) float32 RGB in [0, 1].

    Returns
    -------
    k; 1 when the picture has fewer than 3 distinct colours among the samples.
    """
    import cv2

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
    """Mean of (b - a) / max(a, b): a = mean distance to the own cluster, b = to the nearest other.

    ``distance`` is (n, n), ``labels`` (n,). Members of one-point clusters count 0 (Rousseeuw 1987).
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
    """The number of different rows of a 2-D array. ``numpy.unique`` is slower, and a Ctrl-C during
    its comparisons becomes a TypeError."""
    ordered = array[np.lexsort(array.T)]
    return 1 + int(np.count_nonzero((ordered[1:] != ordered[:-1]).any(1)))
