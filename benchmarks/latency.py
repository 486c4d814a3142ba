"""Latency of the whole pipeline, from the picture to its labels.

    python -m benchmarks latency [BUNDLE|PRIOR] [--picture P ...|--video V] [--refine 0,4,8]
        [--mode back-to-back,paced,stream] [--rate 30] [--duration 10] [--threads 1,2] [-o DIR]

The clock is end-to-end wall time: uint8 picture on the host to int32 labels on the host. Modes:
"back-to-back", the next picture when the last is done; "paced", a picture every 1 / rate seconds,
latency counted from when it was due, so that waiting shows; "stream", warm start from the last
frame. No sample is left out. Without -o nothing is written; --export says what goes to DIR.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from benchmarks import machine, metrics, report
from benchmarks.step import last_error, thread_counts
from runtime.backend import default_threads
from runtime.checks import check_positive
from runtime.errors import InputError, MissingBackend
from runtime.resize import resize
from sdk import RefineConfig, Segmenter
from sdk.image import load_image, write_atomic

SCHEMA = "dg-latency/1"
SCOPE = (
    "end-to-end wall time: uint8 RGB picture on the host to int32 labels on the host, with "
    "preprocessing, prior, all refinement steps, guided filter and postprocessing"
)
MODES = ("back-to-back", "paced", "stream")
EXPORTS = ("json", "csv", "md", "html", "trace")
PEERS = ("torch-eager", "opencv-guided-filter")
WARM_STEPS = 2  # of a stream's frame, as in Segmenter.stream
FRAMES = 64  # of a video, shown to and fro
WARM_UP, WARM_CALLS = 0.5, 3  # at least so many seconds and calls, after the first one
CLOCK_EVERY = 0.1  # seconds between readings of the processor's clock
IDLE = 3.0  # seconds of idle power
SHORT = 0.1  # milliseconds; the profiler's overhead is compared with stages at least so long


@dataclass
class Row:
    """One configuration's measurements; lists have an entry per sample, times in milliseconds."""

    mode: str
    steps: int
    threads: int
    backend: str = ""
    precision: str = "fp32"
    device: str = "cpu"
    rate: float | None = None
    load_ms: float = float("nan")
    first_ms: float = float("nan")
    quality: dict[str, Any] = field(default_factory=lambda: {"what": "not measured"})
    total_ms: list[float] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)  # from the row's first sample
    stages_ms: list[dict[str, float]] = field(default_factory=list)
    steps_done: list[int] = field(default_factory=list)
    cpu_mhz: list[float | None] = field(default_factory=list)
    late: int = 0  # paced: done after the next picture was due
    unserved: int = 0  # paced: due, but not begun when time was up
    partial: bool = False

    def name(self) -> str:
        """What tells rows apart."""
        rate = f" {self.rate:g}/s" if self.rate else ""
        return f"{self.mode}{rate}, {self.steps} steps, {self.threads} threads"

    def add(self, due: float, begin: float, end: float, result: Any, clock: float | None) -> None:
        """A sample: when it was due, begun and done, in seconds."""
        stages = {k: v for k, v in result.timings.items() if k not in ("unaccounted", "total")}
        if self.mode == "paced":
            stages = {"queue": 1e3 * (begin - due)} | stages
        total = 1e3 * (end - due)
        self.total_ms.append(total)
        self.stages_ms.append(stages | {"unaccounted": total - sum(stages.values())})
        self.start_s.append(due)
        self.steps_done.append(int(result.stats["steps"]))
        self.cpu_mhz.append(clock)


class Clocks:
    """The fastest processor's clock, read outside the timed calls and not too often."""

    def __init__(self) -> None:
        self.at, self.last = -1.0, None

    def __call__(self) -> float | None:
        now = time.perf_counter()
        if now - self.at > CLOCK_EVERY:
            self.at, self.last = now, max(machine.cpu_mhz(), default=None)
        return self.last


Progress = Callable[[float], None]  # is told seconds since the row's first sample


def back_to_back(row: Row, seg: Any, pictures: list[np.ndarray], seconds: float, tell: Progress):
    """Call after call for so long."""
    clocks, origin = Clocks(), time.perf_counter()
    while (now := time.perf_counter() - origin) < seconds:
        tell(now)
        picture = pictures[len(row.total_ms) % len(pictures)]
        begin = time.perf_counter()
        result = seg(picture)
        end = time.perf_counter()
        row.add(begin - origin, begin - origin, end - origin, result, clocks())


