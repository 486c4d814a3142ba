"""Time of the CUDA module, compared with PyTorch on the same GPU and with the GPU's own rates.

    python -m benchmarks gpu -o FOLDER [--compiled] [--only filter]

Everything runs in one process. The outputs are compared, then the peers run in turns (A B C A B C
...). Peers are eager PyTorch, the same recorded as a CUDA graph and, with --compiled, the same
compiled by torch.compile, which takes minutes.

"device" is the time between events of the GPU. For filters and upsampling it is the mean time of a
call in a burst of calls, which the host queues while the GPU waits; the calls use several copies of
the inputs in turns, so that large inputs are not in the GPU's cache. For refinements it is the time
of the steps alone; our Refiner measures it with its own events. "wall" is the time from a call
until its result is complete; for refinements it includes the last forward pass and the copy of the
labels to the host.

"of copy" is the least traffic (inputs read once, outputs written once) divided by the device time
and by the rate of a large copy on the device. "of matmul" is the useful operations (2 x 3 passes x
multiply-accumulates of the plain convolutions) divided by the device time and by the rate of a
large matrix product of the same precision. Both rates are measured in the same turns. "fp32" is
compared with PyTorch's float32. "fp16" (half precision on tensor cores) is compared with PyTorch's
autocast and TF32, whichever is faster.

FOLDER/gpu.json, or gpu-compiled.json, contains all samples. It is written after each case.
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
from benchmarks.speed.gpu.comparison import FAILURES, Case, say
from benchmarks.speed.gpu.device import find_gpu, nvidia_smi
from benchmarks.speed.gpu.goals import goals
from benchmarks.speed.gpu.timing import measure
from runtime.errors import InputError, SdkError, VerificationFailed
from runtime.files import write_atomic
from runtime.tools.cli import Parser, out_path

ROOT = Path(__file__).resolve().parents[3]


def say_rows(found: list[dict[str, Any]]) -> None:
    """Print a line for each row of a case. The range is that of the device times."""
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
    """Return a hash of the source files. It identifies the sources in a folder without git."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("runtime/**/*"), *ROOT.glob("benchmarks/**/*.py")]):
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def state() -> dict[str, Any]:
    """Return the changing values of the machine and of the GPU, at this moment."""
    return machine.state() | {"nvidia_smi": nvidia_smi()}


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code.

    Raises
    ------
    SdkError : options, libraries or pictures are wrong or missing; the caller prints it.
    """
    parser = Parser("python -m benchmarks gpu", description=__doc__)
    parser.add_argument("-o", "--out", type=out_path, required=True, help="folder for the JSON")
    parser.add_argument("--compiled", action="store_true", help="also compare with torch.compile")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    args = parser.parse_args(argv)
    names = [name for name in CASES if args.only in name]
    if not names:
        raise InputError(
            f"no case's name contains {args.only!r}: {'; '.join(CASES)}", fix="--only filter"
        )
    table.make_folder(args.out)
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
        case: Case | None = None
        found: list[dict[str, Any]] | None = None
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
        case = found = None  # free the device memory of the case
        if args.compiled:
            # Without a reset, torch.compile stops compiling a function after several compilations.
            gpu.torch.compiler.reset()
        gpu.clean()
        write(path, document)
    document |= {"after": state(), "complete": True}
    write(path, document)
    for goal in document["goals"]:
        met = {True: "met", False: "NOT MET", None: "not measured"}[goal["met"]]
        value = "" if goal["value"] is None else f": {goal['value']:.3g}"
        say(f"{met:<13}{goal['goal']}{value}")
    if document["wrong"]:
        raise VerificationFailed(
            "; ".join(document["wrong"]), fix=f"report this with the file {path}"
        )
    return 1 if document["failed"] else 0


def write(path: Path, document: dict[str, Any]) -> None:
    """Write the document to its file, whole or not at all."""
    write_atomic(path, table.as_json(document).encode())
