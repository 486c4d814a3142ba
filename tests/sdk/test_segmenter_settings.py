"""Settings of a Segmenter and configurations: what each changes, and every refusal."""

import inspect
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from cases import case
from drawn_pictures import photo_like, quadrants
from hypothesis import given, settings
from hypothesis import strategies as st
from segmenting import NAMES, assert_same, few_steps, one_hot, prior_of

import runtime
from runtime.core.config import PRESETS
from runtime.errors import DeviceError, InputError
from sdk import CrfConfig, FilterConfig, RefineConfig, Segmenter

# Settings


@pytest.mark.parametrize("name", PRESETS)
def test_preset_name_means_the_preset(name):
    config = Segmenter(refine=name).refine
    assert config == RefineConfig.preset(name)
    assert {k: getattr(config, k) for k in PRESETS[name]} == PRESETS[name]
    result = Segmenter(refine=few_steps(name))(photo_like(24, 36))
    assert result.stats["objective"] == config.objective
    assert result.stats["steps"] == (10 if config.objective == "residual" else 3)


def test_default_is_residual_at_half_size_with_the_filter():
    segment = Segmenter()
    assert segment.refine == RefineConfig() and segment.filter == FilterConfig()
    config = segment.refine
    assert (config.objective, config.steps, config.scale) == ("residual", 10, 0.5)
    assert RefineConfig.preset("fast").scale == 0.25


def test_no_refinement_is_the_prior_alone():
    picture, truth = quadrants(40, 60)
    soft = one_hot(np.roll(truth, 7, 1), sure=0.8)
    result = Segmenter(prior_of(soft, NAMES), refine=None, filter=None)(picture)
    edges = (np.roll(truth, 7, 1) != result.labels).mean()
    assert edges < 0.05  # half size and back
    assert result.stats["steps"] == 0 and result.stats["stop_reason"] == "no refinement"
    assert result.stats["objective"] is None and result.stats["working_size"] == [20, 30]
    steps0 = Segmenter(prior_of(soft, NAMES), refine=RefineConfig(steps=0), filter=None)(picture)
    assert np.array_equal(steps0.labels, result.labels)  # an untrained residual is the prior
    assert np.abs(steps0.confidence - result.confidence).max() < 1e-3


def test_filter_follows_the_picture_and_can_be_left_out():
    picture, truth = quadrants(64, 96)
    coarse = one_hot(quadrants(8, 12)[1])
    coarse = np.roll(coarse, 1, 1)  # edges one coarse pixel away
    settings = {"refine": None, "min_area": 0}
    lifted = Segmenter(prior_of(coarse, NAMES), filter=None, **settings)(picture)
    filtered = Segmenter(
        prior_of(coarse, NAMES), filter=FilterConfig(radius=16, eps=1e-4), **settings
    )(picture)
    assert (filtered.labels == truth).mean() > (lifted.labels == truth).mean() + 0.02
    assert filtered.confidence.min() >= 0 and filtered.confidence.max() <= 1


def test_min_area_by_default_keeps_what_has_a_name():
    picture, truth = quadrants(80, 120)
    guide = truth.copy()
    guide[10:13, 10:13] = 3  # 9 pixels, under 0.2 % of 9600
    settings = {"refine": None, "filter": None}

    def regions(names, **changes):
        config = {"refine": RefineConfig(scale=1.0, steps=0), **changes}
        return len(Segmenter(prior_of(guide, names), **{**settings, **config})(picture).segments)

    assert regions(NAMES) == 5
    assert regions(None) == 4
    assert regions(NAMES, min_area=10) == 4
    assert regions(NAMES, min_area=9) == 5  # "under this many"
    assert regions(None, min_area=0) == 5
    assert regions(None, min_area=80 * 120) == 1


@pytest.mark.parametrize("refine", ["residual", "dynaguide", "dynaguide_code", "dynaseg_scf", None])
def test_labels_do_not_depend_on_the_number_of_threads(refine):
    picture = photo_like(90, 120)
    one, two = (Segmenter(refine=few_steps(refine), threads=n)(picture) for n in (1, 2))
    assert_same(one, two)
    assert one.stats == two.stats


def test_seed_matters_and_repeats():
    picture = photo_like()
    results = [Segmenter(refine=RefineConfig(seed=s))(picture) for s in (0, 0, 1)]
    assert_same(results[0], results[1])
    assert results[0].stats["losses"] == results[1].stats["losses"]
    assert results[0].stats["losses"] != results[2].stats["losses"]


# Working size


