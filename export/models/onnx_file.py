"""An existing ONNX segmentation network as a prior."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.frozen import serialised
from export.inference import check_not_training
from export.models.base import OPSET, PriorModel, check_size
from export.models.stated import Stated
from runtime.engines.onnx_file import check_file
from runtime.engines.port import Port
from runtime.errors import BundleError, InputError, MissingBackend, SdkError, first_line
from runtime.prior.network import check_input, fixed_size, kind_of, names_of
from runtime.prior.preprocess import Preprocess, are_sides, read_json

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

_OPSET = 20  # the latest that TensorRT 10.0 to 10.5 read; ONNX Runtime 1.18 reads one more
_IR = 10  # the latest that ONNX Runtime 1.18 to 1.20 read


def onnx_file(
    path: Path, imgsz: tuple[int, int] | None = None, stated: Stated | None = None
) -> PriorModel:
    """An existing ONNX segmentation network, whose metadata_props describe its input and output.

    Metadata: the keys that :meth:`Preprocess.from_metadata` reads; ``classes`` or ``names``
    (:func:`runtime.prior.names.class_names`); ``output`` (:func:`runtime.prior.network.kind_of`);
    and ``licence`` or ``license``.

    Parameters
    ----------
    path : an .onnx file.
    imgsz : (height, width) in pixels to freeze a network of free size for; the metadata's
        ``input_size`` when None.
    stated : facts that replace the file's metadata.

    Raises
    ------
    InputError : no such file, or a size that the network does not take.
    BundleError : no ONNX, external data outside its folder, a network in training mode, an input
        that is not one (1, 3, h, w) float32 or float16, or metadata that does not fit.
    MissingBackend : onnx is not installed.

    Example
    -------
    >>> onnx_file(Path("prior.onnx"), stated=Stated(output="logits")).fixed_size
    (360, 480)
    """
    model, inputs, metadata = _read(path)
    warnings = _too_new(model, path.name)
    check_not_training(model, path.name)
    metadata |= (stated or Stated()).metadata()
    check_input(inputs, path.name)
    fixed = fixed_size(inputs[0])
    if imgsz is not None and fixed is not None and imgsz != fixed:
        raise InputError(
            f"imgsz is {imgsz}, but {path.name} has a fixed input of {fixed}", fix="leave it out"
        )
    size = imgsz or fixed
    if size is None:
        sides = read_json(metadata, path.name, "input_size", {"width": 512, "height": 512})
        # If the metadata has one side only, the input is a square.
        sides = sides if isinstance(sides, dict) and are_sides([*sides.values()]) else {}
        default = max(sides.values(), default=512)
        size = (sides.get("height", default), sides.get("width", default))
    preprocess = Preprocess.from_metadata(metadata, path.name, size)
    if fixed is None:
        check_size(size, preprocess, path.name)
    return PriorModel(
        name=path.stem,
        onnx=serialised(model, path.name),
        preprocess=preprocess,
        names=names_of(metadata, path.name),
        output=kind_of(metadata, path.name),
        output_name=metadata.get("output_name"),
        licence=metadata.get("licence", metadata.get("license", "not stated")),
        warnings=warnings,
    )


def _too_new(model: ModelProto, name: str) -> tuple[str, ...]:
    """What the oldest supported versions of TensorRT and ONNX Runtime cannot read. BundleError if
    the installed onnx cannot read it either."""
    import onnx

    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    numbers = {"IR version": model.ir_version, "opset": opset}
    installed = {"IR version": onnx.IR_VERSION, "opset": onnx.defs.onnx_opset_version()}
    for what, number in numbers.items():
        if number > installed[what]:
            raise BundleError(
                f"{name} has {what} {number}; onnx {onnx.__version__} reads up to "
                f"{installed[what]}",
                fix="pip install --upgrade onnx onnxruntime, or export it again with an older one",
            )
    warnings = []
    if opset > _OPSET:
        warnings.append(
            SdkError(
                f"{name} has opset {opset}; TensorRT 10.3 reads opsets up to {_OPSET}, and ONNX "
                f"Runtime 1.18 up to {_OPSET + 1}, so older devices cannot load the bundle",
                fix=f"export the network again, for example with opset_version={OPSET}",
            )
        )
    if model.ir_version > _IR:
        warnings.append(
            SdkError(
                f"{name} has IR version {model.ir_version}; ONNX Runtime 1.18 to 1.20 read up to "
                f"{_IR}, so older devices cannot load the bundle",
                fix=f"set model.ir_version = {_IR} and save it again; opsets up to 21 need no more",
            )
        )
    return tuple(str(warning) for warning in warnings)


def _read(path: Path) -> tuple[ModelProto, list[Port], dict[str, str]]:
    """The model in a file, with all of its weights inside; its inputs, and its metadata_props."""
    file, weights = check_file(path)
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise MissingBackend(
            f"onnx is needed to freeze {path.name}, but {error}",
            fix="pip install 'dynaguide-edge[export]'",
        ) from error
    try:
        model = onnx.load(file, load_external_data=False)
        _take_weights(model, weights)
        for value in model.graph.input:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_value < 1:  # some programs write 0 or -1 for a free dimension
                    dim.ClearField("dim_value")
        metadata = {_text(entry.key): _text(entry.value) for entry in model.metadata_props}
        return model, inputs_of(model), metadata
    except (DecodeError, OSError, ValueError) as error:
        raise BundleError(
            f"{path} cannot be loaded: {first_line(error)}",
            fix=f"check it with: check-model {path.name}, or export it again",
        ) from error


def _take_weights(model: ModelProto, files: Mapping[str, Path]) -> None:
    """Copy external weights into the model. ``files`` are the files of their locations.

    onnx.load would do the same, but refuses files that are links, as in the cache of a hub.
    ValueError if a file is too short.
    """
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    for tensor in _tensors(model) if files else ():
        if not uses_external_data(tensor):
            continue
        info = ExternalDataInfo(tensor)
        with files[info.location].open("rb") as file:
            file.seek(info.offset or 0)
            data = file.read(-1 if info.length is None else info.length)
        if info.length is not None and len(data) < info.length:
            raise ValueError(f"{info.location} ends within the weights {tensor.name!r}")
        tensor.raw_data = data
        tensor.ClearField("data_location")
        del tensor.external_data[:]


def _tensors(message: Any) -> Iterator[TensorProto]:
    """Every tensor inside a protobuf message, also those in attributes of nodes and in branches."""
    from onnx import TensorProto

    if isinstance(message, TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _tensors(part)


def _text(value: str | bytes) -> str:
    """A string of the file. Protobuf may return it as bytes; UnicodeDecodeError, a ValueError, if
    these are no UTF-8."""
    return value if isinstance(value, str) else value.decode()


def inputs_of(model: ModelProto) -> list[Port]:
    """The inputs of a model as ONNX Runtime would report them, without opening a session. Weights,
    which older files list among the inputs, are left out.

    Example
    -------
    >>> inputs_of(onnx.load("prior.onnx"))
    [Port(name='images', shape=(1, 3, 360, 480), dtype='tensor(float)')]
    """
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
