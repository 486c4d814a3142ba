"""The embedded prior: k-means on colours, which has no network."""

from __future__ import annotations

from export.models.base import PriorModel


def kmeans() -> PriorModel:
    """The embedded default: K-means on colours. It has no network, so that nothing is frozen."""
    return PriorModel(name="kmeans", licence="none: no weights")
