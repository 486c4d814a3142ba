"""The built-in prior: k-means on the colours of the picture."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.checks import check_count, check_positive
from runtime.core.silhouette import distinct_rows

KMEANS_SAMPLES = 20_000  # most pixels from which the cluster centres are computed


class KMeansPrior:
    """K-means on CIE Lab colours. It needs no model file, and its result is deterministic.

    The distances d of a pixel to the cluster centres become probabilities: exp(-d / temperature),
    scaled to sum 1.

    Parameters
    ----------
    clusters : most clusters, 1 to 256.
    temperature : in the units of CIE Lab, whose L reaches from 0 to 100; above 0.

    Raises
    ------
    InputError : an argument is out of range.
    """

    names: list[str] | None = None
    backend = "opencv-kmeans"
    gpu: int | None = None  # it takes pictures on the host
    engine: Any = None  # no network

    def __init__(self, clusters: int = 5, temperature: float = 12.0) -> None:
        self.clusters = check_count("clusters", clusters, 1, 256)
        self.temperature = check_positive("temperature", temperature)

    def __call__(self, picture: np.ndarray, low: np.ndarray) -> np.ndarray:
        """Return the probabilities of the clusters, from dark to light.

        Parameters
        ----------
        picture : not used.
        low : (h, w, 3) float32 RGB in [0, 1], the picture at working size.

        Returns
        -------
        (h, w, clusters) float32; with fewer clusters if the sampled pixels have fewer colours.
        """
        from runtime.opencv import cv2

        lab = cv2.cvtColor(low, cv2.COLOR_RGB2Lab).reshape(-1, 3)
        picked = np.linspace(0, len(lab) - 1, min(KMEANS_SAMPLES, len(lab))).astype(int)
        samples = lab[picked]
        distinct = distinct_rows(samples)
        cv2.setRNGSeed(0)
        criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 30, 0.1)
        count, no_labels = min(self.clusters, distinct), np.zeros(0, np.int32)
        _, _, found = cv2.kmeans(samples, count, no_labels, criteria, 3, cv2.KMEANS_PP_CENTERS)
        centres = np.asarray(found)
        centres = centres[np.argsort(centres[:, 0], kind="stable")]  # dark to light
        square = np.empty((len(centres), len(lab)), np.float32)  # NumPy is faster on long rows
        for centre, out in zip(centres, square, strict=True):
            away = lab - centre
            np.einsum("ij,ij->i", away, away, out=out)
        score: np.ndarray = np.sqrt(square) / -self.temperature
        score = np.exp(score - score.max(0))
        return np.ascontiguousarray((score / score.sum(0)).T).reshape(*low.shape[:2], -1)
