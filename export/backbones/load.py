"""Load the backbone that a text names. Each family of backbones has a module of its own."""

from __future__ import annotations

import difflib
import re
import stat
from pathlib import Path

from export.backbones.base import LITE0, Backbone
from runtime.errors import InputError, MissingBackend, first_line
from runtime.files import here, shown, stat_of
from runtime.urls import without_passwords


def load_backbone(source: str, features: str | None = None, *, dilated: bool = True) -> Backbone:
    """The frozen network that ``source`` names.

    Parameters
    ----------
    source : "efficientnet-lite0"; a checkpoint folder of Hugging Face (ViT, DINO, DINOv2); or a
        file of a ResNet-18 or -50 that ends in .pth, .pt, .bin or .safetensors.
    features : which features of the network; None takes the default of its family.
    dilated : False: a convolutional network is not dilated. Its last features have stride 32, and
        its method ``stages`` returns those with strides 4, 8, 16 and 32, up to ``features``.

    Raises
    ------
    InputError : no such backbone or features; or a vision transformer that is not to be dilated.
    BundleError : weights that are damaged.
    MissingBackend : a package that the backbone needs is not installed.
    """
    check_torch()
    from export.backbones.efficientnet_lite import efficientnet_lite0
    from export.backbones.resnet import resnet
    from export.backbones.vit import vision_transformer
    from export.backbones.weights import SUFFIXES

    chosen = () if features is None else (features,)
    if source == LITE0:
        return efficientnet_lite0(*chosen, dilated=dilated)
    path = Path(source)
    found = None if "://" in source else stat_of(path)
    if found is None:
        raise _unknown(source)
    if stat.S_ISDIR(found.st_mode):
        if not dilated:
            raise InputError(
                f"backbone is {shown(path)}, a folder; a vision transformer has no stages of "
                "different strides",
                fix=f"--backbone {LITE0}, or a file of a ResNet",
            )
        return vision_transformer(path, *chosen)
    if path.suffix.lower() in SUFFIXES:
        return resnet(path, *chosen, dilated=dilated)
    raise InputError(
        f"backbone is {shown(path)}, a file; wanted one that ends in {', '.join(SUFFIXES)}",
        fix=f"choose a folder or such a file, or --backbone {LITE0}",
    )


def _unknown(source: str) -> InputError:
    """The error for a text that names nothing on this machine."""
    fix = f"--backbone {LITE0}"
    if difflib.get_close_matches(source.lower(), [LITE0], 1, 0.5):
        fix = f"did you mean --backbone {LITE0}?"
    elif "://" in source:
        fix = "download it, and name the folder or the file"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        fix = f"on a machine with internet run: hf download {source} --local-dir DIR; then copy "
        fix += "DIR here and pass --backbone DIR"
    return InputError(
        f"backbone is {without_passwords(source)!r}; wanted {LITE0}, a checkpoint folder, or a "
        "file of weights, and nothing is downloaded",
        fix=fix,
    )


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
