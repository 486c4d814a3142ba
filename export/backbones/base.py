"""Backbone: a frozen network that returns the features of a picture."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.checks import check_count, is_number
from runtime.errors import InputError
from runtime.prior.preprocess import Preprocess

if TYPE_CHECKING:
    from torch.nn import Module

LITE0 = "efficientnet-lite0"  # the backbone whose weights are in a package


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A frozen network, as each family of backbones returns it.

    Parameters
    ----------
    name : short, for run.json and the manifest, such as "efficientnet-lite0".
    module : in eval mode, without gradients; takes (N, 3, h, w) float32 normalised RGB, h and w
        multiples of ``stride``, and returns (N, ``channels``, h / stride, w / stride) float32.
    channels : of the features.
    stride : pixels of the input for one position of the features, on each axis.
    mean, std : of the colours R, G, B in [0, 1]; the input is (rgb - mean) / std.
    source : the text that names the backbone for :func:`export.backbones.load.load_backbone`.
    features : which features of the network they are, such as "tokens", "keys" or "block15".
    sha256 : of the weights and, where there is one, of config.json, in hexadecimal.
    padding : of the convolutions of stride 2: "symmetric", or "same", which is TensorFlow's: one
        pixel more on the right and at the bottom. "none" where a network has no padding.
    licence : of the weights, in words.
    trained : False when the weights are random.
    library : name and version of the library besides torch that computes the features; "" for none.

    Raises
    ------
    InputError : channels or stride below 1, or a mean or std that no colours can have.
    """

    name: str
    module: Module
    channels: int
    stride: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    source: str
    features: str
    sha256: str
    padding: str = "none"
    licence: str = "not stated"
    trained: bool = True
    library: str = ""

    def __post_init__(self) -> None:
        check_count("channels", self.channels, 1, 1 << 20)
        check_count("stride", self.stride, 1, 1 << 10)
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(map(is_number, values)):
                raise InputError(
                    f"{key} of {self.name} is {values!r}; wanted three numbers",
                    fix="take them from the code that trained the network",
                )
        if min(self.std) <= 0:
            raise InputError(
                f"std of {self.name} is {self.std!r}; wanted numbers above 0",
                fix="take them from the code that trained the network",
            )

    def preprocess(self, height: int, width: int) -> Preprocess:
        """How a picture is stretched to ``height`` x ``width`` pixels, multiples of the stride, and
        normalised."""
        return Preprocess(
            mean=self.mean,
            std=self.std,
            height=height,
            width=width,
            multiple=self.stride,
            minimum=self.stride,
        )

    def entry(self) -> dict[str, Any]:
        """What run.json and the manifest store of the backbone."""
        return {
            "name": self.name,
            "source": self.source,
            "features": self.features,
            "sha256": self.sha256,
            "channels": self.channels,
            "stride": self.stride,
            "mean": list(self.mean),
            "std": list(self.std),
            "padding": self.padding,
            "licence": self.licence,
            "trained": self.trained,
        }

    @property
    def key(self) -> str:
        """A text in hexadecimal that changes when the same picture can get other features."""
        parts = [
            self.name,
            self.features,
            self.sha256,
            list(self.mean),
            list(self.std),
            self.padding,
            self.library,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
