"""Method: what a method of training offers to the loop, which is the same for all methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.optim import Optimizer


class Method(Protocol):
    """A method of training. Its random numbers are torch's global ones, which the loop seeds before
    each step with numbers that depend only on the seed and the step.

    Parameters
    ----------
    name : the word of the command line, such as "segunify".
    module : all that is trained; its state_dict is stored in checkpoints.
    """

    name: str
    module: Module

    def optimiser(self, lr: float) -> Optimizer:
        """The optimiser of the module's parameters. ``lr`` is the learning rate of the first group
        of parameters; the rates of other groups are fixed multiples of it."""

    def losses(self, features: Tensor) -> dict[str, Tensor]:
        """The terms of the loss by name, each a scalar; the loop minimises their sum.

        ``features`` is (N, C, h, w) float32 of N different views, on the module's device.
        """

    def before_update(self) -> None:
        """Called after the gradients are computed, before the optimiser changes the weights."""

    def settings(self) -> dict[str, Any]:
        """The method's own settings for run.json, from which the method is made again."""
