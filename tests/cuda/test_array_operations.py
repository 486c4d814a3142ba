"""Filters and resizing of arrays on a GPU: the values equal the core's, and every error."""

from itertools import product

import numpy as np
import pytest
from cases import case
from foreign_arrays import FLOATS, WRAPS, Interface, arrays

import runtime
from runtime import _core
from runtime.checks import check_guide, check_image, check_planes
from runtime.core import reference
from runtime.core.resize import resize
from runtime.errors import InputError

FILTERED = [(1, 1), (1, 37), (33, 1), (5, 7), (64, 64), (65, 129), (70, 31)]
UPSAMPLED = [((1, 1), (7, 5)), ((5, 7), (33, 41)), ((24, 31), (97, 131))]
JOINT = [((1, 1), (1, 1)), ((1, 1), (7, 5)), ((13, 17), (53, 61))]


# ---- Values -------------------------------------------------------------------------------------


def test_filter_equals_the_core(cuda):
    for size, channels, wrap in product(FILTERED, (1, 3), WRAPS):
        with case(size, channels, wrap.__name__):
            guide, values = arrays(*size, channels)
            wanted = runtime.guided_filter(guide, values, radius=3)
            found = runtime.guided_filter(guide, values, radius=3, device="cuda")
            assert isinstance(found, np.ndarray)
            np.testing.assert_allclose(found, wanted, atol=2e-5)
            out = runtime.guided_filter(wrap(guide), wrap(values), radius=3, device="cuda:0")
            assert isinstance(out, cuda.Array) and out.shape == values.shape
            np.testing.assert_array_equal(out.numpy(), found)
            mixed = runtime.guided_filter(guide, wrap(values), radius=3, device="cuda")
            np.testing.assert_array_equal(mixed.numpy(), found)
            flat = runtime.guided_filter(
                guide, wrap(values[..., 1].copy()), radius=3, device="cuda"
            )
            assert flat.shape == size
            np.testing.assert_allclose(flat.numpy(), found[..., 1], atol=1e-6)
            flat = runtime.guided_filter(guide, values[..., 1], radius=3, device="cuda")
            np.testing.assert_allclose(flat, found[..., 1], atol=1e-6)


def test_filter_takes_bytes(cuda):
    for channels, subsample, wrap in product((1, 3), (1, 3), WRAPS):
        with case(channels, subsample, wrap.__name__):
            guide, values = arrays(33, 41, channels)
            guide = (guide * 256).astype(np.uint8)
            options = {"radius": 3, "subsample": subsample}
            wanted = runtime.guided_filter(guide, values, **options)
            found = runtime.guided_filter(guide, values, device="cuda", **options)
            np.testing.assert_allclose(found, wanted, atol=3e-5)
            out = runtime.guided_filter(wrap(guide), wrap(values), device="cuda", **options)
            np.testing.assert_array_equal(out.numpy(), found)
            if channels == 1:
                flat = runtime.guided_filter(
                    wrap(guide[..., 0].copy()), values, device="cuda", **options
                )
                np.testing.assert_array_equal(flat.numpy(), found)


def test_upsampling_equals_the_core(cuda):
    for (low, size), wrap in product(UPSAMPLED, WRAPS):
        with case(low, size, wrap.__name__):
            guide, values = arrays(*size)[0], arrays(*low)[1]
            wanted = runtime.guided_filter(guide, values, radius=2)
            out = runtime.guided_filter(wrap(guide), wrap(values), radius=2, device="cuda")
            np.testing.assert_allclose(out.numpy(), wanted, atol=3e-5)
            found = runtime.guided_filter(guide, values, radius=2, device="cuda")
            np.testing.assert_array_equal(out.numpy(), found)


def test_subsampling_equals_the_core(cuda):
    for subsample, wrap in product((2, 5), WRAPS):
        with case(subsample, wrap.__name__):
            guide, values = arrays(43, 57)
            wanted = runtime.guided_filter(guide, values, radius=6, subsample=subsample)
            options = {"radius": 6, "subsample": subsample, "device": "cuda"}
            out = runtime.guided_filter(wrap(guide), wrap(values), **options)
            np.testing.assert_allclose(out.numpy(), wanted, atol=3e-5)
            np.testing.assert_array_equal(
                out.numpy(), runtime.guided_filter(guide, values, **options)
            )


