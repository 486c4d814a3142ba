"""The losses of Boosting: against loops over pixels in float64, with gradients and invariances."""

import itertools
import math

import numpy as np
import pytest
from cases import case

import runtime

torch = pytest.importorskip("torch", reason="heads are trained by torch: pip install torch")

from torch.nn import functional  # noqa: E402

from export.train.boosting_losses import (  # noqa: E402
    MARGIN,
    directions,
    distillation,
    equivariance,
    feature_regularisation,
    guided_filter_grey,
    image_regularisation,
    ncut,
    zoomed,
)

SIZES = ((2, 2), (2, 4), (4, 3))
THRESHOLD, WEAK = 0.2, 1e-3


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def drawn_features(height, width, seed=0):
    return drawn(2, 3, height, width, seed=seed) - 0.4


def reflected(i, n):
    """The index of a pixel that may be one beyond the border."""
    return -i if i < 0 else 2 * (n - 1) - i if i >= n else i


def neighbours_by_loops(mask, weight):
    """The mean over pictures, pixels and 8 neighbours; ``weight`` of (picture, pixel, pixel)."""
    count, _, height, width = mask.shape
    total = 0.0
    for n, y, x in itertools.product(range(count), range(height), range(width)):
        for dy, dx in itertools.product((-1, 0, 1), repeat=2):
            if (dy, dx) != (0, 0):
                p, q = (y, x), (reflected(y + dy, height), reflected(x + dx, width))
                total += weight(n, p, q) * (mask[n, 0][p] - mask[n, 0][q]) ** 2
    return total / (8 * count * height * width)


def affinity(features, n, p, q):
    a, b = features[n][:, p[0], p[1]], features[n][:, q[0], q[1]]
    return a @ b / math.sqrt((a @ a) * (b @ b))


def ncut_by_loops(mask, features):
    total = 0.0
    positions = [*itertools.product(*map(range, mask.shape[2:]))]
    for n in range(len(mask)):
        s = {p: min(max(mask[n, 0][p], MARGIN), 1 - MARGIN) for p in positions}
        cut = inside = outside = 0.0
        for p, q in itertools.product(positions, repeat=2):
            w = 1.0 if affinity(features, n, p, q) > THRESHOLD else WEAK
            cut += s[p] * w * (1 - s[q])
            inside += s[p] * w
            outside += (1 - s[p]) * w
        total += cut / inside + cut / outside
    return total / len(mask)


def cases_of_losses(height, width):
    """Each loss of a mask, and what loops over pixels compute for the mask as an array."""
    features, images = drawn_features(height, width), 2 * drawn(2, 3, height, width, seed=2)
    units = directions(features)

    arrays = {"image": images.numpy(), "feature": features.numpy()}

    def alike(n, p, q):
        image = arrays["image"][n]
        return math.exp(-((image[:, p[0], p[1]] - image[:, q[0], q[1]]) ** 2).sum())

    def joined(n, p, q):
        return 1.0 if affinity(arrays["feature"], n, p, q) > THRESHOLD else WEAK

    return {
        "ncut": (
            lambda mask: ncut(mask, units, THRESHOLD, WEAK),
            lambda mask: ncut_by_loops(mask, arrays["feature"]),
        ),
        "image": (
            lambda mask: image_regularisation(mask, images),
            lambda mask: neighbours_by_loops(mask, alike),
        ),
        "feature": (
            lambda mask: feature_regularisation(mask, units, THRESHOLD, WEAK),
            lambda mask: neighbours_by_loops(mask, joined),
        ),
    }


def test_losses_equal_loops_over_pixels():
    for size in SIZES:
        mask = drawn(2, 1, *size, seed=1)
        mask[0, 0, 0, 0], mask[1, 0, 1, 1] = 0, 1  # clamped by ncut
        for name, (loss, by_loops) in cases_of_losses(*size).items():
            with case(name, size):
                expected = by_loops(mask.numpy())
                assert loss(mask).item() == pytest.approx(expected, rel=1e-12)
                assert loss(mask.float()).item() == pytest.approx(expected, rel=1e-5)


def test_gradients_equal_finite_differences():
    for size in SIZES:
        mask = drawn(2, 1, *size, seed=1).requires_grad_()
        for name, (loss, by_loops) in cases_of_losses(*size).items():
            with case(name, size):
                (found,) = torch.autograd.grad(loss(mask), mask)
                expected, values = np.zeros(mask.shape), mask.detach().numpy()
                for i in np.ndindex(*mask.shape):
                    step = np.zeros(mask.shape)
                    step[i] = 1e-6
                    expected[i] = (by_loops(values + step) - by_loops(values - step)) / 2e-6
                np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-8)


