"""Guided filter, joint upsampling and lift, against the O(r^2) reference."""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest
from exactness import EPS32, assert_as_exact_as_float32, relative_error, wide
from scenes import scene

import runtime
from runtime import _core
from runtime.core import reference
from runtime.device.driver import cuda_devices
from runtime.errors import InputError, MissingBackend

# height, width, guidance channels, values, radius, eps
CASES = [
    (1, 1, 3, 3, 1, 1e-3), (1, 17, 3, 3, 2, 1e-4), (19, 1, 1, 1, 8, 1e-4), (1, 7, 1, 3, 8, 1),
    (7, 1, 3, 65, 1, 1e-2), (13, 17, 3, 65, 2, 1e-3), (11, 13, 1, 65, 8, 1), (5, 7, 3, 3, 8, 1e-2),
    (31, 29, 1, 3, 1, 1e-4), (17, 19, 3, 1, 8, 1e-4), (37, 5, 3, 3, 2, 1e-1),
]  # fmt: skip

each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: "x".join(map(str, c)))
each_guide = pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])


def draw(rng, case):
    """Return guidance and values."""
    h, w, g, k = case[:4]
    return rng.random((h, w, g), np.float32), rng.random((h, w, k), np.float32)


def filtered(guidance, values, radius, eps):
    coefficients = reference.guided_coefficients(guidance, values, radius, eps)
    return reference.apply_coefficients(coefficients, guidance)


def native(guidance, values, radius, eps, isa, threads=1):
    coefficients = _core.guided_coefficients(guidance, values, radius, eps, threads, isa)
    return _core.apply_coefficients(coefficients, guidance, threads, isa)


def by_rows(coefficients):
    """(H, W, G + 1, K) as the core has them: (H, G + 1, K, W)."""
    return np.moveaxis(coefficients, 1, -1)


# --- guided filter -----------------------------------------------------------------------------


@each_case
def test_guided_filter(rng, isa, case):
    guidance, values = draw(rng, case)
    result = native(guidance, values, *case[4:], isa)
    assert_as_exact_as_float32(result, filtered, guidance, values, *case[4:])
    # The sums are float64: what is left is the rounding of stored coefficients.
    assert relative_error(result, filtered(wide(guidance), wide(values), *case[4:])) <= 2 * EPS32


@each_case
def test_coefficients(rng, isa, case):
    guidance, values = draw(rng, case)
    result = _core.guided_coefficients(guidance, values, *case[4:], 1, isa)
    exact = reference.guided_coefficients(wide(guidance), wide(values), *case[4:])
    assert relative_error(result, by_rows(exact)) <= 2 * EPS32


@each_case
def test_guidance_far_from_zero(rng, isa, case):
    guidance, values = draw(rng, case)
    guidance = np.float32(0.1) * guidance + np.float32(1000)
    result = native(guidance, values, *case[4:], isa)
    exact = reference.guided_coefficients(wide(guidance), wide(values), *case[4:])
    error = np.abs(result - reference.apply_coefficients(exact, wide(guidance)))
    # Stored as float32, a . guidance and b lose this much, though their sum is small.
    assert error.max() <= 2 * EPS32 * reference.apply_coefficients(abs(exact), wide(guidance)).max()


@each_guide
@pytest.mark.parametrize("radius", [1, 2, 3, 4, 8, 100])
def test_constants_stay(rng, isa, channels, radius):
    guidance, values = rng.random((13, 17, channels), np.float32), np.zeros((13, 17, 3), np.float32)
    values[:] = [0.3, -7, 0]
    result = native(guidance, values, radius, 1e-4, isa)
    np.testing.assert_allclose(result, values, rtol=2 * EPS32)


@each_guide
def test_flat_guide_gives_the_box_mean_of_box_means(rng, isa, channels):
    guidance, values = draw(rng, (11, 13, channels, 3))
    result = native(np.full_like(guidance, 0.4), values, 2, 1e-3, isa)
    exact = reference.box_mean(reference.box_mean(wide(values), 2), 2)
    assert relative_error(result, exact) <= 2 * EPS32


