"""The losses of DynaSeg and DynaGuide: values and gradients beside loops over pixels."""

import math

import numpy as np
import pytest
from cases import case

torch = pytest.importorskip("torch", reason="the losses are of torch")

from export.train import dynaseg_losses as losses  # noqa: E402


def response(h, w, k=4, seed=0):
    """(1, k, h, w) float64 with a gradient. Some differences are above 1, some below."""
    values = np.random.default_rng(seed).normal(0, 1.5, (1, k, h, w))
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def similarity_by_loop(r):
    """CE(r, argmax r) of (k, h, w) and its gradient."""
    k, h, w = r.shape
    loss, gradient = 0.0, np.zeros_like(r)
    for y in range(h):
        for x in range(w):
            best = max(range(k), key=lambda c: r[c, y, x])
            total = sum(math.exp(r[c, y, x]) for c in range(k))
            loss -= math.log(math.exp(r[best, y, x]) / total) / (h * w)
            for c in range(k):
                share = math.exp(r[c, y, x]) / total
                gradient[c, y, x] = (share - (c == best)) / (h * w)
    return loss, gradient


def continuity_by_loop(r, huber, diagonals):
    """The continuity loss of (k, h, w) and its gradient."""
    k, h, w = r.shape
    loss, gradient = 0.0, np.zeros_like(r)
    for dy, dx in [(1, 0), (0, 1), (1, 1), (1, -1)][: 4 if diagonals else 2]:
        pairs = [
            ((c, y, x), (c, y + dy, x + dx))
            for c in range(k) for y in range(h) for x in range(w)
            if y + dy < h and 0 <= x + dx < w
        ]  # fmt: skip
        for here, there in pairs:
            d = r[there] - r[here]
            if huber and abs(d) < 1:
                value, slope = d * d / 2, d
            else:
                value, slope = abs(d) - (0.5 if huber else 0), math.copysign(1, d)
            loss += value / len(pairs)
            gradient[there] += slope / len(pairs)
            gradient[here] -= slope / len(pairs)
    return loss, gradient


def assert_equal_to_loop(loss, r, wanted):
    loss.backward()
    np.testing.assert_allclose(float(loss.detach()), wanted[0], rtol=1e-12)
    np.testing.assert_allclose(r.grad[0].numpy(), wanted[1], atol=1e-14)


def test_similarity_equals_a_loop():
    r = response(5, 3)
    labels = losses.own_labels(r)
    assert_equal_to_loop(losses.similarity(r, labels), r, similarity_by_loop(r.detach()[0].numpy()))
    assert losses.cluster_count(labels) == len(np.unique(r.detach().numpy().argmax(1)))


def test_continuity_equals_a_loop():
    for huber in (False, True):
        for diagonals in (False, True):
            for size in ((4, 5), (1, 3), (3, 1)):
                with case(huber, diagonals, size):
                    r = response(*size)
                    found = losses.continuity(r, huber=huber, diagonals=diagonals)
                    wanted = continuity_by_loop(r.detach()[0].numpy(), huber, diagonals)
                    assert_equal_to_loop(found, r, wanted)


def test_one_pixel_has_no_continuity():
    assert float(losses.continuity(response(1, 1), diagonals=True)) == 0


def test_weights_are_the_published_ones():
    """FSF is 100 / 15 = 6.67 and 5 / 15 = 0.33; SCF is 0.5 with 100 clusters and 10 with 5."""
    fsf = [losses.continuity_weight("fsf", k, 50, 15) for k in (100, 5)]
    scf = [losses.continuity_weight("scf", k, 50, 15) for k in (100, 5)]
    np.testing.assert_allclose(fsf + scf, [20 / 3, 1 / 3, 0.5, 10])
    assert losses.continuity_weight("fixed", 7, 3.0, 15) == 3.0
