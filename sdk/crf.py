"""From scores at working size to labels at the picture's size, by the dense CRF."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

import runtime
from runtime.core.config import CrfConfig
from runtime.core.resize import resize

LEAST_PROBABILITY = 0.1  # a class that is nowhere more probable hardly ever wins after the CRF


def crf_upsample(
    pixels: np.ndarray, scores: np.ndarray, config: CrfConfig, *, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compute labels at the picture's size from scores at a smaller size, as
    :func:`runtime.joint_upsample` does, but by :func:`runtime.dense_crf`.

    Scores are interpolated bilinearly to the size of the CRF: the picture's, or a smaller one for a
    picture of more than ``config.max_pixels``, which is then averaged to this size. Distances are
    scaled alike. The CRF's probabilities are interpolated bilinearly to the picture's size.

    Parameters
    ----------
    pixels : (H, W, 3) uint8 RGB.
    scores : (h, w, K) float32 probabilities; they are passed as they are, without a soft-max. The
        CRF raises them to ``config.floor``, so a pixel of zeros is equally probable in all classes.
        Classes that are largest at no pixel of ``scores``, and at none above LEAST_PROBABILITY, are
        left out: with the 150 classes of a network the CRF would need gigabytes.

    Returns
    -------
    labels (H, W) int32, the arg max of the CRF's probabilities; confidence (H, W) float32 in
    [0, 1], the largest of them.

    Raises
    ------
    InputError : a distance of ``config``, after scaling, is too small.

    Example
    -------
    >>> labels, confidence = crf_upsample(picture, scores, CrfConfig(), threads=2)
    """
    wins = np.unique(scores.argmax(-1))
    kept = np.union1d(wins, np.flatnonzero(scores.max((0, 1)) > LEAST_PROBABILITY))
    if len(kept) < scores.shape[2]:
        labels, confidence = crf_upsample(pixels, scores[..., kept], config, threads=threads)
        return kept.astype(np.int32)[labels], confidence
    height, width = pixels.shape[:2]
    h, w = config.working_size(height, width)
    scale = (h * w / (height * width)) ** 0.5
    config = replace(
        config,
        bilateral_sxy=config.bilateral_sxy * scale,
        gaussian_sxy=config.gaussian_sxy * scale,
    )
    probabilities = resize(scores, h, w)
    found = runtime.dense_crf(
        resize(pixels, h, w),
        probabilities,
        out=None if probabilities is scores else probabilities,
        threads=threads,
        **config.options(),
    )
    if (h, w) != (height, width):
        return runtime.joint_upsample(pixels, found, threads=threads)
    return found.argmax(-1).astype(np.int32), found.max(-1)
