"""Streams: each frame's refinement starts where the last one's ended.

The rules, in the order in which a frame meets them (docs/streams.md has what was measured):

1. Cut: where the colours' histogram and the prior both change at once, the stream starts cold.
2. Size: a frame of another size starts the stream anew.
3. Permanence: a prior without names has its classes renumbered to overlap the last labels most.
4. Growth: a class that the prior brings gets a channel; the others keep what they learned.
5. Budget: as many steps as fit; cold steps that did not fit are owed to the next frames.
6. Kept: pixels of a class that the prior is sure of, and that the refinement lost, are the prior's.
7. Decay: where the refined map contradicts a sure prior for long, the correction is halved.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import runtime
from runtime import network
from runtime.bundle import load_tensors
from runtime.checks import check_count, check_positive
from runtime.errors import BundleError, InputError
from runtime.ops import frequent_classes, match_classes, restricted
from sdk.capture import Capture, Frame
from sdk.image import write_atomic
from sdk.result import FrameInfo, Result
from sdk.segmenter import Clock

if TYPE_CHECKING:
    from sdk.segmenter import Segmenter

CUT_COLOURS, CUT_GUIDE = 0.35, 0.35  # distance of histograms, share of changed prior labels
SURE = 0.9  # probability from which the prior counts as confident
LOST = 0.002  # share of the picture that a class must hold to be missed
DOUBT, PATIENCE = 0.2, 15  # share of sure pixels contradicted; frames in a row before the decay
SMOOTH = 0.3  # weight of the newest measured time
_ARRAYS = ("classes", "labels", "guide", "colours")
_HEAD = ("conv3.weight", "conv3.bias", "momentum.conv3.weight", "momentum.conv3.bias")


@dataclass
class StreamState:
    """What a stream remembers between frames; give it to :meth:`Segmenter.stream`, save it, go on
    later. All arrays are at working size (h, w).

    Parameters
    ----------
    frames : frames segmented so far.
    classes : (K,) int32, the prior's classes that have a channel; for objectives without a fixed
        meaning of channels, the channels.
    weights : the network's state_dict with its momenta, or None before the first frame.
    labels : (h, w) int32, the last refined labels.
    guide : (h, w) int32, the prior's last labels, -1 = unknown.
    colours : (512,) float32, the last picture's histogram of 8 x 8 x 8 colours.
    owed : cold steps that the budget left undone.
    doubt : frames in a row in which a sure prior was contradicted.
    """

    frames: int = 0
    classes: np.ndarray | None = None
    weights: network.State | None = None
    labels: np.ndarray | None = None
    guide: np.ndarray | None = None
    colours: np.ndarray | None = None
    owed: int = 0
    doubt: int = 0

    def reset(self) -> None:
        """Forget everything: the next frame starts cold."""
        for f in fields(self):
            setattr(self, f.name, f.default)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.numpy import save

        arrays = {f"weights.{k}": v for k, v in (self.weights or {}).items()}
        for name in _ARRAYS:
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        arrays = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
        counts = np.array([self.frames, self.owed, self.doubt], np.int64)
        write_atomic(path, save(arrays | {"counts": counts}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StreamState:
        """Read what :meth:`save` wrote.

        Raises
        ------
        InputError : no such file.
        BundleError : not a stream's state.
        """
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        arrays = load_tensors(data, str(path))
        weights = {
            k.removeprefix("weights."): arrays.pop(k)
            for k in list(arrays)
            if k.startswith("weights.")
        }
        counts = arrays.pop("counts", np.zeros(0))
        state = cls(weights=weights or None, **{k: v for k, v in arrays.items() if k in _ARRAYS})
        if counts.shape == (3,) and counts.dtype == np.int64 and (counts >= 0).all():
            state.frames, state.owed, state.doubt = counts.tolist()
            if set(arrays) <= set(_ARRAYS) and state._holds_together():
                return state
        raise BundleError(f"{path} is no stream's state", fix="start without it, and save it again")

    def _holds_together(self) -> bool:
        """Whether the arrays have the forms that the stream gives them."""
        arrays = [getattr(self, name) for name in _ARRAYS]
        if all(a is None for a in arrays):
            return self.weights is None
        if any(a is None for a in arrays):
            return False
        classes, labels, guide, colours = arrays
        integer = all(a.dtype == np.int32 for a in (classes, labels, guide))
        forms = classes.ndim == 1 and labels.ndim == 2 and guide.shape == labels.shape
        if not (integer and forms and classes.size and labels.size):
            return False
        distinct = len(np.unique(classes)) == len(classes) and classes.min() >= 0
        histogram = colours.shape == (512,) and colours.dtype == np.float32
        return bool(distinct and histogram and np.isfinite(colours).all() and colours.min() >= 0)


def colours_of(low: np.ndarray) -> np.ndarray:
    """(512,) float32, shares of 8 x 8 x 8 colours of a (h, w, 3) float32 picture in [0, 1]."""
    bins = np.minimum((low * 8).astype(np.int32), 7)
    flat = (bins[..., 0] * 64 + bins[..., 1] * 8 + bins[..., 2]).ravel()
    return (np.bincount(flat, minlength=512) / flat.size).astype(np.float32)


def colour_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Hellinger's distance of two histograms, in [0, 1]."""
    return float(np.sqrt(max(0.0, 1.0 - np.sqrt(a * b).sum(dtype=np.float64))))


