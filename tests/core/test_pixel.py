"""Batch norm, soft-max, the losses and the update, against the reference."""

import numpy as np
import pytest
from cases import case
from exactness import EPS32, assert_as_exact_as_float32, assert_is_gradient, wide

from runtime import _core
from runtime.core import reference
from runtime.core.constants import NORM_EPS

# height, width, channels: single pixels, rows and columns; channels about 1, 2 and 4 to 25 vectors.
SHAPES = [
    (1, 1, 1), (1, 1, 5), (1, 7, 4), (7, 1, 5), (2, 3, 3), (2, 8, 8), (5, 13, 14), (3, 17, 15),
    (4, 9, 16), (6, 5, 17), (3, 31, 33), (17, 2, 65), (2, 4, 100),
]  # fmt: skip
OFFSETS = np.array(
    [(0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0), (2, 2), (2, -2), (40, 0), (0, 50), (40, -50)],
    np.int32,
)

# For options of a kernel: one pixel, an odd tail of the channels, many blocks of channels.
FEW_SHAPES = [(1, 1, 5), (6, 5, 17), (17, 2, 65)]

each_huber = pytest.mark.parametrize("huber", [False, True], ids=["l1", "huber"])
each_guide = pytest.mark.parametrize("kind", ["none", "hard", "soft"])


def shapes_and_options(usual, *others):
    """Return each shape with the usual value of an option, and few shapes with the others."""
    return [(s, usual) for s in SHAPES] + [(s, o) for o in others for s in FEW_SHAPES]


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


# --- batch norm --------------------------------------------------------------------------------


def moments(x, reference):
    return (x - reference).sum((0, 1)), ((x - reference) ** 2).sum((0, 1))


def test_moments(isa):
    for shape, level in shapes_and_options(0, 100):
        with case(shape, f"level {level}") as rng:
            x = normal(rng, 1, shape[0] * shape[1], shape[2]) + np.float32(level)
            assert_as_exact_as_float32(_core.moments(x, x[0, 0], isa=isa), moments, x, x[0, 0])


def test_normalize(isa):
    def normalize(x, mean, scale, shift):
        return (x - mean) * scale + shift

    for shape in SHAPES:
        with case(shape) as rng:
            x, (mean, scale, shift) = normal(rng, *shape), normal(rng, 3, shape[2])
            y = _core.normalize(x, mean, scale, shift, isa=isa)
            assert_as_exact_as_float32(y, normalize, x, mean, scale, shift)


def test_bn_sums(isa):
    def bn_sums(dy, x, mean):
        return dy.sum((0, 1)), (dy * (x - mean)).sum((0, 1))

    for shape in SHAPES:
        with case(shape) as rng:
            (dy, x), mean = normal(rng, 2, *shape), normal(rng, shape[2])
            assert_as_exact_as_float32(_core.bn_sums(dy, x, mean, isa=isa), bn_sums, dy, x, mean)


def batch_norm_backward(dy, x, gamma, relu, isa):
    """Put the kernels together as csrc/cpu/refiner.cpp does: dx, dgamma, dbeta."""
    n = x.shape[0] * x.shape[1]
    first, second = (
        a.astype(np.float64) / n for a in _core.moments(x.reshape(1, n, -1), x[0, 0], isa=isa)
    )
    mean = (x[0, 0] + first).astype(np.float32)
    inv = 1 / np.sqrt(np.maximum(second - first**2, 0) + NORM_EPS)
    dbeta, product = _core.bn_sums(dy, x, mean, isa=isa)
    dx, total = _core.bn_backward(
        dy, x, mean, gamma * inv, dbeta / n, product * inv**2 / n, relu, isa=isa
    )
    np.testing.assert_allclose(
        total, dx.sum((0, 1)), rtol=0, atol=1e-6 * np.abs(dx).sum((0, 1)).max()
    )
    return dx, product * inv, dbeta


def test_bn_backward(isa):
    for shape in SHAPES:
        with case(shape) as rng:
            (dy, x), gamma = normal(rng, 2, *shape), normal(rng, shape[2])
            gradients = batch_norm_backward(dy, x, gamma, False, isa)
            assert_as_exact_as_float32(gradients, reference.batch_norm_backward, dy, x, gamma)


def test_bn_backward_through_relu(isa):
    def through_relu(dy, x, gamma):
        return reference.batch_norm_backward(dy, x, gamma)[0] * (x > 0)

    for shape in FEW_SHAPES:
        with case(shape) as rng:
            (dy, x), gamma = normal(rng, 2, *shape), normal(rng, shape[2])
            x = np.maximum(x, 0)
            dx = batch_norm_backward(dy, x, gamma, True, isa)[0]
            assert_as_exact_as_float32(dx, through_relu, dy, x, gamma)
            assert not dx[x == 0].any()


