"""The cases of the GPU benchmark: filters, upsampling and refinements, by our code and PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import runtime
from benchmarks.speed.gpu import comparison
from benchmarks.speed.gpu.comparison import Case, Peer, ceilings
from benchmarks.speed.gpu.device import FAST, Gpu
from benchmarks.speed.torch_filter import TorchFilter, enlarged
from benchmarks.speed.workloads import CLASSES, find_case, picture, refiner
from runtime.core.options import RefineOptions
from runtime.core.parameters import objective_of

# The first arguments of torch_twin.Twin: options, initial weights, image and guide.
TwinArguments = tuple[RefineOptions, dict[str, np.ndarray], np.ndarray, np.ndarray]
SETS = 4  # copies of the inputs; calls use them in turns, so that large inputs are not in the cache
STEPS = {"residual": 10, "dynaguide": 50}  # steps of one run
# How PyTorch makes a step; "graph" is a CUDA graph, "compiled" is torch.compile.
HOW = ("eager", "graph", "graph, channels last", "compiled", "compiled, graph")


def planar(array: np.ndarray) -> np.ndarray:
    """Convert an array (h, w, channels) to (1, channels, h, w)."""
    return np.ascontiguousarray(array.transpose(2, 0, 1)[None])


def back(x: Any) -> np.ndarray:
    """Copy a tensor (1, channels, h, w) from the device to a NumPy array (h, w, channels)."""
    return x[0].permute(1, 2, 0).cpu().numpy()


def over_sets(
    gpu: Gpu,
    call: Callable[..., Any],
    arrays: tuple[np.ndarray, ...],
    read: Callable[[Any], tuple[np.ndarray, ...]],
) -> Peer:
    """Make a peer that calls a function on SETS copies of the arrays in turns.

    Parameters
    ----------
    call : the function.
    arrays : its arguments, on the host.
    read : copies a result to the host, for the comparison.
    """
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
    """Add our function and PyTorch's, which compute the same, as peers to a case.

    Parameters
    ----------
    case : the case, which is returned.
    ours, theirs : the functions. The arguments of PyTorch's function are (1, channels, h, w).
    arrays : (h, w, channels) arguments of our function.
    read_ours, read_theirs : copy a result to the host.
    compiled : whether PyTorch's function compiled by torch.compile is added as well.
    """
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
    """Make the case of a guided filter with radius 8.

    Parameters
    ----------
    size : (height, width) of the guidance image.
    low : (height, width) of the maps; if it is smaller than ``size``, this is joint upsampling.
    classes : number of maps.
    """
    rng, radius, eps = np.random.default_rng(0), 8, 1e-3
    guidance, values = rng.random((*size, 3), np.float32), rng.random((*low, classes), np.float32)
    traffic = 4.0 * (np.prod(size) * (3 + classes) + np.prod(low) * classes)

    def ours(guidance: Any, values: Any) -> Any:
        return runtime.guided_filter(
            guidance, values, radius=radius, eps=eps, device="cuda", stream=gpu.stream()
        )

    return add_filters(
        Case(gpu, name, bytes=float(traffic)),
        ours,
        TorchFilter(gpu.torch, radius, eps).filter,
        (guidance, values),
        lambda out: (np.asarray(out),),
        lambda out: (back(out),),
        compiled,
    )


def upsample_case(
    gpu: Gpu, name: str, compiled: bool, size: tuple[int, int], low: tuple[int, int], guided: bool
) -> Case:
    """Make the case of labels and confidence at full size from smaller scores of CLASSES classes.

    Parameters
    ----------
    size, low : (height, width) of the picture and of the scores.
    guided : joint upsampling with radius 2; otherwise the scores are enlarged bilinearly.
    """
    torch, rng, radius, eps = gpu.torch, np.random.default_rng(0), 2, 1e-3
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    scores = rng.random((*low, CLASSES), np.float32)
    small = rng.random((*low, 3), np.float32)
    arrays = (image, scores, small) if guided else (image, scores)
    traffic = np.prod(size) * 11.0 + 4.0 * np.prod(low) * (CLASSES + 3 * guided)
    if not guided:  # the picture is not read
        traffic -= 3.0 * np.prod(size)
    peer = TorchFilter(torch, radius, eps)

    def ours(image: Any, scores: Any, small: Any = None) -> Any:
        options = {"low_image": small, "device": "cuda", "stream": gpu.stream()}
        return runtime.joint_upsample(image, scores, radius=radius, eps=eps, **options)

    def theirs(image: Any, scores: Any, small: Any = None) -> Any:
        if small is None:
            values = enlarged(torch, scores, image.shape[2:])
        else:
            values = peer.apply(peer.coefficients(small, scores), image / 255)
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
    """Steps of torch_twin.Twin without any call that waits for the GPU.

    So the same step can run in eager PyTorch, in a CUDA graph and compiled. With precision "fp16"
    the network computes in half precision (autocast). Then the loss is multiplied by the number of
    pixels, so that its gradients are not too small for half precision; step divides them again.

    Parameters
    ----------
    twin : a Twin.
    torch : the module torch.
    precision : "fp32", "tf32" or "fp16".
    """

    def __init__(self, twin: Any, torch: Any, precision: str) -> None:
        self.twin, self.torch, self.half = twin, torch, precision == "fp16"
        self.scale = float(twin.x[0, 0].numel()) if self.half else 1.0
        twin.count = self.count
        self.forward = self.loss
        self.forward()  # solves the mapping of the classes, with SciPy on the host
        twin.step_count = 10  # from step 10 on the mapping is not solved again
        self.state = [*twin.net.parameters(), *twin.net.buffers()]
        self.kept = [t.detach().clone() for t in self.state]
        self.last: Any = None  # the loss of the last step

    def count(self, labels: Any) -> Any:
        """Return the number of different labels as a tensor on the device."""
        seen = self.torch.zeros(self.twin.classes, device=labels.device)
        return seen.scatter_(0, labels.flatten(), 1.0).sum()

    def loss(self) -> Any:
        """Make a forward pass and return the total loss."""
        where, half = self.twin.x.device.type, self.torch.float16
        with self.torch.autocast(where, half, enabled=self.half, cache_enabled=False):
            response = self.twin.net(self.twin.x)
        return self.twin.losses(response.float() + self.twin.prior)[0]

    def step(self) -> None:
        """Make one SGD step."""
        self.twin.sgd.zero_grad(set_to_none=True)
        loss = self.forward()
        (loss * self.scale).backward()
        if self.half:
            self.torch._foreach_mul_([p.grad for p in self.twin.net.parameters()], 1 / self.scale)
        self.twin.sgd.step()
        self.last = loss.detach()

    def restore(self) -> None:
        """Restore the initial weights and set the momentum to zero."""
        with self.torch.no_grad():
            for now, kept in zip(self.state, self.kept, strict=True):
                now.copy_(kept)
            for held in self.twin.sgd.state.values():
                held["momentum_buffer"].zero_()


def steps_case(gpu: Gpu, name: str, compiled: bool, size: str, steps: int) -> Case:
    """Make the case of a refinement from the initial weights, in each precision. The first losses
    of the peers are compared.

    Parameters
    ----------
    size : a name for workloads.find_case.
    steps : steps of one run.
    """
    case = find_case(size)
    image, hard, soft = picture(case.height, case.width)
    plain = refiner(case)
    follows = objective_of(plain.options).channels_follow_classes
    guide, state = soft if follows else hard, plain.state_dict()
    weights = sum(v.size for k, v in state.items() if v.ndim == 4 and "momentum" not in k)
    operations = 6.0 * weights * case.height * case.width * steps
    out = Case(gpu, name, operations=operations, steps=steps)
    for precision in ("fp32", "fp16"):
        out.add("ours", partial(ours, case, precision, image, guide, steps), precision)
    peers, arguments = HOW[: None if compiled else 3], (plain.options, state, image, guide)
    for how, precision in itertools.product(peers, ("fp32", *FAST)):
        made = _torch_peer(gpu, how, precision, steps, arguments)
        out.add(f"torch {how}", made, precision)
    ceilings(out, matmul=True)
    return out


def ours(case: Any, precision: str, image: np.ndarray, guide: np.ndarray, steps: int) -> Peer:
    """Make the peer "ours": a Refiner on the GPU.

    Parameters
    ----------
    case : of workloads.find_case.
    precision : "fp32" or "fp16".
    image, guide : the inputs of the refinement.
    steps : steps of one run.
    """
    made = refiner(case, device="cuda", precision=precision)
    stats = made.run(image, guide, steps=1).stats  # of the last run

    def run() -> None:
        nonlocal stats
        stats = made.run(image, guide, steps=steps).stats

    first = np.array(stats["losses"]["total"][0])
    return Peer(run, (first,), clock=lambda: stats["device_ms"])


def _torch_peer(
    gpu: Gpu, how: str, precision: str, steps: int, arguments: TwinArguments
) -> Callable[[], Peer]:
    """Return a function that makes a peer from the PyTorch twin.

    Parameters
    ----------
    how : one of HOW.
    precision : "fp32", "tf32" or "fp16".
    steps : steps of one run.
    arguments : the first arguments of torch_twin.Twin.
    """

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
    "guided filter, 1, 1080x1920": partial(
        filter_case, size=(1080, 1920), low=(1080, 1920), classes=1
    ),
    "guided filter, 8, 1080x1920": partial(
        filter_case, size=(1080, 1920), low=(1080, 1920), classes=8
    ),
    "joint upsampling, 8, 270x480 to 1080x1920": partial(
        filter_case, size=(1080, 1920), low=(270, 480), classes=8
    ),
    "bilinear upsampling, 14, 180x240 to 360x480": partial(
        upsample_case, size=(360, 480), low=(180, 240), guided=False
    ),
    "guided upsampling, 14, 180x240 to 360x480": partial(
        upsample_case, size=(360, 480), low=(180, 240), guided=True
    ),
    "residual 180x240, 10 steps": partial(
        steps_case, size="residual 180x240", steps=STEPS["residual"]
    ),
    "dynaguide 321x481, 50 steps": partial(
        steps_case, size="dynaguide 321x481", steps=STEPS["dynaguide"]
    ),
}
