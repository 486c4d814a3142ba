"""Views: which pixels of a picture they have."""

import numpy as np
import pytest
from cases import case

from export.train.views import ViewRule, view_pixels
from runtime.errors import InputError
from runtime.prior.preprocess import Preprocess


def positions(height, width):
    """A picture whose pixel at (y, x) is (y, x, 7)."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, np.full_like(y, 7)], axis=-1).astype(np.uint8)


def corners(view):
    """The first and last (y, x) of a view of :func:`positions` that was not resized."""
    first, last = view[0, 0, :2].tolist(), view[-1, -1, :2].tolist()
    assert np.array_equal(view, positions(256, 256)[first[0] : last[0] + 1, first[1] : last[1] + 1])
    return *first, *last


# Size of the picture and of the view, and the first and last row and column of each view.
CENTRES = [
    ((32, 40), 32, (0, 4, 31, 35)),
    ((40, 32), 32, (4, 0, 35, 31)),
    ((33, 40), 33, (0, 3, 32, 35)),  # 7 columns are left over: 3 on the left, 4 on the right
    ((20, 20), 20, (0, 0, 19, 19)),
    ((16, 201), 16, (0, 92, 15, 107)),
]
FIVES = [
    (  # Each crop has 32 x 48 pixels, of which 8 on the left and on the right are cut off.
        (64, 96),
        32,
        [(0, 8, 31, 39), (0, 56, 31, 87), (32, 8, 63, 39), (32, 56, 63, 87), (16, 32, 47, 63)],
    ),
    (  # Each crop has 33 x 45 pixels, because half of 67 and of 91 is rounded down.
        (67, 91),
        33,
        [(0, 6, 32, 38), (0, 52, 32, 84), (34, 6, 66, 38), (34, 52, 66, 84), (17, 29, 49, 61)],
    ),
    (
        (40, 32),
        16,
        [(2, 0, 17, 15), (2, 16, 17, 31), (22, 0, 37, 15), (22, 16, 37, 31), (12, 8, 27, 23)],
    ),
]


def test_the_centre_is_the_largest_square_in_the_middle():
    for shape, size, expected in CENTRES:
        with case(shape):
            view = view_pixels(positions(*shape), ViewRule(size=size), 0)
            assert view.shape == (size, size, 3) and view.dtype == np.uint8
            assert corners(view) == expected


def test_the_five_crops_are_the_corners_and_the_middle():
    for shape, size, expected in FIVES:
        with case(shape):
            rule = ViewRule(size=size, crops="five")
            assert rule.count == 5
            views = [view_pixels(positions(*shape), rule, i) for i in range(5)]
            assert [corners(view) for view in views] == expected


def test_tiny_pictures():
    """Of a picture of one row the views have one pixel, which fills the whole view."""
    for shape, columns in (((1, 7), [1, 5, 1, 5, 3]), ((1, 1), [0] * 5), ((1, 2), [0, 1, 0, 1, 0])):
        with case(shape):
            for turned in (False, True):
                picture = positions(*shape)
                picture = np.ascontiguousarray(picture.transpose(1, 0, 2)) if turned else picture
                rule = ViewRule(size=16, crops="five")
                order = [0, 2, 1, 3, 4] if turned else range(5)
                views = [view_pixels(picture, rule, i) for i in order]
                assert [v[0, 0].tolist() for v in views] == [[0, x, 7] for x in columns]
                assert all((v == v[0, 0]).all() for v in views)
                middle = view_pixels(picture, ViewRule(size=16), 0)
                assert (middle == [0, (max(shape) - 1) // 2, 7]).all()


def test_a_smaller_view_has_the_average_of_the_pixels():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[::2, ::2] = 200
    assert (view_pixels(picture, ViewRule(size=32), 0) == 50).all()


def test_a_view_has_the_pixels_that_a_network_is_given(rng):
    """The whole of a square picture is resized as at inference."""
    for side, size in ((50, 32), (20, 32), (37, 37)):
        with case(side, size):
            picture = rng.integers(0, 256, (side, side, 3), np.uint8)
            rule = Preprocess(mean=(0, 0, 0), std=(1, 1, 1), height=size, width=size)
            view = view_pixels(picture, ViewRule(size=size), 0)
            assert np.array_equal(view, np.rint(rule(picture)[0].transpose(1, 2, 0) * 255))


def test_a_view_is_a_copy():
    picture = positions(16, 40)
    view = view_pixels(picture, ViewRule(size=16), 0)
    assert view.flags.c_contiguous and not np.shares_memory(view, picture)


def test_rules_out_of_range_are_refused():
    for size in (15, 4097, 224.0, "224", True):
        with pytest.raises(InputError, match=r"imgsz is .*; wanted 16 to 4096 pixels"):
            ViewRule(size=size)
    with pytest.raises(InputError, match="crops is 'four'; wanted one of centre, five"):
        ViewRule(crops="four")
