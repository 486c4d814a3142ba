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
import hashlib
import json
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from benchmarks import document as documents
from benchmarks import machine, metrics, peers, report
from benchmarks.document import MODES, Row, summarise
from benchmarks.step import last_error, thread_counts
from runtime import load
from runtime.backend import default_threads
from runtime.build import BACKENDS
from runtime.bundle import MANIFEST
from runtime.cli import Parser, option, some_path
from runtime.config import PRESETS
from runtime.device import parse_device
from runtime.errors import InputError, MissingBackend, SdkError
from runtime.prior import KMeansPrior
from runtime.resize import resize
from sdk import RefineConfig, Segmenter
from sdk.image import load_image, write_atomic
from sdk.prior import open_bundle
from sdk.segmenter import Clock

SCOPE = (
    "end-to-end wall time: uint8 RGB picture on the host to int32 labels on the host, with "
    "preprocessing, prior, all refinement steps, guided filter and postprocessing"
)
EXPORTS = {
    "json": "latency.json",
    "csv": "latency.csv",
    "md": "latency.md",
    "trace": "trace.json",
    "html": "latency.html",
}
WARM_STEPS = 2  # of a stream's frame, as in Segmenter.stream
FRAMES = 64  # of a video, shown to and fro
WARM_UP, WARM_CALLS = 0.5, 3  # at least so many seconds and calls, after the first one
CLOCK_EVERY = 0.1  # seconds between readings of the processor's clock
IDLE = 3.0  # seconds of idle power
MEMORY = """
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
out = {"loaded MiB": round(loaded - base, 1), "peak MiB": round(memory("VmHWM") - base, 1)}
for i, (a, b, c) in enumerate(zip(device, device_loaded, used())):
    out |= {f"GPU {i}, loaded MiB": b - a, f"GPU {i}, run MiB": c - a}
print(json.dumps(out))
"""


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
    clock, laps = Clock(), 20_000
    start = time.perf_counter()
    for _ in range(laps):
        clock.lap("stage")
    return 1e3 * (time.perf_counter() - start) / laps


def quality_of(
    seg: Segmenter, pictures: list[np.ndarray], truths: list[np.ndarray] | None
) -> dict[str, Any]:
    """mIoU on the labelled pictures; or for a bundle, the share of its golden picture with the
    labels that the float32 prior's recorded answer gets, refined by the float32 core."""
    if truths is not None:
        names = seg.prior.names
        if names is None:
            raise InputError("labels need a prior that names its classes; this one does not")
        counts: Any = 0
        for picture, truth in zip(pictures, truths, strict=True):
            counts = counts + metrics.confusion(seg(picture).labels, truth, len(names), ignore=255)
        value = metrics.miou(counts)
        if not np.isfinite(value):
            raise InputError("the labels have no pixel that counts: all are 255")
        return {"what": "mIoU", "value": value, "pictures": len(truths)}
    bundle = open_bundle(seg.info()["bundle"]) if "bundle" in seg.info() else None
    if bundle is None:
        return {"what": "not measured"}
    if seg.refine is not None and load.starts_trained(bundle, seg.refine):
        return {"what": "not measured (starts from trained weights)"}
    golden = bundle.tensors(bundle.manifest["golden"][0])
    picture, guide = golden["picture"], golden["guide"]
    low = np.asarray(seg.prepare(picture, Clock())[1])
    if isinstance(seg.prior, KMeansPrior):  # has no file, and depends on the working size
        guide = seg.prior(picture, low)
    exact = Reference(lambda _: guide, refine=seg.refine, filter=seg.filter, min_area=0)
    exact.low, exact.prior.names = low, seg.prior.names
    area, seg.min_area = seg.min_area, 0
    same = exact(picture).labels == seg(picture).labels
    seg.min_area = area
    return {"what": "agreement with float32 on the golden picture", "value": float(same.mean())}


class Reference(Segmenter):
    """The float32 core at a working size that something else has chosen."""

    low: np.ndarray

    def prepare(self, picture: np.ndarray, clock: Clock) -> tuple[np.ndarray, np.ndarray]:
        return picture, self.low


def memory_run(options: dict[str, Any], picture: np.ndarray) -> dict[str, Any]:
    """Memory of a fresh process, MiB over what it holds after the imports."""
    sent = pickle.dumps((options, picture))
    done = subprocess.run([sys.executable, "-c", MEMORY], input=sent, capture_output=True)
    if done.returncode:
        raise InputError(f"the memory run failed: {last_error(done.stderr.decode())}")
    return {k: v for k, v in json.loads(done.stdout).items() if v}


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


