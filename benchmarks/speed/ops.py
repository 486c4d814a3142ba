"""Time of single operations: the core on each instruction set, PyTorch and OpenCV.

    python -m benchmarks ops [--only guided] [--threads 1] [--repeats 5] [-o results.json]

Every peer has a process of its own. The outputs are compared, then the peers run in turns. "tuned"
is glibc's malloc set to keep freed memory. "floor ms" is the least time that an operation can need:
its useful operations divided by the rate of the machine's float32 matrix product, or its least
traffic (each input read once, each output written once) divided by the machine's copy bandwidth,
whichever is longer. Both rates are measured in the same turns. "of floor" is this time divided by
the measured time. Kernels of the refinement run on one thread. Their time is without allocations;
the time of PyTorch's calls includes the allocation of their output.
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
from runtime.tools.cli import Parser, out_path

Arrays = tuple[np.ndarray, ...]
CALLS = 2  # calls of a peer's function in one turn, except of our single-thread kernels
KERNELS = 1e11  # operations of such a kernel in one turn
CASE = "residual 1x1"  # a worker needs the name of a case; operations do not use the case


class Op(NamedTuple):
    """An operation on random data, and the functions of its peers.

    Parameters
    ----------
    operations : useful operations: 2 for each multiply-accumulate of the plain convolution.
    bytes : the least traffic: each input read once, each output written once.
    threads : whether the operation can run on several threads.
    make : makes the input arrays from a random generator.
    peers : the functions by name. If ``threads`` is False, "ours" is a single-thread kernel with an
        argument ``repeats``: how often the native code repeats it in one call.
    """

    operations: float
    bytes: float
    threads: bool
    make: Callable[[np.random.Generator], Arrays]
    peers: dict[str, Callable[..., Any]]


def conv(h: int, w: int, inputs: int, outputs: int, kernel: int, backward: bool) -> Op:
    """A convolution, or its gradients by input and by weights.

    Parameters
    ----------
    h, w : size in pixels.
    inputs, outputs : number of channels.
    kernel : 1 or 3, the side of the kernel.
    backward : the gradients instead of the forward pass.
    """
    few = kernel == 3 and inputs < 16  # the core has special kernels for few inputs
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
    """Cross-entropy to the network's own labels and to a guide, and the gradient of their sum.

    Parameters are the size in pixels and the number of classes.
    """

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
    """The Huber loss of differences between neighbours in four directions, and the loss's gradient.

    Parameters are the size in pixels and the number of classes.
    """

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
    """The guided filter with a colour guidance image and radius 8.

    Parameters
    ----------
    h, w : size in pixels.
    planes : number of filtered maps.
    subsample : the coefficients are computed at 1 / subsample of the size.
    """
    radius, eps = 8, 1e-3

    def make(rng: np.random.Generator) -> Arrays:
        return rng.random((h, w, 3), np.float32), rng.random((h, w, planes), np.float32)

    def ours(guidance: Any, values: Any, threads: int) -> Any:
        return runtime.guided_filter(
            guidance, values, radius=radius, eps=eps, subsample=subsample, threads=threads
        )

    def opencv(guidance: Any, values: Any, threads: int) -> Any:
        from runtime.opencv import cv2

        if not hasattr(cv2, "ximgproc"):
            raise ImportError(
                "this OpenCV has no ximgproc; tests/rules/ximgproc.sh time installs one that has it"
            )
        cv2.setNumThreads(threads)
        return cv2.ximgproc.guidedFilter(guidance, values, radius, eps)

    def torch(guidance: Any, values: Any) -> Any:
        import torch as t

        return TorchFilter(t, radius, eps).filter(guidance, values)

    peers: dict[str, Callable[..., Any]] = {"ours": ours}
    if subsample == 1:
        peers |= {"opencv": opencv, "torch": torch}
    return Op(0, 4.0 * h * w * (3 + 2 * planes), True, make, peers)


def joint_upsample(h: int, w: int, classes: int, subsample: int) -> Op:
    """Labels at full size from scores at 1 / subsample of the size, enlarged bilinearly.

    Parameters are the full size in pixels, the number of classes and the subsampling.
    """

    def make(rng: np.random.Generator) -> Arrays:
        low = (h // subsample, w // subsample, classes)
        return rng.integers(0, 256, (h, w, 3), np.uint8), rng.random(low, np.float32)

    def ours(image: Any, scores: Any, threads: int) -> Any:
        return runtime.joint_upsample(image, scores, threads=threads)[0]

    def opencv(image: Any, scores: Any, threads: int) -> Any:
        from runtime.opencv import cv2

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
    """Prepare an operation in the process of a peer.

    Parameters
    ----------
    name : an operation of OPS.
    who : one of its peers.
    threads : number of threads.

    Returns
    -------
    A function that runs the operation and returns the seconds of one call (of a kernel: of one
    repetition, without the time of the call itself); and samples of the output.
    """
    op = OPS[name]
    arrays: tuple[Any, ...] = op.make(np.random.default_rng(0))
    call = op.peers[who]
    options: dict[str, Any] = {"threads": threads} if op.threads and who != "torch" else {}
    is_kernel = not op.threads and who == "ours"
    if is_kernel:
        options["repeats"] = 1
    if who == "torch":
        import torch

        torch.set_num_threads(threads)
        arrays = tuple(_to_torch(torch.from_numpy(a)) for a in arrays)
    out = call(*arrays, **options)
    samples = _samples(out)
    if not is_kernel:

        def run() -> float:
            start = time.perf_counter()
            for _ in range(CALLS):
                call(*arrays, **options)
            return (time.perf_counter() - start) / CALLS

        return run, samples

    repeats = max(10, int(KERNELS / max(op.operations, 1e9)))

    def run_kernels() -> float:
        empty = []  # seconds of calls that compute nothing
        for _ in range(3):
            start = time.perf_counter()
            call(*arrays, repeats=0)
            empty.append(time.perf_counter() - start)
        start = time.perf_counter()
        call(*arrays, repeats=repeats)
        return (time.perf_counter() - start - sorted(empty)[1]) / repeats

    return run_kernels, samples


def _to_torch(array: Any) -> Any:
    """Convert maps (H, W, C) to (1, C, H, W). Maps and weights are channels-last in memory."""
    import torch

    if array.ndim == 3:
        array = array.permute(2, 0, 1)[None]
    return array.contiguous(memory_format=torch.channels_last) if array.ndim == 4 else array


def _samples(out: Any) -> list[float]:
    """Return 61 evenly spaced values of an output; of a tuple, of its first array."""
    array = np.asarray(out[0] if isinstance(out, tuple) else out, np.float64)
    if array.ndim == 4 and len(array) == 1:  # PyTorch's maps are (1, C, H, W)
        array = np.moveaxis(array[0], 0, -1)
    return array.ravel()[np.linspace(0, array.size - 1, 61).astype(int)].tolist()


def agree(samples: list[float], reference: list[float]) -> bool:
    """Whether the samples of two peers differ by at most 1e-4 of the largest absolute value."""
    error = np.abs(np.subtract(samples, reference)).max()
    return bool(error <= 1e-4 * np.abs(reference).max())


def measure(name: str, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Measure one operation; returns a row for each peer.

    Parameters
    ----------
    name : an operation of OPS.
    threads : number of threads.
    repeats : number of turns.

    Raises
    ------
    SdkError : no peer started, or one ended.
    VerificationFailed : the outputs of two peers differ.
    """
    op = OPS[name]
    tuned = "" if op.threads else ", tuned"  # single kernels are timed without page faults
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
            raise VerificationFailed(
                f"{name}: {name_of} returns {samples}, not {reference}",
                fix="report this with the output of: python -m runtime doctor",
            )
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
    """Run the command line; returns the exit code.

    Raises
    ------
    SdkError : options, libraries or pictures are wrong or missing; the caller prints it.
    """
    parser = Parser("python -m benchmarks ops", description=__doc__)
    parser.add_argument("--only", default="", help="only operations whose name contains this")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of filter and upsampling (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="number of turns (%(default)s)")
    parser.add_argument("-o", "--out", type=out_path, help="JSON file")
    args = parser.parse_args(argv)
    table.check_out(args.out)
    names = [name for name in OPS if args.only in name]
    if not names:
        raise InputError(
            f"no operation's name contains {args.only!r}: {'; '.join(OPS)}", fix="--only guided"
        )
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
