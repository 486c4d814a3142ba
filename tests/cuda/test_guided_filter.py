"""The CUDA kernels, run on the host by cuda_shim.h and compared with the reference."""

import ctypes
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from cases import case

from runtime import _core
from runtime.core import reference


@pytest.fixture(scope="module")
def shim(cuda_path):
    """The functions of cuda_filter.cpp."""
    return ctypes.CDLL(str(cuda_path))


def run(shim, guide, values, radius, eps, *, coefficients=False):
    (h, w, g), k = guide.shape, values.shape[2]
    out = np.empty((h, g + 1, k, w) if coefficients else (h, w, k), np.float32)
    shim.filter(
        *pointers(out, guide, values), h, w, g, k, radius, ctypes.c_float(eps), int(coefficients)
    )
    return out


def exact(guide, values, radius, eps):
    return reference.guided_coefficients(
        guide.astype(np.float64), values.astype(np.float64), radius, eps
    )


RADII = (1, 8, 40, 10**6)
SIZES = {  # size of the picture: radii; large pictures take seconds
    **dict.fromkeys([(1, 1), (1, 37), (33, 1), (5, 7), (32, 32), (70, 31)], RADII),
    (64, 64): (8, 10**6),
    (65, 129): (1, 40),
    (97, 131): (8,),
}


def apply(coefficients, guide):
    return np.einsum("hwgk,hwg->hwk", coefficients[..., :-1, :], guide) + coefficients[..., -1, :]


def test_guided_filter(shim):
    """Within 2e-5 of float64, also where windows are so small that covariances are singular."""
    for size, channels in product(SIZES, (1, 3)):
        with case(size, channels):
            rng = np.random.default_rng(size[0])
            guide = rng.random((*size, channels), dtype=np.float32)
            guide[size[0] // 2 :] *= 0.2
            values = rng.random((*size, 3), dtype=np.float32)
            for radius in SIZES[size]:
                cut = min(radius, 200)
                wanted = exact(guide, values, cut, 1e-3)
                found = run(shim, guide, values, radius, 1e-3, coefficients=True).transpose(
                    0, 3, 1, 2
                )
                np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4)
                out = run(shim, guide, values, radius, 1e-3)
                np.testing.assert_allclose(out, apply(wanted, guide), rtol=0, atol=2e-5)


def test_classes_are_summed_some_at_a_time(shim):
    """A class has the same bits as alone. cuda_filter.cpp has so little scratch memory that classes
    are filtered in turns of eight."""
    for channels, classes in product((1, 3), (1, 4, 5, 9, 17)):
        with case(channels, classes):
            rng = np.random.default_rng(classes)
            guide = rng.random((21, 70, channels), dtype=np.float32)
            values = rng.random((21, 70, classes), dtype=np.float32)
            found = run(shim, guide, values, 3, 1e-3)
            for k in range(classes):
                alone = run(shim, guide, values[..., k : k + 1].copy(), 3, 1e-3)
                np.testing.assert_array_equal(found[..., k], alone[..., 0])
            found = run(shim, guide, values, 3, 1e-3, coefficients=True)
            for k in range(classes):
                alone = run(shim, guide, values[..., k : k + 1].copy(), 3, 1e-3, coefficients=True)
                np.testing.assert_array_equal(found[:, :, k], alone[:, :, 0])


def test_flat_and_dark_pictures_keep_their_values(shim):
    values = np.random.default_rng(0).random((40, 50, 2), dtype=np.float32)
    for level in (0.0, 0.02, 0.97, 1.0):
        guide = np.full((40, 50, 3), level, np.float32)
        wanted = reference.box_mean(reference.box_mean(values.astype(np.float64), 4), 4)
        np.testing.assert_allclose(run(shim, guide, values, 4, 1e-6), wanted, atol=1e-4)


