"""sdk/stream.py: warm starts, state, budget and each rule, on clips whose truth is known."""

import time
from itertools import pairwise

import cv2
import numpy as np
import pytest

import runtime
from runtime.errors import BundleError, InputError
from runtime.ops import frequent_classes, match_classes, restricted
from sdk import RefineConfig, Segmenter, StreamState
from sdk import stream as rules
from sdk.capture import Frame
from sdk.stream import Follower

NAMES = ["ground", "ball", "box", "sky"]
HEIGHT, WIDTH = 72, 96
COLOURS = {
    "day": [(90, 120, 70), (200, 60, 40), (60, 70, 180), (170, 200, 230)],
    "night": [(20, 15, 30), (160, 160, 20), (10, 90, 60), (60, 20, 70)],
}


def view(at, *, place="day", box=True, seed=None):
    """A frame and its truth: a ball rolls over the ground before a box and the sky."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    truth = np.where(y < 24, 3, 0)
    if place == "night":
        truth = np.where(x < 40, 3, 0)
    if box:
        truth[30:55, 60:85] = 2
    truth[(y - 50) ** 2 + (x - 15 - 2 * at) ** 2 < 120] = 1
    rng = np.random.default_rng(1000 + at if seed is None else seed)
    picture = np.array(COLOURS[place])[truth] + rng.normal(0, 10, (HEIGHT, WIDTH, 3))
    return np.clip(picture, 0, 255).astype(np.uint8), truth


class Prior:
    """Knows the truth of each frame, coarsely and with ``noise``; gives what ``wrong`` says for the
    frames in it. Frames are told by their order."""

    def __init__(self, truths, names=NAMES, noise=0.1, wrong=None, sure=0.8):
        self.truths, self.names, self.wrong = truths, names, wrong or {}
        self.noise, self.sure, self.at = noise, sure, 0

    def __call__(self, picture):
        truth = self.wrong.get(self.at, self.truths[self.at])
        rng = np.random.default_rng(self.at)
        self.at += 1
        count = max(int(t.max()) for t in [*self.truths, *self.wrong.values()]) + 1
        soft = np.full((*truth.shape, count), (1 - self.sure) / count)
        soft += self.sure * np.eye(count)[truth]
        soft = cv2.resize(soft, (WIDTH // 8, HEIGHT // 8), interpolation=cv2.INTER_AREA)
        soft = np.maximum(soft + self.noise * rng.standard_normal(soft.shape), 1e-3)
        return (soft / soft.sum(-1, keepdims=True)).astype(np.float32)


def clip(count=12, **options):
    frames, truths = zip(*(view(i, **options) for i in range(count)), strict=True)
    return list(frames), list(truths)


def followed(frames, prior, refine="residual", **options):
    """Results of a stream over ``frames``."""
    return list(Segmenter(prior, refine=refine).stream(frames, **options))


def accuracy(results, truths):
    return [float((r.labels == t).mean()) for r, t in zip(results, truths, strict=True)]


def events(results):
    return {r.frame.index: r.frame.events for r in results if r.frame.events}


# --- what a stream is for ------------------------------------------------------------------------


def test_warm_starts_are_better_than_the_prior_and_than_cold_ones():
    frames, truths = clip(16)
    warm = followed(frames, Prior(truths))
    alone = followed(frames, Prior(truths), refine=None)
    cold = [
        Segmenter(Prior([t]), refine=RefineConfig(steps=2))(f)
        for f, t in zip(frames, truths, strict=True)
    ]
    score = {k: np.mean(accuracy(v, truths)[4:]) for k, v in
             {"warm": warm, "alone": alone, "cold": cold}.items()}  # fmt: skip
    assert score["warm"] > score["cold"] + 0.003 and score["warm"] > score["alone"] + 0.02, score


def test_results_say_what_was_done():
    frames, truths = clip(4)
    results = followed(frames, Prior(truths), warm_steps=3, cold_steps=7)
    assert [r.frame.start for r in results] == ["cold", "warm", "warm", "warm"]
    assert [r.stats["steps"] for r in results] == [7, 3, 3, 3]
    assert [r.frame.index for r in results] == [0, 1, 2, 3]
    assert all(r.stats["stop_reason"] == "steps" and r.names == NAMES for r in results)
    assert all(r.frame.dropped == 0 and not r.frame.events for r in results)
    assert '"frame": {"index": 3' in results[3].to_json()
    assert "frame" not in Segmenter(Prior(truths))(frames[0]).to_json()


def test_the_first_frame_is_what_a_picture_gives():
    frames, truths = clip(1)
    (first,) = followed(frames, Prior(truths))
    picture = Segmenter(Prior(truths))(frames[0])
    np.testing.assert_array_equal(first.labels, picture.labels)
    np.testing.assert_array_equal(first.confidence, picture.confidence)


@pytest.mark.parametrize("refine", ["dynaguide", "dynaseg_fsf", "dynaguide_code", None])
def test_every_objective_streams(refine):
    frames, truths = clip(3)
    config = RefineConfig.preset(refine, channels=16) if refine else None
    for names in (NAMES, None):
        results = followed(frames, Prior(truths, names), refine=config, cold_steps=3, warm_steps=1)
        assert [r.stats["steps"] for r in results] == ([3, 1, 1] if refine else [0, 0, 0])
        assert len(results) == 3 and all(r.labels.min() >= 0 for r in results)


def test_a_stream_is_the_same_twice():
    frames, truths = clip(5)
    a, b = (followed(frames, Prior(truths)) for _ in range(2))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.labels, y.labels)
        np.testing.assert_array_equal(x.confidence, y.confidence)


# --- state ---------------------------------------------------------------------------------------


def test_state_saved_and_loaded_goes_on_as_if_nothing_had_happened(tmp_path):
    frames, truths = clip(8)
    whole = followed(frames, Prior(truths))
    state = StreamState()
    followed(frames[:5], Prior(truths), state=state)
    state.save(tmp_path / "a.safetensors")
    loaded = StreamState.load(tmp_path / "a.safetensors")
    assert loaded.frames == 5
    rest = followed(frames[5:], Prior(truths[5:]), state=loaded)
    assert [r.frame.start for r in rest] == ["warm"] * 3
    prior = Prior(truths)
    prior.at = 5  # its noise goes by the frame
    rest = followed(frames[5:], prior, state=StreamState.load(tmp_path / "a.safetensors"))
    for x, y in zip(whole[5:], rest, strict=True):
        np.testing.assert_array_equal(x.labels, y.labels)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_empty_state_can_be_saved(tmp_path):
    StreamState().save(tmp_path / "a.safetensors")
    assert StreamState.load(tmp_path / "a.safetensors") == StreamState()


def test_reset_starts_cold():
    frames, truths = clip(4)
    state = StreamState()
    followed(frames[:2], Prior(truths), state=state)
    state.reset()
    assert state == StreamState()
    assert followed(frames[2:], Prior(truths[2:]), state=state)[0].frame.start == "cold"


def spoiled(tmp_path):
    """Files that are no state, by what is wrong with them."""
    from safetensors.numpy import load, save

    frames, truths = clip(2)
    state = StreamState()
    followed(frames, Prior(truths), state=state)
    state.save(tmp_path / "good")
    data = (tmp_path / "good").read_bytes()
    arrays = load(data)
    files = {"empty": b"", "cut": data[: len(data) // 2], "text": b"hello" * 9}
    changes = {
        "no counts": {"counts": None},
        "negative counts": {"counts": np.array([-1, 0, 0])},
        "no labels": {"labels": None},
        "labels of another type": {"labels": arrays["labels"].astype(np.float32)},
        "guide of another size": {"guide": arrays["guide"][1:].copy()},
        "equal classes": {"classes": np.zeros_like(arrays["classes"])},
        "negative class": {"classes": arrays["classes"] - 1},
        "NaN colours": {"colours": np.full(512, np.nan, np.float32)},
        "something else": {"else": np.zeros(3)},
    }
    for name, change in changes.items():
        files[name] = save({k: v for k, v in (arrays | change).items() if v is not None})
    return files


def test_files_that_are_no_state(tmp_path):
    for name, data in spoiled(tmp_path).items():
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(BundleError, match=r"no (stream's state|safetensors file)"):
            StreamState.load(tmp_path / "bad")
            raise AssertionError(name)
    with pytest.raises(InputError, match="cannot be read"):
        StreamState.load(tmp_path / "none")


def test_a_state_of_another_network_is_refused(tmp_path):
    frames, truths = clip(2)
    state = StreamState()
    followed(frames, Prior(truths), state=state)
    with pytest.raises(InputError, match=r"state 'conv1.weight' is"):
        followed(frames, Prior(truths), refine=RefineConfig(channels=16), state=state)


# --- rules ---------------------------------------------------------------------------------------


def test_a_hard_cut_starts_cold():
    day, night = clip(6), clip(6, place="night")
    frames, truths = day[0] + night[0], day[1] + night[1]
    results = followed(frames, Prior(truths))
    assert [r.frame.start for r in results].index("cold", 1) == 6
    assert list(events(results)) == [6] and events(results)[6][0].startswith("cut: colours moved")
    assert results[6].stats["steps"] == 10 and results[7].stats["steps"] == 2
    alone = np.mean(accuracy(followed(frames, Prior(truths), refine=None), truths)[6:])
    assert np.mean(accuracy(results, truths)[6:]) > alone


def test_a_fade_is_no_cut():
    (day, truths), (night, others) = clip(16), clip(16, place="night")
    mixed, known = [], []
    for i in range(16):
        share = np.clip((i - 3) / 10, 0, 1)
        mixed.append(np.round((1 - share) * day[i] + share * night[i]).astype(np.uint8))
        known.append(truths[i] if share < 0.5 else others[i])
    assert not events(followed(mixed, Prior(known)))


def test_a_shaking_camera_is_no_cut():
    frames, truths = clip(12)
    rng = np.random.default_rng(0)
    for i in range(12):
        shift = tuple(rng.integers(-6, 7, 2))
        frames[i] = np.roll(frames[i], shift, (0, 1))
        truths[i] = np.roll(truths[i], shift, (0, 1))
    results = followed(frames, Prior(truths))
    assert not events(results)
    alone = accuracy(followed(frames, Prior(truths), refine=None), truths)
    assert np.mean(accuracy(results, truths)) > np.mean(alone)


def test_a_flashing_light_is_no_cut():
    frames, truths = clip(12)
    for i in (4, 5, 8):
        frames[i] = np.clip(frames[i].astype(int) * 2 + 30, 0, 255).astype(np.uint8)
    results = followed(frames, Prior(truths))
    assert not events(results)
    after = np.array(accuracy(results, truths))[[6, 7, 9, 10, 11]]
    alone = accuracy(followed(frames, Prior(truths), refine=None), truths)
    assert after.mean() > np.array(alone)[[6, 7, 9, 10, 11]].mean()


def test_a_prior_that_is_wrong_for_20_frames_is_forgotten():
    frames, truths = clip(36)
    wrong = {}
    for i in range(8, 28):  # it takes the box for a ball, and half of the ground for sky
        wrong[i] = np.where(truths[i] == 2, 1, truths[i])
        wrong[i][60:] = 3
    results = followed(frames, Prior(truths, wrong=wrong, sure=0.97, noise=0.01))
    right = followed(frames, Prior(truths, sure=0.97, noise=0.01))
    lost = np.array(accuracy(right, truths)) - accuracy(results, truths)
    assert lost[10:28].min() > 0.1  # nobody could know better
    assert lost[31:].max() < 0.02, lost


def test_new_classes_get_a_channel_and_the_others_keep_theirs(monkeypatch):
    frames, truths = clip(5, box=False)
    more = clip(5)
    state = StreamState()
    results = followed(frames, Prior(truths), state=state)
    before = {k: v.copy() for k, v in state.weights.items()}
    assert state.classes.tolist() == [0, 1, 3]
    seg = Segmenter(Prior(more[1]))
    follower = Follower(seg, state, warm_steps=0)
    result = follower(Frame(5, 0.0, more[0][0], []))
    assert state.classes.tolist() == [0, 1, 3, 2] and result.frame.events == ["new class: box"]
    for name, value in state.weights.items():
        kept = value[:3] if "conv3" in name else value
        np.testing.assert_array_equal(kept, before[name], err_msg=name)
        assert not ("conv3" in name and value[3:].any())  # it starts as the prior has it
    assert results[-1].labels.max() == 3
    later = [follower(Frame(6 + i, 0.0, more[0][i], [])) for i in range(1, 4)]
    assert (later[-1].labels == 2).sum() > 400 and not later[0].frame.events


def test_a_class_that_goes_away_keeps_its_channel():
    frames, truths = clip(4)
    gone = clip(4, box=False)
    state = StreamState()
    results = followed(frames + gone[0], Prior(truths + gone[1]), state=state)
    assert state.classes.tolist() == [0, 1, 2, 3]
    assert not (results[-1].labels == 2).sum() > 40


def two_classes(sure=0.99):
    """A follower, a sure guide of two halves, and their labels."""
    guide = np.full((20, 30, 2), 1 - sure, np.float32)
    guide[:, :15, 0] = guide[:, 15:, 1] = sure
    follower = Follower(Segmenter(lambda p: None), StreamState())
    follower.state.classes = np.array([0, 1], np.int32)
    follower.state.weights = {name: np.ones((2, 4), np.float32) for name in rules._HEAD}
    return follower, guide, guide.argmax(-1).astype(np.int32)


def test_a_class_that_the_prior_is_sure_of_is_kept():
    follower, guide, hard = two_classes()
    scores = np.zeros_like(guide)
    scores[..., 0] = 1  # class 1 is lost
    told = []
    kept = follower._keep_and_decay(scores.copy(), guide, hard, told)
    np.testing.assert_array_equal(kept.argmax(-1), hard)
    assert told == ["kept: class 1, which the refinement had lost"]
    scores[0, 29] = (0, 1)  # one pixel is left of it: nothing was lost
    told.clear()
    follower._keep_and_decay(scores, guide, hard, told)
    assert not told
    unsure = np.where(guide > 0.5, 0.8, 0.2).astype(np.float32)
    scores[0, 29] = (1, 0)
    follower._keep_and_decay(scores, unsure, hard, told)
    assert not told


def test_long_contradiction_decays_the_correction():
    follower, guide, hard = two_classes()
    against = guide[:, ::-1].copy()
    for i in range(1, rules.PATIENCE + 4):
        told = []
        follower._keep_and_decay(against.copy(), guide, hard, told)
        halved = max(0, i - rules.PATIENCE)
        assert bool(told) == (halved > 0)
        for name in rules._HEAD:
            assert (follower.state.weights[name] == 0.5**halved).all()
    follower._keep_and_decay(guide.copy(), guide, hard, told := [])
    assert follower.state.doubt == 0 and not told


def test_a_new_size_starts_anew():
    frames, truths = clip(6)
    frames[3:] = [f[8:, 8:].copy() for f in frames[3:]]
    truths[3:] = [t[8:, 8:] for t in truths[3:]]
    results = followed(frames, Prior(truths))
    assert [r.frame.start for r in results] == ["cold", "warm", "warm", "cold", "warm", "warm"]
    assert events(results) == {3: ["size: 36x48 became 32x44 (working size); cold start"]}
    assert results[3].labels.shape == (64, 88)


def test_broken_frames_are_events():
    frames, truths = clip(4)
    results = followed([*frames[:2], b"broken", *frames[2:]], Prior(truths))
    assert [r.frame.index for r in results] == [0, 1, 3, 4]
    assert events(results)[3][0].startswith("frame 2 was left out")


# --- permanence ----------------------------------------------------------------------------------


def test_clusters_keep_their_numbers():
    frames, truths = clip(10)
    shuffled = [np.random.default_rng(i).permutation(4)[t] for i, t in enumerate(truths)]
    results = followed(frames, Prior(shuffled, names=None))
    for before, after in pairwise(results):
        assert (before.labels == after.labels).mean() > 0.9
    alone = followed(frames, Prior(shuffled, names=None), refine=None)
    assert min((a.labels == b.labels).mean() for a, b in pairwise(alone)) > 0.85


def test_colour_clusters_keep_their_numbers():
    frames, _ = clip(8)
    results = followed(frames, "kmeans")
    changed = [(a.labels != b.labels).mean() for a, b in pairwise(results)]
    assert max(changed) < 0.1


def test_match_classes():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (8, 9)).astype(np.int32)
    ids = np.array([4, 7, 9], np.int32)
    known = ids[labels]
    turn = np.array([2, 0, 1])
    guide = np.eye(3, dtype=np.float32)[turn[labels]]
    np.testing.assert_array_equal(match_classes(guide, known, ids).argmax(-1), known)
    np.testing.assert_array_equal(match_classes(turn[labels].astype(np.int32), known, ids), known)
    fewer = match_classes(np.minimum(labels, 1), known, ids)
    assert set(np.unique(fewer)) <= {4, 7, 9} and (fewer[labels == 0] == 4).all()
    more = np.where(rng.random((8, 9)) < 0.3, 3, labels).astype(np.int32)
    matched = match_classes(more, known, ids)
    assert set(np.unique(matched)) == {0, 4, 7, 9} and (matched == 0).sum() == (more == 3).sum()
    unknown = np.where(labels == 1, -1, labels).astype(np.int32)
    assert (match_classes(unknown, known, ids)[labels == 1] == -1).all()


def test_restricted_to_classes_that_are_not_there():
    guide = np.array([[[0.5, 0.25, 0.25], [0, 0, 1]]], np.float32)
    soft = restricted(guide, np.array([1, 0, 8], np.int32))
    np.testing.assert_allclose(soft, [[[1 / 3, 2 / 3, 0], [0, 0, 0]]], rtol=1e-6)
    hard = restricted(np.array([[0, 2, -1]], np.int32), np.array([2, 5], np.int32))
    np.testing.assert_array_equal(hard, [[[0, 0], [1, 0], [0, 0]]])
    assert frequent_classes(np.array([[0, 2, -1]], np.int32)).tolist() == [0, 2]


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


def test_steps_fit_the_budget_and_cold_ones_are_made_up_for():
    """At a size where a step takes some milliseconds."""
    y, x = np.mgrid[:300, :400]
    truth = ((x // 100 + y // 100) % 4).astype(int)
    rng = np.random.default_rng(0)
    colours = np.array(COLOURS["day"])[truth]
    frames = [
        np.clip(colours + rng.normal(0, 9, colours.shape), 0, 255).astype(np.uint8)
        for _ in range(12)
    ]

    def prior(picture):
        return np.eye(4, dtype=np.float32)[truth[::8, ::8]] * 0.8 + 0.05

    prior.names = NAMES
    seg = Segmenter(prior, threads=1)
    free = list(seg.stream(frames, warm_steps=4))
    total = np.median([r.timings["total"] for r in free[1:]])
    refine = np.median([r.timings["refine"] for r in free[1:]])
    step = refine / (4 + 1 / 3)
    budget = total - refine + 3.5 * step  # three steps fit
    results = list(seg.stream(frames, warm_steps=1, cold_steps=12, budget_ms=budget))
    steps = [r.stats["steps"] for r in results]
    assert 1 <= steps[0] < 12 and results[0].stats["stop_reason"] == "budget", steps
    assert sum(steps[:8]) >= 12, steps  # the cold start is made up for
    assert steps[-1] == 1 and results[-1].stats["stop_reason"] == "steps", steps
    over = [r.timings["total"] - budget for r in results]
    assert sorted(over)[-3] < 1.5 * step, (over, step)  # the machine may stop us twice


def test_deadline_of_a_run():
    image, guide, _ = np.random.default_rng(0).random((3, 40, 50, 3), dtype=np.float32)
    refiner = runtime.Refiner(40, 50, classes=3)
    late = refiner.run(image, guide, steps=5, deadline=time.monotonic() - 1)
    assert late.stats["steps"] == 0 and late.stats["stop_reason"] == "budget"
    start = time.monotonic()
    result = refiner.run(image, guide, steps=10**6, deadline=start + 0.2)
    assert 0.2 <= time.monotonic() - start < 2 and result.stats["stop_reason"] == "budget"
    assert len(result.stats["losses"]["total"]) == result.stats["steps"] > 1
    enough = refiner.run(image, guide, steps=2, deadline=time.monotonic() + 60)
    assert enough.stats["steps"] == 2 and enough.stats["stop_reason"] == "steps"


# --- arguments, resources ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [({"warm_steps": -1}, "warm_steps is -1"), ({"cold_steps": 0.5}, "cold_steps is 0.5"),
     ({"budget_ms": 0}, "budget_ms is 0"), ({"rate": -1}, "rate is -1"),
     ({"drop": "all"}, "drop is 'all'"), ({"timeout": 0}, "timeout is 0")],
)  # fmt: skip
def test_wrong_options_at_the_call(options, message):
    with pytest.raises(InputError, match=message):
        Segmenter().stream([], **options)


def test_closing_the_generator_closes_the_source():
    closed = []

    def camera():
        try:
            while True:
                yield view(0)[0]
        finally:
            closed.append(True)

    results = Segmenter("kmeans").stream(camera())
    next(results)
    results.close()
    deadline = time.monotonic() + 5
    while not closed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert closed


def test_a_prior_that_fails_ends_the_stream_with_its_error():
    def prior(picture):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        list(Segmenter(prior).stream([view(0)[0]] * 3))
