"""Time of the CUDA module beside PyTorch on the same GPU, and what the GPU itself can do.

    python -m benchmarks gpu -o FOLDER [--compiled] [--only filter]

Everything runs in one process, turn by turn (A B C A B C ...), after outputs have been compared.
"device" is by events of the GPU: of filters and lifts, in a burst that is queued while the GPU is
kept waiting, over inputs that do not fit its cache; of refinements, of the steps alone (ours by its
own events). "wall" is one call until its result is there: of refinements with the last forward pass
and the labels on the host. "of copy" is the least traffic (inputs read once, outputs written once)
over the rate of a large copy on the device, bytes read and written; "of matmul" the useful
operations (2 x 3 passes x multiply-accumulates of the plain convolutions) over the rate of a large
matrix product of the same precision. Both are measured in the same turns. Precisions: float32; and
on tensor cores half precision, ours beside PyTorch's (autocast) and TF32, whichever is faster
there. Peers: eager PyTorch, the same recorded as a CUDA graph, and with --compiled what
torch.compile makes of it, which takes minutes. FOLDER/gpu.json, or gpu-compiled.json, has the raw
samples; it is written after each case.
"""

from __future__ import annotations

import datetime
import gc
import hashlib
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import runtime
from benchmarks import machine
from benchmarks.worker import CLASSES, find_case, picture, refiner
from runtime.backend import backend, cuda_module
from runtime.cli import Parser, some_path
from runtime.errors import InputError, MissingBackend, SdkError, VerificationFailed