def test_reference_gradients_are_those_of_batch_norm(rng):
    (dy, x), (gamma, beta) = rng.standard_normal((2, 3, 5, 4)), rng.standard_normal((2, 4))
    dx, dgamma, dbeta = reference.batch_norm_backward(dy, x, gamma)

    def loss(x, gamma, beta):
        return (dy * reference.batch_norm(x, gamma, beta)[0]).sum()

    assert_is_gradient(dx, lambda v: loss(v, gamma, beta), x, rng)
    assert_is_gradient(dgamma, lambda v: loss(x, v, beta), gamma, rng)
    assert_is_gradient(dbeta, lambda v: loss(x, gamma, v), beta, rng)


# --- soft-max ----------------------------------------------------------------------------------


def test_softmax(isa):
    for shape, size in shapes_and_options(1, 1e-6, 30, 1e4):
        with case(shape, f"size {size}") as rng:
            r = normal(rng, *shape) * np.float32(size)
            assert_as_exact_as_float32(_core.softmax(r, isa=isa), reference.softmax, r)


def test_softmax_is_exact_for_small_probabilities_too(isa):
    for shape, size in shapes_and_options(80, 1):
        with case(shape, f"size {size}") as rng:
            r = rng.uniform(-size, size, shape).astype(np.float32)
            p, _, _ = _core.softmax(r, isa=isa)
            exact, _, _ = reference.softmax(wide(r))
            # An argument of up to 2 size is rounded, and the rest a few times. 0 is allowed below
            # exp(-87).
            np.testing.assert_allclose(p, exact, rtol=(2 * size + 4) * EPS32, atol=np.exp(-87))
            np.testing.assert_allclose(p.sum(-1), 1, rtol=4 * EPS32)


def test_first_of_equal_scores_is_the_label(isa):
    for shape in SHAPES:
        with case(shape) as rng:
            r = rng.integers(0, 2, shape).astype(np.float32)
            np.testing.assert_array_equal(_core.softmax(r, isa=isa)[2], r.argmax(-1))
            p, lse, labels = _core.softmax(np.full(shape, -80, np.float32), isa=isa)
            assert not labels.any()
            np.testing.assert_allclose(p, 1 / shape[2], rtol=2 * EPS32)
            np.testing.assert_allclose(lse, np.log(shape[2]) - 80, rtol=2 * EPS32)


# --- losses of dynaguide and dynaseg -----------------------------------------------------------


def draw_cluster_loss(rng, shape, kind, size=3.0):
    """Return the arguments of cluster_loss: seven guide classes share the clusters."""
    h, w, c = shape
    r = normal(rng, *shape) * np.float32(size)
    guide = None
    if kind == "hard":
        guide = rng.integers(-1, 7, (h, w)).astype(np.int32)
    if kind == "soft":
        guide = rng.random((h, w, 7), np.float32)
        guide /= guide.sum(-1, keepdims=True)
        guide[rng.random((h, w)) < 0.2] = 0  # unknown
    table = rng.integers(0, c, 7).astype(np.int32)
    return r, r.argmax(-1).astype(np.int32), guide, table, 1 / (h * w), 0.7 / (h * w)


@each_guide
def test_cluster_loss(isa, kind):
    for shape, size in shapes_and_options(3, 0.01, 80):
        with case(shape, f"size {size}") as rng:
            args = draw_cluster_loss(rng, shape, kind, size)
            result = _core.cluster_loss(*args, isa=isa)
            assert_as_exact_as_float32(result, reference.cluster_loss, *args)


@each_guide
def test_cluster_loss_of_an_unknown_guide_is_that_without(rng, isa, kind):
    r, labels, _, table, own, weight = draw_cluster_loss(rng, (3, 7, 5), kind)
    unknown = {"none": None, "hard": np.full((3, 7), -1), "soft": np.zeros((3, 7, 7))}[kind]
    dr, _, guided = _core.cluster_loss(r, labels, unknown, table, own, weight, isa=isa)
    alone, _, _ = _core.cluster_loss(r, labels, None, table, own, weight, isa=isa)
    np.testing.assert_array_equal(dr, alone)
    assert guided == 0


@each_guide
def test_reference_gradient_is_that_of_cluster_loss(rng, kind):
    r, *rest = map(wide, draw_cluster_loss(rng, (3, 5, 4), kind))
    own, weight = rest[-2:]

    def loss(r):
        _, first, second = reference.cluster_loss(r, *rest)
        return own * first + weight * second

    assert_is_gradient(reference.cluster_loss(r, *rest)[0], loss, r, rng)


SCALES = [(0.5, 0.25, 0, 0), (0.1, 0.2, 0.3, 0.4), (0, 0.7, 0, 0.2), (0, 0, 0, 0)]


@each_huber
def test_spatial_loss(isa, huber):
    def scaled(r, gain, *args):
        return reference.spatial_loss(r * gain, *args)

    for shape, scale in shapes_and_options(SCALES[1], *SCALES):
        with case(shape, f"scale {scale}") as rng:
            r, gain = normal(rng, *shape), normal(rng, shape[2])
            args = r, gain, 0.3, np.array(scale, np.float32), huber
            assert_as_exact_as_float32(_core.spatial_loss(*args, isa=isa), scaled, *args)