def hashes(prior: str) -> dict[str, str]:
    """sha256 of a model file, or of a bundle's manifest, which holds those of its other files."""
    path = Path(prior)
    bundle = open_bundle(prior)
    if bundle is None and (prior == "kmeans" or not path.is_file()):
        return {}
    file = path if bundle is None else bundle.path / MANIFEST
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    return {documents.shown(str(file.relative_to(path.parent))): hash_of([data])}


def hash_of(parts: Iterable[Any]) -> str:
    """sha256 of buffers, one after another, in hexadecimal."""
    found = hashlib.sha256()
    for part in parts:
        found.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part)
    return found.hexdigest()


def export(document: dict[str, Any], folder: Path, kinds: list[str]) -> list[InputError]:
    """Write what was asked for, each file whole or not at all, the raw samples first; what could
    not be written."""
    failures = []
    for kind in kinds:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / EXPORTS[kind], exported(document, kind).encode())
        except InputError as error:
            failures.append(error)
        except (OSError, ValueError) as error:
            failures.append(InputError(f"{folder / EXPORTS[kind]} cannot be written: {error}"))
        else:
            print(f"saved {documents.shown(str(folder / EXPORTS[kind]))}", file=sys.stderr)
    return failures


def exported(document: dict[str, Any], kind: str) -> str:
    """The document as one of EXPORTS."""
    if kind == "json":
        return json.dumps(document, indent=1, allow_nan=False) + "\n"
    if kind == "csv":
        return documents.as_csv(document)
    if kind == "md":
        return documents.as_text(document) + "\n"
    if kind == "trace":
        return documents.as_trace(document)
    from benchmarks import page

    return page.render({"latency": document})


def positive(text: str) -> float:
    """ "0.5" as a finite number above 0; InputError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise InputError(f"it is {text!r}; wanted a number above 0")
    return value


def scale_of(text: str) -> float:
    """ "0.5" as a number above 0, at most 1; InputError for anything else."""
    value = positive(text)
    if value > 1:
        raise InputError(f"it is {text!r}; wanted a number above 0, at most 1")
    return value


def numbers(text: str, what: str, low: float, high: float) -> list[float]:
    """ "50,99" as numbers in [low, high]; InputError for anything else."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(low <= v <= high for v in values):
        raise InputError(f"{what} is {text!r}; wanted numbers from {low:g} to {high:g}, as 1,2")
    return list(dict.fromkeys(values))


def words(text: str, what: str, known: Iterable[str]) -> list[str]:
    """Known words of "a,b", in the order in which they are known; InputError for others."""
    asked = text.split(",")
    for word in asked:
        if word not in known:
            raise InputError(f"{what} is {word!r}; wanted some of {', '.join(known)}")
    return [word for word in known if word in asked]


def size_of(text: str) -> tuple[int, int]:
    """ "480x640" as height and width."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() and 0 < int(p) <= 16384 for p in parts):
        raise InputError(f"imgsz is {text!r}; wanted HEIGHTxWIDTH up to 16384, as 480x640")
    return int(parts[0]), int(parts[1])


def device_of(text: str) -> str:
    """A device's name; InputError for anything else."""
    parse_device(text)
    return text


def load_pictures(args: argparse.Namespace) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """The pictures, and their truth where labels were given, at the size asked for."""
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
    size, truths = args.imgsz, None
    if args.labels:
        if len(args.labels) != len(pictures):
            raise InputError(
                f"--labels has {len(args.labels)} files, --picture {len(pictures)}; wanted one each"
            )
        truths = []
        for path, picture in zip(args.labels, pictures, strict=True):
            if not Path(path).exists():
                raise InputError(f"{path} does not exist", fix=f"seen from {Path.cwd()}")
            data = np.fromfile(path, np.uint8) if Path(path).is_file() else np.empty(0, np.uint8)
            truth = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
            if truth is None or truth.ndim != 2:
                raise InputError(f"{path} is no single-channel picture of class numbers")
            if truth.shape != picture.shape[:2]:
                raise InputError(
                    f"{path} is {truth.shape[0]}x{truth.shape[1]}, its picture "
                    f"{picture.shape[0]}x{picture.shape[1]}"
                )
            height, width = size or truth.shape
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


