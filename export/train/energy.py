"""The energy that SegUnify minimises, without a matrix of all pairs of positions.

The equations and the algebra behind :func:`smoothness` stand in docs/segunify.md. This module
imports torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def smoothness(
    features: Tensor,
    logits: Tensor,
    others: Tensor,
    shifts: tuple[float, float],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The smoothness energies within each picture and across pictures, equations (5) to (7).

    The time is O(N h w C K) and the memory O(N C (h w + K)): the mean over all pairs of positions
    is a product of sums over positions, equation (7).

    Parameters
    ----------
    features : (N, C, h, w) float32 or float64; they get no gradient.
    logits : (N, K, h, w), the teacher's cosines.
    others : (N,) int64, for each picture i the number j of the picture that it is compared with.
    shifts : b1 for pairs within a picture, b2 for pairs across pictures.
    temperature : of the soft-max that makes assignments of the logits.

    Returns
    -------
    Two scalars; the gradient reaches ``logits`` only.

    Example
    -------
    >>> within, across = smoothness(features, logits, torch.arange(8).roll(1), (-0.02, 0.48), 0.1)
    """
    tokens = functional.normalize(features.detach().flatten(2), dim=1)
    assigned = functional.normalize((logits.flatten(2) / temperature).softmax(1), dim=1)
    x, a = tokens.mean(2), assigned.mean(2)  # (N, C) and (N, K)
    positions = tokens.shape[2]
    s = tokens @ (assigned - a[:, :, None]).transpose(1, 2) / positions  # (N, C, K)

    def term(j: Tensor, shift: float) -> Tensor:
        """The mean over i, p and q of (W_pq - shift) * (1 - a_p . a_q)."""
        affinity = (x * x[j]).sum(1).mean()
        alike = (a * a[j]).sum(1)
        product = ((s + x[:, :, None] * a[:, None]) * s[j]).sum((1, 2))
        return ((affinity - shift) * (1 - alike) - product).mean()

    return term(torch.arange(len(x), device=x.device), shifts[0]), term(others, shifts[1])


def data_term(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean cross entropy of the student's logits (N, K, h, w) with the cluster that the
    teacher's logits (N, K, h, w) choose, equation (8). The gradient reaches ``student`` only.

    Example
    -------
    >>> data_term(torch.zeros(1, 3, 2, 2), torch.rand(1, 3, 2, 2))  # log 3
    tensor(1.0986)
    """
    return functional.cross_entropy(student, teacher.detach().argmax(1))


def random_cycle(pictures: int) -> Tensor:
    """For each picture the next one on a random cycle through all ``pictures``, at least 2: (N,)
    int64 on the CPU. No picture is its own next one; each other picture is equally likely.

    Example
    -------
    >>> random_cycle(2)
    tensor([1, 0])
    """
    order = torch.randperm(pictures)
    return torch.empty_like(order).scatter_(0, order, order.roll(1))
