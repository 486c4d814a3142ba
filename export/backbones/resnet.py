"""ResNet-18 and ResNet-50 from a state dict with torchvision's names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import relu

from export.backbones.base import Backbone
from export.backbones.weights import load_strictly, read_weights
from runtime.errors import InputError
from runtime.files import shown

FEATURES = ("layer4", "layer3")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which torchvision uses
_PREFIXES = ("module.", "backbone.")  # in front of all names, as wrappers of networks write them
_BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}  # of each layer: table 1 of He et al. (2015)


class _Block(nn.Module):
    """A residual block: two 3x3 convolutions; or, of a bottleneck, a 1x1, a 3x3 and a 1x1 that has
    four times the channels. The first 3x3 convolution has the stride, as torchvision's have.
    ``dilations`` are those of the first and of the second 3x3 convolution."""

    def __init__(
        self, ins: int, wide: int, stride: int, dilations: tuple[int, int], bottleneck: bool
    ) -> None:
        super().__init__()
        outs = wide * (4 if bottleneck else 1)
        sides = (1, 3, 1) if bottleneck else (3, 3)
        self.count, strided = len(sides), sides.index(3)
        for i, side in enumerate(sides):
            dilation = dilations[0 if i == strided else 1] if side == 3 else 1
            convolution = nn.Conv2d(
                ins if i == 0 else wide,
                outs if i == len(sides) - 1 else wide,
                side,
                stride if i == strided else 1,
                padding=dilation * (side // 2),
                dilation=dilation,
                bias=False,
            )
            self.add_module(f"conv{i + 1}", convolution)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(convolution.out_channels))
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or ins != outs:
            self.downsample = nn.Sequential(
                nn.Conv2d(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.count + 1):
            y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
            y = relu(y) if i < self.count else y
        return relu(y + self.downsample(x))


class ResNet(nn.Module):
    """ResNet without its classifier, with torchvision's names.

    Parameters
    ----------
    depth : 18 or 50.
    last : the number of the last layer to compute, 3 or 4.
    dilated : the stride of 2 of layer4 is 1, and the 3x3 convolutions behind it have dilation 2,
        so that the stride of the whole is 16, not 32. At the even positions of both axes the
        features are those of the network of stride 32.

    Attributes
    ----------
    widths : the channels of the features of layer1 to layer4.
    """

    def __init__(self, depth: int, last: int = 4, *, dilated: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        ins, bottleneck = 64, depth == 50
        for number, repeats in enumerate(_BLOCKS[depth], 1):
            wide, blocks = 32 * 2**number, []
            for repeat in range(repeats):
                stride, dilations = (2 if number > 1 and repeat == 0 else 1), (1, 1)
                if dilated and number == 4:
                    stride, dilations = 1, (1 if repeat == 0 else 2, 2)
                blocks.append(_Block(ins, wide, stride, dilations, bottleneck))
                ins = wide * (4 if bottleneck else 1)
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.last = last
        self.widths = tuple((256 if bottleneck else 64) * 2**i for i in range(4))

    def stages(self, images: Tensor) -> Iterator[Tensor]:
        """The features of layer1, layer2 and so on up to ``last``, of images (N, 3, h, w) of any
        size. Those of layer1 are (N, C, h / 4, w / 4), rounded up; each next layer halves this,
        but not layer4 of a dilated network."""
        x = self.maxpool(relu(self.bn1(self.conv1(images))))
        for number in range(1, self.last + 1):
            x = self.get_submodule(f"layer{number}")(x)
            yield x

    def forward(self, images: Tensor) -> Tensor:
        """Features, (N, C, h / 16, w / 16), of images (N, 3, h, w) float32, normalised, whose sides
        are multiples of 16."""
        *_, x = self.stages(images)
        return x


def resnet(path: Path, features: str = "layer4", *, dilated: bool = True) -> Backbone:
    """ResNet-18 or -50 from a file of weights; the names in the file say which.

    Parameters
    ----------
    path : .pth, .pt or .bin for torch.load(weights_only=True), or .safetensors: a state dict with
        torchvision's names, or one under "state_dict". The prefixes "module." and "backbone." are
        removed where all names have them. The classifier, fc, is not used.
    features : "layer4", dilated, or "layer3"; both have stride 16.
    dilated : False: layer4 is not dilated, and has stride 32.

    Raises
    ------
    InputError : no such file or features.
    BundleError : the file is broken, unsafe, or of another network.
    """
    if features not in FEATURES:
        raise InputError(
            f"features is {features!r}; a ResNet has {', '.join(FEATURES)}",
            fix="--features layer4",
        )
    state, sha256 = read_weights(path)
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    depth = 50 if "layer1.0.conv3.weight" in state else 18
    network = ResNet(depth, int(features[-1]), dilated=dilated)
    # Files of PyTorch before 0.4.1 have no counts of batches, which are for training alone.
    counts = {k: v for k, v in network.state_dict().items() if k.endswith(".num_batches_tracked")}
    load_strictly(network, counts | state, f"the weights in {shown(path)}, read as ResNet-{depth},")
    channels = (64 if depth == 18 else 256) * 2 ** (network.last - 1)
    return Backbone(
        name=f"resnet{depth}",
        module=network,
        channels=channels,
        stride=16 if dilated or features == "layer3" else 32,
        mean=_MEAN,
        std=_STD,
        source=os.path.abspath(path),
        features=features,
        sha256=sha256,
        padding="symmetric",
    )
