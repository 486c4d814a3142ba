"""Refinement of one picture: arguments are checked, then the device's native loop runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from runtime.checks import (
    UnknownGuide,
    check_count,
    check_image,
    on_gpu,
    renamed,
    scaled_to_one,
)
from runtime.core import parameters
from runtime.core.classes import (
    classes_of,
    frequent_classes,
    known_shares,
    majority_classes,
    restricted,
)
from runtime.core.guide import Guide
from runtime.core.options import RefineOptions
from runtime.device.choose import isa, module_of, thread_count
from runtime.device.driver import cuda_devices, parse_device
from runtime.device.transfer import as_device_array
from runtime.errors import InputError

STOPS = ("steps", "min_labels", "silhouette", "converged", "diverged", "budget")
CODES: dict[str, tuple[str, ...]] = {  # the numbers of csrc/network.h
    "skip": ("none", "shared", "own"),
    "weighting": ("fixed", "fsf", "scf"),
    "mapping": ("overlap", "index_modulo"),
    "final_bn": ("none", "image", "running"),
}
Progress = Callable[[int, int], None]
Make = Callable[[int, int, "np.ndarray | None"], Any]  # (height, width, classes): a refiner


@dataclass(frozen=True)
class Refinement:
    """The result of a refinement.

    Attributes
    ----------
    scores : (H, W, K) float32 in [0, 1], soft-max of the response map; sums to 1.
    labels : (H, W) int32, arg max of the scores: columns of ``scores``.
    classes : (K,) int32, the guide's class of each column, -1 where a cluster has none.
    stats : steps, stop_reason ("steps", "min_labels", "silhouette", "converged", "diverged",
        "budget", "one class"), clusters (labels in the last map), clusters_per_step, losses (dict
        of lists: total, similarity, spatial or pair, guide), label_floor; on a GPU device_ms, the
        time of the steps by CUDA events.

    Example
    -------
    >>> result = runtime.refine(image, guide)
    >>> classes = result.classes[result.labels]  # (H, W) classes of the guide
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
    isa : instruction set, a name of ``runtime.isas()``, for tests; "" = the one in use.
    options : see :class:`RefineOptions`.

    Raises
    ------
    InputError : an option or size out of range.
    MissingBackend, DeviceError : no such GPU, or not enough memory on it.

    Example
    -------
    >>> refiner = runtime.Refiner(240, 320, classes=19)
    >>> result = refiner.run(image, guide)  # (240, 320, 3) and (240, 320, 19)
    """

    @renamed(target="isa")
    def __init__(
        self,
        height: int,
        width: int,
        *,
        classes: int | None = None,
        device: str = "cpu",
        precision: str = "fp32",
        threads: int | None = None,
        isa: str = "",
        **options: Any,
    ) -> None:
        self.options, self.device = RefineOptions(**options), device
        self.height = check_count("height", height, 1, 2**20)
        self.width = check_count("width", width, 1, 2**20)
        if parameters.objective_of(self.options).channels_follow_classes:
            if classes is None:
                raise InputError("classes is missing; residual needs the number of guide classes")
            self.classes = check_count("classes", classes, 1, 4096)
        else:
            channels = self.options.channels or 1
            self.classes = check_count("classes", classes or channels, 1, 4096)
        core, threads = module_of(device), thread_count(threads)
        _isa_or_default(isa)
        self._native = core.Refiner(
            self.height,
            self.width,
            _native_options(self.options, self.classes),
            threads,
            isa,
            **check_precision(device, precision),
        )
        self._initial = parameters.initial_state(self.options, self.classes)
        self.load_state_dict(self._initial)

    @property
    def arena_bytes(self) -> int:
        """Memory of all maps, in bytes."""
        return self._native.arena_bytes()

    def state_dict(self) -> parameters.State:
        """Weights, batch-norm buffers and "momentum.<name>", with PyTorch's names and shapes."""
        s = self._native.state()
        return parameters.unflatten(
            self.options, self.classes, s["parameters"], s["momenta"], s["buffers"], s["batches"]
        )

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Inverse of :meth:`state_dict`; momenta that are missing become zero.

        Raises
        ------
        InputError : a missing or unknown name, a wrong shape, NaN.
        """
        self._native.set_state(*parameters.flatten(self.options, self.classes, state))

    def run(
        self,
        image: np.ndarray,
        guide: np.ndarray | Guide | None = None,
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
            (dynaguide and dynaseg without a guide term); a Guide is not checked again. On a GPU,
            image and probabilities may be arrays on that GPU, and scores and labels of the result
            always are.
        steps : instead of the option's.
        warm : start from the state after the last run, or the loaded state; else from the weights
            of the option ``seed``.
        progress : called as progress(done, steps) after each step.
        deadline : a time of time.monotonic(), in seconds; no step begins after it.

        Raises
        ------
        InputError : a wrong size, NaN, a guide that is unknown everywhere.
        KeyboardInterrupt : between two steps.
        """
        options = self.options
        objective, gpu = parameters.objective_of(options), self.device != "cpu"
        image, guide = _given(image, guide, self.device)
        image = check_image(image, gpu=gpu)
        if image.shape[:2] != (self.height, self.width):
            raise InputError(
                f"image is {image.shape[0]} x {image.shape[1]} pixels; "
                f"this Refiner was made for {self.height} x {self.width}"
            )
        asked = int(options.steps or 0) if steps is None else check_count("steps", steps, 0, 10**6)
        guide, floor = prepared(options, image, guide, self.classes, gpu=gpu)
        native, more = (
            (guide, {})
            if objective.takes_soft_guide or not gpu
            else _labels_for_gpu(options, guide)
        )
        if not warm:
            self.load_state_dict(self._initial)

        told = progress is not None or deadline is not None

        def report(done: int) -> bool:
            """Whether the deadline has passed and a step is left."""
            if progress is not None:
                progress(done, asked)
            return done < asked and deadline is not None and time.monotonic() >= deadline

        late = asked > 0 and deadline is not None and time.monotonic() >= deadline
        scores, labels, losses, clusters, done, stop, last = self._native.run(
            image, native, floor, 0 if late else asked, report if told else None, **more
        )
        stats = statistics(
            options,
            steps=done,
            stop_reason="budget" if late else STOPS[stop],
            clusters=last,
            clusters_per_step=clusters.tolist(),
            losses=losses,
            label_floor=floor,
        )
        if self.device != "cpu":
            stats["device_ms"] = self._native.milliseconds()
        if objective.channels_follow_classes:
            classes = np.arange(self.classes, dtype=np.int32)
        else:
            classes = majority_classes(labels, guide, self.classes)
        return Refinement(scores, labels, classes, stats)


