"""The numeric core of DiffSeg, against plain float64 and on attention whose segments are known."""

import diffseg_reference as reference
import numpy as np
import pytest
import torch
from cases import case

from export.guides.attention import AttentionSum, attend
from export.guides.merging import anchors, distances, mean_maps, merge, refine, suppress
from runtime.errors import InputError

# Each of the four terms of a distance is at most 12 * log(10) = 27.6, and float32 rounds the sum of
# each by a few units in the last place.
ROUNDING = 4 * 27.6 * 8 * np.finfo(np.float32).eps


def random_maps(rng, rows, cells, sharpness=3.0):
    """(rows, cells) float32 probabilities."""
    scores = torch.from_numpy(rng.standard_normal((rows, cells)) * sharpness)
    return scores.softmax(1).float()


def smooth_maps(rng, height, width):
    """(N, N) float32 attention of cells to cells of a similar random colour."""
    colours = reference.enlarge(rng.standard_normal((3, 4)), height, width).ravel()
    return torch.from_numpy(-20 * (colours[:, None] - colours) ** 2).softmax(1).float()


def block_maps(regions):
    """(N, N) float32: each cell attends to all cells of its region alike, and to no others."""
    flat = torch.from_numpy(np.asarray(regions).ravel())
    same = (flat[:, None] == flat).float()
    return same / same.sum(1, keepdim=True)


def labels_of(maps, height, width, *, grid=16, thresholds=(0.9,) * 3, size=None):
    proposals = merge(maps, anchors(height, width, grid), thresholds)
    return suppress(proposals, (height, width), size or (height, width)).numpy()


def assert_same_regions(labels, regions):
    """Labels and regions are the same partition."""
    pairs = {*zip(labels.ravel().tolist(), np.ravel(regions).tolist(), strict=True)}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def quarters(height, width):
    rows, columns = np.indices((height, width))
    return (rows >= height // 2) * 2 + (columns >= width // 2)


# Aggregation


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (8, 24)])
def test_the_aggregate_is_that_of_plain_loops(rng, size):
    height, width = size
    maps = []
    for factor, blocks, heads in ((1, 5, 2), (2, 5, 3), (4, 5, 3), (8, 1, 4)):
        cells = (height // factor) * (width // factor)
        maps += [random_maps(rng, heads * cells, cells).view(heads, cells, cells)] * blocks
    total = AttentionSum(height, width)
    for block in maps:
        for head in block:
            total.add(head)
    found = total.aggregate()
    assert found.dtype == torch.float32 and found.shape == (height * width,) * 2
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    wanted = reference.aggregate([block.numpy() for block in maps], height, width)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-9)


def test_weights_are_proportional_to_the_sides_of_the_levels():
    total = AttentionSum(16, 16)
    for factor in (1, 2, 4, 8):
        cells = (16 // factor) ** 2
        maps = torch.zeros(cells, cells)
        maps[:, (0, cells - 1)[factor == 1]] = 1  # the finest level attends to the last cell
        for _ in range(1 if factor == 8 else 5):
            total.add(maps)
    found = total.aggregate()
    np.testing.assert_allclose(found[:, -1], 64 / 120, rtol=1e-6)
    assert (found[0] == found[-1]).all()


def test_attention_is_that_of_torch_and_its_maps_are_added(rng):
    for dtype, error in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        with case(str(dtype)):
            query, key, value = torch.from_numpy(rng.standard_normal((3, 2, 320, 5))).to(dtype)
            total = AttentionSum(8, 40)
            found = attend(query, key, value, 5**-0.5, total)
            wanted = torch.nn.functional.scaled_dot_product_attention(
                query.double(), key.double(), value.double()
            )
            assert found.dtype == dtype
            np.testing.assert_allclose(found.double(), wanted, atol=error)
            scores = query.double() @ key.double().transpose(1, 2) * 5**-0.5
            np.testing.assert_allclose(total.aggregate(), scores.softmax(2).mean(0), rtol=1e-5)


def test_maps_of_no_level_are_refused():
    total = AttentionSum(8, 16)
    for shape, words in (
        *(((100, 100), "has 100 cells; wanted those of the latent"), ((0, 0), "has 0 cells")),
        *(((9, 9), "has 9 cells"), ((128, 64), r"is \(128, 64\)"), ((128,), r"is \(128,\)")),
    ):
        with case(shape), pytest.raises(InputError, match=words):
            total.add(torch.ones(shape))
    with pytest.raises(InputError, match="no attention map was added"):
        total.aggregate()


# Distances


def test_distances_are_those_of_the_formula(rng):
    p, q = random_maps(rng, 5, 300, 6), random_maps(rng, 7, 300, 6)
    q[3], q[4, :200] = p[2], 0  # the same map, and zeros
    found = distances(p, q)
    wanted = [[reference.distance(a, b) for b in q.double().numpy()] for a in p.double().numpy()]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=ROUNDING)
    assert found.min() >= 0 and found[2, 3] <= ROUNDING


