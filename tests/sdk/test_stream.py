"""sdk/stream.py: warm starts and each rule, on clips whose truth is known."""

import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
from cases import case
from clips import HEIGHT, NAMES, WIDTH, Prior, clip, events, followed, view

import runtime
from runtime.errors import InputError
from sdk import RefineConfig, Segmenter, StreamState, stream, stream_state
from sdk.capture import Frame
from sdk.stream import Follower


def accuracy(results, truths):
    return [float((r.labels == t).mean()) for r, t in zip(results, truths, strict=True)]


# --- what a stream is for ------------------------------------------------------------------------


def test_warm_starts_are_better_than_the_prior_and_than_cold_ones():
    frames, truths = clip(16)
    warm = followed(frames, Prior(truths, noise=0.4))
    alone = followed(frames, Prior(truths, noise=0.4), refine=None)
    prior = Prior(truths, noise=0.4)
    cold = list(map(Segmenter(prior, refine=RefineConfig(steps=2)), frames))
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
    np.testing.assert_allclose(first.confidence, picture.confidence, atol=1e-5)


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


def in_turn(guides):
    """A prior of two named classes that returns these guides one after the other."""
    rest = iter(guides)

    def prior(picture):
        return next(rest)

    prior.names = ["left", "right"]
    return prior


def test_a_cut_needs_colours_and_labels_beyond_their_limits():
    """Rows that become white move the colours by a known distance (the limit is 0.4); rows where
    left and right are exchanged leave a known agreement (the limit is 0.3)."""

    def view_of(rows):
        picture = np.zeros((100, 100, 3), np.uint8)
        picture[:rows] = 255
        return picture

    def guide_of(rows):
        guide = np.tile(np.arange(50) >= 25, (50, 1)).astype(np.int32)
        guide[:rows] = 1 - guide[:rows]
        return guide

    cut = "cut: colours moved by 0.45, the prior agrees with its last labels by 0.24; cold start"
    for white, exchanged, told in [(36, 19, [cut]), (24, 19, []), (36, 16, []), (24, 16, [])]:
        with case(white, exchanged):
            prior = in_turn([guide_of(0), guide_of(exchanged)])
            results = followed([view_of(0), view_of(white)], prior, refine=None)
            assert results[1].frame.events == told
            assert results[1].frame.start == ("cold" if told else "warm")


def test_a_fade_is_no_cut():
    (day, truths), (night, others) = clip(26), clip(26, place="night")
    coarse = np.random.default_rng(0).uniform(-70, 70, (4, 5, 3))
    texture = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    mixed, known = [], []
    for i in range(26):  # 20 frames long; the prior changes its mind in the middle of it
        share = np.clip((i - 3) / 20, 0, 1)
        both = (1 - share) * day[i] + share * night[i] + texture
        mixed.append(np.clip(both, 0, 255).astype(np.uint8))
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


def test_a_prior_that_changes_its_mind_for_good_is_followed():
    """The network has learned what the prior said before."""
    frames, truths = clip(60)
    frames = [frames[0]] * 60
    wrong = {i: np.where(truths[0] == 2, 1, truths[0]) for i in range(20, 60)}
    wrong |= {i: truths[0] for i in range(20)}
    results = followed(frames, Prior(truths, wrong=wrong, sure=0.99, noise=0), warm_steps=0)
    told = [r.frame.index for r in results if any("decay" in e for e in r.frame.events)]
    inside = np.zeros_like(truths[0], bool)
    inside[34:51, 64:81] = True
    follows = [float((r.labels[inside] == 1).mean()) for r in results]
    if told:
        assert told[0] >= 20 + stream.PATIENCE
    assert follows[19] == 0 and follows[-1] == 1, (follows, told)