def test_working_size():
    for config, size, expected in [
        ({}, (1, 1), (1, 1)),
        ({}, (1, 10_000), (1, 5_000)),
        ({}, (10_000, 1), (5_000, 1)),
        ({}, (360, 480), (180, 240)),
        ({}, (361, 481), (180, 240)),
        ({"scale": 0.25}, (360, 480), (90, 120)),
        ({"scale": 1.0}, (360, 480), (360, 480)),
        ({}, (10_000, 10_000), (512, 512)),
        ({"scale": 1.0, "max_pixels": 7}, (1, 10_000), (1, 7)),
        ({"scale": 1.0, "max_pixels": 7}, (10_000, 1), (7, 1)),
        ({"scale": 1.0, "max_pixels": 1}, (300, 500), (1, 1)),
    ]:
        with case(config, size, expected):
            assert RefineConfig(**config).working_size(*size) == expected


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 20_000),
    st.integers(1, 20_000),
    st.floats(1e-3, 1.0),
    st.integers(1, 2**20),
)
def test_working_size_keeps_its_bounds(height, width, scale, max_pixels):
    h, w = RefineConfig(scale=scale, max_pixels=max_pixels).working_size(height, width)
    assert 1 <= h <= height and 1 <= w <= width and h * w <= max_pixels
    assert h <= max(1, scale * height + 0.5) and w <= max(1, scale * width + 0.5)
    wanted = min(scale, (max_pixels / (height * width)) ** 0.5)
    if min(wanted * height, wanted * width) > 20:  # aspect kept, and nothing given away
        assert abs(h - wanted * height) <= 1.5 + 0.03 * h
        assert abs(w - wanted * width) <= 1.5 + 0.03 * w


def test_size_of_a_picture_above_max_pixels():
    result = Segmenter(refine=RefineConfig(max_pixels=600))(photo_like(80, 120))
    assert result.stats["working_size"] == [20, 30] and result.labels.shape == (80, 120)


# Configurations


