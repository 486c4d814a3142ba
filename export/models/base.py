"""PriorModel: a prior as each family of priors returns it to the exporter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.core import parameters
from runtime.core.config import RefineConfig
from runtime.engines.named_files import utf8_text
from runtime.errors import InputError
from runtime.prior.names import class_names
from runtime.prior.preprocess import Preprocess
from runtime.prior.reading import KINDS

if TYPE_CHECKING:
    from torch.nn import Module


OPSET = 18


@dataclass(frozen=True, kw_only=True)
class PriorModel:
    """A prior before freezing. A network has a ``module`` or ``onnx``; K-means has neither.

    Parameters
    ----------
    name : short, for the manifest. Bytes of a file's name that are no UTF-8 become numbers.
    module : takes (1, 3, h, w) float32, returns (1, C, h', w') scores or (1, h', w') integer
        labels.
    onnx : such a network as a serialised model without external data.
    preprocess : from a picture to the input, with resize "stretch". Its height and width are those
        that the prior is frozen for. None for K-means.
    names : the names of the classes, in the order of their numbers, or in another spelling that
        :func:`runtime.prior.names.class_names` reads; None where they have none.
    output : "logits", "probabilities" (the network contains the soft-max) or "labels"; None: the
        values of the outputs decide.
    output_name : the name of the output of ``onnx`` to take, if it has several; None: their shapes
        and names decide.
    licence : of the weights, in words.
    trained : False when the weights are random.
    training : how a head was trained, which the manifest stores; None for other models.
    refine, initial : the settings of the refinement that was trained for this prior, and its
        weights for all classes, by the names of :mod:`runtime.core.parameters`; None for priors
        that are refined from the seed's weights.
    refinement : how these weights were trained, which the manifest stores; None without them.
    opset : version of the ONNX operators that ``module`` is exported with.
    warnings : sentences for the user, each with a line for the fix.

    Raises
    ------
    InputError : values that do not fit together.

    Example
    -------
    >>> preprocess = Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3, height=360, width=480)
    >>> network = torch.nn.Conv2d(3, 2, 1).eval()
    >>> PriorModel(name="tiny", module=network, preprocess=preprocess, output="logits").fixed_size
    (360, 480)
    """

    name: str
    module: Module | None = None
    onnx: bytes | None = None
    preprocess: Preprocess | None = None
    names: list[str] | None = None
    output: str | None = None
    output_name: str | None = None
    licence: str = "not stated"
    trained: bool = True
    training: dict[str, Any] | None = None
    refine: RefineConfig | None = None
    initial: parameters.State | None = None
    refinement: dict[str, Any] | None = None
    opset: int = OPSET
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", utf8_text(self.name))
        network = (self.module is not None) + (self.onnx is not None)
        if network > 1 or (network == 1) != (self.preprocess is not None):
            raise InputError(
                f"prior {self.name}: wanted a module or onnx, not both, and its preprocess; "
                "neither for K-means",
                fix="PriorModel(name=..., module=..., preprocess=...)",
            )
        if not isinstance(self.onnx, (bytes, type(None))):
            raise InputError(
                f"prior {self.name}: onnx is a {type(self.onnx).__name__}; wanted bytes",
                fix="PriorModel(onnx=Path(FILE).read_bytes(), ...), or model.SerializeToString()",
            )
        if self.names is not None:
            names = class_names(self.names, f"prior {self.name}: names")
            object.__setattr__(self, "names", names)
        if self.preprocess is not None and self.preprocess.resize != "stretch":
            raise InputError(
                f"prior {self.name}: preprocess resizes by {self.preprocess.resize!r}; "
                "wanted 'stretch' with the height and width to freeze for",
                fix="Preprocess(..., resize='stretch', height=H, width=W)",
            )
        if self.output not in (None, *KINDS):
            raise InputError(
                f"prior {self.name}: output is {self.output!r}; wanted {', '.join(KINDS)}",
                fix="say what the network returns, e.g. output='logits'",
            )
        self._check_refinement()

    def _check_refinement(self) -> None:
        """InputError unless the trained weights fit the settings of the refinement and the names,
        or there are none."""
        if self.refine is None and self.initial is None and self.refinement is None:
            return
        if self.refine is None or self.initial is None:
            raise InputError(
                f"prior {self.name}: wanted refine and initial, the settings of a trained "
                "refinement and its weights, or neither",
                fix="PriorModel(refine=RefineConfig(...), initial=STATE)",
            )
        rows = self.initial["conv3.bias"].size if "conv3.bias" in self.initial else 1
        parameters.flatten(self.refine, rows, self.initial)  # checks names and shapes
        classes = rows if self.names is None else len(self.names)
        if rows != (parameters.channel_count(self.refine, classes) or 1):
            raise InputError(
                f"prior {self.name}: initial has weights for {rows} classes, and names has "
                f"{classes}",
                fix="pass the weights and the names of the same classes",
            )

    @property
    def fixed_size(self) -> tuple[int, int]:
        """(height, width) in pixels that a network is frozen for, whatever the picture's size.

        Raises
        ------
        InputError : the model is no network.
        """
        if self.preprocess is None:
            raise InputError(
                f"{self.name} is no network; there is nothing to freeze",
                fix="choose another --model, or export it as it is",
            )
        return self.preprocess.size(1, 1)  # with "stretch" all pictures have the same size


def check_size(
    size: tuple[int, int], preprocess: Preprocess, name: str, option: str = "imgsz"
) -> None:
    """Check an input size that the user chose.

    Parameters
    ----------
    size : (height, width) in pixels.
    preprocess : its ``multiple`` and ``minimum`` say which sizes the network takes.
    name : of the network, for messages.
    option : the option that states the size, for messages.

    Raises
    ------
    InputError : a side is no multiple of ``multiple``, or is below ``minimum``.

    Example
    -------
    >>> rule = Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3, height=360, width=480, multiple=8)
    >>> check_size((360, 480), rule, "tiny")  # (360, 481) raises an error
    """
    multiple, minimum = preprocess.multiple, preprocess.minimum
    if any(n % multiple or n < minimum for n in size):
        least = -(-minimum // multiple) * multiple
        near = [max(least, round(n / multiple) * multiple) for n in size]
        raise InputError(
            f"{option} is {size}; {name} wants multiples of {multiple}, at least {minimum}",
            fix=f"--{option} {near[0]} {near[1]}",
        )
