"""Run `python -m benchmarks latency`: the latency of the whole pipeline, picture to labels."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment, machine, table
from benchmarks.latency import document as documents
from benchmarks.latency.document import MODES, Row, summarise
from benchmarks.latency.inputs import hash_of, hashes, load_pictures
from benchmarks.latency.modes import RUN, WARM_STEPS, overhead_ms, warm_up
from benchmarks.latency.options import EXPORTS, parse
from benchmarks.latency.quality import quality_of
from benchmarks.latency.resources import memory_run, power_run
from benchmarks.speed import peers
from runtime.errors import ExitCode, InputError, MissingBackend, SdkError
from runtime.files import file_error, write_atomic
from runtime.opencv import cv2
from runtime.tools.cli import progress_bar
from sdk import RefineConfig, Segmenter

SCOPE = (
    "end-to-end wall time: uint8 RGB picture on the host to int32 labels on the host, with "
    "preprocessing, prior, all refinement steps, guided filter and postprocessing"
)


def check_packages(drawing: bool) -> None:
    """Check before the measurement that SciPy is installed, and with ``drawing`` matplotlib, too.

    Raises
    ------
    MissingBackend : a package is not installed.
    """
    try:
        import scipy.stats  # noqa: F401

        if drawing:
            import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingBackend(
            f"the profiler needs {error.name}, which is not installed",
            fix="pip install 'dynaguide-edge[bench]' (matplotlib: or --export without html)",
        ) from error


def measure(args: argparse.Namespace, document: dict[str, Any], rows: list[Row]) -> None:
    """Measure everything that the options name. Each result is added to ``document`` or ``rows`` at
    once, so that an error or an interrupt loses no earlier result.

    Raises
    ------
    SdkError : an input is wrong, or a part of the measurement fails.
    """
    pictures, truths = load_pictures(args)
    modes = args.mode or [m for m in MODES if m != "paced" or args.rate is not None]
    seconds, asked = args.duration, args.refine
    if (n := len(modes) * len(args.threads) * len(asked or [0])) > documents.MOST_ROWS:
        raise InputError(
            f"these are {n} rows; wanted at most {documents.MOST_ROWS}",
            fix="name fewer values for --mode, --threads or --refine",
        )
    for peer in args.peer:
        peers.check(peer)
    options: dict[str, Any] = {"prior": args.prior, "device": args.device}
    options |= {"backend": args.backend, "refine_backend": args.refine_backend}
    options["precision"] = args.precision
    first = Segmenter(**options, refine=args.preset, threads=1, self_test="never")
    trained = first.pipeline.trained  # then 0 steps return the map of the trained weights
    base = first.refine if trained or asked != [0] else None
    if base is not None and args.scale is not None:
        base = replace(base, scale=args.scale)
    document["percentiles"] = args.percentile
    document["picture"] = [*pictures[0].shape[:2], len(pictures)]
    document["hashes"]["pictures"] = hash_of(pictures)
    # Libraries do some work only once in a process. This call does it, so that no row contains it.
    one = base and replace(base, steps=min(base.steps or 0, 1))
    Segmenter(**options, refine=one, threads=1, self_test="never")(pictures[0])
    for threads in args.threads:
        cv2.setNumThreads(threads)
        for steps in asked if asked is not None else [base.steps or 0 if base else 0]:
            config = replace(base or RefineConfig(), steps=steps) if steps or trained else None
            made = options | {"refine": config, "threads": threads}
            quality = quality_of(Segmenter(**made, self_test="always"), pictures, truths)
            for mode in modes:
                row = Row(mode, steps, threads, device=args.device, quality=quality)
                if mode == "stream" and steps:
                    row.quality = {"what": "not measured"}  # quality_of starts cold
                if mode == "stream" and asked is None:
                    row.steps = min(steps, WARM_STEPS)
                row.rate = args.rate if mode == "paced" else None
                if config is not None:
                    row.refine = refinement(config)
                row.partial = True
                rows.append(row)
                run_row(row, made, pictures, seconds)
                row.partial = False
            what = {"calls": f"{documents.counted(steps, 'step')}, "}
            what["calls"] += documents.counted(threads, "thread")
            if args.memory:
                document["memory"].append(what | memory_run(made, pictures[0]))
            seg = Segmenter(**made, self_test="never")
            if args.power:
                watts = power_run(seg, pictures, seconds)
                document["power"] += [what | watts] if watts else []
            for peer in args.peer:
                if peer == "torch-eager" and config is None:
                    print("  torch-eager is left out: 0 steps have no work for it", file=sys.stderr)
                    continue
                print(f"  {peer}, {what['calls']} ...", file=sys.stderr)
                document["peers"].append(peers.PEERS[peer](seg, pictures[0], seconds))


def refinement(config: RefineConfig) -> str:
    """Describe a refinement: its objective, its scale, and the settings that differ from the
    objective's defaults."""
    changes = config.changes()
    words = [f"{k} {v[0]}" for k, v in changes.items() if k not in ("steps", "seed", "scale")]
    return ", ".join([f"{config.objective} at scale {config.scale:g}", *words])


def run_row(row: Row, options: dict[str, Any], pictures: list[np.ndarray], seconds: float) -> None:
    """Measure one row: open the model, run it once, warm up, and collect samples.

    Parameters
    ----------
    options : the arguments of ``Segmenter``.
    pictures : (H, W, 3) uint8 RGB, shown in turn.
    seconds : how long samples are collected.

    Raises
    ------
    SdkError : the model cannot be opened, or fails.
    """
    start = time.perf_counter()
    seg = Segmenter(**options, self_test="never")
    loaded = time.perf_counter()
    row.backend = seg(pictures[0]).backend
    row.first_ms = 1e3 * (time.perf_counter() - loaded)
    row.load_ms = 1e3 * (loaded - start)
    row.precision = seg.info().get("precision", "fp32")
    warm_up(seg, pictures)
    with progress_bar(total=seconds, desc=row.name(), unit="s", disable=None, leave=False) as bar:

        def report(now: float) -> None:
            if not bar.disable and now - bar.n > 0.5:
                bar.n = min(round(now, 1), seconds)
                bar.refresh()

        RUN[row.mode](row, seg, pictures, seconds, report)


