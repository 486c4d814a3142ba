"""Segmenter(filter=CrfConfig(...)) and --crf: what is passed to the CRF, and what is returned."""

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from drawn_pictures import photo_like, quadrants
from segmenting import NAMES, assert_same, one_hot, prior_of

import runtime
import sdk.crf
from runtime.core.resize import resize
from runtime.errors import ExitCode
from sdk import CrfConfig, RefineConfig, Segmenter
from sdk.__main__ import main
from sdk.crf import crf_upsample

PICTURE, TRUTH = quadrants(48, 64)
SOFT = one_hot(np.roll(TRUTH, 3, 1), sure=0.6)  # the prior's edges are 3 pixels from the picture's
FULL = RefineConfig(scale=1.0, steps=0)


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each call of the CRF, and its result."""
    found, real = [], runtime.dense_crf

    def noted(image, probabilities, **options):
        given = probabilities.copy()
        made = real(image, probabilities, **options)
        found.append((image, given, options, made))
        return made

    monkeypatch.setattr(runtime, "dense_crf", noted)
    return found


def test_without_a_refinement_it_is_the_function_with_the_priors_scores():
    config = CrfConfig(steps=4, bilateral_srgb=8.0)
    settings = {"filter": config, "refine": None, "min_area": 0}
    result = Segmenter(prior_of(SOFT, NAMES), **settings)(PICTURE)
    assert result.stats["working_size"] == [24, 32]
    scores = resize(resize(SOFT, 24, 32), 48, 64)
    expected = runtime.dense_crf(PICTURE, scores, steps=4, bilateral_srgb=8.0)
    assert np.array_equal(result.labels, expected.argmax(-1))
    assert np.array_equal(result.confidence, expected.max(-1).clip(max=1))
    plain = Segmenter(prior_of(SOFT, NAMES), **settings | {"filter": None})(PICTURE)
    assert (result.labels == TRUTH).all() and (plain.labels != TRUTH).mean() > 0.05
    assert result.timings["filter"] > 0


def test_it_takes_what_the_refinement_returns(calls):
    for refine in ("residual", "dynaguide", "dynaseg_fsf"):
        config = RefineConfig.preset(refine, steps=2, scale=1.0)
        Segmenter(prior_of(SOFT, None), refine=config, filter=CrfConfig(steps=1))(PICTURE)
        image, given, options, _ = calls.pop()
        guide = None if refine == "dynaseg_fsf" else SOFT
        refined = runtime.refine(PICTURE.astype(np.float32) / 255, guide, **config.options())
        assert np.array_equal(image, PICTURE)
        kept = np.union1d(
            np.unique(refined.labels), np.flatnonzero(refined.scores.max((0, 1)) > 0.1)
        )
        assert np.array_equal(given, refined.scores[..., kept]), refine
        assert options["out"] is None, f"{refine}: the refinement's scores are not overwritten"


def test_a_large_picture_is_processed_at_a_smaller_size(calls):
    picture, truth = quadrants(300, 400)
    config = CrfConfig(max_pixels=75 * 100, bilateral_sxy=40, gaussian_sxy=2, steps=3)
    prior = prior_of(one_hot(truth, sure=0.7), NAMES)
    result = Segmenter(prior, refine=None, filter=config, min_area=0)(picture)
    ((image, given, options, made),) = calls
    assert given.shape == (75, 100, len(NAMES)) == made.shape
    assert np.array_equal(image, cv2.resize(picture, (100, 75), interpolation=cv2.INTER_AREA))
    assert (options["bilateral_sxy"], options["gaussian_sxy"]) == (10.0, 0.5)
    assert options["bilateral_srgb"] == config.bilateral_srgb and "max_pixels" not in options
    assert made is options["out"], "the interpolated scores are overwritten"
    labels, confidence = runtime.joint_upsample(picture, made)
    assert np.array_equal(result.labels, labels)
    assert np.array_equal(result.confidence, confidence)
    assert (labels == truth).mean() > 0.97


def test_a_row_of_pixels_is_shortened():
    pixels, scores = np.zeros((1, 90, 3), np.uint8), np.full((1, 90, 2), 0.5, np.float32)
    scores[:, 45:] = 0.2, 0.8
    for config in (CrfConfig(), CrfConfig(max_pixels=30)):
        labels, confidence = crf_upsample(pixels, scores, config, threads=1)
        assert labels.shape == confidence.shape == (1, 90)
        assert labels.dtype == np.int32 and confidence.dtype == np.float32


def test_threads_are_passed_on(calls, monkeypatch):
    found, real = [], runtime.joint_upsample

    def noted(*values, **options):
        found.append(options["threads"])
        return real(*values, **options)

    monkeypatch.setattr(runtime, "joint_upsample", noted)
    config = CrfConfig(steps=1, max_pixels=100)
    segmenter = Segmenter(prior_of(SOFT, NAMES), refine=None, filter=config)  # all processors
    segmenter(PICTURE)
    crf_upsample(PICTURE, SOFT, config, threads=1)
    assert found == [call[2]["threads"] for call in calls] == [segmenter.threads, 1]


def test_no_array_is_resized_if_all_sizes_are_equal(monkeypatch):
    sizes = []
    monkeypatch.setattr(sdk.crf, "resize", lambda a, h, w: sizes.append(a.shape[:2]) or a)
    monkeypatch.setattr(runtime, "joint_upsample", None)
    seg = Segmenter(prior_of(SOFT, NAMES), refine=FULL, filter=CrfConfig())
    assert seg(PICTURE).labels.shape == (48, 64)
    assert set(sizes) == {(48, 64)}


def test_labels_as_a_guide_with_unknown_pixels():
    guide = TRUTH.astype(np.int32)
    guide[5:15, 5:20] = -1  # the CRF takes the colours around them
    for refine in (None, FULL, RefineConfig(steps=2, channels=8)):
        result = Segmenter(prior_of(guide, NAMES), refine=refine, filter=CrfConfig())(PICTURE)
        assert (result.labels == TRUTH).mean() > 0.99, refine


def test_a_floor_lets_the_crf_correct_labels(rng):
    """With labels the unary energy is -log(floor), 11.5 by default, above both weights, 7."""
    noisy = np.where(rng.random(TRUTH.shape) < 0.1, rng.integers(0, 4, TRUTH.shape), TRUTH)
    settings = {"refine": FULL, "min_area": 0}
    firm, free = (
        Segmenter(prior_of(noisy, NAMES), filter=CrfConfig(floor=floor), **settings)(PICTURE)
        for floor in (1e-5, 0.1)
    )
    assert np.array_equal(firm.labels, noisy)
    assert (free.labels == TRUTH).all() and (noisy != TRUTH).mean() > 0.05


def test_kmeans_streams_copies_and_threads(calls):
    picture = photo_like(36, 50)
    settings = {"filter": CrfConfig(steps=2), "refine": RefineConfig(steps=2, channels=8)}
    seg = Segmenter("kmeans", **settings, threads=1)
    result = seg(picture)
    assert calls[0][2]["threads"] == 1
    for other in (seg.clone(), pickle.loads(pickle.dumps(seg)), Segmenter(**settings)):
        assert other.filter == CrfConfig(steps=2)
        assert_same(other(picture), result)
    frames = list(seg.stream([picture, picture], warm_steps=2, cold_steps=2))
    assert np.array_equal(frames[0].labels, result.labels) and len(calls) == 6
    assert all(frame.stats["filter"] == "dense_crf" for frame in frames)


def test_the_result_says_which_filter_ran():
    isa = runtime.isa()
    for config, name in ((CrfConfig(steps=1), "dense_crf"), (None, None)):
        seg = Segmenter(prior_of(SOFT, NAMES), refine=None, filter=config)
        result = seg(PICTURE)
        assert result.stats["filter"] == json.loads(result.to_json())["stats"]["filter"] == name
        assert seg.info()["filter"] == f"{name or 'bilinear'} on cpu-{isa}"
        crf = f" + dense_crf on cpu-{isa}" if name else ""
        assert result.backend == f"python + cpu-{isa}{crf}"
    assert Segmenter(prior_of(SOFT, NAMES), refine=None)(PICTURE).stats["filter"] == "guided_filter"


def test_a_bundle():
    bundle = str(Path(__file__).parents[1] / "data/kmeans.bundle")
    seg = Segmenter(bundle, filter=CrfConfig(steps=1), self_test="never")
    assert seg(PICTURE).stats["filter"] == "dense_crf"
    assert seg.info()["filter"].startswith("dense_crf on cpu")


def test_the_command_line(work, capsys):
    assert main(["predict", "good.png", "--json", "--crf", "-o", "of predict"]) == 0
    (document,) = json.loads(capsys.readouterr().out)
    assert document["stats"]["filter"] == "dense_crf" and "dense_crf on" in document["backend"]
    assert main(["stream", str(work), "--json", "--crf"]) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["filter"] == "dense_crf"
    for command in ("predict", "stream", "demo"):
        with pytest.raises(SystemExit) as ended:
            main([command, "good.png", "--crf", "--no-filter"])
        assert ended.value.code == ExitCode.USAGE
        assert "--no-filter: not allowed with argument --crf" in capsys.readouterr().err


def test_a_class_that_wins_nowhere_takes_part():
    even = np.add.outer(np.arange(48), np.arange(64))[..., None] % 2 == 0
    guide = np.where(even, np.float32([0.5, 0.45, 0.05]), np.float32([0.05, 0.45, 0.5]))
    grey = np.full((48, 64, 3), 128, np.uint8)
    seg = Segmenter(
        prior_of(guide, None), refine=RefineConfig(steps=0, scale=1.0), filter=CrfConfig()
    )
    plain = Segmenter(prior_of(guide, None), refine=None, filter=CrfConfig(steps=0))
    assert (runtime.dense_crf(grey, guide).argmax(-1) == 1).all()
    assert (seg(grey).labels == 1).mean() > 0.99
    assert plain(grey).confidence.max() < 0.6  # a class that is left out would raise it
