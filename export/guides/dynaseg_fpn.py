"""DynaSeg with a feature extractor, as a guide model: a network that is trained on each picture."""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from export.backbones.base import LITE0
from export.backbones.load import load_backbone
from runtime.checks import as_number, check_bytes, check_count, is_number, shown_value
from runtime.core.config import RefineConfig
from runtime.core.resize import working_picture
from runtime.core.silhouette import best_cluster_count
from runtime.errors import InputError
from runtime.files import shown

if TYPE_CHECKING:
    from export.guides.fpn import Trained

WEIGHTINGS = ("fsf", "scf")
COMPAT_CHANNELS = 64  # of the public code
STRIDE = 32  # pixels of the working picture for one position of the coarsest features


@dataclass(frozen=True, kw_only=True)
class DynasegFpnOptions:
    """Options of :class:`DynasegFpn`. The defaults of the training are those of DynaSeg's public
    code (Guermazi et al., IVC 2024).

    Parameters
    ----------
    backbone : "efficientnet-lite0", or the path of a ResNet-18's weights, as
        :func:`export.backbones.load.load_backbone` reads them.
    weighting : weight of the continuity loss: "fsf" is K' / 15, "scf" is 50 / K', where K' is the
        number of labels in the current map.
    steps : most SGD steps for a picture, 0 to 1,000,000.
    channels : the number of clusters at the start, 2 to 1024.
    lr, momentum, decay : of SGD: 0 to 10, 0 to 0.9999, and 0 to 1.
    silhouette : end the training when K' falls to the number of clusters (3 to 26) with the best
        silhouette of the picture's colours, and return the last map with at least that many. None
        means True, or False with ``compat``.
    frozen : train the pyramid alone. The backbone has then its own statistics of batch norms.
    compat : the truncated network and the behaviour of DynaSeg's public code, with a ResNet-18.
    seed : of the initial weights, 0 to 2^63 - 1.
    scale, max_pixels : the working size, as in :class:`runtime.core.config.RefineConfig`.

    Raises
    ------
    InputError : a value out of range, or one that ``compat`` does not use.

    Example
    -------
    >>> DynasegFpnOptions(backbone="resnet18.pth", weighting="scf")
    """

    backbone: str = LITE0
    weighting: str = "fsf"
    steps: int = 50
    channels: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    decay: float = 1e-4
    silhouette: bool | None = None
    frozen: bool = False
    compat: bool = False
    seed: int = 0
    scale: float = 0.5
    max_pixels: int = 2**18

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise InputError(
                f"weighting is {shown_value(self.weighting)}; wanted one of "
                f"{', '.join(WEIGHTINGS)}",
                fix="--weighting fsf",
            )
        for name in ("silhouette", "frozen", "compat"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "silhouette" and value is None):
                raise InputError(f"{name} is {shown_value(value)}; wanted True or False")
        if not isinstance(self.backbone, str):
            raise InputError(f"backbone is {shown_value(self.backbone)}; wanted a text")
        for name, low, high in (
            ("steps", 0, 10**6), ("channels", 2, 1024), ("seed", 0, 2**63 - 1),
        ):  # fmt: skip
            object.__setattr__(self, name, check_count(name, getattr(self, name), low, high))
        for name, most in (("lr", 10), ("momentum", 0.9999), ("decay", 1)):
            value = getattr(self, name)
            if not is_number(value, 0, most):
                raise InputError(
                    f"{name} is {shown_value(value)}; wanted a number from 0 to {most:g}",
                    fix=f"--{name} {getattr(type(self), name):g}",
                )
            object.__setattr__(self, name, as_number(value))
        size = RefineConfig(scale=self.scale, max_pixels=self.max_pixels)
        object.__setattr__(self, "scale", size.scale)
        object.__setattr__(self, "max_pixels", size.max_pixels)
        if self.compat:
            self._check_compat()
        if self.silhouette is None:
            object.__setattr__(self, "silhouette", not self.compat)

    def _check_compat(self) -> None:
        """InputError for what the public code's network has not."""
        if self.backbone == LITE0:
            raise InputError(
                f"compat is the network of the public code, a ResNet-18; backbone is {LITE0}",
                fix="--backbone resnet18.pth, a file with the weights of a ResNet-18",
            )
        for name, only in (
            ("silhouette", False), ("frozen", False), ("channels", COMPAT_CHANNELS),
            ("weighting", "fsf"),  # its continuity trains nothing, whatever its weight is
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value != only:
                raise InputError(
                    f"{name} is {value}; compat is the public code, where it is {only}",
                    fix=f"leave out {name}, or compat",
                )

    def working_size(self, height: int, width: int) -> tuple[int, int]:
        """The height and width of the labels of a picture."""
        size = RefineConfig(scale=self.scale, max_pixels=self.max_pixels)
        return size.working_size(height, width)


class DynasegFpn:
    """DynaSeg with a feature extractor: labels of one picture, from a network that is trained on
    this picture alone. It can be a prior: ``Segmenter(DynasegFpn())``.

    The labels of two pictures have no common meaning. The same seed and number of threads of torch
    give the same labels. Several threads may call one object.

    Parameters
    ----------
    options : see :class:`DynasegFpnOptions`.

    Attributes
    ----------
    name, output, names : "dynaseg_fpn", "labels", and None: the labels have no names.

    Raises
    ------
    InputError : no such backbone, or another network than a ResNet-18.
    BundleError : weights that are damaged or of another network.
    MissingBackend : a package that the backbone needs is not installed.

    Example
    -------
    >>> DynasegFpn(DynasegFpnOptions(steps=20))(picture).shape  # picture: (321, 481, 3) uint8
    (160, 240)
    """

    name = "dynaseg_fpn"
    output = "labels"
    names: list[str] | None = None

    def __init__(self, options: DynasegFpnOptions | None = None) -> None:
        self.options = options or DynasegFpnOptions()
        self.backbone = load_backbone(self.options.backbone, dilated=False)
        if self.backbone.name not in (LITE0, "resnet18"):
            raise InputError(
                f"backbone is {shown(self.options.backbone)}, a {self.backbone.name}; wanted a "
                "ResNet-18, as DynaSeg has it",
                fix=f"--backbone with the file of a ResNet-18, or --backbone {LITE0}",
            )
        import torch

        from export.guides.fpn import Pyramid, Truncated

        body: Any = copy.deepcopy(self.backbone.module)  # a Lite0 or a ResNet, which is trained
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)
            self._network: Pyramid | Truncated
            if self.options.compat:
                self._network = Truncated(body)
            else:
                self._network = Pyramid(body, self.options.channels, frozen=self.options.frozen)

    def train(self, picture: np.ndarray) -> Trained:
        """Train the network on a picture.

        Parameters
        ----------
        picture : (H, W, 3) uint8 RGB.

        Returns
        -------
        The labels at working size, 0 to ``channels`` - 1, and how the training ended.

        Raises
        ------
        InputError : the picture is no such array, or too small.
        SdkError : the loss is not finite.
        """
        import torch

        from export.guides.fpn import segment

        options, picture = self.options, check_bytes("picture", picture)
        height, width = options.working_size(*picture.shape[:2])
        if min(height, width) < STRIDE or max(height, width) < 2 * STRIDE:
            raise InputError(
                f"the working size is {height} x {width} pixels; wanted at least {STRIDE} x "
                f"{2 * STRIDE}, so that the coarsest features have several positions",
                fix="--scale 1, or a larger picture",
            )
        low = working_picture(picture, height, width)
        mean, std = np.array([self.backbone.mean, self.backbone.std], np.float32)
        planes = np.ascontiguousarray(((low - mean) / std).transpose(2, 0, 1)[None])
        return segment(
            self._network,
            torch.from_numpy(planes),
            steps=options.steps,
            weighting=options.weighting,
            lr=options.lr,
            momentum=options.momentum,
            decay=options.decay,
            floor=best_cluster_count(low) if options.silhouette else 0,
        )

    def own_guide(self, picture: np.ndarray) -> np.ndarray:
        """The labels of a picture, (h, w) int32 at working size: the clusters that its map has,
        numbered from 0.

        Parameters and errors are those of :meth:`train`.
        """
        labels = self.train(picture).labels
        return np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.int32)

    __call__ = own_guide

    def entry(self) -> dict[str, Any]:
        """What guides.json stores of the model: all that decides the labels but the version of
        torch and its number of threads. A backbone is known by its sha256, wherever its file is."""
        options = asdict(self.options) | {"backbone": self.backbone.name}
        return {
            "kind": self.name,
            "sha256": self.backbone.sha256,
            "classes": self.options.channels,
            "output": self.output,
            "options": options,
        }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of :class:`DynasegFpnOptions`."""
    default = DynasegFpnOptions()
    for name, kind, text in (
        ("backbone", str, f"{LITE0}, or a file with the weights of a ResNet-18"),
        ("steps", int, "most SGD steps for a picture"),
        ("channels", int, "clusters at the start"),
        ("lr", float, "learning rate"),
        ("momentum", float, "of SGD"),
        ("decay", float, "weight decay"),
        ("seed", int, "of the initial weights"),
        ("scale", float, "working size, relative to the picture's"),
        ("max_pixels", int, "most pixels of the working size"),
    ):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=getattr(default, name),
            help=f"{text} (%(default)s)",
        )
    parser.add_argument(
        "--weighting", choices=WEIGHTINGS, default=default.weighting,
        help="weight of the continuity loss (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--silhouette", action=argparse.BooleanOptionalAction,
        help="end at the number of labels with the best silhouette (yes, but not with --compat)",
    )  # fmt: skip
    for name, text in (
        ("frozen", "train the pyramid alone, and not the backbone"),
        ("compat", "the truncated network of DynaSeg's public code, with a ResNet-18"),
    ):
        parser.add_argument(f"--{name}", action="store_true", help=text)


def from_arguments(args: argparse.Namespace) -> DynasegFpn:
    """The model that the command line describes.

    Raises
    ------
    InputError, BundleError, MissingBackend : as of :class:`DynasegFpn`.
    """
    names = [field.name for field in fields(DynasegFpnOptions)]
    return DynasegFpn(DynasegFpnOptions(**{name: getattr(args, name) for name in names}))
