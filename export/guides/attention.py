"""Self-attention that is computed head by head, and AttentionSum, which adds the maps of a U-Net as
they are computed, and aggregates them to one as DiffSeg does (Tian et al., CVPR 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from runtime.errors import InputError

_ROWS = 256  # of a map that are computed at a time: 4 MB of 4096 columns remain in a cache


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

    def add(self, probabilities: Tensor) -> None:
        """Add the map of one head of one block.

        Parameters
        ----------
        probabilities : (n, n) float32 on any device: row i is the attention of the query i over
            all keys, and sums to 1. Queries and keys are the cells of a level, row by row.

        Raises
        ------
        InputError : the latent grid has no level of n cells.
        """
        if probabilities.ndim != 2 or probabilities.shape[0] != probabilities.shape[1]:
            raise InputError(f"an attention map is {tuple(probabilities.shape)}; wanted (n, n)")
        total = self.level(len(probabilities), probabilities.device)
        total += probabilities

    def level(self, cells: int, device: torch.device) -> Tensor:
        """Return the sum of the maps of the level of ``cells`` cells, to which the caller adds one.

        Returns
        -------
        (cells, cells) float32; zeros before the first map.

        Raises
        ------
        InputError : the latent grid has no level of so many cells.
        """
        factor = max(1, round(math.sqrt(self.height * self.width / max(1, cells))))
        rows, columns = self.height // factor, self.width // factor
        if (rows * factor, columns * factor, rows * columns) != (self.height, self.width, cells):
            raise InputError(
                f"an attention map has {cells} cells; wanted those of the latent grid of "
                f"{self.height} x {self.width}, divided by a whole number",
            )
        if factor not in self.sums:
            self.sums[factor] = torch.zeros(cells, cells, device=device)
        return self.sums[factor]

    def aggregate(self) -> Tensor:
        """Return the weighted mean of the levels at the size of the latent grid.

        The keys of the mean map of a level are enlarged bilinearly, between the centres of cells,
        and each row is scaled to sum 1, for which the sum of the maps serves as well as their mean.
        Each query is repeated for the cells that it covers. The weight of a level is proportional
        to the side of its grid.

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
            keys = keys / (keys.sum(1, keepdim=True) * (factor * weights))
            # The axes of the queries: rows, rows of cells in a row, columns, columns of cells.
            queries = out.view(rows, factor, columns, factor, cells)
            queries += keys.view(rows, 1, columns, 1, cells)
        return out


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, total: AttentionSum) -> Tensor:
    """Compute the self-attention softmax(scale * Q K^T) V of one block, and add the softmax of each
    head to ``total``. Besides the sum, only 256 rows of one head's softmax are kept at a time.

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
    for head, keys in enumerate(key):
        columns = keys.float().T * scale
        maps = total.level(len(keys), key.device)
        for start in range(0, len(keys), _ROWS):
            rows = slice(start, start + _ROWS)
            probabilities = (query[head, rows].float() @ columns).softmax(-1)
            out[head, rows] = probabilities.to(value.dtype) @ value[head]
            maps[rows] += probabilities
    return out