def paced(row: Row, seg: Any, pictures: list[np.ndarray], seconds: float, tell: Progress):
    """A picture every 1 / rate seconds; those that come while one is worked on wait for it."""
    assert row.rate is not None
    clocks, origin = Clocks(), time.perf_counter()
    count = max(1, int(seconds * row.rate))
    for i in range(count):
        due = i / row.rate
        now = time.perf_counter() - origin
        if now > max(seconds, due):
            row.unserved = count - i
            break
        tell(now)
        if now < due:
            time.sleep(due - now)
        begin = time.perf_counter() - origin
        result = seg(pictures[i % len(pictures)])
        end = time.perf_counter() - origin
        row.late += end > due + 1 / row.rate
        row.add(due, begin, end, result, clocks())


def stream(row: Row, seg: Any, pictures: list[np.ndarray], seconds: float, tell: Progress):
    """Frame after frame of a stream, each warm from the last; its cold start is not among them."""

    def frames() -> Iterator[np.ndarray]:
        shown = 0
        while True:
            yield pictures[shown % len(pictures)]
            shown += 1

    results = seg.stream(frames(), drop="none", warm_steps=row.steps)
    try:
        next(results)
        clocks, origin = Clocks(), time.perf_counter()
        while (begin := time.perf_counter() - origin) < seconds:
            tell(begin)
            begin = time.perf_counter() - origin
            result = next(results)
            end = time.perf_counter() - origin
            row.add(begin, begin, end, result, clocks())
    finally:
        results.close()


RUN = {"back-to-back": back_to_back, "paced": paced, "stream": stream}


def warm_up(seg: Any, pictures: list[np.ndarray]) -> None:
    """Caches, pools, clocks."""
    start, calls = time.perf_counter(), 0
    while calls < WARM_CALLS or time.perf_counter() - start < WARM_UP:
        seg(pictures[calls % len(pictures)])
        calls += 1


def overhead_ms() -> float:
    """What recording one stage costs: a lap of the pipeline's clock."""
    from sdk.segmenter import Clock

    clock, laps = Clock(), 20_000
    start = time.perf_counter()
    for _ in range(laps):
        clock.lap("stage")
    return 1e3 * (time.perf_counter() - start) / laps


def summarise(row: Row, percentiles: list[float]) -> dict[str, Any]:
    """The row as it is reported: everything measured, and what it says."""
    from benchmarks import samples

    total = np.array(row.total_ms)
    found = samples.summary(total, percentiles)
    if row.unserved:
        found["unstable"].append(f"{row.unserved} pictures were never begun: {row.rate:g}/s is")
        found["unstable"][-1] += " more than it can do"
    names = list(dict.fromkeys(k for s in row.stages_ms for k in s))
    columns = {k: np.array([s.get(k, 0.0) for s in row.stages_ms]) for k in names}
    stages = {k: float(np.median(v)) for k, v in columns.items()}
    ran = np.array(row.steps_done)
    if "refine" in columns and ran.size and ran.min() > 0:
        stages["refine per step"] = float(np.median(columns["refine"] / ran))
    listed = [
        {"index": i, "start_s": row.start_s[i], "ms": row.total_ms[i], "cpu_mhz": row.cpu_mhz[i]}
        for i in found.get("outliers", [])
    ]
    document = dict(vars(row)) | {"name": row.name(), "stage_p50_ms": stages}
    document["stages_ms"] = {k: v.tolist() for k, v in columns.items()}
    return document | {"summary": found | {"outliers": listed}}


def quality_of(
    seg: Segmenter, pictures: list[np.ndarray], truths: list[np.ndarray] | None
) -> dict[str, Any]:
    """mIoU on the labelled pictures, or a bundle's agreement with its golden float32 labels."""
    if truths is not None:
        names = seg.prior.names
        if names is None:
            raise InputError("labels need a prior that names its classes; this one does not")
        counts: Any = 0
        for picture, truth in zip(pictures, truths, strict=True):
            counts = counts + metrics.confusion(seg(picture).labels, truth, len(names), ignore=255)
        return {"what": "mIoU", "value": metrics.miou(counts), "pictures": len(truths)}
    tested = seg.info().get("self_test")
    if isinstance(tested, dict) and "labels" in tested:
        return {"what": "agreement with float32 on the golden picture", "value": tested["labels"]}
    return {"what": "not measured"}


