"""Time of single operations: the core on each instruction set, PyTorch and OpenCV beside it.

    python -m benchmarks ops [--only guided] [--threads 1] [--repeats 5] [-o results.json]

As for the step, every peer has a process of its own, outputs are compared before anything is
timed, and peers run turn by turn; "tuned" is glibc's malloc told to keep its memory. "of floor" is
the least time an operation can take over its time: useful operations over the rate of the machine's
float32 matrix product, or compulsory bytes (each input read once, each output written once) over
its copy bandwidth, whichever is more; both are measured in the same turns. Kernels of the
refinement run on one thread; their time is without allocations, PyTorch's calls make their output.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import runtime
from benchmarks import environment, table
from benchmarks.speed.harness import (
    MACHINE,
    MOST_THREADS,
    Worker,
    check_peers,
    rounds,
    start,
    stop,
)
from benchmarks.speed.torch_filter import TorchFilter
from benchmarks.speed.workloads import COPY, MATRIX
from runtime.checks import check_count
from runtime.errors import InputError, VerificationFailed
from runtime.tools.cli import Parser, some_path

Arrays = tuple[np.ndarray, ...]
CALLS, KERNELS = 2, 1e11  # a turn: calls of a peer's function, operations of our kernels alone
CASE = "residual 1x1"  # of the peers that have none


class Op(NamedTuple):
    """An operation on made data, by each of its peers."""

    operations: float  # useful ones: 2 per multiply-accumulate of the plain convolution
    bytes: float
    threads: bool  # whether it runs on more than one
    make: Callable[[np.random.Generator], Arrays]
    peers: dict[str, Callable[..., Any]]  # "ours" takes repeats, where it runs on one thread


def conv(h: int, w: int, inputs: int, outputs: int, kernel: int, backward: bool) -> Op:
    """A convolution, or both its gradients."""
    few = kernel == 3 and inputs < 16
    macs = h * w * inputs * outputs * kernel**2

    def make(rng: np.random.Generator) -> Arrays:
        shapes = [(h, w, inputs), (outputs, inputs, kernel, kernel), (outputs,), (h, w, outputs)]
        return tuple(rng.standard_normal(s, np.float32) for s in shapes)

    def ours(x: Any, weight: Any, bias: Any, dy: Any, repeats: int) -> Any:
        core = runtime.device.choose.module_of("cpu")
        if backward:
            return core.conv_backward(dy, x, weight, few=few, repeats=repeats)
        return core.conv(x, weight, bias, few=few, repeats=repeats)

    def torch(x: Any, weight: Any, bias: Any, dy: Any) -> Any:
        import torch as t

        pad = kernel // 2
        if not backward:
            return t.nn.functional.conv2d(x, weight, bias, padding=pad)
        return t.ops.aten.convolution_backward(
            dy, x, weight, [outputs], [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, [True] * 3
        )

    times = 2 if backward else 1
    size = 4.0 * h * w * (times * (inputs + outputs) if backward else inputs + outputs)
    return Op(2.0 * times * macs, size, False, make, {"ours": ours, "torch": torch})


def cluster_loss(h: int, w: int, classes: int) -> Op:
    """Cross-entropy to own labels and to a guide, and the gradient of both."""

    def make(rng: np.random.Generator) -> Arrays:
        r = rng.standard_normal((h, w, classes), np.float32)
        return r, r.argmax(-1).astype(np.int32), rng.integers(0, classes, (h, w), np.int32)

    def ours(r: Any, labels: Any, guide: Any, repeats: int) -> Any:
        core, table = runtime.device.choose.module_of("cpu"), np.arange(classes, dtype=np.int32)
        share = 1 / (h * w)
        return core.cluster_loss(r, labels, guide, table, share, share, repeats=repeats)[0]

    def torch(r: Any, labels: Any, guide: Any) -> Any:
        import torch as t

        r = r.detach().requires_grad_()
        for target in (labels, guide):
            t.nn.functional.cross_entropy(r, target.long()[None]).backward()
        return r.grad

    size = 4.0 * h * w * (2 * classes + 2)
    return Op(0, size, False, make, {"ours": ours, "torch": torch})


def spatial_loss(h: int, w: int, classes: int) -> Op:
    """Huber differences in four directions, and their gradient."""

    def make(rng: np.random.Generator) -> Arrays:
        return (rng.standard_normal((h, w, classes), np.float32),)

    def ours(r: Any, repeats: int) -> Any:
        core = runtime.device.choose.module_of("cpu")
        pairs = np.array([(h - 1) * w, h * (w - 1), (h - 1) * (w - 1), (h - 1) * (w - 1)])
        scale = (1 / (pairs * classes)).astype(np.float32)
        gain = np.ones(classes, np.float32)
        return core.spatial_loss(r, gain, 1.0, scale, True, repeats=repeats)[0]

    def torch(r: Any) -> Any:
        import torch as t

        r = r.detach().requires_grad_()
        huber = t.nn.functional.smooth_l1_loss
        loss = huber(r[..., 1:, :], r[..., :-1, :]) + huber(r[..., 1:], r[..., :-1])
        loss = loss + huber(r[..., 1:, 1:], r[..., :-1, :-1])
        (loss + huber(r[..., 1:, :-1], r[..., :-1, 1:])).backward()
        return r.grad

    size = 8.0 * h * w * classes
    return Op(0, size, False, make, {"ours": ours, "torch": torch})


def guided(h: int, w: int, planes: int, subsample: int = 1) -> Op:
    """The guided filter with a colour guide, radius 8."""
    radius, eps = 8, 1e-3

    def make(rng: np.random.Generator) -> Arrays:
        return rng.random((h, w, 3), np.float32), rng.random((h, w, planes), np.float32)

    def ours(guide: Any, values: Any, threads: int) -> Any:
        return runtime.guided_filter(
            guide, values, radius=radius, eps=eps, subsample=subsample, threads=threads
        )

    def opencv(guide: Any, values: Any, threads: int) -> Any:
        import cv2

        if not hasattr(cv2, "ximgproc"):
            raise ImportError(
                "this OpenCV has no ximgproc: tests/rules/ximgproc.sh time fetches one"
            )
        cv2.setNumThreads(threads)
        return cv2.ximgproc.guidedFilter(guide, values, radius, eps)

    def torch(guide: Any, values: Any) -> Any:
        import torch as t

        return TorchFilter(t, radius, eps).filter(guide, values)

    peers: dict[str, Callable[..., Any]] = {"ours": ours}
    if subsample == 1:
        peers |= {"opencv": opencv, "torch": torch}
    return Op(0, 4.0 * h * w * (3 + 2 * planes), True, make, peers)


def joint_upsample(h: int, w: int, classes: int, subsample: int) -> Op:
    """Labels at full size from scores at 1 / subsample, bilinearly."""

    def make(rng: np.random.Generator) -> Arrays:
        low = (h // subsample, w // subsample, classes)
        return rng.integers(0, 256, (h, w, 3), np.uint8), rng.random(low, np.float32)

    def ours(image: Any, scores: Any, threads: int) -> Any:
        return runtime.joint_upsample(image, scores, threads=threads)[0]

    def opencv(image: Any, scores: Any, threads: int) -> Any:
        import cv2

        cv2.setNumThreads(threads)
        planes = [cv2.resize(np.ascontiguousarray(s), (w, h)) for s in np.moveaxis(scores, -1, 0)]
        return np.stack(planes).argmax(0)

    size = h * w * 8.0 + 4.0 * h * w * classes / subsample**2
    return Op(0, size, True, make, {"ours": ours, "opencv": opencv})


OPS = {
    "conv 3x3, 100 to 100, 321x481": conv(321, 481, 100, 100, 3, False),
    "conv 3x3, 100 to 100, 321x481, backward": conv(321, 481, 100, 100, 3, True),
    "conv 1x1, 100 to 100, 321x481": conv(321, 481, 100, 100, 1, False),
    "conv 3x3, 3 to 100, 321x481": conv(321, 481, 3, 100, 3, False),
    "cluster loss, 100, 321x481": cluster_loss(321, 481, 100),
    "spatial loss, 100, 321x481": spatial_loss(321, 481, 100),
    "conv 3x3, 32 to 32, 180x240": conv(180, 240, 32, 32, 3, False),
    "conv 3x3, 32 to 32, 180x240, backward": conv(180, 240, 32, 32, 3, True),
    "conv 3x3, 5 to 32, 180x240": conv(180, 240, 5, 32, 3, False),
    "bilinear upsampling, 14, 180x240 to 360x480": joint_upsample(360, 480, 14, 2),
    "guided filter, 1, 1080x1920": guided(1080, 1920, 1),
    "guided filter, 8, 1080x1920": guided(1080, 1920, 8),
    "guided filter, fast, 1, 1080x1920": guided(1080, 1920, 1, 4),
    "guided filter, fast, 8, 1080x1920": guided(1080, 1920, 8, 4),
}


def peer(name: str, who: str, threads: int) -> tuple[Callable[[], float], Any]:
    """In a peer's process: a function that returns the seconds of one operation, and samples of
    its output."""
    op = OPS[name]
    arrays: tuple[Any, ...] = op.make(np.random.default_rng(0))
    call = op.peers[who]
    options: dict[str, Any] = {"threads": threads} if op.threads and who != "torch" else {}
    once = not op.threads and who == "ours"
    if once:
        options["repeats"] = 1
    if who == "torch":
        import torch

        torch.set_num_threads(threads)
        arrays = tuple(_to_torch(torch.from_numpy(a)) for a in arrays)
    out = call(*arrays, **options)
    samples = _samples(out)
    if not once:

        def run() -> float:
            start = time.perf_counter()
            for _ in range(CALLS):
                call(*arrays, **options)
            return (time.perf_counter() - start) / CALLS

        return run, samples

    repeats = max(10, int(KERNELS / max(op.operations, 1e9)))

    def run_kernels() -> float:
        empty = []
        for _ in range(3):
            start = time.perf_counter()
            call(*arrays, repeats=0)
            empty.append(time.perf_counter() - start)
        start = time.perf_counter()
        call(*arrays, repeats=repeats)
        return (time.perf_counter() - start - sorted(empty)[1]) / repeats

    return run_kernels, samples


def _to_torch(array: Any) -> Any:
    """Maps to (1, C, H, W); these and weights channels last in memory."""
    import torch

    if array.ndim == 3:
        array = array.permute(2, 0, 1)[None]
    return array.contiguous(memory_format=torch.channels_last) if array.ndim == 4 else array


def _samples(out: Any) -> list[float]:
    """61 values of an output, or of a tuple's first, all over it."""
    array = np.asarray(out[0] if isinstance(out, tuple) else out, np.float64)
    if array.ndim == 4 and len(array) == 1:  # a map of PyTorch's
        array = np.moveaxis(array[0], 0, -1)
    return array.ravel()[np.linspace(0, array.size - 1, 61).astype(int)].tolist()