def test_joint_upsample_equals_the_core(cuda):
    for (low, size), guided, wrap in product(JOINT, (False, True), WRAPS):
        with case(low, size, guided, wrap.__name__):
            rng = np.random.default_rng(0)
            image = rng.integers(0, 256, (*size, 3), np.uint8)
            low_image, scores = arrays(*low)
            options = {"low_image": low_image} if guided else {}
            labels, confidence = runtime.joint_upsample(image, scores, **options)
            found = runtime.joint_upsample(image, scores, device="cuda", **options)
            assert isinstance(found[0], np.ndarray)
            np.testing.assert_array_equal(found[0], labels)
            np.testing.assert_allclose(found[1], confidence, atol=1e-4)
            if guided:
                options = {"low_image": wrap(low_image)}
            out = runtime.joint_upsample(wrap(image), wrap(scores), device="cuda", **options)
            np.testing.assert_array_equal(out[0].numpy(), found[0])
            np.testing.assert_array_equal(out[1].numpy(), found[1])
            assert (out[0].dtype, out[1].dtype) == (np.int32, np.float32)
            mixed = runtime.joint_upsample(image, wrap(scores), device="cuda", **options)
            np.testing.assert_array_equal(mixed[0].numpy(), labels)


def test_native_functions_accept_and_return_numpy(cuda):
    """A device is a module: the core's arguments give the core's results."""
    guide, values = arrays(33, 41)
    image = (255 * guide).astype(np.uint8)
    for function, arguments in {
        "guided_coefficients": (guide, values, 3, 1e-3, 1),
        "guided_filter": (guide, values, 3, 1e-3, 1),
        "shrink": (values, 9, 11, 1),
    }.items():
        found = getattr(cuda, function)(*arguments)
        wanted = getattr(_core, function)(*arguments)
        assert isinstance(found, np.ndarray) and found.dtype == wanted.dtype
        np.testing.assert_allclose(found, wanted, atol=2e-4)
    coefficients = _core.guided_coefficients(guide, values, 3, 1e-3, 1)
    found = cuda.apply_coefficients(coefficients, guide, 1, "")
    exact = coefficients.transpose(0, 3, 1, 2).astype(np.float64), guide.astype(np.float64)
    np.testing.assert_allclose(found, reference.apply_coefficients(*exact), atol=2e-5)
    labels, confidence = cuda.joint_upsample(coefficients, image, 1)
    wanted = _core.joint_upsample(coefficients, image, 1)
    np.testing.assert_array_equal(labels, wanted[0])
    np.testing.assert_allclose(confidence, wanted[1], atol=1e-5)
    turned = values.transpose(1, 0, 2)  # NumPy's are made compact, as the core does
    np.testing.assert_array_equal(
        cuda.shrink(turned, 3, 3, 1), cuda.shrink(np.ascontiguousarray(turned), 3, 3, 1)
    )


def test_the_module_names_its_architectures_and_version(cuda):
    assert cuda.architectures() == ["7.5", "9.0", "9.0+ptx"]
    assert cuda.runtime_version() == 13000


# ---- Checks of ops ------------------------------------------------------------------------------


IMAGE = np.zeros((8, 10, 3), np.uint8)
BAD_FILTERS = [
    (
        Interface(FLOATS),
        Interface(FLOATS),
        {},
        r"guidance has shape \(4, 5, 2\); wanted .* 1 or 3\)",
    ),
    (
        Interface(IMAGE.astype(np.int32)),
        FLOATS,
        {},
        "guidance has dtype int32; wanted .*\n  fix: convert",
    ),
    (IMAGE, FLOATS, {"out": FLOATS.copy()}, "out is for device 'cpu' only\n  fix: leave it out"),
    (Interface(FLOATS[..., 0].copy()), Interface(FLOATS[None]), {}, r"values has shape \(1, 4, 5"),
    (Interface(FLOATS[:2, :, 0].copy()), Interface(FLOATS), {}, r"values \(4, 5\) are larger than"),
    (np.full((4, 5), np.nan), Interface(FLOATS), {}, "guidance has 20 NaN or infinite values"),
    (FLOATS[..., 0], Interface(FLOATS), {"stream": -1}, "stream is -1; wanted 0 to"),
    (FLOATS[..., 0], Interface(FLOATS), {"stream": "1"}, "stream is '1'; wanted a whole number"),
    (
        FLOATS[..., 0],
        Interface(FLOATS),
        {"device": "cpu"},
        "values is on a GPU; .*\n  fix: use",
    ),
    (FLOATS[..., 0], FLOATS, {"device": "cpu", "stream": 1}, "stream is 1, but device is 'cpu'"),
    (np.zeros((65536, 5)), FLOATS, {}, "guidance has 65536 rows; a GPU takes 65535 at most"),
]


def test_filter_refuses(cuda):
    for guide, values, options, message in BAD_FILTERS:
        with case(message):
            with pytest.raises(InputError, match=message):
                runtime.guided_filter(guide, values, **({"device": "cuda"} | options))


BAD_UPSAMPLINGS = [
    (Interface(FLOATS), Interface(FLOATS), {}, r"image is \(4, 5, 2\) float32; wanted .* uint8"),
    (Interface(IMAGE[..., 0].copy()), FLOATS, {}, r"image is \(8, 10\) uint8; wanted"),
    (Interface(IMAGE), Interface(FLOATS.astype(np.int32)), {}, "scores has dtype int32; wanted"),
    (Interface(IMAGE[:3]), Interface(FLOATS), {}, r"scores \(4, 5\) are larger than the image"),
    (IMAGE, Interface(FLOATS), {"low_image": Interface(FLOATS)}, r"low_image has shape \(4, 5, 2"),
    (IMAGE, Interface(FLOATS), {"low_image": FLOATS[:2, :, [0, 1, 1]]}, r"low_image is \(2, 5\)"),
    (Interface(IMAGE), FLOATS, {"device": "cpu"}, "image is on a GPU; wanted an array of NumPy"),
]


