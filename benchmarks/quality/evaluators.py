"""The scores of predictions by each protocol, from pairs of a prediction and its truth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.quality import metrics
from benchmarks.quality.layouts import COCO27, FIRST_STUFF, IGNORED
from export.train.matching import confusion, match
from runtime.errors import InputError, MissingBackend
from runtime.opencv import cv2

Pair = tuple[np.ndarray, Any]  # a prediction, and the truth in the form of the protocol
Scores = dict[str, float]

SELFMASK_BETA2 = 0.09  # 0.3, which SelfMask's code squares again
PARTS = ("all", "fine", "coarse")  # the annotators: all, the one with most regions, with fewest
THREE_MEASURES = ("acc", "mIoU", "mean acc")


def assign(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns of an assignment with the largest sum (Kuhn, 1955).

    Parameters
    ----------
    values : (N, M), what each pair of a row and a column adds. Each row has at most one column.

    Raises
    ------
    MissingBackend : SciPy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise MissingBackend(
            f"SciPy is needed to match regions, but {error}",
            fix="pip install 'dynaguide-edge[bench]'",
        ) from error
    rows, columns = linear_sum_assignment(values, maximize=True)
    return rows, columns


def one_to_one(table: np.ndarray) -> float:
    """The mean IoU of the true regions, each matched with a predicted region of its own so that the
    sum is largest (Hungarian method). A region without a partner has 0.

    Parameters
    ----------
    table : (predicted regions, true regions) shared pixels, from metrics.contingency.
    """
    iou = metrics.overlaps(table)
    return float(iou[assign(iou)].sum() / table.shape[1])


def many_to_one(table: np.ndarray) -> float:
    """The mIoU of DynaGuide's evaluator (El Harouni et al., 2025, evaluation/metrics.py).

    Each predicted region is renamed to the true one with which its IoU is largest (the first of
    equals), so that several become one. Then TP / (TP + FP + FN) is averaged over the true regions.
    Regions that each lie in one true region score 1, however many there are.

    Parameters
    ----------
    table : (predicted regions, true regions) shared pixels, from metrics.contingency.
    """
    renamed = np.zeros((table.shape[1],) * 2, np.int64)
    np.add.at(renamed, metrics.overlaps(table).argmax(axis=1), table)
    return float(np.diag(metrics.overlaps(renamed)).mean())


def score_regions(pairs: Iterable[Pair], *, compat: str = "", ignore: int | None = None) -> Scores:
    """Score regions without classes, as DFC (Kim, Kanezaki and Tanaka, TIP 2020) and DynaSeg do.

    Parameters
    ----------
    pairs : a label map (H, W) and the label maps of the annotators, each (H, W).
    compat : "dynaguide" adds the score of DynaGuide's evaluator.
    ignore : a true label whose pixels are left out, or None.

    Returns
    -------
    "all", "fine", "coarse", "mean": the best IoU of each true region, averaged over the regions of
    all pictures together: those of all annotators, of the one with most, and of the one with fewest
    (the first of equals). "picture all", "picture fine", "picture coarse": averaged within each
    picture first. "one-to-one": of the annotator with most regions, the mean over pictures.
    "segments", "true segments": the mean numbers of a prediction and of an annotator, of the pixels
    that are not left out. "compat dynaguide": of the annotator with most regions, the mean over
    pictures; all pixels count, because this evaluator leaves none out.

    Raises
    ------
    InputError : all pixels of a truth have the label ``ignore``; or its shape is another one.
    """
    best: dict[str, list[np.ndarray]] = {"all": [], "fine": [], "coarse": []}
    rows: dict[str, list[float]] = {"one-to-one": [], "segments": [], "true segments": []}
    for prediction, annotators in pairs:
        index = np.unique(prediction, return_inverse=True)[1]
        regions = index.reshape(prediction.shape)
        tables = [_shared(regions, truth, ignore) for truth in annotators]
        scores = [metrics.overlaps(table).max(axis=0) for table in tables]
        finest = max(range(len(tables)), key=lambda i: tables[i].shape[1])
        best["all"].append(np.concatenate(scores))
        best["fine"].append(max(scores, key=len))
        best["coarse"].append(min(scores, key=len))
        rows["one-to-one"].append(one_to_one(tables[finest]))
        rows["segments"].append(len(tables[0]))
        rows["true segments"] += [table.shape[1] for table in tables]
        if compat:
            every = ignore is None
            whole = tables[finest] if every else _shared(regions, annotators[finest], None)
            rows.setdefault(f"compat {compat}", []).append(many_to_one(whole))
    pooled = {name: float(np.concatenate(parts).mean()) for name, parts in best.items()}
    means = {f"picture {name}": _mean([p.mean() for p in parts]) for name, parts in best.items()}
    return {
        **pooled,
        "mean": _mean(list(pooled.values())),
        **means,
        **{name: _mean(values) for name, values in rows.items()},
    }


def part_sizes(annotators: Sequence[np.ndarray]) -> list[int]:
    """How many regions of a picture count for each of PARTS."""
    numbers = [len(np.unique(regions)) for regions in annotators]
    return [sum(numbers), max(numbers), min(numbers)]


def pool(scores: np.ndarray, sizes: np.ndarray) -> Scores:
    """The PARTS of several pictures over the regions of all of them together, and their "mean".

    Parameters
    ----------
    scores : (pictures, 3), the PARTS of :func:`score_regions` for each picture alone.
    sizes : (pictures, 3), :func:`part_sizes` of each picture.

    Example
    -------
    >>> pool(np.array([[0.5, 0.25, 1]]), np.array([[6, 4, 2]]))["mean"]
    0.5833333333333334
    """
    means = (scores * sizes).sum(axis=0) / sizes.sum(axis=0)
    return {**dict(zip(PARTS, means.tolist(), strict=True)), "mean": float(means.mean())}


def _shared(regions: np.ndarray, truth: np.ndarray, ignore: int | None) -> np.ndarray:
    if regions.shape != truth.shape:
        raise InputError(
            f"the prediction has shape {regions.shape}, the truth {truth.shape}",
            fix="pass maps of the same size",
        )
    valid = np.ones(truth.shape, bool) if ignore is None else truth != ignore
    if not valid.any():
        raise InputError("a truth has no pixel to score", fix="leave the picture out by --list")
    return metrics.contingency(regions[valid][None], truth[valid][None])


def score_segments(pairs: Iterable[Pair], *, compat: str = "") -> Scores:
    """Score regions as :func:`score_regions` does, with one label map (H, W) as the truth. Pixels
    of the label IGNORED are left out.

    Returns
    -------
    "best IoU": "all" of score_regions; "picture best IoU": its "picture all"; "one-to-one",
    "segments", "true segments" and "compat dynaguide".
    """
    each = ((prediction, [truth]) for prediction, truth in pairs)
    found = score_regions(each, compat=compat, ignore=IGNORED)
    names = {"all": "best IoU", "picture all": "picture best IoU"}
    unused = ("fine", "coarse", "mean", "picture fine", "picture coarse")
    return {names.get(name, name): v for name, v in found.items() if name not in unused}


def score_clusters(pairs: Iterable[Pair], *, classes: int, stuff: bool = False) -> Scores:
    """Score clusters by one matching with classes over the whole data set, as IIC (Ji et al., ICCV
    2019), PiCIE and STEGO do.

    Parameters
    ----------
    pairs : clusters (H, W), whose numbers have one meaning in all pictures, and classes (H, W) in
        [0, classes); other values are not scored.
    classes : their number.
    stuff : add the scores of the classes from FIRST_STUFF on alone, with a matching of their own.

    Returns
    -------
    "acc": right pixels / scored pixels; "mIoU": over the classes that occur in the truth;
    "clusters": their number. With ``stuff`` also "stuff acc" and "stuff mIoU", if a pixel is stuff.

    Raises
    ------
    InputError : no pixel has a class.
    """
    rows: dict[int, np.ndarray] = {}
    for prediction, truth in pairs:
        values, index = np.unique(prediction, return_inverse=True)
        counts = confusion(index.reshape(prediction.shape), truth, (len(values), classes))
        for value, row in zip(values.tolist(), counts, strict=True):
            rows[value] = rows.get(value, 0) + row
    table = np.stack([rows[value] for value in sorted(rows)])
    found = match(table)
    scores = {"acc": found.accuracy, "mIoU": found.miou, "clusters": float(len(table))}
    if stuff and table[:, FIRST_STUFF:].any():
        part = match(table[:, FIRST_STUFF:])
        scores |= {"stuff acc": part.accuracy, "stuff mIoU": part.miou}
    return scores


def score_each_by_itself(pairs: Iterable[Pair], *, classes: int) -> Scores:
    """Score clusters as DiffSeg (Tian et al., CVPR 2024) does: a matching for each picture.

    TP, FP and FN of each class are added over the pictures. Each class takes part in each matching,
    also one that the picture lacks: a cluster that remains counts there as FP of the class that the
    solver chose.

    Parameters
    ----------
    pairs : clusters (H, W), and classes (H, W) in [0, classes); other values are not scored.

    Returns
    -------
    "compat diffseg acc": TP / scored pixels; "compat diffseg mIoU": over the classes with TP, FP
    or FN; "segments": the mean number of clusters of a picture.

    Raises
    ------
    InputError : no pixel has a class.
    """
    hits, wrong, missed = np.zeros((3, classes), np.int64)
    numbers = []
    for prediction, truth in pairs:
        values, index = np.unique(prediction, return_inverse=True)
        shape = (max(classes, len(values)), classes)
        counts = confusion(index.reshape(prediction.shape), truth, shape).T
        rows, columns = assign(counts)
        matched = counts[rows, columns]
        hits += matched
        missed += counts.sum(axis=1) - matched
        wrong += counts[:, columns].sum(axis=0) - matched
        numbers.append(len(values))
    total = hits + missed
    if not total.sum():
        raise InputError("no pixel of the pictures has a class", fix="check --data")
    union = total + wrong
    return {
        "compat diffseg acc": float(hits.sum() / total.sum()),
        "compat diffseg mIoU": float((hits[union > 0] / union[union > 0]).mean()),
        "segments": _mean(numbers),
    }


def score_as_dynaseg(pairs: Iterable[Pair]) -> Scores:
    """Score channels as the public code of DynaSeg does on COCO (ClusterIoUEvaluator).

    Each picture has a table of 27 x 27 and a matching of its own. A pixel of the class c and the
    channel k is counted in cell 27 c + k, so that a channel from 27 on is counted for a wrong
    class; a picture with a cell outside of the table is left out. The rows of the table, which are
    classes, are then put in the order of the channels that they are matched with, and "things" are
    the first FIRST_STUFF rows and columns, "stuff" the others: the block of a class depends on the
    number of its channel. A picture is left out if a block has no pixel.

    The code also kept, for each picture, the epoch with the best mIoU against the truth, which
    predictions do not contain.

    Parameters
    ----------
    pairs : the numbers of channels (H, W), and classes (H, W) in [0, 27); pixels with other classes
        are not scored.

    Returns
    -------
    "compat dynaseg acc", "compat dynaseg mIoU", "compat dynaseg mean acc", and the same of
    "things" and "stuff": means over the pictures that are not left out; "left out": the share of
    pictures that are.

    Raises
    ------
    InputError : all pictures are left out.
    """
    side, count, rows = len(COCO27), 0, []
    for channels, truth in pairs:
        count += 1
        valid = (truth >= 0) & (truth < side)
        cells = side * truth[valid].astype(np.int64) + channels[valid]
        if cells.size and cells.max() >= side**2:
            continue
        table = np.bincount(cells, minlength=side**2).reshape(side, side)
        table = table[np.argsort(assign(table)[1])]
        stuff = slice(FIRST_STUFF, None)
        blocks = table, table[:FIRST_STUFF, :FIRST_STUFF], table[stuff, stuff]
        if all(block.any() for block in blocks):
            rows.append([measure for block in blocks for measure in _three_measures(block)])
    if not rows:
        raise InputError(
            f"the evaluator of DynaSeg leaves out all {count} pictures",
            fix="save the numbers of channels, 0 to 26, as grey label maps, and check --data",
        )
    names = [f"{part}{name}" for part in ("", "things ", "stuff ") for name in THREE_MEASURES]
    means = zip(names, np.mean(rows, axis=0).tolist(), strict=True)
    found = {f"compat dynaseg {name}": mean for name, mean in means}
    return {**found, "left out": 1 - len(rows) / count}


def _three_measures(table: np.ndarray) -> tuple[float, float, float]:
    """Of a square table with at least one pixel: the share of pixels on the diagonal; the mean over
    rows of the IoU; the mean of the share of a row that is on the diagonal. Rows without the pixels
    that a measure divides by are left out of its mean."""
    hits, real, found = np.diag(table), table.sum(axis=1), table.sum(axis=0)
    union = real + found - hits
    iou, share = hits[union > 0] / union[union > 0], hits[real > 0] / real[real > 0]
    return float(hits.sum() / table.sum()), float(iou.mean()), float(share.mean())


def score_saliency(pairs: Iterable[Pair]) -> Scores:
    """Score masks of the foreground.

    Parameters
    ----------
    pairs : masks (H, W) float64 whose values are multiples of 1 / 255, and truths (H, W) bool.

    Returns
    -------
    "acc", "IoU": at the threshold 0.5, means over pictures. "max F (MOVE)": beta^2 = 0.3, the
    largest mean over pictures at any one threshold, as in TokenCut, MOVE and Boosting. "max F
    (SelfMask)": beta^2 = 0.09, the mean of the largest value of each picture, as in SelfMask and
    FOUND.

    Raises
    ------
    InputError : all masks and truths are empty.
    """
    from benchmarks.quality.saliency import max_f, score

    found, own = [], []
    for mask, truth in pairs:
        scores = score(mask, truth)
        # The published thresholds: above 0, ..., 254, which are at least 1, ..., 255.
        precision, recall = scores.precision[1:], scores.recall[1:]
        found.append(scores._replace(precision=precision, recall=recall))
        below = SELFMASK_BETA2 * precision + recall
        measures = (1 + SELFMASK_BETA2) * precision * recall / np.where(below > 0, below, 1)
        own.append(measures.max() if truth.any() else 0.0)
    if np.isnan([s.iou for s in found]).all():
        raise InputError("all masks and truths are empty", fix="check --data and --list")
    return {
        "acc": _mean([s.acc for s in found]),
        "IoU": float(np.nanmean([s.iou for s in found])),
        "max F (MOVE)": max_f(found)[0],
        "max F (SelfMask)": _mean(own),
    }


def score_corloc(pairs: Iterable[Pair]) -> Scores:
    """Score the box of one object (Deselaers, Alexe and Ferrari, ECCV 2010), from masks as LOST,
    TokenCut and FOUND do.

    The box encloses the largest part of the mask above 0.5 whose pixels are connected through their
    sides. It is right if its IoU with any true box is at least 0.5. An empty mask is wrong.

    Parameters
    ----------
    pairs : masks (H, W) float in [0, 1], and Boxes.

    Returns
    -------
    "CorLoc": the share of pictures with a right box; "empty": of those with an empty mask.
    """
    right, empty = [], []
    for mask, truth in pairs:
        above = (mask > 0.5).astype(np.uint8)
        empty.append(not above.any())
        right.append(not empty[-1] and _box_iou(_largest_box(above), truth.boxes) >= 0.5)
    return {"CorLoc": _mean(right), "empty": _mean(empty)}


def _largest_box(mask: np.ndarray) -> np.ndarray:
    _, _, found, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    left, top, width, height, _ = found[1 + found[1:, cv2.CC_STAT_AREA].argmax()]
    return np.array([left, top, left + width, top + height])


def _box_iou(box: np.ndarray, others: np.ndarray) -> float:
    """The largest IoU of a box with any other; 0 if there is no other."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = sides.clip(0).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    return float((shared / (areas - shared)).max(initial=0))


def score_davis(pairs: Iterable[Pair]) -> Scores:
    """Score objects as the command quality does: the IoU, and the F of boundaries within 2 pixels;
    means over frames.

    Parameters
    ----------
    pairs : labels (H, W), 0 in the background, and truths (H, W) bool.
    """
    found = []
    for labels, truth in pairs:
        mask = labels != 0
        found.append((metrics.binary_iou(mask, truth), metrics.boundary_f(mask, truth)))
    iou, boundary = zip(*found, strict=True)
    return {"IoU": _mean(iou), "F": _mean(boundary)}


def _mean(values: Sequence[Any]) -> float:
    return float(np.mean(values))