ROOT = Path(__file__).resolve().parents[1]
COPY, MATRIX = 2**29, 8192  # bytes, side
SETS, BURST = 4, 8  # inputs that take turns; calls in a burst
AHEAD = 20_000_000  # clock cycles that the GPU waits while a burst is queued
MOST, LEAST, SECONDS = 25, 6, 8.0  # turns of a case; it ends between them when its time is up
WARM = 1  # turns before those that count
STEPS = {"residual": 10, "dynaguide": 50}  # of a run
TOLERANCE = {"": 1e-4, "fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2}
HOW = ("eager", "graph", "graph, channels last", "compiled", "compiled, graph")
FAST = ("tf32", "fp16")  # that PyTorch may use beside our fp16
FAILURES = (RuntimeError, ImportError, OSError, subprocess.SubprocessError, AssertionError)


# ---- The GPU ------------------------------------------------------------------------------------


class Gpu:
    """The GPU as these measurements use it; the tests put the host in its place."""

    name = "cuda"

    def __init__(self) -> None:
        import torch

        self.torch, self.cuda = torch, torch.cuda
        torch.backends.cudnn.benchmark = True  # PyTorch takes the fastest of its convolutions

    def stream(self) -> int | None:
        """What our functions work on: PyTorch's current stream."""
        return self.cuda.current_stream().cuda_stream

    def time(
        self, run: Callable[[], Any], after: Callable[[], Any] | None = None, *, ahead: bool = False
    ) -> tuple[float, float]:
        """Milliseconds of ``run`` on the device's clock, and with ``after`` on the wall's.
        ``ahead``: the device begins when the host is done with it."""
        first, last = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.cuda.synchronize()
        if ahead:
            self.cuda._sleep(AHEAD)
        begin = time.perf_counter()
        first.record()
        run()
        last.record()
        if after is not None:
            after()
        self.cuda.synchronize()
        wall = time.perf_counter() - begin
        return first.elapsed_time(last), 1e3 * wall

    def record(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """The step as a CUDA graph; returns what replays it."""
        side = self.cuda.Stream()
        side.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(side):
            for _ in range(3):
                step()
        self.cuda.current_stream().wait_stream(side)
        graph = self.cuda.CUDAGraph()
        with self.cuda.graph(graph):
            step()
        return graph.replay

    def peak(self, make: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        """What it makes, and MiB of the device that took: of PyTorch's, at the peak, and of
        others, which is what stays."""
        self.clean()
        self.cuda.reset_peak_memory_stats()
        before, others = self.cuda.memory_allocated(), self._others()
        made = make()
        self.cuda.synchronize()
        peak = self.cuda.max_memory_allocated() - before
        mib = {"torch": peak / 2**20, "others": (self._others() - others) / 2**20}
        return made, {name: round(n, 1) for name, n in mib.items()}

    def _others(self) -> int:
        free, total = self.cuda.mem_get_info()
        return total - free - self.cuda.memory_reserved()

    def clean(self) -> None:
        """Let go of what nobody holds."""
        gc.collect()
        self.cuda.synchronize()
        self.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        """What it is, and the versions of what runs on it."""
        found, module = self.cuda.get_device_properties(0), cuda_module()
        torch = self.torch
        return {
            "name": found.name,
            "compute_capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "l2_bytes": getattr(found, "L2_cache_size", None),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "module_architectures": module.architectures(),
            "module_cuda": module.runtime_version(),
        }


def set_precision(torch: Any, precision: str) -> None:
    """Whether PyTorch's convolutions and matrix products may round to TF32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision in FAST


def find_gpu() -> Gpu:
    """The GPU, or MissingBackend that says why there is none."""
    fix = "on a machine with a GPU, nvcc and PyTorch: benchmarks/gpu_check.sh FOLDER"
    try:
        import scipy  # noqa: F401  for the statistics
        import torch
    except ImportError as error:
        why = f"PyTorch and SciPy are needed, but {error}"
        raise MissingBackend(why, fix="pip install torch scipy") from error
    try:
        backend("cuda")
    except SdkError as error:
        why = str(error).partition("\n")[0]
        raise MissingBackend(f"no GPU to measure: {why}", fix=error.fix or fix) from error
    if not torch.cuda.is_available():
        raise MissingBackend(
            f"PyTorch {torch.__version__} sees no GPU", fix="install PyTorch for CUDA"
        )
    return Gpu()


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks, power and temperature now; empty without nvidia-smi."""
    fields = (
        *("name", "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm"),
        *("clocks.max.mem", "power.draw", "power.limit", "temperature.gpu"),
    )
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (word.strip() for word in done.stdout.split(",")), strict=False))


# ---- Peers --------------------------------------------------------------------------------------


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


# ---- Filters and lifts --------------------------------------------------------------------------


class TorchFilter:
    """The guided filter in PyTorch: means by ``avg_pool2d``, an axis after the other, over windows
    that the border cuts; the 3x3 systems by cofactors. Maps are (1, channels, h, w)."""

    def __init__(self, torch: Any, radius: int, eps: float) -> None:
        self.torch, self.radius, self.eps = torch, radius, eps

    def box(self, x: Any) -> Any:
        """Means over windows."""
        pool, r = self.torch.nn.functional.avg_pool2d, self.radius
        x = pool(x, (2 * r + 1, 1), 1, (r, 0), count_include_pad=False)
        return pool(x, (1, 2 * r + 1), 1, (0, r), count_include_pad=False)

    def coefficients(self, guide: Any, values: Any) -> list[Any]:
        """Those of red, green, blue and 1."""
        red, green, blue = guide.split(1, 1)
        mr, mg, mb = self.box(guide).split(1, 1)
        mean = self.box(values)
        pairs = [red * red, red * green, red * blue, green * green, green * blue, blue * blue]
        rr, rg, rb, gg, gb, bb = self.box(self.torch.cat(pairs, 1)).split(1, 1)
        rr, gg, bb = rr - mr * mr + self.eps, gg - mg * mg + self.eps, bb - mb * mb + self.eps
        rg, rb, gb = rg - mr * mg, rb - mr * mb, gb - mg * mb
        vr, vg, vb = (
            self.box(c * values) - m * mean for c, m in ((red, mr), (green, mg), (blue, mb))
        )
        irr, irg, irb = gg * bb - gb * gb, gb * rb - rg * bb, rg * gb - gg * rb
        igg, igb, ibb = rr * bb - rb * rb, rb * rg - rr * gb, rr * gg - rg * rg
        scale = 1 / (rr * irr + rg * irg + rb * irb)
        ar = (irr * vr + irg * vg + irb * vb) * scale
        ag = (irg * vr + igg * vg + igb * vb) * scale
        ab = (irb * vr + igb * vg + ibb * vb) * scale
        return [self.box(x) for x in (ar, ag, ab, mean - ar * mr - ag * mg - ab * mb)]

    def apply(self, coefficients: list[Any], guide: Any) -> Any:
        """Coefficients, lifted where the guide is larger, on the guide."""
        if coefficients[0].shape[2:] != guide.shape[2:]:
            many = self.torch.cat(coefficients, 1)
            coefficients = enlarged(self.torch, many, guide.shape[2:]).chunk(4, 1)
        ar, ag, ab, offset = coefficients
        red, green, blue = guide.split(1, 1)
        return ar * red + ag * green + ab * blue + offset

    def filter(self, guide: Any, values: Any) -> Any:
        """The guided filter; with smaller values, joint upsampling."""
        low, (height, width) = guide, values.shape[2:]
        if guide.shape[2] != height:
            ratio = guide.shape[2] // height, guide.shape[3] // width
            low = self.torch.nn.functional.avg_pool2d(guide, ratio)
        return self.apply(self.coefficients(low, values), guide)


def enlarged(torch: Any, x: Any, size: tuple[int, int]) -> Any:
    """Bilinearly, to (height, width)."""
    return torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)