def test_joint_upsample_refuses(cuda):
    for image, scores, options, message in BAD_UPSAMPLINGS:
        with case(message):
            with pytest.raises(InputError, match=message):
                runtime.joint_upsample(image, scores, **({"device": "cuda"} | options))


def test_values_on_the_gpu_are_not_checked(cuda):
    values = np.full((4, 5, 2), np.nan, np.float32)
    out = runtime.guided_filter(FLOATS[..., 0], Interface(values), device="cuda")
    assert np.isnan(out.numpy()).all()


def test_checks_for_arrays_on_the_gpu(cuda):
    image, soft = cuda.to_device(FLOATS[..., [0, 0, 1]] + 7), cuda.to_device(FLOATS)
    hard = cuda.to_device(np.zeros((4, 5), np.int32))
    assert check_image(image, gpu=True) is image
    assert check_guide(hard, 4, 5, gpu=True) is hard
    assert check_guide(soft, 4, 5, gpu=True) is soft
    with pytest.raises(InputError, match=r"guide has shape \(4, 5\); wanted \(5, 5, C\)"):
        check_guide(hard, 5, 5, gpu=True)
    with pytest.raises(InputError, match=r"guide has dtype int32; wanted .*, float32"):
        check_guide(hard.reshape(4, 5, 1), 4, 5, gpu=True)
    with pytest.raises(InputError, match=r"guide has dtype uint8; wanted .*, int32"):
        check_guide(cuda.to_device(IMAGE[:4, :5, 0]), 4, 5, gpu=True)
    for check in (check_image, lambda a: check_planes("x", a), lambda a: check_guide(a, 4, 5)):
        with pytest.raises(InputError, match="is on a GPU; wanted an array of NumPy"):
            check(soft)


def test_native_functions_check_shapes(cuda):
    guide, values = arrays(5, 6)
    with pytest.raises(InputError, match=r"values has shape \(5, 6\) and dtype float32; wanted 3"):
        cuda.guided_filter(guide, values[..., 0], 1, 1e-3, 1)
    for call in (
        lambda: cuda.guided_filter(guide[:4], values, 1, 1e-3, 1),
        lambda: cuda.guided_coefficients(guide[..., :2], values, 1, 1e-3, 1),
        lambda: cuda.shrink(values, 6, 6, 1),
        lambda: cuda.apply_coefficients(values[None], guide, 1),
        lambda: cuda.joint_upsample(values[None], IMAGE, 1),
    ):
        with pytest.raises(ValueError, match=r"runtime._cuda: \w+: "):
            call()


def test_an_upload_does_not_wait(cuda, cudart):
    """The array is copied through page-locked memory, of which there are two blocks of a size. The
    driver itself copies large arrays, which waits."""
    array = np.arange(97 * 4093, dtype=np.float32).reshape(97, 4093)
    cudart.empty_pool()
    kept, before, had = [], cudart.synchronisations(), cudart.allocations_left()
    cudart.keep_busy(cuda.stream())
    for _ in range(5):
        kept.append(cuda.to_device(array))
        array += 1
    assert cudart.synchronisations() == before
    assert had - cudart.allocations_left() == len(kept) + 2  # the arrays, and page-locked blocks
    cudart.keep_busy(None)
    for i, there in enumerate(kept):
        assert there.numpy()[0, 0] == i
    before = cudart.synchronisations()
    cuda.to_device(np.zeros((2**12 + 1, 2**13), np.uint8))
    assert cudart.synchronisations() == before + 1


SIZES = [
    ((8, 12), (4, 6)), ((9, 13), (4, 6)), ((30, 40), (10, 20)), ((33, 47), (33, 47)),
    ((33, 47), (17, 24)), ((5, 7), (9, 11)), ((5, 70), (9, 11)), ((1, 1), (1, 1)), ((1, 9), (3, 2)),
]  # fmt: skip


def test_working_picture_is_opencvs(cuda):
    """Grey level by grey level; where a mean lies halfway, or a side grows, one beside it."""
    for size, low in SIZES:
        with case(size, low):
            picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
            found = cuda.working_picture(picture, *low) * 255
            wanted = resize(picture, *low).astype(np.float32)
            np.testing.assert_allclose(found, np.round(found), atol=1e-4)
            assert np.abs(found - wanted).max() <= 1.001
            if low[0] <= size[0] and low[1] <= size[1]:
                assert (np.abs(found - wanted) > 0.5).mean() <= 0.01