def export(document: dict[str, Any], folder: Path, kinds: list[str]) -> list[InputError]:
    """Write the files of ``kinds``, each completely or not at all. Returns an error for each file
    that could not be written."""
    failures = []
    for path, kind in files(folder, kinds):
        try:
            table.make_folder(folder)
            write_atomic(path, exported(document, kind))
        except InputError as error:
            failures.append(error)
        except (OSError, ValueError) as error:
            failures.append(file_error("written", path, error))
        else:
            print(f"saved {documents.shown(str(path))}", file=sys.stderr)
    return failures


def files(folder: Path, kinds: list[str]) -> list[tuple[Path, str]]:
    """The paths and kinds of the files to write. With "json", the samples of the stages are
    written, too: their kind is "raw"."""
    found = []
    for kind in kinds:
        path = folder / EXPORTS[kind]
        found += [(path, kind), *([(table.raw_path(path), "raw")] if kind == "json" else [])]
    return found


def exported(document: dict[str, Any], kind: str) -> bytes:
    """The content of a file: ``kind`` is "raw" or a key of EXPORTS.

    Raises
    ------
    MissingBackend : the kind is "html", and matplotlib is not installed.
    """
    if kind == "raw":
        return table.packed(documents.raw(document))
    return _text(document, kind).encode()


def _text(document: dict[str, Any], kind: str) -> str:
    if kind == "json":
        return table.as_json(documents.stored(document))
    if kind == "csv":
        return documents.as_csv(document)
    if kind == "md":
        return documents.as_text(document) + "\n"
    if kind == "trace":
        return documents.as_trace(document)
    from benchmarks.latency import page

    return page.render({"latency": document})


def main(argv: list[str]) -> int:
    """Run `python -m benchmarks latency`; returns the exit code.

    Raises
    ------
    SdkError, MemoryError, OSError, RuntimeError, ValueError, cv2.error : the measurement failed.
        Results from before the failure are written and printed first.
    """
    args = parse(argv)
    check_packages(args.out is not None and "html" in args.export)
    for path, _ in files(args.out, args.export) if args.out else []:
        table.check_out(path)
    document: dict[str, Any] = {"schema": documents.SCHEMA, "scope": SCOPE, "partial": False}
    document["device_time"] = "device time: none, this run used no GPU"
    if args.device != "cpu":
        document["device_time"] = (
            "device time: CUDA events around preprocess, the network on this GPU, the native "
            "refinement's steps and the filter, copies included; other stages do not run there"
        )
    said = [documents.shown(word) for word in (args.prior, *argv)]
    document |= {"command": ["python", "-m", "benchmarks", "latency", *said[1:]]}
    document |= {"prior": said[0], "hashes": hashes(args.prior)}
    described = environment.describe() | machine.description()
    document["environment"] = described | {"before": machine.state()}
    document |= {"rows": [], "memory": [], "power": [], "peers": []}
    rows: list[Row] = []
    code, failure, unwritten = 0, None, []
    ctrl_c = Interrupts()
    before = signal.signal(signal.SIGINT, ctrl_c)
    try:
        try:
            try:
                measure(args, document, rows)
            finally:
                ctrl_c.wanted = False  # a further Ctrl-C must not interrupt the writing
        except KeyboardInterrupt:
            code = ExitCode.INTERRUPTED
        except (SdkError, MemoryError, OSError, RuntimeError, ValueError, cv2.error) as error:
            failure = error
        document["rows"] = [summarise(r, args.percentile) for r in rows if r.total_ms]
        document["partial"] = failure is not None or code != 0
        if not document["rows"]:
            if failure is not None:
                raise failure
            print("interrupted before the first measurement; nothing is written", file=sys.stderr)
            return code
        document["environment"]["after"] = machine.state()
        document["overhead"] = overhead(document["rows"])
        if args.out:
            unwritten = export(document, args.out, args.export)
    finally:
        signal.signal(signal.SIGINT, before)
    if args.json:
        print(json.dumps(document, allow_nan=False))
    else:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
        print(documents.as_text(document, columns))
    if args.power and not document["power"] and not document["partial"]:
        print("power: this machine has no sensor that can be read", file=sys.stderr)
    if document["partial"]:
        print("the measured part is kept, and marked partial", file=sys.stderr)
    for problem in unwritten:
        print(f"error: {problem}", file=sys.stderr)
    if failure is not None:
        raise failure
    return code or int(bool(unwritten))


class Interrupts:
    """Handles Ctrl-C. It raises KeyboardInterrupt, but at most once a second, and not any more when
    ``wanted`` is False."""

    def __init__(self) -> None:
        self.wanted, self.last = True, -1.0

    def __call__(self, *_: Any) -> None:
        now = time.monotonic()
        if self.wanted and now - self.last > 1:
            self.last = now
            raise KeyboardInterrupt


def overhead(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Measure the milliseconds that recording a stage takes, and their share of the shortest
    stage's median; None if no stage took any time."""
    found = [
        (v, f"{k}, {r['name']}")
        for r in rows
        for k, v in r["stage_p50_ms"].items()
        if v > 0 and documents.is_stage(k) and k not in (documents.REST, "queue")
    ]
    if not found:
        return None
    each, (least, where) = overhead_ms(), min(found)
    return {"ms_a_stage": each, "share": each / least, "of": where}
