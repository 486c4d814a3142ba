"""Connected regions and the merging of small ones, against slow searches and known maps."""

import time

import numpy as np
import pytest
from cases import case

import runtime
from runtime.core import reference
from runtime.errors import InputError


def merged_slowly(labels, min_area):
    """Apply the rule by the letter: one merge after another, counting every border anew."""
    labels, regions = labels.copy(), reference.connected_regions(labels)
    while True:
        areas = {int(i): int((regions == i).sum()) for i in np.unique(regions)}
        small = sorted((area, i) for i, area in areas.items() if area < min_area)
        if not small or len(areas) == 1:
            return reference.connected_regions(labels), labels
        _, joining = small[0]
        border = dict.fromkeys(areas, 0)
        for a, b in ((regions[1:], regions[:-1]), (regions[:, 1:], regions[:, :-1])):
            for there in (*b[(a == joining) & (b != joining)], *a[(b == joining) & (a != joining)]):
                border[int(there)] += 1
        best = min(border, key=lambda i: (-border[i], -areas[i], i))
        label = labels[regions == best][0]
        labels[regions == joining] = label
        regions[regions == max(best, joining)] = min(best, joining)


def grid(text):
    """Turn rows of digits into a map."""
    return np.array([[int(c) for c in row] for row in text.split()], np.int32)


def test_regions():
    for shape in ((1, 1), (1, 17), (13, 1), (2, 2), (7, 11), (31, 29)):
        for count in (1, 2, 3, 7):
            with case(shape, f"{count} labels") as rng:
                for _ in range(10):
                    labels = rng.integers(-1, count - 1, shape).astype(np.int32)
                    regions, merged = runtime.connected_regions(labels)
                    np.testing.assert_array_equal(regions, reference.connected_regions(labels))
                    np.testing.assert_array_equal(merged, labels)
                    assert regions.dtype == merged.dtype == np.int32


def assert_merges(labels, min_area):
    """Compare with the slow search, and check the areas."""
    regions, merged = runtime.connected_regions(labels, min_area=min_area)
    slow_regions, slow_labels = merged_slowly(labels, min_area)
    np.testing.assert_array_equal(merged, slow_labels)
    np.testing.assert_array_equal(regions, slow_regions)
    assert regions.max() == 1 or np.bincount(regions.ravel())[1:].min() >= min_area


def test_merging():
    for shape in ((1, 1), (1, 17), (13, 1), (6, 7), (9, 11)):
        for min_area in (1, 2, 3, 6, 20, 1000):
            with case(shape, f"min_area {min_area}") as rng:
                for count in (2, 3, 5):
                    assert_merges(rng.integers(-1, count - 1, shape).astype(np.int32), min_area)


RULES = [  # before, min_area, after
    ("111132 111122", 2, "111122 111122"),  # the longest border, though 1 is larger
    ("1112 1132 1222", 2, "1112 1112 1222"),  # equal borders: the larger
    ("11322 11322", 3, "11122 11122"),  # equal borders and areas: the one numbered first
    ("22311 22311", 3, "22211 22211"),  # ... which is not the one with the smaller label
    ("1132 1132 1132", 4, "1111 1111 1111"),  # equal areas: 3, numbered before 2, goes first
    ("2222113", 3, "2222111"),  # smallest first: 3 makes 1 large enough
    ("1234444", 2, "2244444"),  # 1 joins 2, which stays; 3 prefers the larger
    ("1223333", 4, "3333333"),  # chain: 1 joins 2, and with it 3
    ("12", 9, "22"),  # nothing is large enough: one region is left
    ("5", 9, "5"),
    ("111 121 111", 0, "111 121 111"),
    ("111 121 111", 1, "111 121 111"),
    ("121 111 121", 2, "111 111 111"),
    ("11211 11211", 3, "11111 11111"),  # what touches after merging is one region
]


def test_merging_rules():
    for before, min_area, after in RULES:
        with case(before, f"min_area {min_area}"):
            regions, merged = runtime.connected_regions(grid(before), min_area=min_area)
            np.testing.assert_array_equal(merged, grid(after))
            np.testing.assert_array_equal(regions, reference.connected_regions(grid(after)))


def test_any_integers_are_labels():
    for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64):
        labels = np.array([[0, 0, 7], [1, 7, 7]], dtype)
        regions, merged = runtime.connected_regions(labels)
        np.testing.assert_array_equal(regions, [[1, 1, 2], [3, 2, 2]])
        np.testing.assert_array_equal(merged, labels)
    extremes = np.array([[-(2**31), 2**31 - 1]])
    np.testing.assert_array_equal(runtime.connected_regions(extremes)[1], extremes)


def test_labels_beyond_int32_are_refused():
    with pytest.raises(InputError, match=r"labels .*4294967296"):
        runtime.connected_regions(np.array([[0, 2**32]]))


def test_spiral(size=129):
    wall = np.zeros((size, size), np.int32)
    wall[0, 0], y, x = 1, 0, 0
    lengths = [size - 1, *(n for n in range(size - 1, 1, -2) for _ in range(2))]
    for turn, length in enumerate(lengths):
        for _ in range(length):
            y, x = y + (0, 1, 0, -1)[turn % 4], x + (1, 0, -1, 0)[turn % 4]
            wall[y, x] = 1
    np.testing.assert_array_equal(runtime.connected_regions(wall)[0], 2 - wall)


@pytest.mark.parametrize("min_area, count", [(0, 512 * 512), (2, None), (2**40, 1)])
def test_checkerboard_takes_seconds_at_most(min_area, count):
    y, x = np.indices((512, 512))
    start = time.process_time()
    regions, _ = runtime.connected_regions((x + y) % 2, min_area=min_area)
    assert time.process_time() - start < 10  # of the processors; others' work does not count
    assert count is None or regions.max() == count
    assert np.bincount(regions.ravel())[1:].min() >= min(min_area, 512 * 512)


def test_refuses():
    for labels, min_area, message in (
        (np.zeros((2, 3)), 0, r"labels is \(2, 3\) float64; wanted \(H, W\) integers"),
        (np.zeros(3, int), 0, r"labels is \(3,\) int64; wanted"),
        (np.zeros((0, 3), int), 0, r"labels is \(0, 3\) int64; wanted"),
        (np.zeros((2, 3), int), -1, "min_area is -1; wanted 0 to"),
        (np.zeros((2, 3), int), 1.5, "min_area is 1.5; wanted a whole number"),
    ):
        with case(message), pytest.raises(InputError, match=message):
            runtime.connected_regions(labels, min_area=min_area)