def test_distances_of_many_maps_are_computed_in_parts(rng, monkeypatch):
    p, q = random_maps(rng, 3, 50), random_maps(rng, 20, 50)
    whole = distances(p, q)
    monkeypatch.setattr("export.guides.merging.CHUNK", 7)
    np.testing.assert_allclose(distances(p, q), whole, atol=ROUNDING)


def test_rounding_makes_no_distance_negative(rng):
    for sharpness in (0.01, 1, 10):
        maps = random_maps(rng, 40, 400, sharpness)
        assert distances(maps, maps).min() >= 0


# Anchors


def test_anchors_of_a_square_are_the_published_ones():
    wanted = [row * 64 + column for row in range(1, 62, 4) for column in range(1, 62, 4)]
    assert anchors(64, 64, 16).tolist() == wanted


def test_anchors_of_any_grid_lie_in_it():
    for height, width, grid in (
        *((56, 80, 16), (8, 512, 16), (8, 8, 16), (64, 64, 1), (1, 9, 4), (80, 56, 64)),
        *((24, 8, 3), (64, 64, 64)),
    ):
        with case(height, width, grid):
            found = anchors(height, width, grid).tolist()
            assert found == reference.anchors(height, width, grid)
            assert len({*found}) == len(found) and 0 <= min(found) and max(found) < height * width
            rows = [index // width for index in found]
            assert abs(rows[0] - (height - 1 - rows[-1])) <= 1  # centred
    assert len(anchors(56, 80, 16)) == 13 * 19


# Merging


def test_merging_is_that_of_plain_loops(rng):
    for height, width, thresholds in (
        *((8, 8, (0.9, 0.9, 0.9)), (8, 16, (2.0, 1.0)), (16, 8, (0.3,))),
        (8, 8, (1.5, 0.5, 3.0, 0.1)),
    ):
        with case((height, width), thresholds):
            maps = smooth_maps(rng, height, width)
            starts = anchors(height, width, 4)
            found = merge(maps, starts, thresholds)
            wanted = reference.merge(maps.double().numpy(), starts.tolist(), thresholds)
            assert 1 < len(wanted) and found.shape == wanted.shape
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-9)
            size = (3 * height, 3 * width)
            labels = suppress(found, (height, width), size)
            assert labels.dtype == torch.int32
            np.testing.assert_array_equal(labels, reference.suppress(wanted, (height, width), size))


def test_k_means_is_that_of_plain_loops(rng):
    maps = smooth_maps(rng, 8, 8)
    far = torch.zeros(1, 64)  # a proposal that is far from all maps, so that its cluster is empty
    far[0, 0] = 5
    proposals = torch.cat([maps[:4], far])
    found = refine(maps, proposals)
    wanted = reference.refine(maps.double().numpy(), proposals.double().numpy())
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-9)
    assert torch.equal(found[-1], far[0])
    nearest = torch.cdist(maps, proposals).argmin(1)
    once = torch.stack([maps[nearest == k].mean(0) for k in range(4)])
    assert not np.allclose(found[:4], once, rtol=1e-2)  # it took several rounds


