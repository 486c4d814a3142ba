"""Clusterings of features: k-means, a trained head, chance; and their scores by matching.

Every clustering here is the arg max of scores that are an affine function of a code of the
features, such as the features themselves. Bilinear interpolation is affine too. So the scores are
enlarged instead of the code, with the same labels and less memory:

- k-means: |x - c|^2 is smallest where c . x - |c|^2 / 2 is largest;
- SegUnify: the cosine of code and prototype is largest where the product of the code with the
  prototype of length 1 is largest, as the length of the code is the same for all prototypes.

This module imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize, one_hot

import runtime
from export.models.segunify import SegUnifyHead
from export.train.energy import smoothness
from export.train.matching import match, rate
from runtime.errors import InputError

RESTARTS = 5  # of k-means; the one with the smallest distances is taken
ITERATIONS = 100  # of k-means, at most


@dataclass(frozen=True)
class Clusters:
    """The scores of K clusters.

    Parameters
    ----------
    code : from features (1, C, h, w) float32 to a code (1, D, h, w).
    weight, bias : (K, D) and (K,) float32; the scores are weight . code + bias.
    probabilities : of a trained head, from a code to (1, K, h, w); None for other clusters.
    """

    code: Callable[[Tensor], Tensor]
    weight: Tensor
    bias: Tensor
    probabilities: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """The scores (1, K, h, w) of features (1, C, h, w)."""
        scores = torch.einsum("kd,ndhw->nkhw", self.weight, self.code(features))
        return scores + self.bias[:, None, None]

    def labels(
        self, features: Tensor, size: tuple[int, int], mirrored: Tensor | None = None
    ) -> np.ndarray:
        """The cluster of each pixel: (height, width) int64.

        Parameters
        ----------
        features : (1, C, h, w) of a picture.
        size : height and width of the labels.
        mirrored : the features of the mirror image. The scores are then the mean of both, those of
            the mirror image mirrored back.
        """
        scores = self.scores(features)
        if mirrored is not None:
            scores = (scores + self.scores(mirrored).flip(3)) / 2
        large = interpolate(scores, size, mode="bilinear", align_corners=False)
        return large[0].argmax(0).numpy()

    @torch.no_grad()
    def crf_labels(self, features: Tensor, picture: np.ndarray) -> np.ndarray:
        """The cluster of each pixel after the dense CRF: (H, W) int64. The probabilities of the
        head are enlarged bilinearly, as those of an exported network.

        Parameters
        ----------
        features : (1, C, h, w) of a picture.
        picture : (H, W, 3) uint8 RGB, at the size of the labels.

        Raises
        ------
        InputError : the clusters have no probabilities.
        """
        if self.probabilities is None:
            raise InputError("the clusters have no probabilities", fix="use a trained head")
        small = self.probabilities(self.code(features))
        large = interpolate(small, picture.shape[:2], mode="bilinear", align_corners=False)
        planes = np.ascontiguousarray(large[0].permute(1, 2, 0).numpy())
        return runtime.dense_crf(picture, planes).argmax(-1)


def kmeans_clusters(points: Tensor, clusters: int, seed: int, *, unit: bool) -> Clusters:
    """Clusters of k-means.

    Parameters
    ----------
    points : (n, C) float32, the features of n positions.
    unit : scale the features of each position to length 1 before, here and in ``scores``.
    """
    centres = kmeans(normalize(points, dim=1) if unit else points, clusters, seed)
    code = normalize if unit else _same
    return Clusters(code, centres, -(centres**2).sum(1) / 2)


def head_clusters(head: SegUnifyHead) -> Clusters:
    """Clusters of a trained head: the teacher's prototypes, in eval mode."""
    head.eval()
    weight = normalize(head.teacher.detach(), dim=1)
    return Clusters(head.codes, weight, torch.zeros(len(weight)), head.probabilities)


def one_cluster(clusters: int) -> Clusters:
    """All positions are in cluster 0: the score of the most frequent class."""
    bias = torch.zeros(clusters)
    bias[0] = 1
    return Clusters(_first, torch.zeros(clusters, 1), bias)


def random_clusters(clusters: int, seed: int) -> Clusters:
    """Each position is in a random cluster."""
    generator = torch.Generator().manual_seed(seed)

    def code(features: Tensor) -> Tensor:
        size = (len(features), clusters, *features.shape[2:])
        return torch.rand(size, generator=generator)

    return Clusters(code, torch.eye(clusters), torch.zeros(clusters))


