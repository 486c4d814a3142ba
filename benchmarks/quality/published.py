"""DynaGuide and DynaSeg scored by each rule that their published BSDS500 tables may rest on.

    python -m benchmarks published [--pictures 20] [--long 3] [--threads 1] [-o FILE]
    python -m benchmarks published --table FILE

docs/published.md describes rows and columns. With -o, the scores of each map are written when they
are computed; the command adds those that the file lacks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import numpy as np

import runtime
from benchmarks import environment
from benchmarks.quality import datasets, evaluators, metrics, protocols
from benchmarks.quality.evaluators import PARTS
from benchmarks.quality.runs import Results
from benchmarks.table import as_markdown
from runtime.checks import check_count
from runtime.core.guide import Guide
from runtime.core.parameters import objective_of
from runtime.tools.cli import Parser
from sdk import CrfConfig, RefineConfig, Segmenter
from sdk.pipeline import Scored
from sdk.timing import Clock

Document = dict[str, Any]
MANY = tuple(f"many-to-one {part}" for part in PARTS)  # "fine" is the compat score of protocols
SCORES = (*PARTS, "one-to-one", *MANY, "segments")
# The scores of the labels, then of the connected regions of equal label; the steps that ran, which
# are fewer if the refinement stopped early; and the CPU time of prior, refinement and filter.
COLUMNS = (*SCORES, *(f"regions {name}" for name in SCORES), "steps", "seconds")

PLAIN: dict[str, dict[str, Any]] = {  # forms without a published objective: options of a Segmenter
    "k-means": {"refine": None, "filter": None, "min_area": 0},
    "k-means + guided filter": {"refine": None},
    "k-means + dense CRF": {"refine": None, "filter": CrfConfig()},
    "residual, bilinear": {"filter": None, "min_area": 0},
    "residual + guided filter": {},
    "residual + dense CRF": {"filter": CrfConfig()},
}
TRUTH = "the fine annotator's map itself"


@dataclass(frozen=True)
class Form:
    """A published objective, whose map is scored after some numbers of steps.

    Parameters
    ----------
    name : of the form; "NAME, N steps" names its rows.
    preset : of RefineConfig.
    scale : the working size, relative to the picture's.
    steps : the numbers of steps, ascending.
    more : further numbers of steps, on the pictures of the option --long only.
    truth : the guide is the map of the fine annotator; otherwise it is of k-means.
    final : after the fewest steps, the labels of a Segmenter are scored as well.
    """

    name: str
    preset: str
    scale: float
    steps: tuple[int, ...]
    more: tuple[int, ...] = ()
    truth: bool = False
    final: bool = False

    def row(self, steps: int, *, final: bool = False) -> str:
        """The name of the row for a number of steps."""
        return f"{self.name}, {steps} steps{' + guided filter' if final else ''}"

    def rows(self, steps: list[int]) -> list[str]:
        """The names of the rows of one refinement, which is scored after each of ``steps``."""
        last = [self.row(self.steps[0], final=True)] if self.final else []
        return [self.row(number) for number in steps] + last


_GIVEN = "dynaguide, guide = the truth itself"
# The forms of a group are run picture by picture, those with most steps first, then the next group.
GROUPS = (
    (
        Form("dynaguide", "dynaguide", 0.5, (20, 200), (1000,), final=True),
        Form("dynaseg_fsf", "dynaseg_fsf", 0.5, (20, 200), (1000,), final=True),
    ),
    (
        Form("dynaguide_code", "dynaguide_code", 0.5, (20,), final=True),
        Form("dynaseg_scf", "dynaseg_scf", 0.5, (20,), final=True),
        Form(_GIVEN, "dynaguide", 0.5, (20,), truth=True),
    ),
    (Form(_GIVEN, "dynaguide", 0.5, (), (200,), truth=True),),
    (
        Form("dynaguide at full size", "dynaguide", 1.0, (20,)),
        Form("dynaseg_fsf at full size", "dynaseg_fsf", 1.0, (20,)),
    ),
    (
        Form("dynaguide at full size", "dynaguide", 1.0, (), (200, 1000)),
        Form("dynaseg_fsf at full size", "dynaseg_fsf", 1.0, (), (200, 1000)),
    ),
    (
        Form(_GIVEN, "dynaguide", 0.5, (), (1000,), truth=True),
        Form("dynaguide_code", "dynaguide_code", 0.5, (), (200, 1000)),
    ),
)


@dataclass
class Picture:
    """A picture of BSDS500 with its truth.

    Parameters
    ----------
    name : of the picture.
    pixels : (H, W, 3) uint8 RGB.
    annotators : the regions of each person, (H, W) int32.
    """

    name: str
    pixels: np.ndarray
    annotators: list[np.ndarray]

    def fine(self) -> np.ndarray:
        """The regions of the annotator with most regions, the first of equals: (H, W) int32 from
        0."""
        chosen = max(self.annotators, key=lambda regions: len(np.unique(regions)))
        found = np.unique(chosen, return_inverse=True)[1]
        return found.reshape(chosen.shape).astype(np.int32)

    def scores(self, labels: np.ndarray, steps: int, seconds: float) -> list[float]:
        """The values of COLUMNS for a label map (H, W), with four decimals."""
        values: list[float] = []
        for found in (labels, runtime.connected_regions(labels)[0]):
            scores = evaluators.score_regions([(found, self.annotators)])
            shared = [metrics.contingency(found, truth) for truth in self.annotators]
            many = [evaluators.many_to_one(table) for table in shared]
            sizes = [table.shape[1] for table in shared]
            fine, coarse = many[int(np.argmax(sizes))], many[int(np.argmin(sizes))]
            scores |= dict(zip(MANY, (float(np.mean(many)), fine, coarse), strict=True))
            values += [round(scores[name], 4) for name in SCORES[:-1]]
            values.append(int(scores["segments"]))
        return [*values, steps, round(seconds, 2)]


def plain_row(name: str, picture: Picture, threads: int) -> list[float]:
    """The scores of a form of PLAIN, or of TRUTH, on one picture."""
    start = time.process_time()
    if name == TRUTH:
        return picture.scores(picture.fine(), 0, 0.0)
    result = Segmenter("kmeans", threads=threads, **PLAIN[name])(picture.pixels)
    return picture.scores(result.labels, result.stats["steps"], time.process_time() - start)


def refined_rows(
    form: Form, picture: Picture, steps: list[int], threads: int
) -> Iterator[tuple[str, list[float]]]:
    """Refine a picture once, and score its map after some numbers of steps.

    The weights after each number are stored; a run of 0 steps from them returns the map that a
    shorter refinement has. The map of the network is enlarged to the nearest label and not
    filtered, as the published programs save it.

    Parameters
    ----------
    steps : ascending.

    Yields
    ------
    The name of a row and its scores.
    """
    config = RefineConfig.preset(form.preset, scale=form.scale, steps=steps[-1])
    pipeline = Segmenter("kmeans", refine=config, threads=threads).pipeline
    start = time.process_time()
    made = pipeline.prepare(picture.pixels, Clock())
    size, full = made.working.shape[:2], picture.pixels.shape[:2]
    guide = pipeline.guide(made, Clock())[0]
    if form.truth:
        guide = Guide.checked(protocols.nearest(picture.fine(), *size), *size)
    wanted = guide if objective_of(config).takes_guide else None
    refiner = runtime.Refiner(*size, threads=threads, **config.options())
    states: dict[int, Any] = {}

    def keep(done: int, _: int) -> None:
        if done in steps:
            states[done] = refiner.state_dict(), done, time.process_time() - start

    stats = refiner.run(made.working, wanted, progress=keep).stats
    last = refiner.state_dict(), stats["steps"], time.process_time() - start
    for number in steps:
        state, done, seconds = states.get(number, last)
        begin = time.process_time()
        refiner.load_state_dict(state)
        found = refiner.run(made.working, wanted, steps=0, warm=True)
        seconds += time.process_time() - begin
        labels = protocols.nearest(found.labels, *full)
        yield form.row(number), picture.scores(labels, done, seconds)
        if form.final and number == form.steps[0]:
            begin = time.process_time()
            columns = np.full(found.scores.shape[2], -1, np.int32)  # clusters have no class
            scored = Scored(found.scores, columns, found.stats, found.labels)
            labels = pipeline.finish(made, scored, [], Clock(), semantic=False).labels
            seconds += time.process_time() - begin
            yield form.row(number, final=True), picture.scores(labels, done, seconds)


def evenly(names: list[str], count: int) -> list[str]:
    """``count`` of some names, evenly spaced, with the first and, of several, the last."""
    return [names[i] for i in np.linspace(0, len(names) - 1, count).round().astype(int)]


def measure(document: Document) -> Iterator[str]:
    """Compute the rows that the document lacks, one after the other, and add them.

    Parameters
    ----------
    document : "settings": the names of the "pictures" and of those with most steps, "long", and the
        number of "threads"; "regions": picture -> the numbers of its true regions; "forms": row ->
        picture -> the values of COLUMNS.

    Yields
    ------
    A sentence for each row that was added.
    """
    settings, forms = document["settings"], document["forms"]
    pictures = {item.name: item for item in datasets.bsds(len(settings["pictures"]))}
    names = dict.fromkeys([*settings["long"], *pictures])  # those with most steps first
    work: list[tuple[str, Form | None, list[int], list[str]]] = []
    work += [(name, None, [], [plain]) for name in pictures for plain in (TRUTH, *PLAIN)]
    for group in GROUPS:
        for name, one in product(names, group):
            steps = [*one.steps, *(one.more if name in settings["long"] else ())]
            work.append((name, one, steps, one.rows(steps)))
    for name, form, steps, rows in work:
        if all(name in forms.get(row, {}) for row in rows):
            continue
        picture = Picture(name, pictures[name].image(), pictures[name].annotators())
        document["regions"][name] = evaluators.part_sizes(picture.annotators)
        for row, values in (
            refined_rows(form, picture, steps, settings["threads"])
            if form
            else [(rows[0], plain_row(rows[0], picture, settings["threads"]))]
        ):
            forms.setdefault(row, {})[name] = values
            yield f"{row}, {name}: all {values[0]:.4f}, {values[-1]} s"


def packed(document: Document) -> Document:
    """The document in a form that fits a small file: rows of numbers, whose pictures are indices
    of the list of names in "settings"."""
    names = document["settings"]["pictures"]
    found = {key: document[key] for key in ("environment", "settings")}
    found["regions"] = [document["regions"].get(name) for name in names]
    found["columns"] = list(COLUMNS)
    found["rows"] = []
    for form, own in document["forms"].items():
        used = [i for i, name in enumerate(names) if name in own]
        values = [own[names[i]] for i in used]
        found["rows"].append({"form": form, "pictures": used, "values": values})
    return found


def unpacked(document: Document) -> Document:
    """The reverse of :func:`packed`.

    Raises
    ------
    ValueError : the file has other columns.
    """
    if document["columns"] != list(COLUMNS):
        raise ValueError(f"its columns are {document['columns']}")
    names = document["settings"]["pictures"]
    found = {key: document[key] for key in ("environment", "settings")}
    each = zip(names, document["regions"], strict=True)
    found["regions"] = {name: numbers for name, numbers in each if numbers}
    found["forms"] = {
        row["form"]: dict(zip((names[i] for i in row["pictures"]), row["values"], strict=True))
        for row in document["rows"]
    }
    return found


def summary(rows: dict[str, list[float]], regions: dict[str, list[int]], prefix: str) -> Document:
    """The scores of one form over its pictures.

    Parameters
    ----------
    rows : picture -> the values of COLUMNS.
    regions : picture -> the numbers of its true regions.
    prefix : "" for the labels, "regions " for their connected regions.

    Returns
    -------
    "all", "fine", "coarse" and their "mean": over the true regions of all pictures together.
    "picture all", "picture fine", "picture coarse", "one-to-one", those of MANY, "segments",
    "steps", "seconds": the mean over pictures. "worst": the lowest "all" of a picture, with its
    name.
    """
    table = np.array([*rows.values()], np.float64)
    weights = np.array([regions[name] for name in rows], np.float64)
    column = {name: table[:, COLUMNS.index(prefix + name)] for name in SCORES}
    found = evaluators.pool(np.stack([column[part] for part in PARTS], axis=1), weights)
    found |= {f"picture {part}": float(column[part].mean()) for part in PARTS}
    found |= {name: float(column[name].mean()) for name in SCORES[len(PARTS) :]}
    worst = int(column["all"].argmin())
    found |= {name: float(table[:, COLUMNS.index(name)].mean()) for name in ("steps", "seconds")}
    return found | {"worst": f"{column['all'][worst]:.3f} {[*rows][worst]}"}


def tables(document: Document) -> str:
    """The tables of a document in Markdown: labels and connected regions, of the forms that have
    all pictures, then of all forms on the pictures with most steps."""
    settings, parts = document["settings"], []
    order = [TRUTH, *PLAIN]
    forms = sorted(chain(*GROUPS), key=lambda form: form.name)
    order += [row for form in forms for row in form.rows([*form.steps, *form.more])]
    groups = ((settings["pictures"], len(settings["pictures"])), (settings["long"], 1))
    for names, least in groups:
        for prefix, what in (("", "labels"), ("regions ", "connected regions")):
            lines = []
            for form in (row for row in order if row in document["forms"]):
                own = document["forms"][form]
                rows = {name: own[name] for name in names if name in own}
                if len(rows) >= least:
                    scores = summary(rows, document["regions"], prefix)
                    lines.append({"form": form, "pictures": len(rows)} | _cells(scores))
            if lines:
                parts += [f"**{what}, {len(names)} pictures**", as_markdown(lines)]
    return "\n\n".join(parts)


def _cells(scores: Document) -> dict[str, str]:
    digits = dict.fromkeys(scores, 3) | {"segments": 0, "steps": 0, "seconds": 2}
    return {k: v if isinstance(v, str) else f"{v:.{digits[k]}f}" for k, v in scores.items()}


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code.

    Raises
    ------
    InputError : wrong numbers, a file of another form, or a data set that is missing.
    """
    parser = Parser("python -m benchmarks published", description=__doc__)
    parser.add_argument("--pictures", type=int, default=20, help="pictures (%(default)s)")
    parser.add_argument(
        "--long", type=int, default=3,
        help="how many of them have 1,000 steps, and 200 at full size (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="threads (%(default)s)")
    results = Results(tables, pack=packed, unpack=unpacked)
    results.add_options(parser)
    args = parser.parse_args(argv)
    if args.table:
        print(tables(results.read(args.table)))
        return 0
    count = check_count("pictures", args.pictures, 1, 100)
    names = [item.name for item in datasets.bsds(count)]
    settings = {
        "threads": check_count("threads", args.threads, 1, 1024),
        "pictures": names,
        "long": evenly(names, check_count("long", args.long, 0, count)),
    }
    document = results.start(
        args.out,
        {"environment": environment.describe(), "settings": settings, "regions": {}, "forms": {}},
    )
    results.collect(args.out, document, measure(document))
    return 0
