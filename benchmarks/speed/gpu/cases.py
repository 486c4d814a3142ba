"""What is measured on a GPU: filters, upsampling and refinements, each by ours and by PyTorch's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

import runtime
from benchmarks.speed.gpu import comparison
from benchmarks.speed.gpu.comparison import Case, Peer, ceilings
from benchmarks.speed.gpu.device import FAST, Gpu
from benchmarks.speed.torch_filter import TorchFilter, enlarged
from benchmarks.speed.workloads import CLASSES, find_case, picture, refiner
from runtime.core.parameters import objective_of

SETS, BURST = 4, 8  # inputs that take turns; calls in a burst
STEPS = {"residual": 10, "dynaguide": 50}  # of a run
HOW = ("eager", "graph", "graph, channels last", "compiled", "compiled, graph")


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
    return Peer(lambda: call(*next(turns)), first, burst=comparison.BURST)


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


def upsample_case(
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
        return runtime.joint_upsample(image, scores, radius=radius, eps=eps, **options)

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


class Loop:
    """Steps of speed/torch_twin.py with nothing that makes the host wait, as eager PyTorch, a
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
    follows = objective_of(plain.options).channels_follow_classes
    guide, state = soft if follows else hard, plain.state_dict()
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
    stats = made.run(image, guide, steps=1).stats  # of the last run

    def run() -> None:
        nonlocal stats
        stats = made.run(image, guide, steps=steps).stats

    first = np.array(stats["losses"]["total"][0])
    return Peer(run, (first,), clock=lambda: stats["device_ms"])


def _torch_peer(
    gpu: Gpu, how: str, precision: str, steps: int, arguments: tuple[Any, ...]
) -> Callable[[], Peer]:
    """What makes a peer of the twin, which ``arguments`` give, as ``how`` of HOW says."""

    def make() -> Peer:
        from benchmarks.speed.torch_twin import Twin

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
    "bilinear upsampling, 14, 180x240 to 360x480": lambda *a: upsample_case(
        *a, (360, 480), (180, 240), False
    ),
    "guided upsampling, 14, 180x240 to 360x480": lambda *a: upsample_case(
        *a, (360, 480), (180, 240), True
    ),
    "residual 180x240, 10 steps": lambda *a: steps_case(*a, "residual 180x240", STEPS["residual"]),
    "dynaguide 321x481, 50 steps": (
        lambda *a: steps_case(*a, "dynaguide 321x481", STEPS["dynaguide"])
    ),
}
