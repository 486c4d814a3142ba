"""Boosting as a method of training: settings, options, gradients, and what a few steps find."""

import argparse
import json
from typing import NamedTuple

import pytest
from cases import case

torch = pytest.importorskip("torch", reason="heads are trained by torch: pip install torch")

from torch import nn  # noqa: E402

from export.backbones import Backbone  # noqa: E402
from export.models.boosting import (  # noqa: E402
    IMAGENET_MEAN,
    IMAGENET_STD,
    BoostingHead,
    BoostingNetwork,
    normalised,
    resized,
)
from export.train import boosting_losses as losses  # noqa: E402
from export.train.boosting import (  # noqa: E402
    RULES,
    TERMS,
    Boosting,
    BoostingConfig,
    add_options,
    check,
    from_settings,
)
from runtime.errors import InputError  # noqa: E402


class Batch(NamedTuple):
    pixels: torch.Tensor
    offsets: torch.Tensor


class Colours(nn.Module):
    """The mean colour of each position, and its difference from grey: 6 channels."""

    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, images):
        means = nn.functional.avg_pool2d(images, self.stride)
        return torch.cat([means - 0.5, means - means.mean(1, keepdim=True)], 1)


def backbone(stride=8, features="tokens"):
    return Backbone(
        name="tiny",
        module=Colours(stride),
        channels=6,
        stride=stride,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        source="tiny",
        features=features,
        sha256="0" * 64,
    )


def method(stride=8, **settings):
    """Boosting with a narrow head, for speed."""
    torch.manual_seed(0)
    made = Boosting(BoostingConfig(**settings), backbone(stride))
    made.module = BoostingHead(6, 8)
    return made


def batch(n=2, size=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(n, 3, size, size, generator=generator)
    return Batch(pixels, torch.randint(0, size // 2 + 1, (n, 2), generator=generator))


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 1.5}, "threshold is 1.5; wanted a number from -1 to 1"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"weak": -1}, "weak is -1; wanted a number from 0 to 1"),
        ({"eps": 0}, "eps is 0; wanted a number from 1e-09 to 1"),
        ({"radius": 0}, "radius is 0; wanted a whole number from 1 to 1024"),
        ({"weights": (1, 1)}, r"weights is \(1, 1\); wanted 6 numbers"),
        ({"weights": (1, 1, 1, 1, 1, -1)}, "weights is .*; wanted 6 numbers"),
        ({"eq": 1}, "eq is 1; wanted true or false"),
        ({"gf": None}, "gf is None; wanted true or false"),
        ({"crop": "left"}, "crop is 'left'; wanted one of random, compat"),
        ({"threshold_rule": "guess"}, "threshold_rule is 'guess'; wanted one of published, "),
        ({"threshold_rule": 3}, "threshold_rule is 3; wanted one of"),
        ({"eq": False, "gf": False}, "gf and crop have no effect"),
        ({"eq": False, "crop": "compat"}, "gf and crop have no effect"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(InputError, match=message) as error:
        BoostingConfig(**changes)
    assert error.value.fix


def test_the_defaults_are_the_published_ones():
    config = BoostingConfig()
    assert (config.threshold, config.weak, config.radius, config.eps) == (0.4, 1e-6, 9, 1e-3)
    assert config.weights == (1, 1, 1, 1, 0.01, 0.01)


def test_a_method_is_made_again_from_its_settings():
    first = method(threshold=0.2, gf=False, crop="compat", threshold_rule=RULES[1])
    second = from_settings(json.loads(json.dumps(first.settings())), backbone())
    assert second.config == first.config and second.name == "boosting"
    assert len(second.module.reduce.weight) == 64
    second.module = BoostingHead(6, 8)
    second.module.load_state_dict(first.module.state_dict(), strict=True)
    assert first.held_out(batch()) == second.held_out(batch())
    with pytest.raises(InputError, match="colour"):
        from_settings(first.settings() | {"colour": 1}, backbone())


def test_options():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser)
    assert check(parser.parse_args([])) == BoostingConfig()
    words = ["--crop", "compat", "--no-gf"]
    assert check(parser.parse_args(words)) == BoostingConfig(crop="compat", gf=False)
    assert check(parser.parse_args(["--no-eq"])) == BoostingConfig(eq=False)
    with pytest.raises(InputError, match="imgsz"):
        check(parser.parse_args(["--imgsz", "8"]))


