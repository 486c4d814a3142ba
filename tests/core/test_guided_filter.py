"""Guided filter and joint upsampling, against the reference whose cost grows with r^2."""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest
from cases import case
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

# For properties of the filter: one pixel, an odd tail of pixels and values, many blocks of values.
FEW_CASES = [CASES[0], CASES[3], CASES[5]]
each_guidance = pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])


def draw(rng, sizes):
    """Return guidance and values."""
    h, w, g, k = sizes[:4]
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


def test_guided_filter(isa):
    for sizes in CASES:
        with case(sizes) as rng:
            guidance, values = draw(rng, sizes)
            result = native(guidance, values, *sizes[4:], isa)
            assert_as_exact_as_float32(result, filtered, guidance, values, *sizes[4:])
            # The sums are float64: only the rounding of the stored coefficients is left.
            exact = filtered(wide(guidance), wide(values), *sizes[4:])
            assert relative_error(result, exact) <= 2 * EPS32


def test_coefficients(isa):
    for sizes in CASES:
        with case(sizes) as rng:
            guidance, values = draw(rng, sizes)
            result = _core.guided_coefficients(guidance, values, *sizes[4:], 1, isa)
            exact = reference.guided_coefficients(wide(guidance), wide(values), *sizes[4:])
            assert relative_error(result, by_rows(exact)) <= 2 * EPS32


def test_guidance_far_from_zero(isa):
    for sizes in FEW_CASES:
        with case(sizes) as rng:
            guidance, values = draw(rng, sizes)
            guidance = np.float32(0.1) * guidance + np.float32(1000)
            result = native(guidance, values, *sizes[4:], isa)
            exact = reference.guided_coefficients(wide(guidance), wide(values), *sizes[4:])
            error = np.abs(result - reference.apply_coefficients(exact, wide(guidance)))
            # Stored as float32, a . guidance and b lose this much, though their sum is small.
            largest = reference.apply_coefficients(abs(exact), wide(guidance)).max()
            assert error.max() <= 2 * EPS32 * largest


@each_guidance
def test_constant_values_are_unchanged(isa, channels):
    for radius in (1, 2, 3, 4, 8, 100):
        with case(f"radius {radius}") as rng:
            guidance = rng.random((13, 17, channels), np.float32)
            values = np.full((13, 17, 3), [0.3, -7, 0], np.float32)
            result = native(guidance, values, radius, 1e-4, isa)
            np.testing.assert_allclose(result, values, rtol=2 * EPS32)


@each_guidance
def test_flat_guidance_returns_the_box_mean_of_box_means(rng, isa, channels):
    guidance, values = draw(rng, (11, 13, channels, 3))
    result = native(np.full_like(guidance, 0.4), values, 2, 1e-3, isa)
    exact = reference.box_mean(reference.box_mean(wide(values), 2), 2)
    assert relative_error(result, exact) <= 2 * EPS32


@each_guidance
def test_linear_in_the_values(rng, isa, channels):
    guidance, first = draw(rng, (11, 13, channels, 3))
    second = rng.random(first.shape, np.float32)
    both = native(guidance, 2 * first - 3 * second, 2, 1e-3, isa)
    apart = [native(guidance, v, 2, 1e-3, isa) for v in (first, second)]
    np.testing.assert_allclose(both, 2 * apart[0] - 3 * apart[1], atol=16 * EPS32)


def test_same_bits_on_any_number_of_threads(isa):
    for radius in (1, 3, 64):
        for threads in (2, 5):
            with case(f"radius {radius}", f"{threads} threads") as rng:
                guidance, values = draw(rng, (53, 31, 3, 5))
                one = native(guidance, values, radius, 1e-3, isa)
                many = native(guidance, values, radius, 1e-3, isa, threads)
                np.testing.assert_array_equal(one, many)


def test_window_as_large_as_the_picture_is_the_largest(rng, isa):
    guidance, values = draw(rng, (7, 11, 3, 2))
    np.testing.assert_array_equal(
        native(guidance, values, 10, 1e-3, isa), native(guidance, values, 2**20, 1e-3, isa)
    )


def test_public_filter():
    for sizes in CASES:
        with case(sizes) as rng:
            guidance, values = draw(rng, sizes)
            options = {"radius": sizes[4], "eps": sizes[5]}
            result = runtime.guided_filter(guidance, values, **options, threads=2)
            np.testing.assert_array_equal(
                result, native(guidance, values, *sizes[4:], runtime.isa())
            )
            flat = runtime.guided_filter(guidance, values[..., 0], **options)
            np.testing.assert_array_equal(flat, result[..., 0])
            if sizes[2] == 1:
                grey = runtime.guided_filter(guidance[..., 0], values, **options)
                np.testing.assert_array_equal(grey, result)