def memory_run(options: dict[str, Any], picture: np.ndarray) -> dict[str, Any]:
    """Peak memory of a fresh process, MiB over what it holds after the imports."""
    child = """
import json, pickle, sys
from benchmarks.worker import memory
from benchmarks.machine import gpus
options, picture = pickle.load(sys.stdin.buffer)
from sdk import Segmenter
import onnxruntime
def used():
    return [g["used_mib"] for g in gpus()]
base, device = memory("VmRSS"), used()
segmenter = Segmenter(**options)
loaded, device_loaded = memory("VmRSS"), used()
for _ in range(3):
    segmenter(picture)
print(json.dumps({"loaded MiB": loaded - base, "peak MiB": memory("VmHWM") - base,
    "device MiB": [[b - a, c - a] for a, b, c in zip(device, device_loaded, used())]}))
"""
    import pickle

    sent = pickle.dumps((options, picture))
    done = subprocess.run([sys.executable, "-c", child], input=sent, capture_output=True)
    if done.returncode:
        raise InputError(f"the memory run failed: {last_error(done.stderr.decode())}")
    return dict(json.loads(done.stdout))


def power_run(seg: Any, pictures: list[np.ndarray], seconds: float) -> dict[str, Any] | None:
    """Joules a picture, with what the machine draws when idle taken off; None without a sensor."""
    source = machine.power_source()
    if source is None:
        return None
    time.sleep(1)
    with machine.PowerMeter() as idle:
        time.sleep(IDLE)
    count, start = 0, time.perf_counter()
    with machine.PowerMeter() as busy:
        while time.perf_counter() - start < seconds:
            seg(pictures[count % len(pictures)])
            count += 1
    idle_watts = idle.joules / idle.seconds
    return {
        "sensor": source,
        "idle W": idle_watts,
        "W": busy.joules / busy.seconds,
        "J a picture, idle subtracted": (busy.joules - idle_watts * busy.seconds) / count,
        "pictures": count,
        "s": busy.seconds,
        "readings/s": 1 / machine.SAMPLING,
    }