def planar(array: np.ndarray) -> np.ndarray:
    """(h, w, channels) to (1, channels, h, w)."""
    return np.ascontiguousarray(array.transpose(2, 0, 1)[None])


def back(x: Any) -> np.ndarray:
    """(1, channels, h, w) on the device to (h, w, channels) of NumPy."""
    return x[0].permute(1, 2, 0).cpu().numpy()


def over_sets(
    gpu: Gpu,
    call: Callable[..., Any],
    arrays: tuple[np.ndarray, ...],
    read: Callable[[Any], tuple[np.ndarray, ...]],
) -> Peer:
    """Calls on copies of the arrays, one after the other. ``read`` takes a result to the host."""
    sets = [[gpu.torch.from_numpy(a).to(gpu.name) for a in arrays] for _ in range(SETS)]
    turns = itertools.cycle(sets)
    first = read(call(*sets[0]))
    return Peer(lambda: call(*next(turns)), first, burst=BURST)


def add_filters(
    case: Case,
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    arrays: tuple[np.ndarray, ...],
    read_ours: Callable[[Any], tuple[np.ndarray, ...]],
    read_theirs: Callable[[Any], tuple[np.ndarray, ...]],
    compiled: bool,
) -> Case:
    """Ours, and PyTorch's function of the same arrays, each map planar; (h, w) stays."""
    gpu = case.gpu
    maps = tuple(planar(a) for a in arrays)
    case.add("ours", lambda: over_sets(gpu, ours, arrays, read_ours))
    case.add("torch eager", lambda: over_sets(gpu, theirs, maps, read_theirs))
    if compiled:

        def make() -> Peer:
            return over_sets(gpu, gpu.torch.compile(theirs, fullgraph=True), maps, read_theirs)

        case.add("torch compiled", make)
    ceilings(case, matmul=False)
    return case


def filter_case(
    gpu: Gpu, name: str, compiled: bool, size: tuple[int, int], low: tuple[int, int], classes: int
) -> Case:
    """The guided filter of ``classes`` maps, radius 8; with a smaller ``low``, joint upsampling."""
    rng, radius, eps = np.random.default_rng(0), 8, 1e-3
    guide, values = rng.random((*size, 3), np.float32), rng.random((*low, classes), np.float32)
    traffic = 4.0 * (np.prod(size) * (3 + classes) + np.prod(low) * classes)

    def ours(guide: Any, values: Any) -> Any:
        return runtime.guided_filter(
            guide, values, radius=radius, eps=eps, device="cuda", stream=gpu.stream()
        )

    return add_filters(
        Case(gpu, name, bytes=float(traffic)),
        ours,
        TorchFilter(gpu.torch, radius, eps).filter,
        (guide, values),
        lambda out: (np.asarray(out),),
        lambda out: (back(out),),
        compiled,
    )


