"""The head of SegUnify on features of a frozen backbone, and the network that is frozen from both.

SegUnify is SmooSeg (Lan et al., "SmooSeg: Smoothness Prior for Unsupervised Semantic Segmentation",
NeurIPS 2023, arXiv 2310.17874) with batch norm and SiLU after each convolution of the projector.
The equations stand in docs/segunify.md. The values of all arguments are checked by
:class:`export.train.segunify.SegUnifyConfig`. This module imports torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_SHARPNESS = 2.0  # of the soft-max over cosines at inference, as published


class Projector(nn.Module):
    """Features (N, C, h, w) float32 to codes (N, D, h, w) float32: the sum of a linear and of a
    nonlinear branch of 1x1 convolutions with biases, equations (1) and (2) of docs/segunify.md.

    Parameters
    ----------
    channels : C. The hidden layer of the nonlinear branch has C channels too.
    dim : D.
    kind : "segunify", with batch norm and SiLU after each convolution, or "smooseg", with one SiLU
        in the nonlinear branch only.
    final_silu : whether the last batch norm of each branch of "segunify" is followed by SiLU, as
        stated for SegUnify. All codes are then above -0.56, which narrows the range of their
        cosines. Without effect on "smooseg".
    dropout : share of the channels that training replaces by zeros, independently in each branch
        and for each picture. The slides of SegUnify do not name it; SmooSeg has 0.2.

    Example
    -------
    >>> Projector(384)(torch.rand(2, 384, 28, 28)).shape
    torch.Size([2, 64, 28, 28])
    """

    def __init__(
        self,
        channels: int,
        dim: int = 64,
        kind: str = "segunify",
        final_silu: bool = True,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        first = nn.Conv2d(channels, dim, 1)
        hidden, last = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, dim, 1)
        if kind == "smooseg":
            self.linear = nn.Sequential(first)
            self.nonlinear = nn.Sequential(hidden, nn.SiLU(), last)
        else:
            end = [nn.SiLU()] if final_silu else []
            inner = [nn.BatchNorm2d(channels), nn.SiLU()]
            self.linear = nn.Sequential(first, nn.BatchNorm2d(dim), *end)
            self.nonlinear = nn.Sequential(hidden, *inner, last, nn.BatchNorm2d(dim), *end)

    def forward(self, features: Tensor) -> Tensor:
        """Codes (N, D, h, w) of ``features`` (N, C, h, w)."""
        return self.linear(self.dropout(features)) + self.nonlinear(self.dropout(features))


class SegUnifyHead(nn.Module):
    """The projector with the student's and the teacher's prototypes of K clusters.

    The prototypes are (K, D). ``student`` is a parameter: Xavier normal, then scaled to length 1.
    ``teacher`` is a buffer: a copy at first, then a moving average of the student that is not
    scaled to length 1 again. Both are scaled where they are used (equation (3)).

    Parameters
    ----------
    channels : C of the features.
    clusters : K.
    dim, kind, final_silu, dropout : of the :class:`Projector`.

    Example
    -------
    >>> head = SegUnifyHead(320, 27).eval()
    >>> head.probabilities(head.codes(torch.rand(1, 320, 14, 14))).shape
    torch.Size([1, 27, 14, 14])
    """

    teacher: Tensor

    def __init__(
        self,
        channels: int,
        clusters: int,
        dim: int = 64,
        kind: str = "segunify",
        final_silu: bool = True,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.projector = Projector(channels, dim, kind, final_silu, dropout)
        start = nn.init.xavier_normal_(torch.empty(clusters, dim))
        self.student = nn.Parameter(functional.normalize(start, dim=1))
        self.register_buffer("teacher", self.student.detach().clone())

    def codes(self, features: Tensor) -> Tensor:
        """Codes (N, D, h, w) of ``features`` (N, C, h, w)."""
        return self.projector(features)

    def probabilities(self, codes: Tensor) -> Tensor:
        """The teacher's probabilities (N, K, h, w) of ``codes`` (N, D, h, w), equation (4)."""
        return functional.softmax(_SHARPNESS * cosines(codes, self.teacher), dim=1)

    @torch.no_grad()
    def update_teacher(self, ema: float) -> None:
        """teacher = ema * teacher + (1 - ema) * student, equation (9)."""
        self.teacher.mul_(ema).add_(self.student, alpha=1 - ema)


def cosines(codes: Tensor, prototypes: Tensor) -> Tensor:
    """The cosines (N, K, h, w) of ``codes`` (N, D, h, w) and ``prototypes`` (K, D), equation (3).
    Vectors of any length are taken; the cosine with a vector of zeros is 0.

    Example
    -------
    >>> cosines(torch.ones(1, 2, 1, 1), torch.tensor([[3.0, 3.0], [-1.0, -1.0]])).flatten()
    tensor([ 1., -1.])
    """
    weights = functional.normalize(prototypes, dim=1)[:, :, None, None]
    return functional.conv2d(functional.normalize(codes, dim=1), weights)


class SegUnifyNetwork(nn.Module):
    """Backbone and head as one network: images (N, 3, H, W) float32, normalised as the backbone
    wants, to the teacher's probabilities (N, K, h, w) of the features' size.

    Parameters
    ----------
    backbone : takes (N, 3, H, W) and returns (N, C, h, w).
    head : trained on these features. Both are put into eval mode and no longer get gradients.
    flip : average the codes of the picture and of its mirror image, which are mirrored back first
        (equation (10)). Both are computed as one batch; the time and memory double.

    Example
    -------
    >>> network = SegUnifyNetwork(backbone.module, head, flip=True)
    >>> network(torch.zeros(1, 3, 224, 224)).sum(1)  # 1 at each position
    """

    def __init__(self, backbone: nn.Module, head: SegUnifyHead, flip: bool = False) -> None:
        super().__init__()
        self.backbone, self.head, self.flip = backbone, head, flip
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities (N, K, h, w) of ``images`` (N, 3, H, W)."""
        if not self.flip:
            return self.head.probabilities(self.head.codes(self.backbone(images)))
        both = self.backbone(torch.cat([images, images.flip(3)]))
        codes, mirrored = self.head.codes(both).chunk(2)
        return self.head.probabilities((codes + mirrored.flip(3)) / 2)
