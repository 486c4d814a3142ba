"""Streams: each frame's refinement starts where the last one's ended.

The rules, in the order in which a frame meets them (docs/streams.md has what was measured):

1. Size: a frame of another size starts the stream anew.
2. Permanence: a prior without names has its classes renumbered to overlap the last labels most.
3. Cut: where the colours' histogram and the prior both change at once, the stream starts cold.
4. Growth: a class that the prior brings gets a channel; the others keep what they learned.
5. Budget: as many steps as fit; cold steps that did not fit are owed to the next frames.
6. Kept: pixels of a class that the prior is sure of, and that the refinement lost, are the prior's.
7. Decay: where the refined map contradicts a sure prior for long, the correction is halved.
"""

from __future__ import annotations

import json
import os
import threading
import time
import warnings
import weakref
from collections.abc import Generator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import runtime
from runtime.bundle.read import load_tensors
from runtime.checks import UnknownGuide, check_count, check_positive, on_gpu
from runtime.core import classes_cuda, parameters
from runtime.core.classes import frequent_classes, match_classes, restricted
from runtime.errors import BundleError, InputError
from sdk.capture import Capture, Frame
from sdk.image import write_atomic
from sdk.result import FrameInfo, Result
from sdk.segmenter import Clock, prior_scores

if TYPE_CHECKING:
    from sdk.segmenter import Segmenter

MOST_STEPS = 10**6
CUT_COLOURS, CUT_AGREEMENT = 0.4, 0.3  # a cut: histograms further apart, prior agrees less
CHANNELS = 64  # at most; of more classes, those that have been away longest lose theirs
SURE = 0.9  # probability from which the prior counts as confident
LOST = 0.002  # share of the picture that a class must hold to be missed
LEFT = 0.05  # of its pixels, what must be left of a class
DOUBT, PATIENCE = 0.2, 15  # share of sure pixels contradicted; frames in a row before the decay
SMOOTH = 0.3  # weight of the newest measured time
FIRST = 0.5  # of the budget is for the refinement, until the rest has been measured
_ARRAYS = ("classes", "seen", "labels", "guide", "colours")
_followed: weakref.WeakSet[StreamState] = weakref.WeakSet()  # states that a stream goes on from
_guard = threading.Lock()
_HEAD = ("conv3.weight", "conv3.bias", "momentum.conv3.weight", "momentum.conv3.bias")


