"""Which checkpoint is exported: which pictures are held out, and what --select computes on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from export.backbones import Backbone
from export.train.method import Method
from runtime.errors import InputError

if TYPE_CHECKING:
    from export.train.features import FeatureBatches
    from export.train.pixels import PixelBatches
    from export.train.segunify import SegUnify

T = TypeVar("T")


def split(files: Sequence[T], share: float, seed: int) -> tuple[list[T], list[T]]:
    """Split pictures into those that are trained on and those that are held out.

    Parameters
    ----------
    files : at least two.
    share : of the files to hold out, in [0, 1]; it is rounded to whole files, at least one on each
        side.
    seed : the same files, share and seed give the same split.

    Returns
    -------
    The files to train on and the files that are held out, each in the order of ``files``.

    Raises
    ------
    InputError : there are fewer than two files, or the share is out of range.

    Example
    -------
    >>> train, held = split(files, 0.1, seed=0)
    """
    if not 0 <= share <= 1:
        raise InputError(f"the share of held-out pictures is {share!r}; wanted 0 to 1")
    if len(files) < 2:
        raise InputError(
            f"{len(files)} picture cannot be split into pictures to train on and held-out ones",
            fix="add pictures, or select the last step",
        )
    count = min(max(1, round(share * len(files))), len(files) - 1)
    order = np.random.default_rng([1, seed]).permutation(len(files))
    held = set(order[:count].tolist())
    parts: tuple[list[T], list[T]] = ([], [])
    for index, file in enumerate(files):
        parts[index in held].append(file)
    return parts


def energy_score(method: Method, held: FeatureBatches | PixelBatches) -> Callable[[], float]:
    """A function that returns the method's energy on held-out pictures; the lowest is best.

    Parameters
    ----------
    method : its ``held_out`` returns the energy of features (N, C, h, w), N at least 2.
    held : the held-out pictures. Each view is used once, in batches of ``held.batch`` or more; in a
        batch, neighbours are of different pictures.

    Raises
    ------
    InputError : there is one picture.

    Example
    -------
    >>> energy_score(method, held)()
    -0.12
    """
    if len(held.files) < 2:
        raise InputError(
            "one picture is held out; the energy compares pictures with each other",
            fix="--holdout with a larger share, or more pictures",
        )
    parts = np.array_split(held.spread, max(1, held.views // held.batch))
    return lambda: float(np.mean([method.held_out(held.of(part.tolist())) for part in parts]))


def labels_score(
    method: SegUnify,
    backbone: Backbone,
    size: int,
    pictures: Sequence[Path],
    labels: Path,
    classes: Path,
) -> Callable[[], float]:
    """A function that returns the mIoU of the clusters on held-out pictures with labels, matched
    with the classes as ``python -m export train name`` does; the highest is best.

    Parameters
    ----------
    method : its module has the head that is frozen.
    backbone : in eval mode, on the device of the module.
    size : side of the network's input in pixels; pictures are stretched to it.
    pictures : files that are not trained on.
    labels, classes : as for ``python -m export train name``.

    Raises
    ------
    InputError : the labels or classes cannot be used.
    MissingBackend : scipy is not installed.

    Example
    -------
    >>> score = labels_score(method, backbone, 224, held, Path("labels"), Path("27.json"))
    >>> score()
    0.31
    """
    from export.models.segunify import SegUnifyNetwork
    from export.train.labels import Classes, LabelSet
    from export.train.matching import confusion_of, match

    known, files = Classes.read(classes), LabelSet.find(pictures, labels)
    # A copy, because the network is put into eval mode without gradients.
    network = SegUnifyNetwork(backbone.module, copy.deepcopy(method.module))
    preprocess = backbone.preprocess(size, size)

    def score() -> float:
        network.head.load_state_dict(method.module.state_dict())
        pairs = files.read(known, None)
        return match(confusion_of(network, preprocess, pairs, len(known.names))).miou

    score()  # unusable labels are reported before the training
    return score
