"""python -m export train name: name the clusters of a run by pictures with labels.

The labels choose names only. Neither the head nor the choice of the checkpoint depends on them.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from export.train.labels import Classes, LabelSet, some
from export.train.matching import confusion_of, match
from export.train.names import names_entry, write_names
from export.train.run import NAMES, read_entry
from export.train.segunify import SegUnify
from runtime.engines.named_files import shell_word
from runtime.errors import ExitCode, InputError
from runtime.files import shown
from runtime.pictures.files import picture_files
from runtime.tools.cli import Bar, Paths, some_path
from runtime.tools.output import finish

LOG = logging.getLogger("dg.train")
METHOD = SegUnify.name  # whose runs have clusters without names
_NOTE = ", on which the head was trained (--data FOLDER: others)"
_Pair = tuple[np.ndarray, np.ndarray]  # a picture and its labels


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m export train name`` to its parser."""
    parser.add_argument("folder", type=some_path, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--labels",
        type=some_path,
        required=True,
        metavar="DIR",
        help="folder with STEM.png (one channel of ids) or STEM.npy for each picture STEM.jpg",
    )
    parser.add_argument(
        "--classes",
        type=some_path,
        required=True,
        metavar="FILE",
        help='JSON list of names, JSON object {"id": "name"}, or one name per line; equal names '
        "are one class",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        action=Paths,
        metavar="FOLDER",
        help="pictures that have labels (those that the head was trained on)",
    )
    parser.add_argument("--ignore", type=int, metavar="N", help="id of pixels without labels")
    parser.add_argument(
        "--weights", type=some_path, metavar="PATH", help="place of the backbone, if it was moved"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Run the command name: match the clusters with classes, write names.json, and print a table.

    Parameters
    ----------
    args : with the options of :func:`add_options`.

    Returns
    -------
    ExitCode.DONE.

    Raises
    ------
    InputError : the run, a picture, the labels or the classes cannot be used, or no pixel has one
        of the classes; names.json is then not changed.
    BundleError : a file of the run is damaged.
    MissingBackend : a package is not installed.
    """
    from export.models.trained import trained_run

    method = read_entry(args.folder)["method"]
    if method != METHOD:
        raise InputError(
            f"{shown(args.folder)} is a run of {method}; only runs of {METHOD} have clusters "
            "that labels can name",
            fix=f"python -m export --model {shell_word(str(args.folder))} -o NAME.bundle",
        )
    classes = Classes.read(args.classes)
    found = trained_run(args.folder, args.weights)
    data = [*map(Path, args.data or found.entry["data"])]
    files = LabelSet.find(picture_files(data), args.labels)
    preprocess = found.preprocess()
    count = len(classes.names)
    unknown: set[int] = set()
    with Bar(args.quiet) as bar:
        bar.say(f"count the pixels of {len(files.pairs)} pictures")
        pairs = _watched(files.read(classes, args.ignore, unknown), len(files.pairs), bar)
        # The last column counts pixels whose id is in no class.
        counts = confusion_of(found.network, preprocess, pairs, count + 1)
    outside = counts[:, count].sum() / max(1, counts.sum())
    counts = counts[:, :count]
    if not counts.any():
        raise InputError(
            f"no pixel of the labels in {shown(args.labels)} has one of the {len(classes.of_id)} "
            f"ids in {shown(args.classes)}",
            fix='write the ids of the labels: {"7": "road", "8": "sidewalk"}',
        )
    matching = match(counts)
    entry = names_entry(
        matching,
        counts,
        classes.names,
        pictures=len(files.pairs),
        trained_on=args.data is None,
        labels=Path(args.labels).resolve().name,
        head=found.head,
    )
    write_names(args.folder, entry)
    unmatched = sorted({*range(count)} - {*matching.cluster_to_class})
    warnings = []
    if files.missing:
        have = "picture has" if len(files.missing) == 1 else "pictures have"
        warnings.append(f"{len(files.missing)} {have} no labels: {some(files.missing)}")
    if outside:
        ids = some([*map(str, sorted(unknown))])
        warnings.append(
            f"{outside:.1%} of the pixels have ids outside of the classes: {ids}; add them to "
            f"--classes, or leave an id without a meaning out by --ignore {min(unknown)}"
        )
    if unmatched:
        names = [classes.names[number] for number in unmatched]
        warnings.append(f"no cluster has the class {some(names)}")
    for text in warnings:
        LOG.warning(text)
    document = entry | {"run": str(args.folder), "outside": float(outside), "warnings": warnings}
    finish(args.json, document, _table(args.folder, entry))
    return ExitCode.DONE


def _watched(pairs: Iterable[_Pair], count: int, bar: Bar) -> Iterator[_Pair]:
    """Yield the pairs, and show how many of the ``count`` pairs are done."""
    for number, pair in enumerate(pairs, 1):
        yield pair
        bar.progress("pictures", number / count)


def _table(run: Path, entry: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the table: each cluster, its share of the pixels, its name, and how right
    it is."""
    counts = np.array(entry["counts"])
    share = counts.sum(1) / counts.sum()
    width = max(len("name"), *map(len, entry["names"]))
    yield f"{'cluster':>7}  {'name':{width}}  pixels   right     IoU"
    for cluster, (name, number) in enumerate(
        zip(entry["names"], entry["cluster_to_class"], strict=True)
    ):
        right = iou = "-"
        if number >= 0:
            right = f"{counts[cluster, number] / counts[cluster].sum():.1%}"
            iou = f"{entry['iou'][number]:.3f}"
        yield f"{cluster:7}  {name:{width}}  {share[cluster]:6.1%}  {right:>6}  {iou:>6}"
    yield (
        f"accuracy {entry['accuracy']:.3f}, mIoU {entry['miou']:.3f} over the classes that occur, "
        f"on {entry['pictures']} pictures{_NOTE * entry['trained_on']}"
    )
    yield f"saved {shown(run / NAMES)}"
