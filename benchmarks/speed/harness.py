"""Peers in processes of their own: they are started, run turn by turn, and ended here."""

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

TUNED = {  # glibc's malloc gives nothing back, so that a step meets no page faults
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}
MACHINE = ("matmul", "copy")
MOST_THREADS = 256
PAUSE = 0.3  # seconds before a turn: the threads of the peer before may still spin


class Worker:
    """One peer's process."""

    def __init__(self, peer: str, case: str, threads: int, op: str = "") -> None:
        counts = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = os.environ | dict.fromkeys(counts, str(threads))
        if peer.startswith("ours"):
            environment["SEG_ISA"] = peer.split()[1].rstrip(",")
        if peer.endswith("tuned"):
            environment |= TUNED
        what = json.dumps({"peer": peer, "case": case, "op": op, "threads": threads})
        self.peer, self.seconds, self.errors = peer, [], ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.speed.worker", what],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.first: Any = None  # what it gives first; None: it did not start

    def answer(self) -> dict[str, Any]:
        """What the process says next; empty where it has ended."""
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.errors = last_error(self.process.stderr.read())
        return {}

    def run(self) -> None:
        """One run, timed by the process itself."""
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            self.seconds.append(self.answer()["seconds"])
        except (BrokenPipeError, KeyError):
            raise SdkError(f"{self.peer} ended: {self.errors or 'it was killed'}") from None

    def peak(self) -> float:
        """End the process; MiB it had needed beside its libraries."""
        self.process.stdin.close()
        peak = self.answer().get("peak", float("nan"))
        self.process.wait()
        return peak


def last_error(text: str) -> str:
    """The last error message in what a process wrote to stderr, its fix included."""
    lines = text.strip().split("\n")
    first = len(lines) - 1
    while first > 0 and lines[first].startswith("  fix:"):
        first -= 1
    return "; ".join(line.strip() for line in lines[first:])


def start(peers: Iterable[str], case: str, threads: int, op: str = "") -> list[Worker]:
    """A process for each peer; those that do not start are named and left out."""
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
    finally:  # an interrupt leaves no process behind
        if not started:
            stop(workers)
    return workers


def stop(workers: list[Worker]) -> None:
    """End what still runs."""
    for worker in workers:
        worker.process.kill()
        worker.process.wait()


def check_peers(workers: list[Worker]) -> None:
    """SdkError unless the machine's rates and at least one other can be measured."""
    names = {w.peer for w in workers}
    if not {*MACHINE} <= names or names == {*MACHINE}:
        raise SdkError("nothing to compare: no peer started", fix="see what was left out, above")


def rounds(workers: list[Worker], repeats: int) -> None:
    """Turn by turn."""
    for _ in range(repeats):
        for worker in workers:
            time.sleep(PAUSE)
            worker.run()


def thread_counts(text: str) -> list[int]:
    """Of "1,2"."""
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"threads is {text!r}; wanted e.g. 1,2") from None
    return list(dict.fromkeys(check_count("threads", n, 1, MOST_THREADS) for n in counts))