@each_guide
def test_linear_in_the_values(rng, isa, channels):
    guidance, first = draw(rng, (11, 13, channels, 3))
    second = rng.random(first.shape, np.float32)
    both = native(guidance, 2 * first - 3 * second, 2, 1e-3, isa)
    apart = [native(guidance, v, 2, 1e-3, isa) for v in (first, second)]
    np.testing.assert_allclose(both, 2 * apart[0] - 3 * apart[1], atol=16 * EPS32)


@pytest.mark.parametrize("radius", [1, 2, 3, 8, 64])
def test_same_bits_on_any_number_of_threads(rng, isa, radius):
    guidance, values = draw(rng, (53, 31, 3, 5))
    one = native(guidance, values, radius, 1e-3, isa)
    for threads in (2, 5):
        np.testing.assert_array_equal(one, native(guidance, values, radius, 1e-3, isa, threads))


def test_window_as_large_as_the_picture_is_the_largest(rng, isa):
    guidance, values = draw(rng, (7, 11, 3, 2))
    np.testing.assert_array_equal(
        native(guidance, values, 10, 1e-3, isa), native(guidance, values, 2**20, 1e-3, isa)
    )


@each_case
def test_public_filter(rng, case):
    guidance, values = draw(rng, case)
    result = runtime.guided_filter(guidance, values, radius=case[4], eps=case[5], threads=2)
    np.testing.assert_array_equal(result, native(guidance, values, *case[4:], runtime.isa()))
    flat = runtime.guided_filter(guidance, values[..., 0], radius=case[4], eps=case[5])
    np.testing.assert_array_equal(flat, result[..., 0])
    if case[2] == 1:
        grey = runtime.guided_filter(guidance[..., 0], values, radius=case[4], eps=case[5])
        np.testing.assert_array_equal(grey, result)


@each_case
def test_bytes_are_levels_of_255(rng, isa, case):
    guidance, values = draw(rng, case)
    guidance = (guidance * 256).astype(np.uint8)
    result = _core.guided_filter(guidance, values, *case[4:], 1, isa)
    exact = filtered(wide(guidance) / 255, wide(values), *case[4:])
    assert relative_error(result, exact) <= 4 * EPS32
    np.testing.assert_array_equal(result, _core.guided_filter(guidance, values, *case[4:], 5, isa))


# --- joint upsampling --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "low, high", [((1, 1), (5, 7)), ((1, 6), (1, 17)), ((5, 1), (13, 3)), ((7, 5), (31, 29)),
                  ((6, 7), (12, 21)), ((7, 11), (8, 11))],
)  # fmt: skip
@each_guide
def test_apply_coefficients(rng, isa, channels, low, high):
    coefficients = rng.standard_normal((*low, channels + 1, 5), dtype=np.float32)
    guidance = rng.random((*high, channels), np.float32)
    rows = by_rows(coefficients)
    result = _core.apply_coefficients(rows, guidance, 1, isa)
    assert_as_exact_as_float32(result, reference.apply_coefficients, coefficients, guidance)
    np.testing.assert_array_equal(result, _core.apply_coefficients(rows, guidance, 5, isa))


def resized(planes, height, width):
    """Average each plane down on its own."""
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV, which averages the guidance down")
    size, area = (width, height), cv2.INTER_AREA
    return np.dstack([cv2.resize(p, size, interpolation=area) for p in np.moveaxis(planes, -1, 0)])


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (5, 7), (12, 29), (13, 29)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_shrink(rng, isa, channels, size):
    planes = rng.random((13, 29, channels), np.float32)
    result = _core.shrink(planes, *size, 1, isa)
    np.testing.assert_allclose(result, resized(planes, *size), atol=4 * EPS32)
    np.testing.assert_array_equal(result, _core.shrink(planes, *size, 3, isa))


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (5, 7), (12, 29), (13, 29)])
@pytest.mark.parametrize("channels, width", [(1, 29), (3, 29), (3, 700)])
def test_shrink_bytes(rng, isa, channels, width, size):
    picture = rng.integers(0, 256, (13, width, channels), np.uint8)
    result = _core.shrink(picture, *size, 1, isa)
    np.testing.assert_allclose(result, resized(picture / 255, *size), atol=4 * EPS32)
    np.testing.assert_array_equal(result, _core.shrink(picture, *size, 3, isa))


