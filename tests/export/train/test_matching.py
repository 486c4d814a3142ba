"""export/train/matching.py: counting pixels and the Hungarian assignment, with known answers."""

import itertools
import sys

import numpy as np
import pytest

from export.train.matching import Matching, cluster_map, confusion, confusion_of, match
from runtime.errors import InputError, MissingBackend
from runtime.prior.preprocess import Preprocess

pytest.importorskip("scipy", reason="clusters are matched by scipy: pip install scipy")


def test_counts_by_hand():
    clusters = np.array([[0, 0, 1], [2, 2, 1]])
    labels = np.array([[1, 1, 0], [-1, 2, 5]])  # -1 and 5 are no classes
    assert confusion(clusters, labels, (3, 3)).tolist() == [[0, 2, 0], [1, 0, 0], [0, 0, 1]]
    assert confusion(clusters.astype(np.uint8), labels, (4, 6)).sum() == 5
    assert confusion(clusters, labels, (3, 5)).sum() == 4
    with pytest.raises(InputError, match=r"labels have \(2, 3\) pixels and the clusters \(2, 2\)"):
        confusion(clusters[:, :2], labels, (3, 3))


def best_of_all(counts):
    """The largest number of right pixels of any assignment, by trying all of them."""
    rows, columns = counts.shape
    if rows > columns:
        return best_of_all(counts.T)
    return max(
        sum(counts[i, j] for i, j in enumerate(chosen))
        for chosen in itertools.permutations(range(columns), rows)
    )


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5), (1, 4)])
def test_no_assignment_has_more_right_pixels(shape, rng):
    for _ in range(20):
        counts = rng.integers(0, 30, shape)
        found = match(counts)
        pairs = [(k, c) for k, c in enumerate(found.cluster_to_class) if c >= 0]
        assert len({c for _, c in pairs}) == len(pairs) <= min(shape)
        right = sum(counts[pair] for pair in pairs)
        assert right == best_of_all(counts)
        assert found.accuracy == pytest.approx(right / counts.sum(), abs=1e-12)


def test_scores_by_hand():
    counts = np.array([[6, 2], [0, 8], [0, 4]])
    found = match(counts)
    assert found.cluster_to_class == (0, 1, -1)
    # class 0: TP 6, FP 2, FN 0; class 1: TP 8, FP 0, FN 2 + 4
    assert found.accuracy == pytest.approx(14 / 20)
    assert found.iou == pytest.approx((6 / 8, 8 / 14)) and found.miou == np.mean(found.iou)


def test_a_greedy_choice_is_worse():
    """The largest count first would match 0 with 0 and lose class 1."""
    assert match(np.array([[10, 9], [8, 0]])).cluster_to_class == (1, 0)


def test_what_shares_no_pixel_is_not_matched():
    found = match(np.array([[5, 0, 0], [0, 0, 0], [3, 0, 2]]))
    assert found.cluster_to_class == (0, -1, 2)
    assert found.iou == (pytest.approx(5 / 8), None, pytest.approx(2 / 5))
    assert found.miou == pytest.approx((5 / 8 + 2 / 5) / 2)  # class 1 does not occur
    with pytest.raises(InputError, match="no pixel of the pictures has one of the classes"):
        match(np.zeros((2, 2), int))


def test_a_class_without_a_cluster_counts_as_zero():
    assert match(np.array([[6, 4]])) == Matching((0,), 0.6, 0.3, (0.6, 0.0))


def test_scipy_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingBackend, match=r"fix: pip install 'dynaguide-edge\[train\]'"):
        match(np.eye(2, dtype=int))


def test_probabilities_are_enlarged_before_the_largest_is_taken():
    """Between a row of (0.7, 0.3) and one of (0.1, 0.9) the boundary is not in the middle."""
    planes = np.array([[[0.7], [0.1]], [[0.3], [0.9]]], np.float32)
    assert cluster_map(planes, 10, 1)[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]


class TestConfusionOf:
    """The path of the frozen prior: stretched to the input, enlarged to the labels."""

    torch = pytest.importorskip("torch", reason="networks are of torch: pip install torch")
    rule = Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3, height=16, width=16)

    class Halves(torch.nn.Module):
        """The cluster 1 where the picture is red, else 0; at half of the input's size."""

        def forward(self, x):
            assert x.shape == (1, 3, 16, 16)
            red = x[:, :1, ::2, ::2]
            return TestConfusionOf.torch.cat([1 - red, red], 1)

    def pairs(self):
        for width in (16, 32):
            picture, labels = np.zeros((16, width, 3), np.uint8), np.full((16, width), -1)
            picture[:, width // 2 :, 0] = 255
            labels[:8, : width // 2], labels[:8, width // 2 :] = 2, 0
            yield picture, labels

    def test_counts_of_all_pictures_are_added(self):
        counts = confusion_of(self.Halves().eval(), self.rule, self.pairs(), 3)
        assert counts.tolist() == [[0, 0, 64 + 128], [64 + 128, 0, 0]]

    def test_refusals(self):
        network = self.Halves()
        with pytest.raises(InputError, match="in training mode"):
            confusion_of(network, self.rule, self.pairs(), 3)
        network.eval()
        with pytest.raises(InputError, match="there is no picture with labels"):
            confusion_of(network, self.rule, [], 3)
        wrong = ((picture, labels.T) for picture, labels in self.pairs())
        with pytest.raises(InputError, match=r"labels have \(32, 16\) pixels.*\(16, 32\)"):
            confusion_of(network, self.rule, wrong, 3)