def statistics(
    options: RefineOptions,
    *,
    steps: int,
    stop_reason: str,
    clusters: int,
    clusters_per_step: list[int],
    losses: np.ndarray,
    label_floor: int,
) -> dict[str, Any]:
    """``Refinement.stats``; ``losses`` is (steps, 4)."""
    columns = parameters.objective_of(options).losses
    return {
        "steps": steps,
        "stop_reason": stop_reason,
        "clusters": clusters,
        "clusters_per_step": clusters_per_step,
        "losses": {name: losses[:, i].tolist() for name, i in columns.items()},
        "label_floor": label_floor,
    }


def _given(image: Any, guide: Any, device: str) -> tuple[Any, Any]:
    """The caller's arrays; those on the GPU ``device`` as arrays of the CUDA module, but labels as
    a copy on the host, where their classes are counted."""
    if not isinstance(guide, Guide):
        guide = as_device_array("guide", guide, device)
        guide = guide.numpy() if on_gpu(guide) and guide.ndim == 2 and device != "cpu" else guide
    return as_device_array("image", image, device), guide


def _labels_for_gpu(options: RefineOptions, guide: Any) -> tuple[Any, dict[str, int]]:
    """The guide in the form that a published objective takes on a GPU, and the further keyword of
    the native call: the number of classes in labels."""
    if guide is None:
        return None, {}
    if on_gpu(guide):
        known_shares(guide)
        if options.soft_guide:
            return guide, {}
        module = classes_of(guide)
        return module.hard(guide)[0], {"guide_classes": int(module.winners(guide).max()) + 1}
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
    """The guide (an array, a Guide or None) in the form that the objective takes: (H, W, classes)
    probabilities, (H, W) int32 labels with -1 = unknown, or None; and the least number of labels
    by the silhouette, 0 without it. Probabilities on a GPU are not converted.

    Raises
    ------
    InputError : a guide of a wrong size, dtype or class count, NaN, or unknown everywhere.
    """
    resized = isinstance(guide, Guide)  # so its pixels may sum to less than 1
    if guide is not None:
        guide = Guide.checked(guide, *image.shape[:2], gpu=gpu).array
    if parameters.objective_of(options).channels_follow_classes:
        guide = _soft(guide, classes)
    elif isinstance(guide, np.ndarray) and guide.ndim == 3 and options.soft_guide:
        guide = scaled_to_one(guide) if resized else guide
    elif isinstance(guide, np.ndarray) and guide.ndim == 3:
        guide, _ = classes_of(guide).hard(guide)
        if guide.max() < 0:
            raise UnknownGuide("guide is zero (unknown) everywhere; it has no class for any pixel")
    floor = 0
    if options.silhouette:
        from runtime.core.silhouette import best_cluster_count

        floor = best_cluster_count(np.asarray(image))
    return guide, floor


