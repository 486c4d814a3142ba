"""Metrics against slow loops that spell out the definition, and on maps whose score is known."""

from functools import cache
from itertools import combinations
from math import hypot, isnan, log, nan

import numpy as np
import pytest
from cases import case
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from benchmarks.quality import metrics

VOID = 9
LEFT_RIGHT = np.repeat([[0, 0, 1, 1]], 4, axis=0)
CORNER = np.ones((4, 4), int)
CORNER[:2, :2] = 0
REGION_MEASURES = (
    metrics.covering,
    metrics.probabilistic_rand,
    metrics.variation_of_information,
)


def rectangles(rng, shape, labels=5, count=4):
    """Draw a map of few rectangles, so that most pixels are no boundary."""
    image = np.full(shape, rng.integers(labels))
    for _ in range(count):
        top, left = (rng.integers(n) for n in shape)
        image[top : top + 1 + shape[0] // 2, left : left + 1 + shape[1] // 2] = rng.integers(labels)
    return image


SHAPES = [(1, 1), (1, 7), (5, 1), (4, 4), (7, 11), (13, 9), (17, 19)]


@cache
def pairs(shape):
    """Make eight (prediction, truth) pairs of one shape; truth has void, half are Fortran order."""
    rng = np.random.default_rng(sum(shape))
    drawn = []
    for index in range(8):
        prediction, truth = (rectangles(rng, shape) for _ in range(2))
        truth[rng.random(truth.shape) < 0.03] = VOID
        order = np.asfortranarray if index % 2 else np.ascontiguousarray
        drawn.append((order(prediction), order(truth)))
    return drawn


def each_pair(count=8):
    """Yield (shape, prediction, truth) of every shape."""
    for shape in SHAPES:
        for prediction, truth in pairs(shape)[:count]:
            yield shape, prediction, truth


def pixels(labels):
    return list(np.ndindex(labels.shape))


def slow_edges(labels, void=None):
    """List the boundary pixels, without those that touch void."""
    edges = []
    for y, x in pixels(labels):
        right = x + 1 < labels.shape[1] and labels[y, x + 1] != labels[y, x]
        lower = y + 1 < labels.shape[0] and labels[y + 1, x] != labels[y, x]
        if right or lower:
            edges.append((y, x))
    return edges


def near(pixel, others, reach):
    return any(hypot(pixel[0] - y, pixel[1] - x) <= reach for y, x in others)


def regions(labels):
    return [{p for p in pixels(labels) if labels[p] == name} for name in np.unique(labels)]


def iou(a, b):
    return len(a & b) / len(a | b)


def slow_boundary_f(prediction, truth, tolerance):
    void = [p for p in pixels(truth) if truth[p] == VOID]
    found, real = (
        [p for p in slow_edges(labels) if not near(p, void, tolerance)]
        for labels in (prediction, truth)
    )
    if not found or not real:
        return float(found == real)
    precision = sum(near(p, real, tolerance) for p in found) / len(found)
    recall = sum(near(p, found, tolerance) for p in real) / len(real)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def slow_band_accuracy(prediction, truth, width):
    void = [p for p in pixels(truth) if truth[p] == VOID]
    edges = [p for p in slow_edges(truth) if not near(p, void, 1)]
    band = [p for p in pixels(truth) if truth[p] != VOID and near(p, edges, width)]
    return sum(prediction[p] == truth[p] for p in band) / len(band) if band else nan


def slow_covering(prediction, truth):
    found = regions(prediction)
    return sum(len(r) * max(iou(r, f) for f in found) for r in regions(truth)) / truth.size


def slow_rand(prediction, truth):
    couples = list(combinations(pixels(truth), 2))
    same = [(prediction[p] == prediction[q]) == (truth[p] == truth[q]) for p, q in couples]
    return sum(same) / len(same) if same else 1.0


def slow_variation(prediction, truth):
    total = 0.0
    for f in regions(prediction):
        for r in regions(truth):
            if both := len(f & r):
                total -= both / truth.size * (log(both / len(f)) + log(both / len(r)))
    return total


def raster_order(labels):
    """Renumber labels by their first pixel, so that equal partitions become equal maps."""
    seen = {}
    return np.array([seen.setdefault(name, len(seen)) for name in labels.ravel()]).reshape(
        labels.shape
    )


def test_confusion_counts_every_valid_pixel_once():
    for shape, prediction, truth in each_pair():
        expected = np.zeros((4, 3), int)
        truth = np.where(truth == VOID, VOID, truth % 3)
        for p in pixels(truth):
            if truth[p] != VOID:
                expected[min(prediction[p], 3), truth[p]] += 1  # predictions 3 and 4: last row
        got = metrics.confusion(prediction, truth, 3, ignore=VOID)
        with case(shape):
            assert got.dtype == np.int64
            np.testing.assert_array_equal(got, expected)


def test_prediction_outside_the_classes_is_an_error_of_the_true_class_only():
    for dtype, outside in ((np.uint8, 255), (np.int32, -1), (np.int16, 2)):
        prediction, truth = LEFT_RIGHT.astype(dtype), LEFT_RIGHT.astype(np.uint8)
        prediction[0, 0] = outside
        counts = metrics.confusion(prediction, truth, 2)
        with case(dtype.__name__, outside):
            np.testing.assert_array_equal(counts, [[7, 0], [0, 8], [1, 0]])
            assert metrics.miou(counts) == pytest.approx((7 / 8 + 1) / 2)
            assert metrics.accuracy(counts) == pytest.approx(15 / 16)


def test_false_positive_on_void_is_free_and_absent_class_is_left_out():
    truth = np.where(LEFT_RIGHT == 1, VOID, 0)
    counts = metrics.confusion(LEFT_RIGHT, truth, 3, ignore=VOID)
    assert metrics.miou(counts) == 1.0
    counts = metrics.confusion(LEFT_RIGHT, np.zeros_like(truth), 3)
    assert metrics.miou(counts) == pytest.approx(
        (0.5 + 0) / 2
    )  # class 1 is predicted, so it counts


def test_no_valid_pixel_gives_nan():
    counts = metrics.confusion(LEFT_RIGHT, np.full((4, 4), VOID), 3, ignore=VOID)
    assert isnan(metrics.miou(counts)) and isnan(metrics.accuracy(counts))


def test_hand_computed_4x4():
    table = metrics.contingency(CORNER, LEFT_RIGHT)
    np.testing.assert_array_equal(table, [[4, 0], [4, 8]])
    counts = metrics.confusion(CORNER, LEFT_RIGHT, 2)
    assert metrics.miou(counts) == pytest.approx((4 / 8 + 8 / 12) / 2)
    assert metrics.accuracy(counts) == pytest.approx(12 / 16)
    np.testing.assert_allclose(metrics.best_iou(CORNER, LEFT_RIGHT), [4 / 8, 8 / 12])
    assert metrics.covering(CORNER, [LEFT_RIGHT]) == pytest.approx((4 / 8 + 8 / 12) / 2)
    assert metrics.probabilistic_rand(CORNER, [LEFT_RIGHT]) == pytest.approx(1 - 48 / 120)
    assert metrics.variation_of_information(CORNER, [LEFT_RIGHT]) == pytest.approx(
        0.823959, abs=1e-6
    )
    np.testing.assert_array_equal(
        metrics.boundaries(CORNER),
        np.array([[0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], bool),
    )


def test_boundaries_match_loops():
    for shape, prediction, _ in each_pair():
        expected = np.zeros(prediction.shape, bool)
        for p in slow_edges(prediction):
            expected[p] = True
        with case(shape):
            np.testing.assert_array_equal(metrics.boundaries(prediction), expected)


def test_boundary_f_matches_loops():
    for tolerance in (1, 2, 3):
        for shape, prediction, truth in each_pair():
            got = metrics.boundary_f(prediction, truth, tolerance=tolerance, ignore=VOID)
            with case(shape, f"tolerance {tolerance}"):
                assert got == pytest.approx(slow_boundary_f(prediction, truth, tolerance))


def test_band_accuracy_matches_loops():
    for width in (0, 2, 5):
        for shape, prediction, truth in each_pair():
            got = metrics.band_accuracy(prediction, truth, width=width, ignore=VOID)
            expected = slow_band_accuracy(prediction, truth, width)
            with case(shape, f"width {width}"):
                assert got == pytest.approx(expected, nan_ok=True)


def test_boundary_f_tolerates_a_shift_of_two():
    columns = np.arange(20)[None] * np.ones((6, 1), int)
    for shift, expected in ((0, 1.0), (2, 1.0), (3, 0.0)):
        with case(f"shift {shift}"):
            assert metrics.boundary_f(columns >= 8 + shift, columns >= 8, tolerance=2) == expected
            assert metrics.boundary_f(columns >= 8, columns >= 8 + shift, tolerance=2) == expected


def test_boundary_f_distance_is_euclidean():
    found, real = np.zeros((2, 12, 12), int)
    found[0, 0] = 1  # edge pixel: (0, 0)
    real[:3, :3] = 1  # edge pixels: (0..2, 2) and (2, 0..2), the corner is at distance 2.83
    assert metrics.boundary_f(found, real, tolerance=2) == pytest.approx(2 * (2 / 5) / (1 + 2 / 5))


def test_boundary_f_of_empty_maps():
    flat = np.zeros((4, 4), int)
    assert metrics.boundary_f(flat, flat) == 1.0
    assert metrics.boundary_f(LEFT_RIGHT, flat) == metrics.boundary_f(flat, LEFT_RIGHT) == 0.0


def test_void_makes_no_boundary():
    truth = np.zeros((20, 20), int)
    truth[8:12, 8:12] = VOID
    guess = np.where(truth == VOID, 3, truth)  # the prediction may do as it likes in void
    for tolerance in (0, 2):
        for labels in (guess, np.zeros_like(truth)):
            assert metrics.boundary_f(labels, truth, tolerance=tolerance, ignore=VOID) == 1.0
    assert isnan(metrics.band_accuracy(guess, truth, ignore=VOID))
    assert metrics.boundary_f(guess, truth) == 1.0 and metrics.band_accuracy(guess, truth) < 1


def test_band_accuracy_sees_only_the_band():
    truth = np.repeat((np.arange(40) >= 20)[None], 5, axis=0).astype(int)  # edge pixels: column 19
    far, close = truth.copy(), truth.copy()
    far[:, 13], far[:, 25] = 1, 0
    close[:, 14] = 1
    assert metrics.band_accuracy(far, truth, width=5) == 1.0
    assert metrics.band_accuracy(close, truth, width=5) == pytest.approx(10 / 11)
    assert isnan(metrics.band_accuracy(truth, np.zeros_like(truth)))


def test_region_measures_match_loops():
    loops = (slow_covering, slow_rand, slow_variation)
    for measure, slow in zip(REGION_MEASURES, loops, strict=True):
        for shape, prediction, truth in each_pair(4):
            expected = slow(prediction, truth)
            with case(measure.__name__, shape):
                assert measure(prediction, [truth]) == pytest.approx(expected, abs=1e-12)


def test_region_measures_average_over_annotators():
    for shape in SHAPES:
        prediction = pairs(shape)[0][0]
        annotators = [truth for _, truth in pairs(shape)]
        for measure in REGION_MEASURES:
            each = [measure(prediction, [truth]) for truth in annotators]
            with case(measure.__name__, shape):
                assert measure(prediction, annotators) == pytest.approx(np.mean(each))


def test_best_iou_matches_loops():
    for shape, prediction, truth in each_pair():
        found = regions(prediction)
        expected = [max(iou(r, f) for f in found) for r in regions(truth)]
        with case(shape):
            np.testing.assert_allclose(metrics.best_iou(prediction, truth), expected)


labels_3x4 = arrays(np.int8, (3, 4), elements=st.integers(-128, 127))


@settings(max_examples=50, deadline=None)
@given(labels_3x4, labels_3x4)
def test_region_numbers_are_only_names(prediction, truth):
    renamed = 1000 - 7 * prediction.astype(np.int32)
    for measure in REGION_MEASURES:
        assert measure(renamed, [truth]) == pytest.approx(measure(prediction, [truth]), abs=1e-12)
    assert metrics.covering(renamed, [prediction]) == 1
    assert metrics.probabilistic_rand(renamed, [prediction]) == 1
    assert metrics.variation_of_information(renamed, [prediction]) == pytest.approx(0, abs=1e-12)
    np.testing.assert_array_equal(
        metrics.contingency(prediction, truth),
        [
            [((prediction == p) & (truth == t)).sum() for t in np.unique(truth)]
            for p in np.unique(prediction)
        ],
    )


def test_one_segment():
    for shape, _, truth in each_pair():
        areas = np.unique(truth, return_counts=True)[1]
        share, flat, n = areas / truth.size, np.zeros_like(truth), truth.size
        together = (areas * (areas - 1)).sum() / (n * (n - 1)) if n > 1 else 1.0
        entropy = -(share * np.log(share)).sum()
        found = metrics.variation_of_information(flat, [truth])
        with case(shape):
            np.testing.assert_allclose(metrics.best_iou(flat, truth), share)
            assert metrics.covering(flat, [truth]) == pytest.approx((share**2).sum())
            assert metrics.probabilistic_rand(flat, [truth]) == pytest.approx(together)
            assert found == pytest.approx(entropy, abs=1e-12)


def test_grid_over_quadrants():
    y, x = np.mgrid[:16, :16]
    quadrants, cells = y // 8 * 2 + x // 8, y // 4 * 4 + x // 4
    np.testing.assert_allclose(metrics.best_iou(cells, quadrants), [1 / 4] * 4)
    np.testing.assert_allclose(metrics.best_iou(quadrants, cells), [1 / 4] * 16)
    assert metrics.covering(cells, [quadrants]) == pytest.approx(1 / 4)
    assert metrics.variation_of_information(cells, [quadrants]) == pytest.approx(log(4))
    split_pairs = 4 * 6 * 16 * 16  # of each quadrant: pairs of pixels in two of its four cells
    expected = 1 - split_pairs / (256 * 255 / 2)
    assert metrics.probabilistic_rand(cells, [quadrants]) == pytest.approx(expected)


def test_binary_iou():
    half, corner, empty = LEFT_RIGHT == 0, CORNER == 0, np.zeros((4, 4), bool)
    assert metrics.binary_iou(corner, half) == pytest.approx(4 / 8)
    assert metrics.binary_iou(half, half) == metrics.binary_iou(empty, empty) == 1.0
    assert metrics.binary_iou(half, empty) == metrics.binary_iou(half, ~half) == 0.0
    assert metrics.binary_iou(255 * corner.astype(np.uint8), half) == pytest.approx(4 / 8)


def test_paired_counts_and_leaves_out_undefined_pictures():
    assert metrics.paired([3, 2, 1, 5, nan], [1, 2, 2, 1, nan]) == (2, 1, 1, pytest.approx(5 / 4))
    assert metrics.paired([nan], [nan])[:3] == (0, 0, 0)


def test_a_full_picture_is_counted_without_overflow():
    truth = np.arange(1200 * 1000).reshape(1200, 1000) // 600_000  # 600,000 squared passes int32
    flat = np.zeros_like(truth, np.uint8)
    assert metrics.probabilistic_rand(flat, [truth]) == pytest.approx(599_999 / 1_199_999)


def test_bad_input_is_refused():
    for call, message in (
        (lambda: metrics.confusion(LEFT_RIGHT, LEFT_RIGHT + 1, 2), r"truth: expected \[0, 2\)"),
        (lambda: metrics.confusion(LEFT_RIGHT, LEFT_RIGHT - 1, 2), r"got \[-1, 0\]"),
        (lambda: metrics.covering(LEFT_RIGHT, []), "annotators: expected at least one"),
        (lambda: metrics.covering(LEFT_RIGHT[:2], [LEFT_RIGHT]), "prediction: .* same shape"),
        (lambda: metrics.binary_iou(LEFT_RIGHT * 0.5, LEFT_RIGHT), "prediction: .* float64"),
        (lambda: metrics.best_iou(LEFT_RIGHT, LEFT_RIGHT[0]), r"truth: expected \(H, W\)"),
        (lambda: metrics.boundary_f(CORNER, LEFT_RIGHT, tolerance=-1), "at least 0, got -1"),
        (lambda: metrics.paired([1, 2], [1]), "a, b: expected equally many scores"),
        (lambda: metrics.paired([1, nan], [1, 2]), "NaN in the same places"),
    ):
        with case(message), pytest.raises(ValueError, match=message):
            call()
