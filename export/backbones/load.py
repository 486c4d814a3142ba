"""Load the backbone that a text names. Each family of backbones has a module of its own."""

from __future__ import annotations

from export.backbones.base import LITE0, Backbone
from runtime.errors import InputError


def load_backbone(source: str, features: str | None = None) -> Backbone:
    """The frozen network that ``source`` names.

    Parameters
    ----------
    source : "efficientnet-lite0".
    features : which features of the network; None takes the default of its family.

    Raises
    ------
    InputError : no such backbone or features.
    BundleError : weights that are damaged.
    MissingBackend : a package that the backbone needs is not installed.
    """
    from export.backbones.efficientnet_lite import efficientnet_lite0

    if source == LITE0:
        return efficientnet_lite0(features or "block15")
    raise InputError(f"backbone is {source!r}; wanted {LITE0}", fix=f"--backbone {LITE0}")