def test_long_walks_do_not_drift(shim):
    """A sliding sum starts again after each chunk, so that its error does not grow."""
    rng = np.random.default_rng(0)
    guide = (0.9 + 0.1 * rng.random((3, 1500, 3))).astype(np.float32)
    values = rng.random((3, 1500, 1), dtype=np.float32)
    wanted = exact(guide, values, 8, 1e-3)
    value = apply(wanted, guide)
    found = run(shim, guide, values, 8, 1e-3)
    np.testing.assert_allclose(found, value, atol=5e-6)
    tall = run(shim, guide.swapaxes(0, 1).copy(), values.swapaxes(0, 1).copy(), 8, 1e-3)
    np.testing.assert_allclose(tall.swapaxes(0, 1), value, atol=5e-6)


UPSAMPLINGS = [
    ((1, 1), (1, 1)),
    ((1, 1), (7, 5)),
    ((5, 7), (33, 41)),
    ((24, 31), (97, 131)),
    ((9, 9), (9, 9)),
]


JOINT = [(0, 1), (0, 5), (3, 1), (3, 14)]  # channels of the guidance, classes


def pointers(*arrays):
    return [a.ctypes.data_as(ctypes.c_void_p) for a in arrays]


def test_apply_coefficients(shim):
    for (low, size), (channels, classes) in product(UPSAMPLINGS, [(1, 1), (3, 1), (3, 9)]):
        with case(low, size, channels, classes):
            rng = np.random.default_rng(0)
            coefficients = rng.standard_normal((*low, channels + 1, classes)).astype(np.float32)
            guide = rng.random((*size, channels), dtype=np.float32)
            out = np.empty((*size, classes), np.float32)
            laid = np.ascontiguousarray(coefficients.transpose(0, 2, 3, 1))
            shim.apply(*pointers(out, laid, guide), *low, *size, channels, classes)
            wanted = reference.apply_coefficients(
                *(a.astype(np.float64) for a in (coefficients, guide))
            )
            np.testing.assert_allclose(out, wanted, rtol=0, atol=5e-6)


def test_joint_upsample(shim):
    for (low, size), (channels, classes) in product(UPSAMPLINGS, JOINT):
        with case(low, size, channels, classes):
            rng = np.random.default_rng(0)
            coefficients = rng.standard_normal((*low, channels + 1, classes)).astype(np.float32)
            image = rng.integers(0, 256, (*size, 3), np.uint8)
            labels, confidence = np.empty(size, np.int32), np.empty(size, np.float32)
            laid = np.ascontiguousarray(coefficients.transpose(0, 2, 3, 1))
            shim.joint_upsample(
                *pointers(labels, confidence, laid, image), *low, *size, channels, classes
            )
            guide = image[..., :channels] / 255
            values = reference.apply_coefficients(coefficients.astype(np.float64), guide)
            best = np.take_along_axis(values, labels[..., None], -1)[..., 0]
            np.testing.assert_allclose(
                best, values.max(-1), rtol=0, atol=1e-5
            )  # near-ties may differ
            np.testing.assert_allclose(confidence, values.max(-1).clip(0, 1), rtol=0, atol=1e-5)
            if classes > 1:  # the first of equals
                laid[:, :, 1] = laid[:, :, 0]
                shim.joint_upsample(
                    *pointers(labels, confidence, laid, image), *low, *size, channels, classes
                )
                assert not (labels == 1).any()


def test_shrink(shim):
    for (low, size), channels in product(UPSAMPLINGS, (1, 3)):
        with case(low, size, channels):
            planes = np.random.default_rng(0).random((*size, channels), dtype=np.float32)
            out = np.empty((*low, channels), np.float32)
            shim.shrink(*pointers(out, planes), *low, *size, channels)
            np.testing.assert_allclose(out, _core.shrink(planes, *low, 1), rtol=0, atol=1e-6)


MISTAKES = ["left behind", "left behind", "a GPU would refuse"]


def test_the_shim_sees_mistakes(cuda_path):
    """A kernel with a mistake ends the process; the shim says what is wrong."""
    for which, message in enumerate(MISTAKES):
        with case(which, message):
            code = f"import ctypes; ctypes.CDLL({str(cuda_path)!r}).mistake({which})"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            assert done.returncode != 0
            assert message in done.stderr, done.stderr
