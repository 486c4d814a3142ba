"""The protocols against slow loops that spell out the definition, and on maps of known scores."""

from itertools import permutations

import numpy as np
import pytest
from cases import case
from developer_data import needs_data
from slow_protocols import (
    clustered,
    drawn,
    pixels,
    slow_best,
    slow_boundary_f,
    slow_corloc,
    slow_dynaseg,
    slow_f,
    slow_many_to_one,
    slow_matching,
    slow_one_to_one,
    slow_parts,
    with_pil,
)

from benchmarks.quality import datasets, evaluators, metrics, protocols
from benchmarks.quality.layouts import IGNORED, Boxes
from runtime.errors import InputError


def slow_regions(pairs):
    pools = {"all": [], "fine": [], "coarse": []}
    ones, manys = [], []
    for prediction, annotators in pairs:
        found = pixels(prediction)
        truths = [pixels(truth) for truth in annotators]
        counts = [len(truth) for truth in truths]
        finest = truths[counts.index(max(counts))]
        pools["all"].append([v for truth in truths for v in slow_best(found, truth)])
        pools["fine"].append(slow_best(found, finest))
        pools["coarse"].append(slow_best(found, truths[counts.index(min(counts))]))
        ones.append(slow_one_to_one(found, finest))
        manys.append(slow_many_to_one(found, finest))
    scores = {name: np.mean([v for part in parts for v in part]) for name, parts in pools.items()}
    scores["mean"] = np.mean(list(scores.values()))
    scores |= {f"picture {n}": np.mean([np.mean(p) for p in pool]) for n, pool in pools.items()}
    return scores | {"one-to-one": np.mean(ones), "compat dynaguide": np.mean(manys)}


def regions_of_pictures(rng, count=3):
    return [(drawn(rng, 4), [drawn(rng, 2 + k) for k in (1, 2, 0)]) for _ in range(count)]


def test_regions_match_a_slow_loop():
    for seed in range(6):
        with case(seed):
            pairs = regions_of_pictures(np.random.default_rng(seed))
            found = evaluators.score_regions(pairs, compat="dynaguide")
            slow = slow_regions(pairs)
            assert {name: found[name] for name in slow} == pytest.approx(slow)
            alone = [evaluators.score_regions([pair]) for pair in pairs]
            scores = np.array([[one[part] for part in evaluators.PARTS] for one in alone])
            pooled = evaluators.pool(scores, np.array([evaluators.part_sizes(a) for _, a in pairs]))
            assert {name: found[name] for name in pooled} == pytest.approx(pooled)
            assert found["segments"] == np.mean([len(pixels(p)) for p, _ in pairs])
            assert found["true segments"] == np.mean([len(pixels(t)) for _, a in pairs for t in a])


def test_regions_weigh_labels_not_pictures():
    y, x = np.mgrid[:16, :16]
    quadrants, cells, flat = y // 8 * 2 + x // 8, y // 4 * 4 + x // 4, 0 * x
    score = evaluators.score_regions([(quadrants, [flat, quadrants, cells]), (flat, [flat])])
    fine = (16 * 1 / 4 + 1) / 17
    coarse = (1 / 4 + 1) / 2
    every = (1 / 4 + 4 * 1 + 16 * 1 / 4 + 1) / 22
    wanted = {"all": every, "fine": fine, "coarse": coarse, "mean": (every + fine + coarse) / 3}
    assert {name: score[name] for name in wanted} == pytest.approx(wanted)


def test_the_first_of_equally_fine_annotators_is_taken():
    left_right, corner = np.zeros((2, 4, 4), int)
    left_right[:, 2:], corner[:2, :2] = 1, 1
    first = evaluators.score_regions([(left_right, [left_right, corner])])
    last = evaluators.score_regions([(left_right, [corner, left_right])])
    assert first["fine"] == first["coarse"] == 1.0
    assert last["fine"] == last["coarse"] == metrics.best_iou(left_right, corner).mean() < 1
    assert first["all"] == pytest.approx(last["all"])


