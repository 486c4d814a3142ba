"""Quality of a prior with and without refinement, on the same pictures with the same truth.

    python -m benchmarks quality [--sets camvid,davis,bsds] [--pictures 12] [--slow 6] [-o DIR]
    python -m benchmarks quality --protocol NAME ...

The second form is the command protocol NAME: it scores the predictions of any program.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from benchmarks import environment
from benchmarks.quality import datasets, evaluators, metrics, protocols
from benchmarks.table import as_markdown, check_out, write_json
from runtime.core.resize import resize, working_picture
from runtime.errors import InputError
from runtime.files import write_atomic
from runtime.prior.kmeans import KMeansPrior
from runtime.prior.network import NetworkPrior
from runtime.tools.cli import Parser, out_path, progress_bar
from sdk import CrfConfig, FilterConfig, RefineConfig, Segmenter
from sdk.image import encode_image
from sdk.result import Result

SEEDS = (0, 1, 2)
SMALL_REGION = 300  # pixels; smaller regions of BSDS pictures are merged
PRIORS = {  # file and input size (height, width), for CamVid's 360 x 480 pictures
    "s=0.5": ("espnetv2_s0.5_cityscapes_512x256.onnx", (368, 480)),
    "s=2.0": ("espnetv2_s2.0_cityscapes_1024x512.onnx", (736, 960)),
}


@dataclass
class Row:
    """The scores of one method.

    Parameters
    ----------
    name : of the method.
    steps : refinement steps of the method.
    scores : measure -> the scores of all pictures; some measures have one score of all pictures.
    counts : CamVid: the confusion matrix of all pictures.
    predictions : BSDS500: (labels, regions, truth) of every picture.
    seconds : the CPU time of every picture.
    """

    name: str
    steps: int
    scores: dict[str, list[float]] = field(default_factory=dict)
    counts: Any = 0
    predictions: list[Any] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, **scores: float) -> None:
        """Append the scores of one picture."""
        for key, value in scores.items():
            self.scores.setdefault(key, []).append(float(value))


# A method is a function of a picture (H, W, 3) uint8 and a guide (h, w, C) float32 probabilities.
# It returns labels (H, W) int32.
Method = Callable[[np.ndarray, np.ndarray], np.ndarray]


def baseline(picture: np.ndarray, guide: np.ndarray) -> np.ndarray:
    """The prior alone: the labels of its probabilities, resized to the picture's size."""
    return resize(guide, *picture.shape[:2]).argmax(-1).astype(np.int32)


def filtered(picture: np.ndarray, guide: np.ndarray) -> np.ndarray:
    """The labels of the prior's probabilities after the guided filter at full size (radius 4)."""
    full = resize(guide, *picture.shape[:2])
    image = picture.astype(np.float32) / 255
    smooth = runtime.guided_filter(image, full, radius=4, eps=1e-3, threads=1)
    return smooth.argmax(-1).astype(np.int32)


def crf(picture: np.ndarray, guide: np.ndarray) -> np.ndarray:
    """The labels of the prior's probabilities after the dense CRF at full size, which has the
    published settings in all rows."""
    full = resize(guide, *picture.shape[:2])
    return runtime.dense_crf(picture, full, threads=1).argmax(-1).astype(np.int32)


def refined_filtered_crf(config: RefineConfig) -> Method:
    """Make a method that refines the guide, filters the enlarged scores with the guided filter, and
    computes the dense CRF of the result."""

    def method(picture: np.ndarray, guide: np.ndarray) -> np.ndarray:
        low = working_picture(picture, *config.working_size(*picture.shape[:2]))
        small = resize(guide, *low.shape[:2])
        found = runtime.refine(low, small, threads=1, **config.options())
        full = resize(found.scores, *picture.shape[:2])
        image, own = picture.astype(np.float32) / 255, FilterConfig()
        smooth = runtime.guided_filter(image, full, radius=own.radius, eps=own.eps, threads=1)
        smooth = smooth.clip(0)  # the linear model can be below 0
        return found.classes[runtime.dense_crf(picture, smooth, threads=1).argmax(-1)]

    return method


