"""What a method of training is: what its module makes, from what, and what the loop calls.

The module of a method offers

- ``add_options(parser)``: adds its own options to its parser;
- ``check(args)``: raises an InputError for options that cannot be used, without torch;
- ``DEFAULTS``: of the loop, where they are not those of :class:`export.train.config.LoopConfig`;
  "epochs" in place of "steps" is a number of passes over all views;
- ``SELECTS``: the words of --select that it has;
- ``prepare(start: Start) -> Parts``;
- ``view_rule(args)``, if a picture has several views: their :class:`export.train.views.ViewRule`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from export.train.config import LoopConfig

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.optim import Optimizer

    from export.train.feature_cache import FeatureCache


class Method(Protocol):
    """A method of training. Its random numbers are torch's global ones, which the loop seeds before
    each step with numbers that depend only on the seed and the step.

    Parameters
    ----------
    name : the word of the command line, such as "segunify".
    """

    name: str

    @property
    def module(self) -> Module:
        """All that is trained; its state_dict is stored in checkpoints."""

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

    def held_out(self, batch: Any) -> float:
        """What --select energy computes on a batch of held-out pictures, of which the lowest is
        best. It uses no labels and no random numbers, and changes nothing."""

    def settings(self) -> dict[str, Any]:
        """The method's own settings for run.json, from which the method is made again."""


class Batches(Protocol):
    """What a method is trained on, step by step."""

    @property
    def broken(self) -> dict[Path, str]:
        """The reason for each broken file that was found up to the last step that was returned."""

    def batches(self, first: int, last: int) -> Generator[Any, None, None]:
        """Yield what the steps ``first`` to ``last - 1`` are made on. It depends only on the seed,
        the step, the list of files and which of these are broken. Closing the iterator ends the
        processes that read pictures."""


class Start(NamedTuple):
    """What the function ``prepare`` of a method's module makes its parts from.

    Parameters
    ----------
    args : the options of the command line.
    config : the settings of the loop, with the number of threads that torch uses.
    files : the pictures to train on.
    held : the held-out pictures; [] with --select last.
    entry : run.json of the run that is resumed, or None.
    known_broken : the pictures, as texts, that were broken before this run was resumed.
    cache : of features; None with --no-cache.
    """

    args: argparse.Namespace
    config: LoopConfig
    files: list[Path]
    held: list[Path]
    entry: dict[str, Any] | None
    known_broken: frozenset[str]
    cache: FeatureCache | None

    def broken(self, part: list[Path]) -> list[int]:
        """Which of some pictures are known to be broken: their places in the list."""
        return [i for i, file in enumerate(part) if str(file) in self.known_broken]


class Parts(NamedTuple):
    """What the function ``prepare`` of a method's module returns.

    Parameters
    ----------
    method : its module is on the device, with the initial weights of the seed.
    batches : of the pictures that are trained on.
    score : computes what --select chooses by; None for the last checkpoint.
    held : the batches of held-out pictures that ``score`` reads, or None.
    entry : the method's own part of run.json: "settings", and "backbone" with "views", or "prior".
    libraries : versions of libraries that nothing else names, by their names.
    """

    method: Method
    batches: Batches
    score: Callable[[], float] | None
    held: Batches | None
    entry: dict[str, Any]
    libraries: dict[str, str]
