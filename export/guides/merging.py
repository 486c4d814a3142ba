"""Merging the rows of an attention map to segments, as DiffSeg does (Tian et al., CVPR 2024,
"Diffuse, Attend, and Segment").

Rows are probabilities over the cells of a grid. The maps of one object are near to each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

_LEAST = 1e-12  # probabilities are at least this in logarithms
CHUNK = 1024  # rows whose logarithms are kept at a time
_MOST_ROUNDS = 300  # of k-means


def anchors(height: int, width: int, grid: int) -> Tensor:
    """The cells at which proposals start: a regular grid, centred.

    A square of cells has ``grid`` anchors on each axis, with the published distance
    floor((n - 1) / (grid - 1)) and first cell floor(((n - 1) - distance * (grid - 1)) / 2). Another
    shape has about as many in total: grid * sqrt(height / width) rows of them, rounded, and
    grid * sqrt(width / height) columns; at most one for each cell.

    Parameters
    ----------
    height, width : of the grid of cells.
    grid : anchors on an axis of a square.

    Returns
    -------
    (A,) int64, indices of cells, row by row.

    Example
    -------
    >>> anchors(64, 64, 16)[:3]
    tensor([65, 69, 73])
    """

    def places(cells: int, others: int) -> Tensor:
        count = min(cells, max(1, round(grid * math.sqrt(cells / others))))
        step = (cells - 1) // (count - 1) if count > 1 else 0
        return torch.arange(count) * step + (cells - 1 - step * (count - 1)) // 2

    return (places(height, width)[:, None] * width + places(width, height)).reshape(-1)


def distances(proposals: Tensor, maps: Tensor) -> Tensor:
    """The symmetric Kullback-Leibler distance of each proposal to each map:
    (KL(p || q) + KL(q || p)) / 2 = sum (p - q) (log p - log q) / 2.

    It is computed as (h(p) + h(q) - p . log q - q . log p) / 2 with h(p) = p . log p, so that the
    work is two matrix products, and rounding below 0 is set to 0. Probabilities below 1e-12 count
    as 1e-12 in logarithms.

    Parameters
    ----------
    proposals : (K, N) float32, rows that sum to 1.
    maps : (M, N) float32, rows that sum to 1.

    Returns
    -------
    (K, M) float32, at least 0, in nats.
    """
    logs = proposals.clamp_min(_LEAST).log()
    own = (proposals * logs).sum(1, keepdim=True)
    parts = []
    for rows in maps.split(CHUNK):
        logs_of_rows = rows.clamp_min(_LEAST).log()
        part = own + (rows * logs_of_rows).sum(1)
        part -= proposals @ logs_of_rows.T
        part -= logs @ rows.T
        parts.append(part / 2)
    return torch.cat(parts, 1).clamp_min_(0)


def mean_maps(chosen: Tensor, maps: Tensor) -> Tensor:
    """The mean of the maps that each row chooses.

    Parameters
    ----------
    chosen : (K, M) bool, at least one True in each row.
    maps : (M, N) float32.

    Returns
    -------
    (K, N) float32.
    """
    return (chosen.float() @ maps) / chosen.sum(1, keepdim=True)


def merge(maps: Tensor, starts: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Merge maps that are near to each other, in rounds.

    The first round makes one proposal for each anchor: the mean of all maps whose distance to the
    anchor's is below the threshold. Each later round scans the proposals in their order. One that
    is in no group yet becomes the mean of all proposals below the threshold, which are then in a
    group; those of earlier groups are counted as well. A map is always in its own group.

    Parameters
    ----------
    maps : (N, N) float32, rows that sum to 1.
    starts : (A,) int64, the anchors.
    thresholds : one distance for each round.

    Returns
    -------
    (K, N) float32, K at least 1 and at most A.
    """
    near = distances(maps[starts], maps) < thresholds[0]
    near[torch.arange(len(starts)), starts] = True
    proposals = mean_maps(near, maps)
    for threshold in thresholds[1:]:
        near = distances(proposals, proposals) < threshold
        near.fill_diagonal_(True)
        near = near.cpu()
        grouped, kept = torch.zeros(len(near), dtype=torch.bool), []
        for index, group in enumerate(near):
            if not grouped[index]:
                kept.append(index)
                grouped |= group
        proposals = mean_maps(near[kept].to(maps.device), proposals)
    return proposals


def refine(maps: Tensor, proposals: Tensor) -> Tensor:
    """Refine proposals by k-means on the maps with Euclidean distances (Lloyd's algorithm), which
    starts at the proposals and ends when no map changes its cluster, or after 300 rounds. A
    proposal without a map is unchanged.

    Parameters
    ----------
    maps : (N, N) float32.
    proposals : (K, N) float32.

    Returns
    -------
    (K, N) float32, the means of the clusters.
    """
    old = None
    for _ in range(_MOST_ROUNDS):
        nearest = (proposals.square().sum(1) / 2 - maps @ proposals.T).argmin(1)
        if old is not None and torch.equal(nearest, old):
            break
        old = nearest
        chosen = nearest == torch.arange(len(proposals), device=maps.device)[:, None]
        used = chosen.any(1)
        proposals = proposals.clone()
        proposals[used] = mean_maps(chosen[used], maps)
    return proposals


def suppress(proposals: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The proposal with the largest value at each pixel, the first of equal ones.

    Parameters
    ----------
    proposals : (K, N) float32, not negative.
    grid : (height, width) in cells; N is their product.
    size : (h, w) in pixels, to which proposals are enlarged bilinearly, one after another.

    Returns
    -------
    (h, w) int32. The proposals that are the largest one somewhere have the numbers 0, 1, ... in
    their order.
    """
    best = torch.full(size, -1.0, device=proposals.device)
    labels = torch.zeros(size, dtype=torch.int32, device=proposals.device)
    for number, proposal in enumerate(proposals):
        large = interpolate(
            proposal.view(1, 1, *grid), size, mode="bilinear", align_corners=False
        ).view(size)
        labels[large > best] = number
        best = torch.maximum(best, large)
    return torch.unique(labels, return_inverse=True)[1].to(torch.int32)