def test_segments_leave_void_out_of_both_maps():
    """But DynaGuide's evaluator, for which void is one more region."""
    for seed in range(6):
        with case(seed):
            rng = np.random.default_rng(seed)
            pairs = [(drawn(rng, 4), drawn(rng, 3).astype(np.uint8)) for _ in range(3)]
            for prediction, truth in pairs:
                truth[2] = IGNORED
                prediction[2, :2] = 9  # a region in void alone
            best, ones, manys, counts = [], [], [], []
            for prediction, truth in pairs:
                true = pixels(truth, skip=IGNORED)
                valid = set().union(*true)
                found = [f & valid for f in pixels(prediction) if f & valid]
                best.append(slow_best(found, true))
                ones.append(slow_one_to_one(found, true))
                manys.append(slow_many_to_one(pixels(prediction), pixels(truth)))
                counts.append(len(found))
            scores = evaluators.score_segments(pairs, compat="dynaguide")
            assert scores["best IoU"] == pytest.approx(np.mean([v for b in best for v in b]))
            assert scores["picture best IoU"] == pytest.approx(np.mean([np.mean(b) for b in best]))
            assert scores["one-to-one"] == pytest.approx(np.mean(ones))
            assert scores["compat dynaguide"] == pytest.approx(np.mean(manys))
            assert scores["segments"] == np.mean(counts)


def test_the_coarse_annotator_is_the_first_of_equals():
    """And the fine one: both have two regions."""
    first, second = np.array([[0, 0, 0, 1]]), np.array([[0, 1, 1, 1]])
    found = evaluators.score_regions([(first, [first, second])], compat="dynaguide")
    assert (found["fine"], found["coarse"], found["one-to-one"]) == (1, 1, 1)
    assert found["compat dynaguide"] == 1 > found["all"]


def test_maps_of_other_sizes_are_errors():
    wide, tall = np.zeros((2, 3), int), np.zeros((3, 2), int)
    for score, truth in (
        (evaluators.score_regions, [wide]), (evaluators.score_segments, wide),
        (lambda p: evaluators.score_clusters(p, classes=2), wide),
        (lambda p: evaluators.score_each_by_itself(p, classes=2), wide),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"\(3, 2\)"):
            score([(tall, truth)])


def test_names_of_labels_change_nothing():
    rng = np.random.default_rng(0)
    pairs = regions_of_pictures(rng)
    renamed = [(np.array([70, 9, 200000, 3])[p], [7 - t for t in a]) for p, a in pairs]
    before = evaluators.score_regions(pairs, compat="dynaguide")
    assert evaluators.score_regions(renamed, compat="dynaguide") == pytest.approx(before)
    clusters = [(p, a[0]) for p, a in pairs]
    moved = [(np.array([70, 9, 200000, 3])[p], t) for p, t in clusters]
    scores = evaluators.score_clusters(clusters, classes=3)
    assert evaluators.score_clusters(moved, classes=3) == pytest.approx(scores)


def test_smaller_regions_are_never_worse_for_many_to_one_but_for_one_to_one():
    """Pixels as regions, each of one true region, are perfect for DynaGuide's evaluator."""
    fell = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        truth = drawn(rng, 4)
        parts = 10 * truth + rng.integers(3, size=truth.shape)  # each true region in three parts
        shared, finer = (
            metrics.contingency(p, truth)
            for p in (parts, np.arange(truth.size).reshape(truth.shape))
        )
        assert evaluators.many_to_one(shared) == evaluators.many_to_one(finer) == 1
        assert evaluators.one_to_one(finer) < evaluators.one_to_one(shared) < 1
        coarse = drawn(rng, 2)
        before, after = (
            evaluators.many_to_one(metrics.contingency(p, truth))
            for p in (coarse, coarse * 10 + truth)
        )
        assert after >= before
        fell += before < 1
    assert fell > 10


def test_clusters_are_matched_once_for_all_pictures():
    for clusters in (2, 3, 4):
        for seed in range(3):
            with case(clusters, seed):
                pairs = clustered(np.random.default_rng(seed), clusters)
                found = evaluators.score_clusters(pairs, classes=3)
                acc, miou = slow_matching(pairs, 3)
                assert (found["acc"], found["mIoU"]) == pytest.approx((acc, miou))


def test_one_matching_for_all_pictures_is_stricter_than_one_for_each():
    """Two pictures with the names of their clusters exchanged."""
    truth = np.repeat([[0, 1]], 4, axis=0).repeat(4, axis=1)
    pairs = [(truth, truth), (1 - truth, truth)]
    assert evaluators.score_clusters(pairs, classes=2)["acc"] == 0.5
    scores = evaluators.score_each_by_itself(pairs, classes=2)
    assert scores["compat diffseg acc"] == scores["compat diffseg mIoU"] == 1


