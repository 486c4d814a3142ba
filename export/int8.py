"""INT8 by nodes that quantise and dequantise (Q/DQ)."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.half import QUANTISED, checked, parse, to_half
from runtime.engines.named_files import temporary_folder
from runtime.engines.onnx_runtime import telemetry_off
from runtime.errors import InputError, MissingBackend, first_line
from runtime.files import file_error

if TYPE_CHECKING:
    from onnx import ModelProto


def to_int8(
    data: bytes, feeds: Iterable[np.ndarray], *, half: bool = False
) -> tuple[bytes, dict[str, Any]]:
    """The network with Q/DQ before convolutions and matrix products with constant weights.

    Quantisation is symmetric, per channel for weights, with biases in FP32, as TensorRT wants. For
    an activation, the least and the largest value of each picture are averaged over the pictures;
    the larger magnitude of the two averages is the end of the range. Only inputs are quantised, so
    that each value is rounded once. Convolutions in groups and products of two activations are not
    quantised: they become little faster and lose the most accuracy. A trained ESPNetv2 (384 x 384,
    6 pictures, calibrated with 16 others) keeps 96 % of its FP32 labels in this way, 79 % on the
    worst picture. It keeps 74 % if the largest magnitude in all pictures is the end of the range,
    and outputs, convolutions in groups and all products are quantised, too.

    Parameters
    ----------
    data : serialised ONNX, FP32, of fixed input size.
    feeds : (1, 3, h, w) float32 each, preprocessed real pictures.
    half : store the rest in FP16, by :func:`export.half.to_half`. Q/DQ nodes, their scales and the
        operators that read them stay FP32, so that engines recognise the INT8 layers. TensorRT for
        RTX fuses no more layers if the scales are FP16: docs/export.md has the numbers.

    Returns
    -------
    The serialised network, and what was done: ``method`` (of calibration), ``pictures`` (their
    number), ``quantised`` (names of nodes) and ``kept`` (with ``half``, the nodes that stay FP32).

    Raises
    ------
    InputError : no pictures, an input of free size, nothing to quantise, a constant that is no
        number, an opset below 11, or a temporary folder that cannot be written.
    BundleError : no ONNX. With ``half`` also the errors of :func:`export.half.to_half`.
    MissingBackend : ONNX Runtime's quantisation is not installed.

    Example
    -------
    >>> feeds = [preprocess(picture) for picture in pictures]
    >>> small, done = to_int8(Path("prior.onnx").read_bytes(), feeds)
    >>> done["quantised"]  # the names of the nodes
    ['node_conv2d', 'node_conv2d_1']
    """
    from onnx import helper

    telemetry_off()
    try:
        from onnxruntime.quantization import (
            CalibrationDataReader,
            QuantFormat,
            QuantType,
            quantize_static,
        )
    except ImportError as error:
        raise MissingBackend(
            f"ONNX Runtime's quantisation is needed for --int8, but {error}",
            fix="pip install 'dynaguide-edge[export]'",
        ) from error

    class Pictures(CalibrationDataReader):
        """Returns the pictures one by one, as ONNX Runtime asks for them, and counts them."""

        def __init__(self, name: str) -> None:
            self.name, self.count, self.feeds = name, 0, iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            feed = next(self.feeds, None)
            self.count += feed is not None
            return None if feed is None else {self.name: feed}

    model = parse(data, named=True)
    props = {entry.key: entry.value for entry in model.metadata_props}
    model = _with_axis(model)
    value = model.graph.input[0]
    if not all(d.dim_value > 0 for d in value.type.tensor_type.shape.dim):
        raise InputError(
            f"INT8 wants a fixed input size; {value.name} is free", fix="drop --dynamic or --int8"
        )
    reader = Pictures(value.name)
    first = next(reader.feeds, None)
    if first is None:
        raise InputError("INT8 needs pictures to calibrate with, got none", fix="--data DIR")
    reader.feeds = chain([first], reader.feeds)
    weights = {tensor.name for tensor in model.graph.initializer}
    left_out = [
        node.name
        for node in model.graph.node
        if node.op_type in QUANTISED
        and (
            node.input[1] not in weights  # a soft-max would waste half of a symmetric range
            or any(a.name == "group" and a.i > 1 for a in node.attribute)
        )
    ]
    with _temporary_folder() as folder, _without_advice():
        path = Path(folder, "int8.onnx")
        quantize_static(
            model,
            path,
            reader,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTISED),
            nodes_to_exclude=left_out,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "CalibMovingAverage": True,
                "OpTypesToExcludeOutputQuantization": list(QUANTISED),
            },
        )
        model = parse(path.read_bytes())
    helper.set_model_props(model, props)
    scaled = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    done = [
        n.name for n in model.graph.node if n.op_type in QUANTISED and scaled & set(n.input[:1])
    ]
    if not done:
        raise InputError(
            f"the network has none of {', '.join(QUANTISED)} to quantise", fix="drop --int8"
        )
    del model.graph.value_info[:]
    receipt = {
        "method": "mean over pictures of the largest magnitude",
        "pictures": reader.count,
        "quantised": done,
        "kept": [],
    }
    out = checked(model)
    if half:
        out, receipt["kept"] = to_half(out)
    return out, receipt


def _with_axis(model: ModelProto) -> ModelProto:
    """The model in opset 13 or later, because scales per channel need the axis of DequantizeLinear.
    InputError below opset 11, because the conversion would change what Resize computes."""
    from onnx import version_converter

    version = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if version >= 13:
        return model
    fix = "export it again with opset 13 or later, or drop --int8"
    if version < 11:
        raise InputError(f"the network has opset {version}; INT8 wants 11 or later", fix=fix)
    try:
        newer = version_converter.convert_version(model, 13)
    except (RuntimeError, version_converter.ConvertError) as error:
        raise InputError(
            f"the network has opset {version}, and cannot be converted to 13, which INT8 wants: "
            f"{first_line(error)}",
            fix=fix,
        ) from error
    return parse(newer.SerializeToString(), named=True)


@contextmanager
def _temporary_folder() -> Iterator[str]:
    """A block with a temporary folder for ONNX Runtime's quantisation. InputError if a file in it
    cannot be written."""
    place = temporary_folder()
    try:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            yield folder
    except OSError as error:
        raise file_error("written", place, error) from error


@contextmanager
def _without_advice() -> Iterator[None]:
    """A block in which the root logger itself logs errors only. Otherwise ONNX Runtime logs the
    advice to simplify the model first, which freezing does already."""

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    root = logging.getLogger()
    root.addFilter(is_error)
    try:
        yield
    finally:
        root.removeFilter(is_error)
