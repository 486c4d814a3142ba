"""KMeansGuides: guides of k-means on the colours of each picture."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.core.config import RefineConfig
from runtime.core.resize import working_picture
from runtime.prior.kmeans import KMeansPrior


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of k-means."""
    parser.add_argument(
        "--clusters", type=int, default=KMeansPrior().clusters, help="most clusters (%(default)s)"
    )


def from_arguments(args: argparse.Namespace) -> KMeansGuides:
    """Make the model from the options. Raises what the class raises."""
    return KMeansGuides(KMeansPrior(args.clusters))


@dataclass(frozen=True)
class KMeansGuides:
    """The labels of k-means on the colours of each picture, as a GuideModel of
    :mod:`export.guides.write`.

    The number of a cluster is its place from dark to light in one picture. It has no meaning in
    another picture, so the labels have no names.

    Parameters
    ----------
    prior : the k-means that ``Segmenter("kmeans")`` runs.

    Example
    -------
    >>> KMeansGuides().own_guide(picture).shape  # picture: (480, 640, 3) uint8
    (240, 320)
    """

    prior: KMeansPrior = field(default_factory=KMeansPrior)

    name = "kmeans"
    output = "labels"
    names = None

    def own_guide(self, picture: np.ndarray) -> np.ndarray:
        """The labels of a picture.

        Parameters
        ----------
        picture : (H, W, 3) uint8 RGB.

        Returns
        -------
        (h, w) int32, each the most probable cluster, at the working size that a refinement has by
        default.
        """
        low = working_picture(picture, *RefineConfig().working_size(*picture.shape[:2]))
        return self.prior(picture, np.asarray(low)).argmax(-1).astype(np.int32)

    def entry(self) -> dict[str, Any]:
        """What guides.json stores of the model."""
        return {"kind": "kmeans", "clusters": self.prior.clusters, "output": self.output}
