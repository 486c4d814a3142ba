"""Refinement of one picture: check the arguments, then run the native loop of the device."""

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

# The stop reasons, and the values of options, in the order of their numbers in
# runtime/csrc/network.h.
STOPS = ("steps", "min_labels", "silhouette", "converged", "diverged", "budget")
CODES: dict[str, tuple[str, ...]] = {
    "skip": ("none", "shared", "own"),
    "weighting": ("fixed", "fsf", "scf"),
    "mapping": ("overlap", "index_modulo"),
    "final_bn": ("none", "image", "running"),
}
Progress = Callable[[int, int], None]  # called as progress(steps done, all steps)
Make = Callable[[int, int, "np.ndarray | None"], Any]  # make(height, width, classes)


@dataclass(frozen=True)
class Refinement:
    """The result of a refinement.

    Attributes
    ----------
    scores : (H, W, K) float32 in [0, 1], the soft-max of the response map; each pixel sums to 1.
    labels : (H, W) int32, the arg max of the scores: the number of a column of ``scores``.
    classes : (K,) int32, the guide's class of each column, -1 for a cluster without a class.
    stats : "steps" (number computed), "stop_reason" ("steps", "min_labels", "silhouette",
        "converged", "diverged", "budget" or "one class"), "clusters" (number of labels in the last
        map), "clusters_per_step", "losses" (a list with a value per step for each of total, guide,
        and pair for residual, or similarity and spatial), "label_floor" (number of labels by the
        silhouette, 0 without it); on a GPU "device_ms", the time of the steps by CUDA events.

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
    classes : channels of the response map. For residual it is the number of the guide's classes,
        and required. For the other objectives it is the number of clusters, and None stands for the
        option ``channels``, the width of the network.
    device : "cpu", "cuda", "cuda:1".
    precision : "fp32"; or on a GPU of compute capability 7.5 or later "fp16": convolutions run on
        tensor cores, with inputs in half precision (10 bits of mantissa) and sums in float32.
    threads : most threads of the CPU; all processors when None. The result does not depend on it.
    isa : instruction set, a name of ``runtime.isas()``, for tests; "" = the one in use.
    options : see :class:`RefineOptions`.

    Raises
    ------
    InputError : an option or size out of range, or a precision that the device does not have.
    MissingBackend : the native module is not built, or there is no CUDA driver or GPU.
    DeviceError : no such GPU, not enough memory on it, or SEG_ISA is wrong.

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
            channels = self.options.channels if classes is None else classes
            self.classes = check_count("classes", channels, 1, 4096)
        core, threads = module_of(device), thread_count(threads)
        _check_isa(isa)
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
        """The memory of all maps of the native refiner, in bytes."""
        return self._native.arena_bytes()

    def state_dict(self) -> parameters.State:
        """Return weights, batch-norm buffers and counters, with PyTorch's names and shapes, and the
        momentum of each weight as "momentum.<name>"."""
        s = self._native.state()
        return parameters.unflatten(
            self.options, self.classes, s["parameters"], s["momenta"], s["buffers"], s["batches"]
        )

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Set all values that :meth:`state_dict` returns; momenta that are missing become zero.

        Raises
        ------
        InputError : a missing or unknown name, a wrong shape, NaN or infinity.
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
        """Refine one picture.

        Parameters
        ----------
        image : (H, W, 3) float32 RGB in [0, 1].
        guide : (H, W, C) float32 probabilities or (H, W) integer labels with -1 = unknown; only the
            size of a Guide is checked. None leaves out the guide loss, but residual needs a guide.
            On a GPU, image and guide may be arrays on that GPU.
        steps : most steps; None: the option ``steps``.
        warm : start from the present state: that after the last run, or the loaded one. Otherwise
            start from the weights of the option ``seed``.
        progress : called as progress(done, steps) after each step.
        deadline : no step begins after this time of time.monotonic(), in seconds.

        Returns
        -------
        A Refinement. On a GPU, its scores and labels are on the GPU if the image or the
        probabilities are, as arrays of the CUDA module.

        Raises
        ------
        InputError : a wrong size or dtype, NaN, or no guide for residual.
        UnknownGuide : every pixel of the guide is unknown.
        DeviceError : the GPU fails, or its memory is full.
        KeyboardInterrupt : Ctrl-C, between two steps.
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

        watched = progress is not None or deadline is not None

        def report(done: int) -> bool:
            """Call ``progress``; return whether the deadline ends the run before the last step."""
            if progress is not None:
                progress(done, asked)
            return done < asked and deadline is not None and time.monotonic() >= deadline

        late = asked > 0 and deadline is not None and time.monotonic() >= deadline
        scores, labels, losses, clusters, done, stop, last = self._native.run(
            image, native, floor, 0 if late else asked, report if watched else None, **more
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
    """Return ``Refinement.stats``; ``losses`` is (steps, 4)."""
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
    """Return image and guide. Arrays on the GPU ``device`` become arrays of the CUDA module; but
    labels are copied to the host, where their classes are counted."""
    if not isinstance(guide, Guide):
        guide = as_device_array("guide", guide, device)
        guide = guide.numpy() if on_gpu(guide) and guide.ndim == 2 and device != "cpu" else guide
    return as_device_array("image", image, device), guide


def _labels_for_gpu(options: RefineOptions, guide: Any) -> tuple[Any, dict[str, int]]:
    """Return the guide in the form that dynaguide and dynaseg take on a GPU, and further keywords
    for the native call: for labels the number of their classes."""
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
    """Return the guide as probabilities (H, W, classes), which residual needs."""
    if guide is None:
        raise InputError("guide is None; the residual objective corrects a guide and needs one")
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
    """Return the guide in the form that the objective takes, and the least number of labels.

    Parameters
    ----------
    guide : an array, a Guide or None.
    classes : the number of classes that residual needs.

    Returns
    -------
    (H, W, classes) probabilities, (H, W) int32 labels with -1 = unknown, or None. Probabilities on
    a GPU are not converted. And the number of labels by the silhouette, 0 without that option.

    Raises
    ------
    InputError : a guide of a wrong size, dtype or number of classes, NaN, or no guide for residual.
    UnknownGuide : every pixel of the guide is unknown.
    """
    resized = isinstance(guide, Guide)  # perhaps: its pixels may then sum to less than 1
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


def _check_isa(name: str) -> None:
    """Check an instruction set; "" is the default one, which SEG_ISA may name."""
    if name and name not in module_of("cpu").isas():
        usable = ", ".join(module_of("cpu").isas())
        raise InputError(f"isa is {name!r}; this machine runs {usable}")
    isa()  # raises if SEG_ISA is wrong


def check_precision(device: str, precision: str) -> dict[str, Any]:
    """Check a precision and return further keywords for a native Refiner: on a GPU its number, and
    whether to use tensor cores; none on the CPU.

    Raises
    ------
    InputError : another word, or a precision that this device does not have.
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
    """Return the options as a native Refiner takes them: words as the numbers of CODES."""
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

    With the residual objective only classes that hold more than 0.05 % of the picture take part
    (:func:`runtime.core.classes.frequent_classes`); ``classes`` of the result are these.

    Parameters
    ----------
    image, guide, progress : as for :meth:`Refiner.run`.
    device, precision, threads : as for :class:`Refiner`.
    initial : a state_dict to start from, which for residual has all classes of the guide; None: the
        weights of the option ``seed``.
    options : see :class:`RefineOptions`.

    Raises
    ------
    InputError, MissingBackend, DeviceError, KeyboardInterrupt : as for :class:`Refiner` and
        :meth:`Refiner.run`.

    Example
    -------
    >>> result = runtime.refine(image, guide, steps=10)
    """
    config = RefineOptions(**options)
    image, guide = _given(image, guide, device)
    gpu, warm = parse_device(device)[0] == "cuda", initial is not None
    image = check_image(image, gpu=gpu)
    where: dict[str, Any] = {"device": device, "precision": precision, "threads": threads}
    make = maker(
        lambda h, w, count: Refiner(h, w, classes=count, **where, **options), config, initial
    )
    return refine_with(make, config, image, guide, warm=warm, progress=progress, gpu=gpu)


def maker(
    new: Callable[[int, int, int | None], Any],
    config: RefineOptions,
    initial: Mapping[str, np.ndarray] | None = None,
) -> Make:
    """Return the argument ``make`` of :func:`refine_with`.

    Parameters
    ----------
    new : called as new(height, width, count), returns a refiner for ``count`` classes; ``count`` is
        None for objectives whose channels are clusters.
    initial : as for :func:`refine`.
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
    """Refine one picture as :func:`refine` does, with a refiner that the caller makes.

    Parameters
    ----------
    make : called as make(height, width, classes), returns a Refiner, or an object with the same
        ``run``. ``classes`` are the guide's classes that take part; None for objectives whose
        channels are clusters.
    image : (h, w, 3) float32 RGB in [0, 1]; the refiner checks it.
    guide, warm, progress : as for :meth:`Refiner.run`.
    gpu : whether the refiner runs on a GPU; then image and guide may be arrays of the CUDA module.

    Raises
    ------
    InputError : residual has no guide. Also what ``make`` and the refiner's ``run`` raise.
    UnknownGuide : every pixel of the guide is unknown.
    """
    height, width = image.shape[:2]
    if not parameters.objective_of(config).channels_follow_classes:
        return make(height, width, None).run(image, guide, warm=warm, progress=progress)
    if guide is None:
        raise InputError("guide is None; the residual objective corrects a guide and needs one")
    known = Guide.checked(guide, height, width, gpu=gpu).array
    classes = frequent_classes(known)
    wanted = Guide(restricted(known, classes))
    refiner = make(height, width, classes)
    if len(classes) == 1:  # no step can change a label
        result = refiner.run(image, wanted, steps=0, warm=warm)
        result.stats["stop_reason"] = "one class"
    else:
        result = refiner.run(image, wanted, warm=warm, progress=progress)
    return replace(result, classes=classes)
