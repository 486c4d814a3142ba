"""A case with its peers, and the check that all peers compute the same."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.speed.gpu.device import Gpu, set_precision
from runtime.errors import SdkError

COPY, MATRIX = 2**29, 8192  # bytes of "copy"; side of the square matrices of "matmul"
BURST = 8  # calls that are timed together
# The largest allowed differences by precision, see difference; errors that leave a peer out.
TOLERANCE = {"": 1e-4, "fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2}
FAILURES = (RuntimeError, ImportError, OSError, subprocess.SubprocessError, AssertionError)


def say(line: str) -> None:
    """Print a line of progress at once."""
    print(line, flush=True)


def nothing() -> None:
    """Do nothing."""


class Peer(NamedTuple):
    """One of the programs that are compared.

    Parameters
    ----------
    run : makes one run.
    first : a sequence of arrays, the first result. It is compared before anything is timed.
    burst : number of runs that are timed together.
    before : called before each run; not timed.
    after : called after each run; part of the wall time, not of the device time.
    clock : returns the milliseconds of the last run, if the peer measures them itself.
    """

    run: Callable[[], Any]
    first: Any = None
    burst: int = 1
    before: Callable[[], Any] = nothing
    after: Callable[[], Any] = nothing
    clock: Callable[[], float] | None = None


class Case:
    """A piece of work and the peers that do it.

    Parameters
    ----------
    name : of the case.
    bytes : the least traffic of a run: inputs read once, outputs written once.
    operations : the useful operations of a run.
    steps : refinement steps of a run.

    Attributes
    ----------
    peers, memory : the peers and their memory in MiB, by name and precision.
    left_out : the peers that cannot be made or whose result differs, and why.
    wrong : a text for each peer whose result differs, and for "ours" if it cannot be made.
    """

    def __init__(
        self, gpu: Gpu, name: str, *, bytes: float = 0, operations: float = 0, steps: int = 1
    ) -> None:
        self.gpu, self.name, self.steps = gpu, name, steps
        self.bytes, self.operations = bytes, operations
        self.peers: dict[tuple[str, str], Peer] = {}
        self.memory: dict[tuple[str, str], dict[str, float]] = {}
        self.left_out: list[dict[str, str]] = []
        self.wrong: list[str] = []

    def add(self, who: str, make: Callable[[], Peer], precision: str = "") -> None:
        """Make a peer, compare its first result with that of the first peer, and keep it.

        The first peer of a case is ours. A later peer that cannot be made, or whose result differs,
        goes into ``left_out``.

        Parameters
        ----------
        who : the name of the peer.
        make : makes the peer.
        precision : "fp32", "tf32", "fp16", or "" for float32 without a choice.

        Raises
        ------
        Exception : what ``make`` raises for the first peer; for later peers only exceptions other
            than SdkError and FAILURES.
        """
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
                why = f"its result differs from that of our first peer: {apart}"
        if not why:
            self.peers[key], self.memory[key] = peer, memory
            return
        out = {"case": self.name, "who": who, "precision": precision, "why": why}
        self.left_out.append(out)
        if apart or who == "ours":
            self.wrong.append(f"{self.name}: {who} {precision}: {why}")
        say(f"  left out: {who} {precision}: {why.splitlines()[0]}")


def difference(found: Any, reference: Any, tolerance: float) -> str:
    """Compare arrays of a result with those of the reference.

    Parameters
    ----------
    found, reference : sequences of arrays.
    tolerance : the largest allowed difference of floats, divided by the largest absolute value of
        the reference. Of whole numbers, one in a thousand may differ.

    Returns
    -------
    A text that describes the first difference; "" if there is none.
    """
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
    """Add peers that measure the GPU's own rates: a large copy and, with ``matmul``, a matrix
    product in each precision."""
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
