"""Masks of heads trained by Boosting beside masks that need no training, on frames of DAVIS.

    python -m benchmarks boosting [--seeds 3] [--steps 400] [--runs FOLDER] [-o FILE]
    python -m benchmarks boosting --table FILE

The backbone is EfficientNet-Lite0, the training is python -m export train boosting in a process of
its own. --runs keeps the runs: those that are finished are used again, others are resumed. With -o,
each result is written when it is computed; the command adds those that the file lacks.
docs/boosting_quality.md states the protocol.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import environment
from benchmarks.quality import datasets
from benchmarks.quality.runs import Results, run_module, spread
from benchmarks.quality.saliency import (
    CHOICES,
    SEEDED,
    Frame,
    baselines,
    choose,
    coco_frames,
    davis_frames,
    enlarged,
    max_f,
    score,
    sign_flip,
    with_polarity,
)
from benchmarks.quality.training import features_of
from benchmarks.table import as_markdown, make_folder
from export.backbones.base import LITE0, Backbone
from export.train.run import ENTRY, open_run
from runtime.checks import check_count
from runtime.core.resize import resize
from runtime.files import shown, stat_of
from runtime.tools.cli import Parser, out_path

STEPS, BATCH, LR = 400, 4, 5e-4
SEEDS = 3
SIDE = 192  # pixels: of the squares that are trained on, and the short side that is scored
STEP = 3  # every third frame of DAVIS
KINDS = {  # what is trained, and its options of python -m export train boosting
    "base": ("--no-eq",),
    "L_eq": ("--no-gf",),
    "L_eq, filtered target": (),
}
MASKS = ("coarse", "fine")
POLARITIES = ("area", "border", "truth")
RIVALS = ("centre prior", "centre prior, mean area", "k-means", "normalised cut")


class Method(NamedTuple):
    """A row of the table without its seed.

    Parameters
    ----------
    name : what makes the mask.
    mask : of a head: "coarse" or "fine"; "" for others.
    polarity : the rule that chooses the foreground of a head's mask; "truth": the part with the
        higher IoU, which needs the truth; "" for others.
    filtered : whether the guided filter is applied.
    """

    name: str
    mask: str = ""
    polarity: str = ""
    filtered: bool = False


BASE, LEQ, BOTH = KINDS


def _comparisons() -> list[tuple[Method, Method]]:
    """The pairs of rows that are compared."""
    pairs = []
    for rule in POLARITIES[:2]:
        fine, coarse = (Method(BASE, mask, rule) for mask in ("fine", "coarse"))
        both, filtered = Method(BOTH, "fine", rule), Method(BOTH, "fine", rule, True)
        pairs += [
            (fine._replace(filtered=True), fine),
            (coarse._replace(filtered=True), coarse),
            (Method(LEQ, "fine", rule), fine),
            (Method(LEQ, "coarse", rule), coarse),
            (both, fine),
            (both, Method(LEQ, "fine", rule)),
            (filtered, both),
            (filtered, fine),
            (fine, coarse),
            (filtered, Method(BOTH, "coarse", rule, True)),
            *((ours, Method(name)) for ours in (fine, filtered) for name in RIVALS),
        ]
    fine = Method(BASE, "fine", "border")
    return [
        *pairs,
        (fine, Method(BASE, "fine", "area")),
        (Method(BOTH, "fine", "border"), Method(BOTH, "fine", "area")),
        (Method("k-means", filtered=True), Method("k-means")),
    ]


def load_head(run: Path, channels: int) -> Any:
    """The trained head of a run, in eval mode."""
    import torch

    from export.models.boosting import BoostingHead

    head = BoostingHead(channels)
    head.load_state_dict({k: torch.from_numpy(v) for k, v in open_run(run).head()[0].items()})
    return head.eval()


def head_masks(head: Any, frame: Frame) -> dict[str, np.ndarray]:
    """Both masks of a head for a frame, (h, w) float32, as the head returns them."""
    import torch

    with torch.no_grad():
        coarse, tokens = head.coarse(frame.features)
        fine = head.fine(tokens, _image(frame))
    return {name: mask[0, 0].numpy() for name, mask in zip(MASKS, (coarse, fine), strict=True)}


def _image(frame: Frame) -> Any:
    """The picture as the head wants it: (1, 3, h, w), normalised as for ImageNet."""
    import torch

    from export.models.boosting import IMAGENET_MEAN, IMAGENET_STD, normalised

    colours = torch.from_numpy(frame.pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255)
    return normalised(colours, IMAGENET_MEAN, IMAGENET_STD)


# Training and scoring


def train(run: Path, seed: int, steps: int, *options: str) -> None:
    """Train by python -m export train boosting in a process of its own, or resume a run.

    Raises
    ------
    SdkError : the training has failed.
    """
    resume = ["--resume"] if stat_of(run / ENTRY) is not None else []
    run_module(
        f"the training of {shown(run)}", "export", "train", "boosting", "-o", run, "--seed", seed,
        "--steps", steps, "--batch", BATCH, "--lr", LR, "--imgsz", SIDE, "--threads", 1,
        "--every", 50, *options, "--data", *datasets.boosting_folders(), *resume, quiet=False,
    )  # fmt: skip


@dataclass
class Bench:
    """What all rows share.

    Parameters
    ----------
    runs : the folder of the runs.
    steps : of the training.
    backbone : of the features.
    frames : of DAVIS.
    settings : of a run, which define the normalised cut.
    """

    runs: Path
    steps: int
    backbone: Backbone
    frames: list[Frame] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def run(self, kind: str, seed: int) -> Path:
        """The folder of a run."""
        return self.runs / f"{'-'.join(kind.replace(',', '').split())}-{seed}"

    def trained(self, kind: str, seed: int) -> dict[str, Any]:
        """Train a head unless it is trained; returns the figures of its training."""
        train(self.run(kind, seed), seed, self.steps, *KINDS[kind])
        state = open_run(self.run(kind, seed)).checkpoint.state
        losses = {name: round(value, 4) for name, value in state["losses"].items()}
        per_step = round(1000 * state["seconds"] / state["step"])
        return {"method": kind, "seed": seed, "ms_per_step": per_step, "losses": losses}

    def head_rows(self, kind: str, seed: int) -> list[dict[str, Any]]:
        """The rows of a trained head. The guided filter is not combined with the truth."""
        head = load_head(self.run(kind, seed), self.backbone.channels)
        made = [head_masks(head, frame) for frame in self.frames]
        rows = []
        for name, rule in product(MASKS, POLARITIES):
            pairs = [(pair[name], f) for pair, f in zip(made, self.frames, strict=True)]
            if rule == "truth":
                masks = [better(mask, frame) for mask, frame in pairs]
            else:
                masks = [with_polarity(mask, rule) for mask, _ in pairs]
            for filtered in (False, True)[: 1 if rule == "truth" else 2]:
                rows.append(self.row(Method(kind, name, rule, filtered), seed, masks))
        return rows

    def row(self, method: Method, seed: int, masks: list[np.ndarray]) -> dict[str, Any]:
        """The scores of masks of all frames."""
        large = [
            enlarged(mask, frame.picture, filtered=method.filtered)
            for mask, frame in zip(masks, self.frames, strict=True)
        ]
        scores = [score(mask, f.truth) for mask, f in zip(large, self.frames, strict=True)]
        cuts = [self._ncut(mask, frame) for mask, frame in zip(masks, self.frames, strict=True)]
        ious = np.array([one.iou for one in scores])
        names = np.array([frame.sequence for frame in self.frames])
        best, threshold = max_f(scores)
        worst = int(np.nanargmin(ious))
        return {
            **method._asdict(),
            "seed": seed,
            "acc": round(float(np.mean([one.acc for one in scores])), 4),
            "iou": round(float(np.nanmean(ious)), 4),
            "max_f": round(best, 4),
            "threshold": round(threshold, 3),
            "area": round(float(np.mean([(mask > 0.5).mean() for mask in large])), 4),
            "ncut": round(float(np.mean(cuts)), 4),
            "worst_picture": self.frames[worst].name,
            "worst_iou": round(float(ious[worst]), 4),
            "by_sequence": [
                round(float(np.nanmean(ious[names == name])), 4) for name in dict.fromkeys(names)
            ],
        }

    def _ncut(self, mask: np.ndarray, frame: Frame) -> float:
        """The loss ncut of a mask, which is resized to the size of the features."""
        import torch

        from export.train.boosting_losses import directions, ncut

        size = frame.features.shape[2:]
        small = resize(np.ascontiguousarray(mask)[..., None], *size)[None, None, ..., 0]
        units = directions(frame.features)
        return float(
            ncut(torch.from_numpy(small), units, self.settings["threshold"], self.settings["weak"])
        )


def better(mask: np.ndarray, frame: Frame) -> np.ndarray:
    """The mask or 1 - mask, whichever has the higher IoU."""
    large = enlarged(mask, frame.picture, filtered=False)
    return 1 - mask if score(1 - large, frame.truth).iou > score(large, frame.truth).iou else mask


def times(bench: Bench, kind: str, seed: int) -> list[dict[str, Any]]:
    """Milliseconds of each part for one picture on one thread: the median over 20 frames."""
    import torch

    from runtime import guided_filter

    torch.set_num_threads(1)
    head = load_head(bench.run(kind, seed), bench.backbone.channels)
    frames = [bench.frames[i] for i in np.linspace(0, len(bench.frames) - 1, 20).astype(int)]
    parts: dict[str, Callable[[Frame], Any]] = {
        "backbone": lambda f: features_of(bench.backbone, f.pixels),
        "head, coarse mask": lambda f: head.coarse(f.features),
        "head, fine stages": lambda f: head.fine(head.coarse(f.features)[1], _image(f)),
        "enlarging": lambda f: enlarged(f.truth[::8, ::8], f.picture, filtered=False),
        "guided filter": lambda f: guided_filter(
            f.picture[..., 1], f.truth.astype(np.float32), radius=14, threads=1
        ),
    }
    rows = []
    for name, part in parts.items():
        taken = []
        for frame in frames[:2] + frames:  # the first two warm up
            start = time.perf_counter()
            with torch.no_grad():
                part(frame)
            taken.append(1000 * (time.perf_counter() - start))
        rows.append({"part": name, "ms": round(float(np.median(taken[2:])), 1)})
    return rows


def measure(bench: Bench, seeds: Sequence[int], document: dict[str, Any]) -> Iterator[str]:
    """Add what ``document`` lacks, part by part; yields what was added.

    Raises
    ------
    InputError : a data set is missing.
    SdkError : a training has failed.
    """
    wanted = [(kind, seed) for seed in seeds for kind in KINDS]
    trained = {(row["method"], row["seed"]) for row in document["trainings"]}
    for kind, seed in wanted:
        if (kind, seed) not in trained:
            document["trainings"].append(bench.trained(kind, seed))
            yield f"{kind}, seed {seed}: trained"
    coco = [] if document["choices"] else coco_frames(bench.backbone, SIDE)
    if coco:
        document["choices"] = choose(coco)
        document["area"] = round(float(np.mean([frame.truth.mean() for frame in coco])), 4)
        yield "the settings of the baselines: chosen"
    bench.frames = davis_frames(bench.backbone, SIDE, STEP)
    document["sequences"] = [*dict.fromkeys(frame.sequence for frame in bench.frames)]
    done = {(row["name"], row["seed"]) for row in document["rows"]}
    rows = document["choices"]
    chosen = {
        name: max((r for r in rows if r["baseline"] == name), key=lambda r: r["iou"])["value"]
        for name in CHOICES
    }
    bench.settings = open_run(bench.run(BASE, seeds[0])).entry["settings"]
    for name, mask in baselines(chosen, document["area"], bench.settings).items():
        for seed in seeds if name in SEEDED else seeds[:1]:
            if (name, seed) not in done:
                masks = [mask(frame, seed) for frame in bench.frames]
                methods = [Method(name, filtered=filtered) for filtered in (False, True)]
                document["rows"] += [bench.row(method, seed, masks) for method in methods]
                yield f"{name}, seed {seed}: IoU {document['rows'][-2]['iou']:.3f}"
    for kind, seed in wanted:
        if (kind, seed) not in done:
            document["rows"] += bench.head_rows(kind, seed)
            yield f"{kind}, seed {seed}: IoU {document['rows'][-5]['iou']:.3f}"
    if not document["times"]:
        document["times"] = times(bench, BASE, seeds[0])
        yield "times: measured"


def tables(document: dict[str, Any]) -> str:
    """The tables of a document in Markdown. A cell is the mean over the seeds, and in brackets the
    lowest and the highest."""
    groups: dict[Method, list[dict[str, Any]]] = {}
    for row in document["rows"]:
        groups.setdefault(Method(*(row[key] for key in Method._fields)), []).append(row)
    names = document["sequences"]
    trainings = [
        {"method": r["method"], "seed": f"{r['seed']}", "ms per step": f"{r['ms_per_step']}"}
        | {name: f"{value:.4f}" for name, value in r["losses"].items()}
        for r in document["trainings"]
    ]
    pairs = [pair for pair in _comparisons() if pair[0] in groups and pair[1] in groups]
    parts = {
        "Scores": [_scores(*group, names) for group in groups.items()],
        "Differences of IoU": [_difference(*pair, groups, names) for pair in pairs],
        "IoU of each sequence": [_sequences(*group, names) for group in groups.items()],
        "Settings of the baselines": [
            {"baseline": r["baseline"], "value": f"{r['value']:g}", "IoU": f"{r['iou']:.3f}"}
            for r in document["choices"]
        ],
        "Training, means of the last rows of log.csv": trainings,
        "Times": [{"part": r["part"], "ms": f"{r['ms']:.1f}"} for r in document["times"]],
    }
    return "\n\n".join(
        f"**{title}**\n\n{as_markdown(rows)}" for title, rows in parts.items() if rows
    )


def _label(method: Method) -> dict[str, str]:
    filtered = "yes" if method.filtered else "no"
    return {
        "method": method.name,
        "mask": method.mask,
        "polarity": method.polarity,
        "guided filter": filtered,
    }


def _mean_by_sequence(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.mean([row["by_sequence"] for row in rows], axis=0)


def _scores(method: Method, rows: list[dict[str, Any]], names: list[str]) -> dict[str, str]:
    """One row of the first table."""
    titles = {"acc": "acc", "iou": "IoU", "max_f": "max F", "area": "area", "ncut": "ncut"}
    by_sequence = _mean_by_sequence(rows)
    last, worst = int(by_sequence.argmin()), min(rows, key=lambda row: row["worst_iou"])
    return (
        _label(method)
        | {title: spread([row[key] for row in rows]) for key, title in titles.items()}
        | {"worst sequence": f"{names[last]}: {by_sequence[last]:.3f}"}
        | {"worst picture": f"{worst['worst_picture']}: {worst['worst_iou']:.3f}"}
    )


def _sequences(method: Method, rows: list[dict[str, Any]], names: list[str]) -> dict[str, str]:
    values = zip(names, _mean_by_sequence(rows), strict=True)
    return _label(method) | {name: f"{value:.3f}" for name, value in values}


def _difference(
    ours: Method,
    theirs: Method,
    groups: dict[Method, list[dict[str, Any]]],
    names: list[str],
) -> dict[str, str]:
    """Two methods, compared by sequence. The seeds are averaged first."""
    difference = _mean_by_sequence(groups[ours]) - _mean_by_sequence(groups[theirs])
    means = [{r["seed"]: r["iou"] for r in groups[method]} for method in (ours, theirs)]
    if len(means[1]) == 1:  # a baseline without random numbers
        means[1] = dict.fromkeys(means[0], *means[1].values())
    both = [means[0][seed] - means[1][seed] for seed in means[0] if seed in means[1]]
    worst = int(difference.argmin())
    return {
        "first": _text(ours),
        "second": _text(theirs),
        "first - second": f"{difference.mean():+.3f}",
        "better sequences": f"{(difference > 0).sum()} of {len(difference)}",
        "better seeds": f"{sum(value > 0 for value in both)} of {len(both)}",
        "worst sequence": f"{names[worst]}: {difference[worst]:+.3f}",
        "p": f"{sign_flip(difference):.3f}",
    }


def _text(method: Method) -> str:
    words = [method.name, method.mask, method.polarity, "filtered" if method.filtered else ""]
    return ", ".join(word for word in words if word)


def settings(steps: int) -> dict[str, Any]:
    """All that results depend on besides method and seed."""
    import torch

    return {
        "fixed": "2026-11-30", "backbone": LITE0, "steps": steps, "batch": BATCH, "lr": LR,
        "side": SIDE, "every": STEP, "torch": str(torch.__version__),
    }  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code.

    Raises
    ------
    InputError : wrong words, a file of another form, or a data set that is missing.
    SdkError : a training has failed.
    """
    parser = Parser("python -m benchmarks boosting", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the training (%(default)s)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="their number (%(default)s)")
    parser.add_argument(
        "--runs", type=out_path, metavar="FOLDER", help="keeps the trained runs (a temporary one)"
    )
    results = Results(tables)
    results.add_options(parser)
    args = parser.parse_args(argv)
    if args.table:
        print(tables(results.read(args.table)))
        return 0
    check_count("steps", args.steps, 1, 10**9)
    check_count("seeds", args.seeds, 1, 1000)
    new: dict[str, Any] = {
        "environment": environment.describe(),
        "settings": settings(args.steps),
        "sequences": [], "trainings": [], "choices": [], "area": 0.0, "rows": [], "times": [],
    }  # fmt: skip
    document = results.start(args.out, new)

    from export.backbones.load import load_backbone

    with ExitStack() as stack:
        runs = args.runs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_folder(runs)
        bench = Bench(runs, args.steps, load_backbone(LITE0))
        results.collect(args.out, document, measure(bench, range(args.seeds), document))
    return 0
