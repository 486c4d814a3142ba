"""Score the predictions of any program as publications do, each of them by its own protocol.

    python -m benchmarks protocol bsds500 --data BSR --predictions FOLDER

docs/protocols.md states what each protocol measures and which published column it belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment
from benchmarks.quality import layouts, metrics
from benchmarks.quality.layouts import FIRST_STUFF, IGNORED, LAYOUTS, Boxes, Layout
from benchmarks.table import as_markdown, check_out, write_json
from export.train.matching import confusion, match
from runtime.errors import InputError, MissingBackend
from runtime.files import shown
from runtime.opencv import cv2
from runtime.tools import cli
from runtime.tools.cli import Parser, out_path, progress_bar, some_path

Pair = tuple[np.ndarray, Any]  # a prediction, and the truth in the form of the protocol
Scores = dict[str, float]

COMPAT = {  # the evaluators of published programs, beside the protocols that they replace
    "bsds500": ("dynaguide",), "voc2012": ("dynaguide",), "coco27": ("diffseg",),
    "cityscapes27": ("diffseg",),
}  # fmt: skip
CROP, DIFFSEG_SIDE, POTSDAM_SIDE = 320, 512, 224  # pixels
SELFMASK_BETA2 = 0.09  # 0.3, which SelfMask's code squares again


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


def overlaps(table: np.ndarray) -> np.ndarray:
    """The IoU of each predicted region (row) with each true one (column), from shared pixels."""
    union = table.sum(axis=1, keepdims=True) + table.sum(axis=0) - table
    return table / np.maximum(union, 1)


def one_to_one(table: np.ndarray) -> float:
    """The mean IoU of the true regions, each matched with another predicted region so that the sum
    is largest (Hungarian method). A region without a partner has 0.

    Parameters
    ----------
    table : (predicted regions, true regions) shared pixels, from metrics.contingency.
    """
    iou = overlaps(table)
    return float(iou[assign(iou)].sum() / table.shape[1])


def many_to_one(table: np.ndarray) -> float:
    """The mIoU of DynaGuide's evaluator (El Harouni et al., 2025, evaluation/metrics.py).

    Each predicted region is renamed to the true one with which its IoU is largest (the first of
    equals), so that several become one. Then TP / (TP + FP + FN) is averaged over the true regions.
    Smaller predicted regions are never worse.

    Parameters
    ----------
    table : (predicted regions, true regions) shared pixels, from metrics.contingency.
    """
    renamed = np.zeros((table.shape[1],) * 2, np.int64)
    np.add.at(renamed, overlaps(table).argmax(axis=1), table)
    return float(np.diag(overlaps(renamed)).mean())


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
    "segments", "true segments": the mean numbers of a prediction and of an annotator.
    "compat dynaguide": of the annotator with most regions, the mean over pictures.

    Raises
    ------
    InputError : all pixels of a truth have the label ``ignore``.
    """
    best: dict[str, list[np.ndarray]] = {"all": [], "fine": [], "coarse": []}
    rows: dict[str, list[float]] = {"one-to-one": [], "segments": [], "true segments": []}
    for prediction, annotators in pairs:
        names, index = np.unique(prediction, return_inverse=True)
        regions = index.reshape(prediction.shape)
        tables = [_shared(regions, truth, ignore) for truth in annotators]
        scores = [overlaps(table).max(axis=0) for table in tables]
        finest = max(tables, key=lambda table: table.shape[1])
        best["all"].append(np.concatenate(scores))
        best["fine"].append(max(scores, key=len))
        best["coarse"].append(min(scores, key=len))
        rows["one-to-one"].append(one_to_one(finest))
        rows["segments"].append(len(names))
        rows["true segments"] += [table.shape[1] for table in tables]
        if compat:
            rows.setdefault(f"compat {compat}", []).append(many_to_one(finest))
    pooled = {name: float(np.concatenate(parts).mean()) for name, parts in best.items()}
    means = {f"picture {name}": _mean([p.mean() for p in parts]) for name, parts in best.items()}
    return {
        **pooled,
        "mean": _mean(list(pooled.values())),
        **means,
        **{name: _mean(values) for name, values in rows.items()},
    }