def agree(samples: list[float], reference: list[float]) -> bool:
    """Whether two peers computed the same, but for float32's rounding."""
    error = np.abs(np.subtract(samples, reference)).max()
    return bool(error <= 1e-4 * np.abs(reference).max())


def measure(name: str, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of one operation."""
    op = OPS[name]
    tuned = "" if op.threads else ", tuned"  # the kernels' memory is not part of their work
    who = [f"ours {t}{tuned}" for t in reversed(runtime.isas())]
    for other in op.peers:
        who += {"ours": [], "torch": ["torch", "torch, tuned"]}.get(other, [other])
    who += ["matmul", "copy"]
    workers = start(who, CASE, threads, op=name)
    try:
        return _rows(workers, name, threads, repeats)
    finally:
        stop(workers)


def _rows(workers: list[Worker], name: str, threads: int, repeats: int) -> list[dict[str, Any]]:
    op = OPS[name]
    checks = {w.peer: w.first for w in workers if w.peer not in MACHINE}
    check_peers(workers)
    reference = next(iter(checks.values()))
    for name_of, samples in checks.items():
        if not agree(samples, reference):
            raise VerificationFailed(f"{name}: {name_of} gives {samples}, not {reference}")
    rounds(workers, repeats)
    medians = {w.peer: float(np.median(w.seconds)) for w in workers}
    rate, bandwidth = 2 * MATRIX**3 / medians["matmul"], 2 * COPY / medians["copy"]
    floor = max(op.operations / rate, op.bytes / bandwidth)
    rows = []
    for worker in workers:
        worker.peak()
        median = medians[worker.peer]
        row: dict[str, Any] = {"op": name, "threads": threads, "who": worker.peer}
        if worker.peer in checks:
            row |= {
                "ms": round(1e3 * median, 2),
                "min": round(1e3 * min(worker.seconds), 2),
                "max": round(1e3 * max(worker.seconds), 2),
                "floor ms": round(1e3 * floor, 2),
                "of floor": round(floor / median, 2),
            }
            for other in ("torch", "torch, tuned", "opencv"):
                if other in medians:
                    row[f"x {other}"] = round(medians[other] / median, 2)
        rows.append(row | {"seconds": worker.seconds})
    return rows


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = Parser("python -m benchmarks ops", description=__doc__)
    parser.add_argument("--only", default="", help="operations whose name holds this")
    parser.add_argument("--threads", type=int, default=1, help="of filter and lift (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (%(default)s)")
    parser.add_argument("-o", "--out", type=some_path, help="JSON file")
    args = parser.parse_args(argv)
    table.check_out(args.out)
    names = [name for name in OPS if args.only in name]
    if not names:
        raise InputError(f"no operation's name holds {args.only!r}: {'; '.join(OPS)}")
    check_count("repeats", args.repeats, 1, 10**6)
    check_count("threads", args.threads, 1, MOST_THREADS)
    rows = []
    for i, name in enumerate(names):
        print(f"  {i + 1} of {len(names)}: {name}", file=sys.stderr)
        rows += measure(name, args.threads if OPS[name].threads else 1, args.repeats)
    shown = [{k: v for k, v in row.items() if k != "seconds"} for row in rows if "ms" in row]
    print(table.as_markdown(shown))
    if args.out:
        table.write_json(args.out, {"environment": environment.describe(), "rows": rows})
    return 0
