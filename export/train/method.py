"""Method and Batches: what the loop, which is the same for all methods, needs of each method."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
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

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The terms of the loss by name, each a scalar; the loop minimises their sum.

        ``batch`` is what the method's batches yield, with its tensors on the module's device, such
        as features (N, C, h, w) float32 of N views.
        """

    def before_update(self) -> None:
        """Called after the gradients are computed, before the optimiser changes the weights."""

    def settings(self) -> dict[str, Any]:
        """The method's own settings for run.json, from which the method is made again."""


class Batches(Protocol):
    """What a method is trained on, step by step.

    Parameters
    ----------
    broken : the reason for each broken file that was found up to the last step that was returned.
    """

    broken: dict[Path, str]

    def batches(self, first: int, last: int) -> Iterator[Any]:
        """Yield what the steps ``first`` to ``last - 1`` are made on. It depends only on the seed,
        the step, the list of files and which of these are broken. Closing the iterator ends the
        processes that read pictures."""
