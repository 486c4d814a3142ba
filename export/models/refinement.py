"""The refinement network of the residual objective in PyTorch, to train it before it is used.

Equations (10) and (11) of docs/algorithm.md. The tensors have the names and shapes of
runtime/core/parameters.py, so that a state_dict is what ``runtime.refine(initial=...)`` takes. This
module imports torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime.core.constants import LEAST_DEVIATION, NORM_EPS
from runtime.core.options import RefineOptions
from runtime.core.parameters import initial_state, objective_of
from runtime.errors import InputError


class RefinementNet(nn.Module):
    """The input (N, 5, h, w) to the correction of the prior's scores, (N, C, h, w), both float32.

    The batch norms use the statistics of each picture, in training and in eval mode, as the
    runtime does for the residual objective. So the pictures of a batch do not influence each other,
    and the running statistics, which the runtime's form of a state contains, keep their first
    values.

    Parameters
    ----------
    options : of the residual objective; the initial weights are those of ``options.seed``, with
        which the output is zero.
    classes : C, all classes of the prior.

    Raises
    ------
    InputError : another objective.

    Example
    -------
    >>> network = RefinementNet(RefineOptions(), classes=19)
    >>> network(inputs(torch.rand(1, 3, 180, 240))).shape
    torch.Size([1, 19, 180, 240])
    """

    def __init__(self, options: RefineOptions, classes: int) -> None:
        super().__init__()
        objective, width = objective_of(options), options.channels or 0
        if not objective.channels_follow_classes:
            raise InputError(
                f"objective is {options.objective!r}; its network has clusters, which mean nothing "
                "from picture to picture",
                fix="train with the objective residual",
            )

        def conv(channels: int) -> nn.Conv2d:
            return nn.Conv2d(channels, width, 3, padding=1)

        hidden = range(options.blocks - 1)
        self.conv1, self.bn1 = conv(objective.inputs), nn.BatchNorm2d(width)
        self.conv2 = nn.ModuleList(conv(width) for _ in hidden)
        self.bn2 = nn.ModuleList(nn.BatchNorm2d(width) for _ in hidden)
        self.conv3 = nn.Conv2d(width, classes, 1)
        first = initial_state(options, classes).items()
        own = {k: torch.as_tensor(v) for k, v in first if not k.startswith("momentum.")}
        self.load_state_dict(own)

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """The correction of each class's score.

        Parameters
        ----------
        x : (N, 5, h, w), of :func:`inputs`.
        classes : (K,) int64, the classes that take part; None: all.

        Returns
        -------
        (N, K, h, w), or (N, C, h, w) for all classes.
        """
        for conv, norm in zip((self.conv1, *self.conv2), (self.bn1, *self.bn2), strict=True):
            x = torch.instance_norm(
                functional.relu(conv(x)), norm.weight, norm.bias, None, None, True, 0.0, NORM_EPS,
                True,
            )  # fmt: skip
        weight, bias = self.conv3.weight, self.conv3.bias
        assert bias is not None
        if classes is not None:
            weight, bias = weight[classes], bias[classes]
        return functional.conv2d(x, weight, bias)


def inputs(image: Tensor) -> Tensor:
    """The network's input of pictures, equation (10): RGB minus each picture's mean, divided by its
    standard deviation, and the coordinates x and y from -1 to 1.

    Parameters
    ----------
    image : (N, 3, h, w) float, RGB in [0, 1].

    Returns
    -------
    (N, 5, h, w) of the same type.

    Example
    -------
    >>> inputs(torch.rand(2, 3, 4, 6))[0, 3:, 0, 0]
    tensor([-1., -1.])
    """
    deviation, mean = torch.std_mean(image, (2, 3), correction=0, keepdim=True)
    n, _, height, width = image.shape
    x, y = (
        torch.linspace(-1, 1, size, dtype=image.dtype, device=image.device)
        if size > 1
        else image.new_zeros(1)
        for size in (width, height)
    )
    grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)])
    standard = (image - mean) / deviation.clamp_min(LEAST_DEVIATION)
    return torch.cat([standard, grid.expand(n, 2, height, width)], 1)
