"""SegUnify as a method of training: its settings, presets, options, and one step of it.

The equations stand in docs/segunify.md. Only making a :class:`SegUnify` imports torch.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.backbones import Backbone
from export.train import on_backbone
from export.train.method import Parts, Start
from export.train.views import ViewRule
from runtime.checks import is_count, is_number, shown_value
from runtime.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from export.train.features import FeatureBatches

DEFAULTS: dict[str, Any] = {}  # of the loop, where they are not those of LoopConfig
SELECTS = ("last", "energy", "labels")
PROJECTORS = ("segunify", "smooseg")
LOG = logging.getLogger("dg.train")
_SAMPLE = 64  # most views from which shifts are estimated
_BELOW_ONE = math.nextafter(1, 0)


@dataclass(frozen=True, kw_only=True)
class SegUnifyConfig:
    """The settings of SegUnify; the equations of docs/segunify.md name them.

    Parameters
    ----------
    clusters : K, how many clusters the pictures are divided into.
    intra_shift, inter_shift : b1 and b2. Two positions of a picture (of two pictures) whose
        affinity is above b1 (b2) are pulled towards the same cluster, others are pushed apart.
    shift_rule : which rule chose the shifts, in words.
    projector : "segunify", or "smooseg" without batch norm and with fewer SiLU.
    final_silu : whether SiLU follows the last batch norm of each branch of "segunify".
    dim : D, the length of a code.
    dropout : share of the channels that are replaced by zeros in each step.
    temperature : of the soft-max over the teacher's cosines in the smoothness energy, 0.001 to
        1000.
    ema : share of the teacher's prototypes that remains in each step.
    prototype_lr : the learning rate of the prototypes divided by that of the projector.

    Raises
    ------
    InputError : values out of range.

    Example
    -------
    >>> SegUnifyConfig(clusters=27, intra_shift=-0.02, inter_shift=0.48).dim
    64
    """

    clusters: int
    intra_shift: float
    inter_shift: float
    shift_rule: str = "named"
    projector: str = "segunify"
    final_silu: bool = True
    dim: int = 64
    dropout: float = 0.2
    temperature: float = 0.1
    ema: float = 0.998
    prototype_lr: float = 5.0

    def __post_init__(self) -> None:
        if self.projector not in PROJECTORS:
            raise InputError(
                f"projector is {self.projector!r}; wanted one of {', '.join(PROJECTORS)}",
                fix="--projector segunify",
            )
        for name, example in (("clusters", 27), ("dim", 64)):
            value = getattr(self, name)
            if not is_count(value, 2, 4096):
                raise InputError(
                    f"{name} is {shown_value(value)}; wanted a whole number from 2 to 4096",
                    fix=f"--{name} {example}",
                )
        for name, low, high, fix in (
            ("intra_shift", -1, 1, "--intra-shift 0.1"),
            ("inter_shift", -1, 1, "--inter-shift 0.5"),
            ("dropout", 0, _BELOW_ONE, "--dropout 0.2"),
            ("ema", 0, _BELOW_ONE, "--ema 0.998"),
            ("temperature", 1e-3, 1e3, "--temperature 0.1"),  # less: the soft-max overflows
            ("prototype_lr", 1e-6, 1e6, "leave prototype_lr out; its default is 5"),
        ):
            value = getattr(self, name)
            if not is_number(value, low, high):
                end = "below 1" if high == _BELOW_ONE else f"at most {high:g}"
                raise InputError(
                    f"{name} is {shown_value(value)}; wanted a number from {low:g}, {end}",
                    fix=fix,
                )
        if not isinstance(self.final_silu, bool):
            raise InputError(
                f"final_silu is {shown_value(self.final_silu)}; wanted true or false",
                fix="--final-silu or --no-final-silu",
            )
        if self.projector == "smooseg" and not self.final_silu:
            raise InputError(
                "final_silu is false, but projector smooseg has no SiLU at its end",
                fix="leave --no-final-silu out, or --projector segunify",
            )


@dataclass(frozen=True, kw_only=True)
class Shifts:
    """Shifts that were published for one backbone: a DINO or DINOv2 with this many channels and
    this stride in pixels.

    Example
    -------
    >>> print(PRESETS["potsdam3"].shifts[1])
    DINOv2 (768 channels, stride 14)
    """

    family: str
    channels: int
    stride: int
    intra: float
    inter: float

    def __str__(self) -> str:
        family = {"dino": "DINO", "dinov2": "DINOv2"}[self.family]
        return f"{family} ({self.channels} channels, stride {self.stride})"

    def fit(self, backbone: Backbone) -> bool:
        """Whether ``backbone`` is such a network. Its family is read from its name, of which it
        must be a whole word, as in "dino-vits8"."""
        words = re.split(r"[^a-z0-9]+", backbone.name.lower())
        size = (backbone.channels, backbone.stride)
        return self.family in words and size == (self.channels, self.stride)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings that were published for a data set: the number of clusters, the shifts by backbone,
    and the views that are trained on.

    Example
    -------
    >>> PRESETS["coco27"].clusters
    27
    """

    clusters: int
    shifts: tuple[Shifts, ...]
    imgsz: int = 224
    crops: str = "centre"


