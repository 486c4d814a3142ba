"""Load the backbone that a text names. Each family of backbones has a module of its own."""

from __future__ import annotations

from export.backbones.base import LITE0, Backbone
from runtime.errors import InputError, MissingBackend, first_line
from runtime.files import here


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
    check_torch()
    from export.backbones.efficientnet_lite import efficientnet_lite0

    if source == LITE0:
        return efficientnet_lite0(features or "block15")
    raise InputError(f"backbone is {source!r}; wanted {LITE0}", fix=f"--backbone {LITE0}")


def check_torch() -> None:
    """Check that PyTorch can be imported.

    Raises
    ------
    MissingBackend : it is not installed, or is broken.
    InputError : the current folder was removed.
    """
    if here() == "(removed)":  # MKL, a library of torch, would end the process
        raise InputError("the current folder was removed; torch needs one", fix="cd to another")
    try:
        import safetensors  # noqa: F401
        import torch  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        raise MissingBackend(
            f"backbones are networks of PyTorch, which cannot be imported: {first_line(error)}",
            fix="pip install 'dynaguide-edge[train]'",
        ) from error