def test_a_matching_for_each_picture_matches_a_slow_loop():
    for seed in range(5):
        with case(seed):
            pairs = clustered(np.random.default_rng(seed), 3)
            hits, union, total = np.zeros(3), np.zeros(3), 0
            for prediction, truth in pairs:
                true = [set(zip(*np.nonzero(truth == c), strict=True)) for c in range(3)]
                valid = set().union(*true)
                found = [set(zip(*np.nonzero(prediction == k), strict=True)) for k in range(3)]
                ways = list(permutations([f & valid for f in found]))
                sums = [sum(len(a & b) for a, b in zip(w, true, strict=True)) for w in ways]
                assert sums.count(max(sums)) == 1
                way = ways[sums.index(max(sums))]
                hits += [len(a & b) for a, b in zip(way, true, strict=True)]
                union += [len(a | b) for a, b in zip(way, true, strict=True)]
                total += len(valid)
            scores = evaluators.score_each_by_itself(pairs, classes=3)
            assert scores["compat diffseg acc"] == pytest.approx(hits.sum() / total)
            assert scores["compat diffseg mIoU"] == pytest.approx((hits / union).mean())
            assert scores["segments"] == 3


def test_a_cluster_that_remains_is_false_for_a_class_without_truth():
    """In DiffSeg's evaluator: class 1 has no pixel and one wrong one."""
    pair = np.array([[0, 0, 0, 1]]), np.zeros((1, 4), int)
    found = evaluators.score_each_by_itself([pair], classes=2)
    assert found["compat diffseg mIoU"] == pytest.approx((0.75 + 0) / 2)
    assert evaluators.score_each_by_itself([pair], classes=3)["segments"] == 2


def test_unmatched_clusters_are_misses():
    """One class in two clusters, of which one matches no class."""
    prediction, truth = np.array([[0, 0, 0, 1]]), np.array([[0, 0, 0, 0]])
    for score in (evaluators.score_clusters, evaluators.score_each_by_itself):
        found = score([(prediction, truth)], classes=1)
        assert [v for k, v in found.items() if k.endswith(("acc", "mIoU"))] == [0.75, 0.75]


def test_stuff_has_a_matching_of_its_own():
    """Cluster 0 has more pixels of a thing than of stuff, so that only the second matching uses it
    for stuff."""
    truth = np.array([[0, 0, 0, 12, 12, 13]])
    prediction = np.array([[0, 0, 0, 0, 0, 1]])
    found = evaluators.score_clusters([(prediction, truth)], classes=27, stuff=True)
    assert (found["acc"], found["stuff acc"], found["stuff mIoU"]) == (4 / 6, 1, 1)


def test_the_matching_of_stuff_matches_a_slow_loop():
    """Of three classes of things and three of stuff, some pixels have no class."""
    for seed in range(3):
        with case(seed):
            rng = np.random.default_rng(seed)
            pairs = []
            for prediction, truth in clustered(rng, 4):
                stuff = np.where(truth == IGNORED, IGNORED, truth + 12)
                pairs.append((prediction, np.where(rng.random(truth.shape) < 0.3, truth, stuff)))
            found = evaluators.score_clusters(pairs, classes=27, stuff=True)
            only = [(p, np.where(t < 12, IGNORED, t).astype(int) - 12) for p, t in pairs]
            expected = slow_matching(only, 3)
            assert (found["stuff acc"], found["stuff mIoU"]) == pytest.approx(expected)


def dynaseg_pictures(rng, overflow):
    """Three pictures of classes 1, 20 and 26. The channels above 26 of the first two are counted
    for classes 2 and 21; those of class 26, in the first picture, are outside of the table."""
    for picture in range(3):
        truth = rng.integers(3, size=(24, 24))
        own = np.array([4, 15, [2, 22, 2][picture]])[truth]
        third = rng.choice([40] if overflow and picture == 0 else [4, 15], truth.shape)
        other = np.where(truth < 2, np.array([30, 33, 0])[truth], third)
        channels = np.where(rng.random(truth.shape) < 0.7, own, other)
        truth = np.array([1, 20, 26])[truth]
        truth[rng.random(truth.shape) < 0.1] = IGNORED
        yield channels, truth


