"""Convolution, forward and backward, against the reference."""

import numpy as np
import pytest
from cases import case
from exactness import EPS32, assert_as_exact_as_float32, assert_is_gradient, wide

from runtime import _core
from runtime.core import reference

# height, width, channels in, channels out. Widths: one below, at and above 4, 8 and 16 lanes, the
# tiles of 4 to 14 rows, primes, and the 64-pixel chunks of the weight gradient. Channels: the same
# about one to four and seven vectors.
SHAPES = [
    (1, 1, 100, 33), (2, 1, 5, 17), (5, 1, 17, 5), (1, 2, 3, 100), (1, 3, 3, 16),
    (1, 4, 16, 3), (1, 5, 14, 15), (2, 6, 15, 14), (5, 7, 33, 32), (1, 8, 32, 33), (2, 9, 3, 100),
    (5, 12, 100, 5), (2, 13, 16, 100), (1, 14, 100, 16), (5, 15, 5, 5), (2, 16, 17, 33),
    (5, 17, 1, 17), (2, 24, 48, 64), (1, 31, 32, 14), (2, 61, 15, 32), (1, 64, 14, 48),
    (5, 65, 3, 33), (1, 65, 100, 100), (2, 131, 33, 100), (5, 131, 5, 1), (17, 7, 16, 16),
]  # fmt: skip
# For options of a kernel: one pixel, odd tails of the pixels and of the channels, many blocks.
FEW_SHAPES = [(1, 1, 100, 33), (5, 17, 1, 17), (5, 65, 3, 33)]

# 1x1; 3x3 by tiles; 3x3 by taps, for few channels.
each_kernel = pytest.mark.parametrize(
    "kernel, few", [(1, False), (3, False), (3, True)], ids=["1x1", "tiles", "taps"]
)


def draw(rng, shape, kernel):
    """Return dy, x, weight, bias."""
    h, w, n_in, n_out = shape
    shapes = (h, w, n_out), (h, w, n_in), (n_out, n_in, kernel, kernel), (n_out,)
    return [rng.standard_normal(s, dtype=np.float32) for s in shapes]


@each_kernel
def test_conv(isa, kernel, few):
    for shape, relu in [(s, False) for s in SHAPES] + [(s, True) for s in FEW_SHAPES]:
        with case(shape, "relu" if relu else "no relu") as rng:
            _, x, weight, bias = draw(rng, shape, kernel)
            y = _core.conv(x, weight, bias, relu, few, isa=isa)
            assert_as_exact_as_float32(y, reference.conv, x, weight, bias, relu)


@each_kernel
def test_conv_backward(isa, kernel, few):
    for shape in SHAPES:
        with case(shape) as rng:
            dy, x, weight, _ = draw(rng, shape, kernel)
            gradients = _core.conv_backward(dy, x, weight, few, isa=isa)
            assert_as_exact_as_float32(gradients, reference.conv_backward, dy, x, weight)


@each_kernel
def test_conv_of_whole_numbers_has_no_error(isa, kernel, few):
    for shape in FEW_SHAPES:
        with case(shape) as rng:
            dy, x, weight, bias = (np.round(2 * a) for a in draw(rng, shape, kernel))
            y = _core.conv(x, weight, bias, few=few, isa=isa)
            np.testing.assert_array_equal(y, reference.conv(*map(wide, (x, weight, bias))))
            gradients = _core.conv_backward(dy, x, weight, few, isa=isa)
            exact = reference.conv_backward(*map(wide, (dy, x, weight)))
            for ours, true in zip(gradients, exact, strict=True):
                np.testing.assert_array_equal(ours, true)


def test_conv_of_one_pixel(rng, isa):
    """Tiles mix the taps: their error is relative to the kernel, of which a pixel sees one tap."""
    for _ in range(100):
        dy, x, weight, bias = draw(rng, (1, 1, 1, 1), 3)
        bound = 4 * EPS32 * np.abs(weight).max()
        y = _core.conv(x, weight, bias, isa=isa)
        exact = reference.conv(*map(wide, (x, weight, bias)))
        assert abs(y - exact) <= bound * abs(x) + EPS32 * abs(exact)
        ours = _core.conv_backward(dy, x, weight, isa=isa)
        exact = reference.conv_backward(*map(wide, (dy, x, weight)))
        assert abs(ours[0] - exact[0]) <= bound * abs(dy)
        np.testing.assert_allclose(ours[1], exact[1], rtol=4 * EPS32, atol=0)


def test_conv_of_a_norm(isa):
    """Pixels outside the picture are zero after the norm, not before it."""

    def normed(x, weight, bias, norm):
        mean, scale, shift = norm
        return reference.conv((x - mean) * scale + shift, weight, bias, False)

    for shape in FEW_SHAPES:
        with case(shape) as rng:
            _, x, weight, bias = draw(rng, shape, 3)
            norm = rng.standard_normal((3, shape[2]), dtype=np.float32)
            y = _core.conv(x, weight, bias, norm=norm, isa=isa)
            assert_as_exact_as_float32(y, normed, x, weight, bias, norm)


def test_reference_gradients_are_those_of_conv():
    for kernel in (1, 3):
        for shape in ((1, 1, 2, 3), (1, 7, 3, 2), (5, 6, 2, 4)):
            with case(shape, f"kernel {kernel}") as rng:
                dy, x, weight, bias = map(wide, draw(rng, shape, kernel))
                dx, dw, db = reference.conv_backward(dy, x, weight)
                for gradient, at, conv in (
                    (dx, x, lambda v, w=weight, b=bias: reference.conv(v, w, b)),
                    (dw, weight, lambda v, x=x, b=bias: reference.conv(x, v, b)),
                    (db, bias, lambda v, x=x, w=weight: reference.conv(x, w, v)),
                ):
                    assert_is_gradient(
                        gradient, lambda v, dy=dy, conv=conv: (dy * conv(v)).sum(), at, rng
                    )