@pytest.mark.parametrize("factors", [(1, 2), (2, 2), (4, 4), (3, 5), (16, 16), (1, 256), (1, 257)])
def test_shrink_bytes_by_whole_factors(rng, isa, factors):
    """Of colours that is a sum of whole numbers, in 16 bits as far as they reach."""
    size, channels = (3, 7), 3
    shape = (size[0] * factors[0], size[1] * factors[1], channels)
    for picture in (rng.integers(0, 256, shape, np.uint8), np.full(shape, 255, np.uint8)):
        result = _core.shrink(picture, *size, 1, isa)
        exact = (picture / 255).reshape(size[0], factors[0], size[1], factors[1], 3).mean((1, 3))
        np.testing.assert_allclose(result, exact, atol=4 * EPS32)
        np.testing.assert_array_equal(result, _core.shrink(picture, *size, 3, isa))


@pytest.mark.parametrize("options", [{}, {"subsample": 2}, {"low": True}], ids=str)
@each_guide
def test_public_filter_of_bytes(rng, channels, options):
    """A picture as a camera gives it, also as a view that is not contiguous."""
    picture = rng.integers(0, 256, (37, 300, channels), np.uint8)
    values = rng.random((9, 70, 3) if options.pop("low", False) else (37, 300, 3), np.float32)
    result = runtime.guided_filter(picture, values, **options)
    levels = runtime.guided_filter(picture / np.float32(255), values, **options)
    np.testing.assert_allclose(result, levels, atol=1e-5)
    backwards = np.ascontiguousarray(picture[..., ::-1])[..., ::-1]
    assert not (channels == 3 and backwards.flags.c_contiguous)
    np.testing.assert_array_equal(result, runtime.guided_filter(backwards, values, **options))


@pytest.mark.parametrize("options", [{}, {"subsample": 3}], ids=str)
@pytest.mark.parametrize("two_dimensional", [False, True])
def test_out(rng, two_dimensional, options):
    guidance, values = draw(rng, (23, 31, 3, 5))
    values = values[..., 0].copy() if two_dimensional else values
    wanted = runtime.guided_filter(guidance, values, **options)
    out = np.full_like(values, np.nan)
    assert runtime.guided_filter(guidance, values, out=out, **options) is out
    np.testing.assert_array_equal(out, wanted)
    assert runtime.guided_filter(guidance, values, out=values, **options) is values
    np.testing.assert_array_equal(values, wanted)


def test_out_may_be_a_file(rng, tmp_path):
    guidance, values = draw(rng, (23, 31, 3, 5))
    out = np.memmap(tmp_path / "out", np.float32, "w+", shape=values.shape)
    assert runtime.guided_filter(guidance, values, out=out) is out
    np.testing.assert_array_equal(out, runtime.guided_filter(guidance, values))


def test_the_core_takes_no_out_that_does_not_fit(rng):
    guidance, values = draw(rng, (4, 5, 3, 2))
    for out in (values[:3].copy(), values.astype(float), np.asfortranarray(values), [1.0]):
        with pytest.raises(ValueError, match="out is no such array"):
            _core.guided_filter(guidance, values, 1, 1e-3, 1, out=out)


@pytest.mark.parametrize("name", ["guidance", "values"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("at", [(0, 0), (16, 32), (7, 31), (16, 0)])
def test_no_nan_hides_in_the_fast_form(rng, name, value, at):
    arrays = {k: rng.random((17, 33, 3), np.float32) for k in ("guidance", "values")}
    arrays[name][(*at, 1)] = value
    with pytest.raises(InputError, match=f"{name} has 1 NaN or infinite values"):
        runtime.guided_filter(**arrays, subsample=4)


@each_guide
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (13, 6)])
def test_joint_upsampling(rng, channels, size):
    guidance, values = (
        rng.random((13, 29, channels), np.float32),
        rng.random((*size, 4), np.float32),
    )
    low = resized(guidance, *size)

    def upsampled(low, values, guidance):
        coefficients = reference.guided_coefficients(low, values, 2, 1e-3)
        return reference.apply_coefficients(coefficients, guidance)

    result = runtime.guided_filter(guidance, values, radius=2, eps=1e-3)
    assert_as_exact_as_float32(result, upsampled, low, values, guidance)