def measure(args: argparse.Namespace, document: dict[str, Any], rows: list[Row]) -> None:
    """Fill the document and the rows one by one, so that an error or an interrupt loses nothing."""
    pictures, truths = load_pictures(args)
    modes = args.mode or [m for m in MODES if m != "paced" or args.rate is not None]
    seconds, asked = args.duration, args.refine
    if (n := len(modes) * len(args.threads) * len(asked or [0])) > documents.MOST_ROWS:
        raise InputError(f"these are {n} rows; wanted at most {documents.MOST_ROWS}")
    for peer in args.peer:
        peers.check(peer)
    options: dict[str, Any] = {"prior": args.prior, "device": args.device}
    options |= {"backend": args.backend, "refine_backend": args.refine_backend}
    options["precision"] = args.precision
    base = None
    if asked != [0]:
        base = Segmenter(**options, refine=args.preset, threads=1, self_test="never").refine
    if base is not None and args.scale is not None:
        base = replace(base, scale=args.scale)
    document["percentiles"] = args.percentile
    document["picture"] = [*pictures[0].shape[:2], len(pictures)]
    document["hashes"]["pictures"] = hash_of(pictures)
    # What libraries do once in a process is in no row.
    one = base and replace(base, steps=min(base.steps or 0, 1))
    Segmenter(**options, refine=one, threads=1, self_test="never")(pictures[0])
    for threads in args.threads:
        cv2.setNumThreads(threads)
        for steps in asked if asked is not None else [base.steps if base else 0]:
            config = replace(base or RefineConfig(), steps=steps) if steps else None
            made = options | {"refine": config, "threads": threads}
            quality = quality_of(Segmenter(**made, self_test="always"), pictures, truths)
            for mode in modes:
                row = Row(mode, steps, threads, device=args.device, quality=quality)
                if mode == "stream" and steps:
                    row.quality = {"what": "not measured"}  # that is of a cold start
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
                    print("  torch-eager has nothing to do in 0 steps: left out", file=sys.stderr)
                    continue
                print(f"  {peer}, {what['calls']} ...", file=sys.stderr)
                document["peers"].append(peers.PEERS[peer](seg, pictures[0], seconds))


def refinement(config: RefineConfig) -> str:
    """The objective, the working scale, and settings that are not the objective's own."""
    changes = config.changes()
    words = [f"{k} {v[0]}" for k, v in changes.items() if k not in ("steps", "seed", "scale")]
    return ", ".join([f"{config.objective} at scale {config.scale:g}", *words])


def run_row(row: Row, options: dict[str, Any], pictures: list[np.ndarray], seconds: float) -> None:
    """Open, run once, warm up, measure."""
    start = time.perf_counter()
    seg = Segmenter(**options, self_test="never")
    loaded = time.perf_counter()
    row.backend = seg(pictures[0]).backend
    row.first_ms = 1e3 * (time.perf_counter() - loaded)
    row.load_ms = 1e3 * (loaded - start)
    row.precision = seg.info().get("precision", "fp32")
    warm_up(seg, pictures)
    with tqdm(total=seconds, desc=row.name(), unit="s", disable=None, leave=False) as bar:

        def tell(now: float) -> None:
            if not bar.disable and now - bar.n > 0.5:
                bar.n = min(round(now, 1), seconds)
                bar.refresh()

        RUN[row.mode](row, seg, pictures, seconds, tell)


def percentiles(text: str) -> list[float]:
    """Of "50,99"."""
    return numbers(text, "percentile", 1, 99.99)


