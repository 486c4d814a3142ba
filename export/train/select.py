"""Which checkpoint is exported: what --select computes on pictures that are not trained on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.backbones import Backbone
from export.train.method import Method
from runtime.errors import InputError

if TYPE_CHECKING:
    from export.train.features import FeatureBatches


def energy_score(method: Any, held: FeatureBatches) -> Callable[[], float]:
    """A function that returns the method's energy on held-out pictures; the lowest is best.

    Parameters
    ----------
    method : its ``held_out`` returns the energy of features (N, C, h, w), N at least 2.
    held : the held-out pictures. Each view is used once, in batches of ``held.batch`` or more; in a
        batch, neighbours are of different pictures.

    Raises
    ------
    InputError : the method has no such function, or there is one picture.
    """
    if not hasattr(method, "held_out"):
        raise InputError(
            f"{method.name} computes no energy of held-out pictures", fix="--select last"
        )
    if len(held.files) < 2:
        raise InputError(
            "one picture is held out; the energy compares pictures with each other",
            fix="--holdout with a larger share, or more pictures",
        )
    parts = np.array_split(held.spread, max(1, held.views // held.batch))
    return lambda: float(np.mean([method.held_out(held.of(part.tolist())) for part in parts]))


def labels_score(
    method: Method,
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
