"""The networks of python -m export guides: .onnx files, bundles, checkpoint folders and runs."""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from export.models.stated import Stated
from export.train.guide_source import GuideSource, open_guide_source
from export.train.run import ENTRY
from runtime.bundle.manifest import MANIFEST
from runtime.bundle.read import Bundle
from runtime.errors import InputError
from runtime.files import shown, stat_of, write_atomic

_STATED = ("mean", "std", "names", "output", "output_name")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe an .onnx file."""
    for name in _STATED:
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            help="of an .onnx file, as for python -m export",
            nargs="+" if name in ("mean", "std") else None,
        )


def from_arguments(args: argparse.Namespace) -> GuideSource:
    """Open the network that the options name. Raises what :func:`open_source` raises."""
    return open_source(
        args.model, Stated.from_words(**{name: getattr(args, name) for name in _STATED})
    )


def open_source(model: str | os.PathLike[str], stated: Stated | None = None) -> GuideSource:
    """Open the network that ``--model`` of ``python -m export guides`` names.

    Parameters
    ----------
    model : an .onnx file; a bundle of a network; a SegFormer checkpoint folder; or a run of the
        trainer with a head. The last two are frozen to ONNX as ``python -m export`` does, at their
        own input size.
    stated : facts about an .onnx file that its metadata lacks, or that replace it.

    Raises
    ------
    InputError : no such model; a bundle of k-means; or a run of refine, whose guides are those of
        its prior.
    BundleError : files that are damaged or do not fit.
    MissingBackend, DeviceError : a package that the model needs is not installed, or fails.

    Example
    -------
    >>> open_source("prior.onnx").classes
    19
    """
    model = os.fspath(model)
    folder = Path(model)
    is_bundle = stat_of(folder / MANIFEST) is not None
    if is_bundle and (prior := Bundle.open(folder).manifest["prior"])["kind"] == "kmeans":
        raise InputError(
            f"{shown(model)} is a bundle of k-means",
            fix=f"--model kmeans --clusters {prior['clusters']}",
        )
    is_run = stat_of(folder / ENTRY) is not None
    if is_bundle or not (is_run or stat_of(folder / "config.json") is not None):
        return open_guide_source(model, stated)

    from export.models.load import load_model
    from export.to_onnx import freeze

    name, weights = (model, None) if is_run else ("segformer", folder)
    prior = load_model(name, weights, stated=stated)
    if prior.refinement is not None:
        raise InputError(
            f"{shown(model)} is a run of refine, whose guides are those of its prior",
            fix="--model with the prior that the run was trained on",
        )
    with tempfile.TemporaryDirectory(prefix="dg-") as place:
        path = Path(place) / f"{Path(os.path.abspath(model)).name}.onnx"  # messages name it
        write_atomic(path, freeze(prior))
        return replace(open_guide_source(str(path)), source=os.path.abspath(model))
