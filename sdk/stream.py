"""Streams: the refinement of a frame starts from the weights of the frame before.

The rules, in the order in which they are applied (docs/streams.md has the measurements):

1. Size: a frame of another size starts anew.
2. Permanence: the classes of a prior without names are renumbered so that they overlap the last
   labels most. With trained weights they keep their numbers, because the weights belong to them.
3. Cut: a frame starts anew if the histogram of colours and the prior's labels both change at once.
4. Growth: a new class of the prior gets a channel; the weights of the other channels are kept. If
   there are too many channels, the classes that are absent for longest lose theirs.
5. Budget: as many steps as fit are computed; cold steps that do not fit follow in the next frames.
6. Restore: if the refinement removed a class of which the prior is sure, the pixels of that class
   get the prior's label.
7. Decay: if the refined map contradicts a sure prior for many frames, the weights of the last layer
   are halved after each further such frame.

A frame that starts anew starts from the initial weights (cold), or from the trained weights of a
bundle (trained). Rules 2, 4, 6 and 7 are for the residual objective; rule 2 also applies without a
refinement.
"""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import numpy as np

import runtime
from runtime.checks import UnknownGuide, check_count, check_positive, shown_value
from runtime.core import parameters
from runtime.core.classes import (
    classes_of,
    frequent_classes,
    match_classes,
    prior_scores,
    restricted,
)
from runtime.core.guide import Guide
from runtime.core.parameters import objective_of
from runtime.errors import InputError
from sdk.capture import Capture, Frame
from sdk.pipeline import Pipeline, Scored
from sdk.result import FrameInfo, Result
from sdk.stream_state import (
    HEAD,
    MOST_STEPS,
    StreamState,
    agreement,
    check_network,
    check_start,
    colour_distance,
    colours_of,
    forget,
)
from sdk.timing import Clock

# A cut: the distance of the colours is larger, and the agreement of the labels smaller, than these.
CUT_COLOURS, CUT_AGREEMENT = 0.4, 0.3
WARM, COLD = 2, 10  # default steps of a frame that starts warm, and of one that starts anew
CHANNELS = 64  # most channels, unless one frame has more classes or an engine has a limit
SURE = 0.9  # probability from which the prior counts as confident
LOST = 0.002  # a class whose sure pixels have a smaller share of the picture is not restored
LEFT = 0.05  # a class that keeps a smaller share of its sure pixels counts as removed
# Rule 7 applies after more than PATIENCE frames in a row in which the refined map contradicts the
# prior at a larger share of the sure pixels than DOUBT.
DOUBT, PATIENCE = 0.2, 15
SMOOTH = 0.3  # weight of the newest measured time
FIRST = 0.5  # share of the budget for the refinement until the other stages have been measured
_in_use: weakref.WeakSet[StreamState] = weakref.WeakSet()  # the states of streams that run now
_guard = threading.Lock()


def segment_stream(
    pipeline: Pipeline,
    capture: Capture,
    state: StreamState,
    *,
    warm_steps: int | None,
    cold_steps: int | None,
    budget_ms: float | None,
) -> Generator[Result, None, None]:
    """Yield the results of a stream. Closing the generator releases the source. Notes of the source
    after the last frame become Python warnings.

    Raises
    ------
    InputError : another stream uses the state, the state is of another prior or continues other
        trained weights, or the source fails.

    Example
    -------
    >>> results = segment_stream(
    ...     seg.pipeline, capture, state, warm_steps=None, cold_steps=None, budget_ms=40
    ... )
    """
    follower = Follower(pipeline, state, warm_steps, cold_steps, budget_ms)
    with _guard:
        if state in _in_use:
            raise InputError("the state is in use by another stream", fix="give each its own")
        _in_use.add(state)
    try:
        yield from _results(follower, capture)
    finally:
        with _guard:
            _in_use.discard(state)


def _results(follower: Follower, capture: Capture) -> Generator[Result, None, None]:
    with capture:
        for frame in capture:
            yield follower(frame, capture.dropped)
        for note in capture.notes:
            warnings.warn(note, stacklevel=2)


