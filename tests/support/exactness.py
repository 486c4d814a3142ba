"""How exact a float32 result must be: the bound, and the check of a gradient.

Imports NumPy only: tests/aarch64.sh runs tests where nothing else is installed.
"""

import numpy as np

EPS32 = float(np.finfo(np.float32).eps)


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
