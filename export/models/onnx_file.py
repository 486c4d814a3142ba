"""An existing ONNX segmentation network as a prior."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from export.frozen import serialised
from export.models.base import OUTPUTS, PriorModel, check_size
from runtime.engines.onnx_file import check_file
from runtime.engines.port import Port
from runtime.errors import BundleError, InputError, MissingBackend, first_line
from runtime.prior.network import fixed_size
from runtime.prior.preprocess import Preprocess, are_sides, read_json

if TYPE_CHECKING:
    from onnx import ModelProto


def onnx_file(path: Path, imgsz: tuple[int, int] | None = None) -> PriorModel:
    """An existing ONNX segmentation network, whose metadata_props describe its input and output.

    Metadata: the keys that :meth:`Preprocess.from_metadata` reads, ``classes`` (JSON list of
    names), ``output`` (starts with "probabilities" or "labels", otherwise the network returns
    logits), and ``licence`` or ``license``.

    Parameters
    ----------
    path : an .onnx file.
    imgsz : (height, width) in pixels to freeze a network of free size for; the metadata's
        ``input_size`` when None.

    Raises
    ------
    InputError : no such file, or a size that the network does not take.
    BundleError : no ONNX, external data outside its folder, an input that is not one (1, 3, h, w)
        float32, or metadata that does not fit.
    MissingBackend : onnx is not installed.
    """
    model, inputs, metadata = _read(path)
    shape = inputs[0].shape if inputs else ()
    if len(inputs) != 1 or len(shape) != 4 or inputs[0].dtype != "tensor(float)" or shape[1] != 3:
        came = ", ".join(f"{p.name} {p.shape} {p.dtype}" for p in inputs)
        raise BundleError(f"{path.name} wants inputs {came}; wanted one (1, 3, h, w) float32")
    fixed = fixed_size(inputs[0])
    if imgsz is not None and fixed is not None and imgsz != fixed:
        raise InputError(
            f"imgsz is {imgsz}, but {path.name} has a fixed input of {fixed}", fix="leave it out"
        )
    size = imgsz or fixed
    if size is None:
        stated = read_json(metadata, path.name, "input_size", {"width": 512, "height": 512})
        # If the metadata has one side only, the input is a square.
        sides = stated if isinstance(stated, dict) and are_sides([*stated.values()]) else {}
        default = max(sides.values(), default=512)
        size = (sides.get("height", default), sides.get("width", default))
    preprocess = Preprocess.from_metadata(metadata, path.name, size)
    if fixed is None:
        check_size(size, preprocess, path.name)
    names = read_json(metadata, path.name, "classes", None)
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise BundleError(f"{path.name}: metadata 'classes' is {names!r}; wanted a list of names")
    return PriorModel(
        name=path.stem,
        onnx=serialised(model, path.name),
        preprocess=preprocess,
        names=names,
        output=next((o for o in OUTPUTS if metadata.get("output", "").startswith(o)), "logits"),
        licence=metadata.get("licence", metadata.get("license", "not stated")),
    )


def _read(path: Path) -> tuple[ModelProto, list[Port], dict[str, str]]:
    """The model in a file, with all of its weights inside; its inputs, and its metadata_props."""
    check_file(path)
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise MissingBackend(
            f"onnx is needed to freeze {path.name}, but {error}",
            fix="pip install 'dynaguide-edge[export]'",
        ) from error
    try:
        model = onnx.load(path)
        metadata = {_text(entry.key): _text(entry.value) for entry in model.metadata_props}
        return model, inputs_of(model), metadata
    except (DecodeError, OSError, ValueError, onnx.checker.ValidationError) as error:
        raise BundleError(
            f"{path} cannot be loaded: {first_line(error)}",
            fix="check it with: python -m onnx.checker, or export it again",
        ) from error


def _text(value: str | bytes) -> str:
    """A string of the file. Protobuf may return it as bytes; UnicodeDecodeError, a ValueError, if
    these are no UTF-8."""
    return value if isinstance(value, str) else value.decode()


def inputs_of(model: ModelProto) -> list[Port]:
    """The inputs of a model as ONNX Runtime would report them, without opening a session. Weights,
    which older files list among the inputs, are left out."""
    from onnx import TensorProto

    weights = {tensor.name for tensor in model.graph.initializer}
    kinds = {number: name.lower() for name, number in TensorProto.DataType.items()}
    ports = []
    for value in model.graph.input:
        if value.name in weights:
            continue
        tensor = value.type.tensor_type
        shape = tuple(
            dim.dim_value if dim.dim_value > 0 else dim.dim_param or None
            for dim in tensor.shape.dim
        )
        ports.append(
            Port(_text(value.name), shape, f"tensor({kinds.get(tensor.elem_type, 'unknown')})")
        )
    return ports
