"""Self-attention that is computed head by head, and AttentionSum, which adds the maps of a U-Net as
they are computed, and aggregates them to one as DiffSeg does (Tian et al., CVPR 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from runtime.errors import InputError


class AttentionSum:
    """The sum of the attention maps of each level of a U-Net.

    A level is the latent grid divided by a whole factor: 1, 2, 4 and 8 in Stable Diffusion. Only
    one sum is kept for each level, whatever the number of its heads and blocks is.

    Parameters
    ----------
    height, width : of the latent grid, in cells.

    Example
    -------
    >>> total = AttentionSum(64, 64)
    >>> for probabilities in maps: total.add(probabilities)
    >>> total.aggregate().shape
    torch.Size([4096, 4096])
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.sums: dict[int, Tensor] = {}  # factor -> (cells, cells) float32
        self.counts: dict[int, int] = {}  # factor -> the number of maps in the sum

    def add(self, probabilities: Tensor) -> None:
        """Add the map of one head of one block.

        Parameters
        ----------
        probabilities : (n, n) float32 on any device: row i is the attention of the query i over
            all keys, and sums to 1. Queries and keys are the cells of a level, row by row. The
            first map of a level becomes its sum, so the caller does not use it again.

        Raises
        ------
        InputError : the latent grid has no level of n cells.
        """
        cells = self.height * self.width
        factor = max(1, round(math.sqrt(cells / max(1, len(probabilities)))))
        level = (self.height // factor) * (self.width // factor)
        whole = self.height % factor == 0 and self.width % factor == 0
        if probabilities.shape != (level, level) or not whole:
            raise InputError(
                f"an attention map is {tuple(probabilities.shape)}; wanted one of the cells of the "
                f"latent grid of {self.height} x {self.width}, divided by a whole number",
            )
        if factor in self.sums:
            self.sums[factor] += probabilities
        else:
            self.sums[factor] = probabilities
        self.counts[factor] = self.counts.get(factor, 0) + 1

    def aggregate(self) -> Tensor:
        """Return the weighted mean of the levels at the size of the latent grid.

        The maps of a level are averaged. The keys are enlarged bilinearly, between the centres of
        cells, and each row is scaled to sum 1 again; each query is repeated for the cells that it
        covers. The weight of a level is proportional to the side of its grid.

        Returns
        -------
        (N, N) float32, N = height * width; each row sums to 1.

        Raises
        ------
        InputError : no map was added.
        """
        if not self.sums:
            raise InputError("no attention map was added")
        height, width = self.height, self.width
        cells, weights = height * width, sum(1 / factor for factor in self.sums)
        out = torch.zeros(cells, cells, device=next(iter(self.sums.values())).device)
        for factor in sorted(self.sums):
            rows, columns = height // factor, width // factor
            keys = self.sums[factor].view(-1, 1, rows, columns)
            if factor > 1:
                keys = interpolate(keys, (height, width), mode="bilinear", align_corners=False)
            keys = keys.reshape(rows * columns, cells)
            keys = keys / keys.sum(1, keepdim=True) / (factor * weights)
            # The axes of the queries: rows, rows of cells in a row, columns, columns of cells.
            queries = out.view(rows, factor, columns, factor, cells)
            queries += keys.view(rows, 1, columns, 1, cells)
        return out


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, total: AttentionSum) -> Tensor:
    """Compute the self-attention softmax(scale * Q K^T) V of one block, and add the softmax of each
    head to ``total``. The maps of two heads are never kept at the same time.

    Parameters
    ----------
    query, key, value : (heads, n, d) of any float dtype and one device. The softmax is computed in
        float32.
    scale : of the products, usually 1 / sqrt(d).
    total : gets one (n, n) float32 map for each head.

    Returns
    -------
    (heads, n, d), of the dtype of ``value``.

    Raises
    ------
    InputError : the maps fit no level of ``total``.
    """
    out = torch.empty_like(value)
    for head in range(len(query)):
        scores = (query[head].float() * scale) @ key[head].float().T
        probabilities = scores.softmax(-1)
        del scores
        out[head] = probabilities.to(value.dtype) @ value[head]
        total.add(probabilities)
    return out