def test_bytes_are_levels_of_255(isa):
    for sizes in CASES:
        with case(sizes) as rng:
            guidance, values = draw(rng, sizes)
            guidance = (guidance * 256).astype(np.uint8)
            result = _core.guided_filter(guidance, values, *sizes[4:], 1, isa)
            exact = filtered(wide(guidance) / 255, wide(values), *sizes[4:])
            assert relative_error(result, exact) <= 4 * EPS32
            many = _core.guided_filter(guidance, values, *sizes[4:], 5, isa)
            np.testing.assert_array_equal(result, many)


# --- joint upsampling: its parts ---------------------------------------------------------------


@each_guidance
def test_apply_coefficients(isa, channels):
    for low, high in (
        ((1, 1), (5, 7)), ((1, 6), (1, 17)), ((5, 1), (13, 3)), ((7, 5), (31, 29)),
        ((6, 7), (12, 21)), ((7, 11), (8, 11)),
    ):  # fmt: skip
        with case(low, high) as rng:
            coefficients = rng.standard_normal((*low, channels + 1, 5), dtype=np.float32)
            guidance = rng.random((*high, channels), np.float32)
            rows = by_rows(coefficients)
            result = _core.apply_coefficients(rows, guidance, 1, isa)
            assert_as_exact_as_float32(result, reference.apply_coefficients, coefficients, guidance)
            many = _core.apply_coefficients(rows, guidance, 5, isa)
            np.testing.assert_array_equal(result, many)


def resized(planes, height, width):
    """Average each plane down on its own."""
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV, which averages the guidance down")
    size, area = (width, height), cv2.INTER_AREA
    return np.dstack([cv2.resize(p, size, interpolation=area) for p in np.moveaxis(planes, -1, 0)])


def assert_shrinks(planes, exact, size, isa):
    """Shrink to (height, width) on one and on three threads."""
    result = _core.shrink(planes, *size, 1, isa)
    np.testing.assert_allclose(result, exact, atol=4 * EPS32)
    np.testing.assert_array_equal(result, _core.shrink(planes, *size, 3, isa))


def test_shrink(isa):
    for channels in (1, 3, 5):
        for size in ((1, 1), (3, 5), (5, 7), (12, 29), (13, 29)):
            with case(size, f"{channels} channels") as rng:
                planes = rng.random((13, 29, channels), np.float32)
                assert_shrinks(planes, resized(planes, *size), size, isa)


def test_shrink_bytes(isa):
    for channels, width in ((1, 29), (3, 29), (3, 700)):
        for size in ((1, 1), (2, 5), (5, 7), (12, 29), (13, 29)):
            with case(size, f"width {width}", f"{channels} channels") as rng:
                picture = rng.integers(0, 256, (13, width, channels), np.uint8)
                assert_shrinks(picture, resized(picture / 255, *size), size, isa)


def test_shrink_bytes_by_whole_factors(isa):
    """The core sums the bytes of colours as whole numbers, in 16 bits where the sums fit."""
    h, w = 3, 7
    for fy, fx in ((1, 2), (2, 2), (4, 4), (3, 5), (16, 16), (1, 256), (1, 257)):
        with case((fy, fx)) as rng:
            shape = h * fy, w * fx, 3
            for picture in (rng.integers(0, 256, shape, np.uint8), np.full(shape, 255, np.uint8)):
                exact = (picture / 255).reshape(h, fy, w, fx, 3).mean((1, 3))
                assert_shrinks(picture, exact, (h, w), isa)


@each_guidance
def test_public_filter_of_bytes(channels):
    """A picture of bytes, also as a view that is not contiguous."""
    for size, options in (((37, 300), {}), ((37, 300), {"subsample": 2}), ((9, 70), {})):
        with case(size, options) as rng:
            picture = rng.integers(0, 256, (37, 300, channels), np.uint8)
            values = rng.random((*size, 3), np.float32)
            result = runtime.guided_filter(picture, values, **options)
            levels = runtime.guided_filter(picture / np.float32(255), values, **options)
            np.testing.assert_allclose(result, levels, atol=1e-5)
            backwards = np.ascontiguousarray(picture[..., ::-1])[..., ::-1]
            assert not (channels == 3 and backwards.flags.c_contiguous)
            again = runtime.guided_filter(backwards, values, **options)
            np.testing.assert_array_equal(result, again)