@each_guide
@pytest.mark.parametrize("subsample, radius, low_radius", [(2, 8, 4), (3, 2, 1), (4, 7, 2)])
def test_subsample(rng, channels, subsample, radius, low_radius):
    guidance, values = draw(rng, (13, 30, channels, 70))
    size = [-(-n // subsample) for n in (13, 30)]
    low = resized(guidance, *size), resized(values, *size)

    def fast(low, values, guidance):
        coefficients = reference.guided_coefficients(low, values, low_radius, 1e-3)
        return reference.apply_coefficients(coefficients, guidance)

    result = runtime.guided_filter(guidance, values, radius=radius, subsample=subsample)
    assert_as_exact_as_float32(result, fast, *low, guidance)


def test_subsampling_whole_blocks_averages_them(rng):
    guidance, values = draw(rng, (8, 12, 3, 5))
    blocks = [a.reshape(4, 2, 6, 2, -1).mean((1, 3)) for a in (guidance, values)]
    coefficients = _core.guided_coefficients(*blocks, 2, 1e-3, 1)
    np.testing.assert_allclose(
        runtime.guided_filter(guidance, values, radius=4, subsample=2),
        _core.apply_coefficients(coefficients, guidance, 1),
        atol=16 * EPS32,
    )


# --- lift --------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 14, 64, 65, 100])
@pytest.mark.parametrize("guided", [False, True], ids=["bilinear", "guided"])
@pytest.mark.parametrize(
    "low, high", [((1, 1), (5, 7)), ((1, 5), (1, 16)), ((7, 11), (31, 29)), ((6, 7), (6, 7))]
)
def test_joint_upsample(rng, isa, low, high, guided, classes):
    image = rng.integers(0, 256, (*high, 3), np.uint8)
    coefficients = rng.random((*low, 4 if guided else 1, classes), np.float32)
    labels, confidence = _core.joint_upsample(by_rows(coefficients), image, 1, isa)
    exact_labels, exact_confidence = reference.joint_upsample(wide(coefficients), image)
    np.testing.assert_allclose(confidence, exact_confidence, atol=16 * EPS32)

    guidance = image / 255 if guided else np.zeros((*high, 0))
    values = reference.apply_coefficients(wide(coefficients), guidance)
    chosen = np.take_along_axis(values, labels[..., None], -1)[..., 0]
    assert (values.max(-1) - chosen <= 16 * EPS32).all()  # another label only at a near tie
    assert (labels != exact_labels).mean() <= 0.01
    for threads in (2, 5):
        again = _core.joint_upsample(by_rows(coefficients), image, threads, isa)
        np.testing.assert_array_equal(again[0], labels)
        np.testing.assert_array_equal(again[1], confidence)


def test_joint_upsample_of_equal_scores_takes_the_first(isa):
    labels, confidence = _core.joint_upsample(
        np.full((2, 1, 70, 3), 0.5), np.zeros((5, 6, 3), np.uint8), 1, isa
    )
    assert not labels.any() and (confidence == 0.5).all()


@pytest.mark.parametrize("value, cut", [(-0.5, 0), (0.25, 0.25), (1.5, 1)])
def test_confidence_is_cut_to_0_1(isa, value, cut):
    coefficients = np.full((2, 1, 2, 3), value)
    _, confidence = _core.joint_upsample(coefficients, np.zeros((5, 6, 3), np.uint8), 1, isa)
    assert (confidence == np.float32(cut)).all()


def test_public_lift(rng):
    image, scores = rng.integers(0, 256, (13, 17, 3), np.uint8), rng.random((5, 6, 3), np.float32)
    low_image = rng.random((5, 6, 3), np.float32)
    plain = runtime.joint_upsample(image, scores)
    guided = runtime.joint_upsample(image, scores, low_image=low_image, radius=1, eps=1e-2)
    coefficients = _core.guided_coefficients(low_image, scores, 1, 1e-2, 1)
    for result, expected in (
        (plain, _core.joint_upsample(by_rows(scores[:, :, None]), image, 1)),
        (guided, _core.joint_upsample(coefficients, image, 1)),
    ):
        np.testing.assert_array_equal(result[0], expected[0])
        np.testing.assert_array_equal(result[1], expected[1])
        assert result[0].dtype == np.int32 and result[1].dtype == np.float32


def test_joint_upsample_follows_the_edges_of_the_picture():
    image, _, labels = scene(60, 80, classes=2)
    image = np.round(255 * np.where(labels[..., None], [0.9, 0.2, 0.1], [0.1, 0.3, 0.8]))
    low_labels = labels.reshape(15, 4, 20, 4).mean((1, 3))
    low_image = (image / 255).reshape(15, 4, 20, 4, 3).mean((1, 3))
    scores = np.stack([1 - low_labels, low_labels], -1)
    image = image.astype(np.uint8)
    guided, _ = runtime.joint_upsample(image, scores, low_image=low_image, radius=1, eps=1e-6)
    plain, _ = runtime.joint_upsample(image, scores)
    assert (guided != labels).mean() < 0.005 < (plain != labels).mean()


# --- bad arguments -----------------------------------------------------------------------------

GUIDE, VALUES = np.zeros((4, 5, 3), np.float32), np.zeros((4, 5, 2), np.float32)
BAD_FILTERS = [
    (GUIDE, VALUES, {"radius": 0}, "radius is 0; wanted 1 to 1048576"),
    (GUIDE, VALUES, {"radius": 1.5}, "radius is 1.5; wanted a whole number"),
    (GUIDE, VALUES, {"radius": True}, "radius is True; wanted a whole number"),
    (GUIDE, VALUES, {"eps": 0}, "eps is 0; wanted a number above 0"),
    (GUIDE, VALUES, {"eps": np.nan}, "eps is nan; wanted a number above 0"),
    (GUIDE, VALUES, {"eps": np.inf}, "eps is inf; wanted a number above 0"),
    (GUIDE, VALUES, {"eps": "1"}, "eps is '1'; wanted a number above 0"),
    (GUIDE, VALUES, {"subsample": 0}, "subsample is 0; wanted 1 to"),
    (GUIDE, VALUES, {"threads": -1}, "threads is -1; wanted 1 to"),
    (GUIDE, VALUES, {"threads": 1.5}, "threads is 1.5; wanted a whole number"),
    (GUIDE, VALUES, {"device": "tpu"}, "device is 'tpu'; wanted 'cpu', 'cuda'"),
    (GUIDE, VALUES, {"out": VALUES[0]}, r"out is \(5, 2\) float32; wanted \(4, 5, 2\) float32"),
    (GUIDE, VALUES, {"out": VALUES.astype(float)}, r"out is \(4, 5, 2\) float64; wanted"),
    (GUIDE, VALUES, {"out": "x"}, r"out is str; wanted \(4, 5, 2\) float32"),
    (GUIDE, VALUES, {"out": np.asfortranarray(VALUES)}, "out is not C-contiguous"),
    (GUIDE, GUIDE, {"out": GUIDE}, "out is part of the guidance"),
    (GUIDE[..., :2], VALUES, {}, r"guidance has shape \(4, 5, 2\); wanted .* 1 or 3\)"),
    (GUIDE, VALUES[None], {}, r"values has shape \(1, 4, 5, 2\); wanted"),
    (GUIDE + np.nan, VALUES, {}, "guidance has 60 NaN or infinite values\n  fix: clean it"),
    (GUIDE, VALUES[:0], {}, r"values has shape \(0, 5, 2\), which holds nothing"),
    (GUIDE, VALUES.astype(complex), {}, "values has dtype complex128; wanted"),
    (GUIDE[:3], VALUES, {}, r"values \(4, 5\) are larger than the guidance \(3, 5\)\n  fix:"),
]


@pytest.mark.parametrize("guidance, values, options, message", BAD_FILTERS)
def test_filter_refuses(guidance, values, options, message):
    with pytest.raises(InputError, match=message):
        runtime.guided_filter(guidance, values, **options)


PICTURE = np.zeros((8, 10, 3), np.uint8)
BAD_LIFTS = [
    (PICTURE / 255, VALUES, {}, r"image is \(8, 10, 3\) float64; wanted \(H, W, 3\) uint8"),
    (PICTURE[..., 0], VALUES, {}, r"image is \(8, 10\) uint8; wanted"),
    (PICTURE[:0], VALUES, {}, r"image is \(0, 10, 3\) uint8; wanted"),
    (PICTURE[:3], VALUES, {}, r"scores \(4, 5\) are larger than the image \(3, 10\)"),
    (PICTURE, VALUES + np.inf, {}, "scores has 40 NaN or infinite values"),
    (PICTURE, VALUES, {"low_image": GUIDE[1:]}, r"low_image is \(3, 5\); wanted the size of"),
    (PICTURE, VALUES, {"low_image": GUIDE + 2}, r"low_image has values from 2 to 2; wanted"),
    (PICTURE, VALUES, {"low_image": GUIDE, "radius": 0}, "radius is 0; wanted 1 to"),
    (PICTURE, VALUES, {"low_image": GUIDE, "eps": -1.0}, "eps is -1.0; wanted a number"),
    (PICTURE, VALUES, {"threads": -1}, "threads is -1; wanted 1 to"),
    (PICTURE, VALUES, {"device": "tpu"}, "device is 'tpu'; wanted 'cpu', 'cuda'"),
]


@pytest.mark.parametrize("image, scores, options, message", BAD_LIFTS)
def test_joint_upsample_refuses(image, scores, options, message):
    with pytest.raises(InputError, match=message):
        runtime.joint_upsample(image, scores, **options)


@pytest.mark.skipif(bool(cuda_devices()), reason="there is a GPU here")
def test_without_a_gpu_the_reason_is_told():
    with pytest.raises(MissingBackend, match=r"(?i)cuda.*\n  fix: "):
        runtime.guided_filter(GUIDE, VALUES, device="cuda")


def test_errors_in_a_parallel_loop_reach_the_caller():
    """Out of memory in any thread is a MemoryError, and the pool goes on working."""
    code = """
import resource, numpy as np
from runtime import _core
guidance = np.random.default_rng(0).random((16, 60000, 3), dtype=np.float32)
small = guidance[:, :50].copy()
expected = _core.guided_coefficients(small, small, 2, 1e-3, 2)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
failed = 0
for extra in range(20, 200, 6):
    resource.setrlimit(resource.RLIMIT_AS, (size + (extra << 20), -1))
    try:
        _core.guided_coefficients(guidance, guidance, 2, 1e-3, 2)
    except MemoryError:
        failed += 1
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    assert (_core.guided_coefficients(small, small, 2, 1e-3, 2) == expected).all()
assert failed > 3, failed
"""
    if not sys.platform.startswith("linux") or platform.machine() == "aarch64":
        pytest.skip("address limits are those of the emulator, or not Linux's")
    if "libasan" in os.environ.get("LD_PRELOAD", "") or "libtsan" in os.environ.get(
        "LD_PRELOAD", ""
    ):
        pytest.skip("sanitizers reserve terabytes of address space")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_old_names_work_with_a_warning():
    image, scores = np.zeros((5, 6, 3), np.uint8), np.full((5, 6, 2), 0.5, np.float32)
    for old, new in (("lift", "joint_upsample"), ("target", "isa"), ("targets", "isas")):
        with pytest.warns(DeprecationWarning, match=f"runtime.{old} is now runtime.{new}"):
            assert getattr(runtime, old) is getattr(runtime, new)
    with pytest.warns(DeprecationWarning, match="argument guide of guided_filter is now guidance"):
        found = runtime.guided_filter(guide=image, values=scores)
    np.testing.assert_array_equal(found, runtime.guided_filter(image, scores))
    with pytest.warns(DeprecationWarning, match="argument target of .* is now isa"):
        runtime.Refiner(3, 4, classes=2, target=runtime.isa())