@dataclass(eq=False)
class StreamState:
    """What a stream remembers between frames; give it to :meth:`Segmenter.stream`, save it, go on
    later. It changes when a frame is done, so that an interrupted one leaves it as it was. Maps are
    at working size (h, w).

    Parameters
    ----------
    frames : frames segmented so far.
    owed : cold steps that the budget left undone.
    doubt : frames in a row in which a sure prior was contradicted.
    names : the prior's class names, which a state is bound to.
    weights : the network's state_dict with its momenta, or None before the first frame.
    classes : (K,) int32, the prior's classes that have a channel; for objectives whose channels
        have no fixed meaning, the channels.
    seen : (K,) int64, the frame in which the prior last had each of them.
    labels : (h, w) int32, the last refined labels.
    guide : (h, w) int32, the prior's last labels, -1 = unknown.
    colours : (512,) float32, the last picture's histogram of 8 x 8 x 8 colours.
    """

    frames: int = 0
    owed: int = 0
    doubt: int = 0
    names: list[str] | None = None
    weights: parameters.State | None = None
    classes: np.ndarray | None = None
    seen: np.ndarray | None = None
    labels: np.ndarray | None = None
    guide: np.ndarray | None = None
    colours: np.ndarray | None = None

    def reset(self) -> None:
        """Forget everything: the next frame starts cold."""
        for f in fields(self):
            setattr(self, f.name, f.default)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.numpy import save

        arrays = {f"weights.{k}": v for k, v in (self.weights or {}).items()}
        arrays |= {k: v for k in _ARRAYS if (v := getattr(self, k)) is not None}
        arrays["counts"] = np.array([self.frames, self.owed, self.doubt], np.int64)
        arrays["names"] = np.frombuffer(json.dumps(self.names).encode(), np.uint8)
        write_atomic(path, save({k: np.asarray(v, order="C") for k, v in arrays.items()}))

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
        fix = "start without it, save it again"
        try:
            arrays = load_tensors(data, str(path))
        except BundleError as error:
            raise BundleError(f"{path} is no stream's state", fix=fix) from error
        prefix, state = "weights.", cls()
        weights = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        state.weights = weights or None
        for name in _ARRAYS:
            setattr(state, name, arrays.get(name))
        try:
            counts = arrays["counts"]
            state.frames, state.owed, state.doubt = (int(n) for n in counts)
            state.names = json.loads(arrays["names"].tobytes())
        except (KeyError, ValueError, TypeError):
            counts = np.full(1, -1)
        rest = {k for k in arrays if not k.startswith(prefix)} - {*_ARRAYS, "counts", "names"}
        wrong = counts.dtype != np.int64 or counts.min() < 0 or state.owed > MOST_STEPS
        if rest or wrong or not state._holds_together():
            raise BundleError(f"{path} is no stream's state", fix=fix)
        return state

    def _holds_together(self) -> bool:
        """Whether the arrays have the forms that the stream gives them."""
        arrays = [getattr(self, name) for name in _ARRAYS]
        names = self.names
        if names is not None and not (
            isinstance(names, list) and all(isinstance(n, str) for n in names)
        ):
            return False
        if all(a is None for a in arrays):
            return self.weights is None
        if any(a is None for a in arrays):
            return False
        classes, seen, labels, guide, colours = arrays
        types = [(classes, "i4"), (seen, "i8"), (labels, "i4"), (guide, "i4"), (colours, "f4")]
        if any(a.dtype != t for a, t in types) or classes.ndim != 1 or labels.ndim != 2:
            return False
        if not (classes.size and labels.size and seen.shape == classes.shape):
            return False
        if guide.shape != labels.shape or colours.shape != (512,) or classes.min() < 0:
            return False
        if guide.min() < -1 or labels.min() < -1:
            return False
        weights = self.weights or {}
        known = not weights or set(_HEAD) <= set(weights)
        finite = all(np.isfinite(a).all() for a in (colours, *weights.values()))
        return known and finite and colours.min() >= 0 and len(np.unique(classes)) == len(classes)


def colours_of(low: Any) -> np.ndarray:
    """(512,) float32, shares of 8 x 8 x 8 colours of a (h, w, 3) float32 picture in [0, 1], also of
    one on a GPU."""
    if on_gpu(low):
        return (classes_cuda.colour_counts(low) / (low.shape[0] * low.shape[1])).astype(np.float32)
    bins = np.minimum((low * 8).astype(np.int32), 7)
    flat = (bins[..., 0] * 64 + bins[..., 1] * 8 + bins[..., 2]).ravel()
    return (np.bincount(flat, minlength=512) / flat.size).astype(np.float32)


def colour_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Hellinger's distance of two histograms, in [0, 1]."""
    return float(np.sqrt(max(0.0, 1.0 - np.sqrt(a * b).sum(dtype=np.float64))))


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Cohen's kappa of two label maps (-1 = unknown is a label, too): 1 equal, 0 as by chance."""
    count = int(max(a.max(), b.max())) + 2
    of_a, of_b = (np.bincount(m.ravel() + 1, minlength=count) / m.size for m in (a, b))
    chance = float(of_a @ of_b)
    return 1.0 if chance >= 1 else (float((a == b).mean()) - chance) / (1 - chance)


def segment_stream(
    segmenter: Segmenter,
    capture: Capture,
    state: StreamState,
    *,
    warm_steps: int,
    cold_steps: int,
    budget_ms: float | None,
) -> Generator[Result, None, None]:
    """The results of a stream, one by one; closing the generator releases the source. What is wrong
    after the last frame is a Python warning."""
    follower = Follower(segmenter, state, warm_steps, cold_steps, budget_ms)
    with _guard:
        if state in _followed:
            raise InputError("the state is in use by another stream", fix="give each its own")
        _followed.add(state)
    try:
        yield from _results(follower, capture)
    finally:
        with _guard:
            _followed.discard(state)


