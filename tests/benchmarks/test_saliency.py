"""Scores of masks beside loops over pixels and thresholds, and masks that need no training."""

import json

import cv2
import numpy as np
import pytest
from cases import case

from benchmarks.quality import datasets, saliency
from runtime.errors import InputError


def slow_f(masks, truths):
    """The F-measure of algorithms by loops: for each threshold the mean over pictures."""
    means = []
    for step in range(256):
        values = []
        for mask, truth in zip(masks, truths, strict=True):
            found = [value >= step / 255 for value in mask.ravel().tolist()]
            hits = sum(f and t for f, t in zip(found, truth.ravel(), strict=True))
            precision = hits / sum(found) if sum(found) else 1.0
            recall = hits / truth.sum() if truth.any() else 1.0
            below = 0.3 * precision + recall
            values.append(1.3 * precision * recall / below if below else 0.0)
        means.append(sum(values) / len(values))
    return max(means), means.index(max(means)) / 255


def test_scores_are_those_of_loops(rng):
    masks = [rng.random((5, 7), np.float32) ** power for power in (1, 3, 8)]
    masks.append(np.float32(rng.integers(0, 256, (5, 7)) / 255))  # values equal to thresholds
    masks += [np.zeros((5, 7), np.float32), np.ones((5, 7), np.float32)]
    truths = [rng.random((5, 7)) < share for share in (0.1, 0.5, 0.9, 0.3, 0.4, 0)]
    scores = [saliency.score(*pair) for pair in zip(masks, truths, strict=True)]
    assert saliency.max_f(scores) == pytest.approx(slow_f(masks, truths), abs=1e-12)
    for i, (mask, truth, one) in enumerate(zip(masks, truths, scores, strict=True)):
        pairs = [(m > 0.5, bool(t)) for m, t in zip(mask.ravel(), truth.ravel(), strict=True)]
        union = sum(m or t for m, t in pairs)
        with case(i):
            assert one.acc == sum(m == t for m, t in pairs) / 35
            assert one.iou == sum(m and t for m, t in pairs) / union


def test_the_mean_over_pictures_is_taken_before_the_best_threshold():
    """At a threshold of 0.2 the first picture is right and the second one wrong."""
    pairs = [([0.3, 0.1], [True, False]), ([1.0, 0.05], [False, True])]
    scores = [saliency.score(np.float32([mask]), np.bool_([truth])) for mask, truth in pairs]
    assert saliency.max_f(scores) == (pytest.approx(0.65 / 1.15), 0)


def test_empty_masks_and_truths():
    empty, full = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    nothing = saliency.score(empty, empty > 0)
    assert np.isnan(nothing.iou) and nothing.acc == 1 and (nothing.recall == 1).all()
    assert (nothing.precision == [0, *[1] * 255]).all()
    assert saliency.score(full, empty > 0).iou == 0 == saliency.score(empty, full > 0).iou
    assert saliency.max_f([saliency.score(full, empty > 0)]) == (0, 0)
    assert saliency.score(np.float32([[0.5]]), np.bool_([[True]])).iou == 0  # above 0.5 is needed


def test_masks_that_cannot_be_scored():
    truth = np.zeros((2, 3), bool)
    with pytest.raises(InputError, match=r"shape \(3, 2\), the truth \(2, 3\)"):
        saliency.score(np.zeros((3, 2), np.float32), truth)
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="outside"):
            saliency.score(np.full((2, 3), value, np.float32), truth)


def test_the_signs_of_differences():
    assert saliency.sign_flip([1.0] * 9) == 2 / 512
    assert saliency.sign_flip([0.0, 0.0]) == 1
    assert saliency.sign_flip([3, -1]) == 0.5 * 2  # means 1, 2, -2, -1 of the four choices
    assert saliency.sign_flip([3, 1]) == 0.5


def test_the_smaller_part_is_the_foreground():
    mask = np.float32([[0.9, 0.6], [0.6, 0.1]])
    np.testing.assert_array_equal(saliency.with_polarity(mask), 1 - mask)
    np.testing.assert_array_equal(saliency.with_polarity(1 - mask), 1 - mask)
    for mean in (0.49, 0.51):
        one = mask - mask.mean() + np.float32(mean)
        np.testing.assert_array_equal(saliency.with_polarity(one), one if mean < 0.5 else 1 - one)


def test_the_part_that_is_rare_on_the_border_is_the_foreground():
    mask = np.full((24, 36), 0.9, np.float32)
    mask[:2] = mask[-2:] = mask[:, :2] = mask[:, -2:] = 0.8  # two pixels are a twelfth
    for one in (mask, 1 - mask):
        np.testing.assert_array_equal(saliency.with_polarity(one, "border"), mask)
    mask[:], mask[1:-1, 1:-1], mask[2:-2, 2:-2] = 0.95, 0.1, 0.6
    np.testing.assert_array_equal(saliency.with_polarity(mask, "border"), mask)
    mask[:], mask[2:-2, 2:-2], mask[3:-3, 3:-3] = 0.6, 0, 0.55  # three pixels are rarer
    np.testing.assert_array_equal(saliency.with_polarity(mask, "border"), 1 - mask)


