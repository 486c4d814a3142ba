"""A refinement network that was trained beforehand beside the prior, and a cold refinement.

    python -m benchmarks adapt [--cases NAMES] [--forms NAMES] [--seeds 0,1,2] [-o FILE]
    python -m benchmarks adapt --table FILE

The training is python -m export train refine in a process of its own. docs/adapt_quality.md states
the protocol. With -o, each result is written when it is computed; the command adds those that the
file lacks.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import runtime
from benchmarks import environment
from benchmarks.quality import datasets, metrics
from benchmarks.quality.adapt_tables import packed, tables, unpacked
from benchmarks.quality.run import PRIORS
from benchmarks.quality.runs import Results, name_list, run_module, seed_list
from runtime.core.guide import Guide
from runtime.tools.cli import Parser, option, progress_bar
from sdk import RefineConfig, Segmenter
from sdk.pipeline import Picture, Scored
from sdk.timing import Clock

SEEDS = (0, 1, 2)
STEPS = (0, 2, 10)  # that refine a picture after the training
VOC = ("espnetv2_s2.0_voc_384x384.onnx", (480, 848))  # the prior of DAVIS, and its input size
LEAD = 46  # frames that the first measurement of this kind was trained on


@dataclass(frozen=True)
class Form:
    """A form of the training, with its options of python -m export train refine."""

    name: str
    options: tuple[str, ...]
    blocks: int = 2

    def method(self, steps: int) -> str:
        """The name of its row for a number of steps."""
        return f"{self.name}, {steps} steps"


_LONG = ("--epochs", "4")
FORMS = (
    Form("plain", _LONG),
    Form("held-out", (*_LONG, "--select", "energy", "--every", "20")),
    Form("near cold", (*_LONG, "--select", "cold", "--every", "20")),
    Form("light", (*_LONG, "--augment", "light")),
    Form("slow", (*_LONG, "--lr", "0.01")),
)


@dataclass(frozen=True)
class Case:
    """A prior, pictures to train on, and pictures to test on.

    Parameters
    ----------
    prior : file and input size (height, width).
    trained, tested : the pictures. Those of one ``sequence`` are scored together, too.
    score : returns the main score of a picture, its boundary F and its table of classes, or 0. Its
        arguments are the labels (H, W), the picture and the names of the prior's classes.
    main : the name of the main score, "acc" or "IoU".
    """

    prior: tuple[str, tuple[int, int]]
    trained: Callable[[], list[Any]]
    tested: Callable[[], list[Any]]
    score: Callable[[np.ndarray, Any, list[str]], tuple[float, float, Any]]
    main: str

    def sequences(self) -> list[str]:
        """The sequences that are trained on."""
        return sorted({picture.sequence for picture in self.trained()})


def drives(part: str, *names: str) -> list[datasets.CamvidFrame]:
    """The frames of CamVid's drives that are trained on or tested.

    Parameters
    ----------
    part : "trained", the frames below n // 2 of a drive's n; "tested", those from 0.6 n, rounded
        up.
    names : of the drives; all without names.
    """
    frames: dict[str, list[datasets.CamvidFrame]] = {}
    for known in ("trained", "held_out"):
        for frame in datasets.camvid_drive(known):
            frames.setdefault(frame.sequence, []).append(frame)
    cut = {
        name: own[: len(own) // 2] if part == "trained" else own[-(-6 * len(own) // 10) :]
        for name, own in frames.items()
    }
    return [frame for name in names or cut for frame in cut[name]]


def lead_frames(part: str) -> list[datasets.CamvidFrame]:
    """LEAD frames of drive 0016E5 to train on, and 12 frames of the other drives to test on, both
    evenly spaced."""
    known = {"trained": (LEAD, "trained"), "tested": (12, "held_out")}[part]
    frames = datasets.camvid_drive(known[1])
    chosen = np.linspace(0, len(frames) - 1, min(known[0], len(frames))).round().astype(int)
    return [frames[i] for i in chosen]


def davis(part: str) -> list[datasets.DavisFrame]:
    """Frames of DAVIS: of davis_more the frames 0, 4, ... 16 to train on; from 30 on every third
    one, and those of :func:`datasets.davis`, to test on."""
    frames: dict[str, list[datasets.DavisFrame]] = {}
    for frame in datasets.davis(1, folder="davis_more"):
        frames.setdefault(frame.sequence, []).append(frame)
    if part == "trained":
        return [frame for own in frames.values() for frame in own[:20:4]]
    return [frame for own in frames.values() for frame in own[30::3]] + datasets.davis()


def score_camvid(
    labels: np.ndarray, picture: Any, names: list[str]
) -> tuple[float, float, np.ndarray]:
    """Accuracy, boundary F, and the table of the 11 classes."""
    predicted, void = datasets.camvid_lookup(names)[labels], datasets.CAMVID_VOID
    counts = metrics.confusion(predicted, picture.truth(), void, ignore=void)
    return (
        metrics.accuracy(counts),
        metrics.boundary_f(predicted, picture.truth(), ignore=void),
        counts,
    )


def score_davis(labels: np.ndarray, picture: Any, _: list[str]) -> tuple[float, float, int]:
    """IoU of the foreground, which is every class but the first, and boundary F."""
    predicted, mask = labels != 0, picture.mask()
    return metrics.binary_iou(predicted, mask), metrics.boundary_f(predicted, mask), 0


def _camvid(prior: str, trained: Callable[[], Any], tested: Callable[[], Any]) -> Case:
    return Case(PRIORS[prior], trained, tested, score_camvid, "acc")


_ALL, _TESTED = partial(drives, "trained"), partial(drives, "tested")
_ONE = partial(drives, "trained", "0016E5")
CASES = {
    "camvid s=0.5 all drives": _camvid("s=0.5", _ALL, _TESTED),
    "camvid s=2.0 all drives": _camvid("s=2.0", _ALL, _TESTED),
    "camvid s=0.5 one drive": _camvid("s=0.5", _ONE, _TESTED),
    "camvid s=2.0 one drive": _camvid("s=2.0", _ONE, _TESTED),
    "davis": Case(VOC, partial(davis, "trained"), partial(davis, "tested"), score_davis, "IoU"),
    "as the lead": _camvid("s=0.5", *(partial(lead_frames, p) for p in ("trained", "tested"))),
    "val s=0.5": _camvid("s=0.5", _ALL, datasets.camvid_val),
    "val s=2.0": _camvid("s=2.0", _ALL, datasets.camvid_val),
}
ONCE = ("val s=0.5", "val s=2.0")  # cases that must be named
UNTRAINED: dict[str, dict[str, Any]] = {  # methods, and their options of a Segmenter
    "prior": {"refine": None, "filter": None},
    "prior + guided filter": {"refine": None},
    "cold": {},
    "fast": {"refine": "fast"},
}
BASE = ("prior", "cold")  # what all methods are compared with


class Scores(NamedTuple):
    """The scores of one picture.

    Parameters
    ----------
    picture : the picture.
    main, f, counts : see :class:`Case`.
    stages : the milliseconds of each stage.
    """

    picture: Any
    main: float
    f: float
    counts: Any
    stages: dict[str, float]


# Returns the labels (H, W) of a picture with its guide, and the milliseconds of the stages.
Segment = Callable[[Picture, Guide], tuple[np.ndarray, dict[str, float]]]
_OWN = ("refine", "filter", "postprocess")


@dataclass
class Bench:
    """A case with its prior as a bundle, and its pictures, whose guides are computed once.

    Parameters
    ----------
    case : the case.
    folder : for the bundle, the pictures to train on, and the runs.
    base : the main scores of each picture of "prior" and "cold".
    pictures : those to test on, each with the two forms that the stages take.
    """

    case: Case
    folder: Path
    base: dict[str, list[float]] = field(default_factory=dict)
    pictures: list[tuple[Any, Picture, Guide]] = field(default_factory=list)

    def prepare(self) -> None:
        """Export the prior, and compute the guides of the pictures to test on."""
        name, (height, width) = self.case.prior
        self.prior = self.folder / "prior.bundle"
        run_module(
            "the export of the prior", "export", "--model", datasets.prior_path(name),
            "-o", self.prior, "--imgsz", height, width, "-q",
        )  # fmt: skip
        (self.folder / "pictures").mkdir()
        for number, picture in enumerate(self.case.trained()):
            name = f"{number:04}{picture.image_path.suffix}"
            (self.folder / "pictures" / name).symlink_to(picture.image_path.resolve())
        self.pipeline = self.segmenter().pipeline
        for item in progress_bar(iterable=self.case.tested(), desc="prior", disable=None):
            picture = self.pipeline.prepare(item.image(), Clock())
            self.pictures.append((item, picture, self.pipeline.guide(picture, Clock())[0]))

    def segmenter(self, **options: Any) -> Segmenter:
        """A Segmenter with the prior, which runs in one thread."""
        return Segmenter(self.prior, threads=1, self_test="never", **options)

    def scored(self, segment: Segment) -> list[Scores]:
        """The scores of each picture that is tested."""
        names, scores = self.pipeline.prior.names or [], []
        for item, picture, guide in self.pictures:
            labels, stages = segment(picture, guide)
            main, f, counts = self.case.score(labels, item, names)
            scores.append(Scores(item, round(main, 6), f, counts, stages))
        return scores

    def untrained(self, names: list[str]) -> Iterator[dict[str, Any]]:
        """The rows of some of UNTRAINED. Those of BASE are scored first if they are unknown."""

        def scores(name: str) -> list[Scores]:
            seg = self.segmenter(**UNTRAINED[name])

            def segment(picture: Picture, _: Guide) -> Any:
                result = seg(picture.pixels)
                return result.labels, result.timings

            return self.scored(segment)

        found = {} if self.base else {name: scores(name) for name in BASE}
        self.base |= {name: [one.main for one in known] for name, known in found.items()}
        for name in names:
            yield row(name, found.get(name) or scores(name), self.base)

    def trained(self, form: Form, seed: int, numbers: list[int]) -> Iterator[dict[str, Any]]:
        """Train by a form, and return the row for each of some numbers of steps."""
        from export.train.run import open_run

        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            run, start = Path(place) / "run", time.monotonic()
            run_module(
                f"the training of the form {form.name}", "export", "train", "refine",
                "--model", self.prior, "--threads", 1, "--quiet",
                "--data", self.folder / "pictures", "-o", run, "--seed", seed,
                "--cache", self.folder / "cache", *form.options,
            )  # fmt: skip
            seconds = round(time.monotonic() - start, 1)
            state, step = open_run(run).head()
        config = RefineConfig(blocks=form.blocks)
        for steps in numbers:
            segment = partial(refined, self.pipeline, state, replace(config, steps=steps))
            own = row(form.method(steps), self.scored(segment), self.base)
            own |= {"form": form.name, "seed": seed, "steps": steps, "step": step}
            yield own | {"seconds": seconds}


def row(name: str, scores: list[Scores], base: dict[str, list[float]]) -> dict[str, Any]:
    """The row of a method.

    Parameters
    ----------
    name : of the method.
    scores : of each picture.
    base : the main scores of each picture of "prior" and "cold".

    Returns
    -------
    "main", "F" and "mIoU" (None without classes); for each sequence "in NAME", the mean of main;
    "wins prior" and "wins cold", the numbers of pictures that are better than these; "worst", the
    picture with the largest loss against cold, and "worst gain", the difference; "ms", the median
    of refinement, filter and regions, and "prior ms" (None where the prior was not run).
    """
    main = [one.main for one in scores]
    counts = sum(one.counts for one in scores)
    found: dict[str, Any] = {"method": name, "main": _mean(main)}
    found["F"] = _mean([one.f for one in scores])
    found["mIoU"] = round(metrics.miou(counts), 4) if np.ndim(counts) else None
    for sequence in dict.fromkeys(one.picture.sequence for one in scores):
        own = [one.main for one in scores if one.picture.sequence == sequence]
        found[f"in {sequence}"] = _mean(own)
    gains = np.subtract(main, base["cold"])
    found |= {f"wins {other}": metrics.paired(main, base[other]).wins for other in base}
    found["worst"] = scores[int(gains.argmin())].picture.name
    found["worst gain"] = round(float(gains.min()), 4)
    found["ms"] = _median([sum(one.stages[k] for k in _OWN) for one in scores])
    own = [
        one.stages["preprocess"] + one.stages["prior"] for one in scores if "prior" in one.stages
    ]
    return found | {"prior ms": _median(own) if own else None}


def refined(
    pipeline: Any,
    state: Mapping[str, np.ndarray],
    config: RefineConfig,
    picture: Picture,
    guide: Guide,
) -> tuple[np.ndarray, dict[str, float]]:
    """Segment a picture as a Segmenter does with a bundle that has trained weights.

    Parameters
    ----------
    pipeline : the stages of a Segmenter with the prior.
    state : the trained weights.
    config : of the refinement, with its steps.
    picture, guide : of the pipeline.

    Returns
    -------
    The labels (H, W) int32, and the milliseconds of the stages.
    """
    clock = Clock()
    options = config.options() | {"initial": state, "threads": 1}
    result = runtime.refine(picture.working, guide.array, **options)
    clock.lap("refine")
    scored = Scored(result.scores, result.classes, result.stats, result.labels)
    done = pipeline.finish(picture, scored, [], clock, semantic=True)
    return done.labels, done.timings


def measure(
    names: list[str], forms: list[str], seeds: list[int], cases: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compute the rows that ``cases`` lacks, one after the other, and add them.

    Parameters
    ----------
    names : of CASES.
    forms : names of FORMS.
    seeds : of the training.
    cases : name -> {"main", "own", "base", "rows"}: the name of the main score, the sequences that
        are trained on, the main scores of each picture of "prior" and "cold", and the rows.

    Returns
    -------
    The name of the case, and its new row, one after the other.

    Raises
    ------
    InputError : the data set is missing.
    SdkError : the export of the prior or a training has failed.
    """
    for name in names:
        case = CASES[name]
        known = cases.setdefault(
            name, {"main": case.main, "own": case.sequences(), "base": {}, "rows": []}
        )
        done = {(row["method"], row.get("seed")) for row in known["rows"]}
        plain = [method for method in UNTRAINED if (method, None) not in done]
        trainings = []
        for form, seed in product([form for form in FORMS if form.name in forms], seeds):
            numbers = STEPS if seed == 0 else STEPS[:2]
            lacking = [steps for steps in numbers if (form.method(steps), seed) not in done]
            if lacking:
                trainings.append((form, seed, lacking))
        if not plain and not trainings:
            continue
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(case, Path(folder), known["base"])
            bench.prepare()
            parts = (bench.trained(*training) for training in trainings)
            for row in chain(bench.untrained(plain), chain.from_iterable(parts)):
                known["rows"].append(row)
                yield name, row