def _isa_or_default(name: str) -> None:
    if name and name not in module_of("cpu").isas():
        usable = ", ".join(module_of("cpu").isas())
        raise InputError(f"isa is {name!r}; this machine runs {usable}")
    isa()  # raises where SEG_ISA is wrong


def check_precision(device: str, precision: str) -> dict[str, Any]:
    """The further keywords of a native Refiner: on a GPU its number, and whether to use tensor
    cores; none on the CPU.

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
    plain = {name: CODES[name].index(getattr(options, name)) for name in CODES}
    same = (
        *("channels", "blocks", "diagonals", "min_labels", "early_stop", "lr", "momentum", "mu"),
        *("beta", "lam", "sigma", "balance", "offsets"),
    )
    return (
        plain
        | {name: getattr(options, name) for name in same}
        | {
            "classes": classes,
            "objective": parameters.objective_of(options).native,
            "huber": options.continuity == "huber",
        }
    )


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
    """Refine one picture.

    With the residual objective only classes that hold more than 0.05 % of the picture take part;
    ``classes`` of the result are these.

    Parameters
    ----------
    image, guide : as for :meth:`Refiner.run`; on a GPU they may be arrays on that GPU.
    device, precision, threads : as for :class:`Refiner`.
    initial : a state_dict to start from, for all classes of the guide; None: the seed's weights.
    progress : called as progress(done, steps) after each step.
    options : see :class:`RefineOptions`.

    Raises
    ------
    InputError : an option, the picture or the guide is wrong.
    MissingBackend, DeviceError : no such GPU, or not enough memory on it.

    Example
    -------
    >>> result = runtime.refine(image, guide, steps=10)
    """
    config = RefineOptions(**options)
    image, guide = _given(image, guide, device)
    gpu, warm = parse_device(device)[0] == "cuda", initial is not None
    image = check_image(image, gpu=gpu)
    on: dict[str, Any] = {"device": device, "precision": precision, "threads": threads}
    make = maker(lambda h, w, count: Refiner(h, w, classes=count, **on, **options), config, initial)
    return refine_with(make, config, image, guide, warm=warm, progress=progress, gpu=gpu)


def maker(
    new: Callable[[int, int, int | None], Any],
    config: RefineOptions,
    initial: Mapping[str, np.ndarray] | None = None,
) -> Make:
    """The argument ``make`` of :func:`refine_with`.

    ``new(height, width, count)`` returns a refiner for ``count`` classes, or for any number where
    ``count`` is None. ``initial`` is a state_dict to start from, for all classes of the guide.
    """

    def make(height: int, width: int, classes: np.ndarray | None) -> Any:
        refiner = new(height, width, None if classes is None else len(classes))
        if initial is not None:
            refiner.load_state_dict(parameters.select_classes(config, initial, classes))
        return refiner

    return make


def refine_with(
    make: Make,
    config: RefineOptions,
    image: np.ndarray,
    guide: np.ndarray | Guide | None = None,
    *,
    warm: bool = False,
    progress: Progress | None = None,
    gpu: bool = False,
) -> Refinement:
    """What :func:`refine` computes, with a refiner of the caller's.

    Parameters
    ----------
    make : ``make(height, width, classes)`` gives a Refiner, or an object that runs like one, for
        the guide's classes that take part; ``classes`` is None where all take part.
    image : (h, w, 3) float32 RGB in [0, 1]; the refiner checks it.
    guide : as for :meth:`Refiner.run`; a Guide is not checked again.
    warm, progress : as for :meth:`Refiner.run`.
    gpu : whether the refiner runs on a GPU, where both arrays may be, as the CUDA module's own.

    Raises
    ------
    InputError : a guide that is missing, has a wrong size, or is unknown everywhere.
    """
    height, width = image.shape[:2]
    if not parameters.objective_of(config).channels_follow_classes:
        return make(height, width, None).run(image, guide, warm=warm, progress=progress)
    if guide is None:
        raise InputError("guide is None; the residual objective corrects a prior, needs one")
    known = Guide.checked(guide, height, width, gpu=gpu).array
    classes = frequent_classes(known)
    wanted = Guide(restricted(known, classes))
    refiner = make(height, width, classes)
    if len(classes) == 1:  # one class is everywhere: no step can change a label
        result = refiner.run(image, wanted, steps=0, warm=warm)
        result.stats["stop_reason"] = "one class"
    else:
        result = refiner.run(image, wanted, warm=warm, progress=progress)
    return replace(result, classes=classes)
