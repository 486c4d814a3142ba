"""The threshold of affinities, for features whose answer is known and against a slow form."""

import numpy as np
import pytest
import torch
from cases import case

from export.train.affinity import affinity_threshold
from runtime.errors import InputError


def picture(*positions):
    """One row of positions, each with these values: (1, C, 1, positions)."""
    return torch.tensor(positions, dtype=torch.float32).T[None, :, None]


def at_angles(*degrees):
    """Positions with these directions in a plane."""
    angles = np.radians(degrees)
    return picture(*np.stack([np.cos(angles), np.sin(angles)], axis=1).tolist())


def threshold(features):
    return affinity_threshold(features, keys=False)


def slow_otsu(features):
    """The edge of a bin with the largest between-class variance, by loops in float64; the middle
    of equally good ones."""
    values = []
    for tokens in features.double().flatten(2).numpy():
        for i in range(tokens.shape[1]):
            for j in range(i):
                a, b = tokens[:, i], tokens[:, j]
                values.append(a @ b / np.sqrt((a @ a) * (b @ b)))
    values = (np.floor((np.array(values) + 1) * 1000) + 0.5) / 1000 - 1  # the middles of bins
    scores = []
    for edge in np.arange(-999, 1000) / 1000:
        above = values > edge
        share = above.mean()
        if 0 < share < 1:
            difference = values[above].mean() - values[~above].mean()
            scores.append((share * (1 - share) * difference**2, edge))
    best = max(scores)[0]
    return np.mean([edge for score, edge in scores if score > best * (1 - 1e-9)])


def test_keys_have_the_published_threshold():
    assert affinity_threshold(torch.rand(2, 3, 2, 2), keys=True) == 0.4


def test_the_threshold_is_between_two_groups_of_cosines():
    """Two directions at an angle have the cosines 1 and that of the angle; nothing is between, and
    the middle is returned."""
    for angle in (60, 90, 120):
        with case(angle):
            found = threshold(at_angles(0, 0, angle, angle, angle))
            assert abs(found - (1 + np.cos(np.radians(angle))) / 2) < 0.002


def test_the_threshold_equals_a_slow_form():
    for scale in (0.3, 1.0, 3.0):
        with case(scale) as draw:
            groups = draw.normal(size=(2, 6, 3))  # of two pictures with three directions each
            where = draw.integers(0, 3, (2, 1, 20))
            features = np.take_along_axis(groups, np.repeat(where, 6, axis=1), 2)
            features = torch.from_numpy(features + scale * draw.normal(size=features.shape))
            found = threshold(features.reshape(2, 6, 4, 5))
            assert abs(found - slow_otsu(features.reshape(2, 6, 4, 5))) < 0.0006
            assert found == round(found, 3)


def test_a_position_is_not_compared_with_itself():
    """The cosines of the two pictures are 0 and .5; with the 1 of each position it would be .75."""
    assert abs(threshold(torch.cat([at_angles(0, 90), at_angles(0, 60)])) - 0.25) < 0.002


def test_all_pictures_count_and_none_is_compared_with_another():
    pictures = [at_angles(0, 20, 40), at_angles(90, 110, 130), at_angles(180, 200, 220)]
    alone = threshold(pictures[0])
    assert abs(alone - (np.cos(np.radians(20)) + np.cos(np.radians(40))) / 2) < 0.002
    assert threshold(torch.cat(pictures)) == alone
    assert threshold(torch.cat([pictures[0], at_angles(0, 90, 180)])) < 0.5 < alone


def test_the_length_of_features_and_the_gradient_do_not_matter():
    features = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    lengths = torch.linspace(0.1, 1000, 15).reshape(1, 1, 3, 5)
    assert threshold(features) == threshold((features * lengths).requires_grad_())


def test_positions_without_any_value_have_the_cosine_0():
    assert abs(threshold(picture((1, 0), (1, 0), (0, 0))) - 0.5) < 0.002


def test_equal_positions_count_although_their_product_may_round_above_1():
    draw = np.random.default_rng(0)
    for _ in range(20):
        values = draw.normal(size=300)
        found = threshold(picture([0, *values], [0, *values], [1, *np.zeros(300)]))
        assert abs(found - 0.5) < 0.002


def test_what_is_refused():
    bad = torch.rand(2, 3, 2, 2)
    bad[1, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        affinity_threshold(bad, keys=False)
    for features in (torch.ones(2, 3, 2, 2), at_angles(30)):  # equal ones, and no pair
        with pytest.raises(InputError, match="same cosine"):
            affinity_threshold(features, keys=False)
