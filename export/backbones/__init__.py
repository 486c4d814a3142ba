"""Frozen networks whose features are trained on, one module for each family."""

from export.backbones.base import Backbone

__all__ = ["Backbone"]