def test_out():
    for two_dimensional in (False, True):
        for options in ({}, {"subsample": 3}):
            with case("2-D" if two_dimensional else "3-D", options) as rng:
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
        with pytest.raises(ValueError, match="out is not a C-contiguous float32 array"):
            _core.guided_filter(guidance, values, 1, 1e-3, 1, out=out)


@pytest.mark.parametrize("name", ["guidance", "values"])
def test_no_nan_hides_in_the_fast_form(rng, name):
    for value in (np.nan, np.inf):
        for at in ((0, 0), (16, 32), (7, 31), (16, 0)):
            arrays = {k: rng.random((17, 33, 3), np.float32) for k in ("guidance", "values")}
            arrays[name][(*at, 1)] = value
            with pytest.raises(InputError, match=f"{name} has 1 NaN or infinite values"):
                runtime.guided_filter(**arrays, subsample=4)


def upsampled(low, values, guidance, radius):
    """Apply the reference's coefficients of a low guidance to the guidance."""
    coefficients = reference.guided_coefficients(low, values, radius, 1e-3)
    return reference.apply_coefficients(coefficients, guidance)


@each_guidance
def test_filter_of_low_values(channels):
    for size in ((5, 7), (1, 1), (13, 6)):
        with case(size) as rng:
            guidance = rng.random((13, 29, channels), np.float32)
            values = rng.random((*size, 4), np.float32)
            result = runtime.guided_filter(guidance, values, radius=2, eps=1e-3)
            low = resized(guidance, *size)
            assert_as_exact_as_float32(result, upsampled, low, values, guidance, 2)


