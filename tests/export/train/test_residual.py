"""The losses of the residual objective in torch against the reference in float64."""

import numpy as np
import pytest
from cases import case
from exactness import relative_error
from scenes import scene

torch = pytest.importorskip("torch", reason="the network is trained by torch: pip install torch")

from export.train.residual import residual_terms, scores  # noqa: E402
from runtime import RefineOptions  # noqa: E402
from runtime.core import reference  # noqa: E402

CASES = (
    ({}, (13, 17)),
    ({"offsets": (1, 3, 40), "lam": 1.5, "sigma": 0.3, "balance": 0.0}, (13, 17)),
    ({"balance": 1.0}, (2, 2)),
    ({}, (1, 9)),
    ({}, (1, 1)),
)


def drawn(size, unknown):
    """A picture, a guide with unknown pixels, and a correction, all in float64."""
    image, guide, _ = scene(*size)
    rng = np.random.default_rng(2)
    if unknown:
        guide[rng.random(size) < 0.3] = 0
    return image.astype(np.float64), guide.astype(np.float64), rng.normal(size=guide.shape)


def planes(array):
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def test_losses_and_gradient_are_the_reference():
    for options, size in CASES:
        for unknown in (False, True):
            with case(options, size, unknown):
                config = RefineOptions(**options)
                image, guide, correction = drawn(size, unknown)
                fixed = reference.prepare(config, image, guide)
                z = correction + fixed["prior"]
                dz, (total, _, pair, by_guide) = reference.losses(
                    config, z, z.argmax(-1), guide, np.zeros(1), fixed
                )
                own = planes(correction).requires_grad_()
                found = scores(own, planes(guide))
                np.testing.assert_allclose(found.detach(), z.transpose(2, 0, 1), rtol=1e-12)
                terms = residual_terms(found, planes(image), planes(guide), config)
                loss = sum(terms.values())
                loss.backward()
                assert terms.keys() == {"guide", "pair"}
                np.testing.assert_allclose(float(terms["guide"].detach()), by_guide, rtol=1e-12)
                np.testing.assert_allclose(
                    float(terms["pair"].detach()), config.lam * pair, rtol=1e-12, atol=1e-15
                )
                np.testing.assert_allclose(float(loss.detach()), total, rtol=1e-12, atol=1e-15)
                assert relative_error(own.grad, dz.transpose(2, 0, 1)) < 1e-12


def test_one_class_has_no_loss_and_no_gradient():
    image = drawn((6, 7), False)[0]
    own = torch.zeros(1, 6, 7, dtype=torch.float64, requires_grad=True)
    whole = torch.ones(1, 6, 7, dtype=torch.float64)
    loss = sum(residual_terms(scores(own, whole), planes(image), whole, RefineOptions()).values())
    loss.backward()
    assert abs(float(loss.detach())) < 1e-15 and not own.grad.any()
