"""The budget of a stream: how many steps a frame gets, and what is made up for later."""

import time

import numpy as np
import pytest
from clips import Prior, clip, followed

import runtime
from sdk import Segmenter, StreamState
from sdk.capture import Frame
from sdk.stream import Follower

# --- budget --------------------------------------------------------------------------------------


def test_a_budget_that_suffices_changes_nothing():
    frames, truths = clip(3)
    free = followed(frames, Prior(truths))
    rich = followed(frames, Prior(truths), budget_ms=60_000)
    for a, b in zip(free, rich, strict=True):
        np.testing.assert_array_equal(a.labels, b.labels)
        assert b.stats["stop_reason"] == "steps"


def test_no_time_is_no_step_and_the_steps_are_owed():
    frames, truths = clip(3)
    state = StreamState()
    results = followed(frames, Prior(truths), budget_ms=1e-3, state=state)
    assert [r.stats["steps"] for r in results] == [0, 0, 0]
    assert all(r.stats["stop_reason"] == "budget" for r in results) and state.owed == 10


class Clocked:
    """A refiner whose steps take 10 ms of a clock of its own."""

    def __init__(self, real, clock):
        self.real, self.clock, self.slow = real, clock, 1.0

    def state_dict(self):
        return self.real.state_dict()

    def load_state_dict(self, state):
        self.real.load_state_dict(state)

    def run(self, low, guide, *, steps, warm, deadline=None):
        done = 0
        while done < steps and (deadline is None or self.clock.now < deadline):
            self.clock.now += 0.010 * self.slow
            done += 1
        self.clock.now += 0.0033
        result = self.real.run(low, guide, steps=0, warm=warm)
        stop = "steps" if done == steps else "budget"
        result.stats.update(steps=done, stop_reason=stop)
        return result


@pytest.fixture
def clocked(monkeypatch):
    """A follower maker whose refiners are Clocked, and the clock."""

    class Clock:
        now = 100.0

    clock, made = Clock(), []
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)

    def follower(truths, **options):
        seg = Segmenter(Prior(truths))
        make = seg.pipeline.make_refiner

        def made_refiner(*args):
            made.append(Clocked(make(*args), clock))
            return made[-1]

        seg.pipeline.make_refiner = made_refiner
        return Follower(seg.pipeline, StreamState(), **options)

    return follower, clock, made


def test_steps_fit_the_budget_and_cold_ones_are_made_up_for(clocked):
    follower, clock, _ = clocked
    frames, truths = clip(12)
    follow = follower(truths, warm_steps=1, cold_steps=12, budget_ms=44)
    steps, took = [], []
    for i, frame in enumerate(frames):
        before = clock.now
        result = follow(Frame(i, 0.0, frame, []))
        steps.append(result.stats["steps"])
        took.append(1e3 * (clock.now - before))
        late = sum(steps) < 12
        assert result.stats["stop_reason"] == ("budget" if late else "steps")
    assert steps == [3, 4, 4, 1] + [1] * 8, steps  # the first keeps half for what it cannot know
    assert max(took) <= 44 + 10, took


def test_one_slow_frame_does_not_stop_refinement_for_good(clocked):
    follower, _, made = clocked
    frames, truths = clip(12)
    follow = follower(truths, warm_steps=2, budget_ms=44)
    steps = []
    for i, frame in enumerate(frames):
        if made:
            made[0].slow = 50.0 if i == 1 else 1.0
        steps.append(follow(Frame(i, 0.0, frame, [])).stats["steps"])
    assert steps[1] == 1 and steps[-1] == 2 and min(steps) == 1, steps


def test_budget_in_real_time():
    frames, truths = clip(4)
    results = followed(frames, Prior(truths), warm_steps=10**6, budget_ms=300)
    assert all(r.stats["stop_reason"] == "budget" for r in results)
    assert sum(r.stats["steps"] for r in results) >= 3  # also where others use the processors


def test_deadline_of_a_run(monkeypatch):
    image, guide, _ = np.random.default_rng(0).random((3, 40, 50, 3), dtype=np.float32)
    refiner = runtime.Refiner(40, 50, classes=3)
    late = refiner.run(image, guide, steps=5, deadline=time.monotonic() - 1)
    assert late.stats["steps"] == 0 and late.stats["stop_reason"] == "budget"
    start = time.monotonic()
    result = refiner.run(image, guide, steps=10**6, deadline=start + 0.2)
    assert 0.2 <= time.monotonic() - start and result.stats["stop_reason"] == "budget"
    assert len(result.stats["losses"]["total"]) == result.stats["steps"]
    enough = refiner.run(image, guide, steps=2, deadline=time.monotonic() + 600)
    assert enough.stats["steps"] == 2 and enough.stats["stop_reason"] == "steps"
    now = [100.0]  # a clock on which each step takes 10 ms
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def tick(done, steps):
        now[0] += 0.010

    result = refiner.run(image, guide, steps=50, deadline=100.045, progress=tick)
    assert result.stats["steps"] == 5 and result.stats["stop_reason"] == "budget"
    assert len(result.stats["losses"]["total"]) == 5
