"""What the methods that train on features of a frozen backbone share: its options, its views, and
how it is loaded and compared with that of a run that is resumed."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.backbones.base import LITE0, Backbone
from export.train.method import Start
from export.train.views import CROPS, ViewRule
from runtime.errors import InputError
from runtime.files import shown, stat_of
from runtime.tools.cli import some_path

OPTIONS = ("backbone", "features", "imgsz", "crops")  # which run.json stores as what they name
LOG = logging.getLogger("dg.train")


def add_options(
    parser: argparse.ArgumentParser, *, imgsz: int = ViewRule.size, crops: bool = True
) -> None:
    """Add --backbone, --features, --imgsz and, if the method has several views of a picture,
    --crops. ``imgsz`` is the method's default, for the help."""
    options = parser.add_argument_group("backbone and views")
    options.add_argument(
        "--backbone",
        type=_backbone_name,
        default=LITE0,
        help=f"{LITE0}, a folder in Hugging Face's format (ViT, DINO, DINOv2), or a file with a "
        "state dict of ResNet (%(default)s)",
    )
    options.add_argument("--features", help="features of the backbone (its default)")
    options.add_argument("--imgsz", type=int, help=f"side of a view in pixels ({imgsz})")
    if crops:
        options.add_argument("--crops", choices=CROPS, help="views of a picture (centre)")


def _backbone_name(text: str) -> str:
    """A path that is right in any current folder, or the name of the backbone in a package."""
    return text if text == LITE0 else os.path.abspath(some_path(text))


def stored_options(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The values of :data:`OPTIONS` in run.json; {} for a method without a backbone."""
    if "backbone" not in entry:
        return {}
    views, backbone = entry["views"], entry["backbone"]
    values = (backbone["source"], backbone["features"], views["size"], views.get("crops"))
    return dict(zip(OPTIONS, values, strict=True))


def view_rule(args: argparse.Namespace, **defaults: Any) -> ViewRule:
    """The views that the command line names.

    Parameters
    ----------
    args : with the options of :func:`add_options`.
    defaults : keyword arguments of :class:`export.train.views.ViewRule`, for what is not named.

    Raises
    ------
    InputError : values out of range.

    Example
    -------
    >>> view_rule(args, size=320)
    """
    named = {"size": args.imgsz, "crops": getattr(args, "crops", None)}
    return ViewRule(**defaults | {key: value for key, value in named.items() if value is not None})


def load(start: Start) -> tuple[Backbone, dict[str, Any], dict[str, str]]:
    """Load the backbone. torch's random numbers are not changed. A warning is logged if its weights
    are random.

    Returns
    -------
    The backbone, its entry for run.json, and the version of the library that computes its features,
    for :class:`export.train.method.Parts`.

    Raises
    ------
    InputError : there is no such backbone, or it is another one than that of the run that is
        resumed.
    BundleError : weights that are damaged.
    MissingBackend : a package is not installed.
    """
    import torch

    from export.backbones.load import load_backbone

    source, entry = start.args.backbone, start.entry
    if entry is not None and source != LITE0 and stat_of(Path(source)) is None:
        raise InputError(
            f"the backbone {shown(source)} does not exist", fix="--backbone with its place"
        )
    with torch.random.fork_rng(devices=[]):
        backbone = load_backbone(source, start.args.features)
    loaded = backbone.entry()
    if entry is not None:
        loaded["name"] = entry["backbone"]["name"]  # of a folder, which may be moved
        names = sorted(k for k in loaded if loaded[k] != entry["backbone"][k] and k != "source")
        if names:
            raise InputError(
                f"the backbone {shown(source)} changed since the run was started: "
                f"{', '.join(names)}",
                fix="restore its files, or train again with another -o",
            )
    if not backbone.trained:
        LOG.warning("the backbone has RANDOM weights: what is trained on its features is useless")
    name, _, version = backbone.library.partition(" ")
    return backbone, loaded, {name: version} if name else {}
