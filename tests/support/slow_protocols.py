"""Slow loops that spell out the definitions of the protocols, and small pictures for them."""

from itertools import permutations, product

import numpy as np
from PIL import Image

from benchmarks.quality.layouts import IGNORED


def drawn(rng, labels, shape=(6, 7)):
    """A map of few blocks."""
    small = rng.integers(labels, size=(3, 4))
    return np.kron(small, np.ones((2, 2), int))[: shape[0], : shape[1]]


def pixels(labels, skip=None):
    """The pixels of each label, in ascending order of labels."""
    found = {}
    for place in np.ndindex(labels.shape):
        if labels[place] != skip:
            found.setdefault(int(labels[place]), set()).add(place)
    return [found[name] for name in sorted(found)]


def iou(a, b):
    return len(a & b) / len(a | b)


def slow_best(found, true):
    return [max(iou(f, t) for f in found) for t in true]


def slow_one_to_one(found, true):
    """Try every choice of other predicted regions, with enough empty ones."""
    padded = [*found, *[set()] * len(true)]
    ways = permutations(range(len(padded)), len(true))
    sums = (sum(iou(padded[i], t) for i, t in zip(way, true, strict=True)) for way in ways)
    return max(sums) / len(true)


def slow_many_to_one(found, true):
    renamed = [set() for _ in true]
    for f in found:
        scores = [iou(f, t) for t in true]
        renamed[scores.index(max(scores))] |= f
    return np.mean([iou(r, t) for r, t in zip(renamed, true, strict=True)])


def slow_matching(pairs, classes):
    """Accuracy and mIoU of the best of all matchings; each cluster has at most one class."""
    names = sorted({int(v) for p, _ in pairs for v in np.unique(p)})
    clusters = {name: set() for name in names}
    real = [set() for _ in range(classes)]
    for i, (prediction, truth) in enumerate(pairs):
        for place in np.ndindex(truth.shape):
            if 0 <= truth[place] < classes:
                clusters[int(prediction[place])].add((i, place))
                real[truth[place]].add((i, place))
    padded = [*clusters.values(), *[set()] * classes]
    ways = list(permutations(padded, classes))
    right = [sum(len(a & b) for a, b in zip(way, real, strict=True)) for way in ways]
    assert right.count(max(right)) >= 1
    way = ways[right.index(max(right))]
    total = sum(map(len, real))
    return max(right) / total, np.mean([iou(a, b) for a, b in zip(way, real, strict=True) if b])


def clustered(rng, clusters, count=3):
    """Pictures whose clusters agree with three classes often enough for one best matching."""
    pairs = []
    for _ in range(count):
        truth = drawn(rng, 3)
        noise = rng.integers(clusters, size=truth.shape)
        prediction = np.where(rng.random(truth.shape) < 0.6, 2 - truth, noise)
        truth[rng.random(truth.shape) < 0.1] = IGNORED
        pairs.append((prediction, truth))
    return pairs


def slow_dynaseg(channels, truth):
    """The nine measures of a picture; None if the evaluator leaves it out. In the best matching
    each row with pixels has a column that shares some."""
    counts = {}
    for place in np.ndindex(truth.shape):
        if truth[place] != IGNORED:
            cell = divmod(27 * int(truth[place]) + int(channels[place]), 27)
            counts[cell] = counts.get(cell, 0) + 1
    if any(row > 26 for row, _ in counts):
        return None
    rows = sorted({row for row, _ in counts})
    totals = {}
    for way in product(*[[None, *(c for r, c in counts if r == row)] for row in rows]):
        used = [column for column in way if column is not None]
        if len(used) == len(set(used)):
            totals[way] = sum(counts.get(c, 0) for c in zip(rows, way, strict=True))
    best = [way for way, total in totals.items() if total == max(totals.values())]
    assert len(best) == 1 and None not in best[0]
    place_of = dict(zip(rows, best[0], strict=True))
    table = {(place_of[row], column): n for (row, column), n in counts.items()}
    measures = []
    for part in (range(27), range(12), range(12, 27)):
        inside = {cell: n for cell, n in table.items() if cell[0] in part and cell[1] in part}
        if not inside:
            return None
        hits = sum(n for (row, column), n in inside.items() if row == column)
        ious, shares = [], []
        for k in part:
            hit = inside.get((k, k), 0)
            row = sum(n for cell, n in inside.items() if cell[0] == k)
            column = sum(n for cell, n in inside.items() if cell[1] == k)
            ious += [hit / (row + column - hit)] if row + column else []
            shares += [hit / row] if row else []
        measures += [hits / sum(inside.values()), np.mean(ious), np.mean(shares)]
    return measures


def slow_f(mask, truth, threshold, beta2):
    above = mask >= threshold
    hits = (above & truth).sum()
    precision = hits / above.sum() if above.any() else 1
    recall = hits / truth.sum()
    low = beta2 * precision + recall
    return (1 + beta2) * precision * recall / low if low else 0


def slow_parts(mask):
    """Grow every part from a pixel, through the sides of pixels."""
    parts, left = [], {p for p in np.ndindex(mask.shape) if mask[p] > 0.5}
    while left:
        part, grow = set(), [min(left)]
        while grow:
            y, x = grow.pop()
            if (y, x) in left:
                left.discard((y, x))
                part.add((y, x))
                grow += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        parts.append(part)
    return sorted(parts, key=len)


def slow_corloc(mask, boxes):
    """Count the shared pixels of the boxes."""
    if not (parts := slow_parts(mask)):
        return False
    rows, columns = zip(*parts[-1], strict=True)
    box = set(product(range(min(rows), max(rows) + 1), range(min(columns), max(columns) + 1)))
    others = [set(product(range(t, b), range(le, r))) for le, t, r, b in boxes]
    return any(iou(box, other) >= 0.5 for other in others)


def slow_edges(mask):
    """The pixels whose right or lower neighbour is on the other side."""
    pairs = {(y, x): (mask[y : y + 2, x], mask[y, x : x + 2]) for y, x in np.ndindex(mask.shape)}
    return [place for place, both in pairs.items() if any(p.any() != p.all() for p in both)]


def slow_boundary_f(mask, truth):
    """Both maps have edges."""
    found, real = slow_edges(mask), slow_edges(truth)
    near = [[(a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 <= 2**2 for b in real] for a in found]
    precision, recall = np.any(near, axis=1).mean(), np.any(near, axis=0).mean()
    return 2 * precision * recall / (precision + recall)


def with_pil(labels, height, width):
    picture = Image.fromarray(labels.astype(np.int32))
    return np.array(picture.resize((width, height), Image.Resampling.NEAREST))
