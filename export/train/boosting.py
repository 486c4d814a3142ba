"""Boosting as a method of training: its settings, options, and one step of it.

The equations stand in docs/boosting.md. Only making a :class:`Boosting` imports torch.
"""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.backbones import Backbone
from export.train import on_backbone
from runtime.checks import is_count, is_number, shown_value
from runtime.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from export.train.method import Parts, Start
    from export.train.pixels import PixelBatch, PixelBatches

DEFAULTS: dict[str, Any] = {"batch": 8}  # of the loop, where they are not those of LoopConfig
SELECTS = ("last", "energy")
CROPS = ("random", "compat")
RULES = ("published", "estimated from affinities of the pictures")  # of the threshold
TERMS = ("ncut", "image", "feature", "distillation", "zoomed_ncut", "equivariance")
LOG = logging.getLogger("dg.train")
_SAMPLE = 64  # most pictures from which the threshold is estimated


@dataclass(frozen=True, kw_only=True)
class BoostingConfig:
    """The settings of Boosting; the equations of docs/boosting.md name them.

    Parameters
    ----------
    threshold : positions with an affinity above it belong together, -1 to 1. The published value is
        for keys of DINO.
    threshold_rule : which rule chose the threshold, one of :data:`RULES`.
    weak : the weight of two positions that do not belong together.
    weights : of the six losses, in the order of :data:`TERMS`.
    eq : whether the two losses of the zoomed part, which are the last two, are used.
    gf : whether the target of the equivariance is guided-filtered.
    crop : where the zoomed part is: "random", or "compat", which is where the public code takes it
        by mistake: in the middle of the height, and near the left border.
    radius, eps : of the guided filter, in pixels of the fine mask.

    Raises
    ------
    InputError : values out of range, or that do not fit together.

    Example
    -------
    >>> BoostingConfig(eq=False).weights
    (1.0, 1.0, 1.0, 1.0, 0.01, 0.01)
    """

    threshold: float = 0.4
    threshold_rule: str = RULES[0]
    weak: float = 1e-6
    weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 0.01, 0.01)
    eq: bool = True
    gf: bool = True
    crop: str = "random"
    radius: int = 9
    eps: float = 1e-3

    def __post_init__(self) -> None:
        if isinstance(self.weights, list):  # in run.json
            object.__setattr__(self, "weights", tuple(self.weights))
        for name, low, high in (("threshold", -1, 1), ("weak", 0, 1), ("eps", 1e-9, 1)):
            if not is_number(value := getattr(self, name), low, high):
                raise InputError(
                    f"{name} is {shown_value(value)}; wanted a number from {low:g} to {high:g}",
                    fix=f"leave {name} out; its default is {getattr(type(self), name):g}",
                )
        if not is_count(self.radius, 1, 1024):
            raise InputError(
                f"radius is {shown_value(self.radius)}; wanted a whole number from 1 to 1024",
                fix="leave radius out; its default is 9",
            )
        weights = self.weights
        if not (
            isinstance(weights, tuple)
            and len(weights) == len(TERMS)
            and all(is_number(weight, 0, 1e6) for weight in weights)
        ):
            raise InputError(
                f"weights is {shown_value(weights)}; wanted {len(TERMS)} numbers from 0 to 1e6, "
                f"for {', '.join(TERMS)}",
                fix="leave weights out; the defaults are the published ones",
            )
        for name in ("eq", "gf"):
            if not isinstance(value := getattr(self, name), bool):
                raise InputError(
                    f"{name} is {shown_value(value)}; wanted true or false",
                    fix=f"--{name} or --no-{name}",
                )
        if self.threshold_rule not in RULES:
            raise InputError(
                f"threshold_rule is {shown_value(self.threshold_rule)}; wanted one of "
                f"{', '.join(RULES)}",
                fix=f"leave threshold_rule out; its default is {RULES[0]}",
            )
        if self.crop not in CROPS:
            raise InputError(
                f"crop is {shown_value(self.crop)}; wanted one of {', '.join(CROPS)}",
                fix="--crop random",
            )
        if not self.eq and (not self.gf or self.crop != "random"):
            raise InputError(
                "eq is false, so gf and crop have no effect",
                fix="leave --no-gf and --crop out, or --no-eq",
            )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of Boosting to the parser of ``python -m export train boosting``."""
    on_backbone.add_options(parser, crops=False)
    options = parser.add_argument_group("Boosting")
    options.add_argument(
        "--crop",
        choices=CROPS,
        default="random",
        help="which part of a picture is zoomed: a random one, or the one that the public code "
        "always takes by mistake (%(default)s)",
    )
    options.add_argument(
        "--eq",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the losses of the zoomed part are used (%(default)s)",
    )
    options.add_argument(
        "--gf",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the mask that the equivariance aims at is guided-filtered (%(default)s)",
    )


def check(args: argparse.Namespace) -> BoostingConfig:
    """The settings that the command line names, with the published threshold. It needs no backbone,
    so that a wrong option is reported before one is loaded.

    Raises
    ------
    InputError : values out of range, or that do not fit together, also of the views.
    """
    on_backbone.view_rule(args)
    return BoostingConfig(eq=args.eq, gf=args.gf, crop=args.crop)


def prepare(start: Start) -> Parts:
    """Boosting and its batches as the command line describes them. Torch's global generator draws
    the weights, and nothing else here uses it.

    For keys, the threshold is the published one. For other features it is the estimate of
    :func:`export.train.affinity.affinity_threshold` from some pictures without labels. The rule is
    logged, and stored in the settings as ``threshold_rule``.

    Raises
    ------
    InputError : values out of range, or a backbone that cannot be used.
    BundleError, MissingBackend : of the backbone.
    """
    from export.train.method import Parts
    from export.train.pixels import PixelBatches
    from export.train.select import energy_score

    args, config, rule = start.args, start.config, on_backbone.view_rule(start.args)
    backbone, loaded, libraries = on_backbone.load(start)
    backbone.module.to(config.device)

    def batches_of(part: list[Path], workers: int, augment: bool) -> PixelBatches:
        return PixelBatches(
            part, rule.size, batch=config.batch, seed=config.seed, device=config.device,
            workers=workers, broken=start.broken(part), augment=augment,
        )  # fmt: skip

    if start.entry is None:
        sample = batches_of(start.files, 0, augment=False)
        method = Boosting(_with_threshold(check(args), backbone, sample), backbone)
    else:
        method = from_settings(start.entry["settings"], backbone)
    method.check_size(rule.size)
    method.module.to(config.device)
    score = held = None
    if config.select == "energy":
        held = batches_of(start.held, 0, augment=False)
        score = energy_score(method, held)
    batches = batches_of(start.files, config.workers, augment=True)
    entry = {
        "settings": method.settings(),
        "backbone": loaded,
        "views": {"size": rule.size},
    }
    return Parts(method, batches, score, held, entry, libraries)


def _with_threshold(
    config: BoostingConfig, backbone: Backbone, sample: PixelBatches
) -> BoostingConfig:
    """``config`` with the threshold for the features of ``backbone``."""
    if backbone.features == "keys":
        return config
    import torch

    from export.train.affinity import affinity_threshold

    places = np.linspace(0, sample.views - 1, min(sample.views, _SAMPLE))
    views = sample.spread[places.round().astype(int)]
    parts = np.array_split(views, -(-len(views) // sample.batch))
    features = [
        features_of(backbone, sample.of(part.tolist(), most_broken=sample.most_broken).pixels)
        for part in parts
    ]
    threshold = affinity_threshold(torch.cat(features), keys=False)
    rule = RULES[1]
    LOG.info("threshold of the affinities: %.3f (%s)", threshold, rule)
    return replace(config, threshold=threshold, threshold_rule=rule)


def features_of(backbone: Backbone, pixels: Tensor) -> Tensor:
    """The features (N, C, h, w) float32 of ``pixels`` (N, 3, H, W) in [0, 1], without a gradient
    and without autocast.

    Example
    -------
    >>> features_of(load_backbone("efficientnet-lite0"), torch.rand(1, 3, 224, 224)).shape
    torch.Size([1, 320, 14, 14])
    """
    import torch

    from export.models.boosting import normalised

    with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
        return backbone.module(normalised(pixels, backbone.mean, backbone.std))


def from_settings(settings: dict[str, Any], backbone: Backbone) -> Boosting:
    """Boosting as :meth:`Boosting.settings` describes it, with new weights.

    Raises
    ------
    InputError : settings that are unknown or out of range.
    """
    try:
        config = BoostingConfig(**settings)
    except TypeError as error:
        raise InputError(
            f"settings of boosting: {error}", fix="train again with this version"
        ) from error
    return Boosting(config, backbone)


class Boosting:
    """The method Boosting, as :class:`export.train.method.Method` describes methods.

    Parameters
    ----------
    config : the settings.
    backbone : frozen; its module is on the device of the pictures.

    Example
    -------
    >>> method = Boosting(BoostingConfig(), load_backbone("efficientnet-lite0"))
    >>> offsets = torch.tensor([[0, 0], [48, 96]])
    >>> sum(method.losses(PixelBatch(torch.rand(2, 3, 192, 192), offsets)).values()).backward()
    """

    name = "boosting"

    def __init__(self, config: BoostingConfig, backbone: Backbone) -> None:
        from export.models.boosting import BoostingHead

        self.config, self.backbone = config, backbone
        self.module = BoostingHead(backbone.channels)

    def optimiser(self, lr: float) -> Optimizer:
        """AdamW with betas (.9, .99) and no weight decay, as published."""
        from torch.optim import AdamW

        return AdamW(self.module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0)

    def losses(self, batch: PixelBatch) -> dict[str, Tensor]:
        """The weighted losses by the names of :data:`TERMS`, scalars; without the last two if
        ``eq`` is off. No random numbers are drawn.

        Parameters
        ----------
        batch : ``pixels`` (N, 3, size, size) float32 RGB in [0, 1], and ``offsets`` (N, 2) int64,
            the top row and the left column of the zoomed part in pixels, 0 to size / 2. The size
            is even and at least twice the backbone's stride.

        Raises
        ------
        InputError : a size that cannot be used.
        """
        import torch

        from export.models.boosting import IMAGENET_MEAN, IMAGENET_STD, normalised, resized
        from export.train import boosting_losses as terms

        config, head, pixels = self.config, self.module, batch.pixels
        self.check_size(pixels.shape[2])
        images = normalised(pixels, IMAGENET_MEAN, IMAGENET_STD)
        features = features_of(self.backbone, pixels)
        coarse, fine = head(features, images)
        if config.eq:
            offsets, mask_offsets = self.places(batch.offsets, pixels.shape[2])
            parts = terms.zoomed(pixels, offsets)
            part_features = features_of(self.backbone, parts)
            with head.keeping_statistics():
                part_coarse, tokens = head.coarse(part_features)
                with torch.no_grad():
                    teacher = head.fine(tokens, normalised(parts, IMAGENET_MEAN, IMAGENET_STD))
        with torch.autocast(pixels.device.type, enabled=False):
            coarse, fine = coarse.to(features), fine.to(features)
            units = terms.directions(features)
            affinity = (units, config.threshold, config.weak)
            size = fine.shape[2:]
            found = {
                "ncut": terms.ncut(coarse, *affinity),
                "image": terms.image_regularisation(fine, resized(images, *size)),
                "feature": terms.feature_regularisation(coarse, *affinity),
                "distillation": terms.distillation(coarse, fine),
            }
            if config.eq:
                part_units = terms.directions(part_features)
                grey = resized(parts, *size).mean(1, keepdim=True) if config.gf else None
                found["zoomed_ncut"] = terms.ncut(
                    part_coarse.to(features), part_units, config.threshold, config.weak
                )
                found["equivariance"] = terms.equivariance(
                    terms.zoomed(fine, mask_offsets),
                    teacher.to(features),
                    grey,
                    config.radius,
                    config.eps,
                )
            return {
                name: weight * found[name]
                for name, weight in zip(TERMS, config.weights, strict=True)
                if name in found
            }

    def held_out(self, batch: PixelBatch) -> float:
        """The sum of the losses in eval mode, by which --select energy chooses; no random numbers.
        ``batch`` as in :meth:`losses`."""
        import torch

        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                return float(sum(self.losses(batch).values()))
        finally:
            self.module.train(training)

    def places(self, offsets: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Where the zoomed parts are, (N, 2) in pixels of the pictures and in those of the fine
        mask, which has 8 pixels for each ``stride`` of the picture. Offsets are rounded down to
        whole pixels of both."""
        from export.models.boosting import SCALE

        if self.config.crop == "compat":  # of 320 pixels: row 80, columns 10 to 29
            left = (size // 32 + offsets[:, 1] // 8).clamp(max=3 * size // 32 - 1)
            offsets = offsets.new_full(offsets.shape, size // 4)
            offsets[:, 1] = left
        stride = self.backbone.stride
        step = stride // math.gcd(stride, SCALE)
        offsets = offsets - offsets % step
        return offsets, offsets * SCALE // stride

    def check_size(self, size: int) -> None:
        """Check the side of the pictures in pixels.

        Raises
        ------
        InputError : it is odd or no multiple of the backbone's stride, or there are fewer than
            2 x 2 positions.
        """
        stride = self.backbone.stride
        if size % stride or size % 2 or size < 2 * stride:
            near = max(2, round(size / stride)) * stride
            raise InputError(
                f"imgsz is {size}; {self.backbone.name} and the zoomed half want an even multiple "
                f"of {stride}, at least {2 * stride}",
                fix=f"--imgsz {near + stride * (near % 2)}",
            )

    def before_update(self) -> None:
        """Nothing has to be done between the gradients and the update."""

    def settings(self) -> dict[str, Any]:
        """The settings as :func:`from_settings` reads them."""
        return asdict(self.config)