def test_sizes_that_cannot_be_used():
    for stride, size, fix in ((8, 36, "32"), (8, 8, "16"), (7, 35, "42")):
        with case(stride, size), pytest.raises(InputError, match=f"imgsz is {size}") as error:
            method(stride).losses(batch(size=size))
        assert error.value.fix == f"--imgsz {fix}"
    for stride, size in ((7, 28), (8, 16), (14, 28), (16, 48), (32, 64), (4, 12)):
        method(stride).check_size(size)


# Losses


def expected_losses(made, given, offsets, mask_offsets):
    """The terms, from the functions of the losses one by one."""
    config, head, net = made.config, made.module, made.backbone.module
    pixels = given.pixels
    features, images = net(pixels), normalised(pixels, IMAGENET_MEAN, IMAGENET_STD)
    coarse, fine = head(features, images)
    units = losses.directions(features)
    rule = (config.threshold, config.weak)
    parts = losses.zoomed(pixels, offsets)
    part_features = net(parts)
    part_coarse, teacher = head(part_features, normalised(parts, IMAGENET_MEAN, IMAGENET_STD))
    size = fine.shape[2:]
    grey = resized(parts, *size).mean(1, keepdim=True)
    terms = (
        losses.ncut(coarse, units, *rule),
        losses.image_regularisation(fine, resized(images, *size)),
        losses.feature_regularisation(coarse, units, *rule),
        losses.distillation(coarse, fine),
        losses.ncut(part_coarse, losses.directions(part_features), *rule),
        losses.equivariance(
            losses.zoomed(fine, mask_offsets), teacher, grey if config.gf else None, 9, 1e-3
        ),
    )
    return dict(zip(TERMS, terms, strict=True))


def test_losses_are_the_weighted_terms_at_any_stride():
    for stride, size, step in ((8, 32, 1), (16, 64, 2), (4, 16, 1), (14, 56, 7), (32, 64, 4)):
        for settings in ({}, {"gf": False}):
            with case(stride, settings):
                made, given = method(stride, threshold=0.2, **settings), batch(size=size)
                offsets = given.offsets // step * step  # whole pixels of the fine mask too
                expected = expected_losses(made, given, offsets, offsets * 8 // stride)
                found = made.losses(given)
                assert tuple(found) == TERMS
                for weight, name in zip((1, 1, 1, 1, 0.01, 0.01), TERMS, strict=True):
                    torch.testing.assert_close(
                        found[name], weight * expected[name], rtol=1e-5, atol=0
                    )
                made = method(stride, threshold=0.2, eq=False)
                alone = made.losses(given)
                assert tuple(alone) == TERMS[:4]
                for name in alone:
                    torch.testing.assert_close(alone[name], expected[name])


def test_where_the_part_of_the_public_code_is():
    made = method(crop="compat")
    offsets = torch.stack([torch.arange(161), torch.arange(161)], 1)
    found, on_mask = made.places(offsets, 320)
    assert torch.equal(found, on_mask)
    assert (found[:, 0] == 80).all()  # rows 80 to 240
    assert found[:, 1].unique().tolist() == list(range(10, 30))
    found, on_mask = method(16, crop="compat").places(torch.tensor([[0, 0], [0, 112]]), 224)
    assert found.tolist() == [[56, 6], [56, 20]] and on_mask.tolist() == [[28, 3], [28, 10]]


def test_gradients_equal_finite_differences():
    """Of the sum of the losses, along random directions of the weights, in float64; the target of
    the equivariance is held, as its gradient is stopped."""
    made = method(threshold=0.2, weights=(1, 1, 1, 1, 1, 1), radius=2)
    made.module.double()
    given = Batch(batch(size=16).pixels.double(), batch(size=16).offsets)
    sum(made.losses(given).values()).backward()
    parameters = [*made.module.parameters()]
    fine = made.module.fine
    target = None

    def held(tokens, images):
        """The fine mask; without a gradient always the first one, which is the target."""
        nonlocal target
        if torch.is_grad_enabled():
            return fine(tokens, images)
        target = fine(tokens, images) if target is None else target
        return target

    made.module.fine = held
    torch.manual_seed(3)
    made.losses(given)
    for _ in range(3):
        direction = [torch.randn_like(p) / p.numel() ** 0.5 for p in parameters]
        values = []
        for step in (1e-6, -1e-6):
            for p, d in zip(parameters, direction, strict=True):
                p.data += step * d
            values.append(sum(made.losses(given).values()).item())
            for p, d in zip(parameters, direction, strict=True):
                p.data -= step * d
        slope = sum((p.grad * d).sum().item() for p, d in zip(parameters, direction, strict=True))
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-4)


