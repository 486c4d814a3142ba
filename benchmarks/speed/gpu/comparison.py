"""Peers of one piece of work, and the check that all of them compute the same."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.speed.gpu.device import Gpu, set_precision
from runtime.errors import SdkError

COPY, MATRIX = 2**29, 8192  # bytes, side
SETS, BURST = 4, 8  # inputs that take turns; calls in a burst
TOLERANCE = {"": 1e-4, "fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2}
FAILURES = (RuntimeError, ImportError, OSError, subprocess.SubprocessError, AssertionError)


def say(line: str) -> None:
    """Tell what happens now."""
    print(line, flush=True)


def nothing() -> None:
    """What a peer does that does nothing there."""


class Peer(NamedTuple):
    """One that is timed. ``first`` is what is compared before."""

    run: Callable[[], Any]
    first: Any = None
    burst: int = 1
    before: Callable[[], Any] = nothing  # not timed
    after: Callable[[], Any] = nothing  # of the wall's time only
    clock: Callable[[], float] | None = None  # its own, of the last run, in milliseconds


class Case:
    """Peers of one piece of work. ``bytes`` and ``operations`` are the least of a run."""

    def __init__(
        self, gpu: Gpu, name: str, *, bytes: float = 0, operations: float = 0, steps: int = 1
    ) -> None:
        self.gpu, self.name, self.steps = gpu, name, steps
        self.bytes, self.operations = bytes, operations
        self.peers: dict[tuple[str, str], Peer] = {}  # by name and precision
        self.memory: dict[tuple[str, str], dict[str, float]] = {}
        self.left_out: list[dict[str, str]] = []
        self.wrong: list[str] = []  # outputs that differ; and ours, where it fails

    def add(self, who: str, make: Callable[[], Peer], precision: str = "") -> None:
        """Make a peer, and compare it with the first one, which is ours and has to be made. Another
        that cannot be made or gives something else is left out, and why is kept."""
        set_precision(self.gpu.torch, precision)
        key, why, apart = (who, precision), "", ""
        try:
            peer, memory = self.gpu.peak(make)
        except (SdkError, *FAILURES) as error:
            if not self.peers:
                raise
            why = f"{type(error).__name__}: {str(error).strip()[:600]}"
        else:
            reference = next(iter(self.peers.values())).first if self.peers else peer.first
            if apart := difference(peer.first, reference, TOLERANCE[precision]):
                why = f"it gives another result than our first: {apart}"
        if not why:
            self.peers[key], self.memory[key] = peer, memory
            return
        out = {"case": self.name, "who": who, "precision": precision, "why": why}
        self.left_out.append(out)
        if apart or who == "ours":
            self.wrong.append(f"{self.name}: {who} {precision}: {why}")
        say(f"  left out: {who} {precision}: {why.splitlines()[0]}")


def difference(found: Any, reference: Any, tolerance: float) -> str:
    """In words, where arrays differ by more than ``tolerance`` of the largest value (whole numbers:
    at more than one in a thousand); empty where they do not."""
    for ours, theirs in zip(reference, found, strict=True):
        a, b = np.asarray(ours), np.asarray(theirs)
        if a.shape != b.shape:
            return f"shape {b.shape}, not {a.shape}"
        if a.dtype.kind in "iu":
            apart = float((a != b).mean())
            if apart > 1e-3:
                return f"{apart:.2%} of the labels"
            continue
        apart = float(np.abs(np.subtract(a, b, dtype=np.float64)).max())
        if not apart <= tolerance * float(np.abs(a).max()):
            return f"{apart:.3g} of {np.abs(a).max():.3g}"
    return ""


def ceilings(case: Case, *, matmul: bool) -> None:
    """A large copy on the device, and matrix products of each precision."""
    torch, where = case.gpu.torch, case.gpu.name

    def copy() -> Peer:
        source = torch.rand(COPY // 4, device=where)
        target = torch.empty_like(source)
        return Peer(lambda: target.copy_(source), (), burst=BURST)

    def product(dtype: Any) -> Peer:
        a, b = (torch.rand(MATRIX, MATRIX, device=where, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        return Peer(lambda: torch.mm(a, b, out=out), ())

    case.peers["copy", ""] = copy()
    types = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16}
    for precision, dtype in types.items() if matmul else ():
        set_precision(torch, precision)
        case.peers["matmul", precision] = product(dtype)
