"""The public functions: they check, explain, and call the device's module."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from runtime import network
from runtime.checks import (
    UnknownGuide,
    check_count,
    check_finite,
    check_guide,
    check_host,
    check_image,
    check_planes,
    check_positive,
    on_gpu,
    sum_classes,
)
from runtime.core.classes_cuda import hard, pairs, shares, take, winners
from runtime.device.choose import backend, target, thread_count
from runtime.device.driver import cuda_devices, parse_device
from runtime.device.transfer import check_rows, taken
from runtime.errors import InputError
from runtime.options import RefineOptions

STOPS = ("steps", "min_labels", "silhouette", "converged", "diverged", "budget")
MIN_SHARE = 5e-4  # residual keeps the classes that hold more than this share of the picture
_CODES: dict[str, tuple[str, ...]] = {  # the numbers of csrc/network.h
    "skip": ("none", "shared", "own"),
    "weighting": ("fixed", "fsf", "scf"),
    "mapping": ("overlap", "index_modulo"),
    "final_bn": ("none", "image", "running"),
}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Refinement:
    """What a refinement gives.

    Attributes
    ----------
    scores : (H, W, K) float32 in [0, 1], soft-max of the response map; sums to 1.
    labels : (H, W) int32, arg max of the scores: columns of ``scores``.
    classes : (K,) int32, the guide's class of each column, -1 where a cluster has none.
    stats : steps, stop_reason ("steps", "min_labels", "silhouette", "converged", "diverged",
        "budget", "one class"), clusters (labels in the last map), clusters_per_step, losses (dict
        of lists: total, similarity, spatial or pair, guide), label_floor; on a GPU device_ms: the
        steps' time on its own clock (CUDA events).
    """

    scores: np.ndarray
    labels: np.ndarray
    classes: np.ndarray
    stats: dict[str, Any]


class Refiner:
    """A refinement network for one picture size. Not safe for use by two threads at a time.

    Parameters
    ----------
    height, width : size of the pictures in pixels.
    classes : channels of the response map. Residual: the number of guide classes (required).
        The others: ``channels``, and may be left out.
    device : "cpu", "cuda", "cuda:1".
    precision : "fp32"; or on a GPU of compute capability 7.5 "fp16": convolutions on tensor cores,
        their inputs rounded to half precision (10 bits of mantissa), sums in float32.
    threads : most threads; all processors when None. The answer does not depend on it.
    target : instruction set for tests ("" = the one in use).
    options : see :class:`RefineOptions`.

    Raises
    ------
    InputError : an option or size out of range.
    MissingBackend, DeviceError : no such GPU, or not enough memory on it.
    """

    def __init__(
        self,
        height: int,
        width: int,
        *,
        classes: int | None = None,
        device: str = "cpu",
        precision: str = "fp32",
        threads: int | None = None,
        target: str = "",
        **options: Any,
    ) -> None:
        self.options, self.device = RefineOptions(**options), device
        self.height = check_count("height", height, 1, 2**20)
        self.width = check_count("width", width, 1, 2**20)
        if self.options.objective == "residual":
            if classes is None:
                raise InputError("classes is missing; residual needs the number of guide classes")
            self.classes = check_count("classes", classes, 1, 4096)
        else:
            channels = self.options.channels or 1
            self.classes = check_count("classes", classes or channels, 1, 4096)
        core, threads = backend(device), thread_count(threads)
        _target_or_default(target)
        self._native = core.Refiner(
            self.height,
            self.width,
            _native_options(self.options, self.classes),
            threads,
            target,
            **check_precision(device, precision),
        )
        self._initial = network.initial_state(self.options, self.classes)
        self.load_state_dict(self._initial)

    @property
    def arena_bytes(self) -> int:
        """Memory of all maps, in bytes."""
        return self._native.arena_bytes()

    def state_dict(self) -> network.State:
        """Weights, batch-norm buffers and "momentum.<name>", with PyTorch's names and shapes."""
        s = self._native.state()
        return network.unflatten(
            self.options, self.classes, s["parameters"], s["momenta"], s["buffers"], s["batches"]
        )

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Inverse of :meth:`state_dict`; momenta that are missing become zero.

        Raises
        ------
        InputError : a missing or unknown name, a wrong shape, NaN.
        """
        self._native.set_state(*network.flatten(self.options, self.classes, state))

    def run(
        self,
        image: np.ndarray,
        guide: np.ndarray | None = None,
        *,
        steps: int | None = None,
        warm: bool = False,
        progress: Progress | None = None,
        deadline: float | None = None,
    ) -> Refinement:
        """Refine.

        Parameters
        ----------
        image : (H, W, 3) float32 RGB in [0, 1].
        guide : (H, W, C) float32 probabilities, (H, W) int32 labels with -1 = unknown, or None
            (dynaguide and dynaseg without a guide term). On a GPU, image and probabilities may lie
            there as they are (:mod:`runtime.gpu`); scores and labels stay there, too.
        steps : instead of the option's.
        warm : start from the state that the last run left, or that was loaded. Otherwise from the
            seed's.
        progress : called as progress(done, steps) after each step.
        deadline : of time.monotonic(): no step begins after it.

        Raises
        ------
        InputError : a wrong size, NaN, a guide that is unknown everywhere.
        KeyboardInterrupt : between two steps.
        """
        options = self.options
        residual, there = options.objective == "residual", self.device != "cpu"
        if there:
            image, guide = taken("image", image, self.device), taken("guide", guide, self.device)
            guide = _on_the_host_if_hard(guide)
        image = check_image(image, gpu=there)
        if image.shape[:2] != (self.height, self.width):
            raise InputError(
                f"image is {image.shape[0]} x {image.shape[1]} pixels; "
                f"this Refiner was made for {self.height} x {self.width}"
            )
        asked = int(options.steps or 0) if steps is None else check_count("steps", steps, 0, 10**6)
        guide, floor = prepared(options, image, guide, self.classes, gpu=there)
        native, more = (guide, {}) if residual or not there else _labels_for_gpu(options, guide)
        if not warm:
            self.load_state_dict(self._initial)

        told = progress is not None or deadline is not None

        def report(done: int) -> bool:
            """Whether time is up."""
            if progress is not None:
                progress(done, asked)
            return done < asked and deadline is not None and time.monotonic() >= deadline

        late = asked > 0 and deadline is not None and time.monotonic() >= deadline
        scores, labels, losses, clusters, done, stop, last = self._native.run(
            image, native, floor, 0 if late else asked, report if told else None, **more
        )
        names = ("total", "similarity", "pair" if residual else "spatial", "guide")
        used = (0, 2, 3) if residual else (0, 1, 2, 3)
        stats = {
            "steps": done,
            "stop_reason": "budget" if late else STOPS[stop],
            "clusters": last,
            "clusters_per_step": clusters.tolist(),
            "losses": {names[i]: losses[:, i].tolist() for i in used},
            "label_floor": floor,
        }
        if self.device != "cpu":
            stats["device_ms"] = self._native.milliseconds()
        if residual:
            classes = np.arange(self.classes, dtype=np.int32)
        else:
            classes = majority_classes(labels, guide, self.classes)
        return Refinement(scores, labels, classes, stats)


def _on_the_host_if_hard(guide: Any) -> Any:
    """Labels become probabilities on the host, wherever they were."""
    return guide.numpy() if on_gpu(guide) and guide.ndim == 2 else guide


def _labels_for_gpu(options: RefineOptions, guide: Any) -> tuple[Any, dict[str, int]]:
    """The guide as a published objective on a GPU takes it, and how many classes labels have."""
    if guide is None:
        return None, {}
    if on_gpu(guide):
        known_shares(guide)
        if options.soft_guide:
            return guide, {}
        return hard(guide)[0], {"guide_classes": int(winners(guide).max()) + 1}
    return guide, {"guide_classes": int(guide.max()) + 1} if guide.ndim == 2 else {}


def _soft(guide: np.ndarray | None, classes: int) -> np.ndarray:
    if guide is None:
        raise InputError("guide is None; the residual objective corrects a prior and needs one")
    if guide.ndim == 2:
        if guide.max() >= classes:
            raise InputError(f"guide has label {guide.max()}; wanted less than {classes} classes")
        return np.eye(classes + 1, classes, dtype=np.float32)[guide]  # row -1 is all zero
    if guide.shape[2] != classes:
        raise InputError(f"guide has {guide.shape[2]} classes; wanted {classes}")
    return guide


def prepared(
    options: RefineOptions, image: np.ndarray, guide: Any, classes: int, *, gpu: bool = False
) -> tuple[np.ndarray | None, int]:
    """The checked guide as the objective takes it: (H, W, classes) probabilities, (H, W) int32
    labels with -1 = unknown, or None; and the number of labels that the silhouette asks for.
    Probabilities on a GPU stay what they are."""
    if guide is not None:
        guide = check_guide(guide, *image.shape[:2], gpu=gpu)
    if options.objective == "residual":
        guide = _soft(guide, classes)
    elif isinstance(guide, np.ndarray) and guide.ndim == 3 and not options.soft_guide:
        known = guide.sum(-1) > 0
        guide = np.where(known, guide.argmax(-1), -1).astype(np.int32)
    floor = 0
    if options.silhouette:
        from runtime.silhouette import best_cluster_count

        floor = best_cluster_count(np.asarray(image))
    return guide, floor


def known_shares(guide: Any) -> np.ndarray:
    """(C,) float64 means of a guide (H, W, C) on a GPU that is no NaN and not all zero."""
    share = shares(guide)
    if not share.max() > 0:
        raise UnknownGuide("guide is zero (unknown) everywhere, or has NaN")
    return share


def frequent_classes(guide: np.ndarray) -> np.ndarray:
    """(K,) int32: the classes that hold more than MIN_SHARE of a checked guide, also of one on a
    GPU."""
    if on_gpu(guide):
        share = known_shares(guide)
    elif guide.ndim == 2:
        share = np.bincount(guide[guide >= 0]) / guide.size
    else:
        share = guide.mean((0, 1), dtype=np.float64)
    return np.flatnonzero(share > min(MIN_SHARE, share.max() / 2)).astype(np.int32)


def restricted(guide: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """(H, W, K) float32 probabilities of ``classes`` alone: each pixel sums to 1, or is all zero
    where the guide knows none of them. On the GPU if the guide is."""
    if on_gpu(guide):
        return take(guide, classes, True)
    if guide.ndim == 2:  # label -> column; others and unknown ones to the last row, which is zero
        column = np.full(max(guide.max(), classes.max()) + 2, len(classes))
        column[classes] = np.arange(len(classes))
        return np.eye(len(classes) + 1, len(classes), dtype=np.float32)[column[guide]]
    soft = guide.take(classes, -1, mode="clip")
    soft[..., classes >= guide.shape[2]] = 0
    total = sum_classes(soft)
    return soft / np.where(total > 0, total, 1)


def match_classes(guide: np.ndarray, maps: Sequence[np.ndarray], classes: np.ndarray) -> np.ndarray:
    """The guide of a prior whose classes have no meaning of their own, renumbered.

    Parameters
    ----------
    guide : (H, W, C) float32 probabilities or (H, W) int32 labels with -1 = unknown.
    maps : (H, W) int32 segmentations into ``classes``, others and -1 being of none.
    classes : (K,) int32, distinct, at least 0.

    Returns
    -------
    A guide of the same kind. Its classes have the numbers of ``classes``, such that the overlap is
    the largest in sum (Hungarian method), and further ones only where there are more of them.
    """
    own = frequent_classes(guide)
    soft = restricted(guide, own)
    onto = sum((labels[..., None] == classes).astype(np.float32) for labels in maps)
    overlap = soft.reshape(-1, len(own)).T @ onto.reshape(-1, len(classes))
    cost = -overlap.astype(np.float64)
    core = backend("cpu")
    ids = np.full(len(own), -1, np.int32)
    if len(own) <= len(classes):
        pairs = np.arange(len(own)), np.asarray(core.assign(cost))
    else:
        pairs = np.asarray(core.assign(np.ascontiguousarray(cost.T))), np.arange(len(classes))
    ids[pairs[0]] = classes[pairs[1]]
    free = np.setdiff1d(np.arange(len(own) + int(classes.max()) + 1), classes)
    ids[ids < 0] = free[: int((ids < 0).sum())]
    if guide.ndim == 2:
        table = np.full(max(int(guide.max()), int(own.max())) + 2, -1, np.int32)
        table[own] = ids
        return table[guide]
    out = np.zeros((*guide.shape[:2], int(ids.max()) + 1), np.float32)
    out[..., ids] = soft
    return out


def _target_or_default(name: str) -> None:
    if name and name not in backend("cpu").targets():
        usable = ", ".join(backend("cpu").targets())
        raise InputError(f"target is {name!r}; this machine runs {usable}")
    target()  # a wrong SEG_ISA gets its own message


def check_precision(device: str, precision: str) -> dict[str, Any]:
    """What a Refiner on a GPU takes besides: its number, and whether to use tensor cores.

    Raises
    ------
    InputError : a precision that this device does not have.
    """
    if precision not in ("fp32", "fp16"):
        raise InputError(f"precision is {precision!r}; wanted 'fp32' or 'fp16'")
    kind, index = parse_device(device)
    if kind == "cpu":
        if precision != "fp32":
            raise InputError(
                f"precision is {precision!r}; the CPU has 'fp32' only", fix="device='cuda'"
            )
        return {}
    if precision == "fp16":
        gpu = next((gpu for gpu in cuda_devices() if gpu.index == index), None)
        if gpu is not None and float(gpu.compute_capability) < 7.5:
            raise InputError(
                f"precision 'fp16' needs compute capability 7.5; cuda:{index} ({gpu.name}) has "
                f"{gpu.compute_capability}",
                fix="precision='fp32'",
            )
    return {"device": index, "tensor_cores": precision == "fp16"}


def _native_options(options: RefineOptions, classes: int) -> dict[str, Any]:
    plain = {name: _CODES[name].index(getattr(options, name)) for name in _CODES}
    same = (
        *("channels", "blocks", "diagonals", "min_labels", "early_stop", "lr", "momentum", "mu"),
        *("beta", "lam", "sigma", "balance", "offsets"),
    )
    return (
        plain
        | {name: getattr(options, name) for name in same}
        | {
            "classes": classes,
            "objective": 0 if options.objective == "residual" else 1,
            "huber": options.continuity == "huber",
        }
    )


def majority_classes(labels: np.ndarray, guide: np.ndarray | None, clusters: int) -> np.ndarray:
    """(K,) int32: the guide class that each cluster overlaps most, -1 for clusters without one.

    ``labels`` are (H, W) int32 below K = ``clusters``; ``guide`` is (H, W, C) float32 probabilities
    or (H, W) int32 labels with -1 = unknown, or None. Labels and probabilities may both be arrays
    of the CUDA module."""
    if guide is None:
        return np.full(clusters, -1, np.int32)
    if on_gpu(labels) and on_gpu(guide) and guide.ndim == 3:
        table = pairs(labels, hard(guide)[0], clusters, guide.shape[2])
    else:
        labels, guide = np.asarray(labels), np.asarray(guide)
        hard = guide if guide.ndim == 2 else np.where(guide.sum(-1) > 0, guide.argmax(-1), -1)
        known = hard >= 0
        count = max(1, int(hard.max()) + 1)
        pairs = labels[known].astype(np.int64) * count + hard[known]
        table = np.bincount(pairs, minlength=clusters * count).reshape(clusters, count)
    return np.where(table.any(1), table.argmax(1), -1).astype(np.int32)


def refine(
    image: np.ndarray,
    guide: np.ndarray | None = None,
    *,
    device: str = "cpu",
    precision: str = "fp32",
    threads: int | None = None,
    initial: Mapping[str, np.ndarray] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Refinement:
    """Refine one picture; see :class:`Refiner` and :class:`RefineOptions`.

    With the residual objective the network gets only the classes that hold more than 0.05 % of the
    picture; ``classes`` of the result says which those were. On a GPU, ``image`` and ``guide`` may
    lie there, as :meth:`Refiner.run` takes them.

    ``initial`` is a state_dict to start from, for all classes of the guide; the seed's when None.
    """
    config = RefineOptions(**options)
    image, guide = taken("image", image, device), taken("guide", guide, device)
    guide = _on_the_host_if_hard(guide)

    def make(height: int, width: int, classes: np.ndarray | None) -> Refiner:
        count = None if classes is None else len(classes)
        refiner = Refiner(
            height,
            width,
            classes=count,
            device=device,
            precision=precision,
            threads=threads,
            **options,
        )
        if initial is not None:
            refiner.load_state_dict(network.select_classes(config, initial, classes))
        return refiner

    there, warm = parse_device(device)[0] == "cuda", initial is not None
    return refine_with(make, config, image, guide, warm=warm, progress=progress, gpu=there)


def refine_with(
    make: Callable[[int, int, np.ndarray | None], Any],
    config: RefineOptions,
    image: np.ndarray,
    guide: np.ndarray | None = None,
    *,
    warm: bool = False,
    progress: Progress | None = None,
    gpu: bool = False,
) -> Refinement:
    """What :func:`refine` does, with the Refiner (or what runs like one) that ``make(height, width,
    classes)`` gives; ``classes`` are the guide's that take part, None where all do.

    ``gpu``: it is on a GPU, where both arrays may be, as the CUDA module's own."""
    image = check_image(image, gpu=gpu)
    height, width = image.shape[:2]
    if config.objective != "residual":
        return make(height, width, None).run(image, guide, warm=warm, progress=progress)
    if guide is None:
        raise InputError("guide is None; the residual objective corrects a prior, needs one")
    guide = check_guide(guide, height, width, gpu=gpu)
    classes = frequent_classes(guide)
    guide = restricted(guide, classes)
    refiner = make(height, width, classes)
    if len(classes) == 1:  # nothing to decide
        result = refiner.run(image, guide, steps=0, warm=warm)
        result.stats["stop_reason"] = "one class"
    else:
        result = refiner.run(image, guide, warm=warm, progress=progress)
    return replace(result, classes=classes)


