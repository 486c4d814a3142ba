"""Which cluster is which class: Hungarian matching over a whole data set.

The protocol is that of IIC (Ji et al., ICCV 2019), PiCIE (Cho et al., CVPR 2021) and STEGO
(Hamilton et al., ICLR 2022): the pixels of all pictures are counted in one table of clusters and
classes, unlabelled pixels are left out, and the assignment of one cluster to one class maximises
the number of right pixels (Kuhn, 1955).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from runtime.core.resize import resize
from runtime.errors import InputError, MissingBackend
from runtime.prior.preprocess import Preprocess

if TYPE_CHECKING:
    from torch.nn import Module


@dataclass(frozen=True)
class Matching:
    """The class of each cluster, and how right it is.

    Parameters
    ----------
    cluster_to_class : the class of each cluster; -1 for a cluster that matches no class.
    accuracy : share of the labelled pixels whose cluster has their class, in [0, 1]. A pixel of a
        cluster without a class is wrong.
    miou : mean over the classes that occur in the labels of TP / (TP + FP + FN), in [0, 1].
    iou : TP / (TP + FP + FN) of each class; None for a class that does not occur.
    """

    cluster_to_class: tuple[int, ...]
    accuracy: float
    miou: float
    iou: tuple[float | None, ...]


def confusion(clusters: np.ndarray, labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Count the pixels of one picture by cluster (row) and class (column).

    The counts of several pictures can be added.

    Parameters
    ----------
    clusters : (H, W) integer in [0, K).
    labels : (H, W) integer; pixels outside of [0, C), such as -1, are not counted.
    shape : (K, C).

    Returns
    -------
    (K, C) int64.

    Raises
    ------
    InputError : the two maps have different sizes.

    Example
    -------
    >>> clusters, labels = np.array([[0, 0], [1, 1]]), np.array([[1, 1], [0, -1]])
    >>> confusion(clusters, labels, (2, 2))
    array([[0, 2],
           [1, 0]])
    """
    if clusters.shape != labels.shape:
        raise InputError(
            f"the labels have {labels.shape} pixels and the clusters {clusters.shape}",
            fix="pass maps of the same size",
        )
    rows, columns = shape
    valid = (labels >= 0) & (labels < columns)
    index = clusters[valid].astype(np.int64) * columns + labels[valid]
    return np.bincount(index, minlength=rows * columns).reshape(shape)


def cluster_map(probabilities: np.ndarray, height: int, width: int) -> np.ndarray:
    """The cluster of each pixel of a picture.

    Parameters
    ----------
    probabilities : (K, h, w) float32 of the network, which :func:`runtime.core.resize.resize`
        enlarges bilinearly, between pixel centres.

    Returns
    -------
    (height, width) int64, the number of the most probable cluster.

    Example
    -------
    >>> cluster_map(np.float32([[[0.9, 0.1]], [[0.1, 0.9]]]), 2, 4)
    array([[0, 0, 1, 1],
           [0, 0, 1, 1]])
    """
    planes = np.ascontiguousarray(probabilities.transpose(1, 2, 0), np.float32)
    return resize(planes, height, width).argmax(-1)


def confusion_of(
    network: Module,
    preprocess: Preprocess,
    pairs: Iterable[tuple[np.ndarray, np.ndarray]],
    classes: int,
) -> np.ndarray:
    """Count the pixels of pictures by cluster (row) and class (column), as the frozen prior would:
    each picture is stretched to the input, and the probabilities are enlarged to the labels.

    Parameters
    ----------
    network : from (1, 3, h, w) float32 to (1, K, h', w') probabilities, in eval mode, on any
        device.
    preprocess : from a picture to the input.
    pairs : each a picture, (H, W, 3) uint8 RGB, and its labels, (H, W) integer. Pixels whose label
        is outside of [0, ``classes``) are not counted.
    classes : their number C.

    Returns
    -------
    (K, C) int64.

    Raises
    ------
    InputError : a part of the network is in training mode; labels have another size than their
        picture; or there is no pair.

    Example
    -------
    >>> match(confusion_of(network, preprocess, LabelSet(...).read(classes), 27)).miou
    """
    import torch

    if any(part.training for part in network.modules()):
        raise InputError(
            "a part of the network is in training mode, in which its clusters are random",
            fix="network.eval() before, and for the head head.train() after the call",
        )
    tensors = (*network.parameters(), *network.buffers())
    device = tensors[0].device if tensors else "cpu"
    total: np.ndarray | None = None
    for picture, labels in pairs:
        if labels.shape != picture.shape[:2]:
            raise InputError(
                f"labels have {labels.shape} pixels, and their picture {picture.shape[:2]}",
                fix="pass labels of the picture's size",
            )
        with torch.no_grad():
            out = network(torch.from_numpy(preprocess(picture)).to(device))[0].float().cpu().numpy()
        counts = confusion(cluster_map(out, *labels.shape), labels, (len(out), classes))
        total = counts if total is None else total + counts
    if total is None:
        raise InputError("there is no picture with labels", fix="pass at least one")
    return total


def match(counts: np.ndarray) -> Matching:
    """Assign clusters to classes so that the number of right pixels is largest.

    Each cluster has at most one class and each class at most one cluster. A cluster that shares no
    pixel with the class that is left for it matches no class.

    Parameters
    ----------
    counts : (K, C) int64 from :func:`confusion`, of all pictures together. K and C may differ.

    Raises
    ------
    InputError : there is no labelled pixel.
    MissingBackend : scipy is not installed.

    Example
    -------
    >>> match(np.array([[1, 9], [8, 0]])).cluster_to_class
    (1, 0)
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise MissingBackend(
            f"scipy is needed to match clusters and classes, but {error}",
            fix="pip install 'dynaguide-edge[train]'",
        ) from error
    found = np.full(len(counts), -1)
    for cluster, one in zip(*linear_sum_assignment(counts, maximize=True), strict=True):
        if counts[cluster, one]:
            found[cluster] = one
    return rate(counts, found.tolist())


def rate(counts: np.ndarray, cluster_to_class: Sequence[int]) -> Matching:
    """Compute how right a given matching is, for example on other pictures than it was found on.

    Parameters
    ----------
    counts : (K, C) int64 from :func:`confusion`, of all pictures together.
    cluster_to_class : the class of each of the K clusters, -1 for none.

    Raises
    ------
    InputError : there is no labelled pixel.

    Example
    -------
    >>> rate(np.array([[1, 9], [8, 2]]), (1, 0)).accuracy
    0.85
    """
    if not counts.sum():
        raise InputError(
            "no pixel of the pictures has one of the classes",
            fix="check the labels and the classes",
        )
    hits, predicted = np.zeros((2, counts.shape[1]))
    for cluster, one in enumerate(cluster_to_class):
        if one >= 0:
            hits[one] += counts[cluster, one]
            predicted[one] += counts[cluster].sum()
    real = counts.sum(0)
    occurs = real > 0
    iou = hits / np.where(occurs, real + predicted - hits, 1)
    return Matching(
        tuple(cluster_to_class),
        float(hits.sum() / counts.sum()),
        float(iou[occurs].mean()),
        tuple(float(v) if there else None for v, there in zip(iou, occurs, strict=True)),
    )