def test_each_loss_reaches_its_part_of_the_head():
    """The coarse mask has a gradient from the zoomed part; the target of the equivariance has
    none, so that this loss has one from the whole picture alone."""
    made, given = method(threshold=0.2), batch()
    coarse, fine = {"reduce", "blocks", "to_coarse"}, {"reduce", "blocks", "stages", "to_fine"}
    wanted = dict.fromkeys(TERMS, coarse) | {"image": fine, "equivariance": fine}
    wanted["distillation"] = coarse | fine
    for name in TERMS:
        with case(name):
            made.module.zero_grad()
            made.losses(given)[name].backward()
            reached = {n.split(".")[0] for n, p in made.module.named_parameters()
                       if p.grad is not None and p.grad.abs().sum() > 0}  # fmt: skip
            assert reached == wanted[name]


def test_one_step_draws_no_random_numbers_and_keeps_statistics_of_whole_pictures():
    given = batch()
    states = []
    for eq in (True, False):
        made = method(eq=eq)
        before = torch.get_rng_state()
        made.losses(given)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(made.module.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_held_out_is_the_sum_in_eval_mode_and_changes_nothing():
    made, given = method(), batch()
    made.losses(given)
    before = {name: value.clone() for name, value in made.module.state_dict().items()}
    assert made.module.training
    energy = made.held_out(given)
    assert made.module.training
    for name, value in made.module.state_dict().items():
        assert torch.equal(value, before[name]), name
    made.module.eval()
    with torch.no_grad():
        assert energy == float(sum(made.losses(given).values()))


def test_losses_are_float32_under_autocast():
    made, given = method(), batch()
    exact = made.losses(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = made.losses(given)
    for name in TERMS:
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], exact[name], rtol=0.1, atol=1e-3)


def test_optimiser():
    made = method()
    optimiser = made.optimiser(1e-3)
    (group,) = optimiser.param_groups
    assert isinstance(optimiser, torch.optim.AdamW)
    assert group["lr"] == 1e-3 and group["betas"] == (0.9, 0.99) and group["weight_decay"] == 0
    assert {*group["params"]} == {*made.module.parameters()}


# Training


def discs(n, size, generator):
    """Pictures of a bright disc on dark ground, and where it is."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    radius = size * (0.15 + 0.1 * torch.rand(n, 1, 1, generator=generator))
    cy, cx = size * (0.25 + 0.5 * torch.rand(2, n, 1, 1, generator=generator))
    inside = (y - cy) ** 2 + (x - cx) ** 2 < radius**2
    noise = 0.1 * torch.rand(n, 3, size, size, generator=generator)
    bright, dark = torch.tensor([0.9, 0.7, 0.2]), torch.tensor([0.1, 0.2, 0.3])
    colours = torch.where(inside[:, None], bright[:, None, None], dark[:, None, None])
    return colours * 0.9 + noise, inside


def iou(found, inside):
    both = (found & inside).sum((1, 2)) / (found | inside).sum((1, 2))
    return both.mean().item()


def test_a_few_steps_find_a_bright_disc_on_dark_ground():
    """Other seeds of so narrow a head may still have a flat mask after so few steps."""
    size = 48
    generator = torch.Generator().manual_seed(2)
    made = method(threshold=0.5)
    torch.manual_seed(2)
    made.module = BoostingHead(6, 8)
    optimiser = made.optimiser(1e-2)
    for _ in range(60):
        pixels, _ = discs(4, size, generator)
        offsets = torch.randint(0, size // 2 + 1, (4, 2), generator=generator)
        optimiser.zero_grad()
        sum(made.losses(Batch(pixels, offsets)).values()).backward()
        optimiser.step()
    pixels, inside = discs(8, size, generator)
    box = torch.zeros_like(inside)
    box[:, size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = True
    assert iou(box, inside) < 0.35
    for mask, least in (("fine", 0.8), ("coarse", 0.6)):  # of 6 x 6 positions
        network = BoostingNetwork(made.backbone.module, (0, 0, 0), (1, 1, 1), made.module, mask)
        found = resized(network(pixels), size, size)[:, 1] > 0.5
        with case(mask):
            assert iou(found, inside) > least