def test_new_classes_get_a_channel_and_the_others_keep_theirs(monkeypatch):
    frames, truths = clip(5, box=False)
    more = clip(5)
    state = StreamState()
    results = followed(frames, Prior(truths, noise=0, sure=1.0), state=state)
    before = {k: v.copy() for k, v in state.weights.items()}
    assert state.classes.tolist() == [0, 1, 3]
    seg = Segmenter(Prior(more[1], noise=0, sure=1.0))
    follower = Follower(seg.pipeline, state, warm_steps=0)
    result = follower(Frame(5, 0.0, more[0][0], []))
    assert state.classes.tolist() == [0, 1, 3, 2] and result.frame.events == ["new class: box"]
    for name, value in state.weights.items():
        kept = value[:3] if "conv3" in name else value
        np.testing.assert_array_equal(kept, before[name], err_msg=name)
        assert not ("conv3" in name and value[3:].any())  # it starts as the prior has it
    assert results[-1].labels.max() == 3
    later = [follower(Frame(6 + i, 0.0, more[0][i], [])) for i in range(1, 4)]
    assert (later[-1].labels == 2).sum() > 400 and not later[0].frame.events


def test_a_class_that_is_only_possible_is_no_news():
    frames, truths = clip(3, box=False)
    guides = [np.eye(4, dtype=np.float32)[t] for t in truths]
    guides[1] = 0.98 * guides[1] + np.array([0, 0, 0.02, 0], np.float32)  # the box, nowhere first
    state, told = StreamState(), iter(guides)
    seg = Segmenter(lambda picture: next(told))
    results = list(seg.stream(frames, state=state))
    assert state.classes.tolist() == [0, 1, 3, 2] and not events(results)


def test_the_classes_longest_away_give_up_their_channels(monkeypatch):
    monkeypatch.setattr(stream, "CHANNELS", 3)
    truth = np.zeros((HEIGHT, WIDTH), int)
    shown = []
    for k in (1, 2, 3, 1):
        shown.append(truth.copy())
        shown[-1][:, 40:] = k
    picture = view(0)[0]
    state = StreamState()
    prior = Prior(shown, names=list("abcd"), noise=0, sure=1.0)
    results = followed([picture] * 4, prior, state=state)
    assert events(results) == {
        1: ["new class: c"],
        2: ["class given up: b, absent for longest", "new class: d"],
        3: ["class given up: c, absent for longest", "new class: b"],
    }
    assert state.classes.tolist() == [0, 3, 1] and state.seen.tolist() == [3, 2, 3]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("at", ["first frame", "growth", "cut", "size"])
def test_an_interrupted_frame_leaves_the_state_as_it_was(tmp_path, monkeypatch, at):
    frames, truths = clip(3, box=False)
    state = StreamState()
    if at != "first frame":
        followed(frames, Prior(truths), state=state)
    before = {k: v for k, v in vars(state).items()}
    other = view(3, place="night" if at == "cut" else "day")
    picture = other[0][4:, 4:].copy() if at == "size" else other[0]
    with monkeypatch.context() as patch:

        def stopped(*_, **__):
            raise Interrupted

        patch.setattr(runtime.Refiner, "run", stopped)
        with pytest.raises(Interrupted):
            followed([picture], Prior([other[1]]), state=state)
    assert all(vars(state)[k] is v for k, v in before.items())
    state.save(tmp_path / "a")
    loaded = StreamState.load(tmp_path / "a")
    (result,) = followed([picture], Prior([other[1]]), state=loaded)
    assert loaded.frames == (1 if at == "first frame" else 4)
    assert result.frame.start == ("warm" if at == "growth" else "cold")


def test_divergence_starts_anew():
    frames, truths = clip(6)
    steep = RefineConfig(lr=10.0, lam=1e6, steps=10)
    results = followed(frames, Prior(truths), refine=steep, warm_steps=1, cold_steps=60)
    assert any("diverged" in e for e in results[0].frame.events)
    assert [r.frame.start for r in results].count("cold") >= 1
    alone = followed(frames, Prior(truths), refine=None)
    np.testing.assert_array_equal(results[0].labels, alone[0].labels)


