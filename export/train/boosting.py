"""Boosting as a method of training: its settings, options, and one step of it.

The equations stand in docs/boosting.md. Only making a :class:`Boosting` imports torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from export.backbones import Backbone
from runtime.checks import is_count, is_number, shown_value
from runtime.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from export.train.pixels import PixelBatch

CROPS = ("random", "compat")
TERMS = ("ncut", "image", "feature", "distillation", "zoomed_ncut", "equivariance")


@dataclass(frozen=True, kw_only=True)
class BoostingConfig:
    """The settings of Boosting; the equations of docs/boosting.md name them.

    Parameters
    ----------
    threshold : positions with an affinity above it belong together, -1 to 1. The published value is
        for keys of DINO.
    threshold_rule : which rule chose the threshold, in words.
    centre : C numbers that are subtracted from the features before affinities are computed; None
        for 0.
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
    threshold_rule: str = "published"
    centre: tuple[float, ...] | None = None
    weak: float = 1e-6
    weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 0.01, 0.01)
    eq: bool = True
    gf: bool = True
    crop: str = "random"
    radius: int = 9
    eps: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("centre", "weights"):  # lists in run.json
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
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
        if self.centre is not None and not (
            isinstance(self.centre, tuple) and all(map(is_number, self.centre))
        ):
            raise InputError(
                f"centre is {shown_value(self.centre)}; wanted a number for each channel",
                fix="leave centre out",
            )
        for name in ("eq", "gf"):
            if not isinstance(value := getattr(self, name), bool):
                raise InputError(
                    f"{name} is {shown_value(value)}; wanted true or false",
                    fix=f"--{name} or --no-{name}",
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


def from_settings(settings: dict[str, Any], backbone: Backbone) -> Boosting:
    """Boosting as :meth:`Boosting.settings` describes it, with new weights.

    Raises
    ------
    InputError : settings that are unknown, out of range, or for a backbone with another number of
        channels.
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

    Raises
    ------
    InputError : the centre of the settings has another number of channels than the backbone.

    Example
    -------
    >>> method = Boosting(BoostingConfig(), load_backbone("efficientnet-lite0"))
    >>> offsets = torch.tensor([[0, 0], [48, 96]])
    >>> sum(method.losses(PixelBatch(torch.rand(2, 3, 192, 192), offsets)).values()).backward()
    """

    name = "boosting"

    def __init__(self, config: BoostingConfig, backbone: Backbone) -> None:
        from export.models.boosting import BoostingHead

        if config.centre is not None and len(config.centre) != backbone.channels:
            raise InputError(
                f"centre has {len(config.centre)} numbers; {backbone.name} has "
                f"{backbone.channels} channels",
                fix="train again with this backbone",
            )
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
        self._check_size(pixels.shape[2])
        images = normalised(pixels, IMAGENET_MEAN, IMAGENET_STD)
        features = self._features(pixels)
        coarse, fine = head(features, images)
        if config.eq:
            offsets, mask_offsets = self._offsets(batch.offsets, pixels.shape[2])
            parts = terms.zoomed(pixels, offsets)
            part_features = self._features(parts)
            with head.keeping_statistics():
                part_coarse, tokens = head.coarse(part_features)
                with torch.no_grad():
                    teacher = head.fine(tokens, normalised(parts, IMAGENET_MEAN, IMAGENET_STD))
        with torch.autocast(pixels.device.type, enabled=False):
            coarse, fine = coarse.float(), fine.float()
            units = terms.directions(features, config.centre)
            affinity = (units, config.threshold, config.weak)
            size = fine.shape[2:]
            found = {
                "ncut": terms.ncut(coarse, *affinity),
                "image": terms.image_regularisation(fine, resized(images, *size)),
                "feature": terms.feature_regularisation(coarse, *affinity),
                "distillation": terms.distillation(coarse, fine),
            }
            if config.eq:
                part_units = terms.directions(part_features, config.centre)
                grey = resized(parts, *size).mean(1, keepdim=True) if config.gf else None
                found["zoomed_ncut"] = terms.ncut(
                    part_coarse.float(), part_units, config.threshold, config.weak
                )
                found["equivariance"] = terms.equivariance(
                    terms.zoomed(fine, mask_offsets),
                    teacher.float(),
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

    def _features(self, pixels: Tensor) -> Tensor:
        """The features (N, C, h, w) of ``pixels``, in float32 and without a gradient."""
        import torch

        from export.models.boosting import normalised

        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            return self.backbone.module(normalised(pixels, self.backbone.mean, self.backbone.std))

    def _offsets(self, offsets: Tensor, size: int) -> tuple[Tensor, Tensor]:
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

    def _check_size(self, size: int) -> None:
        """InputError for pictures without a half, or with fewer than 2 x 2 positions."""
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