def guided_filter(
    guide: np.ndarray,
    values: np.ndarray,
    *,
    radius: int = 8,
    eps: float = 1e-3,
    subsample: int = 1,
    out: np.ndarray | None = None,
    device: str = "cpu",
    stream: int | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Guided filter (He, Sun, Tang, TPAMI 2013), its fast form (He, Sun 2015), joint upsampling.

    Parameters
    ----------
    guide : (H, W) or (H, W, 1) grey or (H, W, 3) colour, float32; eps is meant for [0, 1]. uint8
        counts as level / 255 and is faster: a camera's picture is taken as it is.
    values : (H, W, K) or (H, W) float32, what is filtered; or (h, w, K), smaller than the guide:
        then it is lifted to the guide's size (the guide is averaged down to (h, w) for the
        coefficients, which are interpolated bilinearly).
    radius : of the (2 radius + 1)^2 window, in pixels of ``values``. Windows are cut at the
        borders and divided by their true area.
    eps : regularisation: contrast (variance) below it is smoothed.
    subsample : s > 1 computes the coefficients at 1/s of the size, with radius / s.
    out : where the result goes, float32 of its shape, C-contiguous, and not part of ``guide``; it
        may be ``values``. Saves the system's clearing of new memory. On the CPU only: memory on a
        GPU is kept for the next call.
    device : "cpu", "cuda", "cuda:1". With a GPU, ``guide`` and ``values`` may lie on it: arrays of
        PyTorch, CuPy, JAX, or any with ``__dlpack__`` or ``__cuda_array_interface__``, C-contiguous
        and float32, the guide also uint8. They are not copied, and not searched for NaN, which
        would wait for the GPU.
    stream : the cudaStream_t to work on, as an integer; the module's own when None.

    Returns
    -------
    (H, W, K) float32, or (H, W) when ``values`` had two dimensions. Not clipped. If an argument was
    on the GPU, so is the result: a ``runtime._cuda.Array``, with both protocols and ``numpy()``,
    which ``stream`` fills when it comes to it.

    Raises
    ------
    InputError : shapes that do not fit, NaN, a radius below 1.
    DeviceError : the GPU fails, or its memory is full.
    """
    given = out
    stays = on_gpu(guide) or on_gpu(values)
    core, where, guide, values = _placed(device, stream, guide=guide, values=values)
    guide = check_planes("guide", guide, (1, 3), finite=bool(where), gpu=bool(where), levels=True)
    two_dimensional = np.ndim(values) == 2
    values = check_planes("values", values, finite=bool(where), gpu=bool(where))
    radius = check_count("radius", radius, 1, 2**20)
    subsample = check_count("subsample", subsample, 1, 2**20)
    eps = check_positive("eps", eps)
    if values.shape[0] > guide.shape[0] or values.shape[1] > guide.shape[1]:
        raise InputError(
            f"values {values.shape[:2]} are larger than the guide {guide.shape[:2]}",
            fix="filter at the size of the values: resize the guide up",
        )
    height, width, classes = *guide.shape[:2], values.shape[2]
    if out is not None:
        out = _check_out(out, (height, width, classes), two_dimensional, guide, bool(where))
    threads = thread_count(threads)
    target()
    guide, values = _moved(core, where, guide=guide, values=values)
    if where and guide.dtype == np.uint8:
        guide = core.working_picture(guide, height, width, **where)
    size = [-(-n // subsample) for n in values.shape[:2]]
    if subsample > 1:
        radius = max(1, round(radius / subsample))

    def shrink(name: str, planes: np.ndarray) -> np.ndarray:
        low = planes
        if planes.shape[:2] != tuple(size):
            low = core.shrink(planes, *size, threads, **where)
        if not where and not np.isfinite(low).all():  # a mean shows any NaN that went into it
            check_finite(name, planes)
        return low

    low, values = shrink("guide", guide), shrink("values", values)
    to = {} if out is None else {"out": out}
    if low.shape == guide.shape:
        made = core.guided_filter(guide, values, radius, eps, threads, **where, **to)
    else:
        coefficients = core.guided_coefficients(low, values, radius, eps, threads, **where)
        made = core.apply_coefficients(coefficients, guide, threads, **where, **to)
    if given is not None:
        return given
    if two_dimensional:
        made = made.reshape(height, width)
    return made.numpy() if where and not stays else made


def _check_out(
    out: Any, shape: tuple[int, ...], two_dimensional: bool, guide: np.ndarray, gpu: bool
) -> np.ndarray:
    """``out`` of guided_filter, with three dimensions."""
    if gpu:
        raise InputError("out is for device 'cpu'", fix="leave it out: a GPU's memory is kept")
    wanted = shape[:2] if two_dimensional else shape
    if not isinstance(out, np.ndarray) or out.dtype != np.float32 or out.shape != wanted:
        found = f"{out.shape} {out.dtype}" if isinstance(out, np.ndarray) else type(out).__name__
        raise InputError(f"out is {found}; wanted {wanted} float32")
    if not (out.flags.c_contiguous and out.flags.aligned and out.flags.writeable):
        raise InputError("out is not C-contiguous or aligned, or may not be written to")
    if np.may_share_memory(out, guide):
        raise InputError("out is part of the guide, which is read to the end")
    return np.asarray(out).reshape(shape)  # also of np.memmap


def _placed(device: str, stream: int | None, **arrays: Any) -> tuple[Any, ...]:
    """The device's module, the further keywords of its functions ("cuda": device and stream), and
    the arrays, those on the GPU as the module's own."""
    core, (kind, index) = backend(device), parse_device(device)
    if kind == "cpu":
        if stream is not None:
            raise InputError(f"stream is {stream!r}, but device is 'cpu', which has none")
        return core, {}, *arrays.values()
    if stream is not None:
        stream = check_count("stream", stream, 0, 2**64 - 1)
    where = {"device": index, "stream": stream}
    taken = (core.as_array(a, n, **where) if on_gpu(a) else a for n, a in arrays.items())
    return core, where, *taken


