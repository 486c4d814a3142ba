"""A network's inputs and outputs: name, shape and data type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Port(NamedTuple):
    """An input or output: dimensions are numbers, or names where they are free."""

    name: str
    shape: tuple[int | str | None, ...]
    dtype: str


Shape = tuple[int, ...]
Shapes = Mapping[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class OutputWarning:
    """What results have to say of an engine's output, though nothing failed."""

    output: str
    message: str