def test_a_frame_that_the_prior_knows_nothing_of():
    frames, truths = clip(4)
    prior = Prior(truths)

    def sometimes(picture):
        guide = prior(picture)
        return np.zeros_like(guide) if prior.at == 3 else guide

    sometimes.names = NAMES
    results = followed(frames, sometimes)
    assert events(results) == {2: ["prior: all of this frame is unknown; the last labels are used"]}
    assert accuracy(results, truths)[2] > 0.9
    prior.at = 2
    message = (
        r"no class for any pixel of frame 0, .*zero .unknown. everywhere\n  fix: check the prior"
    )
    with pytest.raises(InputError, match=message):
        followed(frames[2:], sometimes)
    labels = Segmenter(lambda picture: np.full(picture.shape[:2], -1, np.int32), refine=None)
    with pytest.raises(InputError, match=r"any pixel of frame 0, .*: guide is unknown .-1. every"):
        list(labels.stream(frames[:1]))


def test_one_class_leaves_the_cold_start_to_the_next():
    frames, truths = clip(3)
    truths = [np.zeros_like(truths[0]), *truths[1:]]
    prior = Prior(truths, noise=0, sure=1.0)
    results = followed(frames, prior)
    assert [r.stats["steps"] for r in results] == [0, 10, 2]
    assert results[0].stats["stop_reason"] == "one class"


def test_a_state_of_another_prior_is_refused():
    frames, truths = clip(2)
    state = StreamState()
    followed(frames, Prior(truths), state=state)
    with pytest.raises(InputError, match="the state is of a prior with classes"):
        followed(frames, Prior(truths, names=list("abcd")), state=state)
    state.names = ["x" * 10**6]
    with pytest.raises(InputError, match=r"^the state is of .{90,130}, this one has .{9,110}\n"):
        followed(frames, Prior(truths), state=state)


def test_a_class_that_goes_away_keeps_its_channel():
    frames, truths = clip(4)
    gone = clip(4, box=False)
    state = StreamState()
    results = followed(frames + gone[0], Prior(truths + gone[1]), state=state)
    assert state.classes.tolist() == [0, 1, 2, 3]
    assert not (results[-1].labels == 2).sum() > 40


def test_a_class_that_is_restored_is_in_the_labels(monkeypatch):
    """The labels of the refinement, which lack the class, do not choose the columns then."""
    run = runtime.Refiner.run

    def lost(self, *arguments, **options):
        result = run(self, *arguments, **options)
        scores = np.zeros_like(result.scores)
        scores[..., 0] = 1
        return replace(result, scores=scores, labels=np.zeros_like(result.labels))

    monkeypatch.setattr(runtime.Refiner, "run", lost)
    frames, truths = clip(1)
    (result,) = followed(frames, Prior(truths, noise=0, sure=1.0))
    kept = [event for event in result.frame.events if event.startswith("kept: ")]
    assert len(kept) == len(np.unique(truths[0])) - 1
    np.testing.assert_array_equal(np.unique(result.labels), np.unique(truths[0]))


def two_classes(sure=0.99):
    """Rules 6 and 7, their state, and a sure guide of two halves."""
    guide = np.full((20, 30, 2), 1 - sure, np.float32)
    guide[:, :15, 0] = guide[:, 15:, 1] = sure
    state = StreamState(classes=np.array([0, 1], np.int32))
    state.weights = {name: np.ones((2, 4), np.float32) for name in stream_state.HEAD}
    keep = Follower(Segmenter(lambda p: None).pipeline, StreamState())._keep_and_decay

    def rule(scores, guide, told):
        scores = scores.copy()
        state.labels = scores.argmax(-1).astype(np.int32)
        keep(state, scores, guide, *stream.hard_labels(guide), told)
        np.testing.assert_array_equal(state.labels, scores.argmax(-1))
        return scores

    return rule, state, guide