def _shared(regions: np.ndarray, truth: np.ndarray, ignore: int | None) -> np.ndarray:
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
    "clusters": their number. With ``stuff`` also "stuff acc" and "stuff mIoU".

    Raises
    ------
    InputError : no pixel has a class.
    """
    rows: dict[int, np.ndarray] = {}
    for prediction, truth in pairs:
        values, index = np.unique(prediction, return_inverse=True)
        counts = confusion(index.reshape(truth.shape), truth, (len(values), classes))
        for value, row in zip(values.tolist(), counts, strict=True):
            rows[value] = rows.get(value, 0) + row
    table = np.stack([rows[value] for value in sorted(rows)])
    found = match(table)
    scores = {"acc": found.accuracy, "mIoU": found.miou, "clusters": float(len(table))}
    if stuff:
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
        counts = confusion(index.reshape(truth.shape), truth, shape).T
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
    """
    from benchmarks.quality.saliency import max_f, score

    found, own = [], []
    for mask, truth in pairs:
        scores = score(mask, truth)
        found.append(scores)
        # SelfMask's thresholds: above 0, ..., 254, which are at least 1, ..., 255.
        precision, recall = scores.precision[1:], scores.recall[1:]
        below = SELFMASK_BETA2 * precision + recall
        measures = (1 + SELFMASK_BETA2) * precision * recall / np.where(below > 0, below, 1)
        own.append(measures.max() if truth.any() else 0.0)
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


