"""DynaSeg's network with a feature extractor, and its training on one picture.

DynaSeg (Guermazi et al., IVC 2024, arXiv 2405.05477) draws a ResNet-18 with a feature pyramid (FPN;
Lin et al., CVPR 2017); its public code has a truncated one. docs/dynaseg_fpn.md states both. This
module imports torch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from export.backbones.efficientnet_lite import Lite0
from export.backbones.resnet import ResNet
from export.train.dynaseg_losses import (
    cluster_count,
    continuity,
    continuity_weight,
    own_labels,
    similarity,
)
from runtime.errors import SdkError

WIDTH = 64  # channels of the pyramid, as of the public code's
BETA, MU = 15.0, 50.0  # of the weights K' / BETA (FSF) and MU / K' (SCF), as published
MIN_LABELS = 3  # the training stops at so many labels, as published


def _enlarged(x: Tensor, size: Sequence[int]) -> Tensor:
    return interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class Pyramid(nn.Module):
    """A backbone with a feature pyramid, and the response map of K clusters.

    The features of each stage are projected to WIDTH channels (1x1). From the last stage to the
    first, the sum so far is enlarged and the next projection is added. A 3x3 convolution smooths
    the finest sum, and a 1x1 convolution and a batch norm make the response map of it. The 1x1
    convolution runs before the map is enlarged, not behind: the result is the same, because
    bilinear weights sum to 1, and it has a sixteenth of the positions.

    Parameters
    ----------
    body : not dilated. It becomes a part of the network.
    clusters : K.
    frozen : only the pyramid is trained. The body is in eval mode, so that its batch norms have the
        statistics of its own training.
    """

    def __init__(self, body: ResNet | Lite0, clusters: int, *, frozen: bool = False) -> None:
        super().__init__()
        self.body, self.frozen = body, frozen
        self.lateral = nn.ModuleList(nn.Conv2d(width, WIDTH, 1) for width in body.widths)
        self.smooth = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.score = nn.Conv2d(WIDTH, clusters, 1)
        self.norm = nn.BatchNorm2d(clusters)
        self.train()
        self.body.train(not frozen).requires_grad_(not frozen)

    def features(self, images: Tensor) -> list[Tensor]:
        """The features of the four stages of images (1, 3, h, w), normalised."""
        return [*self.body.stages(images)]

    def response(self, features: list[Tensor], size: Sequence[int]) -> Tensor:
        """The response map (1, K, height, width) of :meth:`features`."""
        total, *finer = [
            project(x)
            for project, x in zip(reversed(self.lateral), reversed(features), strict=True)
        ]
        for x in finer:
            total = x + _enlarged(total, x.shape[2:])
        return self.norm(_enlarged(self.score(self.smooth(total)), size))


class Truncated(nn.Module):
    """The network of DynaSeg's public code, which has no pyramid: ResNet-18's first convolution
    (stride 2), batch norm, ReLU and layer1, without the max-pooling; then an enlargement by 2, a
    3x3 convolution, and twice the same 1x1 convolution and batch norm. Of an odd size, the last row
    or column is cut off.

    Parameters
    ----------
    body : of depth 18; its other layers are not used. The layers become a part of the network.
    """

    frozen = False

    def __init__(self, body: ResNet) -> None:
        super().__init__()
        self.conv1, self.bn1 = body.conv1, body.bn1
        self.layer1 = body.get_submodule("layer1")
        self.smooth = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.score = nn.Conv2d(WIDTH, WIDTH, 1)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.train().requires_grad_(True)

    def features(self, images: Tensor) -> list[Tensor]:
        """The features of layer1, (1, 64, h / 2, w / 2), rounded up."""
        return [self.layer1(relu(self.bn1(self.conv1(images))))]

    def response(self, features: list[Tensor], size: Sequence[int]) -> Tensor:
        """The response map (1, 64, height, width) of :meth:`features`."""
        (x,) = features
        x = self.smooth(interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))
        for _ in range(2):
            x = self.norm(self.score(x))
        return x[..., : size[0], : size[1]]


class Trained(NamedTuple):
    """What :func:`segment` returns.

    Parameters
    ----------
    labels : (h, w) int32, the clusters 0 to K - 1.
    stop : why the training ended: "steps"; "min_labels", because a map had at most MIN_LABELS
        labels; or "silhouette", because it had at most as many as the floor.
    losses : of each step.
    clusters : K' of each step, before its update.
    """

    labels: np.ndarray
    stop: str
    losses: list[float]
    clusters: list[int]


@torch.enable_grad()
def segment(
    network: Pyramid | Truncated,
    picture: Tensor,
    *,
    steps: int,
    weighting: str,
    lr: float,
    momentum: float,
    decay: float,
    floor: int = 0,
) -> Trained:
    """Train a copy of the network on one picture by SGD, and return its map.

    The loss is CE(r, argmax r) + weight * continuity, where the weight is K' / BETA ("fsf") or
    MU / K' ("scf"). The training ends after a step whose map had at most max(MIN_LABELS, floor)
    labels. The map of the weights at the end is returned; if it has fewer labels than the floor,
    the last map that has not, or else the first map.

    As in the public code, the continuity of :class:`Truncated` has no gradient, no number of labels
    ends its training, and its last map has the running statistics of the batch norms.

    Parameters
    ----------
    picture : (1, 3, h, w) float32, normalised.
    floor : the number of clusters with the best silhouette; 0 for none.

    Raises
    ------
    SdkError : the loss is not finite.

    Example
    -------
    >>> segment(Pyramid(body, 64), x, steps=50, weighting="fsf", lr=0.1, momentum=0.9, decay=1e-4)
    """
    network = copy.deepcopy(network)
    compat = isinstance(network, Truncated)
    least = 0 if compat else max(MIN_LABELS, floor)
    trained = [p for p in network.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(trained, lr, momentum, weight_decay=decay)
    with torch.no_grad():
        fixed = network.features(picture) if network.frozen else None

    def response_map() -> Tensor:
        features = network.features(picture) if fixed is None else fixed
        return network.response(features, picture.shape[2:])

    kept, stop = None, "steps"
    losses: list[float] = []
    counts: list[int] = []
    for step in range(1, steps + 1):
        response = response_map()
        labels = own_labels(response)
        clusters = cluster_count(labels)
        if kept is None or clusters >= floor:
            kept = labels
        spatial = continuity(response.detach() if compat else response)
        weight = continuity_weight(weighting, clusters, MU, BETA)
        loss = similarity(response, labels) + weight * spatial
        losses.append(float(loss.detach()))
        counts.append(clusters)
        if not math.isfinite(losses[-1]):
            lower = f"use a lower learning rate: --lr {lr / 10:g}"
            raise SdkError(
                f"the loss is {losses[-1]} in step {step}",
                fix=lower if step > 1 else "check the weights of the backbone",
            )
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        if clusters <= least:
            stop = "silhouette" if floor >= MIN_LABELS else "min_labels"
            break
    if compat:
        network.eval()
    with torch.no_grad():
        last = own_labels(response_map())
    if kept is not None and cluster_count(last) < floor:
        last = kept
    return Trained(last[0].numpy().astype(np.int32), stop, losses, counts)
