"""The priors that can be frozen, one module for each family."""

from export.models.base import PriorModel

__all__ = ["PriorModel"]
