"""The refinement in PyTorch with autograd: a peer of the benchmarks and an oracle of the tests.

The code follows docs/algorithm.md, not runtime/core/reference.py, so that both are independent. The
losses of clusters are those that export trains with.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.train.dynaseg_losses import (
    cluster_count,
    continuity,
    continuity_weight,
    ends,
    own_labels,
    similarity,
)
from runtime.core.constants import LEAST_AREA, LEAST_DEVIATION, MAPPING_STEPS, SMALLEST_PRIOR
from runtime.core.options import RefineOptions
from runtime.core.parameters import State, objective_of


class Net(nn.Module):
    """The refinement network with the parameter names of runtime/core/parameters.py.

    Parameters
    ----------
    inputs, channels, classes : channels of the input, of the hidden layers and of the output.
    blocks : number of hidden layers.
    skip : "own", "shared" or "none", as in RefineOptions.
    final_bn : "none", or the kind of the last batch norm, as in RefineOptions.
    """

    def __init__(
        self,
        inputs: int,
        channels: int,
        classes: int,
        blocks: int,
        skip: str | None,
        final_bn: str | None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(blocks - 1)
        )
        self.bn2 = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(blocks - 1))
        self.skip_kind = skip
        if skip == "own":
            self.skip = nn.Conv2d(inputs, channels, 3, padding=1)
        self.conv3 = nn.Conv2d(channels, classes, 1)
        if final_bn != "none":
            self.bn3 = nn.BatchNorm2d(classes)
        self.final_bn = final_bn

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (1, classes, h, w) of the input (1, inputs, h, w)."""
        h = self.bn1(F.relu(self.conv1(x)))
        for conv, bn in zip(self.conv2, self.bn2, strict=True):
            h = bn(F.relu(conv(h)))
        if self.skip_kind == "own":
            h = h + self.skip(x)
        if self.skip_kind == "shared":
            h = h + self.conv1(x)
        r = self.conv3(h)
        return r if self.final_bn == "none" else self.bn3(r)