def test_the_cut_is_the_same_for_a_mask_and_its_inverse_and_low_at_a_true_border():
    features = drawn_features(6, 6)
    units = directions(features)
    mask = drawn(2, 1, 6, 6, seed=1)
    found = ncut(mask, units, THRESHOLD, WEAK).item()
    assert ncut(1 - mask, units, THRESHOLD, WEAK).item() == pytest.approx(found, rel=1e-12)
    halves = torch.zeros(1, 2, 6, 6, dtype=torch.float64)
    halves[:, 0, :, :2], halves[:, 1, :, 2:] = 1, 1
    right = torch.where(torch.arange(6) < 2, 1.0, 0.0).double().expand(1, 1, 6, 6)
    assert ncut(right, directions(halves), THRESHOLD, WEAK) < 0.01
    assert ncut(right.flip(2, 3), directions(halves), THRESHOLD, WEAK) > 0.5
    flat = ncut(torch.full_like(right, 0.5), directions(halves), THRESHOLD, WEAK)
    assert flat.item() == pytest.approx(1)


def test_directions_do_not_depend_on_lengths_and_get_no_gradient():
    features = drawn_features(3, 4)
    lengths = 0.1 + drawn(2, 1, 3, 4)
    torch.testing.assert_close(directions(lengths * features), directions(features))
    assert not directions(features.requires_grad_()).requires_grad
    assert torch.equal(directions(torch.zeros(1, 3, 2, 2)), torch.zeros(1, 3, 2, 2))


def test_smoothness_is_0_for_flat_masks_and_weighs_flat_images_most():
    step = torch.where(torch.arange(8) < 4, 0.0, 1.0).expand(1, 1, 8, 8)
    edge, flat = 2 * step.expand(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    assert image_regularisation(torch.full((1, 1, 8, 8), 0.3), flat) == 0
    assert image_regularisation(step, edge) < 1e-4 * image_regularisation(step, flat)
    for turned in (lambda x: x.flip(2), lambda x: x.flip(3), lambda x: x.transpose(2, 3)):
        mask, image = drawn(1, 1, 5, 7), drawn(1, 3, 5, 7, seed=1)
        torch.testing.assert_close(
            image_regularisation(turned(mask), turned(image)), image_regularisation(mask, image)
        )


def test_distillation_reaches_both_masks():
    coarse, fine = drawn(2, 1, 3, 4).requires_grad_(), drawn(2, 1, 24, 32, seed=1).requires_grad_()
    # with a factor of 8, the bilinear value is the mean of the 4 pixels in the middle
    middle = fine.detach().unfold(2, 8, 8).unfold(3, 8, 8)[..., 3:5, 3:5].mean((4, 5))
    loss = distillation(coarse, fine)
    expected = ((coarse.detach() - middle) ** 2).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    torch.testing.assert_close(coarse.grad, 2 * (coarse.detach() - middle) / coarse.numel())
    per_part = fine.grad.unfold(2, 8, 8).unfold(3, 8, 8).sum((4, 5))
    torch.testing.assert_close(per_part, -coarse.grad)


def test_zoomed_takes_its_part_of_each_picture():
    x = drawn(3, 2, 8, 12)
    offsets = torch.tensor([[0, 0], [4, 6], [1, 3]])
    expected = [
        functional.interpolate(x[i : i + 1, :, t : t + 4, c : c + 6], (8, 12), mode="bilinear")
        for i, (t, c) in enumerate(offsets.tolist())
    ]
    torch.testing.assert_close(zoomed(x, offsets), torch.cat(expected))


def test_the_target_of_the_equivariance_has_no_gradient():
    student, teacher = (drawn(2, 1, 8, 8, seed=i).requires_grad_() for i in (0, 1))
    guidance = drawn(2, 1, 8, 8, seed=2)
    for given in (None, guidance):
        with case("filter" if given is not None else "no filter"):
            target = teacher.detach()
            if given is not None:
                target = guided_filter_grey(guidance, target, 2, 1e-3)
            target = target.clamp(MARGIN, 1 - MARGIN)
            loss = equivariance(student, teacher, given, 2, 1e-3)
            assert loss.item() == pytest.approx(((student.detach() - target) ** 2).mean().item())
            (found,) = torch.autograd.grad(loss, student)
            torch.testing.assert_close(found, 2 * (student.detach() - target) / student.numel())
            assert torch.autograd.grad(
                equivariance(student, teacher, given, 2, 1e-3), teacher, allow_unused=True
            ) == (None,)
    ones = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    assert equivariance(ones, ones).item() == pytest.approx(MARGIN**2, rel=1e-6)


def test_guided_filter_equals_that_of_the_runtime():
    for height, width, radius in ((40, 30, 9), (7, 25, 9), (12, 12, 2)):
        with case(height, width, radius):
            guidance, values = (drawn(2, 1, height, width, seed=i).float() for i in (0, 1))
            found = guided_filter_grey(guidance, values, radius, 1e-3).numpy()
            for n in range(2):
                expected = runtime.guided_filter(
                    guidance[n, 0].numpy(), values[n, 0].numpy(), radius=radius, eps=1e-3
                )
                np.testing.assert_allclose(found[n, 0], expected, atol=2e-6)