def refined(
    config: RefineConfig, filter: FilterConfig | CrfConfig | None, names: list[str] | None
) -> Method:
    """Make a method that refines the guide with a Segmenter.

    Parameters
    ----------
    config : of the refinement.
    filter : the guided filter, the dense CRF, or None: the scores are enlarged bilinearly.
    names : the prior's class names, or None.
    """

    def method(picture: np.ndarray, guide: np.ndarray) -> np.ndarray:
        def prior(_: np.ndarray) -> np.ndarray:
            return guide

        prior.names = names  # type: ignore[attr-defined]
        seg = Segmenter(prior, refine=config, filter=filter, min_area=0, threads=1)
        return seg(picture).labels

    return method


def fast_methods(names: list[str] | None, **options: Any) -> dict[str, tuple[int, Method]]:
    """Return the methods that run on every picture: name -> (steps, method).

    Parameters
    ----------
    names : the prior's class names, or None.
    options : of RefineConfig.
    """
    rows: dict[str, tuple[int, Method]] = {
        "prior": (0, baseline),
        "prior + guided filter": (0, filtered),
        "prior + dense CRF": (0, crf),
    }
    for seed in SEEDS:
        config = RefineConfig(seed=seed, **options)
        tag = "" if seed == 0 else f" (seed {seed})"
        if seed == 0:
            rows["residual, bilinear"] = (10, refined(config, None, names))
        rows[f"residual + guided filter{tag}"] = (10, refined(config, FilterConfig(), names))
    config = RefineConfig(**options)
    rows["residual + dense CRF"] = (10, refined(config, CrfConfig(), names))
    rows["residual + guided filter + dense CRF"] = (10, refined_filtered_crf(config))
    rows["fast + guided filter"] = (
        10,
        refined(RefineConfig.preset("fast", **options), FilterConfig(), names),
    )
    return rows


def slow_methods(names: list[str] | None) -> dict[str, tuple[int, Method]]:
    """Return the published objectives at half size: name -> (steps, method)."""
    rows: dict[str, tuple[int, Method]] = {}
    for preset in ("dynaguide", "dynaseg_fsf"):
        for steps in (20, 200):
            config = RefineConfig.preset(preset, steps=steps)
            rows[f"{preset} + guided filter, {steps} steps"] = (
                steps,
                refined(config, FilterConfig(), names),
            )
    return rows


def run_rows(
    title: str,
    pictures: list[Any],
    guide_of: Callable[[Any, np.ndarray], np.ndarray],
    methods: dict[str, tuple[int, Method]],
    score: Callable[[Row, Any, np.ndarray], None],
) -> list[Row]:
    """Run every method on every picture.

    Parameters
    ----------
    title : of the progress bar.
    pictures : of benchmarks.quality.datasets.
    guide_of : returns the guide of a picture; its arguments are the item of ``pictures`` and the
        decoded picture.
    methods : name -> (steps, method).
    score : adds the scores of one picture to a row; its arguments are the row, the item and the
        labels.

    Returns
    -------
    A row for each method.
    """
    rows = [Row(name, steps) for name, (steps, _) in methods.items()]
    for item in progress_bar(iterable=pictures, desc=title, disable=None):
        picture = item.image()
        guide = guide_of(item, picture)
        for row in rows:
            start = time.process_time()
            labels = methods[row.name][1](picture, guide)
            row.seconds.append(time.process_time() - start)
            score(row, item, labels)
    return rows


def camvid(prior: str, count: int, slow: bool) -> tuple[str, list[Row], str]:
    """Score CamVid frames with a Cityscapes prior.

    Parameters, of all three data sets
    ----------
    prior : one of PRIORS.
    count : number of pictures.
    slow : run the slow methods and the BASELINES instead of all fast methods.

    Returns
    -------
    A title, the rows, and the measure on which :func:`summary` compares them.
    """
    file, size = PRIORS[prior]
    network = NetworkPrior.from_onnx(datasets.prior_path(file), imgsz=size, threads=1)
    table = datasets.camvid_lookup(network.names or [])

    def score(row: Row, item: Any, labels: np.ndarray) -> None:
        truth, predicted = item.truth(), table[labels]
        counts = metrics.confusion(
            predicted, truth, len(datasets.CAMVID_CLASSES), ignore=datasets.CAMVID_VOID
        )
        row.counts = row.counts + counts
        row.add(
            acc=metrics.accuracy(counts),
            F=metrics.boundary_f(predicted, truth, ignore=datasets.CAMVID_VOID),
            band=metrics.band_accuracy(predicted, truth, ignore=datasets.CAMVID_VOID),
        )

    methods = slow_methods(network.names) if slow else {}
    base = fast_methods(network.names)
    methods = {k: v for k, v in base.items() if not slow or k in BASELINES} | methods
    rows = run_rows(
        f"camvid {prior}",
        datasets.camvid(count),
        lambda _, p: datasets.guide_of(network, p),
        methods,
        score,
    )
    for row in rows:
        row.scores["mIoU"] = [metrics.miou(row.counts)]
    return f"CamVid dev, ESPNetv2 {prior} at {size[1]}x{size[0]}", rows, "acc"