def test_dynaseg_matches_a_slow_loop():
    names = [f"{p}{n}" for p in ("", "things ", "stuff ") for n in ("acc", "mIoU", "mean acc")]
    for seed in range(6):
        with case(seed):
            pairs = [*dynaseg_pictures(np.random.default_rng(seed), seed % 2)]
            slow = [slow_dynaseg(*pair) for pair in pairs]
            assert (slow[0] is None) == seed % 2 and None not in slow[1:]
            means = np.mean([measures for measures in slow if measures], axis=0)
            expected = {f"compat dynaseg {n}": v for n, v in zip(names, means, strict=True)}
            found = evaluators.score_as_dynaseg(pairs)
            assert found == pytest.approx(expected | {"left out": seed % 2 / 3})
            assert len({*found.values()}) == 10  # so that no two measures are exchanged unseen


def test_channels_decide_on_the_blocks_of_dynaseg():
    """Two classes of stuff, perfectly segmented by channels 3 and 20: one counts as a thing."""
    truth = np.array([[12, 12, 13, 13]])
    found = evaluators.score_as_dynaseg([(np.array([[3, 3, 20, 20]]), truth)])
    assert found.pop("left out") == 0 and set(found.values()) == {1}
    for channels in ([3, 3, 8, 8], [12, 12, 13, 13]):  # no pixel for "stuff", or for "things"
        with pytest.raises(InputError, match="leaves out all 1 pictures"):
            evaluators.score_as_dynaseg([(np.array([channels]), truth)])


def test_both_f_measures_of_saliency():
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(4):
        truth = drawn(rng, 2).astype(bool)
        values = (110 * truth + rng.integers(146, size=truth.shape)).astype(int)
        pairs.append((values / 255, truth))
    found = evaluators.score_saliency(pairs)
    curves = np.array(
        [[slow_f(m, t, i / 255, 0.3) for i in range(1, 256)] for m, t in pairs], dtype=float
    )
    assert found["max F (MOVE)"] == pytest.approx(curves.mean(axis=0).max())
    strict = [max(slow_f(m, t, (i + 1) / 255, 0.3**2) for i in range(255)) for m, t in pairs]
    assert found["max F (SelfMask)"] == pytest.approx(np.mean(strict))
    assert found["max F (MOVE)"] != pytest.approx(found["max F (SelfMask)"])
    sides = [((m > 0.5), t) for m, t in pairs]
    assert found["acc"] == pytest.approx(np.mean([(a == t).mean() for a, t in sides]))
    assert found["IoU"] == pytest.approx(np.mean([(a & t).sum() / (a | t).sum() for a, t in sides]))


def test_a_picture_without_object_has_no_f_of_selfmask():
    pairs = [(np.zeros((2, 2)), np.zeros((2, 2), bool)), (np.eye(2), np.eye(2) > 0)]
    assert evaluators.score_saliency(pairs)["max F (SelfMask)"] == 0.5


def test_a_truth_without_pixels_to_score_is_an_error():
    void = np.full((2, 2), IGNORED)
    with pytest.raises(InputError, match="a truth has no pixel to score"):
        evaluators.score_segments([(void, void)])
    for score in (evaluators.score_clusters, evaluators.score_each_by_itself):
        with pytest.raises(InputError, match="no pixel of the pictures has "):
            score([(void, void)], classes=3)
    with pytest.raises(InputError, match="all masks and truths are empty"):
        evaluators.score_saliency([(np.zeros((2, 2)), np.zeros((2, 2), bool))])


def test_things_alone_have_no_scores_of_stuff():
    found = evaluators.score_clusters([(np.eye(2, dtype=int),) * 2], classes=27, stuff=True)
    assert [*found] == ["acc", "mIoU", "clusters"]


def test_thresholds_of_saliency_are_1_to_255():
    """A black mask is nowhere foreground; a value of 1 and one of 255 are at some threshold."""
    truth = np.eye(2) > 0
    for values, right in ((0 * truth, 0), (truth / 255, 1), (1 - 1 / 255 * ~truth, 1)):
        scores = evaluators.score_saliency([(values, truth)])
        assert scores["max F (SelfMask)"] == scores["max F (MOVE)"] == right


def test_the_foreground_is_above_half():
    """128 is foreground, 127 is not; a picture without any is left out of the mean of the IoU."""
    truth = np.array([[True, False]])
    pairs = [(np.array([[128, 127]]) / 255, truth), (np.zeros((1, 2)), np.zeros((1, 2), bool))]
    found = evaluators.score_saliency(pairs)
    assert (found["acc"], found["IoU"]) == (1, 1)
    box = Boxes((1, 2), np.array([[0, 0, 1, 1]], float))
    assert evaluators.score_corloc([(np.array([[0.5, 0.5]]), box)]) == {"CorLoc": 0, "empty": 1}