def test_a_later_round_counts_proposals_of_earlier_groups_again():
    def peak(share):  # two cells: a chain of maps, of which only neighbours are near
        return torch.tensor([share, 1 - share])

    maps = torch.stack([peak(0.2), peak(0.5), peak(0.8)])
    near = reference.distance(np.array([0.2, 0.8]), np.array([0.5, 0.5])) + 0.01
    found = merge(maps, torch.arange(3), (1e-6, near))
    wanted = torch.stack([(maps[0] + maps[1]) / 2, (maps[1] + maps[2]) / 2])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


# Known answers


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (40, 16)])
def test_blocks_of_attention_are_the_segments(rng, size):
    for name, regions in (
        ("quarters", quarters(*size)),
        ("random", np.kron(rng.permutation(size[0] * size[1] // 64), np.ones((8, 8), int))),
    ):
        regions = regions.reshape(size) if name == "random" else regions
        with case(name, size):
            assert_same_regions(labels_of(block_maps(regions), *size), regions)


def test_segments_of_equal_size_are_enlarged_exactly():
    regions = quarters(16, 16)
    found = labels_of(block_maps(regions), 16, 16, size=(128, 128))
    assert_same_regions(found, quarters(128, 128))


def test_blocks_on_all_levels_are_the_segments():
    total = AttentionSum(16, 32)
    for factor in (1, 2, 4, 8):
        level = quarters(16 // factor, 32 // factor)
        for _ in range(3):
            total.add(block_maps(level))
    assert_same_regions(labels_of(total.aggregate(), 16, 32), quarters(16, 32))


def test_a_large_threshold_merges_all_and_a_small_one_nothing(rng):
    maps = smooth_maps(rng, 8, 8) + torch.eye(64)
    maps /= maps.sum(1, keepdim=True)
    assert labels_of(maps, 8, 8, grid=4, thresholds=(1e6,)).max() == 0
    starts = anchors(8, 8, 4)
    found = merge(maps, starts, (1e-30,) * 3)
    np.testing.assert_allclose(found, maps[starts], rtol=1e-6)
    assert labels_of(maps, 8, 8, grid=8, thresholds=(1e-30,)).max() == 63


def test_one_region_is_one_segment():
    found = labels_of(torch.full((64, 64), 1 / 64), 8, 8, thresholds=(1e-9,) * 3)
    assert (found == 0).all()


def test_a_region_without_an_anchor_has_no_segment():
    regions = np.zeros((16, 16), int)
    regions[:, 8:] = 1
    regions[2, 2] = 2  # four anchors a side: rows and columns 0, 5, 10 and 15
    found = labels_of(block_maps(regions), 16, 16, grid=4)
    assert found.max() == 1
    regions[2, 2] = found[2, 2]
    assert_same_regions(found, regions)


def test_numbers_of_segments_have_no_gaps():
    proposals = torch.tensor([[0.1, 0.1], [0.6, 0.4], [0.2, 0.2], [0.4, 0.6]])
    assert suppress(proposals, (1, 2), (1, 2)).tolist() == [[0, 1]]


def test_the_first_of_equal_proposals_wins():
    proposals = torch.tensor([[0.1, 0.9, 0.1], [0.5, 0.5, 0.2], [0.5, 0.5, 0.6]])
    assert suppress(proposals, (1, 3), (1, 3)).tolist() == [[1, 0, 2]]


def test_means_are_those_of_the_chosen_maps(rng):
    maps = random_maps(rng, 6, 10)
    chosen = torch.tensor([[True] + [False] * 5, [True, False, True, True, False, False]])
    wanted = torch.stack([maps[0], maps[[0, 2, 3]].mean(0)])
    np.testing.assert_allclose(mean_maps(chosen, maps), wanted, rtol=1e-6)
