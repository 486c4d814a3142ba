"""The threshold of Boosting's affinities, for features for which none is published.

Boosting says that two positions of a picture belong together if the cosine of their features is
above a threshold. The published one is .4, for the keys of DINO ViT-S/8 (Sari, Locatello, Favaro,
arXiv 2404.03392). Other features have other cosines. The rule for them, without labels:

    The features themselves replace the keys. The threshold is that of Otsu (A Threshold Selection
    Method from Gray-Level Histograms, 1979) for the cosines of all pairs of positions within a
    picture, pooled over a sample of pictures: it splits them into two groups whose means have the
    largest between-class variance.

docs/boosting.md compares it with other rules. This module imports torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from runtime.errors import InputError

KEYS = 0.4  # for the keys of DINO, as published
_BINS = 2000  # of cosines in [-1, 1]; a bin is 0.001 wide


@torch.no_grad()
def affinity_threshold(features: Tensor, keys: bool) -> float:
    """The cosine above which two positions belong together; the head of this file states the rule.

    The memory is that of one picture's (h w)^2 cosines; 32 to 64 pictures are enough.

    Parameters
    ----------
    features : (N, C, h, w) float, of N different pictures, h w at least 2.
    keys : whether they are keys of DINO, for which the published threshold is returned.

    Returns
    -------
    The threshold, -1 to 1; for other features than keys a multiple of 0.001.

    Raises
    ------
    InputError : features that are not finite, or whose cosines are all equal.

    Example
    -------
    >>> affinity_threshold(features, keys=False)  # of EfficientNet-Lite0's block15
    0.39
    """
    if keys:
        return KEYS
    if not torch.isfinite(features).all():
        raise InputError(
            "the features have NaN or infinite values", fix="check the weights of the backbone"
        )
    counts = torch.zeros(_BINS, dtype=torch.float64)
    positions = features.shape[2] * features.shape[3]
    one, other = torch.tril_indices(positions, positions, -1, device=features.device)
    for tokens in normalize(features.float().flatten(2), dim=1):  # (C, h w), of length 1
        cosines = (tokens.T @ tokens)[one, other].clamp(-1, 1)
        counts += torch.histc(cosines, _BINS, -1, 1).double().cpu()
    if (counts > 0).sum() < 2:
        raise InputError(
            "the features of all positions have the same cosine, so no threshold separates them",
            fix="name more pictures, or check the weights of the backbone",
        )
    return _otsu(counts)


def _otsu(counts: Tensor) -> float:
    """Otsu's threshold of a histogram of values in [-1, 1], (bins,) float64: the edge of a bin. If
    neighbouring edges are equally good, because the bins between them are empty, it is the one in
    the middle."""
    middles = (torch.arange(len(counts), dtype=torch.float64) + 0.5) * 2 / len(counts) - 1
    shares = counts / counts.sum()
    below, sums = shares.cumsum(0)[:-1], (shares * middles).cumsum(0)  # up to each inner edge
    spread = (sums[-1] * below - sums[:-1]) ** 2 / (below * (1 - below)).clamp(min=1e-12)
    best = (spread >= spread.max() * (1 - 1e-9)).nonzero().double()
    return round((float(best.mean()) + 1) * 2 / len(counts) - 1, 3)
