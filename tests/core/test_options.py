"""Options, argument checks, numbers of NumPy, and the silhouette count."""

import copy
import json
import pickle
from dataclasses import asdict
from decimal import Decimal

import numpy as np
import pytest
from cases import case

import runtime
from runtime import RefineOptions, checks
from runtime.core.config import FilterConfig, RefineConfig
from runtime.core.silhouette import best_cluster_count, distinct_rows, mean_silhouette
from runtime.errors import InputError

# --- options -----------------------------------------------------------------------------------

DEFAULTS = {
    "residual": (10, 32, 0.05, "none", "none", "fixed", "l1", False, 0),
    "dynaguide": (1000, 100, 0.1, "own", "image", "fsf", "huber", True, 0),
    "dynaseg": (1000, 100, 0.1, "none", "image", "fsf", "l1", False, 3),
}


@pytest.mark.parametrize("objective", DEFAULTS)
def test_defaults(objective):
    o = RefineOptions(objective=objective)
    assert DEFAULTS[objective] == (
        o.steps, o.channels, o.lr, o.skip, o.final_bn, o.weighting, o.continuity, o.diagonals,
        o.min_labels,
    )  # fmt: skip
    assert (o.blocks, o.momentum, o.seed, o.mapping, o.soft_guide) == (2, 0.9, 0, "overlap", False)
    assert (o.mu, o.beta, o.silhouette, o.early_stop) == (1.0, 15.0, False, 0.0)
    assert (o.lam, o.sigma, o.offsets, o.balance) == (4.0, 0.08, (1, 2), 0.25)


def test_defaults_that_depend_on_another_option():
    assert RefineOptions().objective == "residual"
    assert RefineOptions(objective="dynaseg", weighting="scf").mu == 50.0
    assert RefineOptions(objective="dynaseg", weighting="scf", mu=3).mu == 3
    assert RefineOptions(offsets=[1, 4]).offsets == (1, 4)


BAD_OPTIONS = [
    ("objective", "best", "objective is 'best'; wanted one of 'residual', 'dynaguide', 'dyn"),
    ("objective", np.array(["residual", "x"]), r"objective is array\(.*wanted one of 'residual'"),
    ("skip", "yes", "skip is 'yes'; wanted one of 'none', 'shared', 'own'"),
    ("weighting", "fcf", "weighting is 'fcf'; wanted one of 'fixed', 'fsf', 'scf'"),
    ("continuity", "l2", "continuity is 'l2'; wanted one of 'l1', 'huber'"),
    ("mapping", "best", "mapping is 'best'; wanted one of 'overlap', 'index_modulo'"),
    ("final_bn", True, "final_bn is True; wanted one of 'none', 'image', 'running'"),
    ("steps", -1, "steps is -1; wanted a whole number from 0 to 1e[+]06"),
    ("steps", 1.5, "steps is 1.5; wanted a whole number"),
    ("steps", True, "steps is True; wanted a whole number"),
    ("channels", 0, "channels is 0; wanted a whole number from 1 to 1024"),
    ("blocks", 1, "blocks is 1; wanted a whole number from 2 to 3"),
    ("blocks", 4, "blocks is 4; wanted a whole number from 2 to 3"),
    ("seed", -1, "seed is -1; wanted a whole number from 0"),
    ("min_labels", 1025, "min_labels is 1025; wanted a whole number from 0 to 1024"),
    ("lr", -0.1, "lr is -0.1; wanted a number from 0 to 10"),
    ("lr", np.nan, "lr is nan; wanted a number"),
    ("lr", "0.1", "lr is '0.1'; wanted a number"),
    ("momentum", 1, "momentum is 1; wanted a number from 0 to 0.9999"),
    ("mu", -1, "mu is -1; wanted a number from 0 to 1e[+]06"),
    ("beta", 0, "beta is 0; wanted a number from 1e-06"),
    ("early_stop", 1.1, "early_stop is 1.1; wanted a number from 0 to 1"),
    ("lam", -1, "lam is -1; wanted a number from 0"),
    ("sigma", 0, "sigma is 0; wanted a number from 0.0001"),
    ("balance", 2, "balance is 2; wanted a number from 0 to 1"),
    ("offsets", (), "offsets has 0 distances; wanted 1 to 16, such as"),
    ("offsets", (1,) * 17, "offsets has 17 distances; wanted 1 to 16"),
    ("offsets", (1, 0), "offsets is 0; wanted a whole number from 1 to 1024"),
    ("offsets", (1.5,), "offsets is 1.5; wanted a whole number"),
    ("offsets", 2, "offsets is 2; wanted"),
    ("diagonals", "no", "diagonals is 'no'; wanted"),
    ("soft_guide", 2, "soft_guide is 2; wanted"),
    ("silhouette", "yes", "silhouette is 'yes'; wanted"),
]


