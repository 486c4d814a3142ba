"""The head of Boosting on features of a frozen backbone, and the network that is frozen from both.

Boosting (Sari, Locatello, Favaro: "Boosting Unsupervised Segmentation Learning", arXiv 2404.03392)
trains a head in the form of Sempart (Ravindran and Basavaraju, ICCV 2023, arXiv 2309.10972), which
finds the one object of a picture. The equations stand in docs/boosting.md. This module imports
torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE = 8  # pixels of the fine mask for one position of the features, on each axis
_HEADS, _HEAD_WIDTH = 2, 64


def resized(x: Tensor, height: int, width: int) -> Tensor:
    """``x`` (N, C, h, w) at another size, bilinearly and without smoothing before it shrinks, as
    the public code of Boosting resizes.

    Example
    -------
    >>> resized(torch.rand(1, 1, 8, 8), 16, 12).shape
    torch.Size([1, 1, 16, 12])
    """
    if (height, width) == x.shape[2:]:
        return x
    return functional.interpolate(x, (height, width), mode="bilinear", align_corners=False)


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(pixels - mean) / std for ``pixels`` (N, 3, H, W) in [0, 1]; one number for each colour.

    Example
    -------
    >>> normalised(torch.rand(1, 3, 32, 32), IMAGENET_MEAN, IMAGENET_STD)
    """
    shift, scale = (pixels.new_tensor(values)[:, None, None] for values in (mean, std))
    return (pixels - shift) / scale


class _Block(nn.Module):
    """A transformer block that norms before its layers: (N, n, width) to the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = _HEADS * _HEAD_WIDTH
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * inner, bias=False), nn.Linear(inner, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, positions, _ = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, positions, 3, _HEADS, _HEAD_WIDTH)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(n, positions, _HEADS * _HEAD_WIDTH))
        return x + self.mlp(self.norm2(x))


def _convolution(ins: int, outs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(ins, outs, 3, padding=1), nn.BatchNorm2d(outs), nn.LeakyReLU(0.01, inplace=True)
    )


class BoostingHead(nn.Module):
    """Features (N, C, h, w) and images (N, 3, H, W) to two masks with values in (0, 1).

    The coarse mask has the size of the features. The fine mask is :data:`SCALE` times as large,
    whatever the stride of the backbone: at stride 8 it has the size of the image, at stride 16 half
    of it. Images are RGB, normalised with :data:`IMAGENET_MEAN` and :data:`IMAGENET_STD` whatever
    the backbone wants; they are resized to the size of each stage.

    With C = 384 and a width of 64 there are 748,165 parameters, which docs/boosting.md lists.

    Parameters
    ----------
    channels : C.
    width : channels of the tokens; the stages have 3 and 2 times as many.

    Example
    -------
    >>> coarse, fine = BoostingHead(384)(torch.rand(2, 384, 28, 28), torch.rand(2, 3, 224, 224))
    >>> coarse.shape, fine.shape
    (torch.Size([2, 1, 28, 28]), torch.Size([2, 1, 224, 224]))
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, width, 1)
        self.blocks = nn.Sequential(_Block(width), _Block(width))
        self.to_coarse = nn.Conv2d(width, 1, 1)
        high, wide = 3 * width, 2 * width
        self.stages = nn.ModuleList(
            [
                _convolution(width + 3, high),
                _convolution(high + 3, wide),
                nn.Sequential(*_convolution(wide + 3, wide), *_convolution(wide, wide)),
            ]
        )
        self.to_fine = nn.Conv2d(wide + 3, 1, 1)

    def coarse(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The coarse mask (N, 1, h, w) and the tokens (N, width, h, w) of ``features``."""
        x = self.reduce(features)
        height, width = x.shape[2:]
        tokens = self.blocks(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        tokens = tokens.unflatten(2, (height, width))
        return self.to_coarse(tokens).sigmoid(), tokens

    def fine(self, tokens: Tensor, images: Tensor) -> Tensor:
        """The fine mask (N, 1, 8h, 8w) of ``tokens`` (N, width, h, w) and ``images``."""
        x = tokens
        for stage in self.stages:
            height, width = 2 * x.shape[2], 2 * x.shape[3]
            rgb = resized(images, height, width)
            x = stage(torch.cat([resized(x, height, width), rgb], 1))
        return self.to_fine(torch.cat([x, rgb], 1)).sigmoid()

    def forward(self, features: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The coarse and the fine mask."""
        mask, tokens = self.coarse(features)
        return mask, self.fine(tokens, images)

    @contextmanager
    def keeping_statistics(self) -> Iterator[None]:
        """A block in which batch norms do not change their running statistics. In training mode
        they still use the statistics of the batch.

        Example
        -------
        >>> with head.keeping_statistics(): head(features, images)
        """
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in norms:
                norm.track_running_stats = True


class BoostingNetwork(nn.Module):
    """Backbone and head as one network: images (N, 3, H, W) float32, normalised as the backbone
    wants, to probabilities (N, 2, h', w') of background and object.

    A head does not know which of its two regions is the object. As published, the object is the
    smaller one: a mask whose mean is above 0.5 is replaced by 1 - mask. The published evaluation
    decides this for a whole batch; here it is decided for each picture.

    Parameters
    ----------
    backbone : takes (N, 3, H, W) and returns (N, C, h, w).
    mean, std : of the backbone's own normalisation.
    head : trained on these features. Both are put into eval mode and no longer get gradients.
    mask : "fine" (h' = 8h) or "coarse" (h' = h), which does not compute the fine stages.
    flip : average the mask of the picture and of its mirror image, which is mirrored back first.
        Both are computed as one batch; the time and memory double.

    Example
    -------
    >>> network = BoostingNetwork(backbone.module, backbone.mean, backbone.std, head)
    >>> network(torch.zeros(1, 3, 224, 224)).sum(1)  # 1 at each position
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        head: BoostingHead,
        mask: str = "fine",
        flip: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.mask, self.flip = backbone, head, mask, flip
        own_mean, own_std, to_mean, to_std = (
            torch.tensor(values, dtype=torch.float64)[:, None, None]
            for values in (mean, std, IMAGENET_MEAN, IMAGENET_STD)
        )
        # from the backbone's normalisation to that of ImageNet
        self.register_buffer("scale", (own_std / to_std).float())
        self.register_buffer("shift", ((own_mean - to_mean) / to_std).float())
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities (N, 2, h', w') of ``images`` (N, 3, H, W)."""
        if self.flip:
            images = torch.cat([images, images.flip(3)])
        mask, tokens = self.head.coarse(self.backbone(images))
        if self.mask == "fine":
            mask = self.head.fine(tokens, images * self.scale + self.shift)
        if self.flip:
            plain, mirrored = mask.chunk(2)
            mask = (plain + mirrored.flip(3)) / 2
        inverted = mask.mean((1, 2, 3), keepdim=True) > 0.5
        found = torch.where(inverted, 1 - mask, mask)
        return torch.cat([1 - found, found], 1)
