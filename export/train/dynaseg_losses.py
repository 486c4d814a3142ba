"""The losses of DynaSeg (Guermazi et al., IVC 2024), which DynaGuide has as well: a response map is
compared with its own arg max, and neighbouring pixels with each other.

This module imports torch.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def own_labels(response: Tensor) -> Tensor:
    """The cluster with the highest response at each pixel: (N, h, w) int64 of (N, K, h, w)."""
    return response.detach().argmax(1)


def cluster_count(labels: Tensor) -> int:
    """K', the number of different labels."""
    return len(labels.unique())


def similarity(response: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy of the response map (N, K, h, w) with labels (N, h, w) int64: a
    scalar. The labels are those of :func:`own_labels`, which are constants."""
    return functional.cross_entropy(response, labels)


def ends(planes: Tensor, dy: int, dx: int) -> tuple[Tensor, Tensor]:
    """Both ends of all pairs of pixels at distance (dy, dx), as two views of ``planes``.

    Parameters
    ----------
    planes : (N, K, h, w).
    dy, dx : dy is at least 0; dx may be negative.
    """
    h, w = planes.shape[2:]
    if dx >= 0:
        return planes[..., : h - dy, : w - dx], planes[..., dy:, dx:]
    return planes[..., : h - dy, -dx:], planes[..., dy:, : w + dx]


def continuity(response: Tensor, *, huber: bool = False, diagonals: bool = False) -> Tensor:
    """The sum over the directions of the mean difference of neighbours, over all their positions
    and clusters: a scalar.

    Parameters
    ----------
    response : (N, K, h, w).
    huber : the function of a difference is Huber's with threshold 1, as DynaGuide's (equations 4 to
        7), not the absolute value, as DynaSeg's.
    diagonals : the two diagonal directions are used as well.
    """
    loss = functional.smooth_l1_loss if huber else functional.l1_loss
    directions = ((1, 0), (0, 1), (1, 1), (1, -1)) if diagonals else ((1, 0), (0, 1))
    total = response.new_zeros(())
    for dy, dx in directions:
        first, second = ends(response, dy, dx)
        if first.numel():
            total = total + loss(first, second)
    return total


def continuity_weight(
    weighting: str, clusters: int | Tensor, mu: float, beta: float
) -> float | Tensor:
    """The weight of :func:`continuity`: "fixed" is mu, "fsf" is K' / beta, "scf" is mu / K'.

    Parameters
    ----------
    clusters : K', at least 1. It is a count, which has no gradient; a tensor gives a tensor.

    Example
    -------
    >>> continuity_weight("fsf", 30, mu=50, beta=15)
    2.0
    """
    if weighting == "fixed":
        return mu
    return clusters / beta if weighting == "fsf" else mu / clusters
