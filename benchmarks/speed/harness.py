"""Start the processes of the peers, let them run in turns, and end them.

A peer is one of the programs that are compared: ours, PyTorch, ONNX Runtime, OpenCV, or one of the
machine's own rates (MACHINE).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runtime.checks import check_count
from runtime.errors import InputError, SdkError

TUNED = {  # glibc's malloc keeps freed memory, so that a step causes no page faults
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}
MACHINE = ("matmul", "copy")  # the machine's rates of a float32 matrix product and of a copy
MOST_THREADS = 256
PAUSE = 0.3  # seconds before a run: busy-waiting threads of the previous peer fall asleep


class Worker:
    """The process of one peer.

    ``first`` is the peer's first answer: its first loss, or samples of its output; None if the
    process ended before that. ``seconds`` are the times of its runs.

    Parameters
    ----------
    peer : the peer's name, as "ours avx2" or "torch eager, tuned".
    case : the name of a case; see workloads.find_case.
    threads : number of threads.
    op : the name of an operation of ops.OPS, or "" for a refinement step.
    """

    def __init__(self, peer: str, case: str, threads: int, op: str = "") -> None:
        counts = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = os.environ | dict.fromkeys(counts, str(threads))
        if peer.startswith("ours"):
            environment["SEG_ISA"] = peer.split()[1].rstrip(",")
        if peer.endswith("tuned"):
            environment |= TUNED
        order = json.dumps({"peer": peer, "case": case, "op": op, "threads": threads})
        self.peer, self.errors = peer, ""
        self.seconds: list[float] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.speed.worker", order],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self.first: Any = None

    def answer(self) -> dict[str, Any]:
        """Read the next JSON line of the process; an empty dict if the process has ended."""
        assert self.process.stdout and self.process.stderr
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.errors = last_error(self.process.stderr.read())
        return {}

    def run(self) -> None:
        """Let the process make one run, and append its seconds to ``seconds``.

        Raises
        ------
        SdkError : the process has ended.
        """
        assert self.process.stdin
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            self.seconds.append(self.answer()["seconds"])
        except (BrokenPipeError, KeyError):
            raise SdkError(
                f"{self.peer} ended: {self.errors or 'it was killed'}",
                fix="leave this peer out, or free memory: the kernel kills processes without it",
            ) from None

    def peak(self) -> float:
        """End the process and return its peak memory in MiB, minus its memory before the peer was
        made; nan if the process has ended before."""
        assert self.process.stdin
        self.process.stdin.close()
        peak = self.answer().get("peak", float("nan"))
        self.process.wait()
        return peak


def last_error(text: str) -> str:
    """Return the last line of a process's stderr; if that is a fix, with the line before."""
    lines = text.strip().split("\n")
    first = len(lines) - 1
    while first > 0 and lines[first].startswith("  fix:"):
        first -= 1
    return "; ".join(line.strip() for line in lines[first:])


def start(peers: Iterable[str], case: str, threads: int, op: str = "") -> list[Worker]:
    """Start a process for each peer. A peer that does not start is reported on stderr and left out.

    Parameters are those of :class:`Worker`.
    """
    workers: list[Worker] = []
    started = False
    try:
        for peer in dict.fromkeys(peers):
            print(f"  {op or case}, {threads} threads: {peer} ...", file=sys.stderr)
            worker = Worker(peer, case, threads, op)
            workers.append(worker)
            worker.first = worker.answer().get("first")
            if worker.first is None:
                print(f"  left out: {peer}: {worker.errors}", file=sys.stderr)
                stop([workers.pop()])
        started = True
    finally:  # end all processes after an interrupt
        if not started:
            stop(workers)
    return workers


def stop(workers: list[Worker]) -> None:
    """End the processes of workers."""
    for worker in workers:
        worker.process.kill()
        worker.process.wait()


def check_peers(workers: list[Worker]) -> None:
    """Check that the processes of MACHINE and of at least one other peer have started.

    Raises
    ------
    SdkError : one of these processes is missing.
    """
    names = {w.peer for w in workers}
    if not {*MACHINE} <= names or names == {*MACHINE}:
        raise SdkError(
            "nothing to compare: no peer started", fix="read why peers were left out, above"
        )


def rounds(workers: list[Worker], repeats: int) -> None:
    """Let the workers run in turns, A B C A B C ..., ``repeats`` times each."""
    for _ in range(repeats):
        for worker in workers:
            time.sleep(PAUSE)
            worker.run()


def thread_counts(text: str) -> list[int]:
    """Read a list of thread counts: [1, 2] from "1,2".

    Raises
    ------
    InputError : ``text`` is no such list, or a count is not in 1 to MOST_THREADS.
    """
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"threads is {text!r}; wanted e.g. 1,2", fix="--threads 1") from None
    return list(dict.fromkeys(check_count("threads", n, 1, MOST_THREADS) for n in counts))