def davis(count: int, slow: bool) -> tuple[str, list[Row], str]:
    """Score DAVIS frames with a VOC prior; foreground is every class except background."""
    size = (480, 848)
    network = NetworkPrior.from_onnx(
        datasets.prior_path("espnetv2_s2.0_voc_384x384.onnx"), imgsz=size, threads=1
    )
    frames = datasets.davis()
    frames = [
        frames[i] for i in np.linspace(0, len(frames) - 1, min(count, len(frames))).astype(int)
    ]

    def score(row: Row, item: Any, labels: np.ndarray) -> None:
        predicted, mask = labels != 0, item.mask()
        row.add(
            IoU=metrics.binary_iou(predicted, mask),
            F=metrics.boundary_f(predicted.astype(np.int32), mask.astype(np.int32)),
        )

    base = fast_methods(network.names)
    methods = {k: v for k, v in base.items() if not slow or k in BASELINES}
    methods |= slow_methods(network.names) if slow else {}
    rows = run_rows("davis", frames, lambda _, p: datasets.guide_of(network, p), methods, score)
    return f"DAVIS, ESPNetv2 VOC s=2.0 at {size[1]}x{size[0]}", rows, "IoU"


def bsds(count: int, slow: bool) -> tuple[str, list[Row], str]:
    """Score pictures of BSDS500 val with k-means: the labels themselves ("raw"), and their
    connected regions, of which those with fewer than SMALL_REGION pixels are merged into others."""
    prior = KMeansPrior()
    half = RefineConfig()

    def guide_of(_: Any, picture: np.ndarray) -> np.ndarray:
        size = half.working_size(*picture.shape[:2])
        return prior(picture, resize(picture, *size).astype(np.float32) / 255)

    def score(row: Row, item: Any, labels: np.ndarray) -> None:
        truth = item.annotators()
        regions, _ = runtime.connected_regions(labels, min_area=SMALL_REGION)
        raw = np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.int32)
        row.predictions.append((raw, regions - 1, truth))
        row.add(
            cover_raw=metrics.covering(raw, truth),
            VI_raw=metrics.variation_of_information(raw, truth),
            cover=metrics.covering(regions - 1, truth),
            PRI=metrics.probabilistic_rand(regions - 1, truth),
            VI=metrics.variation_of_information(regions - 1, truth),
            segments=regions.max(),
        )

    base = fast_methods(None)
    base["residual lam=12, offsets 1 2 4 8 + guided filter"] = (
        10,
        refined(RefineConfig(lam=12.0, offsets=(1, 2, 4, 8)), FilterConfig(), None),
    )
    methods = {k: v for k, v in base.items() if not slow or k in BASELINES}
    methods |= slow_methods(None) if slow else {}
    rows = run_rows("bsds", datasets.bsds(count), guide_of, methods, score)
    for row in rows:
        truth = [p[2] for p in row.predictions]
        for i, tag in ((0, "raw"), (1, "regions")):
            maps = [p[i] for p in row.predictions]
            pooled = evaluators.score_regions(zip(maps, truth, strict=True))
            for key in evaluators.PARTS:
                row.scores[f"{key}_{tag}"] = [pooled[key]]
        row.predictions.clear()
    return "BSDS500 val, k-means(5) on Lab", rows, "cover"


# --slow runs these rows, too
BASELINES = ("prior", "prior + guided filter", "prior + dense CRF", "residual + guided filter")
COMPARED = {"vs prior": BASELINES[0], "vs prior+gf": BASELINES[1], "vs prior+crf": BASELINES[2]}