def step_counts(text: str) -> list[int]:
    """Of "0,4,8"."""
    counts = numbers(text, "refine", 0, 100_000)
    if any(n % 1 for n in counts):
        raise InputError(f"refine is {text!r}; wanted whole numbers of steps")
    return [int(n) for n in counts]


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; a wrong one ends the process with code 2."""
    parser = Parser(
        "python -m benchmarks latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prior", nargs="?", default="kmeans", help="a bundle, an .onnx file, or kmeans (default)")
    add("--picture", nargs="+", help="shown in turn (default: a photo of scikit-image's)")
    add(
        "--labels", nargs="+", help="the prior's class numbers of each picture (255: any), for mIoU"
    )
    add("--video", help=f"its first {FRAMES} frames, to and fro")
    add(
        "--imgsz",
        type=option(size_of),
        help="HEIGHTxWIDTH that pictures are made first (default: as they are)",
    )
    add(
        "--refine",
        type=option(step_counts),
        help="steps, e.g. 0,4,8; 0 = the prior alone (default: the preset's; "
        f"{WARM_STEPS} a frame of a stream)",
    )
    add(
        "--scale",
        type=option(scale_of),
        help="of the refinement's picture, up to 1 (the preset's)",
    )
    presets = ("default", *PRESETS)
    add("--preset", default="default", choices=presets, help="refinement (%(default)s)")
    add(
        "--mode",
        type=option(lambda text: words(text, "mode", MODES)),
        help="some of back-to-back,paced,stream (default: all, paced only with --rate)",
    )
    add("--rate", type=option(positive), help="pictures/s of paced")
    add("--duration", type=option(positive), default=10.0, help="seconds a row (%(default)g)")
    add("--percentile", type=option(percentiles), default="50,90,95,99", help="(%(default)s)")
    add(
        "--threads",
        type=option(thread_counts),
        default=str(default_threads()),
        help="e.g. 1,2 (%(default)s)",
    )
    add("--device", type=option(device_of), default="cpu", help="cpu, cuda, cuda:1 (%(default)s)")
    precisions = ("fp32", "fp16")
    add("--precision", default="fp32", choices=precisions, help="of a GPU's native refinement")
    add("--backend", default="onnx", choices=BACKENDS, help="of a bundle's prior (%(default)s)")
    backends = ("native", *BACKENDS)
    add("--refine-backend", default="native", choices=backends, help="(%(default)s)")
    add(
        "--peer",
        type=option(lambda text: words(text, "peer", peers.PEERS)),
        default=[],
        help=f"turn by turn in this process: {', '.join(peers.PEERS)}",
    )
    add("--memory", action="store_true", help="peak memory, each in a process of its own")
    add("--power", action="store_true", help="joules a picture, in a run of its own")
    add(
        "--export",
        type=option(lambda text: words(text, "export", EXPORTS)),
        help=f"written to DIR ({','.join(EXPORTS)})",
    )
    add("-o", "--out", type=some_path, help="folder DIR; files of the same names are replaced")
    add("--json", action="store_true", help="print the document instead of the tables")
    args = parser.parse_args(argv)
    if args.picture and args.video:
        parser.error("--picture and --video are both given; wanted one of them")
    if args.labels and not args.picture:
        parser.error("--labels need the --picture that they are of")
    if args.mode and "paced" in args.mode and args.rate is None:
        parser.error("--mode paced needs a rate, as --rate 30")
    if args.mode and "paced" not in args.mode and args.rate is not None:
        parser.error("--rate is for --mode paced")
    if args.export and args.out is None:
        parser.error("--export needs a folder, as -o DIR")
    if "torch-eager" in args.peer and args.refine == [0]:
        parser.error("--peer torch-eager has nothing to do in 0 steps")
    if args.scale is not None and (args.refine == [0] or args.refine_backend != "native"):
        parser.error("--scale is for the native refinement: a step graph has its own, 0 steps none")
    args.export = args.export or list(EXPORTS)
    return args


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    args = parse(argv)
    check_packages(args.out is not None and "html" in args.export)
    for kind in args.export if args.out else []:
        report.check_out(args.out / EXPORTS[kind])
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
    environment = report.environment() | machine.description()
    document["environment"] = environment | {"before": machine.state()}
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
                ctrl_c.wanted = False  # nothing is lost from here on
        except KeyboardInterrupt:
            code = 130
        except (SdkError, MemoryError, OSError, RuntimeError, ValueError, cv2.error) as error:
            failure = error
        document["rows"] = [summarise(r, args.percentile) for r in rows if r.total_ms]
        document["partial"] = failure is not None or code != 0
        if not document["rows"]:
            if failure is not None:
                raise failure
            print("interrupted before anything was measured; nothing is written", file=sys.stderr)
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
        print("power: no sensor that this machine shows", file=sys.stderr)
    if document["partial"]:
        print("what was measured is kept and marked partial", file=sys.stderr)
    for error in unwritten:
        print(f"error: {error}", file=sys.stderr)
    if failure is not None:
        raise failure
    return code or int(bool(unwritten))


class Interrupts:
    """Ctrl-C while something is measured; those that follow at once shall not lose what the first
    one keeps."""

    def __init__(self) -> None:
        self.wanted, self.last = True, -1.0

    def __call__(self, *_: Any) -> None:
        now = time.monotonic()
        if self.wanted and now - self.last > 1:
            self.last = now
            raise KeyboardInterrupt


def overhead(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What recording a stage costs, beside the shortest stage."""
    found = [
        (v, f"{k}, {r['name']}")
        for r in rows
        for k, v in r["stage_p50_ms"].items()
        if v > 0
        and k not in ("unaccounted", "queue", "refine per step")
        and not k.endswith("device time")
    ]
    if not found:
        return None
    each, (least, where) = overhead_ms(), min(found)
    return {"ms_a_stage": each, "share": each / least, "of": where}
