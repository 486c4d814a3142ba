"""What python -m export train has trained, as a prior: a head with its backbone as one network."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from export.backbones import Backbone
from export.models.base import PriorModel, check_size
from export.train.names import head_sha256, read_names
from export.train.run import Run, open_run, resume_command
from runtime.errors import BundleError, InputError, SdkError
from runtime.files import one_line, shown
from runtime.prior.preprocess import Preprocess

if TYPE_CHECKING:
    from torch.nn import Module


BOOSTING_NAMES = ["background", "object"]


class TrainedRun(NamedTuple):
    """A run with a backbone, and its network in eval mode.

    Parameters
    ----------
    entry : the parsed run.json.
    backbone : loaded again from its files.
    network : from (1, 3, h, w) float32 images to (1, K, h / stride, w / stride) probabilities.
    clusters : K, which is 2 for boosting: background and object.
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


def trained_run(
    folder: Path, weights: Path | None = None, flip: bool = False, mask: str | None = None
) -> TrainedRun:
    """Load the backbone and the head of a run.

    Parameters
    ----------
    folder : that python -m export train has written.
    weights : where the backbone is now; None: where it was at the training.
    flip : average the output for a picture with that for its mirror image.
    mask : "fine" or "coarse", of boosting alone; None: "fine".

    Raises
    ------
    InputError : the folder is no run with a backbone; the backbone is missing, or has other weights
        than at the training; the run has no checkpoint yet.
    BundleError : a file is damaged, or does not fit the others.
    MissingBackend : a package that the backbone needs is not installed.

    Example
    -------
    >>> trained_run(Path("runs/city")).clusters
    27
    """
    return _network(open_run(folder), weights, flip, mask)


def _network(run: Run, weights: Path | None, flip: bool, mask: str | None) -> TrainedRun:
    """The network of a run with a backbone, as :func:`trained_run` returns it."""
    entry, (state, step) = run.entry, run.head()
    if entry["method"] not in _HEADS:
        raise InputError(
            f"{shown(run.folder)} is a run of {entry['method']!r}; wanted a run of "
            f"{' or '.join(_HEADS)}",
            fix="name another run",
        )
    backbone = _backbone(entry["backbone"], weights)

    import torch

    with torch.random.fork_rng(devices=[]):
        make = _HEADS[entry["method"]].network
        head, network = make(entry["settings"], backbone, flip, mask)
    try:
        head.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    except RuntimeError as error:
        raise BundleError(
            f"the checkpoint of {shown(run.folder)} does not fit the settings in its run.json",
            fix="copy the run again, or train again with another -o",
        ) from error
    clusters = entry["settings"].get("clusters", len(BOOSTING_NAMES))
    return TrainedRun(entry, backbone, network.eval(), clusters, step, run.done, head_sha256(state))


def _segunify_network(
    settings: dict[str, Any], backbone: Backbone, flip: bool, _: str | None
) -> tuple[Module, Module]:
    """The head of SegUnify, and the network with it."""
    from export.models.segunify import SegUnifyNetwork
    from export.train.segunify import from_settings

    head = from_settings(settings, backbone.channels).module
    return head, SegUnifyNetwork(backbone.module, head, flip)


def _boosting_network(
    settings: dict[str, Any], backbone: Backbone, flip: bool, mask: str | None
) -> tuple[Module, Module]:
    """The head of Boosting, and the network with it."""
    from export.models.boosting import BoostingHead, BoostingNetwork

    head, mean, std = BoostingHead(backbone.channels), backbone.mean, backbone.std
    network = BoostingNetwork(backbone.module, mean, std, head, mask or "fine", flip)
    return head, network


def trained(
    folder: Path,
    weights: Path | None = None,
    imgsz: tuple[int, int] | None = None,
    flip: bool = False,
    mask: str | None = None,
) -> PriorModel:
    """The prior of a run.

    Parameters
    ----------
    folder : that python -m export train has written.
    weights : where the run's backbone or prior is now; None: where it was at the training.
    imgsz : (height, width) in pixels to freeze for; None takes the size of the views, or, for
        refine, the size that most pictures had as the prior's input.
    flip : average the output for a picture with that for its mirror image.
    mask : "fine" or "coarse", of boosting alone; None: "fine".

    Returns
    -------
    Of segunify and boosting, backbone and head as one network that returns probabilities. Of
    refine, the prior of the run, with the trained refinement.

    Raises
    ------
    InputError : the size is no multiple of the stride; the run's names.json is that of another
        checkpoint; an option that the run's method does not have; also that of :func:`trained_run`.
    BundleError, MissingBackend : as for :func:`trained_run`.

    Example
    -------
    >>> model = trained(Path("runs/city"), flip=True)
    """
    run = open_run(folder)
    method, loop = run.entry["method"], run.entry["loop"]
    for option, is_set, methods in (
        ("flip", flip, ("segunify", "boosting")),
        ("mask", mask is not None, ("boosting",)),
    ):
        if is_set and method not in methods:
            raise InputError(
                f"{option} is for runs of {' or '.join(methods)}; {shown(folder)} is a run of "
                f"{method}",
                fix=f"leave --{option} out",
            )
    if method == "refine":
        from export.models.trained_refine import refined

        model = refined(run, weights, imgsz)
    else:
        network = _network(run, weights, flip, mask)
        model = _HEADS[method].prior(folder, network, imgsz, flip, mask)
    warnings = model.warnings
    if run.done < loop["steps"]:
        warning = SdkError(
            f"the training of {shown(folder)} has reached step {run.done} of {loop['steps']}",
            fix=resume_command(method, folder),
        )
        warnings += (str(warning),)
    return replace(model, name=Path(os.path.realpath(folder)).name, warnings=warnings)


def _segunify(
    folder: Path, run: TrainedRun, imgsz: tuple[int, int] | None, flip: bool, _: str | None
) -> PriorModel:
    """The prior of a run of segunify: clusters, which have names if the user has named them."""
    names = read_names(folder, run.head, run.clusters)
    kept = ("labels", "pictures", "trained_on", "accuracy", "miou")
    own = {"flip": flip, "names": names and {key: names[key] for key in kept}}
    return _prior(run, imgsz, None if names is None else names["names"], own)


def _boosting(
    _: Path, run: TrainedRun, imgsz: tuple[int, int] | None, flip: bool, mask: str | None
) -> PriorModel:
    """The prior of a run of boosting: one object and its background."""
    return _prior(run, imgsz, BOOSTING_NAMES, {"flip": flip, "mask": mask or "fine"})


class _Head(NamedTuple):
    """How a method's head becomes a network with its backbone, and that becomes a prior."""

    network: Callable[..., tuple[Module, Module]]
    prior: Callable[..., PriorModel]


_HEADS = {
    "segunify": _Head(_segunify_network, _segunify),
    "boosting": _Head(_boosting_network, _boosting),
}


def _prior(
    run: TrainedRun,
    imgsz: tuple[int, int] | None,
    names: list[str] | None,
    own: dict[str, Any],
) -> PriorModel:
    """The prior of a run with a backbone; ``own`` are the fields of the method in the manifest."""
    entry, loop, backbone = run.entry, run.entry["loop"], run.backbone
    used = [("names", bool(own.get("names"))), ("selection", loop["select"] == "labels")]
    return PriorModel(
        name=entry["method"],
        module=run.network,
        preprocess=run.preprocess(imgsz),
        names=names,
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
            **own,
        },
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