def test_a_class_that_the_prior_is_sure_of_is_kept():
    rule, _, guide = two_classes()
    scores = np.zeros_like(guide)
    scores[..., 0] = 1  # class 1 is lost
    told = []
    scores[0, 29] = (0, 1)  # one pixel is left of it
    kept = rule(scores, guide, told)
    np.testing.assert_array_equal(kept.argmax(-1), guide.argmax(-1))
    assert told == ["kept: class 1, which the refinement had removed"]
    told.clear()
    unsure = np.where(guide > 0.5, 0.8, 0.2).astype(np.float32)
    np.testing.assert_array_equal(rule(scores, unsure, told), scores)
    scores[:5, 15:] = (0, 1)  # a quarter of it is left: nothing was lost
    np.testing.assert_array_equal(rule(scores, guide, told), scores)
    assert not told


def test_long_contradiction_decays_the_correction():
    rule, state, guide = two_classes()
    against = guide[:, ::-1].copy()
    for i in range(1, stream.PATIENCE + 4):
        told = []
        rule(against, guide, told)
        halved = max(0, i - stream.PATIENCE)
        event = f"decay: the prior has been contradicted for {i} frames"
        assert [t for t in told if not t.startswith("kept: ")] == [event] * (halved > 0)
        for name in stream_state.HEAD:
            assert (state.weights[name] == 0.5**halved).all()
    rule(guide, guide, told := [])
    assert state.doubt == 0 and not told


def test_a_state_serves_one_stream_at_a_time():
    frames, truths = clip(4)
    state = StreamState()
    first = Segmenter(Prior(truths)).stream(frames, state=state)
    next(first)
    second = Segmenter(Prior(truths)).stream(frames, state=state)
    with pytest.raises(InputError, match="in use by another stream"):
        next(second)
    first.close()
    assert next(Segmenter(Prior(truths)).stream(frames, state=state)).frame.start == "warm"
    for wrong in ("x", 5):
        with pytest.raises(InputError, match="wanted a StreamState"):
            Segmenter(Prior(truths)).stream(frames, state=wrong)


def test_a_budget_that_the_prior_takes_alone_is_said_once():
    frames, truths = clip(4)
    prior = Prior(truths)

    def slow(picture):
        time.sleep(0.03)
        return prior(picture)

    results = list(Segmenter(slow).stream(frames, budget_ms=10))
    assert [r.stats["steps"] for r in results] == [0, 0, 0, 0]
    event = "budget: no step fits 10 ms, which the prior and the filter use up"
    assert events(results) == {0: [event]}


def test_a_state_of_another_network_is_refused_whatever_its_channels_are_called():
    frames, truths = clip(3)
    state = StreamState()
    config = RefineConfig.preset("dynaguide", steps=1)
    followed(frames, Prior(truths), refine=config, state=state, cold_steps=1)
    again = RefineConfig(scale=config.scale)
    with pytest.raises(InputError, match="of another network"):
        followed(frames, Prior(truths), refine=again, state=state)


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


# --- arguments, resources ------------------------------------------------------------------------


def test_wrong_options_at_the_call():
    for options, message in [
        ({"warm_steps": -1}, "warm_steps is -1"),
        ({"cold_steps": 0.5}, "cold_steps is 0.5"),
        ({"budget_ms": 0}, "budget_ms is 0"),
        ({"rate": -1}, "rate is -1"),
        ({"drop": "all"}, "drop is 'all'"),
        ({"timeout": 0}, "timeout is 0"),
    ]:
        with case(message), pytest.raises(InputError, match=message):
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
    deadline = time.monotonic() + 60
    while not closed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert closed


def test_a_prior_that_fails_ends_the_stream_with_its_error():
    def prior(picture):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        list(Segmenter(prior).stream([view(0)[0]] * 3))