def test_a_mask_is_enlarged_and_filtered(rng):
    picture = rng.integers(0, 256, (60, 90, 3), np.uint8) // 2
    picture[:, 40:] += 120
    small = np.float32(rng.random((4, 6)) > 0.5)
    large = saliency.enlarged(small, picture, filtered=False)
    np.testing.assert_allclose(large, cv2.resize(small, (90, 60)), atol=1e-6)
    grey = picture.mean(axis=2) / 255
    filtered = saliency.enlarged(small, picture, filtered=True)
    radius = 2  # 9 at a side of 320

    def means(values):
        size = (2 * radius + 1,) * 2
        area = cv2.boxFilter(np.ones((60, 90)), -1, size, normalize=False, borderType=0)
        sums = cv2.boxFilter(values, -1, size, normalize=False, borderType=0)
        return sums / area

    slope = means(grey * large) - means(grey) * means(large)
    slope /= means(grey**2) - means(grey) ** 2 + 1e-3
    wanted = means(slope) * grey + means(means(large) - slope * means(grey))
    assert wanted.min() < -5e-4
    np.testing.assert_allclose(filtered, wanted.clip(0, 1), atol=2e-5)


def test_the_centre_prior_is_an_ellipse():
    mask = saliency.centre_prior(200, 400, 0.2) > 0.5
    assert mask.mean() == pytest.approx(2 * np.log(2) * np.pi * 0.2**2, rel=0.01)
    np.testing.assert_array_equal(mask, mask[::-1, ::-1])
    assert mask[:, 200].sum() == pytest.approx(mask[100].sum() / 2, abs=2)


def test_regions_that_are_rare_on_the_border_are_inside():
    labels = np.zeros((6, 8), int)
    labels[:3, :3], labels[2:4, 3:6] = 1, 2  # a corner, and the middle
    np.testing.assert_array_equal(saliency.inner_regions(labels), labels == 2)
    assert not saliency.inner_regions(np.zeros((4, 5), int)).any()
    ring = np.ones((8, 8), int)
    ring[[0, -1]] = ring[:, [0, -1]] = ring[2:-2, 2:-2] = 0  # the border is one position wide
    np.testing.assert_array_equal(saliency.inner_regions(ring), ring)


def test_otsu_finds_a_dark_square():
    picture = np.full((40, 40, 3), 200, np.uint8)
    picture[10:25, 15:30] = 30
    np.testing.assert_array_equal(saliency.otsu(picture), picture[..., 0] == 30)


def test_the_normalised_cut_separates_weakly_connected_positions():
    inside = np.zeros((6, 8), bool)
    inside[2:5, 3:6] = True
    same = inside.ravel()[:, None] == inside.ravel()
    found = saliency.normalised_cut(np.where(same, 1, 0.1), 6, 8)
    np.testing.assert_array_equal(found, inside)


def test_the_normalised_cut_is_that_of_the_generalised_problem(rng):
    """(D - W) y = lambda D y, of which y of the second smallest lambda is divided at its mean."""
    for number in range(5):
        weights = rng.random((48, 48)) ** 6 * rng.random(48) ** 2
        weights += weights.T + 1e-3
        values, vectors = np.linalg.eig(np.eye(48) - weights / weights.sum(1, keepdims=True))
        second = vectors[:, values.real.argsort()[1]].real
        wanted = saliency.inner_regions((second > second.mean()).astype(int).reshape(6, 8))
        with case(number):
            np.testing.assert_array_equal(saliency.normalised_cut(weights, 6, 8), wanted)


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def test_things_of_coco(tmp_path, monkeypatch):
    monkeypatch.setenv("SEG_DATA", str(tmp_path))
    write(tmp_path / "coco_mini/images/000.jpg", np.zeros((1, 4, 3), np.uint8))
    write(tmp_path / "coco_mini/semantic_masks/000.png", np.uint8([[0, 7, 9, 9]]))
    file = tmp_path / "coco_mini/categories.json"
    entry = {"categories": [{"id": 7, "isthing": 0}, {"id": 9, "isthing": 1}]}
    file.write_text(json.dumps(entry))
    pictures = [p for part in ("trained", "held_out") for p in datasets.coco_mini(part)]
    assert datasets.coco_things(pictures[0]).tolist() == [[False, False, True, True]]
    file.write_text("{}")
    with pytest.raises(InputError, match="is not the list"):
        datasets.coco_things(pictures[0])
    file.unlink()
    with pytest.raises(InputError, match=r"no .*categories\.json"):
        datasets.coco_things(pictures[0])
    file.mkdir()
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        datasets.coco_things(pictures[0])


def test_davis_more_and_the_folders_of_the_training(tmp_path, monkeypatch):
    monkeypatch.setenv("SEG_DATA", str(tmp_path))
    for number in range(4):
        write(tmp_path / f"davis_more/frames/bear/{number:05}.jpg", np.zeros((2, 3, 3), np.uint8))
        write(tmp_path / f"davis_more/masks/bear/{number:05}.png", np.zeros((2, 3), np.uint8))
    names = [frame.name for frame in datasets.davis(3, folder="davis_more")]
    assert names == ["bear/00000", "bear/00003"]
    with pytest.raises(InputError, match=r"no .*coco_mini"):
        datasets.boosting_folders()
    for name in ("coco_mini/images", "bsds500/images/train"):
        (tmp_path / name).mkdir(parents=True)
    assert [p.parts[-3] for p in datasets.boosting_folders()][1] == "bsds500"