def hashes(prior: Any) -> dict[str, str]:
    """sha256 of a bundle's manifest and files, or of the model file."""
    path = Path(prior) if isinstance(prior, str) and prior != "kmeans" else None
    if path is None or not path.exists():
        return {}
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {
        str(p.relative_to(path.parent)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def table(document: dict[str, Any]) -> str:
    """The rows for people, in Markdown."""

    def cell(found: dict[str, Any], n: int) -> str:
        if found["value"] is None:
            return f"n/a (n={n}, need {found['need']})"
        return f"{found['value']:.1f} [{found['low']:.1f}, {found['high']:.1f}]"

    lines = []
    for row in document["rows"]:
        s = row["summary"]
        line = {"mode": row["mode"] + (f" {row['rate']:g}/s" if row["rate"] else "")}
        line |= {"steps": row["steps"], "threads": row["threads"], "n": s["n"]}
        line |= {f"{k} ms": cell(v, s["n"]) for k, v in s["percentiles"].items()}
        line |= {"max ms": f"{s['max']:.1f}" if s["n"] else ""}
        line |= {"load ms": f"{row['load_ms']:.0f}", "first ms": f"{row['first_ms']:.0f}"}
        if row["mode"] == "paced":
            line["late"] = row["late"] + row["unserved"]
        q = row["quality"]
        line["quality"] = f"{q['value']:.4f} {q['what']}" if "value" in q else q["what"]
        line["verdict"] = "unstable" if s["unstable"] else "stable"
        line["verdict"] += ", partial" if row["partial"] else ""
        lines.append(line)
    stages = [
        {"stage, p50 ms": r["name"]} | {k: f"{v:.2f}" for k, v in r["stage_p50_ms"].items()}
        for r in document["rows"]
    ]
    return report.table(lines) + "\n\n" + report.table(stages) if lines else "no rows"


def notes(document: dict[str, Any]) -> list[str]:
    """What has to be said beside the table."""
    out = [f"clock: {document['scope']}", document["device_time"]]
    ran = dict.fromkeys((r["backend"], r["device"], r["precision"]) for r in document["rows"])
    out += [f"ran: {backend} on {device}, {precision}" for backend, device, precision in ran]
    for row in document["rows"]:
        s, where = row["summary"], row["name"]
        if s["unstable"]:
            out.append(f"{where}: unstable: {'; '.join(s['unstable'])}")
        if s["n"] and abs(s["lag1"]) > 0.2:
            out.append(f"{where}: neighbouring samples correlate ({s['lag1']:.2f})")
        if s.get("period"):
            out.append(f"{where}: repeats itself every {s['period']} samples")
        if listed := s.get("outliers"):
            shown = ", ".join(
                f"#{o['index']} at {o['start_s']:.1f} s {o['ms']:.1f} ms"
                + (f" ({o['cpu_mhz']:.0f} MHz)" if o["cpu_mhz"] else "")
                for o in listed[:5]
            )
            more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
            out.append(f"{where}: outliers {shown}{more}")
    if (o := document.get("overhead")) is not None:
        out.append(
            f"profiler: {1e3 * o['ms_a_stage']:.2f} us a stage, {o['share']:.3%} of the shortest "
            f"one over {SHORT} ms ({o['of']})"
        )
    return out


def as_csv(document: dict[str, Any]) -> str:
    """One line a row."""
    lines = []
    for row in document["rows"]:
        keys = ("mode", "rate", "steps", "threads", "device", "backend", "precision")
        line = {k: row[k] for k in keys} | {"load_ms": row["load_ms"], "first_ms": row["first_ms"]}
        s = row["summary"]
        line |= {"n": s["n"], "mean_ms": s.get("mean"), "max_ms": s.get("max")}
        for k, v in s["percentiles"].items():
            line |= {f"{k}_ms": v["value"], f"{k}_low": v.get("low"), f"{k}_high": v.get("high")}
        line |= {"late": row["late"], "unserved": row["unserved"], "partial": row["partial"]}
        line |= {"quality": row["quality"].get("value"), "quality_what": row["quality"]["what"]}
        lines.append(line | {"unstable": "; ".join(s["unstable"])})
    out = io.StringIO()
    if lines:
        writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return out.getvalue()


def as_trace(document: dict[str, Any]) -> str:
    """Chrome's trace format, microseconds; opens in Perfetto."""
    events: list[dict[str, Any]] = []
    for pid, row in enumerate(document["rows"], 1):
        about = {"ph": "M", "pid": pid, "tid": 1}
        events.append(about | {"name": "process_name", "args": {"name": row["name"]}})
        for i, start in enumerate(row["start_s"]):
            whole = {"name": "picture", "cat": row["mode"], "ph": "X", "pid": pid, "tid": 1}
            at = 1e6 * start
            args = {"index": i, "steps": row["steps_done"][i]}
            events.append(whole | {"ts": at, "dur": 1e3 * row["total_ms"][i], "args": args})
            for stage, values in row["stages_ms"].items():
                if stage != "unaccounted":  # lies between the others, nobody knows where
                    events.append(whole | {"name": stage, "ts": at, "dur": 1e3 * values[i]})
                    at += 1e3 * values[i]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def export(document: dict[str, Any], folder: Path, kinds: list[str]) -> list[Path]:
    """Write what was asked for, each file whole or not at all."""
    written = []
    for kind in kinds:
        if kind == "json":
            name, text = "latency.json", json.dumps(document, indent=1, allow_nan=True) + "\n"
        elif kind == "csv":
            name, text = "latency.csv", as_csv(document)
        elif kind == "md":
            said = "\n".join(f"- {n}" for n in notes(document))
            name, text = "latency.md", f"{table(document)}\n\n{said}\n"
        elif kind == "trace":
            name, text = "trace.json", as_trace(document)
        else:
            from benchmarks import page

            name, text = "latency.html", page.render({"latency": document})
        write_atomic(folder / name, text.encode())
        written.append(folder / name)
    return written


def numbers(text: str, what: str, low: float, high: float) -> list[float]:
    """ "50,99" as numbers in [low, high]; InputError for anything else."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(low <= v <= high for v in values):
        raise InputError(f"{what} is {text!r}; wanted numbers from {low:g} to {high:g}, as 1,2")
    return list(dict.fromkeys(values))


def words(text: str, what: str, known: tuple[str, ...]) -> list[str]:
    """ "a,b" as a list of known words; InputError for others."""
    found = list(dict.fromkeys(text.split(",")))
    for word in found:
        if word not in known:
            raise InputError(f"{what} is {word!r}; wanted some of {', '.join(known)}")
    return found


def size_of(text: str) -> tuple[int, int]:
    """ "480x640" as height and width."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() and 0 < int(p) <= 16384 for p in parts):
        raise InputError(f"imgsz is {text!r}; wanted HEIGHTxWIDTH, as 480x640")
    return int(parts[0]), int(parts[1])


def load_pictures(args: argparse.Namespace) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """The pictures, and their truth where labels were given, at the size asked for."""
    if args.picture and args.video:
        raise InputError("--picture and --video are both given; wanted one of them")
    if args.video:
        if not Path(args.video).exists():
            raise InputError(f"{args.video} does not exist", fix=f"seen from {Path.cwd()}")
        video, pictures = cv2.VideoCapture(args.video), []
        while len(pictures) < FRAMES and (got := video.read())[0]:
            pictures.append(cv2.cvtColor(got[1], cv2.COLOR_BGR2RGB))
        video.release()
        if not pictures:
            raise InputError(f"{args.video} is no video that OpenCV can read")
        pictures += pictures[-2:0:-1]  # to and fro: no jump at the end
    elif args.picture:
        pictures = [load_image(p)[0] for p in args.picture]
    else:
        from sdk.__main__ import demo_photo

        pictures = [demo_photo()]
    size = size_of(args.imgsz) if args.imgsz else None
    truths = None
    if args.labels:
        if not args.picture or len(args.labels) != len(pictures):
            raise InputError(
                f"{len(args.labels)} labels for {len(args.picture or ())} pictures; wanted one each"
            )
        truths = []
        for path, picture in zip(args.labels, pictures, strict=True):
            data = np.fromfile(path, np.uint8) if Path(path).is_file() else np.empty(0, np.uint8)
            truth = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
            if truth is None or truth.ndim != 2:
                raise InputError(f"{path} is no single-channel picture of class numbers")
            height, width = size or picture.shape[:2]
            truths.append(cv2.resize(truth, (width, height), interpolation=cv2.INTER_NEAREST))
    if size:
        pictures = [resize(p, *size) for p in pictures]
    return pictures, truths


def check_packages(drawing: bool) -> None:
    """MissingBackend, before anything is measured, where a package is not installed."""
    try:
        import scipy.stats  # noqa: F401

        if drawing:
            import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingBackend(
            f"the profiler needs {error.name}, which is not installed",
            fix="pip install 'dynaguide-edge[bench]' (matplotlib: or --export without html)",
        ) from error


def measure(args: argparse.Namespace, document: dict[str, Any]) -> None:
    """Fill the document row by row, so that an interrupt loses nothing."""
    pictures, truths = load_pictures(args)
    modes = [m for m in MODES if m != "paced" or args.rate is not None]
    if args.mode:
        modes = words(args.mode, "mode", MODES)
    if "paced" in modes and args.rate is None:
        raise InputError("paced needs a rate", fix="--rate 30")
    percentiles = numbers(args.percentile, "percentile", 1, 99.99)
    seconds = check_positive("duration", args.duration)
    if args.rate is not None:
        check_positive("rate", args.rate)
    asked = None
    if args.refine is not None:
        asked = [int(n) for n in numbers(args.refine, "refine", 0, 100_000)]
    peers = words(args.peer, "peer", PEERS) if args.peer else []
    options: dict[str, Any] = {"prior": args.prior, "device": args.device}
    options |= {"backend": args.backend, "refine_backend": args.refine_backend}
    first = Segmenter(**options, refine=args.preset, threads=1, self_test="never")
    base = first.refine
    document["picture"] = [*pictures[0].shape[:2], len(pictures)]
    for threads in thread_counts(args.threads):
        cv2.setNumThreads(threads)
        for steps in asked if asked is not None else [base.steps if base else 0]:
            config = None
            if steps:
                config = replace(base or RefineConfig(), steps=steps)
            made = options | {"refine": config, "threads": threads}
            tested = Segmenter(**made, self_test="always")
            quality = quality_of(tested, pictures, truths)
            for mode in modes:
                row = Row(mode, steps, threads, device=args.device, quality=quality)
                if mode == "stream" and asked is None:
                    row.steps = min(steps, WARM_STEPS)
                row.rate = args.rate if mode == "paced" else None
                start = time.perf_counter()
                seg = Segmenter(**made, self_test="never")
                loaded = time.perf_counter()
                row.backend = seg(pictures[0]).backend
                row.first_ms = 1e3 * (time.perf_counter() - loaded)
                row.load_ms = 1e3 * (loaded - start)
                row.precision = seg.info().get("precision", "fp32")
                warm_up(seg, pictures)
                bar = tqdm(total=seconds, desc=row.name(), unit="s", disable=None, leave=False)

                def tell(now: float, bar: Any = bar) -> None:
                    bar.n = min(round(now, 1), bar.total)
                    bar.refresh() if not bar.disable and now - bar.last_print_n > 0.5 else None

                try:
                    RUN[mode](row, seg, pictures, seconds, tell)
                except KeyboardInterrupt:
                    row.partial = document["partial"] = True
                    raise
                finally:
                    bar.close()
                    document["rows"].append(summarise(row, percentiles))
            if args.memory:
                document["memory"].append({"row": row.name()} | memory_run(made, pictures[0]))
            if args.power:
                watts = power_run(seg, pictures, seconds)
                document["power"] += [{"row": row.name()} | watts] if watts else []
            for peer in peers:
                from benchmarks import peers as others

                print(f"  {peer}, {threads} threads ...", file=sys.stderr)
                document["peers"].append(others.PEERS[peer](seg, pictures[0], seconds))


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prior", nargs="?", default="kmeans", help="a bundle, an .onnx file, or kmeans (default)")
    add("--picture", nargs="+", help="shown in turn (default: a photo of scikit-image's)")
    add("--labels", nargs="+", help="class numbers of each picture (255 = ignored), for mIoU")
    add("--video", help=f"its first {FRAMES} frames, to and fro")
    add("--imgsz", help="HEIGHTxWIDTH that pictures are made first (default: as they are)")
    add(
        "--refine",
        help="steps, e.g. 0,4,8; 0 = the prior alone (default: the preset's; "
        f"{WARM_STEPS} a frame of a stream)",
    )
    add("--preset", default="default", help="refinement: residual, fast, dynaguide, ...")
    add("--mode", help="some of back-to-back,paced,stream (default: all; paced if --rate is given)")
    add("--rate", type=float, help="pictures/s of paced")
    add("--duration", type=float, default=10.0, help="seconds a row (%(default)g)")
    add("--percentile", default="50,90,95,99", help="(%(default)s)")
    add("--threads", default=str(default_threads()), help="e.g. 1,2 (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 (%(default)s)")
    add("--backend", default="onnx", help="of a bundle's prior: onnx, trt, rtx (%(default)s)")
    add("--refine-backend", default="native", help="native, onnx, trt, rtx (%(default)s)")
    add("--peer", help=f"turn by turn in this process: {', '.join(PEERS)}")
    add("--memory", action="store_true", help="peak memory, each in a process of its own")
    add("--power", action="store_true", help="joules a picture, in a run of its own")
    add("--export", default=",".join(EXPORTS), help="written to DIR (%(default)s)")
    add("-o", "--out", type=Path, help="folder DIR for the results")
    add("--json", action="store_true", help="print the document instead of the tables")
    args = parser.parse_args(argv)
    kinds = words(args.export, "export", EXPORTS)
    check_packages(args.out is not None and "html" in kinds)
    if args.out:
        report.check_out(args.out / "latency.json")
    document: dict[str, Any] = {"schema": SCHEMA, "scope": SCOPE, "partial": False}
    document["device_time"] = "device time: none, this run used no GPU"
    if args.device != "cpu":
        document["device_time"] = "device time: not measured, stages end with the GPU's answer"
    document |= {"command": ["python", "-m", "benchmarks", "latency", *argv]}
    document |= {"prior": args.prior, "hashes": hashes(args.prior)}
    environment = report.environment() | machine.description()
    document["environment"] = environment | {"before": machine.state()}
    document |= {"rows": [], "memory": [], "power": [], "peers": []}
    code = 0
    try:
        measure(args, document)
    except KeyboardInterrupt:
        document["partial"], code = True, 130
        print("interrupted: what was measured is kept and marked partial", file=sys.stderr)
    document["environment"]["after"] = machine.state()
    long = [
        (v, f"{k}, {r['name']}")
        for r in document["rows"]
        for k, v in r["stage_p50_ms"].items()
        if v >= SHORT and k not in ("unaccounted", "queue", "refine per step")
    ]
    if long:
        each, shortest = overhead_ms(), min(long)
        document["overhead"] = {"ms_a_stage": each, "share": each / shortest[0], "of": shortest[1]}
    if args.json:
        print(json.dumps(document))
    else:
        print(table(document))
        for what in ("memory", "power", "peers"):
            if document[what]:
                shown = [{k: v for k, v in r.items() if k != "samples"} for r in document[what]]
                print(f"\n{report.table(shown)}")
        print("\n" + "\n".join(notes(document)))
        if args.power and not document["power"] and not code:
            print("power: no sensor that this machine shows", file=sys.stderr)
    if args.out:
        for path in export(document, args.out, kinds):
            print(f"saved {path}", file=sys.stderr)
    return code
