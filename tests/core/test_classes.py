"""Which classes of a guide take part, on small maps whose answers are plain to see."""

import numpy as np
import pytest
from cases import case

from runtime.checks import UnknownGuide
from runtime.core import classes, classes_host
from runtime.errors import InputError


def test_the_share_of_a_class_is_of_all_pixels():
    """Unknown pixels count: the shares of labels and of the same probabilities are equal."""
    labels = np.array([[0, 0, 2, -1]], np.int32)
    soft = np.eye(3, dtype=np.float32)[labels] * (labels >= 0)[..., None]
    np.testing.assert_array_equal(classes_host.shares(labels), [0.5, 0, 0.25])
    np.testing.assert_array_equal(classes_host.shares(soft), [0.5, 0, 0.25])


def test_frequent_classes_hold_more_than_the_least_share():
    assert classes.MIN_SHARE == 5e-4
    labels = np.zeros((100, 100), np.int32)
    labels[0, :5], labels[1, :6] = 1, 2  # 5 pixels are the least share, which is not enough
    np.testing.assert_array_equal(classes.frequent_classes(labels), [0, 2])
    soft = np.eye(3, dtype=np.float32)[labels]
    np.testing.assert_array_equal(classes.frequent_classes(soft), [0, 2])


def test_the_largest_class_takes_part_however_small_it_is():
    labels = np.full((100, 100), -1, np.int32)
    labels[0, :2], labels[1, :1] = 3, 1
    np.testing.assert_array_equal(classes.frequent_classes(labels), [3])
    with pytest.raises(UnknownGuide):
        classes.frequent_classes(np.full((100, 100), -1, np.int32))


def test_columns_are_taken_in_the_order_asked_for():
    scores = np.array([[[0.5, 0.3, 0.2], [1, 0, 0]]], np.float32)
    wanted = np.array([2, 1, 7], np.int32)  # there is no class 7
    plain = classes_host.take(scores, wanted, False)
    np.testing.assert_array_equal(plain, np.array([[[0.2, 0.3, 0], [0, 0, 0]]], np.float32))
    np.testing.assert_allclose(
        classes_host.take(scores, wanted, True), [[[0.4, 0.6, 0], [0, 0, 0]]], rtol=1e-6
    )
    labels = np.array([[2, 0, -1, 1]], np.int32)
    np.testing.assert_array_equal(
        classes_host.take(labels, wanted, True), [[[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 1, 0]]]
    )


def test_columns_of_a_class_are_added_up_and_those_without_one_dropped():
    scores = np.array([[[1, 2, 4, 8]]], np.float32)
    merged, kept = classes.merge_columns(scores, np.array([5, -1, 3, 5], np.int32))
    np.testing.assert_array_equal(kept, [3, 5])
    np.testing.assert_array_equal(merged, [[[4, 9]]])


def test_columns_that_win_no_pixel_are_left_out():
    scores = np.array([[[1, 0, 3], [0, 1, 2], [5, 1, 4]]], np.float32)
    left, kept = classes.winning_columns(scores, np.array([4, 6, 9], np.int32))
    np.testing.assert_array_equal(kept, [4, 9])
    np.testing.assert_array_equal(left, [[[1, 3], [0, 2], [5, 4]]])


def test_majority_classes_refuses():
    labels, guide = np.zeros((4, 5), np.int32), np.zeros((4, 5, 3), np.float32)
    for arguments, message in (
        ((labels + 9, guide, 2), "labels are int32 from 9 to 9; wanted integers from 0 to 1"),
        ((labels - 5, guide, 2), "labels are int32 from -5 to -5"),
        ((labels + 0.5, guide, 2), "labels are float64"),
        ((labels[1:], guide, 2), r"labels have shape \(3, 5\), guide \(4, 5, 3\)"),
        ((labels, guide[None], 2), r"labels have shape \(4, 5\), guide \(1, 4, 5, 3\)"),
        ((None, guide, 2), r"labels have shape \(\)"),
        ((labels, guide, 0), "clusters is 0; wanted 1 to 4096"),
    ):
        with case(message), pytest.raises(InputError, match=message):
            classes.majority_classes(*arguments)