def planes(array: np.ndarray, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Convert a NumPy array (H, W, C) to a tensor (1, C, H, W)."""
    return torch.from_numpy(array).to(device, dtype).permute(2, 0, 1)[None].contiguous()


class Twin:
    """Refinement steps of any objective on one picture.

    Parameters
    ----------
    options : RefineOptions.
    state : the initial weights by name, as Refiner.state_dict returns them.
    image : (H, W, 3) float32 RGB in [0, 1].
    guide : (H, W, C) probabilities, (H, W) int32 labels with -1 for unknown, or None.
    dtype : of PyTorch, in which all is computed.
    channels_last : whether the network's weights and input are stored channels-last.
    device : of PyTorch.
    """

    def __init__(
        self,
        options: RefineOptions,
        state: State,
        image: np.ndarray,
        guide: np.ndarray | None,
        dtype: torch.dtype = torch.float64,
        channels_last: bool = False,
        device: str = "cpu",
    ) -> None:
        self.o, self.dtype = options, dtype
        self.classes = state["conv3.weight"].shape[0]
        objective = objective_of(options)
        self.net = Net(
            objective.inputs, options.channels or 0, self.classes, options.blocks, options.skip,
            options.final_bn,
        )  # fmt: skip
        own = {k: torch.as_tensor(v) for k, v in state.items() if not k.startswith("momentum.")}
        self.net.load_state_dict(own, strict=True)
        self.net.to(device, dtype).train()
        self.sgd = torch.optim.SGD(
            self.net.parameters(), lr=options.lr or 0.0, momentum=options.momentum
        )
        self.image = planes(image, dtype, device)
        self.guide = None if guide is None else torch.from_numpy(guide).to(device)
        self.table: Tensor | None = None
        self.step_count = 0
        self.x = self.image
        self.prior = torch.zeros((), dtype=dtype, device=device)
        if objective.channels_follow_classes:
            assert guide is not None
            self._prepare_residual(guide)
        if channels_last:
            # The types of torch lack this argument, which its documentation has.
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.x = self.x.contiguous(memory_format=torch.channels_last)

    def _prepare_residual(self, guide: np.ndarray) -> None:
        """Compute the input and the constants of the residual objective from picture and guide."""
        image = self.image
        deviation = image.std((2, 3), unbiased=False, keepdim=True).clamp_min(LEAST_DEVIATION)
        h, w = image.shape[2:]
        ys = torch.linspace(-1, 1, h, dtype=self.dtype) if h > 1 else torch.zeros(1)
        xs = torch.linspace(-1, 1, w, dtype=self.dtype) if w > 1 else torch.zeros(1)
        grid = torch.stack(torch.meshgrid(ys, xs, indexing="ij")[::-1])[None].to(image)
        standard = (image - image.mean((2, 3), keepdim=True)) / deviation
        self.x = torch.cat([standard, grid], 1)
        self.q = planes(guide, self.dtype, image.device)
        self.prior = self.q.clamp_min(SMALLEST_PRIOR).log()
        area = self.q.mean((0, 2, 3))
        weight = area.clamp_min(LEAST_AREA) ** -self.o.balance
        self.class_weight = (weight / (weight * area).sum()).view(1, -1, 1, 1)
        self.confidence = self.q.amax(1, keepdim=True)
        self.pairs = []
        for s in self.o.offsets:
            for dy, dx in ((0, s), (s, 0), (s, s), (s, -s)):
                if dy >= h or abs(dx) >= w:
                    continue
                a, b = ends(self.image, dy, dx)
                square = ((a - b) ** 2).sum(1, keepdim=True)
                self.pairs.append((dy, dx, torch.exp(-square / (2 * self.o.sigma**2))))

    def losses(self, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return four losses of the scores r: total, similarity (0 for the residual objective),
        spatial (or pair), guide."""
        o = self.o
        if objective_of(o).channels_follow_classes:
            log_p = F.log_softmax(r, 1)
            p = log_p.exp()
            guide = -(self.confidence * (self.class_weight * self.q * log_p)).sum(1).mean()
            pair = r.new_zeros(())
            for dy, dx, e in self.pairs:
                a, b = ends(p, dy, dx)
                pair = pair + (e * (1 - (a * b).sum(1, keepdim=True))).mean()
            pair = pair / (4 * len(o.offsets))
            return guide + o.lam * pair, torch.zeros(()), pair, guide
        assert o.weighting is not None and o.diagonals is not None
        labels = own_labels(r)
        clusters = self.count(labels)
        own = similarity(r, labels)
        spatial = continuity(r, huber=o.continuity == "huber", diagonals=o.diagonals)
        weight = continuity_weight(o.weighting, clusters, o.mu or 0.0, o.beta)
        guide = torch.zeros(())
        if self.guide is not None:
            if o.mapping == "index_modulo" or self.step_count < MAPPING_STEPS:
                self.table = self._map(labels[0], clusters)
            table = self.table
            assert table is not None
            if self.guide.ndim == 2:
                target = torch.where(self.guide < 0, -100, table[self.guide.clamp_min(0)])
                guide = F.cross_entropy(r, target[None].long())
            else:
                target = torch.zeros_like(r)
                target.index_add_(1, table, self.guide.to(r.dtype).permute(2, 0, 1)[None])
                guide = -(target * F.log_softmax(r, 1)).sum(1).mean()
        return own + weight * spatial + guide, own, spatial, guide

    def count(self, labels: Tensor) -> int:
        """Return the number of different labels."""
        return cluster_count(labels)

    def _map(self, labels: Tensor, clusters: int) -> Tensor:
        """The table that maps the guide's classes to channels, from the current labels."""
        guide, device = self.guide, labels.device
        assert guide is not None
        hard = guide.ndim == 2
        classes = int(guide.max()) + 1 if hard else guide.shape[2]
        if self.o.mapping == "index_modulo":
            every = torch.arange(classes, device=device)
            known = guide[guide >= 0].unique() if hard else every
            targets = labels.unique()
            table = torch.zeros_like(every)
            table[known.long()] = targets[every[: len(known)] % clusters]
        else:
            from scipy.optimize import linear_sum_assignment

            one_hot = F.one_hot(labels, self.classes).double()
            if hard:
                soft = F.one_hot(guide.long().clamp_min(0), classes).double()
                soft = soft * (guide >= 0)[..., None]
            else:
                soft = guide.double()
            area = torch.einsum("hwc,hwk->ck", soft, one_hot)
            table = area.argmax(1)
            rows, columns = linear_sum_assignment(-area.cpu().numpy())
            table[torch.from_numpy(rows)] = torch.from_numpy(columns).to(device)
        return table

    def step(self) -> tuple[list[float], int]:
        """Make one SGD step; returns the four losses and the number of different labels, both of
        the weights before the step."""
        self.sgd.zero_grad(set_to_none=True)
        r = self.net(self.x) + self.prior
        losses = self.losses(r)
        losses[0].backward()
        self.sgd.step()
        self.step_count += 1
        values = [torch.as_tensor(v).item() for v in losses]
        return values, cluster_count(own_labels(r))

    def labels(self) -> np.ndarray:
        """Return the labels (H, W) of the current weights, as at the end of a refinement."""
        self.net.train(self.o.final_bn != "running")
        tracked = {k: v.clone() for k, v in self.net.state_dict().items()}
        with torch.no_grad():
            r = self.net(self.x) + self.prior
        self.net.load_state_dict(tracked)
        self.net.train()
        return r.argmax(1)[0].cpu().numpy()

    def state(self) -> dict[str, np.ndarray]:
        """Return the parameters as NumPy arrays, by name."""
        return {k: v.detach().cpu().numpy().copy() for k, v in self.net.named_parameters()}
