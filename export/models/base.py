"""What every family of priors gives the exporter: a PriorModel."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import InputError
from runtime.prior.preprocess import Preprocess

if TYPE_CHECKING:
    from torch.nn import Module


OPSET = 18
OUTPUTS = ("logits", "probabilities", "labels")


@dataclass(frozen=True, kw_only=True)
class PriorModel:
    """A prior before freezing; exactly one of ``module`` and ``onnx``, or neither for K-means.

    Parameters
    ----------
    name : short, for the manifest.
    module : takes (1, 3, h, w) float32, gives (1, C, h', w') scores or (1, h', w') integer labels.
    onnx : the same as a serialised model without external data.
    preprocess : from picture to input, with resize "stretch": its height and width are those the
        prior is frozen for. None for K-means.
    names : by class, or None.
    output : "logits", "probabilities" (the soft-max is inside) or "labels".
    licence : of the weights, in words.
    trained : False when the weights are random.
    opset : that ``module`` is exported with.
    """

    name: str
    module: Module | None = None
    onnx: bytes | None = None
    preprocess: Preprocess | None = None
    names: list[str] | None = None
    output: str = "logits"
    licence: str = "not stated"
    trained: bool = True
    opset: int = OPSET

    def __post_init__(self) -> None:
        network = (self.module is not None) + (self.onnx is not None)
        if network > 1 or (network == 1) != (self.preprocess is not None):
            raise InputError(
                f"prior {self.name}: wanted a module or onnx, not both, and its preprocess; "
                "neither for K-means"
            )
        if self.preprocess is not None and self.preprocess.resize != "stretch":
            raise InputError(
                f"prior {self.name}: preprocess resizes by {self.preprocess.resize!r}; "
                "wanted 'stretch' with the height and width to freeze for"
            )
        if self.output not in OUTPUTS:
            raise InputError(
                f"prior {self.name}: output is {self.output!r}; wanted {', '.join(OUTPUTS)}"
            )

    @property
    def fixed_size(self) -> tuple[int, int]:
        """(height, width) in pixels that a network is frozen for, whatever the picture's size.

        Raises
        ------
        InputError : the model is no network.
        """
        if self.preprocess is None:
            raise InputError(f"{self.name} is no network; there is nothing to freeze")
        return self.preprocess.size(1, 1)  # "stretch" gives this size for every picture


def read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing; it is part of a checkpoint in Hugging Face's format",
            fix="copy the whole folder of the checkpoint",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}", fix="copy it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}; wanted a JSON object")
    return value


def check_size(size: tuple[int, int], preprocess: Preprocess, name: str) -> None:
    multiple, minimum = preprocess.multiple, preprocess.minimum
    if any(n % multiple or n < minimum for n in size):
        least = -(-minimum // multiple) * multiple
        near = [max(least, round(n / multiple) * multiple) for n in size]
        raise InputError(
            f"imgsz is {size}; {name} wants multiples of {multiple}, at least {minimum}",
            fix=f"--imgsz {near[0]} {near[1]}",
        )
