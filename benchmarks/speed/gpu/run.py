"""Time of the CUDA module beside PyTorch on the same GPU, and what the GPU itself can do.

    python -m benchmarks gpu -o FOLDER [--compiled] [--only filter]

Everything runs in one process, turn by turn (A B C A B C ...), after outputs have been compared.
"device" is by events of the GPU: of filters and upsampling, in a burst that is queued while the GPU
is kept waiting, over inputs that do not fit its cache; of refinements, of the steps alone (ours by
its own events). "wall" is one call until its result is there: of refinements with the last forward
pass and the labels on the host. "of copy" is the least traffic (inputs read once, outputs written
once) over the rate of a large copy on the device, bytes read and written; "of matmul" the useful
operations (2 x 3 passes x multiply-accumulates of the plain convolutions) over the rate of a large
matrix product of the same precision. Both are measured in the same turns. Precisions: float32; and
on tensor cores half precision, ours beside PyTorch's (autocast) and TF32, whichever is faster
there. Peers: eager PyTorch, the same recorded as a CUDA graph, and with --compiled what
torch.compile makes of it, which takes minutes. FOLDER/gpu.json, or gpu-compiled.json, has the raw
samples; it is written after each case.
"""

from __future__ import annotations

import datetime
import hashlib
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment, machine, table
from benchmarks.speed.gpu.cases import CASES
from benchmarks.speed.gpu.comparison import FAILURES, say
from benchmarks.speed.gpu.device import find_gpu, nvidia_smi
from benchmarks.speed.gpu.goals import goals
from benchmarks.speed.gpu.timing import measure
from runtime.errors import InputError, SdkError, VerificationFailed
from runtime.files import write_atomic
from runtime.tools.cli import Parser, some_path

ROOT = Path(__file__).resolve().parents[3]


def say_rows(found: list[dict[str, Any]]) -> None:
    """A line for each peer."""
    for row in found:
        line = f"  {row['who']:<28}{row['precision']:<6}"
        device = row["samples"]["device ms"]
        line += f"device {row['device ms']:9.4f} ms ({min(device):.4f} to {max(device):.4f})"
        line += f"  wall {row['wall ms']:9.4f} ms"
        for name in ("GB/s", "TFLOP/s", "ms/step", "of copy", "of matmul", "x ours"):
            if name in row:
                line += f"  {name} {row[name]:.4g}"
        say(line)


def sources() -> str:
    """A hash of the sources that were measured, for trees without git."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("runtime/**/*"), *ROOT.glob("benchmarks/**/*.py")]):
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def state() -> dict[str, Any]:
    """Of the machine, now."""
    return machine.state() | {"nvidia_smi": nvidia_smi()}


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = Parser("python -m benchmarks gpu", description=__doc__)
    parser.add_argument("-o", "--out", type=some_path, required=True, help="folder for the JSON")
    parser.add_argument("--compiled", action="store_true", help="torch.compile as a peer too")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    args = parser.parse_args(argv)
    names = [name for name in CASES if args.only in name]
    if not names:
        raise InputError(f"no case's name holds {args.only!r}: {'; '.join(CASES)}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{args.out} is no folder to write to: {error.strerror}") from error
    gpu = find_gpu()
    path = args.out / ("gpu-compiled.json" if args.compiled else "gpu.json")
    document: dict[str, Any] = {
        "command": ["python", "-m", "benchmarks", "gpu", *argv],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": environment.commit(),
        "sources": sources(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "gpu": gpu.describe(),
        "machine": machine.description(),
        "before": state(),
        "rows": [],
        "left_out": [],
        "goals": [],
        "failed": [],
        "wrong": [],
        "complete": False,
    }
    for i, name in enumerate(names):
        say(f"{i + 1} of {len(names)}: {name}")
        begin = time.monotonic()
        try:
            case = CASES[name](gpu, name, args.compiled)
            document["left_out"] += case.left_out
            document["wrong"] += case.wrong
            found = measure(case)
        except (SdkError, *FAILURES) as error:
            document["failed"].append(f"{name}: {type(error).__name__}: {error}")
            say(f"  failed: {type(error).__name__}: {error}")
        else:
            say_rows(found)
            document["rows"] += found
            document["goals"] += goals(name, found)
            say(f"  {time.monotonic() - begin:.0f} s")
        case = found = None  # with all that they hold on the device
        if args.compiled:
            gpu.torch.compiler.reset()  # it gives up on a function that it has compiled too often
        gpu.clean()
        write(path, document)
    document |= {"after": state(), "complete": True}
    write(path, document)
    for goal in document["goals"]:
        met = {True: "met", False: "NOT MET", None: "not measured"}[goal["met"]]
        value = "" if goal["value"] is None else f": {goal['value']:.3g}"
        say(f"{met:<13}{goal['goal']}{value}")
    if document["wrong"]:
        raise VerificationFailed("; ".join(document["wrong"]))
    return 1 if document["failed"] else 0


def write(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all."""
    write_atomic(path, table.as_json(document).encode())