def test_option_out_of_range():
    for name, value, message in BAD_OPTIONS:
        residual = name in ("objective", "lam", "sigma", "offsets", "balance")
        base = {} if residual else {"objective": "dynaguide"}
        with case(name, repr(value)), pytest.raises(InputError, match=message):
            RefineOptions(**(base | {name: value}))


FOREIGN = {
    "residual": {
        "skip": "own", "weighting": "scf", "mu": 2.0, "beta": 10.0, "continuity": "huber",
        "diagonals": True, "mapping": "index_modulo", "final_bn": "image", "soft_guide": True,
    },
    "dynaguide": {"lam": 1.0, "sigma": 0.1, "offsets": (1,), "balance": 0.5},
    "dynaseg": {"lam": 1.0, "sigma": 0.1, "offsets": (1,), "balance": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("objective", FOREIGN)
def test_option_of_another_objective_is_refused(objective):
    for name, value in FOREIGN[objective].items():
        message = f"objective '{objective}' does not use {name}\n  fix:"
        with case(name), pytest.raises(InputError, match=message):
            RefineOptions(objective=objective, **{name: value})


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="learning_rate"):
        RefineOptions(learning_rate=0.1)


# --- checks ------------------------------------------------------------------------------------

IMAGE = np.zeros((2, 3, 3), np.float32)
LABELS = np.zeros((2, 3), np.int32)
SOFT = np.ones((2, 3, 4), np.float32)


BAD_IMAGES = [
    (IMAGE[..., :2], r"image has shape \(2, 3, 2\); wanted \(H, W, 3\)"),
    (IMAGE[0], r"image has shape \(3, 3\); wanted \(H, W, 3\)"),
    (IMAGE[:0], r"image has shape \(0, 3, 3\), which holds nothing"),
    (IMAGE - 0.01, r"image has values from -0.01 to -0.01; wanted \[0, 1\]\n  fix: divide"),
    (IMAGE + 255, r"image has values from 255 to 255; wanted \[0, 1\]"),
    (IMAGE + np.nan, "image has 18 NaN or infinite values\n  fix: clean it first"),
    (IMAGE.astype(complex), "image has dtype complex128; wanted"),
    (None, "image has dtype object; wanted"),
    ([["a"]], "image has dtype <U1; wanted"),
]


def test_check_image_refuses():
    for image, message in BAD_IMAGES:
        with case(message), pytest.raises(InputError, match=message):
            checks.check_image(image)


BAD_GUIDES = [
    (LABELS[:1], r"guide has shape \(1, 3\); wanted \(2, 3, C\) probabilities or \(2, 3\)"),
    (SOFT[None], r"guide has shape \(1, 2, 3, 4\); wanted"),
    (SOFT[..., :0], r"guide has shape \(2, 3, 0\); wanted"),
    (LABELS + 0.5, "guide has dtype float64; labels must be integers"),
    (LABELS - 2, "guide has labels from -2 to -2; wanted -1 to 4095\n  fix: number"),
    (LABELS + 4096, "guide has labels from 4096 to 4096; wanted -1 to 4095"),
    (LABELS - 1, r"guide is unknown \(-1\) everywhere"),
    (SOFT - 1.5, r"guide has negative values \(smallest -0.5\); wanted probabilities\n  fix:"),
    (SOFT * 0, r"guide is zero \(unknown\) everywhere"),
    (SOFT * np.inf, "guide has 24 NaN or infinite values"),
]


def test_check_guide_refuses():
    for guide, message in BAD_GUIDES:
        with case(message), pytest.raises(InputError, match=message):
            checks.check_guide(guide, 2, 3)


def test_checks_convert():
    picture = checks.check_image(np.ones((4, 6, 3), np.uint8)[::2, ::2])
    assert picture.dtype == np.float32 and picture.flags.c_contiguous
    assert checks.check_planes("x", LABELS).shape == (2, 3, 1)
    labels = checks.check_guide((LABELS - 1 + np.eye(2, 3)).astype(np.int8), 2, 3)
    assert labels.dtype == np.int32
    guide = SOFT.copy()
    guide[0] = 0
    scaled = checks.check_guide(guide, 2, 3)
    assert not scaled[0].any() and (scaled[1] == 0.25).all()
    assert type(checks.check_count("n", np.int64(3), 1, 3)) is int
    assert checks.check_positive("x", np.float32(0.5)) == 0.5


# --- silhouette --------------------------------------------------------------------------------


def slow_silhouette(points, labels):
    """Follow Rousseeuw (1987) point by point."""
    scores = []
    for i, point in enumerate(points):
        distance = np.linalg.norm(points - point, axis=1)
        own = labels == labels[i]
        if own.sum() == 1:
            scores.append(0.0)
            continue
        a = distance[own].sum() / (own.sum() - 1)
        b = min(distance[labels == k].mean() for k in set(labels) - {labels[i]})
        scores.append((b - a) / max(a, b))
    return np.mean(scores)


@pytest.mark.parametrize("clusters", [2, 3, 7])
def test_mean_silhouette(rng, clusters):
    points = rng.standard_normal((40, 3))
    labels = rng.integers(0, clusters, 40)
    labels[:2] = clusters, clusters + 2  # two clusters of one point, and a number not used
    distance = np.linalg.norm(points[:, None] - points, axis=-1)
    assert mean_silhouette(distance, labels) == pytest.approx(slow_silhouette(points, labels))


def blobs(rng, colours, height=60, width=50):
    """Draw bands of these colours with a little noise."""
    bands = np.repeat(np.array(colours), height // len(colours), axis=0)[:, None]
    image = np.repeat(bands, width, axis=1) + rng.normal(0, 0.01, (len(bands), width, 3))
    return np.clip(image, 0, 1).astype(np.float32)


COLOURS = [(0.9, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.9), (0.9, 0.9, 0.1), (0.5, 0.5, 0.5)]


@pytest.mark.parametrize("count", [3, 4, 5])
def test_count_of_colour_blobs(rng, count):
    pytest.importorskip("cv2", reason="needs OpenCV, which clusters the colours")
    image = blobs(rng, COLOURS[:count])
    assert best_cluster_count(image) == count
    assert best_cluster_count(image) == best_cluster_count(image)


def test_count_of_few_colours_is_one():
    pytest.importorskip("cv2", reason="needs OpenCV, which clusters the colours")
    image = np.full((9, 11, 3), 0.5, np.float32)
    assert best_cluster_count(image) == 1
    image[:4] = 0.1
    assert best_cluster_count(image) == 1
    image[0] = 0.9
    assert best_cluster_count(image) == 3


def test_silhouette_option_sets_the_floor(rng):
    pytest.importorskip("cv2", reason="needs OpenCV, which clusters the colours")
    image = blobs(rng, COLOURS[:4])
    result = runtime.refine(
        image, objective="dynaseg", channels=16, steps=60, silhouette=True, min_labels=0
    )
    assert result.stats["label_floor"] == 4
    assert result.stats["clusters"] >= 4


def test_distinct_rows_are_those_of_numpy():
    for shape in ((1, 3), (2, 3), (500, 3), (400, 1)):
        for levels in (1, 2, 5, 1000):
            with case(shape, f"{levels} levels") as rng:
                rows = rng.integers(-levels, levels, shape).astype(np.float32)
                assert distinct_rows(rows) == len(np.unique(rows, axis=0))


# --- numbers of NumPy ----------------------------------------------------------------------------


def scalars(value):
    """The value as Python's number, and as NumPy's scalars and arrays without axes."""
    kinds = (np.int64, np.uint8, np.int32) if isinstance(value, int) else (np.float64, np.float32)
    return [value, *(kind(value) for kind in kinds), *(np.array(value, kind) for kind in kinds)]


def test_numpy_s_numbers_are_numbers():
    """The stored numbers are Python's, so that equal options are equal, hashable and JSON."""
    for name, value in [
        ("steps", 3), ("channels", 16), ("blocks", 3), ("seed", 7), ("min_labels", 2),
        ("lr", 0.25), ("lr", 1), ("momentum", 0.5), ("lam", 2.0), ("sigma", 0.5), ("balance", 0.5),
        ("early_stop", 0.5),
    ]:  # fmt: skip
        plain = RefineOptions(**{name: value})
        for given in scalars(value):
            with case(name, repr(given)):
                options = RefineOptions(**{name: given})
                assert type(getattr(options, name)) is type(value)
                assert options == plain and hash(options) == hash(plain)
                assert json.dumps(asdict(options)) == json.dumps(asdict(plain))
                assert pickle.loads(pickle.dumps(options)) == copy.deepcopy(options) == plain


def test_numpy_s_numbers_in_both_configs():
    plain = RefineConfig(scale=0.25, max_pixels=200, objective="dynaguide", soft_guide=True)
    given = RefineConfig(
        scale=np.float32(0.25), max_pixels=np.array(200), objective="dynaguide",
        soft_guide=np.True_,
    )  # fmt: skip
    assert given == plain and json.dumps(asdict(given)) == json.dumps(asdict(plain))
    plain, given = (
        FilterConfig(radius=3, eps=0.5),
        FilterConfig(radius=np.uint8(3), eps=np.half(0.5)),
    )
    assert given == plain and json.dumps(asdict(given)) == json.dumps(asdict(plain))
    for offsets in ([1, 4], np.array([1, 4]), (np.int64(1), np.array(4))):
        with case(repr(offsets)):
            found = RefineOptions(offsets=offsets).offsets
            assert found == (1, 4) and [type(n) for n in found] == [int, int]


HUGE = 10**5000  # Python writes no integer of more than 4300 digits


def test_values_that_are_no_numbers():
    for value in [
        True, np.True_, np.array(True), 1j, np.complex64(1), "1", [1], np.array([1]),
        np.datetime64(1, "s"), np.timedelta64(1, "s"), Decimal(1), float("nan"), np.float32("nan"),
        HUGE, -HUGE, np.zeros((40, 40)),
    ]:  # fmt: skip
        with case(type(value).__name__):
            messages = []
            for check in [
                lambda value=value: checks.check_count("n", value, 0, 9),
                lambda value=value: checks.check_positive("n", value),
                lambda value=value: RefineOptions(steps=value),
                lambda value=value: RefineOptions(lr=value),
                lambda value=value: FilterConfig(radius=value),
                lambda value=value: FilterConfig(eps=value),
                lambda value=value: RefineConfig(scale=value),
            ]:
                with pytest.raises(InputError) as caught:
                    check()
                messages.append(caught.value.message)
            for message in messages:
                assert " is " in message and "wanted" in message
                assert "\n" not in message and len(message) < 200
    for value in (HUGE, -HUGE):
        with pytest.raises(InputError, match=r"n is an integer of 16610 bits; wanted 0 to 9"):
            checks.check_count("n", value, 0, 9)


def test_a_whole_float_is_no_whole_number():
    for value in (512.0, np.float32(512)):
        with case(repr(value)), pytest.raises(InputError, match=r"(?s)wanted a whole.*int\(n\)"):
            checks.check_count("n", value, 1, 1000)
    assert checks.is_count(np.int8(3), 3, 3) and not checks.is_count(np.int8(4), 3, 3)
    assert not checks.is_count(3.0) and not checks.is_count(np.True_)
    assert checks.is_number(np.float16(0.5), 0, 1) and not checks.is_number(np.float64("nan"))


def test_sizes_become_tuples_of_python_s_numbers():
    for size in ([512, 384], (512, 384), np.array([512, 384]), (np.int64(512), np.array(384))):
        with case(repr(size)):
            found = checks.as_numbers(size)
            assert found == (512, 384) and [type(n) for n in found] == [int, int]
    assert checks.as_numbers(np.uint16(512)) == 512 and checks.as_numbers("big") == "big"
