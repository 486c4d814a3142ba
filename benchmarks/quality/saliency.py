"""Saliency: the scores of masks of the foreground, and masks that no training is needed for.

A mask is (H, W) float32 in [0, 1], 1 in the foreground; a truth is (H, W) bool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from benchmarks.quality import datasets
from benchmarks.quality.training import features_of
from export.backbones.base import Backbone
from runtime import guided_filter
from runtime.core.resize import resize
from runtime.errors import InputError
from runtime.opencv import cv2

BETA2 = 0.3  # beta squared of the F-measure, as in TokenCut, MOVE and Boosting
BORDER = 1 / 12  # of the shorter side: one position of 12
THRESHOLDS = np.arange(256) / 255
RADIUS, EPS, FILTER_SIDE = (
    9,
    1e-3,
    320,
)  # the published guided filter, and the side that it was used at

CHOICES = {  # the values that a baseline is tried with on the things of coco_mini
    "centre prior": (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5),
    "k-means": (2, 3, 4, 6, 8),
    "k-means of colours": (2, 3, 4, 6, 8),
}
SEEDED = ("k-means", "k-means of colours")  # baselines with random numbers


class Scores(NamedTuple):
    """The scores of one mask.

    Parameters
    ----------
    acc : share of pixels whose side of 0.5 is right.
    iou : intersection over union of the pixels above 0.5 and the truth; NaN if both are empty.
    precision, recall : (256,) of the pixels at or above each of THRESHOLDS; precision is 1 where
        no pixel is, recall is 1 if the truth is empty.
    """

    acc: float
    iou: float
    precision: np.ndarray
    recall: np.ndarray


def score(mask: np.ndarray, truth: np.ndarray) -> Scores:
    """Compare a mask with the truth.

    Raises
    ------
    InputError : the shapes differ, or the mask has values outside [0, 1].
    """
    if mask.shape != truth.shape:
        raise InputError(
            f"the mask has shape {mask.shape}, the truth {truth.shape}",
            fix="resize the mask to the size of the truth",
        )
    if not ((mask >= 0) & (mask <= 1)).all():
        raise InputError("the mask has values outside [0, 1]", fix="clip it")
    found, wanted = mask > 0.5, int(truth.sum())
    union = int((found | truth).sum())
    passed = np.searchsorted(THRESHOLDS, mask.ravel(), side="right")  # thresholds at most the value
    counts = np.stack(
        [np.bincount(part, minlength=257) for part in (passed, passed[truth.ravel()])]
    )
    above, hits = counts[:, :0:-1].cumsum(axis=1)[:, ::-1]
    return Scores(
        float((found == truth).mean()),
        int((found & truth).sum()) / union if union else float("nan"),
        np.where(above, hits / np.maximum(above, 1), 1.0),
        hits / wanted if wanted else np.ones(256),
    )


def max_f(scores: Sequence[Scores]) -> tuple[float, float]:
    """The highest mean F-measure over the thresholds, and its threshold. The mean is over pictures,
    of (1 + b) P R / (b P + R) with b = BETA2; 0 where P = R = 0.

    Example
    -------
    >>> truth = np.array([[True, False]])
    >>> max_f([score(np.float32([[0.4, 0.1]]), truth)])
    (1.0, 0.10196078431372549)
    """
    precision, recall = (np.stack([getattr(s, k) for s in scores]) for k in ("precision", "recall"))
    below = BETA2 * precision + recall
    measures = (1 + BETA2) * precision * recall / np.where(below > 0, below, 1)
    mean = measures.mean(axis=0)
    best = int(mean.argmax())
    return float(mean[best]), float(THRESHOLDS[best])


def sign_flip(differences: Sequence[float]) -> float:
    """The two-sided p-value of the mean of paired differences: the share of all choices of their
    signs whose mean is at least as far from 0 (Fisher's permutation test). With 9 differences the
    smallest possible value is 2 / 512.
    """
    values = np.asarray(differences, np.float64)
    signs = np.array([*product((-1, 1), repeat=len(values))])
    means = np.abs((signs * values).mean(axis=1))
    return float((means >= abs(values.mean()) * (1 - 1e-9)).mean())


def with_polarity(mask: np.ndarray, rule: str = "area") -> np.ndarray:
    """The mask or 1 - mask, as a rule decides which of its two parts is the foreground.

    Parameters
    ----------
    mask : (h, w) float32.
    rule : "area": the smaller part, so 1 - mask if the mean is above 0.5. "border": the part that
        is rarer on the border than elsewhere, so 1 - mask if its mean on the border, BORDER of the
        shorter side wide, is above that of the picture.
    """
    if rule == "area":
        return 1 - mask if mask.mean() > 0.5 else mask
    width = max(1, round(BORDER * min(mask.shape)))
    border = np.ones(mask.shape, bool)
    border[width:-width, width:-width] = False
    return 1 - mask if mask[border].mean() > mask.mean() else mask


def enlarged(mask: np.ndarray, picture: np.ndarray, *, filtered: bool) -> np.ndarray:
    """The mask at the size of the picture.

    Parameters
    ----------
    mask : (h, w) float32 in [0, 1], not larger than the picture. It is enlarged bilinearly.
    picture : (H, W, 3) uint8 RGB.
    filtered : apply the published guided filter, with the mean of R, G and B as the guidance. Its
        radius of RADIUS pixels at a short side of FILTER_SIDE pixels grows with the picture.

    Returns
    -------
    (H, W) float32 in [0, 1].
    """
    height, width = picture.shape[:2]
    large = resize(np.ascontiguousarray(mask, np.float32)[..., None], height, width)[..., 0]
    if not filtered:
        return large
    grey = picture.astype(np.float32).mean(axis=2) / 255
    radius = max(1, round(RADIUS * min(height, width) / FILTER_SIDE))
    return guided_filter(grey, large, radius=radius, eps=EPS).clip(0, 1)


def centre_prior(height: int, width: int, size: float) -> np.ndarray:
    """A Gaussian in the middle of the picture, whose deviations are ``size`` times the height and
    the width: (height, width) float32. It is above 0.5 in an ellipse."""
    y, x = (((np.arange(n) + 0.5) / n - 0.5) / size for n in (height, width))
    return np.exp(-(y[:, None] ** 2 + x**2) / 2).astype(np.float32)


def inner_regions(labels: np.ndarray) -> np.ndarray:
    """The regions that are rarer on the border than elsewhere: the others are the background.

    Parameters
    ----------
    labels : (h, w) integer from 0, the region of each position.

    Returns
    -------
    (h, w) float32: 1 in a region whose share of the positions on the border is smaller than its
    share of all positions, else 0.
    """
    border = np.ones(labels.shape, bool)
    border[1:-1, 1:-1] = False
    count = int(labels.max()) + 1
    shares = np.bincount(labels[border], minlength=count) / border.sum()
    return (shares < np.bincount(labels.ravel(), minlength=count) / labels.size)[labels].astype(
        np.float32
    )


def otsu(picture: np.ndarray) -> np.ndarray:
    """The part of a picture above or below Otsu's threshold of grey (Otsu, 1979) that
    :func:`inner_regions` chooses: (H, W) float32."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    return inner_regions(cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[1])


def normalised_cut(affinity: np.ndarray, height: int, width: int) -> np.ndarray:
    """The two sides of the relaxed normalised cut (Shi and Malik, TPAMI 2000), as TokenCut divides
    tokens (Wang et al., CVPR 2022): positions above and below the mean of the second eigenvector.
    :func:`inner_regions` chooses the foreground.

    Parameters
    ----------
    affinity : (height * width, height * width) symmetric, above 0.

    Returns
    -------
    (height, width) float32, 0 or 1.
    """
    root = 1 / np.sqrt(affinity.sum(axis=1))
    vectors = np.linalg.eigh(affinity.astype(np.float64) * root[:, None] * root)[1]
    second = vectors[:, -2] * root
    return inner_regions((second > second.mean()).astype(np.int64).reshape(height, width))


class Frame(NamedTuple):
    """A picture that is scored.

    Parameters
    ----------
    name, sequence : of the frame.
    picture : (H, W, 3) uint8 RGB.
    truth : (H, W) bool.
    pixels : (h, w, 3) uint8, the input of the backbone.
    features : (1, C, h / stride, w / stride) float32.
    """

    name: str
    sequence: str
    picture: np.ndarray
    truth: np.ndarray
    pixels: np.ndarray
    features: Any


def _frame(
    name: str, sequence: str, picture: np.ndarray, truth: Any, b: Backbone, side: int
) -> Frame:
    scale = side / min(picture.shape[:2]) / b.stride
    size = [max(1, round(n * scale)) * b.stride for n in picture.shape[:2]]
    pixels = resize(picture, *size)
    return Frame(name, sequence, picture, truth, pixels, features_of(b, pixels))


def davis_frames(backbone: Backbone, side: int, step: int) -> list[Frame]:
    """Every ``step``-th frame of the sequences of DAVIS, whose masks are the truth. The input of
    the backbone has a short side of ``side`` pixels, and sides that are multiples of its stride."""
    folders = ("davis", "davis_more")
    found = [frame for name in folders for frame in datasets.davis(step, folder=name)]
    return [_frame(f.name, f.sequence, f.image(), f.mask(), backbone, side) for f in found]


def coco_frames(backbone: Backbone, side: int) -> list[Frame]:
    """The pictures of coco_mini with things, which are the truth. ``side`` as of
    :func:`davis_frames`."""
    found = [picture for part in ("trained", "held_out") for picture in datasets.coco_mini(part)]
    pairs = [(picture, datasets.coco_things(picture)) for picture in found]
    return [_frame(p.name, "", p.image(), t, backbone, side) for p, t in pairs if t.any()]


def clustered(frame: Frame, seed: int, *, clusters: int, colours: bool = False) -> np.ndarray:
    """The inner ones of clusters of one picture's features, which are scaled to length 1, or of its
    colours in Lab at the size of the features."""
    import torch
    from torch.nn.functional import normalize

    from benchmarks.quality.clusters import kmeans_clusters

    values = frame.features
    if colours:
        small = resize(frame.pixels, *values.shape[2:]).astype(np.float32) / 255
        values = torch.from_numpy(cv2.cvtColor(small, cv2.COLOR_RGB2LAB).transpose(2, 0, 1)[None])
    else:
        values = normalize(values, dim=1)
    found = kmeans_clusters(values[0].flatten(1).T.contiguous(), clusters, seed, unit=False)
    return inner_regions(found.scores(values)[0].argmax(0).numpy())


def cut(frame: Frame, seed: int, *, settings: dict[str, Any]) -> np.ndarray:
    """The normalised cut of the affinity that Boosting's loss has, which minimises it without a
    head for one picture."""
    from torch.nn.functional import normalize

    tokens = normalize(frame.features, dim=1)[0].flatten(1)
    above = (tokens.T @ tokens).numpy() > settings["threshold"]
    return normalised_cut(np.where(above, 1.0, settings["weak"]), *frame.features.shape[2:])


def baselines(
    chosen: dict[str, float], area: float, settings: dict[str, Any]
) -> dict[str, Callable[[Frame, int], np.ndarray]]:
    """Masks of a frame and a seed that need no training; for comparison, the truth too.

    Parameters
    ----------
    chosen : the value of each of CHOICES.
    area : the mean share of the truth on the pictures on which the values were chosen.
    settings : of a run of Boosting.
    """
    size = float(np.sqrt(area / (2 * np.pi * np.log(2))))  # of an ellipse with this area

    clusters, colours = (int(chosen[name]) for name in SEEDED)
    return {
        "truth": lambda frame, seed: frame.truth.astype(np.float32),
        "everything": lambda frame, seed: np.ones(frame.pixels.shape[:2], np.float32),
        "centre prior": partial(_centre, size=chosen["centre prior"]),
        "centre prior, mean area": partial(_centre, size=size),
        "Otsu": lambda frame, seed: otsu(frame.pixels),
        "k-means of colours": partial(clustered, clusters=colours, colours=True),
        "k-means": partial(clustered, clusters=clusters),
        "normalised cut": partial(cut, settings=settings),
    }


def _centre(frame: Frame, seed: int, *, size: float) -> np.ndarray:
    height, width = frame.pixels.shape[:2]
    return centre_prior(height, width, size)


def choose(frames: list[Frame]) -> list[dict[str, Any]]:
    """The IoU of each of CHOICES on the pictures."""
    makers: dict[str, Callable[..., np.ndarray]] = {
        "centre prior": lambda frame, value: _centre(frame, 0, size=value),
        "k-means": lambda frame, value: clustered(frame, 0, clusters=value),
        "k-means of colours": lambda f, value: clustered(f, 0, clusters=value, colours=True),
    }
    return [
        {"baseline": name, "value": value, "iou": round(_mean_iou(frames, makers[name], value), 4)}
        for name, values in CHOICES.items()
        for value in values
    ]


def _mean_iou(frames: list[Frame], maker: Callable[..., np.ndarray], value: float) -> float:
    masks = (enlarged(maker(f, value), f.picture, filtered=False) for f in frames)
    return float(np.nanmean([score(m, f.truth).iou for m, f in zip(masks, frames, strict=True)]))
