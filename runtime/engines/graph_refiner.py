"""Refinement by the exported step graph, on any engine. The host runs the loop over the steps, as
runtime.Refiner does."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from runtime.checks import check_count, check_image
from runtime.core import parameters
from runtime.core.classes import majority_classes
from runtime.core.constants import MAPPING_STEPS
from runtime.core.options import RefineOptions
from runtime.core.reference import StopRules, largest_overlap
from runtime.core.refiner import Progress, Refinement, prepared, statistics
from runtime.device.choose import module_of
from runtime.errors import InputError

# The graphs do not depend on these options, which the host's loop implements.
_HOST = ("steps", "seed", "min_labels", "silhouette", "early_stop")


@dataclass
class _Run:
    """The results of a loop so far."""

    losses: list[np.ndarray] = field(default_factory=list)
    clusters: list[int] = field(default_factory=list)
    done: int = 0
    stop: str = "steps"
    made: int = 0  # steps that the engine ran, including those to undo
    excess: int = 0  # how many of the last steps have to be undone


class GraphRefiner:
    """A Refiner whose steps are runs of a step graph. Not safe for two threads at a time.

    Parameters
    ----------
    step_engine, map_engine : engines of the step and the map graph, with ``inputs``, ``outputs``,
        ``__call__`` and, for the step, ``loop(feed, state)``.
    options : the options that the graphs were exported with. steps, seed, min_labels, silhouette
        and early_stop may differ, as long as the graphs have the outputs that they need.
    height, width : size of the pictures in pixels.
    classes : channels of the response map. For the residual objective the number of guide classes
        (required), at most that of the engine if it is fixed. For the others ``channels``, which is
        also the default.

    Raises
    ------
    InputError : a size that the engines are not made for, other options, or a missing output.
    """

    def __init__(
        self,
        step_engine: Any,
        map_engine: Any,
        options: RefineOptions,
        *,
        height: int,
        width: int,
        classes: int | None = None,
    ) -> None:
        self.options, self._step, self._map = options, step_engine, map_engine
        self.height = check_count("height", height, 1, 2**20)
        self.width = check_count("width", width, 1, 2**20)
        for engine in (step_engine, map_engine):
            self._check_engine(engine)
        fixed = None
        for port in step_engine.inputs:
            if port.name == "guide" and _is_fixed(port.shape[1]):
                fixed = int(port.shape[1])
        self._planes = fixed  # number of the guide's channels if the engine fixes it, else None
        if parameters.objective_of(options).channels_follow_classes:
            if classes is None:
                raise InputError(
                    "classes is missing; residual needs the number of guide classes",
                    fix="pass classes=guide.shape[2]",
                )
            self.classes = check_count("classes", classes, 1, fixed or 4096)
            self._rows = fixed or self.classes  # channels of the response map in the engine
        else:
            self._rows = options.channels or 1
            self.classes = check_count("classes", classes or self._rows, self._rows, self._rows)
        self._outputs = {port.name for port in step_engine.outputs}
        needed = {"clusters"} if options.min_labels or options.silhouette else set()
        needed |= {"labels"} if options.early_stop else set()
        missing = needed - self._outputs
        if missing:
            raise InputError(
                f"the step graph does not return {', '.join(sorted(missing))}, which min_labels, "
                "silhouette or early_stop need",
                fix="export it with these options",
            )
        self._initial = parameters.initial_state(options, self.classes)
        self.load_state_dict(self._initial)

    def _check_engine(self, engine: Any) -> None:
        """InputError if an engine is for another size or, by its metadata, for other options."""
        for port in engine.inputs:
            if port.name != "image":
                continue
            for name, wanted, size in zip(
                ("height", "width"), port.shape[2:], (self.height, self.width), strict=True
            ):
                if _is_fixed(wanted) and wanted != size:
                    raise InputError(
                        f"{name} is {size}; the engine was built for {wanted}",
                        fix=f"use pictures of {name} {wanted}, or build the engine for {size}",
                    )
        known = getattr(engine, "metadata", {}).get("dg.options")
        if known is None:
            return
        theirs = json.loads(known)
        for name, ours in asdict(self.options).items():
            ours = list(ours) if isinstance(ours, tuple) else ours
            if name not in _HOST and theirs.get(name) != ours:
                raise InputError(
                    f"{name} is {ours!r}; the graph was exported with {theirs.get(name)!r}",
                    fix="use the graph's options, or export it again",
                )

    def state_dict(self) -> parameters.State:
        """The weights, batch-norm buffers and "momentum.NAME" arrays, float32, with PyTorch's names
        and shapes."""
        return parameters.unflatten(self.options, self.classes, *self._state)

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """The inverse of :meth:`state_dict`; momenta that are missing become zero.

        Raises
        ------
        InputError : a missing or unknown name, a wrong shape, or NaN.
        """
        self._state = parameters.flatten(self.options, self.classes, state)

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
        """Refine a picture; arguments and result are those of :meth:`runtime.Refiner.run`.

        There are three differences. A class whose residual guide is 0 everywhere takes no part: its
        score is 0. ``clusters_per_step`` is empty if the graph does not count the labels. And the
        dynaseg graph takes no guide.

        Parameters
        ----------
        image : (H, W, 3) float32 RGB in [0, 1].
        guide : (H, W, C) float32 probabilities, (H, W) int32 labels with -1 = unknown, or None.
        steps : instead of the options' number, 0 to 1,000,000.
        warm : start from the state of the last run, or from the state that was loaded; otherwise
            from the seed's.
        progress : called as progress(done, steps) after each step.
        deadline : a time of ``time.monotonic()`` in seconds; no step begins after it.

        Raises
        ------
        InputError : a wrong size, NaN, or a guide that the objective does not take.
        DeviceError : the engine failed.
        """
        image = check_image(image)
        if image.shape[:2] != (self.height, self.width):
            raise InputError(
                f"image is {image.shape[0]} x {image.shape[1]} pixels; "
                f"this GraphRefiner was made for {self.height} x {self.width}",
                fix="resize the picture, or make another GraphRefiner",
            )
        options = self.options
        steps = int(options.steps or 0) if steps is None else check_count("steps", steps, 0, 10**6)
        objective = parameters.objective_of(options)
        if guide is not None and not objective.takes_guide:
            raise InputError(
                "guide was given, but the dynaseg graph takes none", fix="leave the guide out"
            )
        guide, floor = prepared(options, image, guide, self.classes)
        if not warm:
            self.load_state_dict(self._initial)
        late = steps > 0 and deadline is not None and time.monotonic() >= deadline
        if late:
            steps = 0
        feed = {"image": _planar(image)}
        if objective.takes_guide:
            feed["guide"] = self._planar_guide(guide)
        if objective.maps_clusters:
            feed["assign"] = self._first_assignment(guide, feed["guide"].shape[1])
        run = self._loop(feed, guide, floor, steps, progress, deadline) if steps else _Run()
        scores, labels = self._final(feed)
        stats = statistics(
            options,
            steps=run.done,
            stop_reason="budget" if late else run.stop,
            clusters=len(np.unique(labels)),
            clusters_per_step=run.clusters,
            losses=np.array(run.losses, np.float64).reshape(-1, 4),
            label_floor=floor,
        )
        if objective.channels_follow_classes:
            classes = np.arange(self.classes, dtype=np.int32)
        else:
            classes = majority_classes(labels, guide, self.classes)
        return Refinement(scores, labels, classes, stats)

    def _loop(
        self,
        feed: dict[str, np.ndarray],
        guide: np.ndarray | None,
        label_floor: int,
        steps: int,
        progress: Progress | None,
        deadline: float | None,
    ) -> _Run:
        """Run steps until a rule stops the loop. The last state becomes the state of this
        object."""
        options, run = self.options, _Run()
        parameters, momenta, buffers, batches = self._state
        state = {
            "parameters": self._with_rows(parameters, self.classes, self._rows),
            "momenta": self._with_rows(momenta, self.classes, self._rows),
            "buffers": buffers,
        }
        loop = self._step.loop(feed, {k: (f"{k}_out", v) for k, v in state.items()})
        rules = StopRules(options, label_floor)
        try:
            for step in range(steps):
                solve = guide is not None and "overlap" in self._outputs
                out = loop.step()
                if solve and (batches + step < MAPPING_STEPS or step == 0):
                    assign = self._assignment(out["overlap"], guide, len(feed["assign"]))
                    if (assign != feed["assign"]).any():
                        feed["assign"] = assign
                        loop.undo()
                        out = loop.step(assign=assign)
                clusters = int(out["clusters"][0]) if "clusters" in out else 0
                run.made = step + 1
                if label_floor and clusters < label_floor and step:
                    run.stop, run.excess = "silhouette", 2
                    break
                run.losses.append(out["losses"])
                if "clusters" in out:
                    run.clusters.append(clusters)
                if not np.isfinite(out["losses"][0]):
                    run.stop, run.excess = "diverged", 2 if step else 1
                    break
                run.done = step + 1
                if progress is not None:
                    progress(run.done, steps)
                if run.done < steps and deadline is not None and time.monotonic() >= deadline:
                    run.stop = "budget"
                    break
                reason = rules.after(step, clusters, out.get("labels"), float(out["losses"][0]))
                if reason:
                    run.stop = reason
                    break
            if label_floor and not run.excess and self._count(loop) < label_floor:
                run.stop, run.excess = "silhouette", 1
        finally:  # also when progress raises or the user interrupts
            loop.undo(run.excess)
            left = loop.state()
            self._state = (
                self._with_rows(left["parameters"], self._rows, self.classes),
                self._with_rows(left["momenta"], self._rows, self.classes),
                left["buffers"],
                batches + run.made - run.excess,
            )
        return run

    def _count(self, loop: Any) -> int:
        """The number of labels of the current state. A step counts them, and is then undone."""
        clusters = int(loop.step()["clusters"][0])
        loop.undo()
        return clusters

    def _final(self, feed: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, K) scores and (H, W) labels of the current state."""
        parameters, _, buffers, _ = self._state
        parameters = self._with_rows(parameters, self.classes, self._rows)
        known = feed | {"parameters": parameters, "buffers": buffers}
        arrays = self._map(*(known[port.name] for port in self._map.inputs))
        out = dict(zip((port.name for port in self._map.outputs), arrays, strict=True))
        scores = out["scores"][0, : self.classes].transpose(1, 2, 0)
        return np.ascontiguousarray(scores), out["labels"][0].astype(np.int32)

    def _with_rows(self, vector: np.ndarray, have: int, rows: int) -> np.ndarray:
        """Parameters or momenta for ``have`` classes, cut or filled with zeros to ``rows`` classes.

        The two numbers differ only for the residual objective. The vector ends with the last layer:
        a weight with one row for each class, and a bias."""
        if have == rows:
            return vector
        channels = int(self.options.channels or 1)
        head = len(vector) - have * (channels + 1)
        weight = vector[head : head + have * channels].reshape(have, channels)
        least = min(have, rows)
        wide, bias = np.zeros((rows, channels), np.float32), np.zeros(rows, np.float32)
        wide[:least], bias[:least] = weight[:least], vector[head + have * channels :][:least]
        return np.concatenate([vector[:head], wide.ravel(), bias])

    def _planar_guide(self, guide: np.ndarray | None) -> np.ndarray:
        """(1, G, H, W): probabilities or one-hot labels, 0 in all channels of an unknown pixel.
        InputError if the guide has more classes than the engine."""
        shape = (self.height, self.width)
        if guide is None:
            return np.zeros((1, self._planes or 1, *shape), np.float32)
        if guide.ndim == 2:
            count = int(guide.max()) + 1
            soft = np.eye(count + 1, count, dtype=np.float32)[guide]  # row -1 is all zero
            if self.options.soft_guide:  # the graph divides by all pixels, also by unknown ones
                soft *= np.float32(guide.size / (guide >= 0).sum())
        else:
            soft = guide
        count = soft.shape[2]
        if self._planes is not None and count > self._planes:
            raise InputError(
                f"guide has {count} classes; the engine was built for {self._planes}",
                fix="build the engine for more classes",
            )
        out = np.zeros((1, self._planes or count, *shape), np.float32)
        out[0, :count] = soft.transpose(2, 0, 1)
        return out

    def _first_assignment(self, guide: np.ndarray | None, planes: int) -> np.ndarray:
        """The input ``assign`` of the first step: the rank of each class among those of the guide;
        zeros for the overlap mapping."""
        out = np.zeros(planes, np.int64)
        if guide is None or self.options.mapping == "overlap":
            return out
        present = np.arange(guide.shape[2]) if guide.ndim == 3 else np.unique(guide[guide >= 0])
        out[present] = np.arange(len(present))
        return out

    def _assignment(self, overlap: np.ndarray, guide: Any, planes: int) -> np.ndarray:
        """The cluster of each class, by the overlap mapping. The native core solves the assignment
        problem about a hundred times faster than the reference."""
        count = guide.shape[2] if guide.ndim == 3 else int(guide.max()) + 1
        solve = module_of("cpu").assign
        area = overlap[:count].astype(np.float64)
        out = np.zeros(planes, np.int64)
        out[:count] = largest_overlap(area, lambda cost: solve(np.ascontiguousarray(cost)))
        return out


def _is_fixed(dimension: Any) -> bool:
    """Whether a dimension of a port is a number."""
    return isinstance(dimension, int) and dimension > 0


def _planar(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (1, 3, H, W)."""
    return np.ascontiguousarray(image.transpose(2, 0, 1))[None]
