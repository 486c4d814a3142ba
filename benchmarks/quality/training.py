"""Heads trained by SegUnify beside k-means on the same features, on pictures trained on and not.

    python -m benchmarks training [--steps 600] [--seeds 0,1,2] [--data coco_mini,camvid] [-o FILE]
    python -m benchmarks training --table FILE

The backbone is EfficientNet-Lite0, the training is python -m export train segunify in a process of
its own. docs/training_quality.md states the protocol, and when which setting was fixed. With -o,
each result is written when it is computed; the command adds those that the file lacks.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment
from benchmarks.quality import datasets
from benchmarks.quality.runs import Results, name_list, run_module, seed_list, spread
from benchmarks.table import as_markdown
from export.backbones.base import LITE0, Backbone
from export.train.views import ViewRule, view_pixels
from runtime.checks import check_count
from runtime.core.resize import resize
from runtime.device.choose import default_threads
from runtime.files import shown, stat_of
from runtime.opencv import cv2
from runtime.tools.cli import Parser, option

STEPS = 600
SHORTER = 5  # the training is so much shorter than the published one of 3000 steps
LR, EMA = 1e-4 * SHORTER, round(0.998**SHORTER, 3)  # each step stands for so many published ones
SEEDS = (0, 1, 2)
VIEW = 224  # pixels, the side of the views that are trained on
COCO_SIDE = 320  # pixels: the middle squares that are scored
CAMVID_SIZE = (320, 432)  # pixels of the backbone's input; the truth has 360 x 480
PARTS = ("trained", "held_out")
USED = 0.001  # a cluster with a smaller share of the held-out pixels counts as unused


@dataclass(frozen=True)
class Trial:
    """A method with its settings: a row of the tables.

    Parameters
    ----------
    method : its name in the tables.
    kind : "one", "random", "k-means", "k-means L2" or "segunify".
    features : of the backbone.
    crops : of the views that are trained on.
    flip : score the mean with the mirror image.
    crf : score the labels after the dense CRF, which has its published settings.
    published : SHORTER times as many steps with the published rates, on the first seed alone.
    options : further options of python -m export train segunify.
    """

    method: str
    kind: str
    features: str = "block15"
    crops: str = "centre"
    flip: bool = False
    crf: bool = False
    published: bool = False
    options: tuple[str, ...] = ()


TRIALS = (
    Trial("one cluster", "one"),
    Trial("random clusters", "random"),
    Trial("k-means", "k-means"),
    Trial("k-means L2", "k-means L2"),
    Trial("k-means L2, flip", "k-means L2", flip=True),
    Trial("k-means L2, five crops", "k-means L2", crops="five"),
    Trial("SegUnify", "segunify"),
    Trial("SegUnify, flip", "segunify", flip=True),
    Trial("SegUnify, dense CRF", "segunify", crf=True),
    Trial("SegUnify, as long as published", "segunify", published=True),
    Trial("SegUnify, five crops", "segunify", crops="five"),
    Trial("SegUnify, no final SiLU", "segunify", options=("--no-final-silu",)),
    Trial("SegUnify, SmooSeg's projector", "segunify", options=("--projector", "smooseg")),
    Trial(
        "SegUnify, DINO's shifts", "segunify",
        options=("--intra-shift", "-0.02", "--inter-shift", "0.48"),
    ),
    Trial("k-means, block10+15", "k-means", "block10+15"),
    Trial("k-means L2, block10+15", "k-means L2", "block10+15"),
    Trial("SegUnify, block10+15", "segunify", "block10+15"),
)  # fmt: skip


@dataclass(frozen=True)
class DataSet:
    """Pictures that are trained on and pictures that are not.

    Parameters
    ----------
    classes : their number, which is the number of clusters too.
    pictures : of each of PARTS.
    pixels : the pixels that are scored, (h, w, 3) uint8, sides multiples of 16.
    truth : the classes of a picture, (H, W) integer; numbers from ``classes`` on are not scored.
    """

    classes: int
    pictures: dict[str, list[Any]]
    pixels: Callable[[Any], np.ndarray]
    truth: Callable[[Any], np.ndarray]


def coco_mini() -> DataSet:
    """COCO-panoptic-derived 27: the short side is resized to COCO_SIDE, and the middle square is
    scored; the truth is resized to the nearest pixel."""

    def truth(picture: Any) -> np.ndarray:
        classes = picture.truth()
        height, width = classes.shape
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = np.ascontiguousarray(classes[top : top + side, left : left + side])
        return cv2.resize(square, (COCO_SIDE,) * 2, interpolation=cv2.INTER_NEAREST_EXACT)

    return DataSet(
        len(datasets.coco_classes()[0]),
        {part: datasets.coco_mini(part) for part in PARTS},
        lambda picture: view_pixels(picture.image(), ViewRule(size=COCO_SIDE), 0),
        truth,
    )


def camvid() -> DataSet:
    """CamVid by drive: whole pictures at CAMVID_SIZE; the truth has its own size."""
    return DataSet(
        len(datasets.CAMVID_CLASSES),
        {part: datasets.camvid_drive(part) for part in PARTS},
        lambda picture: resize(picture.image(), *CAMVID_SIZE),
        lambda picture: picture.truth(),
    )


DATA: dict[str, Callable[[], DataSet]] = {"coco_mini": coco_mini, "camvid": camvid}


@dataclass
class Bench:
    """What the trials of one data set and one kind of features share.

    Parameters
    ----------
    folder : for runs and for the cache of features.
    data : the pictures.
    backbone : of the features.
    steps : of the training.
    scored : (features, features of the mirror image, truth, pixels of the truth's size) of the
        pictures of each part.
    made : the clusters and the figures of trials that were made.
    """

    folder: Path
    data: DataSet
    backbone: Backbone
    steps: int
    scored: dict[str, list[tuple[Any, Any, np.ndarray, np.ndarray]]] = field(default_factory=dict)
    made: dict[tuple[Any, ...], tuple[Any, dict[str, Any]]] = field(default_factory=dict)

    def prepare(self) -> None:
        """Compute the features of the pictures that are scored."""
        for part, pictures in self.data.pictures.items():
            self.scored[part] = []
            for picture in pictures:
                pixels = self.data.pixels(picture)
                pair = [features_of(self.backbone, p) for p in (pixels, pixels[:, ::-1])]
                truth = self.data.truth(picture)
                shown = pixels if pixels.shape[:2] == truth.shape else picture.image()
                self.scored[part].append((*pair, truth, shown))

    def clusters(self, trial: Trial, seed: int) -> tuple[Any, dict[str, Any]]:
        """The clusters of a trial, and the figures of their training. Trials that differ by
        ``flip`` or ``crf`` alone have the same clusters."""
        key = (trial.kind, trial.crops, trial.published, trial.options, seed)
        if key not in self.made:
            self.made[key] = self._made(trial, seed)
        return self.made[key]

    def _made(self, trial: Trial, seed: int) -> tuple[Any, dict[str, Any]]:
        from benchmarks.quality import clusters

        count = self.data.classes
        if trial.kind == "segunify":
            return self._trained(trial, seed)
        if trial.kind == "one":
            return clusters.one_cluster(count), {}
        if trial.kind == "random":
            return clusters.random_clusters(count, seed), {}
        unit = trial.kind == "k-means L2"
        return clusters.kmeans_clusters(self._points(trial.crops), count, seed, unit=unit), {}

    def _points(self, crops: str) -> Any:
        """The features of all positions of the views that are trained on: (n, C)."""
        from export.train.features import FeatureBatches

        rule = ViewRule(size=VIEW, crops=crops)
        files = [picture.image_path for picture in self.data.pictures["trained"]]
        batches = FeatureBatches(files, rule, self.backbone, batch=1, seed=0, device="cpu")
        return batches.of(range(batches.views)).permute(0, 2, 3, 1).flatten(0, 2)

    def _trained(self, trial: Trial, seed: int) -> tuple[Any, dict[str, Any]]:
        """Train a head by the command line, and return its clusters and the figures."""
        from benchmarks.quality.clusters import head_clusters
        from export.models.segunify import SegUnifyNetwork
        from export.models.trained import trained_run

        pictures = self.folder / "pictures"
        if stat_of(pictures) is None:
            pictures.mkdir()
            for picture in self.data.pictures["trained"]:
                (pictures / picture.image_path.name).symlink_to(picture.image_path.resolve())
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            run = Path(place) / "run"
            figures = train(
                pictures, run, "--clusters", self.data.classes, "--features", trial.features,
                "--crops", trial.crops, "--imgsz", VIEW, "--seed", seed,
                "--cache", self.folder / "cache", *self._length(trial), *trial.options,
            )  # fmt: skip
            found = trained_run(run)
        settings = found.entry["settings"]
        figures["shifts"] = [settings["intra_shift"], settings["inter_shift"]]
        assert isinstance(found.network, SegUnifyNetwork)
        return head_clusters(found.network.head), figures

    def _length(self, trial: Trial) -> tuple[Any, ...]:
        """The options for the number of steps and the rates that fit it."""
        if trial.published:
            return ("--steps", SHORTER * self.steps)
        return ("--steps", self.steps, "--lr", LR, "--ema", EMA)

    def row(self, trial: Trial, seed: int) -> dict[str, Any]:
        """Score a trial on the pictures of both parts."""
        import torch

        from benchmarks.quality.clusters import energy, score
        from export.train.matching import confusion
        from export.train.shifts import estimate_shifts

        found, figures = self.clusters(trial, seed)
        features = torch.cat([own for own, *_ in self.scored["trained"]])
        shifts = estimate_shifts(features, self.data.classes)
        certain = energy(found.scores(features).argmax(1), features, shifts)
        shape = (self.data.classes,) * 2
        counts = {
            part: [
                confusion(
                    found.crf_labels(features, shown)
                    if trial.crf
                    else found.labels(features, truth.shape, mirrored if trial.flip else None),
                    truth.astype(np.int64),
                    shape,
                )
                for features, mirrored, truth, shown in pictures
            ]
            for part, pictures in self.scored.items()
        }
        trained, held = (score(counts[part]) for part in PARTS)
        moved = score(counts["held_out"], trained["matching"])
        worst = int(np.nanargmin(moved["by_picture"]))
        share = np.sum(counts["held_out"], axis=(0, 2)) / np.sum(counts["held_out"])
        row: dict[str, Any] = {"method": trial.method, "seed": seed}
        for name, one in (("trained", trained), ("held_out", held), ("held_out_moved", moved)):
            row |= {f"{name}_acc": round(one["acc"], 4), f"{name}_miou": round(one["miou"], 4)}
        row["worst_picture"] = self.data.pictures["held_out"][worst].name
        row["worst_acc"] = round(moved["by_picture"][worst], 4)
        return row | {"clusters": int((share >= USED).sum()), "energy": round(certain, 4)} | figures


def features_of(backbone: Backbone, pixels: np.ndarray) -> Any:
    """The features (1, C, h / stride, w / stride) of (h, w, 3) uint8 RGB pixels."""
    import torch

    mean, std = (np.array(colour, np.float32) for colour in (backbone.mean, backbone.std))
    colours = (pixels.astype(np.float32) / 255 - mean) / std
    with torch.no_grad():
        return backbone.module(torch.from_numpy(colours.transpose(2, 0, 1)[None].copy()))


def train(pictures: Path, run: Path, *options: Any) -> dict[str, Any]:
    """Train by python -m export train segunify in a process of its own.

    Parameters
    ----------
    pictures : the folder of the pictures.
    run : the folder of the run.
    options : further words of the command line.

    Returns
    -------
    "ms_per_step": the median over the rows of log.csv, "peak_mib": the peak memory of the process,
    "losses": the means of the last rows' steps.

    Raises
    ------
    SdkError : the training has failed.
    """
    peak = run_module(
        f"the training of {shown(run)}", "export", "train", "segunify", "--data", pictures,
        "-o", run, "--threads", default_threads(), "--quiet", *options,
    )  # fmt: skip
    with (run / "log.csv").open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    steps, seconds = ([0.0] + [row[key] for row in rows] for key in ("step", "seconds"))
    return {
        "ms_per_step": round(float(np.median(1000 * np.diff(seconds) / np.diff(steps))), 1),
        "peak_mib": peak,
        "losses": {k: round(v, 4) for k, v in rows[-1].items() if k not in ("step", "seconds")},
    }


def measure(
    names: list[str], steps: int, seeds: list[int], rows: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Compute the rows that ``rows`` lacks, one after the other.

    Parameters
    ----------
    names : of data sets, of DATA.
    steps, seeds : of the training; k-means has the same seeds.
    rows : those that are known.

    Raises
    ------
    InputError : a data set is missing.
    SdkError : a training has failed.
    """
    import torch

    from export.backbones.load import load_backbone

    torch.set_num_threads(default_threads())
    done = {(row["data"], row["method"], row["seed"]) for row in rows}
    for name in names:
        data = DATA[name]()
        for features in dict.fromkeys(trial.features for trial in TRIALS):
            wanted = [
                (trial, seed)
                for trial in TRIALS
                for seed in (seeds[:1] if trial.kind == "one" or trial.published else seeds)
                if trial.features == features and (name, trial.method, seed) not in done
            ]
            if not wanted:
                continue
            with tempfile.TemporaryDirectory() as folder:
                backbone = load_backbone(LITE0, features)
                bench = Bench(Path(folder), data, backbone, steps)
                bench.prepare()
                for trial, seed in wanted:
                    yield {"data": name} | bench.row(trial, seed)


def tables(document: dict[str, Any]) -> str:
    """The tables of a document in Markdown: for each data set the scores, then the cost of
    training. A cell is the mean over the seeds, and in brackets the lowest and the highest."""
    parts = []
    for name in dict.fromkeys(row["data"] for row in document["rows"]):
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in document["rows"]:
            if row["data"] == name:
                groups.setdefault(row["method"], []).append(row)
        scores = [_scores(method, rows) for method, rows in groups.items()]
        costs = [_costs(method, rows) for method, rows in groups.items() if "shifts" in rows[0]]
        steps = document["settings"]["steps"]
        parts += [f"**{name}, {steps} steps: scores**", as_markdown(scores)]
        parts += [f"**{name}, {steps} steps: training**", as_markdown(costs)] if costs else []
    return "\n\n".join(parts)


def _scores(method: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    titles = {
        "trained_acc": "trained acc", "trained_miou": "trained mIoU",
        "held_out_acc": "held-out acc", "held_out_miou": "held-out mIoU",
        "held_out_moved_acc": "moved acc", "held_out_moved_miou": "moved mIoU",
    }  # fmt: skip
    titles["energy"] = "energy"
    cells = {title: spread([row[key] for row in rows], 3) for key, title in titles.items()}
    last = min(rows, key=lambda row: row["held_out_moved_miou"])
    worst = min(rows, key=lambda row: row["worst_acc"])
    return (
        {"method": method}
        | cells
        | {"worst seed": f"{last['seed']}", "clusters": spread([r["clusters"] for r in rows], 0)}
        | {"worst picture": f"{worst['worst_picture']}: {worst['worst_acc']:.3f}"}
    )


def _costs(method: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    shifts = [spread([row["shifts"][i] for row in rows], 3) for i in range(2)]
    losses = {name: spread([row["losses"][name] for row in rows], 3) for name in rows[0]["losses"]}
    return {
        "method": method,
        "b1": shifts[0],
        "b2": shifts[1],
        **losses,
        "ms per step": spread([row["ms_per_step"] for row in rows], 0),
        "peak MiB": spread([row["peak_mib"] for row in rows if "peak_mib" in row], 0),
    }


def settings(steps: int) -> dict[str, Any]:
    """All that results depend on besides data set, method and seed."""
    import torch

    from benchmarks.quality.clusters import ITERATIONS, RESTARTS

    return {
        "fixed": "2026-11-30", "backbone": LITE0, "steps": steps, "lr": LR, "ema": EMA,
        "view": VIEW, "coco_side": COCO_SIDE, "camvid_size": list(CAMVID_SIZE),
        "kmeans_restarts": RESTARTS, "kmeans_iterations": ITERATIONS, "threads": default_threads(),
        "torch": str(torch.__version__),
    }  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code.

    Raises
    ------
    InputError : wrong words, a file of another form, or a data set that is missing.
    SdkError : a training has failed.
    """
    parser = Parser("python -m benchmarks training", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the training (%(default)s)")
    parser.add_argument(
        "--seeds", type=option(seed_list), default=list(SEEDS), help="with commas (0,1,2)"
    )
    parser.add_argument(
        "--data", type=option(partial(name_list, "data", list(DATA))), default=list(DATA),
        help=f"data sets ({','.join(DATA)})",
    )  # fmt: skip
    results = Results(tables)
    results.add_options(parser)
    args = parser.parse_args(argv)
    if args.table:
        print(tables(results.read(args.table)))
        return 0
    check_count("steps", args.steps, 1, 10**9)
    document = results.start(
        args.out,
        {"environment": environment.describe(), "settings": settings(args.steps), "rows": []},
    )

    def added() -> Iterator[str]:
        for row in measure(args.data, args.steps, args.seeds, document["rows"]):
            document["rows"].append(row)
            yield (
                f"{row['data']}, {row['method']}, seed {row['seed']}:"
                f" held-out mIoU {row['held_out_moved_miou']:.3f}"
            )

    results.collect(args.out, document, added())
    return 0
