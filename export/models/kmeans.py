"""The embedded prior: k-means on colours, which has no network."""

from __future__ import annotations

from export.models.base import PriorModel


def kmeans() -> PriorModel:
    """The embedded default: K-means on colours. No network, nothing to freeze."""
    return PriorModel(name="kmeans", licence="none: no weights")