def test_corloc_matches_a_slow_loop():
    rng = np.random.default_rng(1)
    pairs = []
    while len(pairs) < 60:
        mask = (rng.random((9, 8)) < 0.5) * rng.uniform(0.4, 1)
        sizes = [len(part) for part in slow_parts(mask)]
        if sizes.count(max(sizes, default=0)) > 1:
            continue  # either part is right
        corners = rng.integers(0, 3, size=(2, 2))
        boxes = np.concatenate([corners, corners + rng.integers(3, 7, size=(2, 2))], axis=1)
        pairs.append((mask, Boxes(mask.shape, boxes.astype(float))))
    slow = [slow_corloc(mask, truth.boxes.astype(int)) for mask, truth in pairs]
    found = evaluators.score_corloc(pairs)
    assert 0.1 < np.mean(slow) < 0.9
    assert found["CorLoc"] == pytest.approx(np.mean(slow))
    assert found["empty"] == np.mean([not (mask > 0.5).any() for mask, _ in pairs]) > 0


def test_corloc_of_known_boxes():
    mask = np.zeros((6, 8))
    mask[1:4, 2:6] = 1
    mask[4, 6] = 1  # touches by a corner only
    size = mask.shape
    for box, right in (
        ([2, 1, 6, 4], 1),
        ([2, 1, 6, 7], 1),
        ([2, 1, 6, 8], 0),
        ([6, 4, 7, 5], 0),
        ([10, 8, 14, 11], 0),
    ):
        with case(str(box)):
            others = np.array([[0, 0, 1, 1], box], float)
            assert evaluators.score_corloc([(mask, Boxes(size, others))])["CorLoc"] == right
    none = Boxes(size, np.zeros((0, 4)))
    assert evaluators.score_corloc([(mask, none)]) == {"CorLoc": 0, "empty": 0}
    assert evaluators.score_corloc([(0 * mask, Boxes(size, others))]) == {"CorLoc": 0, "empty": 1}


def test_davis_is_the_mean_over_frames():
    rng = np.random.default_rng(0)
    pairs = []
    for place in (2, 6, 12):
        truth = np.zeros((16, 17), bool)
        truth[3:9, place : place + 4] = True
        pairs.append((np.where(rng.random(truth.shape) < 0.02, 3, 3 * truth), truth))
    found = evaluators.score_davis(pairs)
    ious = [(p > 0) & t for p, t in pairs]
    expected = [i.sum() / ((p > 0) | t).sum() for i, (p, t) in zip(ious, pairs, strict=True)]
    assert found["IoU"] == pytest.approx(np.mean(expected))
    assert 0 < found["F"] < 1
    assert found["F"] == pytest.approx(np.mean([slow_boundary_f(p > 0, t) for p, t in pairs]))


def test_cuts_of_label_maps():
    """Beside PIL, which PiCIE and STEGO use: sizes of COCO, Cityscapes and tiles of Potsdam too, of
    which 640 and 1024 have middles on the edge of two pixels."""
    labels = np.arange(35).reshape(5, 7)
    for height, width in ((5, 7), (10, 14), (3, 4), (1, 1)):
        with case((height, width)):
            found = protocols.nearest(labels, height, width)
            for y, x in np.ndindex(height, width):
                source = int((y + 0.5) * 5 / height), int((x + 0.5) * 7 / width)
                assert found[y, x] == labels[source]
    for old, new in (((640, 427), (640, 480)), ((480, 640), (640, 480)), ((1024, 512), (320, 640))):
        with case(old, new):
            labels = np.arange(old[0] * old[1]).reshape(old)
            assert np.array_equal(protocols.nearest(labels, *new), with_pil(labels, *new))
    labels = np.arange(333 * 500).reshape(333, 500)
    middle = with_pil(labels, 320, 480)[:, 80:400]
    assert np.array_equal(protocols.middle_square(labels, 320), middle)
    labels = np.arange(200 * 200).reshape(200, 200)
    assert np.array_equal(protocols.tile(labels, 224), with_pil(labels, 224, 224))
    labels = np.arange(35).reshape(5, 7)
    assert np.array_equal(protocols.middle_square(labels, 5), labels[:, 1:6])
    assert np.array_equal(protocols.square_first(labels.T, 5), labels.T[1:6])
    labels = np.arange(40).reshape(5, 8)  # 3 too many: 2 of STEGO, 1 of DiffSeg
    assert np.array_equal(protocols.middle_square(labels, 5), labels[:, 2:7])
    assert np.array_equal(protocols.square_first(labels, 5), labels[:, 1:6])
    assert np.array_equal(protocols.middle_square(labels.T, 5), labels.T[2:7])
    assert np.array_equal(protocols.square_first(labels.T, 5), labels.T[1:6])