def lift_case(
    gpu: Gpu, name: str, compiled: bool, size: tuple[int, int], low: tuple[int, int], guided: bool
) -> Case:
    """Labels and confidence at full size from scores of CLASSES at a smaller one, radius 2."""
    torch, rng, radius, eps = gpu.torch, np.random.default_rng(0), 2, 1e-3
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    scores = rng.random((*low, CLASSES), np.float32)
    small = rng.random((*low, 3), np.float32)
    arrays = (image, scores, small) if guided else (image, scores)
    traffic = np.prod(size) * 11.0 + 4.0 * np.prod(low) * (CLASSES + 3 * guided)
    if not guided:  # the picture is not looked at
        traffic -= 3.0 * np.prod(size)
    of = TorchFilter(torch, radius, eps)

    def ours(image: Any, scores: Any, small: Any = None) -> Any:
        options = {"low_image": small, "device": "cuda", "stream": gpu.stream()}
        return runtime.lift(image, scores, radius=radius, eps=eps, **options)

    def theirs(image: Any, scores: Any, small: Any = None) -> Any:
        if small is None:
            values = enlarged(torch, scores, image.shape[2:])
        else:
            values = of.apply(of.coefficients(small, scores), image / 255)
        best = values.max(1)
        return best.indices, best.values.clamp(0, 1)

    return add_filters(
        Case(gpu, name, bytes=float(traffic)),
        ours,
        theirs,
        arrays,
        lambda out: tuple(np.asarray(x) for x in out),
        lambda out: tuple(x[0].cpu().numpy() for x in out),
        compiled,
    )


# ---- Refinements --------------------------------------------------------------------------------


class Loop:
    """Steps of benchmarks/torch_twin.py with nothing that makes the host wait, as eager PyTorch, a
    recorded graph and the compiler take them; "fp16" has the network in half precision (autocast)
    and multiplies the loss by the number of pixels, so that its gradients are not too small."""

    def __init__(self, twin: Any, torch: Any, precision: str) -> None:
        self.twin, self.torch, self.half = twin, torch, precision == "fp16"
        self.scale = float(twin.x[0, 0].numel()) if self.half else 1.0
        twin.count = self.count
        self.forward = self.loss
        self.forward()  # solves the mapping, which is SciPy's time
        twin.step_count = 10  # from here on it is frozen
        self.state = [*twin.net.parameters(), *twin.net.buffers()]
        self.kept = [t.detach().clone() for t in self.state]
        self.last: Any = None  # the step's loss

    def count(self, labels: Any) -> Any:
        """The number of different labels, on the device."""
        seen = self.torch.zeros(self.twin.classes, device=labels.device)
        return seen.scatter_(0, labels.flatten(), 1.0).sum()

    def loss(self) -> Any:
        """Of the forward pass."""
        where, half = self.twin.x.device.type, self.torch.float16
        with self.torch.autocast(where, half, enabled=self.half, cache_enabled=False):
            response = self.twin.net(self.twin.x)
        return self.twin.losses(response.float() + self.twin.prior)[0]

    def step(self) -> None:
        """One SGD step."""
        self.twin.sgd.zero_grad(set_to_none=True)
        loss = self.forward()
        (loss * self.scale).backward()
        if self.half:
            self.torch._foreach_mul_([p.grad for p in self.twin.net.parameters()], 1 / self.scale)
        self.twin.sgd.step()
        self.last = loss.detach()

    def restore(self) -> None:
        """Back to the first weights."""
        with self.torch.no_grad():
            for now, kept in zip(self.state, self.kept, strict=True):
                now.copy_(kept)
            for held in self.twin.sgd.state.values():
                held["momentum_buffer"].zero_()