def nearest(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a label map to the label at the middle of each new pixel, as PIL does."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip((height, width), labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]


def middle_square(labels: np.ndarray, side: int) -> np.ndarray:
    """Resize a label map so that its shorter side has ``side`` pixels, and cut the middle square,
    as PiCIE and STEGO do."""
    short = min(labels.shape)
    large = nearest(labels, *(side * n // short for n in labels.shape))
    top, left = (round((n - side) / 2) for n in large.shape)
    return large[top : top + side, left : left + side]


def square_first(labels: np.ndarray, side: int) -> np.ndarray:
    """Cut the middle square of a label map and resize it, as DiffSeg does."""
    short = min(labels.shape)
    top, left = ((n - short) // 2 for n in labels.shape)
    return nearest(labels[top : top + short, left : left + short], side, side)


def tile(labels: np.ndarray, side: int) -> np.ndarray:
    """Resize the labels of a tile of Potsdam-3.

    Raises
    ------
    InputError : the labels are of a whole orthophoto, or not square.
    """
    if labels.shape[0] != labels.shape[1] or labels.shape[0] > side:
        raise InputError(
            f"labels of {labels.shape[1]} x {labels.shape[0]} pixels are no tile of Potsdam-3",
            fix="cut the orthophotos into tiles of 200 x 200 pixels",
        )
    return nearest(labels, side, side)


def score_of(name: str, compat: str) -> tuple[Callable[[Iterable[Pair]], Scores], Any]:
    """The scores of a protocol, and how label maps are cut before, or None.

    Parameters
    ----------
    name : of LAYOUTS.
    compat : "", or one of COMPAT of this protocol.
    """
    if name in ("coco27", "cityscapes27"):
        if compat:
            cut = partial(square_first, side=DIFFSEG_SIDE)
            return partial(score_each_by_itself, classes=27), cut
        scores = partial(score_clusters, classes=27, stuff=name == "coco27")
        return scores, partial(middle_square, side=CROP)
    if name == "potsdam3":
        return partial(score_clusters, classes=3), partial(tile, side=POTSDAM_SIDE)
    regions = {"bsds500": score_regions, "voc2012": score_segments}
    if name in regions:
        return partial(regions[name], compat=compat), None
    others = {"saliency": score_saliency, "corloc": score_corloc, "davis": score_davis}
    return others[name], None


def fitted(prediction: np.ndarray, truth: Any, cut: Any, path: Path) -> Pair:
    """A prediction and its truth, both cut.

    Parameters
    ----------
    prediction : (H, W), at the size of the picture, or of the truth after ``cut``.
    truth : as the layout reads it.
    cut : of label maps, or None.
    path : of the prediction, for the message.

    Raises
    ------
    InputError : the prediction has another size.
    """
    size = truth.size if isinstance(truth, Boxes) else np.shape(truth)[-2:]
    small = truth if cut is None else cut(truth)
    if prediction.shape != size and (cut is None or prediction.shape != small.shape):
        (height, width), (tall, wide) = size, prediction.shape
        also = f", or {small.shape[1]} x {small.shape[0]} after the protocol's cut" if cut else ""
        raise InputError(
            f"{shown(path)} has {wide} x {tall} pixels, the picture {width} x {height}{also}",
            fix="save predictions at the size of the picture",
        )
    return (cut(prediction) if cut and prediction.shape == size else prediction), small


def evaluate(
    name: str,
    data: Path,
    folder: Path,
    *,
    split: str = "",
    names: list[str] | None = None,
    compat: str = "",
) -> dict[str, Any]:
    """Score the predictions in a folder by a protocol.

    Parameters
    ----------
    name : of LAYOUTS.
    data : the folder of the data set.
    folder : of the predictions, PNG files.
    split : the part of the data set; "" is the one that publications score.
    names : of the pictures to score; None for all.
    compat : "", or one of COMPAT of this protocol.

    Returns
    -------
    "protocol", "compat", "split"; "pictures", their number; "unused predictions", the number of
    PNG files of other pictures; "scores", each name with its number.

    Raises
    ------
    InputError : a file is missing or cannot be read, or has the wrong form or size.
    """
    layout: Layout = LAYOUTS[name]
    if split and not layout.split:
        raise InputError(
            f"the folder of {name} has no parts",
            fix="leave out --split, or name pictures by --list",
        )
    split = split or layout.split
    truths = layout.find(data, split)
    if not truths:
        raise InputError(f"{shown(data)} contains no truth of {name}", fix="check --data")
    if names is not None:
        truths = layouts.chosen(truths, names)
    paths, unused = layouts.predictions(folder, [truth.name for truth in truths])
    read = layouts.grey_mask if name in ("saliency", "corloc") else layouts.label_map
    score, cut = score_of(name, compat)

    def pairs() -> Iterator[Pair]:
        both = list(zip(paths, truths, strict=True))
        for path, truth in progress_bar(iterable=both, desc=name, disable=None):
            yield fitted(read(path), layout.read(truth.path), cut, path)

    return {
        "protocol": name,
        "compat": compat,
        "split": split,
        "pictures": len(truths),
        "unused predictions": unused,
        "scores": score(pairs()),
    }


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = Parser("python -m benchmarks protocol", description=__doc__)
    parser.add_argument("protocol", choices=[*LAYOUTS])
    parser.add_argument("--data", type=some_path, required=True, help="folder of the data set")
    parser.add_argument(
        "--predictions", type=some_path, required=True,
        help="folder of PNG files: label maps; for saliency and corloc 8-bit grey masks",
    )  # fmt: skip
    parser.add_argument("--split", default="", help="part of the data set; else the published one")
    parser.add_argument("--list", type=some_path, help="file with the names of pictures to score")
    parser.add_argument("--compat", default="", help="score as this published program does")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-o", "--out", type=out_path, help="JSON file for the result")
    args = parser.parse_args(argv)
    if args.compat and args.compat not in (known := COMPAT.get(args.protocol, ())):
        parser.error(
            f"--compat {args.compat} is unknown for {args.protocol}; wanted"
            f" {', '.join(known) or 'none'}"
        )
    return cli.run(lambda: _run(args), as_json=args.json)


def _run(args: Any) -> int:
    check_out(args.out)
    document = evaluate(
        args.protocol,
        args.data,
        args.predictions,
        split=args.split,
        names=None if args.list is None else layouts.listed(args.list),
        compat=args.compat,
    )
    document["environment"] = environment.describe()
    if args.json:
        print(json.dumps(document))
    else:
        part = f" {document['split']}" if document["split"] else ""
        print(f"{args.protocol}{part}, {document['pictures']} pictures")
        rows = [{"score": k, "value": f"{v:.4f}"} for k, v in document["scores"].items()]
        print(as_markdown(rows))
        if document["unused predictions"]:
            print(f"{document['unused predictions']} PNG files belong to no picture")
    if args.out:
        write_json(args.out, document)
    return 0
