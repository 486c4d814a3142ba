"""Time of a refinement step: the core on each instruction set, PyTorch and ONNX Runtime.

    python -m benchmarks step [--threads 1,2] [--repeats 7] [--peers ours,torch] [-o results.json]
    python -m benchmarks step --peers best --cases "residual 96x96,residual 1024x1024"

Every peer has a process of its own (:mod:`benchmarks.speed.worker`). Their first losses are
compared, then the peers run in turns. "tuned" is PyTorch with glibc's malloc set to keep freed
memory. The machine's own float32 matrix product and copy run in the same turns: "of matmul" is the
useful operations per second (2 x 3 passes x multiply-accumulates of the plain convolutions) divided
by those of the matrix product. Peers that are not installed are reported and left out. A case is an
objective and a size: with several sizes, "ns/pixel" shows how the time grows with the size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import runtime
from benchmarks import environment, table
from benchmarks.speed.harness import (
    MACHINE,
    Worker,
    check_peers,
    rounds,
    start,
    stop,
    thread_counts,
)
from benchmarks.speed.workloads import COPY, MATRIX, find_case, refiner
from runtime.checks import check_count
from runtime.device.choose import default_threads
from runtime.errors import InputError, VerificationFailed
from runtime.tools.cli import Parser, option, out_path

TORCH = ("torch eager", "torch eager, tuned", "torch channels-last, tuned", "torch compiled, tuned")


def macs_per_pixel(case: str) -> int:
    """Return the multiply-accumulates per pixel of the convolutions in one forward pass.

    Parameters
    ----------
    case : a name for workloads.find_case.
    """
    state = refiner(find_case(case)).state_dict()
    return sum(v.size for k, v in state.items() if v.ndim == 4 and not k.startswith("momentum."))


def measure(name: str, threads: int, repeats: int, peers: list[str]) -> list[dict[str, Any]]:
    """Measure one case; returns a row for each peer.

    Parameters
    ----------
    name : a name for workloads.find_case.
    threads : number of threads.
    repeats : number of turns.
    peers : names for harness.Worker.

    Raises
    ------
    SdkError : no peer started, or one ended.
    VerificationFailed : the first losses of two peers differ.
    """
    workers = start(peers, name, threads)
    try:
        check_peers(workers)
        return _rows(workers, name, threads, repeats)
    finally:
        stop(workers)


def _rows(workers: list[Worker], name: str, threads: int, repeats: int) -> list[dict[str, Any]]:
    losses = {w.peer: w.first for w in workers if w.peer not in MACHINE}
    reference = next(iter(losses.values()))
    for peer, loss in losses.items():
        if not abs(loss - reference) <= 1e-4 * abs(reference):
            raise VerificationFailed(
                f"{name}: first loss of {peer} is {loss}, not {reference}",
                fix="report this; leave the peer out with --peers to measure the others",
            )
    rounds(workers, repeats)
    case = find_case(name)
    operations = 6 * macs_per_pixel(name) * case.height * case.width * case.steps
    medians = {w.peer: float(np.median(w.seconds)) for w in workers}
    rate = 2 * MATRIX**3 / medians["matmul"]
    rows = []
    for worker in workers:
        median, peak = medians[worker.peer], worker.peak()
        row = {"case": name, "threads": threads, "who": worker.peer}
        if worker.peer == "matmul":
            row["GFLOP/s"] = round(rate / 1e9, 1)
        elif worker.peer == "copy":
            row["GB/s"] = round(2 * COPY / median / 1e9, 1)
        else:
            row |= {
                "ms/step": round(1e3 * median / case.steps, 1),
                "min": round(1e3 * min(worker.seconds) / case.steps, 1),
                "max": round(1e3 * max(worker.seconds) / case.steps, 1),
                "ns/pixel": round(1e9 * median / case.steps / (case.height * case.width)),
                "GFLOP/s": round(operations / median / 1e9, 1),
                "of matmul": round(operations / median / rate, 2),
                "MiB": round(peak),
            }
            if "torch eager" in medians:
                row["x torch eager"] = round(medians["torch eager"] / median, 2)
            others = [medians[p] for p in medians if p.startswith("torch")]
            if others:
                row["x best torch"] = round(min(others) / median, 2)
            if "onnx" in medians:
                row["x onnx"] = round(medians["onnx"] / median, 2)
        rows.append(row | {"seconds": worker.seconds})
    return rows


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code.

    Raises
    ------
    SdkError : options, libraries or pictures are wrong or missing; the caller prints it.
    """
    parser = Parser("python -m benchmarks step", description=__doc__)
    parser.add_argument(
        "--threads", type=option(thread_counts), default=str(default_threads()),
        help="e.g. 1,2 (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=7, help="number of turns (%(default)s)")
    parser.add_argument(
        "--cases",
        default="dynaguide 321x481,residual 180x240",
        help="objective and size, with commas (%(default)s)",
    )
    parser.add_argument(
        "--peers",
        default="ours,torch,onnx",
        help="some of these; best is ours on the fastest instruction set only (%(default)s)",
    )
    parser.add_argument("-o", "--out", type=out_path, help="JSON file")
    args = parser.parse_args(argv)
    table.check_out(args.out)
    kinds = {
        "best": [f"ours {runtime.isas()[-1]}"],
        "ours": [f"ours {t}" for t in reversed(runtime.isas())],
        "torch": list(TORCH),
        "onnx": ["onnx"],
    }
    asked, cases = args.peers.split(","), args.cases.split(",")
    wrong = [word for word in asked if word not in kinds]
    if wrong:
        raise InputError(
            f"peer {wrong[0]!r} is unknown; wanted some of {', '.join(kinds)}",
            fix="--peers ours,torch",
        )
    for name in cases:
        try:
            find_case(name)
        except ValueError:
            raise InputError(
                f"case {name!r} is unknown; wanted an objective and a size of at least 1x1",
                fix='e.g. --cases "residual 180x240"',
            ) from None
    check_count("repeats", args.repeats, 1, 10**6)
    peers = [peer for kind in asked for peer in kinds[kind]] + list(MACHINE)
    rows = [
        row
        for count in args.threads
        for name in cases
        for row in measure(name, count, args.repeats, peers)
    ]
    print(table.as_markdown([{k: v for k, v in row.items() if k != "seconds"} for row in rows]))
    if args.out:
        table.write_json(args.out, {"environment": environment.describe(), "rows": rows})
    return 0