def _results(follower: Follower, capture: Capture) -> Generator[Result, None, None]:
    with capture:
        for frame in capture:
            yield follower(frame, capture.dropped)
        for note in capture.notes:
            warnings.warn(note, stacklevel=2)


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
        self.warm_steps = check_count("warm_steps", warm_steps, 0, MOST_STEPS)
        self.cold_steps = check_count("cold_steps", cold_steps, 0, MOST_STEPS)
        self.budget_ms = None if budget_ms is None else check_positive("budget_ms", budget_ms)
        self._refiner: tuple[Any, Any, parameters.State] | None = None  # key, refiner, cold weights
        self._told = False  # that the budget is too small
        self._step_ms: float | None = None  # measured
        self._rest_ms: float | None = None  # filter and postprocessing
        names = segmenter.prior.names
        if state.labels is not None and state.names != names:
            raise InputError(
                f"the state is of a prior with classes {state.names}, this one has {names}",
                fix="use the same prior, or state.reset()",
            )

    def __call__(self, frame: Frame, dropped: int = 0) -> Result:
        """Segment the next frame."""
        seg, started = self.segmenter, time.monotonic()
        state = replace(self.state, names=seg.prior.names)
        clock, events = Clock(), list(frame.notes)
        there, low = seg.prepare(frame.picture, clock)
        if state.labels is not None and state.labels.shape != low.shape[:2]:
            (h, w), (was_h, was_w) = low.shape[:2], state.labels.shape
            events.append(f"size: {was_h}x{was_w} became {h}x{w} (working size); cold start")
            _forget(state)
        try:
            guide = seg.guide(frame.picture, there, low, clock)
        except UnknownGuide:
            if state.guide is None or state.guide.max() < 0:
                raise
            guide = state.guide
            events.append("prior: it knows nothing of this frame; its last labels are used")
        config = seg.refine
        if seg.prior.names is None and (config is None or config.objective == "residual"):
            if state.labels is not None and state.classes is not None:
                known = [m for m in (state.labels, state.guide) if m is not None]
                guide = match_classes(np.asarray(guide), known, state.classes)
        hard, sure = hard_labels(guide)
        colours = colours_of(low)
        if state.guide is not None and state.colours is not None:
            agrees = agreement(hard, state.guide)
            distance = colour_distance(colours, state.colours)
            if agrees < CUT_AGREEMENT and distance > CUT_COLOURS:
                events.append(
                    f"cut: colours moved by {distance:.2f}, the prior agrees with its last labels "
                    f"by {agrees:.2f}; cold start"
                )
                _forget(state)
        start = "cold" if state.labels is None else "warm"
        if start == "cold":
            state.owed = self.cold_steps
        if config is None:
            scores, classes, stats = self._unrefined(state, guide, hard)
        elif config.objective == "residual":
            scores, classes, stats = self._residual(
                state, low, guide, (hard, sure), started, events
            )
        else:
            scores, classes, stats = self._clusters(state, low, guide, started, events)
        state.frames += 1
        state.guide, state.colours = hard, colours
        clock.lap("refine")
        middle = time.monotonic()
        info = FrameInfo(frame.index, frame.time, dropped, start, events)
        result = seg.finish(frame.picture, there, low, scores, classes, stats, [], clock, info)
        self._rest_ms = _smoothed(self._rest_ms, 1e3 * (time.monotonic() - middle))
        vars(self.state).update(vars(state))
        return result

    def _unrefined(
        self, state: StreamState, guide: Any, hard: np.ndarray
    ) -> tuple[Any, np.ndarray, dict[str, Any]]:
        """The prior itself."""
        scores, found = prior_scores(guide)
        old = found if state.classes is None else state.classes
        state.classes = np.union1d(old, found).astype(np.int32)
        state.seen = np.full(len(state.classes), state.frames, np.int64)
        state.labels = np.maximum(hard, 0)
        return scores, found, {"steps": 0, "stop_reason": "no refinement"}

    def _residual(
        self,
        state: StreamState,
        low: Any,
        guide: Any,
        prior: tuple[np.ndarray, np.ndarray],
        started: float,
        events: list[str],
    ) -> tuple[Any, np.ndarray, dict[str, Any]]:
        """Scores at working size, the class of each column, and stats."""
        before = None if state.weights is None else state.classes
        refiner = self._grown(state, low.shape[:2], frequent_classes(guide), events)
        assert state.classes is not None
        seen = np.setdiff1d(state.classes, state.classes if before is None else before)
        seen = seen[np.isin(seen, prior[0])]  # a little probability everywhere is no news
        if len(seen):
            events.append(f"new class: {', '.join(map(self._name, seen))}")
        wanted = restricted(guide, state.classes)
        if len(state.classes) == 1:  # nothing to decide
            result = refiner.run(low, wanted, steps=0, warm=True)
            state.labels = state.classes[np.asarray(result.labels)]
            return result.scores, state.classes, result.stats | {"stop_reason": "one class"}
        result = self._run(state, refiner, low, wanted, started, events)
        scores = result.scores
        if result.stats["stop_reason"] == "diverged" or not _finite(scores):
            events.append("diverged: this frame is the prior's, the next one starts cold")
            result.stats["stop_reason"] = "diverged"
            state.weights, state.owed = None, self.cold_steps
            state.labels = state.classes[np.maximum(hard_labels(wanted)[0], 0)]
            return wanted, state.classes, result.stats
        state.weights = refiner.state_dict()
        state.labels = state.classes[np.asarray(result.labels)]
        scores = self._keep_and_decay(state, scores, wanted, *prior, events)
        return scores, state.classes, result.stats

    def _clusters(
        self,
        state: StreamState,
        low: Any,
        guide: Any,
        started: float,
        events: list[str],
    ) -> tuple[Any, np.ndarray, dict[str, Any]]:
        """The same for objectives whose channels find a meaning of their own."""
        config = self.segmenter.refine
        assert config is not None
        refiner = self._grown(state, low.shape[:2], None, events)
        wanted = None if config.objective == "dynaseg" else guide
        result = self._run(state, refiner, low, wanted, started, events)
        classes = np.arange(result.scores.shape[2], dtype=np.int32)
        state.classes, state.seen = classes, np.full(len(classes), state.frames, np.int64)
        state.weights = refiner.state_dict()
        if result.stats["stop_reason"] == "diverged":
            state.weights, state.owed = None, self.cold_steps
            events.append("diverged: the next frame starts cold")
        if self.segmenter.prior.names is not None:
            classes = runtime.majority_classes(result.labels, guide, len(classes))
        state.labels = classes[np.asarray(result.labels)]
        return result.scores, classes, result.stats

    def _run(
        self,
        state: StreamState,
        refiner: Any,
        low: Any,
        guide: Any,
        started: float,
        events: list[str],
    ) -> runtime.Refinement:
        """As many steps as are asked for and fit the budget."""
        asked = max(state.owed, self.warm_steps)
        steps, deadline = asked, None
        if self.budget_ms is not None:
            rest = (1 - FIRST) * self.budget_ms if self._rest_ms is None else self._rest_ms
            final = (self._step_ms or 0.0) / 3  # the forward pass after the last step
            deadline = started + (self.budget_ms - rest - final) / 1e3
            left = 1e3 * (deadline - time.monotonic())
            if self._step_ms is not None and left > 0:
                steps = min(asked, max(1, int(left / self._step_ms)))
        before = time.monotonic()
        result: runtime.Refinement = refiner.run(
            low, guide, steps=steps, warm=True, deadline=deadline
        )
        spent, done, stats = 1e3 * (time.monotonic() - before), result.stats["steps"], result.stats
        if done:
            self._step_ms = _smoothed(self._step_ms, spent / (done + 1 / 3))
        if done == 0 and asked and self.budget_ms is not None and not self._told:
            self._told = True
            events.append(
                f"budget: no step fits {self.budget_ms:g} ms, the prior and the filter take it all"
            )
        if steps < asked and stats["stop_reason"] == "steps":
            stats["stop_reason"] = "budget"
        state.owed = max(0, state.owed - done) if stats["stop_reason"] == "budget" else 0
        return result

    def _grown(
        self,
        state: StreamState,
        size: tuple[int, int],
        found: np.ndarray | None,
        events: list[str],
    ) -> Any:
        """A refiner of this size with the state's weights in it. ``found``: the prior's classes in
        this frame, for which the state gets channels; None where channels are fixed."""
        classes, rows = None, None
        if found is not None:
            classes = found
            if state.classes is not None and state.seen is not None and state.weights is not None:
                new = np.setdiff1d(found, state.classes)
                here = np.isin(state.classes, found)
                state.seen = np.where(here, state.frames, state.seen)
                most = self.segmenter.most_classes() or max(CHANNELS, len(found))
                spare = max(0, len(state.classes) + len(new) - most)
                rows = np.sort(np.argsort(-state.seen, kind="stable")[: len(state.seen) - spare])
                for number in np.delete(state.classes, rows):
                    events.append(f"class given up: {self._name(number)}, away for long")
                classes = np.concatenate([state.classes[rows], new])
                seen = np.concatenate([state.seen[rows], np.full(len(new), state.frames)])
            else:
                seen = np.full(len(found), state.frames)
            state.seen, classes = seen.astype(np.int64), classes.astype(np.int32)
        key = (size, None if classes is None else tuple(classes.tolist()))
        if self._refiner is None or self._refiner[0] != key:
            self._refiner = None  # its memory first
            refiner = self.segmenter.make_refiner(*size, classes)
            self._refiner, self._step_ms = (key, refiner, refiner.state_dict()), None
        _, refiner, cold = self._refiner
        weights = cold
        if state.weights is not None:
            weights = dict(state.weights)
            _check_network(weights, cold)
            if rows is not None:
                for name in _HEAD:  # the classes so far come first
                    old = weights[name][rows]
                    weights[name] = np.concatenate([old, cold[name][len(old) :]])
        refiner.load_state_dict(weights)
        if classes is not None:
            state.classes = classes
        return refiner

    def _keep_and_decay(
        self,
        state: StreamState,
        scores: Any,
        guide: Any,
        hard: np.ndarray,
        sure: np.ndarray,
        events: list[str],
    ) -> Any:
        """Rules 6 and 7, in place; the scores."""
        assert state.classes is not None and state.labels is not None
        count = int(max(hard.max(), state.classes.max())) + 1
        right = sure & (state.labels == hard)
        held, left = (np.bincount(hard[m], minlength=count)[state.classes] for m in (sure, right))
        for number in state.classes[(held > LOST * hard.size) & (left < LEFT * held)]:
            mine = sure & (hard == number)
            if on_gpu(scores):
                scores = classes_cuda.keep(scores, guide, mine)
            else:
                scores[mine] = guide[mine]
            state.labels[mine] = number
            events.append(f"kept: {self._name(number)}, which the refinement had lost")
        against = held.sum() > LOST * hard.size and left.sum() < (1 - DOUBT) * held.sum()
        state.doubt = state.doubt + 1 if against else 0
        if state.doubt > PATIENCE and state.weights is not None:
            events.append(f"decay: the prior has been contradicted for {state.doubt} frames")
            for name in _HEAD:
                state.weights[name] = state.weights[name] * np.float32(0.5)
        return scores

    def _name(self, number: int) -> str:
        names = self.segmenter.prior.names
        return names[number] if names and number < len(names) else f"class {number}"


