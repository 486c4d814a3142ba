"""The shifts of SegUnify's smoothness energy, estimated from features without labels.

SmooSeg (Lan et al., NeurIPS 2023) has one pair of shifts for each backbone and data set, chosen on
labelled pictures. They do not fit other backbones, whose affinities have other means. The rule:

    b is the affinity that a share of all pairs exceeds which equals the share of pairs that are
    assumed to have one label: 1/2 within a picture (b1), 1/K across pictures (b2).

Why. For labels that are certain, the energy mean (W - b)(1 - same) is lowest where the sum of W - b
over the pairs with the same label is largest: each pair votes, for one label if its affinity W is
above b, else for two. If all votes were right, the share of pairs above b would be the share of
pairs with one label. This share is assumed, not measured:

- Across pictures it is 1/K: K labels that are equally frequent and independent of the picture.
- Within a picture it is 1/2: as many pairs attract as repel, so that the term alone prefers neither
  one label for the whole picture nor one label for each position. Only the order of the affinities
  then decides which positions have one label.

The affinities are those of the energy, cosines that are centred by rows, but without dropout. The
two shares were fixed before any score was computed; docs/training_quality.md contains the
statistics that they were fixed with, and the scores. This module imports torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from runtime.checks import check_count
from runtime.errors import InputError

WITHIN = 1 / 2  # the share of pairs of positions of a picture that are assumed to have one label
_BINS, _LIMIT = 6000, 3.0  # affinities that are centred are in [-3, 3]; a bin is 0.001 wide


@torch.no_grad()
def estimate_shifts(features: Tensor, clusters: int = 27) -> tuple[float, float]:
    """The shifts b1 for pairs within a picture and b2 for pairs across pictures.

    Each picture is compared with itself and with the one before it, the first with the last. The
    memory is that of one picture's (h w)^2 affinities; 32 to 64 pictures are enough.

    Parameters
    ----------
    features : (N, C, h, w) float, of N different pictures, at least 2.
    clusters : K, at least 2.

    Returns
    -------
    b1 and b2, each in [-1, 1], a multiple of 0.001.

    Raises
    ------
    InputError : fewer than two pictures, features that are not finite, or K out of range.

    Example
    -------
    >>> b1, b2 = estimate_shifts(features, clusters=27)
    """
    check_count("clusters", clusters, 2, 4096)
    if len(features) < 2:
        raise InputError(
            "the shifts are estimated from at least two pictures", fix="name more pictures"
        )
    if not torch.isfinite(features).all():
        raise InputError(
            "the features have NaN or infinite values", fix="check the weights of the backbone"
        )
    tokens = normalize(features.float().flatten(2), dim=1)  # (N, C, h w)
    within = _exceeded_by(tokens, tokens, WITHIN)
    return within, _exceeded_by(tokens, tokens.roll(1, 0), 1 / clusters)


def _exceeded_by(tokens: Tensor, others: Tensor, share: float) -> float:
    """The affinity that ``share`` of all pairs exceeds, to 0.001. ``tokens`` and ``others`` are
    (N, C, h w), of length 1."""
    rows = torch.einsum("ncp,nc->np", tokens, others.mean(2))  # the mean over q of W_pq
    level = rows.mean()
    counts = torch.zeros(_BINS, dtype=torch.float64)
    for x, y, row in zip(tokens, others, rows, strict=True):
        affinity = x.T @ y - row[:, None] + level
        counts += torch.histc(affinity, _BINS, -_LIMIT, _LIMIT).double().cpu()
    above = counts.flip(0).cumsum(0).flip(0) / counts.sum()  # the share from each bin on
    first = int((above > share).sum())
    return min(1.0, max(-1.0, round(first * 2 * _LIMIT / _BINS - _LIMIT, 3)))
