"""The losses of Boosting: normalised cut, smoothness, distillation, and equivariance to zooming.

The equations stand in docs/boosting.md. All functions return the mean over the pictures of a batch.
Features get no gradient. This module imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from export.models.boosting import resized

MARGIN = 1e-6  # masks are clamped to [MARGIN, 1 - MARGIN] before a normalised cut, and as targets
_OFFSETS = ((0, 1), (1, 0), (1, 1), (1, -1))  # one of each two that are opposite


def directions(features: Tensor) -> Tensor:
    """Features (N, C, h, w) scaled to length 1, without a gradient. The product of two of them is
    the affinity of their positions, equation (4).

    Example
    -------
    >>> directions(torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)).flatten()
    tensor([0.6000, 0.8000])
    """
    return functional.normalize(features.detach(), dim=1)


def ncut(mask: Tensor, units: Tensor, threshold: float, weak: float) -> Tensor:
    """The normalised cut of a soft mask, equation (5).

    Parameters
    ----------
    mask : (N, 1, h, w) in [0, 1].
    units : (N, C, h, w), of :func:`directions`.
    threshold : two positions with an affinity above it are joined with weight 1, others with
        weight ``weak``.

    Returns
    -------
    A scalar in (0, 2).

    Example
    -------
    >>> ncut(torch.full((1, 1, 4, 4), 0.5), directions(torch.rand(1, 8, 4, 4)), 0.4, 1e-6)
    """
    tokens = units.flatten(2)
    joined = tokens.transpose(1, 2) @ tokens > threshold
    weights = _weights(joined, weak, mask)
    inside = mask.flatten(1).clamp(MARGIN, 1 - MARGIN)
    outside = 1 - inside
    cut = (inside * (weights @ outside[:, :, None]).squeeze(2)).sum(1)
    degrees = weights.sum(2)
    return (cut / (inside * degrees).sum(1) + cut / (outside * degrees).sum(1)).mean()


def image_regularisation(mask: Tensor, images: Tensor) -> Tensor:
    """How much a mask changes where the image does not, equation (6).

    Parameters
    ----------
    mask : (N, 1, H, W).
    images : (N, 3, H, W), normalised as for ImageNet.

    Raises
    ------
    RuntimeError : H or W is 1, so that nothing can be reflected at the border.

    Example
    -------
    >>> image_regularisation(torch.full((1, 1, 4, 4), 0.5), torch.rand(1, 3, 4, 4))
    tensor(0.)
    """
    return _neighbours(mask, images, lambda a, b: (-((a - b) ** 2).sum(1, keepdim=True)).exp())


def feature_regularisation(mask: Tensor, units: Tensor, threshold: float, weak: float) -> Tensor:
    """How much a mask changes where the features do not, equation (7). Arguments as of
    :func:`ncut`; h and w are at least 2.

    Example
    -------
    >>> units = directions(torch.rand(1, 8, 4, 4))
    >>> feature_regularisation(torch.full((1, 1, 4, 4), 0.5), units, 0.4, 1e-6)
    tensor(0.)
    """

    def weight(a: Tensor, b: Tensor) -> Tensor:
        return _weights((a * b).sum(1, keepdim=True) > threshold, weak, mask)

    return _neighbours(mask, units, weight)


def _weights(joined: Tensor, weak: float, mask: Tensor) -> Tensor:
    """1 where two positions are ``joined``, else ``weak``, in the dtype of ``mask``."""
    return torch.where(joined, mask.new_ones(()), mask.new_tensor(weak))


def _neighbours(mask: Tensor, guide: Tensor, weight: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The mean over all pixels and their 8 neighbours of the weight times the squared difference of
    the mask. Beyond the border, mask and guide are reflected.

    A pair of pixels is computed once, not from both of its sides: 4 offsets are enough. It counts
    once for each of its two pixels that is inside of the border.
    """
    height, width = mask.shape[2:]
    inside = functional.pad(mask.new_ones(1, 1, height, width), (1, 1, 1, 1))
    mask, guide = (functional.pad(x, (1, 1, 1, 1), mode="reflect") for x in (mask, guide.detach()))
    total = mask.new_zeros(())
    for (s, t), (a, b), (i, j) in zip(_pairs(mask), _pairs(guide), _pairs(inside), strict=True):
        total = total + ((i + j) * weight(a, b) * (s - t) ** 2).sum()
    return total / (8 * len(mask) * height * width)


