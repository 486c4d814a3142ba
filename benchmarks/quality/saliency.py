"""Saliency: the scores of masks of the foreground, and masks that no training is needed for.

A mask is (H, W) float32 in [0, 1], 1 in the foreground; a truth is (H, W) bool.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from runtime import guided_filter
from runtime.core.resize import resize
from runtime.errors import InputError
from runtime.opencv import cv2

BETA2 = 0.3  # beta squared of the F-measure, as in TokenCut, MOVE and Boosting
THRESHOLDS = np.arange(256) / 255
RADIUS, EPS, SIDE = 9, 1e-3, 320  # the published guided filter, and the side that it was used at


class Scores(NamedTuple):
    """The scores of one mask.

    Parameters
    ----------
    acc : share of pixels whose side of 0.5 is right.
    iou : intersection over union of the pixels above 0.5 and the truth; NaN if both are empty.
    precision, recall : (256,) of the pixels at or above each of THRESHOLDS; precision is 1 where
        no pixel is, recall is 1 if the truth is empty.
    """

    acc: float
    iou: float
    precision: np.ndarray
    recall: np.ndarray


def score(mask: np.ndarray, truth: np.ndarray) -> Scores:
    """Compare a mask with the truth.

    Raises
    ------
    InputError : the shapes differ, or the mask has values outside [0, 1].
    """
    if mask.shape != truth.shape:
        raise InputError(
            f"the mask has shape {mask.shape}, the truth {truth.shape}",
            fix="resize the mask to the size of the truth",
        )
    if not ((mask >= 0) & (mask <= 1)).all():
        raise InputError("the mask has values outside [0, 1]", fix="clip it")
    found, wanted = mask > 0.5, int(truth.sum())
    union = int((found | truth).sum())
    passed = np.searchsorted(THRESHOLDS, mask.ravel(), side="right")  # thresholds at most the value
    counts = np.stack(
        [np.bincount(part, minlength=257) for part in (passed, passed[truth.ravel()])]
    )
    above, hits = counts[:, :0:-1].cumsum(axis=1)[:, ::-1]
    return Scores(
        float((found == truth).mean()),
        int((found & truth).sum()) / union if union else float("nan"),
        np.where(above, hits / np.maximum(above, 1), 1.0),
        hits / wanted if wanted else np.ones(256),
    )


def max_f(scores: Sequence[Scores]) -> tuple[float, float]:
    """The highest mean F-measure over the thresholds, and its threshold. The mean is over pictures,
    of (1 + b) P R / (b P + R) with b = BETA2; 0 where P = R = 0.

    Example
    -------
    >>> truth = np.array([[True, False]])
    >>> max_f([score(np.float32([[0.4, 0.1]]), truth)])
    (1.0, 0.10196078431372549)
    """
    precision, recall = (np.stack([getattr(s, k) for s in scores]) for k in ("precision", "recall"))
    below = BETA2 * precision + recall
    measures = (1 + BETA2) * precision * recall / np.where(below > 0, below, 1)
    mean = measures.mean(axis=0)
    best = int(mean.argmax())
    return float(mean[best]), float(THRESHOLDS[best])


def sign_flip(differences: Sequence[float]) -> float:
    """The two-sided p-value of the mean of paired differences: the share of all choices of their
    signs whose mean is at least as far from 0 (Fisher's permutation test). With 9 differences the
    smallest possible value is 2 / 512.
    """
    values = np.asarray(differences, np.float64)
    signs = np.array([*product((-1, 1), repeat=len(values))])
    means = np.abs((signs * values).mean(axis=1))
    return float((means >= abs(values.mean()) * (1 - 1e-9)).mean())


def with_polarity(mask: np.ndarray) -> np.ndarray:
    """The mask, or 1 - mask if its mean is above 0.5: the foreground is the smaller part."""
    return 1 - mask if mask.mean() > 0.5 else mask


def enlarged(mask: np.ndarray, picture: np.ndarray, *, filtered: bool) -> np.ndarray:
    """The mask at the size of the picture.

    Parameters
    ----------
    mask : (h, w) float32 in [0, 1], not larger than the picture. It is enlarged bilinearly.
    picture : (H, W, 3) uint8 RGB.
    filtered : apply the published guided filter, with the mean of R, G and B as the guidance. Its
        radius of RADIUS pixels at a short side of SIDE pixels grows with the picture.

    Returns
    -------
    (H, W) float32 in [0, 1].
    """
    height, width = picture.shape[:2]
    large = resize(np.ascontiguousarray(mask, np.float32)[..., None], height, width)[..., 0]
    if not filtered:
        return large
    grey = picture.astype(np.float32).mean(axis=2) / 255
    radius = max(1, round(RADIUS * min(height, width) / SIDE))
    return guided_filter(grey, large, radius=radius, eps=EPS).clip(0, 1)


def centre_prior(height: int, width: int, size: float) -> np.ndarray:
    """A Gaussian in the middle of the picture, whose deviations are ``size`` times the height and
    the width: (height, width) float32. It is above 0.5 in an ellipse."""
    y, x = (((np.arange(n) + 0.5) / n - 0.5) / size for n in (height, width))
    return np.exp(-(y[:, None] ** 2 + x**2) / 2).astype(np.float32)


def inner_regions(labels: np.ndarray) -> np.ndarray:
    """The regions that are rarer on the border than elsewhere: the others are the background.

    Parameters
    ----------
    labels : (h, w) integer from 0, the region of each position.

    Returns
    -------
    (h, w) float32: 1 in a region whose share of the positions on the border is smaller than its
    share of all positions, else 0.
    """
    border = np.ones(labels.shape, bool)
    border[1:-1, 1:-1] = False
    count = int(labels.max()) + 1
    shares = np.bincount(labels[border], minlength=count) / border.sum()
    return (shares < np.bincount(labels.ravel(), minlength=count) / labels.size)[labels].astype(
        np.float32
    )


def otsu(picture: np.ndarray) -> np.ndarray:
    """The part of a picture above or below Otsu's threshold of grey (Otsu, 1979) that
    :func:`inner_regions` chooses: (H, W) float32."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    return inner_regions(cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[1])


def normalised_cut(affinity: np.ndarray, height: int, width: int) -> np.ndarray:
    """The two sides of the relaxed normalised cut (Shi and Malik, TPAMI 2000), as TokenCut divides
    tokens (Wang et al., CVPR 2022): positions above and below the mean of the second eigenvector.
    :func:`inner_regions` chooses the foreground.

    Parameters
    ----------
    affinity : (height * width, height * width) symmetric, above 0.

    Returns
    -------
    (height, width) float32, 0 or 1.
    """
    root = 1 / np.sqrt(affinity.sum(axis=1))
    vectors = np.linalg.eigh(affinity.astype(np.float64) * root[:, None] * root)[1]
    second = vectors[:, -2] * root
    return inner_regions((second > second.mean()).astype(np.int64).reshape(height, width))