def _same(features: Tensor) -> Tensor:
    return features


def _first(features: Tensor) -> Tensor:
    return features[:, :1]


def kmeans(points: Tensor, clusters: int, seed: int) -> Tensor:
    """The centres of k-means: Lloyd's iterations (IEEE Trans. Inf. Theory 1982) from centres of
    k-means++ (Arthur and Vassilvitskii, SODA 2007), of RESTARTS starts the one with the smallest
    sum of squared distances.

    The iterations end when no point changes its centre, or after ITERATIONS. A centre without
    points remains where it is.

    Parameters
    ----------
    points : (n, C) float32, n at least ``clusters``.
    seed : of the starts.

    Returns
    -------
    (clusters, C) float32.

    Raises
    ------
    InputError : there are fewer points than clusters.
    """
    if len(points) < clusters:
        raise InputError(f"{len(points)} points cannot form {clusters} clusters", fix="use more")
    generator = torch.Generator().manual_seed(seed)
    found = [_lloyd(points, _spread_start(points, clusters, generator)) for _ in range(RESTARTS)]
    return min(found, key=lambda result: result[0])[1]


def _lloyd(points: Tensor, centres: Tensor) -> tuple[float, Tensor]:
    """The sum of squared distances, and the centres."""
    squares = (points**2).sum(1)
    labels = torch.empty(0)
    for _ in range(ITERATIONS):
        distances = squares[:, None] - 2 * points @ centres.T + (centres**2).sum(1)
        least, new = distances.min(1)
        if torch.equal(new, labels):
            break
        labels = new
        counts = torch.bincount(labels, minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return float(least.double().sum()), centres


def _spread_start(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Points that are drawn one by one, with a probability proportional to the squared distance
    from the nearest point that is drawn already."""
    first = torch.randint(len(points), (1,), generator=generator)
    chosen = [points[first]]
    least = ((points - chosen[0]) ** 2).sum(1)
    while len(chosen) < clusters:
        chance = least.clamp(min=0) + 1e-12 * float(least.max()) + 1e-30
        chosen.append(points[torch.multinomial(chance, 1, generator=generator)])
        least = torch.minimum(least, ((points - chosen[-1]) ** 2).sum(1))
    return torch.cat(chosen)


def energy(labels: Tensor, features: Tensor, shifts: tuple[float, float]) -> float:
    """The smoothness energy of clusters that are certain, within and across pictures together: that
    of SegUnify's loss without the data term. One cluster has 0; lower is better for the loss.

    Parameters
    ----------
    labels : (N, h, w) int64, the cluster of each position.
    features : (N, C, h, w) float32. Each picture is compared with the one before it.
    shifts : b1 and b2.
    """
    certain = one_hot(labels).permute(0, 3, 1, 2).float()
    others = torch.arange(len(labels)).roll(1)
    return float(sum(smoothness(features, certain, others, shifts, temperature=0.001)))


def score(
    counts: Sequence[np.ndarray], cluster_to_class: Sequence[int] | None = None
) -> dict[str, Any]:
    """Pixel accuracy and mIoU of a set of pictures, by one matching of clusters and classes.

    Parameters
    ----------
    counts : for each picture (K, C) int64 of :func:`export.train.matching.confusion`.
    cluster_to_class : the matching, -1 for a cluster without a class; None finds the one with most
        right pixels on these pictures (Hungarian method).

    Returns
    -------
    "acc": right pixels / labelled pixels; "miou": the mean of TP / (TP + FP + FN) over the classes
    that occur in the truth; "by_picture": the accuracy of each picture, NaN without labelled
    pixels; "matching": the class of each cluster.

    Raises
    ------
    InputError : there is no labelled pixel.
    """
    table = np.sum(counts, axis=0)
    found = match(table) if cluster_to_class is None else rate(table, cluster_to_class)
    return {
        "acc": found.accuracy,
        "miou": found.miou,
        "by_picture": [_right(part, found.cluster_to_class) for part in counts],
        "matching": found.cluster_to_class,
    }


def _right(counts: np.ndarray, matching: Sequence[int]) -> float:
    """The accuracy of one picture."""
    total = counts.sum()
    hits = sum(counts[cluster, one] for cluster, one in enumerate(matching) if one >= 0)
    return float(hits / total) if total else float("nan")
