"""The bound, the gradient check and the picture that all tests share.

Imports NumPy, pytest and runtime only: tests/aarch64.sh runs tests where nothing else is installed.
"""

import signal

import numpy as np
import pytest
from cuda_module import cuda, cuda_path, cudart  # noqa: F401  (fixtures)

import runtime

# A runner that is a background job ignores Ctrl-C, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

EPS32 = float(np.finfo(np.float32).eps)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(params=runtime.targets())
def target(request):
    """Name each instruction set that this machine runs."""
    return request.param


def relative_error(result, exact):
    """Return |result - exact| / |exact| in the l2 norm; where exact is zero, |result|."""
    result, exact = np.asarray(result, np.float64), np.asarray(exact, np.float64)
    assert result.shape == exact.shape
    return np.linalg.norm(result - exact) / (np.linalg.norm(exact) or 1.0)


def wide(argument):
    """Turn float arrays into float64 ones and leave everything else."""
    is_float = isinstance(argument, np.ndarray) and argument.dtype.kind == "f"
    return argument.astype(np.float64) if is_float else argument


def assert_as_exact_as_float32(result, reference_function, *args, times=2):
    """Compare each output with the reference in float64.

    The error may be ``times`` that of the reference in float32, plus 4 float32 eps: where the
    reference's few roundings happen to cancel, its own error is no bound. Integers must be equal.

    The norm is l2, because rounding spreads over an output and its largest element is a matter of
    luck, while a mistake is not small: even one element of 100,000 that is wrong by 1 % of the
    typical magnitude shows as 3e-5, a hundred times the bound.
    """
    exact, single = reference_function(*map(wide, args)), reference_function(*args)
    if not isinstance(exact, tuple):
        result, exact, single = (result,), (exact,), (single,)
    for i, (ours, true, rounded) in enumerate(zip(result, exact, single, strict=True)):
        if np.asarray(true).dtype.kind in "iu":
            np.testing.assert_array_equal(ours, true)
            continue
        bound = times * relative_error(rounded, true) + 4 * EPS32
        assert relative_error(ours, true) <= bound, f"output {i}"


def assert_is_gradient(gradient, loss, at, rng):
    """Check a float64 gradient of loss(x) by central differences along random directions."""
    for _ in range(4):
        step = 1e-5 * rng.standard_normal(at.shape)
        difference = (loss(at + step) - loss(at - step)) / 2
        assert abs(difference - (gradient * step).sum()) <= 1e-6 * np.linalg.norm(step * gradient)


def scene(height, width, classes=5, seed=3):
    """Draw noisy coloured discs and a guide that mostly knows them.

    Returns image (H, W, 3), soft guide (H, W, classes), both float32, and hard guide (H, W) int32.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    truth = np.zeros((height, width), int)
    for k in range(1, classes):
        top, left = rng.uniform(0, height), rng.uniform(0, width)
        radius = rng.uniform(0.15, 0.4) * min(height, width)
        truth[(y - top) ** 2 + (x - left) ** 2 < radius**2] = k
    colours = rng.uniform(0.1, 0.9, (classes, 3))
    image = colours[truth] + 0.1 * (x / width)[..., None]
    image = np.clip(image + rng.normal(0, 0.03, image.shape), 0, 1).astype(np.float32)
    scores = np.exp(2 * np.eye(classes)[truth] + rng.normal(0, 0.7, (height, width, classes)))
    soft = (scores / scores.sum(-1, keepdims=True)).astype(np.float32)
    return image, soft, soft.argmax(-1).astype(np.int32)