def summary(rows: list[Row], key: str) -> list[dict[str, Any]]:
    """Return for each row the means of its measures, its median seconds, and its comparisons with
    the rows of COMPARED: pictures won - lost, and the mean difference. "worst" is the lowest
    difference of a picture from the prior, in points (hundredths).

    Parameters
    ----------
    rows : of one data set.
    key : the measure on which rows are compared, picture by picture.
    """
    scores = {row.name: row.scores[key] for row in rows}
    out = []
    for row in rows:
        line: dict[str, Any] = {"row": row.name, "steps": row.steps}
        line |= {k: round(float(np.nanmean(v)), 4) for k, v in row.scores.items()}
        line["seconds"] = round(float(np.median(row.seconds)), 3)
        for tag, name in COMPARED.items():
            p = metrics.paired(scores[row.name], scores[name])
            line[tag] = f"{p.wins}-{p.losses} {p.mean:+.4f}" if row.name != name else ""
            if tag == "vs prior":
                worst = 100 * np.nanmin(np.subtract(scores[row.name], scores[name]))
                line["worst"] = f"{worst:+.1f}" if row.name != name else ""
        out.append(line)
    return out


def panels(folder: Path, count: int = 3) -> None:
    """Write ``count`` pictures into a folder, each a photo of CamVid beside the overlays of the
    BASELINES."""
    file, size = PRIORS["s=0.5"]
    network = NetworkPrior.from_onnx(datasets.prior_path(file), imgsz=size)
    for item in datasets.camvid(count):
        picture = item.image()
        guide = datasets.guide_of(network, picture)
        methods = fast_methods(network.names)
        shown = [picture]
        for name in BASELINES:
            labels = methods[name][1](picture, guide)
            ones = np.ones_like(labels)
            shown.append(
                Result(picture, labels, network.names, ones.astype(np.float32), ones, {}, {}, "cpu",
                       "").overlay()
            )  # fmt: skip
        sheet = np.concatenate(shown, 1)
        write_atomic(folder / f"camvid_{item.name}.png", encode_image(sheet, ".png"))


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code.

    Raises
    ------
    InputError : an unknown set, or pictures that are missing; the caller prints it.
    """
    handed = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    handed.add_argument("--protocol", nargs="?", const="")
    found, rest = handed.parse_known_args(argv)
    if found.protocol is not None:
        return protocols.main([found.protocol, *rest])
    parser = Parser("python -m benchmarks quality", description=__doc__)
    parser.add_argument(
        "--sets", default="camvid,davis,bsds", help="data sets, with commas (%(default)s)"
    )
    parser.add_argument("--pictures", type=int, default=12, help="pictures per set (%(default)s)")
    parser.add_argument(
        "--slow", type=int, default=0,
        help="also run dynaguide and dynaseg (20 and 200 steps) on this many pictures per set",
    )  # fmt: skip
    parser.add_argument("-o", "--out", type=out_path, help="folder for quality.json and pictures")
    parser.add_argument(
        "--protocol", metavar="NAME",
        help="score predictions as publications do; see: python -m benchmarks protocol --help",
    )  # fmt: skip
    args = parser.parse_args(argv)
    runners: dict[str, Callable[[int, bool], tuple[str, list[Row], str]]] = {
        "camvid s=0.5": lambda n, slow: camvid("s=0.5", n, slow),
        "camvid s=2.0": lambda n, slow: camvid("s=2.0", n, slow),
        "davis": lambda n, slow: davis(n + n // 2, slow) if not slow else davis(n, slow),
        "bsds": bsds,
    }
    wanted, known = args.sets.split(","), {name.split()[0] for name in runners}
    if unknown := [name for name in wanted if name not in known]:
        raise InputError(
            f"sets has {', '.join(map(repr, unknown))}; wanted some of {', '.join(sorted(known))}",
            fix="--sets camvid,davis",
        )
    check_out(args.out and args.out / "quality.json")
    document: dict[str, Any] = {"environment": environment.describe(), "tables": []}
    for slow in (False, True) if args.slow else (False,):
        for name, runner in runners.items():
            if name.split()[0] not in wanted:
                continue
            title, rows, key = runner(args.slow if slow else args.pictures, slow)
            lines = summary(rows, key)
            title = f"{title}, {len(rows[0].seconds)} pictures"
            print(f"\n{title} (wins-losses and mean difference on {key})")
            print(as_markdown(lines))
            document["tables"].append({"title": title, "key": key, "rows": lines})
            document["tables"][-1]["by_picture"] = {r.name: r.scores[key] for r in rows}
            if args.out:
                write_json(args.out / "quality.json", document)
    if args.out and "camvid" in wanted:
        panels(args.out)
    return 0
