"""Time from the start of a process to the labels of one photo, and of later calls.

    python -m benchmarks photo [--picture PATH] [--priors kmeans,A.onnx] [--threads 1,2] [-o JSON]

"first" is the time of a new process: start, import, load, segment. "steady" is the median of later
calls on the same picture; "without prior" is the same without the time of the prior. The published
procedure is 1000 eager PyTorch steps of dynaguide at the picture's full size. Its time is
extrapolated from a few measured steps, without its prior and its post-processing. Each repetition
of a prior starts a new process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment, table
from benchmarks.speed.harness import PAUSE, last_error, rounds, start, stop, thread_counts
from benchmarks.speed.workloads import find_case
from runtime.checks import check_count
from runtime.core.resize import resize
from runtime.device.choose import default_threads
from runtime.errors import InputError
from runtime.pictures.load import load_image
from runtime.tools.cli import Parser, option, out_path
from sdk.image import encode_image

# Steps of the published procedure; the picture's long side in pixels; later calls of a process.
STEPS, LONG_SIDE, CALLS = 1000, 481, 9
CHILD = """
import json, sys, time
marks = [time.monotonic()]
from sdk import Segmenter
marks.append(time.monotonic())
prior, picture, threads, calls = json.loads(sys.argv[1])
segmenter = Segmenter(prior, threads=threads)
marks.append(time.monotonic())
results = [segmenter(picture)]
marks.append(time.monotonic())
results += [segmenter(picture) for _ in range(calls)]
timings = [result.timings for result in results[1:]]
print(json.dumps({"marks": marks, "timings": timings, "steps": results[0].stats["steps"],
                  "size": results[0].stats["working_size"]}))
"""


def one_process(prior: str, picture: Path, threads: int) -> dict[str, Any]:
    """Segment a picture in a new process.

    Parameters
    ----------
    prior : "kmeans" or an .onnx file.
    picture : a picture file.
    threads : number of threads.

    Returns
    -------
    "first": milliseconds of start, import, load and segment; "timings": of the later calls, by
    stage; "steps" and "size" (height, width) of the refinement.

    Raises
    ------
    InputError : the process failed.
    """
    what = json.dumps([prior, str(picture), threads, CALLS])
    start = time.monotonic()
    command = [sys.executable, "-c", CHILD, what]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise InputError(f"{prior}: {last_error(done.stderr)}")
    found = json.loads(done.stdout)
    marks = np.diff([start, *found["marks"]]) * 1e3
    found["first"] = dict(zip(("start", "import", "load", "segment"), marks, strict=True))
    return found


def measure(prior: str, picture: Path, threads: int, repeats: int) -> dict[str, Any]:
    """Measure one prior in ``repeats`` processes; returns a row with the medians.

    Parameters are those of :func:`one_process`.
    """
    runs = []
    for _ in range(repeats):
        time.sleep(PAUSE)
        runs.append(one_process(prior, picture, threads))
    first = {k: [r["first"][k] for r in runs] for k in runs[0]["first"]}
    calls = [t for r in runs for t in r["timings"]]
    row = {"prior": Path(prior).stem, "threads": threads, "steps": runs[0]["steps"]}
    row |= {f"{k} ms": round(float(np.median(v))) for k, v in first.items()}
    whole = [float(sum(v)) for v in zip(*first.values(), strict=True)]
    row["first ms"] = round(float(np.median(whole)))
    steady = [t["total"] for t in calls]
    row["steady ms"] = round(float(np.median(steady)), 1)
    alone = float(np.median([t["total"] - t["prior"] for t in calls]))
    row |= {"first by process, ms": [round(t, 3) for t in whole]}
    row |= {"steady by call, ms": [round(t, 3) for t in steady]}
    return row | {"without prior ms": round(alone, 1), "runs": runs}


def published(height: int, width: int, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Measure a few steps of the published procedure, and extrapolate their time to STEPS steps.

    Returns
    -------
    Two rows: eager PyTorch, and the same with glibc's malloc tuned; fewer if PyTorch is missing.
    """
    case = f"dynaguide {height}x{width}"
    names = ("torch eager steps", "torch eager steps, tuned")
    workers = start(names, case, threads)
    try:
        rounds(workers, repeats)
    finally:
        stop(workers)
    rows = []
    for worker in workers:
        step = float(np.median(worker.seconds)) / find_case(case).steps
        name = f"published, extrapolated ({worker.peer})"
        row = {"prior": name, "threads": threads, "steps": STEPS}
        rows.append(
            row | {"without prior ms": round(1e3 * STEPS * step), "two steps, s": worker.seconds}
        )
    return rows


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = Parser("python -m benchmarks photo", description=__doc__)
    parser.add_argument(
        "--picture", help="scaled to 481 pixels on its long side (a photo of scikit-image)"
    )
    parser.add_argument(
        "--priors", default="kmeans", help="kmeans and .onnx files, with commas (%(default)s)"
    )
    parser.add_argument(
        "--threads", type=option(thread_counts), default=str(default_threads()),
        help="e.g. 1,2 (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=int, default=5, help="processes for each prior (%(default)s)"
    )
    parser.add_argument("-o", "--out", type=out_path, help="JSON file")
    args = parser.parse_args(argv)
    check_count("repeats", args.repeats, 1, 10**6)
    table.check_out(args.out)
    if args.picture:
        picture, _ = load_image(args.picture)
    else:
        from runtime.pictures.files import demo_photo

        picture = demo_photo()
    scale = LONG_SIDE / max(picture.shape[:2])
    height, width = (max(1, round(n * scale)) for n in picture.shape[:2])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.png"
        path.write_bytes(encode_image(resize(picture, height, width), ".png"))
        for threads in args.threads:
            for prior in args.priors.split(","):
                print(f"  {prior}, {threads} threads ...", file=sys.stderr)
                rows.append(measure(prior, path, threads, args.repeats))
            print(f"  published procedure, {threads} threads ...", file=sys.stderr)
            theirs = published(height, width, threads, args.repeats)
            for row in rows if theirs else []:
                if row["threads"] == threads:
                    ratios = [t["without prior ms"] / row["without prior ms"] for t in theirs]
                    row["of published"] = f"1/{ratios[0]:.0f}"
                    row["of tuned"] = f"1/{ratios[-1]:.0f}"
            rows += theirs
    print(f"{height}x{width}")
    raw = [row.pop("runs", None) for row in rows]
    hidden = ("first by process, ms", "steady by call, ms", "two steps, s")
    print(table.as_markdown([{k: v for k, v in row.items() if k not in hidden} for row in rows]))
    if args.out:
        document = {"environment": environment.describe(), "size": [height, width], "rows": rows}
        table.write_json(args.out, document, raw)
    return 0