def segment_stream(
    segmenter: Segmenter,
    capture: Capture,
    state: StreamState,
    *,
    warm_steps: int,
    cold_steps: int,
    budget_ms: float | None,
) -> Generator[Result, None, None]:
    """The results of a stream, one by one; closing the generator releases the source."""
    follower = Follower(segmenter, state, warm_steps, cold_steps, budget_ms)
    with capture:
        for frame in capture:
            yield follower(frame, capture.dropped)


class Follower:
    """Segments the frames of one stream in their order. Arguments: see Segmenter.stream."""

    def __init__(
        self,
        segmenter: Segmenter,
        state: StreamState,
        warm_steps: int = 2,
        cold_steps: int = 10,
        budget_ms: float | None = None,
    ) -> None:
        self.segmenter, self.state = segmenter, state
        self.warm_steps = check_count("warm_steps", warm_steps, 0, 10**6)
        self.cold_steps = check_count("cold_steps", cold_steps, 0, 10**6)
        self.budget_ms = None if budget_ms is None else check_positive("budget_ms", budget_ms)
        self._refiner: tuple[tuple[Any, ...], Any] | None = None
        self._step_ms: float | None = None  # measured
        self._rest_ms = 0.0  # filter and postprocessing

    def __call__(self, frame: Frame, dropped: int = 0) -> Result:
        """Segment the next frame."""
        seg, state, started = self.segmenter, self.state, time.monotonic()
        clock, events = Clock(), list(frame.notes)
        low, guide = seg.observe(frame.picture, clock)
        if state.labels is not None and state.labels.shape != low.shape[:2]:
            (h, w), (was_h, was_w) = low.shape[:2], state.labels.shape
            events.append(f"size: {was_h}x{was_w} became {h}x{w} (working size); cold start")
            self._forget()
        colours = colours_of(low)
        if seg.prior.names is None and state.labels is not None and state.classes is not None:
            if seg.refine is None or seg.refine.objective == "residual":
                guide = match_classes(guide, state.labels, state.classes)
        hard = guide if guide.ndim == 2 else hard_labels(guide)
        if state.guide is not None and state.colours is not None:
            changed = float((hard != state.guide).mean())
            distance = colour_distance(colours, state.colours)
            if changed > CUT_GUIDE and distance > CUT_COLOURS:
                events.append(
                    f"cut: colours moved by {distance:.2f}, {changed:.0%} of the prior's labels "
                    "changed; cold start"
                )
                self._forget()
        start = "cold" if state.weights is None else "warm"
        if start == "cold":
            state.owed = self.cold_steps
        scores, classes, stats = self._refine(low, guide, hard, started, events)
        state.frames += 1
        state.guide, state.colours = hard, colours
        state.labels = classes[scores.argmax(-1)]
        clock.lap("refine")
        before_rest = time.monotonic()
        info = FrameInfo(frame.index, frame.time, dropped, start, events)
        result = seg.finish(frame.picture, low, scores, classes, stats, [], clock, info)
        rest = 1e3 * (time.monotonic() - before_rest)
        self._rest_ms = _smoothed(self._rest_ms or None, rest)
        return result

    def _forget(self) -> None:
        frames = self.state.frames
        self.state.reset()
        self.state.frames = frames

    def _refine(
        self,
        low: np.ndarray,
        guide: np.ndarray,
        hard: np.ndarray,
        started: float,
        events: list[str],
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Scores at working size, the class of each column, and stats."""
        seg, state = self.segmenter, self.state
        config = seg.refine
        if config is None:
            soft = restricted(guide, np.arange(max(int(hard.max()) + 1, 1), dtype=np.int32))
            found = np.flatnonzero(soft.any((0, 1))).astype(np.int32)
            state.classes = found
            return soft[..., found], found, {"steps": 0, "stop_reason": "no refinement"}
        residual = config.objective == "residual"
        refiner = self._prepared_refiner(low.shape[:2], guide, events)
        wanted: np.ndarray | None = guide
        if residual:
            assert state.classes is not None  # _prepared_refiner sets them
            wanted = restricted(guide, state.classes)
        elif config.objective == "dynaseg":
            wanted = None
        asked = max(state.owed, self.warm_steps)
        if residual and len(state.classes) == 1:
            asked = 0  # nothing to decide
        steps, deadline = asked, None
        if self.budget_ms is not None:
            final = (self._step_ms or 0.0) / 3  # the forward pass after the last step
            deadline = started + (self.budget_ms - self._rest_ms - final) / 1e3
            left = 1e3 * (deadline - time.monotonic())
            if self._step_ms:
                steps = min(asked, max(0, int(left / self._step_ms)))
        before = time.monotonic()
        result = refiner.run(low, wanted, steps=steps, warm=True, deadline=deadline)
        spent, done = 1e3 * (time.monotonic() - before), result.stats["steps"]
        if done:
            self._step_ms = _smoothed(self._step_ms, spent / (done + 1 / 3))
        if steps < asked and result.stats["stop_reason"] == "steps":
            result.stats["stop_reason"] = "budget"
        late = result.stats["stop_reason"] == "budget"
        state.owed = max(0, state.owed - done) if late else 0
        state.weights = refiner.state_dict()
        if result.stats["stop_reason"] == "diverged":
            state.weights = None
            events.append("diverged: cold start with the next frame")
        if not residual:
            classes = np.arange(result.scores.shape[2], dtype=np.int32)
            state.classes = classes
            if seg.prior.names is not None:
                classes = runtime.majority_classes(result.labels, guide, len(classes))
            return result.scores, classes, result.stats
        scores = self._keep_and_decay(result.scores, wanted, hard, events)
        return scores, state.classes, result.stats

    def _prepared_refiner(self, size: tuple[int, int], guide: np.ndarray, events: list[str]) -> Any:
        """A refiner of this size and these classes, with the state's weights in it."""
        seg, state = self.segmenter, self.state
        config = seg.refine
        assert config is not None
        classes = None
        if config.objective == "residual":
            classes = frequent_classes(guide)
            if state.classes is not None and state.weights is not None:
                new = np.setdiff1d(classes, state.classes)
                if len(new):
                    events.append(f"new class: {', '.join(map(self._name, new))}")
                classes = np.concatenate([state.classes, new]).astype(np.int32)
        key = (size, None if classes is None else tuple(classes))
        if self._refiner is None or self._refiner[0] != key:
            self._refiner = None  # its memory first
            refiner = seg.make_refiner(*size, classes)
            self._refiner = (key, refiner)
            self._fresh = refiner.state_dict()
        refiner = self._refiner[1]
        weights = self._fresh
        if state.weights is not None:
            weights = dict(state.weights)
            if classes is not None and state.classes is not None:
                for name in _HEAD:  # the classes so far come first
                    weights[name] = np.concatenate(
                        [weights[name], self._fresh[name][len(state.classes) :]]
                    )
        refiner.load_state_dict(weights)
        if classes is not None:
            state.classes = classes
        return refiner

    def _keep_and_decay(
        self, scores: np.ndarray, guide: np.ndarray, hard: np.ndarray, events: list[str]
    ) -> np.ndarray:
        """Rules 6 and 7."""
        state = self.state
        assert state.classes is not None
        sure = guide.max(-1) >= SURE
        labels = state.classes[scores.argmax(-1)]
        for number in state.classes:
            mine = sure & (hard == number)
            if mine.sum() > LOST * mine.size and not (labels == number).any():
                scores[mine] = guide[mine]
                events.append(f"kept: {self._name(number)}, which the refinement had lost")
        against = sure.any() and (labels != hard)[sure].mean() > DOUBT
        state.doubt = state.doubt + 1 if against else 0
        if state.doubt > PATIENCE and state.weights is not None:
            events.append(f"decay: the prior has been contradicted for {state.doubt} frames")
            for name in _HEAD:
                state.weights[name] = state.weights[name] * np.float32(0.5)
        return scores

    def _name(self, number: int) -> str:
        names = self.segmenter.prior.names
        return names[number] if names else f"class {number}"


def hard_labels(guide: np.ndarray) -> np.ndarray:
    """(h, w) int32: the likeliest class, -1 where the guide knows none."""
    return np.where(guide.any(-1), guide.argmax(-1), -1).astype(np.int32)


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else (1 - SMOOTH) * old + SMOOTH * new
