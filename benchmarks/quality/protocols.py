"""Score the predictions of any program as publications do, each of them by its own protocol.

    python -m benchmarks protocol bsds500 --data BSR --predictions FOLDER

docs/protocols.md states what each protocol measures and which published column it belongs to.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment
from benchmarks.quality import evaluators, layouts, predictions
from benchmarks.quality.evaluators import Pair, Scores
from benchmarks.quality.layouts import LAYOUTS, Boxes, Layout
from benchmarks.table import as_markdown, check_out, write_json
from runtime.errors import InputError
from runtime.files import shown
from runtime.tools import cli
from runtime.tools.cli import Parser, out_path, progress_bar, some_path

COMPAT = {  # the evaluators of published programs, beside the protocols that they replace
    "bsds500": ("dynaguide",), "voc2012": ("dynaguide",), "coco27": ("diffseg", "dynaseg"),
    "cityscapes27": ("diffseg",),
}  # fmt: skip
CROP, DIFFSEG_SIDE, POTSDAM_SIDE = 320, 512, 224  # pixels
MASKS = ("saliency", "corloc", "coco20k")  # their predictions are masks of the foreground
DYNASEG_SIZE = 640, 480  # height and width, to which each picture is stretched


def nearest(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a label map to the label at the middle of each new pixel. As in PIL, each middle is a
    sum of steps, whose rounding decides for a middle on the edge of two pixels."""
    both = zip((height, width), labels.shape, strict=True)
    steps = [np.full(new, old / new) for new, old in both]
    for step in steps:
        step[0] /= 2
    rows, columns = (np.cumsum(step).astype(int) for step in steps)
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
    height, width = DYNASEG_SIZE
    programs: dict[str, tuple[Callable[[Iterable[Pair]], Scores], Any]] = {
        "diffseg": (
            partial(evaluators.score_each_by_itself, classes=27),
            partial(square_first, side=DIFFSEG_SIDE),
        ),
        "dynaseg": (evaluators.score_as_dynaseg, partial(nearest, height=height, width=width)),
    }
    if compat in programs:
        return programs[compat]
    if name in ("coco27", "cityscapes27"):
        scores = partial(evaluators.score_clusters, classes=27, stuff=name == "coco27")
        return scores, partial(middle_square, side=CROP)
    if name == "potsdam3":
        cut = partial(tile, side=POTSDAM_SIDE)
        return partial(evaluators.score_clusters, classes=3), cut
    regions = {"bsds500": evaluators.score_regions, "voc2012": evaluators.score_segments}
    if name in regions:
        return partial(regions[name], compat=compat), None
    others = {
        "saliency": evaluators.score_saliency,
        "corloc": evaluators.score_corloc,
        "coco20k": evaluators.score_corloc,
        "davis": evaluators.score_davis,
    }
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
    names : lines that name the pictures to score, as layouts.chosen reads them; None for all.
    compat : "", or one of COMPAT of this protocol.

    Returns
    -------
    "protocol", "compat", "split"; "pictures", their number; "published pictures", the numbers of
    pictures of the published part that publications score, one for each data set; "unused
    predictions", the number of PNG files of other pictures; "scores", each name with its number.

    Raises
    ------
    InputError : a file is missing or cannot be read, or has the wrong form or size; a picture has
        several truths.
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
    every = [truth.name for truth in truths]
    picture, count = Counter(every).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"{shown(data)} contains {count} truths of picture {picture}", fix="leave one of them"
        )
    if names is not None:
        truths = layouts.chosen(truths, names)
    paths, unused = predictions.find(folder, [truth.name for truth in truths], every)
    read = predictions.grey_mask if name in MASKS else predictions.label_map
    score, cut = score_of(name, compat)

    def pairs() -> Iterator[Pair]:
        both = list(zip(paths, truths, strict=True))
        for path, truth in progress_bar(iterable=both, desc=name, disable=None):
            yield fitted(read(path), layout.read(truth.source), cut, path)

    return {
        "protocol": name,
        "compat": compat,
        "split": split,
        "pictures": len(truths),
        "published pictures": list(layout.pictures),
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
        help=f"folder of PNG files: label maps; for {', '.join(MASKS)} 8-bit grey masks",
    )  # fmt: skip
    parser.add_argument("--split", default="", help="part of the data set; else the published one")
    parser.add_argument("--list", type=some_path, help="file with the names of pictures to score")
    parser.add_argument("--compat", default="", help="score as this published program does")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-o", "--out", type=out_path, help="JSON file for the result")
    args = parser.parse_args(argv)
    if args.compat and args.compat not in (known := COMPAT.get(args.protocol, ())):
        wanted = f"; wanted {', '.join(known)}" if known else ", which has no such mode"
        parser.error(f"--compat {args.compat} is unknown for {args.protocol}{wanted}")
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
        layout, numbers = LAYOUTS[args.protocol], document["published pictures"]
        other = document["split"] != layout.split or document["pictures"] not in numbers
        if numbers and other:
            counts = " or ".join(map(str, numbers))
            whole = f" of the part {layout.split}" if layout.split else ""
            print(f"publications score {counts} pictures{whole}")
        rows = [{"score": k, "value": f"{v:.4f}"} for k, v in document["scores"].items()]
        print(as_markdown(rows))
        if document["unused predictions"]:
            print(f"{document['unused predictions']} PNG files belong to no picture")
    if args.out:
        write_json(args.out, document)
    return 0
