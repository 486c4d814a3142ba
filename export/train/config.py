"""LoopConfig: how the loop trains, whatever the method is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from runtime.checks import is_count, is_number, shown_value
from runtime.errors import InputError

PRECISIONS = ("fp32", "bf16")


class Measure(NamedTuple):
    """What a word of --select computes on held-out pictures.

    Parameters
    ----------
    name : of the value, in words.
    highest : whether the highest value is the best one; else it is the lowest.

    Example
    -------
    >>> MEASURES["labels"].is_better(0.4, 0.3)  # of the mIoU the highest value is best
    True
    """

    name: str
    highest: bool = False

    def is_better(self, value: float, other: float) -> bool:
        """Whether a value is better than another one."""
        return value > other if self.highest else value < other


MEASURES = {
    "energy": Measure("energy"),
    "labels": Measure("mIoU", highest=True),
    "cold": Measure("share of labels that differ from the cold result"),
}
SELECTS = ("last", *MEASURES)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How the loop trains, whatever the method is.

    Parameters
    ----------
    steps : updates of the weights, 1 to 1e9.
    batch : views in one step, 1 to 4096.
    lr : the learning rate, above 0.
    seed : of the initial weights, the order of the views and all random numbers, 0 to 2^32 - 1.
    precision : "fp32", or "bf16": the losses are computed under torch.autocast.
    device : "cpu", or a GPU such as "cuda:0".
    workers : processes that read pictures; 0 reads them in the training process.
    threads : of torch on the CPU, 1 to 1024.
    every : steps from one checkpoint to the next.
    log_every : steps from one row of log.csv to the next.
    select : which checkpoint is exported: "last", or the one with the best value of a word of
        :data:`MEASURES` on the held-out pictures: "energy": the lowest loss that uses no labels;
        "labels": the highest mIoU, which uses labels; "cold": the smallest difference from the
        refinement of each picture alone. Each method has some of these words.
    holdout : share of the pictures that only ``select`` uses, in (0, 0.5]; 0 for "last".
    labels, classes : folder of label pictures and file of classes, for "labels" only.

    Raises
    ------
    InputError : a value of another type or out of range, or values that do not fit together.

    Example
    -------
    >>> LoopConfig(steps=1000, lr=1e-3).batch
    32
    """

    steps: int = 3000
    batch: int = 32
    lr: float = 1e-4
    seed: int = 0
    precision: str = "fp32"
    device: str = "cpu"
    workers: int = 0
    threads: int = 1
    every: int = 500
    log_every: int = 10
    select: str = "last"
    holdout: float = 0.0
    labels: str | None = None
    classes: str | None = None

    def __post_init__(self) -> None:
        ranges = {
            "steps": (1, 10**9), "batch": (1, 4096), "seed": (0, 2**32 - 1), "workers": (0, 256),
            "threads": (1, 1024), "every": (1, 10**9), "log_every": (1, 10**9),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not is_count(value, low, high):
                option, near = name.replace("_", "-"), value if is_count(value) else low
                raise InputError(
                    f"{option} is {shown_value(value)}; wanted a whole number from {low} to {high}",
                    fix=f"--{option} {min(max(near, low), high)}",
                )
        if not is_number(self.lr, 0, 1e6) or self.lr == 0:
            raise InputError(
                f"lr is {shown_value(self.lr)}; wanted a number above 0, at most 1e6",
                fix="--lr 1e-4",
            )
        for name, wanted in (("precision", PRECISIONS), ("select", SELECTS)):
            value = getattr(self, name)
            if value not in wanted:
                raise InputError(
                    f"{name} is {shown_value(value)}; wanted one of {', '.join(wanted)}",
                    fix=f"--{name} {wanted[0]}",
                )
        if not isinstance(self.device, str) or not re.fullmatch(
            r"cpu|cuda:[0-9]{1,3}", self.device
        ):
            raise InputError(
                f"device is {shown_value(self.device)}; wanted cpu, or a GPU such as cuda:0",
                fix="--device cpu",
            )
        if self.select == "last":
            if self.holdout != 0:
                raise InputError(
                    "holdout is the share of pictures that only --select uses, and select is last",
                    fix="leave --holdout out, or add --select energy",
                )
        elif not is_number(self.holdout, 0, 0.5) or self.holdout == 0:
            raise InputError(
                f"holdout is {shown_value(self.holdout)}; wanted above 0, at most 0.5",
                fix="--holdout 0.1",
            )
        for name in ("labels", "classes"):
            value = getattr(self, name)
            if (self.select == "labels") != isinstance(value, str):
                raise InputError(
                    "select labels needs the folder of the labels and the file of the classes, "
                    "and nothing else uses them",
                    fix="--select labels --labels FOLDER --classes FILE, or leave all three out",
                )
