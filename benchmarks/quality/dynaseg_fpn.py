"""DynaSeg with a feature extractor beside the plain network, on pictures of BSDS500 val.

    python -m benchmarks dynaseg_fpn [--pictures 20] [-o FILE]
    python -m benchmarks dynaseg_fpn --table FILE

docs/dynaseg_fpn.md states the protocol. With -o, each row is written when it is computed; the
command adds those that the file lacks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import runtime
from benchmarks import environment
from benchmarks.quality import datasets, metrics
from benchmarks.quality.evaluators import PARTS, part_sizes, pool, score_regions
from benchmarks.quality.protocols import nearest
from benchmarks.quality.runs import Document, Results
from benchmarks.table import as_markdown
from export.guides.dynaseg_fpn import DynasegFpn, DynasegFpnOptions
from runtime.checks import check_count
from runtime.core.config import RefineConfig
from runtime.core.resize import working_picture
from runtime.prior.kmeans import KMeansPrior
from runtime.tools.cli import Parser

PLAIN = "plain network, 50 steps"
# From a picture (H, W, 3) uint8 to labels at working size and why the training stopped.
Method = Callable[[np.ndarray], tuple[np.ndarray, str]]


def pyramid(**options: Any) -> Method:
    """The network with a feature pyramid on EfficientNet-Lite0, with options of
    DynasegFpnOptions."""
    model = DynasegFpn(DynasegFpnOptions(**options))

    def method(picture: np.ndarray) -> tuple[np.ndarray, str]:
        found = model.train(picture)
        return found.labels, f"{found.stop} {len(found.losses)}"

    return method


def plain(steps: int) -> Method:
    """The network of the preset dynaseg_fsf, without a guide."""
    config = RefineConfig.preset("dynaseg_fsf", steps=steps)

    def method(picture: np.ndarray) -> tuple[np.ndarray, str]:
        low = working_picture(picture, *config.working_size(*picture.shape[:2]))
        found = runtime.refine(low, None, threads=1, **config.options())
        return found.labels, f"{found.stats['stop_reason']} {found.stats['steps']}"

    return method


def kmeans(clusters: int) -> Method:
    """K-means on the colours of the same working size."""
    prior = KMeansPrior(clusters)

    def method(picture: np.ndarray) -> tuple[np.ndarray, str]:
        low = working_picture(picture, *RefineConfig().working_size(*picture.shape[:2]))
        return prior(picture, low).argmax(-1).astype(np.int32), ""

    return method


def grid(picture: np.ndarray) -> tuple[np.ndarray, str]:
    """30 cells, whatever the picture shows: what a number of segments alone scores."""
    return nearest(np.arange(30, dtype=np.int32).reshape(5, 6), *picture.shape[:2]), ""


METHODS: dict[str, Callable[[], Method]] = {
    "grid, 30 cells": lambda: grid,
    "k-means, 5 clusters": lambda: kmeans(5),
    "k-means, 26 clusters": lambda: kmeans(26),
    "plain network, 20 steps": lambda: plain(20),
    PLAIN: lambda: plain(50),
    "pyramid, FSF": pyramid,
    "pyramid, FSF, seed 1": lambda: pyramid(seed=1),
    "pyramid, FSF, frozen backbone": lambda: pyramid(frozen=True),
    "pyramid, SCF": lambda: pyramid(weighting="scf"),
}


def measure(document: Document) -> Iterator[str]:
    """Add the rows that ``document`` lacks, one for each method and picture; yields what was added.

    Raises
    ------
    InputError : the data set is missing.
    MissingBackend : torch, SciPy or the weights of the backbone are not installed.
    """
    pictures = datasets.bsds(document["settings"]["pictures"])
    done = {(row["method"], row["picture"]) for row in document["rows"]}
    for name, make in METHODS.items():
        left = [item for item in pictures if (name, item.name) not in done]
        if not left:
            continue
        method = make()
        for item in left:
            picture, annotators = item.image(), item.annotators()
            start = time.process_time()
            labels, stop = method(picture)
            seconds = time.process_time() - start
            scores = score_regions([(nearest(labels, *picture.shape[:2]), annotators)])
            row: dict[str, Any] = {"method": name, "picture": item.name, "stop": stop}
            row |= {key: round(scores[key], 4) for key in (*PARTS, "one-to-one")}
            row |= {"regions": part_sizes(annotators)}
            row |= {"segments": int(scores["segments"]), "seconds": round(seconds, 2)}
            document["rows"].append(row)
            yield f"{name}, {item.name}: all {row['all']:.3f}, {seconds:.1f} s"


def pooled(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The scores over the regions of several pictures together, and their mean."""
    values = np.array([[row[part] for part in PARTS] for row in rows])
    return pool(values, np.array([row["regions"] for row in rows]))


def tables(document: Document) -> str:
    """The table of a document in Markdown: a line for each method that has all pictures. Wins and
    losses beside PLAIN, and the worst picture, are of the mean of the three scores of a picture."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in document["rows"]:
        by_method.setdefault(row["method"], []).append(row)
    for rows in by_method.values():  # pairs are of the same picture, whatever was computed first
        rows.sort(key=lambda row: row["picture"])
    means = {
        name: [float(np.mean([row[part] for part in PARTS])) for row in by_method[name]]
        for name in METHODS
        if len(by_method.get(name, ())) == document["settings"]["pictures"]
    }
    lines = []
    for name, own in means.items():
        rows = by_method[name]
        line: dict[str, Any] = {"method": name}
        line |= {key: f"{value:.3f}" for key, value in pooled(rows).items()}
        line["one-to-one"] = f"{np.mean([row['one-to-one'] for row in rows]):.3f}"
        line["segments"] = f"{np.mean([row['segments'] for row in rows]):.1f}"
        line["seconds"] = f"{np.median([row['seconds'] for row in rows]):.1f}"
        if name != PLAIN and PLAIN in means:
            beside = metrics.paired(own, means[PLAIN])
            line["beside plain"] = f"{beside.wins}-{beside.losses} {beside.mean:+.3f}"
            line["worst change"] = f"{np.subtract(own, means[PLAIN]).min():+.3f}"
        line["worst picture"] = f"{min(own):.3f} {rows[int(np.argmin(own))]['picture']}"
        lines.append(line)
    return as_markdown(lines) if lines else "no method has all pictures yet"


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code.

    Raises
    ------
    InputError : a wrong number, a file of another form, or a data set that is missing.
    """
    parser = Parser("python -m benchmarks dynaseg_fpn", description=__doc__)
    parser.add_argument("--pictures", type=int, default=20, help="pictures (%(default)s)")
    results = Results(tables)
    results.add_options(parser)
    args = parser.parse_args(argv)
    if args.table:
        print(tables(results.read(args.table)))
        return 0
    settings = {"pictures": check_count("pictures", args.pictures, 1, 100)}
    new = {"environment": environment.describe(), "settings": settings, "rows": []}
    document = results.start(args.out, new)
    import torch

    torch.set_num_threads(1)
    results.collect(args.out, document, measure(document))
    return 0