PRESETS = {  # as in the public code of SmooSeg
    "coco27": Preset(
        clusters=27,
        shifts=(Shifts(family="dino", channels=384, stride=8, intra=-0.02, inter=0.48),),
        crops="five",
    ),
    "cityscapes27": Preset(
        clusters=27,
        shifts=(Shifts(family="dino", channels=384, stride=8, intra=-0.02, inter=0.50),),
        crops="five",
    ),
    "potsdam3": Preset(
        clusters=3,
        shifts=(
            Shifts(family="dino", channels=768, stride=8, intra=0.10, inter=0.50),
            Shifts(family="dinov2", channels=768, stride=14, intra=0.32, inter=0.50),
        ),
    ),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of SegUnify to the parser of ``python -m export train segunify``."""
    on_backbone.add_options(parser)
    options = parser.add_argument_group(
        "SegUnify",
        "The defaults from --projector to --ema are the published values; they need no change.",
    )
    options.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="published number of clusters, views and, for the backbone that they were published "
        "with, shifts",
    )
    options.add_argument("--clusters", type=int, help="number of clusters (the preset's)")
    options.add_argument(
        "--intra-shift", type=float, help="affinity above which positions of a picture attract"
    )
    options.add_argument("--inter-shift", type=float, help="the same across pictures")
    options.add_argument(
        "--projector", choices=PROJECTORS, default="segunify", help="its form (%(default)s)"
    )
    options.add_argument(
        "--final-silu",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether SiLU ends both branches of the projector (%(default)s)",
    )
    options.add_argument("--dim", type=int, default=64, help="length of a code (%(default)s)")
    options.add_argument(
        "--dropout", type=float, default=0.2, help="share of the channels (%(default)s)"
    )
    options.add_argument(
        "--temperature", type=float, default=0.1, help="of the assignments (%(default)s)"
    )
    options.add_argument(
        "--ema", type=float, default=0.998, help="inertia of the teacher (%(default)s)"
    )


def check(args: argparse.Namespace) -> SegUnifyConfig:
    """The settings that the command line names, with shifts of 0 where it names none. It needs no
    backbone, so that a wrong option is reported before one is loaded.

    Raises
    ------
    InputError : no number of clusters, or values out of range, also of the views.
    """
    preset = PRESETS.get(args.preset)
    clusters = args.clusters
    if clusters is None:
        if preset is None:
            raise InputError(
                "clusters is not set; wanted the number of clusters to find",
                fix="--clusters 27, or --preset coco27",
            )
        clusters = preset.clusters
    _check_batch(args.batch)
    view_rule(args)
    return SegUnifyConfig(
        clusters=clusters,
        intra_shift=0.0 if args.intra_shift is None else args.intra_shift,
        inter_shift=0.0 if args.inter_shift is None else args.inter_shift,
        projector=args.projector,
        final_silu=args.final_silu,
        dim=args.dim,
        dropout=args.dropout,
        temperature=args.temperature,
        ema=args.ema,
    )


def view_defaults(args: argparse.Namespace) -> dict[str, Any]:
    """The size and crops of the views where the command line names none: those of the preset, as
    keyword arguments of :class:`export.train.views.ViewRule`; {} without a preset."""
    if args.preset is None:
        return {}
    preset = PRESETS[args.preset]
    return {"size": preset.imgsz, "crops": preset.crops}


def view_rule(args: argparse.Namespace) -> ViewRule:
    """The views that the command line names, or else the preset.

    Raises
    ------
    InputError : values out of range.
    """
    return on_backbone.view_rule(args, **view_defaults(args))


def prepare(start: Start) -> Parts:
    """SegUnify and its batches as the command line, or run.json of a run that is resumed, describes
    them. Shifts are estimated from up to 64 views.

    Raises
    ------
    InputError : values out of range, or a backbone or labels that cannot be used.
    BundleError, MissingBackend : of the backbone.
    """
    from export.train.features import FeatureBatches
    from export.train.select import energy_score, labels_score

    args, config, rule = start.args, start.config, view_rule(start.args)
    backbone, loaded, libraries = on_backbone.load(start)

    def batches_of(part: list[Path], workers: int) -> FeatureBatches:
        return FeatureBatches(
            part, rule, backbone, batch=config.batch, seed=config.seed, device=config.device,
            workers=workers, cache=start.cache, broken=start.broken(part),
        )  # fmt: skip

    batches = batches_of(start.files, config.workers)
    if start.entry is None:
        method = make(args, backbone, lambda: _sample(batches))
    else:
        method = from_settings(start.entry["settings"], backbone.channels)
    method.module.to(config.device)
    score = held = None
    if config.select == "energy":
        held = batches_of(start.held, 0)
        score = energy_score(method, held)
    elif config.select == "labels":
        paths = Path(args.labels), Path(args.classes)
        score = labels_score(method, backbone, rule.size, start.held, *paths)
    entry = {
        "settings": method.settings(),
        "backbone": loaded,
        "views": {"size": rule.size, "crops": rule.crops},
    }
    return Parts(method, batches, score, held, entry, libraries)


def make(args: argparse.Namespace, backbone: Backbone, features: Callable[[], Tensor]) -> SegUnify:
    """SegUnify as the command line describes it. Torch's global generator draws the prototypes and
    the weights, and nothing else here uses it.

    A shift that is named is used. One that is not named is that of the preset if it was published
    for this backbone, else the estimate of :func:`export.train.shifts.estimate_shifts`. The rule is
    logged, and stored in the settings as ``shift_rule``.

    Parameters
    ----------
    args : with the options of :func:`add_options`.
    backbone : whose features are trained on.
    features : returns (N, C, h, w) float32 features of some pictures without labels; called only
        if shifts are estimated.

    Raises
    ------
    InputError : no number of clusters, or values out of range.
    """
    config = check(args)
    intra, inter, rule = _shifts(args, config.clusters, backbone, features)
    LOG.info("shifts: %.3f within a picture, %.3f across pictures (%s)", intra, inter, rule)
    config = replace(config, intra_shift=intra, inter_shift=inter, shift_rule=rule)
    return SegUnify(config, backbone.channels)


def _sample(batches: FeatureBatches) -> Tensor:
    """Features of some views, of which neighbours are of different pictures, for the estimate of
    the shifts."""
    places = np.linspace(0, batches.views - 1, min(batches.views, _SAMPLE))
    views = batches.spread[places.round().astype(int)].tolist()
    return batches.of(views, most_broken=batches.most_broken)


def _shifts(
    args: argparse.Namespace, clusters: int, backbone: Backbone, features: Callable[[], Tensor]
) -> tuple[float, float, str]:
    """The shifts within a picture and across pictures, and the rule that chose them, in words."""
    named = (args.intra_shift, args.inter_shift)
    if None not in named:
        return *named, "named by --intra-shift and --inter-shift"
    preset = PRESETS.get(args.preset)
    fitting = [shifts for shifts in (preset.shifts if preset else ()) if shifts.fit(backbone)]
    if fitting:
        found, rule = (fitting[0].intra, fitting[0].inter), f"preset {args.preset}"
    else:
        from export.train.shifts import estimate_shifts

        found = estimate_shifts(features(), clusters)
        rule = "estimated from affinities of the pictures"
        if preset:
            others = " and ".join(map(str, preset.shifts))
            rule = f"the shifts of {args.preset} are for {others}; {rule} instead"
    for name, value in zip(("--intra-shift", "--inter-shift"), named, strict=True):
        if value is not None:
            rule += f", but named by {name}"
    intra, inter = (f if n is None else n for f, n in zip(found, named, strict=True))
    return intra, inter, rule


def from_settings(settings: dict[str, Any], channels: int) -> SegUnify:
    """SegUnify as :meth:`SegUnify.settings` describes it, with new weights; ``channels`` are those
    of the features.

    Raises
    ------
    InputError : settings that are missing, unknown or out of range.
    """
    try:
        config = SegUnifyConfig(**settings)
    except TypeError as error:
        raise InputError(
            f"settings of segunify: {error}", fix="train again with this version"
        ) from error
    return SegUnify(config, channels)


class SegUnify:
    """The method SegUnify, as :class:`export.train.method.Method` describes methods.

    Parameters
    ----------
    config : the settings.
    channels : C of the features.

    Example
    -------
    >>> config = SegUnifyConfig(clusters=3, intra_shift=0.1, inter_shift=0.5)
    >>> method = SegUnify(config, channels=320)
    >>> sum(method.losses(torch.rand(8, 320, 14, 14)).values()).backward()
    """

    name = "segunify"

    def __init__(self, config: SegUnifyConfig, channels: int) -> None:
        from export.models.segunify import SegUnifyHead

        self.config = config
        self.module = SegUnifyHead(
            channels,
            config.clusters,
            config.dim,
            config.projector,
            config.final_silu,
            config.dropout,
        )

    def optimiser(self, lr: float) -> Optimizer:
        """Adam with the rate ``lr`` for the projector and a fixed multiple for the prototypes."""
        from torch.optim import Adam

        groups: list[dict[str, Any]] = [
            {"params": [*self.module.projector.parameters()]},
            {"params": [self.module.student], "lr": lr * self.config.prototype_lr},
        ]
        return Adam(groups, lr=lr)

    def losses(self, features: Tensor) -> dict[str, Tensor]:
        """The energy in training mode: {"within", "across", "data"}, scalars.

        "within" and "across" have a gradient in the projector only, "data" in the student's
        prototypes only. Torch's global generator draws, in this order: the channels dropped in the
        linear branch, in the nonlinear branch, in the tokens of the affinities, and the cycle of
        the pictures.

        Parameters
        ----------
        features : (N, C, h, w) float32 of N views, at least 2.

        Raises
        ------
        InputError : a batch of one view, which has no other view to be compared with.
        """
        from torch.nn.functional import dropout2d

        from export.train.energy import random_cycle

        _check_batch(len(features))
        codes = self.module.codes(features)
        tokens = dropout2d(features, self.config.dropout)
        return self._energy(codes, tokens, random_cycle(len(features)).to(features.device))

    def held_out(self, features: Tensor) -> float:
        """The smoothness energy of what is frozen later, the projector and the teacher: in eval
        mode, without dropout and random numbers. Picture i is compared with picture i - 1, the
        first with the last. ``features`` as in :meth:`losses`.

        The data term is left out: it compares the student, which is not frozen, with the teacher,
        and it is lower where two clusters have become one (docs/segunify.md).

        Raises
        ------
        InputError : a batch of one view.
        """
        import torch

        _check_batch(len(features))
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                others = torch.arange(len(features), device=features.device).roll(1)
                terms = self._energy(self.module.codes(features), features, others)
        finally:
            self.module.train(training)
        return float(terms["within"] + terms["across"])

    def _energy(self, codes: Tensor, tokens: Tensor, others: Tensor) -> dict[str, Tensor]:
        """The three terms. Autocast, which may have computed the codes, is off from here on."""
        import torch

        from export.models.segunify import cosines
        from export.train.energy import data_term, smoothness

        config, head = self.config, self.module
        with torch.autocast(tokens.device.type, enabled=False):
            codes = codes.to(tokens.dtype)
            teacher = cosines(codes, head.teacher)
            shifts = (config.intra_shift, config.inter_shift)
            within, across = smoothness(tokens, teacher, others, shifts, config.temperature)
            student = cosines(codes.detach(), head.student)
            return {"within": within, "across": across, "data": data_term(student, teacher)}

    def before_update(self) -> None:
        """Move the teacher's prototypes towards the student's, which are not updated yet."""
        self.module.update_teacher(self.config.ema)

    def settings(self) -> dict[str, Any]:
        """The settings as :func:`from_settings` reads them."""
        return asdict(self.config)


def _check_batch(views: int) -> None:
    """InputError for a batch of one view."""
    if views < 2:
        raise InputError(
            "the batch has one view; SegUnify compares each view with another one",
            fix="--batch 2 or more, and at least two views to train on",
        )