def _mean(values: list[float]) -> float:
    return round(float(np.mean(values)), 4)


def _median(values: list[float]) -> float:
    return round(float(np.median(values)), 1)


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code.

    Raises
    ------
    InputError : wrong words, a file of another form, or a data set that is missing.
    SdkError : a training has failed.
    """
    parser = Parser("python -m benchmarks adapt", description=__doc__)
    cases = [name for name in CASES if name not in ONCE]
    forms = [form.name for form in FORMS]
    parser.add_argument(
        "--cases", type=option(partial(name_list, "cases", list(CASES))), default=cases,
        help=f"with commas (all but {', '.join(ONCE)})",
    )  # fmt: skip
    parser.add_argument(
        "--forms", type=option(partial(name_list, "forms", forms)), default=forms,
        help=f"with commas ({','.join(forms)})",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=option(seed_list), default=list(SEEDS), help="with commas (0,1,2)"
    )
    results = Results(tables, "forms", packed, unpacked)
    results.add_options(parser)
    args = parser.parse_args(argv)
    if args.table:
        print(tables(results.read(args.table)))
        return 0
    settings = {form.name: " ".join(form.options) for form in FORMS}
    document = results.start(
        args.out, {"environment": environment.describe(), "forms": settings, "cases": {}}
    )
    added = (
        f"{name}, {row['method']}, seed {row.get('seed', '-')}: {row['main']:.4f}"
        for name, row in measure(args.cases, args.forms, args.seeds, document["cases"])
    )
    results.collect(args.out, document, added)
    return 0