@each_guidance
def test_subsample(channels):
    for subsample, radius, low_radius in ((2, 8, 4), (3, 2, 1), (4, 7, 2)):
        with case(f"subsample {subsample}") as rng:
            guidance, values = draw(rng, (13, 30, channels, 70))
            size = [-(-n // subsample) for n in (13, 30)]
            low = resized(guidance, *size), resized(values, *size)
            result = runtime.guided_filter(guidance, values, radius=radius, subsample=subsample)
            assert_as_exact_as_float32(result, upsampled, *low, guidance, low_radius)


def test_subsampling_whole_blocks_averages_them(rng):
    guidance, values = draw(rng, (8, 12, 3, 5))
    blocks = [a.reshape(4, 2, 6, 2, -1).mean((1, 3)) for a in (guidance, values)]
    coefficients = _core.guided_coefficients(*blocks, 2, 1e-3, 1)
    np.testing.assert_allclose(
        runtime.guided_filter(guidance, values, radius=4, subsample=2),
        _core.apply_coefficients(coefficients, guidance, 1),
        atol=16 * EPS32,
    )


# --- joint upsampling to labels ----------------------------------------------------------------


@pytest.mark.parametrize("guided", [False, True], ids=["bilinear", "guided"])
def test_joint_upsample(isa, guided):
    sizes = ((1, 1), (5, 7)), ((1, 5), (1, 16)), ((7, 11), (31, 29)), ((6, 7), (6, 7))
    for classes in (1, 14, 64, 65, 100):
        for low, high in sizes:
            with case(low, high, f"{classes} classes") as rng:
                assert_upsamples(rng, isa, low, high, guided, classes)


def assert_upsamples(rng, isa, low, high, guided, classes):
    """Compare with the reference, on one thread and on several."""
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


def test_confidence_is_cut_to_0_1(isa):
    image = np.zeros((5, 6, 3), np.uint8)
    for value, cut in ((-0.5, 0), (0.25, 0.25), (1.5, 1)):
        with case(f"value {value}"):
            _, confidence = _core.joint_upsample(np.full((2, 1, 2, 3), value), image, 1, isa)
            assert (confidence == np.float32(cut)).all()


def test_public_joint_upsample(rng):
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

GUIDANCE, VALUES = np.zeros((4, 5, 3), np.float32), np.zeros((4, 5, 2), np.float32)
BAD_FILTERS = [
    (GUIDANCE, VALUES, {"radius": 0}, "radius is 0; wanted 1 to 1048576"),
    (GUIDANCE, VALUES, {"radius": 1.5}, "radius is 1.5; wanted a whole number"),
    (GUIDANCE, VALUES, {"radius": True}, "radius is True; wanted a whole number"),
    (GUIDANCE, VALUES, {"eps": 0}, "eps is 0; wanted a number above 0"),
    (GUIDANCE, VALUES, {"eps": np.nan}, "eps is nan; wanted a number above 0"),
    (GUIDANCE, VALUES, {"eps": np.inf}, "eps is inf; wanted a number above 0"),
    (GUIDANCE, VALUES, {"eps": "1"}, "eps is '1'; wanted a number above 0"),
    (GUIDANCE, VALUES, {"subsample": 0}, "subsample is 0; wanted 1 to"),
    (GUIDANCE, VALUES, {"threads": -1}, "threads is -1; wanted 1 to"),
    (GUIDANCE, VALUES, {"threads": 1.5}, "threads is 1.5; wanted a whole number"),
    (GUIDANCE, VALUES, {"device": "tpu"}, "device is 'tpu'; wanted 'cpu', 'cuda'"),
    (GUIDANCE, VALUES, {"out": VALUES[0]}, r"out is \(5, 2\) float32; wanted \(4, 5, 2\) float32"),
    (GUIDANCE, VALUES, {"out": VALUES.astype(float)}, r"out is \(4, 5, 2\) float64; wanted"),
    (GUIDANCE, VALUES, {"out": "x"}, r"out is str; wanted \(4, 5, 2\) float32"),
    (GUIDANCE, VALUES, {"out": np.asfortranarray(VALUES)}, "out is not C-contiguous"),
    (GUIDANCE, GUIDANCE, {"out": GUIDANCE}, "out shares memory with the guidance"),
    (GUIDANCE[..., :2], VALUES, {}, r"guidance has shape \(4, 5, 2\); wanted .* 1 or 3\)"),
    (GUIDANCE, VALUES[None], {}, r"values has shape \(1, 4, 5, 2\); wanted"),
    (GUIDANCE + np.nan, VALUES, {}, "guidance has 60 NaN or infinite values\n  fix: clean it"),
    (GUIDANCE, VALUES[:0], {}, r"values has shape \(0, 5, 2\), which holds nothing"),
    (GUIDANCE, VALUES.astype(complex), {}, "values has dtype complex128; wanted"),
    (GUIDANCE[:3], VALUES, {}, r"values \(4, 5\) are larger than the guidance \(3, 5\)\n  fix:"),
]


def test_filter_refuses():
    for guidance, values, options, message in BAD_FILTERS:
        with case(message), pytest.raises(InputError, match=message):
            runtime.guided_filter(guidance, values, **options)


PICTURE = np.zeros((8, 10, 3), np.uint8)
BAD_UPSAMPLINGS = [
    (PICTURE / 255, VALUES, {}, r"image is \(8, 10, 3\) float64; wanted \(H, W, 3\) uint8"),
    (PICTURE[..., 0], VALUES, {}, r"image is \(8, 10\) uint8; wanted"),
    (PICTURE[:0], VALUES, {}, r"image is \(0, 10, 3\) uint8; wanted"),
    (PICTURE[:3], VALUES, {}, r"scores \(4, 5\) are larger than the image \(3, 10\)"),
    (PICTURE, VALUES + np.inf, {}, "scores has 40 NaN or infinite values"),
    (PICTURE, VALUES, {"low_image": GUIDANCE[1:]}, r"low_image is \(3, 5\); wanted the size of"),
    (PICTURE, VALUES, {"low_image": GUIDANCE + 2}, r"low_image has values from 2 to 2; wanted"),
    (PICTURE, VALUES, {"low_image": GUIDANCE, "radius": 0}, "radius is 0; wanted 1 to"),
    (PICTURE, VALUES, {"low_image": GUIDANCE, "eps": -1.0}, "eps is -1.0; wanted a number"),
    (PICTURE, VALUES, {"threads": -1}, "threads is -1; wanted 1 to"),
    (PICTURE, VALUES, {"device": "tpu"}, "device is 'tpu'; wanted 'cpu', 'cuda'"),
]


def test_joint_upsample_refuses():
    for image, scores, options, message in BAD_UPSAMPLINGS:
        with case(message), pytest.raises(InputError, match=message):
            runtime.joint_upsample(image, scores, **options)


@pytest.mark.skipif(bool(cuda_devices()), reason="there is a GPU here")
def test_without_a_gpu_the_reason_is_told():
    with pytest.raises(MissingBackend, match=r"(?i)cuda.*\n  fix: "):
        runtime.guided_filter(GUIDANCE, VALUES, device="cuda")


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
    with pytest.warns(DeprecationWarning, match="argument target of Refiner is now isa"):
        runtime.Refiner(3, 4, classes=2, target=runtime.isa())
    with pytest.raises(InputError, match="guided_filter got guide and guidance"):
        runtime.guided_filter(guidance=image, values=scores, guide=image)
