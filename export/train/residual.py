"""The losses of the residual objective on one picture, whose gradients autograd computes.

Equations (11) to (14) of docs/algorithm.md; runtime/core/reference.py computes the same in NumPy.
This module imports torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.core.constants import LEAST_AREA, LEAST_BALANCED, PAIR_NEIGHBOURS, SMALLEST_PRIOR
from runtime.core.options import RefineOptions
from runtime.core.reference import neighbours


def scores(correction: Tensor, guide: Tensor) -> Tensor:
    """The scores z of equation (11): the log of the guide plus the network's correction.

    Parameters
    ----------
    correction : (K, h, w), of the classes that take part.
    guide : (K, h, w), probabilities of these classes that sum to 1 at each pixel, or to 0 where the
        guide is unknown.

    Returns
    -------
    (K, h, w). Their soft-max is the refined map, and their arg max the labels.

    Example
    -------
    >>> guide = torch.tensor([0.25, 0.75]).reshape(2, 1, 1)
    >>> scores(torch.zeros(2, 1, 1), guide).softmax(0).flatten()
    tensor([0.2500, 0.7500])
    """
    return guide.clamp_min(SMALLEST_PRIOR).log() + correction


def guide_loss(log_p: Tensor, guide: Tensor, balance: float) -> Tensor:
    """The guide loss, equation (12): the cross-entropy with the guide, weighted by the guide's
    confidence at each pixel and by a weight for each class.

    Parameters
    ----------
    log_p : (K, h, w), the log of the refined probabilities.
    guide : (K, h, w), as for :func:`scores`.
    balance : exponent of the class weights.

    Example
    -------
    >>> guide = torch.tensor([0.25, 0.75]).reshape(2, 1, 1)
    >>> guide_loss(guide.log(), guide, balance=0.0)  # 0.75 times its entropy, 0.5623
    tensor(0.4218)
    """
    area = guide.mean((1, 2))
    weight = area.clamp_min(LEAST_AREA) ** -balance
    weight = weight / (weight * area).sum().clamp_min(LEAST_BALANCED)
    target = guide * guide.amax(0) * weight[:, None, None]
    return -(target * log_p).sum() / log_p[0].numel()


def pair_loss(p: Tensor, image: Tensor, sigma: float, offsets: tuple[int, ...]) -> Tensor:
    """The pair loss, equation (13): how different the refined probabilities of neighbours are,
    weighted by how alike their colours are.

    With e_d(n) the weight of the pair of pixels n and n + d, divided by the number of its kind, the
    loss is sum_d sum_n e_d(n) (1 - p_n . p_{n+d}). Both the sum of the products and its gradient
    follow from one map, s_n = sum_d e_d(n) p_{n+d} + e_d(n-d) p_{n-d}: the sum of the products is
    half of sum_n p_n . s_n, and its gradient by p_n is s_n. So s is computed without autograd, and
    no tensor is larger than ``p``.

    Parameters
    ----------
    p : (K, h, w), the refined probabilities.
    image : (3, h, w), RGB in [0, 1].
    sigma, offsets : as in :class:`runtime.RefineOptions`.

    Example
    -------
    >>> same = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).reshape(2, 1, 2)
    >>> pair_loss(same, torch.zeros(3, 1, 2), sigma=0.1, offsets=(1,))
    tensor(0.)
    """
    shape = image.shape[1:]
    fixed, s, total = p.detach(), torch.zeros_like(p), p.new_zeros(())
    for dy, dx in ((a * d, b * d) for d in offsets for a, b in PAIR_NEIGHBOURS):
        (y, x), (v, u) = neighbours(shape, dy, dx)
        square = (image[:, v, u] - image[:, y, x]).square().sum(0)
        e = torch.exp(square / (-2 * sigma * sigma)) / max(1, square.numel())
        s[:, y, x].addcmul_(e, fixed[:, v, u])
        s[:, v, u].addcmul_(e, fixed[:, y, x])
        total += e.sum()
    products = (p * s).sum()
    # The value is total - products / 2, and the gradient -s.
    return (total - products + products.detach() / 2) / (len(offsets) * len(PAIR_NEIGHBOURS))


def residual_terms(
    z: Tensor, image: Tensor, guide: Tensor, options: RefineOptions
) -> dict[str, Tensor]:
    """The losses of one picture: {"guide", "pair"}, scalars whose sum is the objective (14).

    Parameters
    ----------
    z : (K, h, w), of :func:`scores`.
    image : (3, h, w), RGB in [0, 1].
    guide : (K, h, w), as for :func:`scores`.
    options : the weight ``lam``, which "pair" contains, ``sigma``, ``offsets`` and ``balance``.

    Example
    -------
    >>> sum(residual_terms(z, image, guide, RefineOptions()).values()).backward()
    """
    log_p = z.log_softmax(0)
    pair = pair_loss(log_p.exp(), image, options.sigma, options.offsets)
    return {"guide": guide_loss(log_p, guide, options.balance), "pair": options.lam * pair}
