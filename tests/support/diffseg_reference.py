"""DiffSeg in float64, slow and plain: each formula of its paper is one loop."""

import math

import numpy as np


def enlarge(values, height, width):
    """(h, w) values at (height, width), bilinearly between the centres of pixels."""

    def weights(cells, pixels):
        found = np.zeros((pixels, cells))
        for pixel in range(pixels):
            place = max((pixel + 0.5) * cells / pixels - 0.5, 0)
            low = int(place)
            found[pixel, low] += 1 - (place - low)
            found[pixel, min(low + 1, cells - 1)] += place - low
        return found

    return weights(values.shape[0], height) @ values @ weights(values.shape[1], width).T


def aggregate(maps, height, width):
    """The aggregate, (N, N), of attention maps: a list of (heads, n, n), one for each block."""
    levels = {}
    for block in maps:
        factor = math.isqrt(height * width // block.shape[1])
        levels.setdefault(factor, []).extend(np.asarray(block, np.float64))
    total = sum(1 / factor for factor in levels)
    out = np.zeros((height, width, height * width))
    for factor, heads in levels.items():
        mean = np.mean(heads, 0)
        rows, columns = height // factor, width // factor
        for row in range(height):
            for column in range(width):
                query = row // factor * columns + column // factor
                keys = enlarge(mean[query].reshape(rows, columns), height, width)
                out[row, column] += keys.ravel() / keys.sum() / factor / total
    return out.reshape(height * width, -1)


def distance(p, q):
    """The symmetric Kullback-Leibler distance."""
    return 0.5 * ((p - q) * (np.log(np.maximum(p, 1e-12)) - np.log(np.maximum(q, 1e-12)))).sum()


def anchors(height, width, grid):
    """The cells of the anchors, row by row."""

    def places(cells, others):
        count = min(cells, max(1, round(grid * math.sqrt(cells / others))))
        if count == 1:
            return [(cells - 1) // 2]
        step = math.floor((cells - 1) / (count - 1))
        first = math.floor((cells - 1 - step * (count - 1)) / 2)
        return [first + step * i for i in range(count)]

    return [y * width + x for y in places(height, width) for x in places(width, height)]


def merge(maps, starts, thresholds):
    """The proposals, (K, N)."""
    proposals = []
    for start in starts:
        near = [
            q for i, q in enumerate(maps) if i == start or distance(maps[start], q) < thresholds[0]
        ]
        proposals.append(np.mean(near, 0))
    for threshold in thresholds[1:]:
        grouped, merged = set(), []
        for i, p in enumerate(proposals):
            if i in grouped:
                continue
            near = [j for j, q in enumerate(proposals) if i == j or distance(p, q) < threshold]
            grouped |= {*near}
            merged.append(np.mean([proposals[j] for j in near], 0))
        proposals = merged
    return np.array(proposals)


def refine(maps, proposals):
    """Lloyd's algorithm from the proposals until no map changes its cluster."""
    old = None
    while True:
        nearest = [np.argmin([((m - p) ** 2).sum() for p in proposals]) for m in maps]
        if nearest == old:
            return proposals
        old = nearest
        proposals = np.array([
            np.mean([m for m, k in zip(maps, nearest, strict=True) if k == number], 0)
            if number in nearest else p
            for number, p in enumerate(proposals)
        ])  # fmt: skip


def suppress(proposals, grid, size):
    """The labels, (h, w): the largest proposal of each pixel, numbered without gaps."""
    large = np.array([enlarge(p.reshape(grid), *size) for p in proposals])
    return np.unique(large.argmax(0), return_inverse=True)[1].reshape(size)