def _pairs(x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each of the 4 offsets the two ends of all pairs in ``x`` (N, C, H, W)."""
    height, width = x.shape[2:]
    for down, right in _OFFSETS:
        a = x[:, :, : height - down, max(0, -right) : width - max(0, right)]
        yield a, x[:, :, down:, max(0, right) : width + min(0, right)]


def distillation(coarse: Tensor, fine: Tensor) -> Tensor:
    """The mean squared difference of the coarse mask (N, 1, h, w) and of the fine mask, which is
    resized to (h, w), equation (8). Both get a gradient.

    Example
    -------
    >>> distillation(torch.zeros(1, 1, 4, 4), torch.full((1, 1, 32, 32), 0.5))
    tensor(0.2500)
    """
    return ((coarse - resized(fine, *coarse.shape[2:])) ** 2).mean()


def zoomed(x: Tensor, offsets: Tensor) -> Tensor:
    """A part of each picture of half the height and width, enlarged to the size of the picture.

    Parameters
    ----------
    x : (N, C, H, W), H and W even.
    offsets : (N, 2) int64, the top row and the left column of the part, 0 to H / 2 and 0 to W / 2.

    Example
    -------
    >>> zoomed(torch.rand(2, 3, 64, 64), torch.tensor([[0, 0], [16, 32]])).shape
    torch.Size([2, 3, 64, 64])
    """
    height, width = x.shape[2] // 2, x.shape[3] // 2
    parts = [
        picture[:, top : top + height, left : left + width]
        for picture, (top, left) in zip(x, offsets.tolist(), strict=True)
    ]
    return resized(torch.stack(parts), 2 * height, 2 * width)


def equivariance(
    student: Tensor,
    teacher: Tensor,
    guidance: Tensor | None = None,
    radius: int = 9,
    eps: float = 1e-3,
) -> Tensor:
    """The mean squared difference of a zoomed part of a mask and of the mask of the zoomed part,
    which is guided-filtered and gets no gradient, equation (9).

    Parameters
    ----------
    student : (N, 1, H, W), the :func:`zoomed` part of the mask of whole pictures.
    teacher : (N, 1, H, W), the mask of the zoomed part.
    guidance : (N, 1, H, W) in [0, 1], the zoomed pictures in grey; None: no filter.
    radius, eps : of :func:`guided_filter_grey`.

    Example
    -------
    >>> equivariance(torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.5))
    tensor(0.2500)
    """
    target = teacher.detach()
    if guidance is not None:
        target = guided_filter_grey(guidance, target, radius, eps)
    return ((student - target.clamp(MARGIN, 1 - MARGIN)) ** 2).mean()


def guided_filter_grey(guidance: Tensor, values: Tensor, radius: int, eps: float) -> Tensor:
    """The guided filter (He, Sun, Tang, TPAMI 2013) with a grey guidance, as
    :func:`runtime.guided_filter` computes it: windows end at the border.

    Parameters
    ----------
    guidance, values : (N, 1, H, W), the guidance in [0, 1].
    radius : of the window of (2 radius + 1)^2 pixels.
    eps : contrast (variance) below this value is smoothed.

    Returns
    -------
    (N, 1, H, W), not clamped.

    Example
    -------
    >>> grey, mask = torch.rand(2, 1, 64, 64), torch.rand(2, 1, 64, 64)
    >>> guided_filter_grey(grey, mask, radius=9, eps=1e-3).shape
    torch.Size([2, 1, 64, 64])
    """

    def mean(x: Tensor) -> Tensor:
        rows = functional.avg_pool2d(
            x, (2 * radius + 1, 1), 1, (radius, 0), count_include_pad=False
        )
        return functional.avg_pool2d(
            rows, (1, 2 * radius + 1), 1, (0, radius), count_include_pad=False
        )

    g, p = mean(guidance), mean(values)
    slope = (mean(guidance * values) - g * p) / (mean(guidance * guidance) - g * g + eps)
    return mean(slope) * guidance + mean(p - slope * g)