def test_wrong_refine_config():
    for options, match in [
        ({"scale": 0}, "scale is 0; wanted a number above 0"),
        ({"scale": -0.5}, "scale is -0.5; wanted a number above 0"),
        ({"scale": 1.01}, "scale is 1.01; wanted a number above 0, at most 1"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": "half"}, "scale is 'half'; wanted a number"),
        ({"scale": True}, "scale is True; wanted a number"),
        ({"max_pixels": 0}, "max_pixels is 0; wanted 1 to"),
        ({"max_pixels": 2**28 + 1}, "max_pixels is 268435457; wanted 1 to 268435456"),
        ({"max_pixels": 1e5}, "max_pixels is 100000.0; wanted a whole number"),
        ({"steps": -1}, "steps is -1"),  # the parent's checks run too
        ({"objective": "magic"}, "objective is 'magic'; wanted one of 'residual'"),
    ]:
        with case(match), pytest.raises(InputError, match=match):
            RefineConfig(**options)


def test_wrong_filter_config():
    for options, match in [
        ({"radius": 0}, "radius is 0; wanted 1 to 32768"),
        ({"radius": 2**15 + 1}, "radius is 32769"),
        ({"radius": 1.5}, "radius is 1.5; wanted a whole number"),
        ({"radius": True}, "radius is True; wanted a whole number"),
        ({"eps": 0}, "eps is 0; wanted a number above 0"),
        ({"eps": -1e-3}, "eps is -0.001; wanted a number above 0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"eps": float("inf")}, "eps is inf"),
        ({"eps": "small"}, "eps is 'small'; wanted a number"),
    ]:
        with case(match), pytest.raises(InputError, match=match):
            FilterConfig(**options)


def test_wrong_crf_config():
    for options, match in [
        ({"steps": -1}, "steps is -1; wanted 0 to 1000"),
        ({"steps": 1001}, "steps is 1001; wanted 0 to 1000"),
        ({"steps": 2.0}, "steps is 2.0; wanted a whole number"),
        ({"bilateral_weight": -1}, "bilateral_weight is -1; wanted a number from 0 to 1000000"),
        ({"gaussian_weight": -0.5}, "gaussian_weight is -0.5; wanted a number from 0 to 1000000"),
        ({"gaussian_weight": 2e6}, "gaussian_weight is 2000000.0; wanted a number from 0 to"),
        ({"gaussian_weight": float("nan")}, "gaussian_weight is nan; wanted a number from 0"),
        ({"gaussian_weight": True}, "gaussian_weight is True; wanted a number from 0"),
        ({"bilateral_sxy": 0}, "bilateral_sxy is 0; wanted a number above 0"),
        ({"bilateral_srgb": "3"}, "bilateral_srgb is '3'; wanted a number above 0"),
        ({"gaussian_sxy": float("inf")}, "gaussian_sxy is inf; wanted a number above 0"),
        ({"floor": 0}, "floor is 0; wanted a number from 1e-30 to 0.5"),
        ({"floor": 0.6}, "floor is 0.6; wanted a number from 1e-30 to 0.5"),
        ({"max_pixels": 0}, "max_pixels is 0; wanted 1 to 268435456"),
        ({"max_pixels": 2.0**20}, "max_pixels is 1048576.0; wanted a whole number"),
    ]:
        with case(match), pytest.raises(InputError, match=match):
            CrfConfig(**options)


def test_crf_config_has_the_options_of_the_function():
    config = CrfConfig(max_pixels=6, steps=np.int8(3), bilateral_sxy=np.float32(2), floor=0.5)
    assert config == CrfConfig(max_pixels=6, steps=3, bilateral_sxy=2.0, floor=0.5)
    assert type(config.steps) is int and type(config.bilateral_sxy) is float
    own = inspect.signature(runtime.dense_crf).parameters
    assert CrfConfig().options() == {
        name: own[name].default
        for name in own
        if name not in ("image", "probabilities", "compatibility", "out", "threads")
    }
    assert CrfConfig(gaussian_weight=0, bilateral_weight=0, steps=0).options()["steps"] == 0
    assert CrfConfig().max_pixels == 2**21
    sizes = [(2, 3), (3, 2), (2, 4), (4000, 6000), (1, 9), (9, 1)]
    found = [config.working_size(*size) for size in sizes]
    assert found == [(2, 3), (3, 2), (2, 3), (2, 3), (1, 6), (6, 1)]


def test_configs_are_frozen_and_keyword_only():
    with pytest.raises(FrozenInstanceError):
        RefineConfig().steps = 3
    with pytest.raises(FrozenInstanceError):
        FilterConfig().radius = 3
    with pytest.raises(TypeError):
        RefineConfig("residual")
    with pytest.raises(TypeError):
        FilterConfig(4)
    with pytest.raises(FrozenInstanceError):
        CrfConfig().steps = 3
    with pytest.raises(TypeError):
        CrfConfig(10)


def test_preset_and_its_changes():
    with pytest.raises(InputError, match="refine is 'best'; wanted one of residual, fast, dyna"):
        RefineConfig.preset("best")
    with pytest.raises(InputError, match="scale is 2; wanted"):
        RefineConfig.preset("fast", scale=2)
    config = RefineConfig.preset("dynaguide_code", steps=7, blocks=2)
    assert (config.steps, config.blocks, config.skip, config.seed) == (7, 2, "shared", 42)
    assert replace(config, steps=9) == RefineConfig.preset("dynaguide_code", steps=9, blocks=2)
    assert set(config.options()) == set(runtime.RefineOptions.__dataclass_fields__)


def test_wrong_segmenter():
    for options, error, match in [
        ({"refine": "best"}, InputError, "refine is 'best'; wanted one of residual, fast"),
        ({"refine": {"steps": 3}}, InputError, "refine is a dict; wanted a RefineConfig or a"),
        ({"refine": runtime.RefineOptions()}, InputError, "refine is a RefineOptions; wanted"),
        ({"filter": 8}, InputError, "filter is a int; wanted a FilterConfig, a CrfConfig or"),
        (
            {"filter": "guided"},
            InputError,
            "filter is a str; wanted a FilterConfig, a CrfConfig or",
        ),
        ({"min_area": -1}, InputError, "min_area is -1; wanted 0 to"),
        ({"min_area": 2.5}, InputError, "min_area is 2.5; wanted a whole number"),
        ({"threads": 0}, InputError, "threads is 0; wanted 1 to 1024"),
        ({"threads": True}, InputError, "threads is True; wanted a whole number"),
        ({"device": "tpu"}, InputError, "device is 'tpu'; wanted 'cpu', 'cuda'"),
        ({"precision": "fp16"}, InputError, "precision is 'fp16'; the CPU has 'fp32' only"),
        ({"precision": "fp8"}, InputError, "precision is 'fp8'; wanted 'fp32' or 'fp16'"),
        (
            {"prior": "resnet"},
            InputError,
            r"(?s)prior is 'resnet', which does not exist; wanted 'kmeans'.*fix: check",
        ),
        (
            {"prior": 7},
            InputError,
            "prior is a int; wanted 'kmeans', a bundle folder, an .onnx file, a folder of masks",
        ),
    ]:
        with case(match), pytest.raises(error, match=match):
            Segmenter(**options)


def test_wrong_instruction_set_is_named():
    program = (
        "import numpy as np\nfrom sdk import Segmenter, DeviceError\n"
        "try:\n    Segmenter()(np.zeros((4, 5, 3), np.uint8))\n"
        "except DeviceError as error:\n    print(error)"
    )
    environment = {**os.environ, "SEG_ISA": "sse9"}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert "sse9" in run.stdout and "fix: unset SEG_ISA" in run.stdout
    assert issubclass(DeviceError, RuntimeError)


def test_never_more_threads_than_processors():
    assert Segmenter(threads=1000).threads == runtime.device.choose.default_threads()
    assert Segmenter(threads=1).threads == 1


def test_tiny_eps_is_refused():
    with pytest.raises(InputError, match="eps is 1e-110; wanted at least 1e-9"):
        FilterConfig(eps=1e-110)


def test_many_labels_keep_their_numbers():
    """Rare classes are left out before the network is made; the others keep their ids."""
    guide = np.arange(4000).reshape(50, 80) % 3 + 4000
    guide[0, 0] = 17  # one pixel of 4000 is under 0.05 %
    labels = runtime.refine(np.full((50, 80, 3), 0.5, np.float32), guide, steps=0)
    assert labels.classes.tolist() == [4000, 4001, 4002]