def _moved(core: Any, where: dict[str, Any], **arrays: Any) -> Iterator[Any]:
    """The checked arrays, on the GPU if that is where the work is."""
    for name, array in arrays.items():
        if where:
            check_rows(name, array)
        yield core.to_device(array, **where) if where and not on_gpu(array) else array


def lift(
    image: np.ndarray,
    scores: np.ndarray,
    *,
    low_image: np.ndarray | None = None,
    radius: int = 2,
    eps: float = 1e-3,
    device: str = "cpu",
    stream: int | None = None,
    threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Labels at full size from low-resolution scores, without ever holding full-size scores.

    Parameters
    ----------
    image : (H, W, 3) uint8 RGB.
    scores : (h, w, K) float32 probabilities, at most as large as ``image``.
    low_image : (h, w, 3) float32 RGB in [0, 1], ``image`` averaged down: lift with the colour
        guided filter. None: lift bilinearly.
    radius, eps : of the guided filter, radius in pixels of ``scores``.
    device, stream : as in :func:`guided_filter`; with a GPU the arrays may lie on it, and are not
        looked into then.

    Returns
    -------
    labels (H, W) int32, arg max of the lifted scores; confidence (H, W) float32, its value cut to
    [0, 1]. On the GPU if an argument was.
    """
    stays = on_gpu(image) or on_gpu(scores) or on_gpu(low_image)
    core, where, picture, scores, low_image = _placed(
        device, stream, image=image, scores=scores, low_image=low_image
    )
    if not (where and on_gpu(picture)):
        picture = check_host("image", picture)
    size = picture.shape
    if picture.dtype != np.uint8 or len(size) != 3 or size[2] != 3 or 0 in size:
        raise InputError(f"image is {size} {picture.dtype}; wanted (H, W, 3) uint8 with H, W >= 1")
    scores = check_planes("scores", scores, gpu=bool(where))
    if scores.shape[0] > size[0] or scores.shape[1] > size[1]:
        raise InputError(f"scores {scores.shape[:2]} are larger than the image {size[:2]}")
    threads = thread_count(threads)
    target()
    picture, scores = _moved(core, where, image=picture, scores=scores)
    if low_image is None and where:
        coefficients = core.bilinear_coefficients(scores, **where)
    elif low_image is None:
        coefficients = np.moveaxis(scores[:, :, None, :], 1, -1)
    else:
        low_image = check_image(low_image, "low_image", gpu=bool(where))
        if low_image.shape[:2] != scores.shape[:2]:
            raise InputError(
                f"low_image is {low_image.shape[:2]}; wanted the size of scores {scores.shape[:2]}"
            )
        radius, eps = check_count("radius", radius, 1, 2**20), check_positive("eps", eps)
        coefficients = core.guided_coefficients(low_image, scores, radius, eps, threads, **where)
    if not where:
        picture = np.ascontiguousarray(picture)
    labels, confidence = core.lift(coefficients, picture, threads, **where)
    return (labels.numpy(), confidence.numpy()) if where and not stays else (labels, confidence)


def connected_regions(labels: np.ndarray, *, min_area: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """4-connected regions of equal label; small ones join the neighbour with the longest border.

    Parameters
    ----------
    labels : (H, W) integers.
    min_area : regions under this many pixels are merged, smallest first; they take the label of
        the region that they join. 0 merges nothing.

    Returns
    -------
    regions (H, W) int32, numbered 1, 2, ... in the order of their first pixel; labels (H, W) int32
    after merging.
    """
    array = np.asarray(labels)
    if array.ndim != 2 or array.dtype.kind not in "iu" or array.size == 0:
        raise InputError(f"labels is {array.shape} {array.dtype}; wanted (H, W) integers")
    if array.min() < -(2**31) or array.max() >= 2**31:
        raise InputError(f"labels span {array.min()} to {array.max()}; wanted 32-bit integers")
    min_area = check_count("min_area", min_area, 0, 2**62)
    regions, merged, _ = backend("cpu").connected_regions(
        np.ascontiguousarray(array, np.int32), min_area
    )
    return regions, merged
