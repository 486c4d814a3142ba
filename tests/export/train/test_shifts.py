"""The estimate of SegUnify's shifts from features without labels."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="the shifts are estimated with PyTorch")

import torch

from export.train.shifts import estimate_shifts
from runtime.errors import InputError


@pytest.fixture
def features():
    """Six pictures of 5 x 7 positions with 12 channels, which have a mean in common."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn((6, 12, 1, 1), generator=generator)
    return torch.randn((6, 12, 5, 7), generator=generator) + own + 0.5


def affinities(features, other):
    """The affinities of the energy by loops in float64: (N, 35, 35), centred by rows, with the mean
    of all pairs added. Picture i is compared with picture i - other."""
    tokens = features.double().flatten(2).numpy()
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    found = np.array([[[p @ q for q in tokens[i - other].T] for p in x.T]
                      for i, x in enumerate(tokens)])  # fmt: skip
    return found - found.mean(2, keepdims=True) + found.mean()


@pytest.mark.parametrize("clusters", [2, 5, 27])
def test_the_assumed_shares_of_pairs_are_above_the_shifts(features, clusters):
    shifts = estimate_shifts(features, clusters)
    for shift, other, share in zip(shifts, (0, 1), (1 / 2, 1 / clusters), strict=True):
        exact = np.quantile(affinities(features, other), 1 - share)
        assert abs(shift - exact) < 0.002


def test_the_length_of_the_features_has_no_effect(features):
    lengths = torch.rand((6, 1, 5, 7), generator=torch.Generator().manual_seed(1)) + 0.1
    assert estimate_shifts(features * lengths) == estimate_shifts(features)


def test_two_labels_of_each_picture_are_told_apart():
    """Half of each picture has one direction, half the opposite one: b1 is between the two
    affinities, as the positions of one label attract and the others repel."""
    sign = torch.tensor([1.0, 1.0, -1.0, -1.0]).reshape(1, 1, 2, 2)
    direction = torch.randn((8, 16, 1, 1), generator=torch.Generator().manual_seed(0))
    assert -1 <= estimate_shifts(direction * sign)[0] < 1


def test_equal_features_have_shifts_in_range():
    assert estimate_shifts(torch.ones(2, 3, 4, 4), 4096) == (1.0, 1.0)


def test_half_precision_is_computed_in_single(features):
    half = features.half()
    assert estimate_shifts(half) == estimate_shifts(half.float())


def test_wrong_features_are_refused(features):
    with pytest.raises(InputError, match="from at least two pictures"):
        estimate_shifts(features[:1])
    with pytest.raises(InputError, match="clusters is 1; wanted 2 to 4096"):
        estimate_shifts(features, 1)
    features[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN or infinite values"):
        estimate_shifts(features)