class Follower:
    """Segments the frames of one stream, in their order. Arguments: see Segmenter.stream.

    Raises
    ------
    InputError : the state is of another prior, its weights continue others than those that the
        refinement starts from, or an argument is out of range.

    Example
    -------
    >>> follower = Follower(Segmenter("kmeans").pipeline, StreamState())
    >>> follower(Frame(0, 0.0, picture, [])).frame.start
    'cold'
    """

    def __init__(
        self,
        pipeline: Pipeline,
        state: StreamState,
        warm_steps: int | None = None,
        cold_steps: int | None = None,
        budget_ms: float | None = None,
    ) -> None:
        self.pipeline, self.state = pipeline, state
        own = pipeline.refine.steps if pipeline.trained and pipeline.refine else None
        cold = COLD if own is None else own
        warm, cold = (
            default if given is None else given
            for given, default in ((warm_steps, min(WARM, cold)), (cold_steps, cold))
        )
        self.warm_steps = check_count("warm_steps", warm, 0, MOST_STEPS)
        self.cold_steps = check_count("cold_steps", cold, 0, MOST_STEPS)
        anew = {"cold": "cold start", "trained": "start from the trained weights"}
        self._anew = anew[pipeline.first_start]  # in words, for events
        self.budget_ms = None if budget_ms is None else check_positive("budget_ms", budget_ms)
        self._refiner: tuple[Any, Any, parameters.State] | None = None  # key, refiner, cold weights
        self._semantic = pipeline.prior.names is not None  # whether the classes have a meaning
        self._settings_noted = False  # whether the event about the settings has been added
        self._budget_noted = False  # whether the event "no step fits" has been added
        self._step_ms: float | None = None  # measured time of a step
        self._rest_ms: float | None = None  # measured time of filter and postprocessing
        names = pipeline.prior.names
        if state.labels is not None and state.names != names:
            raise InputError(
                f"the state is of a prior with classes {shown_value(state.names)}, this one has "
                f"{shown_value(names)}",
                fix="use the same prior, or state.reset()",
            )
        if pipeline.refine is not None:
            check_start(state, pipeline.trained_sha256)

    def __call__(self, frame: Frame, dropped: int = 0) -> Result:
        """Segment the next frame; ``dropped`` is the number of frames dropped so far. The state is
        updated at the end, so an exception leaves it unchanged."""
        seg, started = self.pipeline, time.monotonic()
        state = replace(self.state, names=seg.prior.names)
        if seg.refine is not None:
            state.trained = seg.trained_sha256
        clock, events = Clock(), list(frame.notes)
        if seg.settings_note and not self._settings_noted:
            self._settings_noted = True
            events.append(f"settings: {seg.settings_note}")
        picture = seg.prepare(frame.picture, clock, frame.path)
        low = picture.working
        if state.labels is not None and state.labels.shape != low.shape[:2]:
            (h, w), (was_h, was_w) = low.shape[:2], state.labels.shape
            events.append(f"size: {was_h}x{was_w} became {h}x{w} (working size); {self._anew}")
            forget(state)
        try:
            checked, self._semantic = seg.guide(picture, clock)
            guide = checked.array
        except UnknownGuide as error:
            if state.guide is None or state.guide.max() < 0:
                reason = error.message.partition(";")[0]
                raise UnknownGuide(
                    f"the prior has no class for any pixel of frame {frame.index}, and no earlier "
                    f"labels can replace it: {reason}",
                    fix="check the prior with seg(picture), or start the stream at a frame in "
                    "which the prior finds a class",
                ) from error
            guide = state.guide
            events.append("prior: all of this frame is unknown; the last labels are used")
        config = seg.refine
        by_class = config is None or objective_of(config).channels_follow_classes
        if seg.prior.names is None and by_class and not seg.trained:
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
                    f"by {agrees:.2f}; {self._anew}"
                )
                forget(state)
        start = seg.first_start if state.weights is None else "warm"
        if config is None:
            start = "cold" if state.labels is None else "warm"
        if start != "warm":
            state.owed = self.cold_steps
        if config is None:
            scored = self._unrefined(state, guide, hard)
        elif by_class:
            scored = self._residual(state, low, guide, (hard, sure), started, events)
        else:
            scored = self._clusters(state, low, guide, started, events)
        state.frames += 1
        state.guide, state.colours = hard, colours
        clock.lap("refine")
        middle = time.monotonic()
        info = FrameInfo(frame.index, frame.time, dropped, start, events)
        result = seg.finish(picture, scored, [], clock, semantic=self._semantic, frame=info)
        self._rest_ms = _smoothed(self._rest_ms, 1e3 * (time.monotonic() - middle))
        vars(self.state).update(vars(state))
        return result

    def _unrefined(self, state: StreamState, guide: Any, hard: np.ndarray) -> Scored:
        """Return the prior's scores, without a refinement."""
        scores, found = prior_scores(guide)
        old = found if state.classes is None else state.classes
        state.classes = np.union1d(old, found).astype(np.int32)
        state.seen = np.full(len(state.classes), state.frames, np.int64)
        state.labels = np.maximum(hard, 0)
        return Scored(scores, found, {"steps": 0, "stop_reason": "no refinement"})

    def _residual(
        self,
        state: StreamState,
        low: Any,
        guide: Any,
        prior: tuple[np.ndarray, np.ndarray],
        started: float,
        events: list[str],
    ) -> Scored:
        """Refine the frame with the residual objective. ``prior`` is hard_labels() of the guide."""
        before = None if state.weights is None else state.classes
        refiner = self._grown(state, low.shape[:2], frequent_classes(guide), events)
        assert state.classes is not None
        new = np.setdiff1d(state.classes, state.classes if before is None else before)
        new = new[np.isin(new, prior[0])]  # those that are the likeliest class at some pixel
        if len(new):
            events.append(f"new class: {', '.join(map(self._name, new))}")
        wanted = restricted(guide, state.classes)
        if len(state.classes) == 1:  # no step can change a label
            result = refiner.run(low, Guide(wanted), steps=0, warm=True)
            state.labels = state.classes[np.asarray(result.labels)]
            stats = result.stats | {"stop_reason": "one class"}
            return Scored(result.scores, state.classes, stats, result.labels)
        result = self._run(state, refiner, low, Guide(wanted), started, events)
        scores = result.scores
        if result.stats["stop_reason"] == "diverged" or not _finite(scores):
            events.append(f"diverged: this frame is the prior's; the next frame: {self._anew}")
            result.stats["stop_reason"] = "diverged"
            state.weights, state.owed = None, self.cold_steps
            state.labels = state.classes[np.maximum(hard_labels(wanted)[0], 0)]
            return Scored(wanted, state.classes, result.stats)
        state.weights = refiner.state_dict()
        state.labels = state.classes[np.asarray(result.labels)]
        scores, kept = self._keep_and_decay(state, scores, wanted, *prior, events)
        return Scored(scores, state.classes, result.stats, None if kept else result.labels)

    def _clusters(
        self,
        state: StreamState,
        low: Any,
        guide: Any,
        started: float,
        events: list[str],
    ) -> Scored:
        """Refine the frame with an objective whose channels are clusters."""
        config = self.pipeline.refine
        assert config is not None
        refiner = self._grown(state, low.shape[:2], None, events)
        wanted = Guide(guide) if objective_of(config).takes_guide else None
        result = self._run(state, refiner, low, wanted, started, events)
        classes = np.arange(result.scores.shape[2], dtype=np.int32)
        state.classes, state.seen = classes, np.full(len(classes), state.frames, np.int64)
        state.weights = refiner.state_dict()
        if result.stats["stop_reason"] == "diverged":
            state.weights, state.owed = None, self.cold_steps
            events.append(f"diverged; the next frame: {self._anew}")
        if self.pipeline.prior.names is not None:
            classes = result.classes
            if wanted is None:
                classes = runtime.majority_classes(result.labels, guide, result.scores.shape[2])
        state.labels = classes[np.asarray(result.labels)]
        return Scored(result.scores, classes, result.stats, result.labels)

    def _run(
        self,
        state: StreamState,
        refiner: Any,
        low: Any,
        guide: Any,
        started: float,
        events: list[str],
    ) -> runtime.Refinement:
        """Run the steps that this frame needs, or as many of them as fit the budget."""
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
        if done == 0 and asked and self.budget_ms is not None and not self._budget_noted:
            self._budget_noted = True
            events.append(
                f"budget: no step fits {self.budget_ms:g} ms, which the prior and the filter use up"
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
        """Return a refiner of this size with the state's weights. ``found`` are the prior's classes
        in this frame, for which the state gets channels; None if the channels are clusters."""
        classes, rows = None, None
        if found is not None:
            classes = found
            if state.classes is not None and state.seen is not None and state.weights is not None:
                new = np.setdiff1d(found, state.classes)
                here = np.isin(state.classes, found)
                state.seen = np.where(here, state.frames, state.seen)
                most = self.pipeline.most_classes() or max(CHANNELS, len(found))
                spare = max(0, len(state.classes) + len(new) - most)
                rows = np.sort(np.argsort(-state.seen, kind="stable")[: len(state.seen) - spare])
                for number in np.delete(state.classes, rows):
                    events.append(f"class given up: {self._name(number)}, absent for longest")
                classes = np.concatenate([state.classes[rows], new])
                seen = np.concatenate([state.seen[rows], np.full(len(new), state.frames)])
            else:
                seen = np.full(len(found), state.frames)
            state.seen, classes = seen.astype(np.int64), classes.astype(np.int32)
        key = (size, None if classes is None else tuple(classes.tolist()))
        if self._refiner is None or self._refiner[0] != key:
            self._refiner = None  # frees its memory before the next one allocates
            refiner = self.pipeline.make_refiner(*size, classes)
            self._refiner, self._step_ms = (key, refiner, refiner.state_dict()), None
        _, refiner, cold = self._refiner
        weights = cold
        if state.weights is not None:
            weights = dict(state.weights)
            check_network(weights, cold)
            if rows is not None:
                for name in HEAD:  # earlier classes have the first rows
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
    ) -> tuple[Any, bool]:
        """Apply rules 6 and 7. Return the scores, and whether rule 6 changed them, in place."""
        assert state.classes is not None and state.labels is not None
        count = int(max(hard.max(), state.classes.max())) + 1
        right = sure & (state.labels == hard)
        held, left = (np.bincount(hard[m], minlength=count)[state.classes] for m in (sure, right))
        lost = state.classes[(held > LOST * hard.size) & (left < LEFT * held)]
        for number in lost:
            mine = sure & (hard == number)
            scores = classes_of(scores).keep(scores, guide, mine)
            state.labels[mine] = number
            events.append(f"kept: {self._name(number)}, which the refinement had removed")
        against = held.sum() > LOST * hard.size and left.sum() < (1 - DOUBT) * held.sum()
        state.doubt = state.doubt + 1 if against else 0
        if state.doubt > PATIENCE and state.weights is not None:
            events.append(f"decay: the prior has been contradicted for {state.doubt} frames")
            for name in HEAD:
                state.weights[name] = state.weights[name] * np.float32(0.5)
        return scores, len(lost) > 0

    def _name(self, number: int) -> str:
        """Return the name of a class for events."""
        names = self.pipeline.prior.names
        return names[number] if names and number < len(names) else f"class {number}"


def hard_labels(guide: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return (h, w) int32, the likeliest class, -1 = unknown; and (h, w) bool, whether the prior is
    sure of it.

    Example
    -------
    >>> hard_labels(np.array([[[0.05, 0.95], [0.6, 0.4]]], np.float32))
    (array([[1, 0]], dtype=int32), array([[ True, False]]))
    """
    labels, share = classes_of(guide).hard(guide)
    return np.asarray(labels), np.asarray(share) >= SURE


def _finite(scores: Any) -> bool:
    """Whether scores have neither NaN nor infinity."""
    return bool(np.isfinite(classes_of(scores).shares(scores)).all())


def _smoothed(old: float | None, new: float) -> float:
    """Return the exponential moving average of measured times."""
    return new if old is None else (1 - SMOOTH) * old + SMOOTH * new