def test_each_protocol_has_its_cut_and_classes():
    labels = np.arange(300 * 451).reshape(300, 451)
    square = with_pil(labels[:, 75:375], 512, 512)
    for name in ("coco27", "cityscapes27"):
        score, cut = protocols.score_of(name, "diffseg")
        assert np.array_equal(cut(labels), square) and score.keywords == {"classes": 27}
    score, cut = protocols.score_of("coco27", "")
    assert cut(labels).shape == (320, 320) and score.keywords == {"classes": 27, "stuff": True}
    assert protocols.score_of("cityscapes27", "")[0].keywords == {"classes": 27, "stuff": False}
    score, cut = protocols.score_of("potsdam3", "")
    assert score.keywords == {"classes": 3} and cut(np.zeros((224, 224))).shape == (224, 224)
    for shape in ((225, 225), (200, 199)):
        with case(shape), pytest.raises(InputError, match="are no tile of Potsdam-3"):
            cut(np.zeros(shape))
    assert protocols.middle_square(labels, 10).shape == (10, 10)


def grid(height, width, rows, columns):
    return (np.arange(height)[:, None] * rows // height) * columns + (
        np.arange(width) * columns // width
    )


def cells(height, width, side):
    return np.arange(height)[:, None] // side * width + np.arange(width) // side


# Predictions that need no program, and their scores on the 100 pictures of BSDS500 val:
# "all", "fine", "coarse", "mean", "one-to-one", "compat dynaguide".
NO_PROGRAM = {
    "one segment": (
        lambda *size: np.zeros(size, int),
        (0.051038, 0.027315, 0.106270, 0.061541, 0.016611, 0.016611),
    ),
    "2 x 3 grid": (
        lambda *size: grid(*size, 2, 3),
        (0.101677, 0.067152, 0.157761, 0.108863, 0.059350, 0.067161),
    ),
    "4 x 6 grid": (
        lambda *size: grid(*size, 4, 6),
        (0.131816, 0.104777, 0.159955, 0.132183, 0.097036, 0.142781),
    ),
    "16-pixel cells": (
        lambda *size: cells(*size, 16),
        (0.131757, 0.158871, 0.104714, 0.131781, 0.136629, 0.404417),
    ),
    "8-pixel cells": (
        lambda *size: cells(*size, 8),
        (0.098773, 0.122094, 0.074427, 0.098431, 0.108560, 0.521625),
    ),
}
COLUMNS = ("all", "fine", "coarse", "mean", "one-to-one", "compat dynaguide")


@pytest.fixture(scope="module")
def val():
    return [picture.annotators() for picture in datasets.bsds(100)]


@needs_data
@pytest.mark.data
@pytest.mark.parametrize("name", NO_PROGRAM)
def test_scores_of_no_program_on_bsds500_val(val, name):
    make, expected = NO_PROGRAM[name]
    pairs = ((make(*truths[0].shape), truths) for truths in val)
    found = evaluators.score_regions(pairs, compat="dynaguide")
    assert [found[column] for column in COLUMNS] == pytest.approx(expected, abs=1e-6)
    assert found["true segments"] == pytest.approx(19.593407, abs=1e-6)


@needs_data
@pytest.mark.data
def test_scores_of_the_next_annotator_on_bsds500_val(val):
    """The prediction for an annotator is the map of the next one in the file."""
    pairs = [[(a[(i + 1) % len(a)], [t]) for i, t in enumerate(a)] for a in val]
    counts = [[len(np.unique(t)) for t in truths] for truths in val]
    every = evaluators.score_regions(pair for each in pairs for pair in each)
    fine = evaluators.score_regions(
        (each[c.index(max(c))] for each, c in zip(pairs, counts, strict=True)), compat="dynaguide"
    )
    coarse = evaluators.score_regions(
        each[c.index(min(c))] for each, c in zip(pairs, counts, strict=True)
    )
    three = every["all"], fine["all"], coarse["all"]
    found = (*three, np.mean(three), fine["one-to-one"], fine["compat dynaguide"])
    expected = (0.378613, 0.232820, 0.569526, 0.393653, 0.250413, 0.257763)
    assert found == pytest.approx(expected, abs=1e-6)