def steps_case(gpu: Gpu, name: str, compiled: bool, size: str, steps: int) -> Case:
    """A cold run of so many steps in each precision. What is compared is the first loss."""
    case = find_case(size)
    image, hard, soft = picture(case.height, case.width)
    plain = refiner(case)
    residual = plain.options.objective == "residual"
    guide, state = soft if residual else hard, plain.state_dict()
    weights = sum(v.size for k, v in state.items() if v.ndim == 4 and "momentum" not in k)
    operations = 6.0 * weights * case.height * case.width * steps
    out = Case(gpu, name, operations=operations, steps=steps)
    for precision in ("fp32", "fp16"):
        out.add("ours", lambda p=precision: ours(case, p, image, guide, steps), precision)
    peers, arguments = HOW[: None if compiled else 3], (plain.options, state, image, guide)
    for how, precision in itertools.product(peers, ("fp32", *FAST)):
        made = _torch_peer(gpu, how, precision, steps, arguments)
        out.add(f"torch {how}", made, precision)
    ceilings(out, matmul=True)
    return out


def ours(case: Any, precision: str, image: np.ndarray, guide: np.ndarray, steps: int) -> Peer:
    """A Refiner on the GPU."""
    made = refiner(case, device="cuda", precision=precision)
    first = made.run(image, guide, steps=1).stats["losses"]["total"][0]
    return Peer(
        lambda: made.run(image, guide, steps=steps),
        (np.array(first),),
        clock=made._native.milliseconds,
    )


def _torch_peer(
    gpu: Gpu, how: str, precision: str, steps: int, arguments: tuple[Any, ...]
) -> Callable[[], Peer]:
    """What makes a peer of the twin, which ``arguments`` give, as ``how`` of HOW says."""

    def make() -> Peer:
        from benchmarks.torch_twin import Twin

        torch, layout = gpu.torch, how.endswith("last")
        twin = Twin(*arguments, torch.float32, layout, gpu.name)
        loop = Loop(twin, torch, precision)
        if how.startswith("compiled"):
            loop.forward = torch.compile(loop.loss, fullgraph=True)
        loop.step()
        step = gpu.record(loop.step) if "graph" in how else loop.step
        loop.restore()
        step()
        first = loop.last.item()

        def run() -> None:
            for _ in range(steps):
                step()

        return Peer(run, (np.array(first),), before=loop.restore, after=twin.labels)

    return make


CASES: dict[str, Callable[[Gpu, str, bool], Case]] = {
    "guided filter, 1, 1080x1920": lambda *a: filter_case(*a, (1080, 1920), (1080, 1920), 1),
    "guided filter, 8, 1080x1920": lambda *a: filter_case(*a, (1080, 1920), (1080, 1920), 8),
    "joint upsampling, 8, 270x480 to 1080x1920": (
        lambda *a: filter_case(*a, (1080, 1920), (270, 480), 8)
    ),
    "lift, 14, 180x240 to 360x480": lambda *a: lift_case(*a, (360, 480), (180, 240), False),
    "guided lift, 14, 180x240 to 360x480": lambda *a: lift_case(*a, (360, 480), (180, 240), True),
    "residual 180x240, 10 steps": lambda *a: steps_case(*a, "residual 180x240", STEPS["residual"]),
    "dynaguide 321x481, 50 steps": (
        lambda *a: steps_case(*a, "dynaguide 321x481", STEPS["dynaguide"])
    ),
}


# ---- Measuring ----------------------------------------------------------------------------------


def turn(gpu: Gpu, peer: Peer, precision: str) -> tuple[float, float]:
    """Milliseconds of a run: on the device's clock and on the wall's."""
    set_precision(gpu.torch, precision)
    peer.before()
    if peer.burst > 1:

        def burst() -> None:
            for _ in range(peer.burst):
                peer.run()

        return gpu.time(burst, ahead=True)[0] / peer.burst, gpu.time(peer.run)[1]
    device, wall = gpu.time(peer.run, peer.after)
    return peer.clock() if peer.clock else device, wall


def measure(case: Case) -> list[dict[str, Any]]:
    """Rows of a case, from turns that its peers take one after the other."""
    taken: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in case.peers}
    end = float("inf")
    for n in range(WARM + MOST):
        if n == WARM:
            end = time.monotonic() + SECONDS
        if n >= WARM + LEAST and time.monotonic() >= end:
            break
        for (who, precision), peer in case.peers.items():
            sample = turn(case.gpu, peer, precision)
            if n >= WARM:
                taken[who, precision].append(sample)
    return rows(case, taken)