def hard_labels(guide: Any) -> tuple[np.ndarray, np.ndarray]:
    """(h, w) int32: the likeliest class, -1 where the guide knows none; (h, w) bool: where the
    guide is sure of it."""
    if on_gpu(guide):
        labels, share = classes_cuda.hard(guide)
        return labels.numpy(), share.numpy() >= SURE
    if guide.ndim == 2:
        return guide, guide >= 0
    best = guide.argmax(-1)
    share = np.take_along_axis(guide, best[..., None], -1)[..., 0]
    return np.where(share > 0, best, -1).astype(np.int32), share >= SURE


def _finite(scores: Any) -> bool:
    """Whether probabilities are."""
    return bool(np.isfinite(classes_cuda.shares(scores) if on_gpu(scores) else scores).all())


def _check_network(weights: parameters.State, cold: parameters.State) -> None:
    """InputError unless a state's weights are of this network; the last layer's rows may differ."""
    for name in {*weights, *cold}:
        came, wanted = (np.shape(w[name]) if name in w else None for w in (weights, cold))
        if name in _HEAD and came and wanted:
            came, wanted = came[1:], wanted[1:]
        if came != wanted:
            raise InputError(
                f"the state is of another network: its {name!r} is {came}, wanted {wanted}",
                fix="use the options of refine that it was saved with, or state.reset()",
            )


def _forget(state: StreamState) -> None:
    """Start cold, but go on counting."""
    frames, names = state.frames, state.names
    state.reset()
    state.frames, state.names = frames, names


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else (1 - SMOOTH) * old + SMOOTH * new
