"""A head that python -m export train has trained, with its backbone as one network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from export.backbones import Backbone
from export.models.base import PriorModel, check_size
from export.train.names import head_sha256, read_names
from export.train.run import open_run, resume_command
from runtime.errors import BundleError, InputError, SdkError
from runtime.files import one_line, shown
from runtime.prior.preprocess import Preprocess

if TYPE_CHECKING:
    from torch.nn import Module


class TrainedRun(NamedTuple):
    """A run of the trainer, and its network in eval mode.

    Parameters
    ----------
    entry : the parsed run.json.
    backbone : loaded again from its files.
    network : from (1, 3, h, w) float32 images to (1, K, h / stride, w / stride) probabilities.
    clusters : K.
    step : of the checkpoint that the run's --select has chosen.
    done : the step that the training has reached.
    head : :func:`export.train.names.head_sha256` of the head.
    """

    entry: dict[str, Any]
    backbone: Backbone
    network: Module
    clusters: int
    step: int
    done: int
    head: str

    def preprocess(self, imgsz: tuple[int, int] | None = None) -> Preprocess:
        """How a picture is stretched to ``imgsz``, (height, width) in pixels, and normalised; None
        takes the size of the views that the head was trained on.

        Raises
        ------
        InputError : a side is no multiple of the backbone's stride.
        """
        size = imgsz or (self.entry["views"]["size"],) * 2
        own = self.backbone.preprocess(*size)
        check_size(size, own, self.backbone.name)
        return own


def trained_run(folder: Path, weights: Path | None = None, flip: bool = False) -> TrainedRun:
    """Load the backbone and the head of a run.

    Parameters
    ----------
    folder : that python -m export train has written.
    weights : where the backbone is now; None: where it was at the training.
    flip : average the codes of a picture with those of its mirror image.

    Raises
    ------
    InputError : the folder is no run; the backbone is missing, or has other weights than at the
        training; the run has no checkpoint yet.
    BundleError : a file is damaged, or does not fit the others.
    MissingBackend : a package that the backbone needs is not installed.
    """
    run = open_run(folder)
    entry, (state, step) = run.entry, run.head()
    if entry["method"] != "segunify":
        raise InputError(
            f"{shown(folder)} is a run of {entry['method']!r}; this version freezes 'segunify'",
            fix="update the SDK",
        )
    backbone = _backbone(entry["backbone"], weights)

    import torch

    from export.models.segunify import SegUnifyNetwork
    from export.train.segunify import from_settings

    with torch.random.fork_rng(devices=[]):
        method = from_settings(entry["settings"], backbone.channels)
    try:
        method.module.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    except RuntimeError as error:
        raise BundleError(
            f"the checkpoint of {shown(folder)} does not fit the settings in its run.json",
            fix="copy the run again, or train again with another -o",
        ) from error
    network = SegUnifyNetwork(backbone.module, method.module, flip).eval()
    clusters = entry["settings"]["clusters"]
    return TrainedRun(entry, backbone, network, clusters, step, run.done, head_sha256(state))


def trained(
    folder: Path,
    weights: Path | None = None,
    imgsz: tuple[int, int] | None = None,
    flip: bool = False,
) -> PriorModel:
    """The prior of a run: backbone and head as one network that returns probabilities of clusters.

    Parameters
    ----------
    folder, weights, flip : as for :func:`trained_run`.
    imgsz : (height, width) in pixels to freeze for; None takes the size of the views.

    Raises
    ------
    InputError : the size is no multiple of the stride, or the run's names.json is that of another
        checkpoint; also that of :func:`trained_run`.
    BundleError, MissingBackend : as for :func:`trained_run`.

    Example
    -------
    >>> model = trained(Path("runs/city"), flip=True)
    """
    run = trained_run(folder, weights, flip)
    names = read_names(folder, run.head, run.clusters)
    entry, loop, backbone = run.entry, run.entry["loop"], run.backbone
    used = [("names", names is not None), ("selection", loop["select"] == "labels")]
    warnings = ()
    if run.done < loop["steps"]:
        warning = SdkError(
            f"the training of {shown(folder)} has reached step {run.done} of {loop['steps']}",
            fix=resume_command(entry["method"], folder),
        )
        warnings = (str(warning),)
    return PriorModel(
        name=Path(os.path.realpath(folder)).name,
        module=run.network,
        preprocess=run.preprocess(imgsz),
        names=None if names is None else names["names"],
        output="probabilities",
        licence=f"{backbone.licence}; head: trained by the user",
        trained=backbone.trained,
        training={
            "method": entry["method"],
            "step": run.step,
            "steps": loop["steps"],
            "select": loop["select"],
            "labels_used": [word for word, is_used in used if is_used],
            "settings": entry["settings"],
            # The bundle contains no path of the machine that made it.
            "backbone": backbone.entry() | {"source": one_line(Path(backbone.source).name)},
            "views": entry["views"],
            "pictures": entry["files"],
            "seed": loop["seed"],
            "flip": flip,
            "names": names
            and {
                key: names[key] for key in ("labels", "pictures", "trained_on", "accuracy", "miou")
            },
        },
        warnings=warnings,
    )


def _backbone(entry: dict[str, Any], weights: Path | None) -> Backbone:
    """The backbone of a run; ``entry`` is its entry in run.json. InputError if it is missing or has
    other weights."""
    from export.backbones.load import load_backbone

    place = "name the place of the weights that the head was trained on: --weights PATH"
    try:
        backbone = load_backbone(str(weights or entry["source"]), entry["features"])
    except InputError as error:
        raise InputError(
            f"the backbone {entry['name']} of the run cannot be loaded: {error.message}",
            fix=place if weights is None else error.fix,
        ) from error
    if backbone.sha256 != entry["sha256"]:
        raise InputError(
            f"the weights of {shown(backbone.source)} have the sha256 {backbone.sha256[:16]}..., "
            f"and the head was trained on {entry['name']} with {entry['sha256'][:16]}...",
            fix=place,
        )
    own = backbone.entry()
    for key in ("features", "channels", "stride", "mean", "std", "padding"):
        if own[key] != entry[key]:
            raise InputError(
                f"{key} of {entry['name']} is {own[key]}, and at the training it was {entry[key]}",
                fix="train again with this version",
            )
    return backbone