@each_huber
def test_spatial_loss_of_a_ramp_is_known(isa, huber):
    r = np.broadcast_to(3 * np.arange(7, dtype=np.float32)[None, :, None], (5, 7, 2)).copy()
    scale = np.ones(4, np.float32)
    dr, loss = _core.spatial_loss(r, np.ones(2), 1.0, scale, huber, isa=isa)
    # A step right is 3, one down is 0; each diagonal sees 3 in (5 - 1) * (7 - 1) pairs.
    assert loss == (2.5 if huber else 3) * 2 * (5 * 6 + 4 * 6 + 4 * 6)
    assert not dr[:, 1:-1].any()
    np.testing.assert_array_equal(dr[:, 0, 0], [-2, -3, -3, -3, -2])
    np.testing.assert_array_equal(dr[:, -1, 0], [2, 3, 3, 3, 2])


@each_huber
def test_reference_gradient_is_that_of_spatial_loss(rng, huber):
    r, scale = rng.standard_normal((4, 5, 3)), np.array([0.1, 0.2, 0.3, 0.4])
    gradient, _ = reference.spatial_loss(r, 0.3, scale, huber)
    assert_is_gradient(
        gradient, lambda v: 0.3 * reference.spatial_loss(v, 0.3, scale, huber)[1], r, rng
    )


# --- the residual loss -------------------------------------------------------------------------


def test_affinity(isa):
    for shape, sigma in shapes_and_options(0.08, 0.02, 1):
        with case(shape, f"sigma {sigma}") as rng:
            image = rng.random((*shape[:2], 3), np.float32)
            ahead, behind = _core.affinity(image, OFFSETS, sigma, isa=isa).swapaxes(0, 1)
            assert_as_exact_as_float32(ahead, reference.affinity, image, OFFSETS, sigma)
            assert_as_exact_as_float32(behind, reference.affinity, image, -OFFSETS, sigma)


def draw_residual_loss(rng, shape):
    """Return the arguments of residual_loss; a fifth of the pixels is unknown."""
    h, w, c = shape
    z, q = normal(rng, *shape) * 2, rng.random(shape, np.float32)
    q /= q.sum(-1, keepdims=True)
    q[rng.random((h, w)) < 0.2] = 0
    image = rng.random((h, w, 3), np.float32)
    e = reference.affinity(image, OFFSETS, 0.5) / np.float32(h * w)
    weight = rng.random(c, np.float32) + np.float32(0.5)
    return z, q, q.max(-1), weight, e, OFFSETS, 4.0


def test_residual_loss(isa):
    for shape in SHAPES:
        with case(shape) as rng:
            args = draw_residual_loss(rng, shape)
            result = _core.residual_loss(*args, isa=isa)
            assert_as_exact_as_float32(result, reference.residual_loss, *args)


def test_residual_loss_of_an_unknown_prior_is_the_pair_loss(rng, isa):
    z, q, _, weight, e, offsets, lam = draw_residual_loss(rng, (5, 7, 6))
    unknown = np.zeros_like(q)
    args = z, unknown, unknown.max(-1), weight, e, offsets
    dz, guide, _ = _core.residual_loss(*args, lam, isa=isa)
    assert guide == 0
    assert np.abs(dz.sum(-1)).max() < 1e-6  # soft-max does not see a constant
    assert not _core.residual_loss(*args, 0.0, isa=isa)[0].any()


def test_residual_loss_of_one_sure_class_is_zero(isa):
    z = np.zeros((4, 6, 3), np.float32)
    z[..., 1] = 200
    e = np.ones((len(OFFSETS), 4, 6), np.float32)
    q = np.eye(3, dtype=np.float32)[np.ones((4, 6), int)]
    dz, guide, pair = _core.residual_loss(z, q, q.max(-1), np.ones(3), e, OFFSETS, 4.0, isa=isa)
    assert guide == pair == 0 and not dz.any()


@pytest.mark.parametrize("shape", [(1, 6, 3), (5, 6, 4)])
def test_reference_gradient_is_that_of_residual_loss(rng, shape):
    z, *rest = map(wide, draw_residual_loss(rng, shape))

    def loss(z):
        _, guide, pair = reference.residual_loss(z, *rest)
        return guide + 4.0 * pair

    assert_is_gradient(reference.residual_loss(z, *rest)[0], loss, z, rng)


# --- the update --------------------------------------------------------------------------------


def test_sgd_step(isa):
    for n in (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 4099):
        with case(f"{n} values") as rng:
            args = *normal(rng, 3, n), 0.1, 0.9
            assert_as_exact_as_float32(_core.sgd_step(*args, isa=isa), reference.sgd_step, *args)
