"""The way of a picture through the pipeline: each check and each arg max is computed once."""

import collections

import numpy as np
import pytest
from scenes import scene

import runtime.checks
import runtime.core.classes_host
from runtime.core import guide as guide_module
from runtime.core.guide import Guide
from runtime.core.options import RefineOptions
from runtime.core.refiner import prepared
from runtime.errors import InputError
from sdk import RefineConfig, Segmenter, pipeline

PIXELS = (scene(60, 80, seed=2)[0] * 255).round().astype(np.uint8)


def prior(picture):
    """Three soft classes: the share of each colour channel."""
    colours = picture.astype(np.float32) + 1
    return colours / colours.sum(-1, keepdims=True)


@pytest.fixture
def calls(monkeypatch):
    """How often the checks and the arg max of scores were computed."""
    counts = collections.Counter()

    def count(module, name):
        real = getattr(module, name)

        def counted(*arguments, **options):
            counts[name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, counted)

    count(pipeline, "check_guide")
    monkeypatch.setattr(guide_module, "check_guide", pipeline.check_guide)
    count(runtime.core.classes_host, "winners")
    return counts


def test_a_guide_is_checked_once_and_labels_are_not_computed_twice(calls):
    dynaguide = RefineConfig.preset("dynaguide", steps=2)
    for refine, times in (("residual", 0), (dynaguide, 0), (None, 1)):
        calls.clear()
        Segmenter(prior, refine=refine)(PIXELS)
        assert calls["check_guide"] == 1, refine
        assert calls["winners"] == times, f"{refine}: the refinement has computed the labels"
        calls.clear()
        assert len(list(Segmenter(prior, refine=refine).stream([PIXELS] * 3))) == 3
        assert calls["check_guide"] == 3, f"{refine}: of three frames"


def test_a_guide_that_was_checked_must_have_the_size(rng):
    guide = Guide.checked(rng.random((4, 5, 3), np.float32), 4, 5)
    assert Guide.checked(guide, 4, 5) is guide
    with pytest.raises(InputError, match=r"guide has shape \(4, 5, 3\); wanted .* 5 x 4"):
        Guide.checked(guide, 5, 4)


def test_a_resized_guide_that_knows_nothing_is_refused():
    """Resizing may skip the few pixels that a guide knows."""
    image = np.zeros((2, 3, 3), np.float32)
    nothing = Guide(np.zeros((2, 3, 4), np.float32))
    for soft in (False, True):
        options = RefineOptions(objective="dynaguide", soft_guide=soft)
        with pytest.raises(InputError, match="guide is zero"):
            prepared(options, image, nothing, 4)


def test_a_resized_soft_guide_counts_each_pixel_as_one():
    half = np.full((2, 3, 2), 0.25, np.float32)
    options = RefineOptions(objective="dynaguide", soft_guide=True)
    found, _ = prepared(options, np.zeros((2, 3, 3), np.float32), Guide(half), 4)
    np.testing.assert_array_equal(found, 2 * half)