def rows(
    case: Case, taken: dict[tuple[str, str], list[tuple[float, float]]]
) -> list[dict[str, Any]]:
    """What is said of the samples: (device, wall) milliseconds of each peer."""
    from benchmarks import samples  # needs SciPy

    medians = {
        key: samples.percentile(np.array([device for device, _ in pairs]), 0.5)
        for key, pairs in taken.items()
    }
    copy = 2 * COPY / medians["copy", ""] / 1e6  # GB/s
    out = []
    for (who, precision), pairs in taken.items():
        device, wall = (np.array(column) for column in zip(*pairs, strict=True))
        ms = medians[who, precision]
        row: dict[str, Any] = {"case": case.name, "who": who, "precision": precision}
        row |= {"device ms": ms, "wall ms": samples.percentile(wall, 0.5)}
        if who == "copy":
            row["GB/s"] = copy
        elif who == "matmul":
            row["TFLOP/s"] = 2 * MATRIX**3 / ms / 1e9
        else:
            row["ms/step"] = ms / case.steps
            if case.bytes:
                row["of copy"] = case.bytes / ms / 1e6 / copy
            if case.operations:
                most = 2 * MATRIX**3 / medians["matmul", precision]
                row["of matmul"] = case.operations / ms / most
            own = medians.get(("ours", "fp16" if precision in FAST else precision))
            if own is not None:
                row["x ours"] = ms / own
            row["MiB"] = case.memory[who, precision]
        row["statistics"] = {
            "device": samples.summary(device, [50, 90]),
            "wall": samples.summary(wall, [50, 90]),
        }
        row["samples"] = {"device ms": device.tolist(), "wall ms": wall.tolist()}
        out.append(row)
    return out


def goals(case: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a case is to reach, and whether it does; "met" is None where it was not measured."""
    by = {(row["who"], row["precision"]): row for row in found}
    out: list[dict[str, Any]] = []

    def goal(what: str, bound: str, limit: float, value: float | None) -> None:
        met = None if value is None else value >= limit if bound == ">=" else value <= limit
        text = f"{case}: {what} {bound} {limit:g}"
        out.append({"goal": text, "value": value, "met": met})

    def value(who: str, precision: str, name: str) -> float | None:
        return by.get((who, precision), {}).get(name)

    def fastest(precision: str, kinds: tuple[str, ...]) -> float | None:
        """Of PyTorch's, in our times."""
        held = FAST if precision in FAST else (precision,)
        found = (row for (who, p), row in by.items() if p in held and any(k in who for k in kinds))
        return min((row["x ours"] for row in found if "x ours" in row), default=None)

    if case.startswith("guided filter"):
        goal("of copy", ">=", 0.5, value("ours", "", "of copy"))
        goal("x torch eager", ">=", 5, value("torch eager", "", "x ours"))
    limits: dict[str, tuple[str, dict[str, float]]] = {
        "residual": ("device ms", {"fp32": 1.0, "fp16": 1.0}),
        "dynaguide": ("ms/step", {"fp32": 2.5, "fp16": 0.6}),
    }
    name, each = limits.get(case.split()[0], ("", {}))
    for precision, limit in each.items():
        goal(f"{precision}, {name}", "<=", limit, value("ours", precision, name))
        goal(f"{precision}, x torch eager", ">=", 4, fastest(precision, ("eager",)))
        best = fastest(precision, ("graph", "compiled"))
        goal(f"{precision}, x best graphed or compiled torch", ">=", 2, best)
    return out


# ---- The command line ---------------------------------------------------------------------------


def say(line: str) -> None:
    """Tell what happens now."""
    print(line, flush=True)


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


def commit() -> str:
    """Of the source tree, where git knows it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def sources() -> str:
    """A hash of the sources that were measured, for trees without git."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("runtime/**/*"), *ROOT.glob("benchmarks/*.py")]):
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
        "commit": commit(),
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
    half = path.with_suffix(".half")
    half.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(half, path)


if __name__ == "__main__":
    sys.exit("use: python -m benchmarks gpu")
