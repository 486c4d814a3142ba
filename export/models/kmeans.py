"""The built-in prior: k-means on colours, which has no network."""

from __future__ import annotations

from export.models.base import PriorModel


def kmeans() -> PriorModel:
    """K-means on colours, the default prior. It has no network, so the export freezes nothing.

    Example
    -------
    >>> exported = export_bundle(kmeans(), "colours.bundle")
    """
    return PriorModel(name="kmeans", licence="none: no weights")
