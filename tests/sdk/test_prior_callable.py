"""A callable prior: it may change its input and use its array again, and may name a label that
means unknown."""

import numpy as np
import pytest
from cases import case
from drawn_pictures import quadrants
from segmenting import assert_same, prior_of

from runtime.errors import InputError
from sdk import RefineConfig, Segmenter, StreamState

CONFIG = RefineConfig(steps=2, channels=8)


def green(picture):
    """Labels (H, W): whether green is the strongest channel, and 2 where blue is."""
    return picture.argmax(-1)


def changing(picture):
    labels = green(picture)
    picture[:] = 0
    return labels


@pytest.mark.parametrize("refine", [CONFIG, None])
def test_a_prior_that_changes_its_input_changes_nothing_else(refine):
    picture = quadrants(40, 60)[0]
    given, wanted = picture.copy(), Segmenter(green, refine=refine)(picture)
    for color in ("rgb", "bgr"):
        source = given if color == "rgb" else np.ascontiguousarray(given[..., ::-1])
        before = source.copy()
        found = Segmenter(changing, refine=refine)(source, color=color)
        assert_same(found, wanted)
        assert np.array_equal(found.image, picture) and np.array_equal(source, before)
        assert np.array_equal(found.overlay(), wanted.overlay())
    (frame,) = Segmenter(changing, refine=refine).stream([given])
    assert np.array_equal(frame.image, picture)


def test_a_prior_that_keeps_its_input_does_not_see_the_result():
    kept = []

    def keeping(picture):
        kept.append(picture)
        return green(picture)

    result = Segmenter(keeping, refine=None)(quadrants(40, 60)[0])
    assert not np.shares_memory(kept[0], result.image)


def test_a_prior_may_use_its_array_again():
    """The state of a stream keeps the labels of the last frame, whatever the prior writes later."""
    for dtype in (np.int32, np.int64, np.uint8):
        labels = np.zeros((20, 30), dtype)  # the working size, so that nothing is resized
        labels[:, 15:] = 1
        state = StreamState()
        segmenter = Segmenter(prior_of(labels), refine=None)
        list(segmenter.stream([np.zeros((40, 60, 3), np.uint8)], state=state))
        before = state.guide.copy()
        labels[:] = 1
        with case(dtype.__name__):
            assert np.array_equal(state.guide, before) and before.min() == 0


# Unknown pixels


def with_unknown(labels, unknown, names=None):
    prior = prior_of(labels, names)
    prior.unknown = unknown
    return prior


def corner(truth, value, dtype=np.uint8):
    labels = truth.astype(dtype)
    labels[:12, :12] = value
    return labels


@pytest.mark.parametrize("refine", [CONFIG, None, RefineConfig.preset("dynaguide", steps=2)])
def test_the_unknown_label_is_unknown(refine):
    picture, truth = quadrants(40, 60)
    for names in (list("abcd"), None):
        wanted = Segmenter(prior_of(corner(truth, -1, np.int32), names), refine=refine)(picture)
        for unknown, dtype, tail in [
            (255, np.uint8, ()), (np.uint8(255), np.int64, ()), (65535, np.uint16, ()),
            (255, np.float32, (1,)), (-9, np.int8, (1,)), (255, np.uint64, ()),
        ]:  # fmt: skip
            labels = corner(truth, unknown, dtype)
            before = labels.copy()
            prior = with_unknown(labels.reshape(*labels.shape, *tail), unknown, names)
            with case(unknown, dtype.__name__, names):
                found = Segmenter(prior, refine=refine)(picture)
                assert_same(found, wanted)
                assert found.warnings == [] and np.array_equal(labels, before)


def test_no_pixel_of_the_unknown_label_changes_nothing():
    picture, truth = quadrants(40, 60)
    soft = np.eye(4, dtype=np.float32)[truth]
    for guide in (truth, truth > 0, (truth > 0).astype(np.float32), soft):
        plain = Segmenter(prior_of(guide), refine=None)(picture)
        assert_same(Segmenter(with_unknown(guide, 255), refine=None)(picture), plain)


def test_a_label_255_that_nobody_explains_is_warned_of():
    picture, truth = quadrants(40, 60)
    labels = corner(truth, 255)
    for refine in (CONFIG, None, RefineConfig.preset("dynaguide", steps=2)):
        (warning,) = Segmenter(prior_of(labels), refine=refine)(picture).warnings
        assert "label 255" in warning and "prior.unknown = 255" in warning
    (frame,) = Segmenter(prior_of(labels), refine=None).stream([picture])
    assert "prior.unknown = 255" in frame.warnings[0]
    with pytest.raises(InputError, match=r"(?s)256 classes, but has only 4 names.*unknown = 255"):
        Segmenter(prior_of(labels, list("abcd")))(picture)
    many = np.arange(2400).reshape(40, 60) % 256  # 255 is a class among others
    names = [str(n) for n in range(256)]
    other = with_unknown(labels, 9)  # this prior says what is unknown
    for prior in (prior_of(many), prior_of(labels, names), prior_of(corner(truth, 254)), other):
        assert Segmenter(prior, refine=None)(picture).warnings == []


def test_an_unknown_label_that_is_no_number():
    for value in ("void", 2.5, True, [255]):
        with case(value), pytest.raises(InputError, match="the prior's attribute unknown is"):
            Segmenter(with_unknown(np.zeros((4, 6), int), value))
    with pytest.raises(InputError, match=r"unknown \(-1\) everywhere"):
        Segmenter(with_unknown(np.full((4, 6), 255), 255))(np.zeros((4, 6, 3), np.uint8))
