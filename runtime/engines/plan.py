"""Facts about a plan, which is a serialised engine: its header, its key, and its receipt, which
counts the layers by precision."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from runtime.engines.port import Shapes
from runtime.engines.tensorrt import REBUILD, make
from runtime.errors import BundleError, DeviceError, InputError, VerificationFailed

_PRECISIONS = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "int8", "FP8": "fp8"}
# Layers that are convolutions or matrix products
_MATRIX = {"CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM"}
# Layers that only move, convert or index data
_PLUMBING = set(
    "CAST CONCATENATION CONSTANT FILL GATHER IDENTITY SHAPE SHUFFLE SLICE SQUEEZE UNSQUEEZE".split()
)


class PlanHeader(NamedTuple):
    """The header of a plan.

    Parameters
    ----------
    size : of the plan, in bytes.
    version : of the library that built it, for example "1.7.1.116".
    """

    size: int
    version: str


def network_receipt(network: Any) -> dict[str, Any]:
    """Count the layers of a parsed network by the precision that they compute in.

    Parameters
    ----------
    network : TensorRT's INetworkDefinition.

    Returns
    -------
    The receipt that :class:`runtime.engines.tensorrt_build.Built` describes, with source "network".
    """
    layers: Counter[str] = Counter()
    matrix: Counter[str] = Counter()
    quantize = other = 0
    made_by: dict[str, str] = {}  # tensor -> kind of its layer
    for layer in map(network.get_layer, range(network.num_layers)):
        kind, output = layer.type.name, layer.get_output(0)
        precision = None if output is None else _PRECISIONS.get(output.dtype.name)
        if output is not None:
            made_by[output.name] = kind
        if kind in ("QUANTIZE", "DEQUANTIZE"):
            quantize += 1
        elif precision is None or kind in _PLUMBING:
            other += 1
        else:
            if kind in _MATRIX:
                read = layer.get_input(0)
                int8 = made_by.get(read.name) == "DEQUANTIZE"
                precision = "int8" if int8 else _PRECISIONS.get(read.dtype.name, precision)
                matrix[precision] += 1
            layers[precision] += 1
    return {
        "source": "network",
        "layers": dict(layers),
        "matrix": dict(matrix),
        "quantize": quantize,
        "other": other,
    }


def engine_receipt(trt: Any, log: Any, plan: bytes, shapes: Shapes) -> dict[str, Any]:
    """Count the layers of a built engine by precision. TensorRT's engine inspector reads them, on
    the device that the engine is for.

    Parameters
    ----------
    trt : the module tensorrt.
    log : its logger, from :func:`runtime.engines.tensorrt.bridge_log`.
    plan : the engine.
    shapes : its least, usual and largest input shapes.

    Returns
    -------
    What :func:`inspector_receipt` returns.

    Raises
    ------
    DeviceError : TensorRT cannot start, or the engine cannot be loaded or refuses its shapes.
    """
    runtime = make(trt, "Runtime")
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise DeviceError(
            f"the engine just built cannot be loaded: {log.summary()}",
            fix="build it again, and close what else uses the GPU",
        )
    inspector = engine.create_engine_inspector()
    if any(three[0] != three[2] for three in shapes.values()):
        context = engine.create_execution_context()  # without shapes the types are unknown
        if context is None or not all(
            context.set_input_shape(name, usual) for name, (_, usual, _) in shapes.items()
        ):
            raise DeviceError(
                f"the engine just built takes no shapes: {log.summary()}",
                fix="build it again, with other sizes for --min-shape and --max-shape",
            )
        inspector.execution_context = context
    return inspector_receipt(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def inspector_receipt(text: str) -> dict[str, Any]:
    """The receipt in the engine inspector's JSON: ``source``, ``layers``, ``matrix`` and ``other``.
    There is no ``quantize``, because a built engine has no such layers."""
    layers: Counter[str] = Counter()
    matrix: Counter[str] = Counter()
    other = 0
    for layer in json.loads(text)["Layers"]:
        details = layer if isinstance(layer, dict) else {}  # otherwise it is only a name
        kind = f"{details.get('LayerType', '')} {details.get('ParameterType', '')}".lower()
        is_matrix = re.search("conv|gemm|matrix|matmul|einsum|mha", kind) is not None
        ports = details.get("Inputs" if is_matrix else "Outputs") or [{}]
        precision = _format_precision(
            ports[0].get("Format/Datatype") or ports[0].get("Datatype", "")
        )
        plumbing = re.search("reformat|noop|constant|shape|shuffle|signal|wait|cast", kind)
        if precision is None or (plumbing and not is_matrix):
            other += 1
            continue
        layers[precision] += 1
        if is_matrix:
            matrix[precision] += 1
    return {"source": "engine", "layers": dict(layers), "matrix": dict(matrix), "other": other}


def _format_precision(text: str) -> str | None:
    """ "Row major linear FP16 format" -> "fp16"; None for other integers than INT8, and for text
    that names no precision."""
    words = {"int8": "int8", "fp8": "fp8", "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16",
             "half": "fp16", "float16": "fp16", "fp32": "fp32", "float": "fp32",
             "float32": "fp32"}  # fmt: skip
    found = [words[word] for word in re.findall(r"\w+", text.lower()) if word in words]
    return found[0] if found else None


def check_receipt(receipt: Mapping[str, Any], asked: str) -> None:
    """Check that an engine computes in the precision that was asked for.

    Parameters
    ----------
    receipt : ``Built.receipt``.
    asked : "fp32": all layers must compute in FP32; "fp16": some layers and at least half of
        the convolutions and matrix products must compute in FP16; "int8": some of the convolutions
        and matrix products must compute in INT8, and the network must have quantise or dequantise
        layers.

    Raises
    ------
    VerificationFailed : the engine computes in another precision.
    InputError : another value of ``asked``.
    """
    layers, matrix = Counter(receipt["layers"]), Counter(receipt["matrix"])
    products = sum(matrix.values())
    lower = sum(layers.values()) - layers["fp32"]
    problem = ""
    if asked not in ("fp32", "fp16", "int8"):
        raise InputError(f"asked is {asked!r}; wanted 'fp32', 'fp16' or 'int8'")
    if not layers:
        problem = "no layer's precision is known"
    elif asked == "fp32" and (lower or receipt["quantize"]):
        problem = f"{lower} layers are below FP32, {receipt['quantize']} quantise"
    elif asked == "fp16" and not layers["fp16"]:
        problem = "no layer computes in FP16"
    elif asked == "fp16" and 2 * matrix["fp16"] < products:
        problem = f"only {matrix['fp16']} of {products} convolutions and matrix products are FP16"
    elif asked == "int8" and not receipt["quantize"]:
        problem = "the model has no quantise or dequantise layer"
    elif asked == "int8" and not matrix["int8"]:
        problem = f"none of {products} convolutions and matrix products is INT8"
    if problem:
        counts = ", ".join(f"{n} {name}" for name, n in sorted(layers.items()))
        raise VerificationFailed(
            f"{asked} was asked for, but {problem} ({receipt['source']}: {counts or 'nothing'})",
            fix="precision is in the ONNX graph: export it again with or without --half or --int8",
        )


def read_header(plan: bytes) -> PlanHeader | None:
    """Read the header of a plan, without TensorRT. With it, errors are reported early
    and clearly; TensorRT checks the plan again.

    The layout was found by reading plans of TensorRT for RTX 1.7: "vtrt", the size at byte 16 (u64,
    little endian), the version at byte 24 (four bytes).

    Returns
    -------
    The header; None if the layout is another one.

    Raises
    ------
    BundleError : the plan is shorter or longer than its header says, or JSON stands before it.
    """
    if plan[:4] == b"vtrt"[: max(1, len(plan))]:
        size = int.from_bytes(plan[16:24], "little")
        if len(plan) < 28 or size != len(plan):
            wanted = f"; it says {size}" if len(plan) >= 24 else ""
            raise BundleError(
                f"the plan has {len(plan)} bytes{wanted}: it was cut short or changed",
                fix=f"copy it again as binary, or build it again: {REBUILD}",
            )
        return PlanHeader(size, ".".join(map(str, plan[24:28])))
    length = int.from_bytes(plan[:4], "little")
    if plan[4:5] == b"{" and length < 2**24:
        raise BundleError(
            f"{length} bytes of JSON metadata stand before the plan, as Ultralytics writes them; "
            f"TensorRT reads plans without it",
            fix=f"drop the first {length + 4} bytes",
        )
    return None


def engine_key(
    onnx: bytes,
    flags: Mapping[str, Any],
    *,
    runtime: str,
    version: str,
    compute_capabilities: Sequence[str],
    gpu_name: str | None = None,
    l4t: str | None = None,
) -> str:
    """The key of an engine: it is the same for the same model, flags, version and device.

    Parameters
    ----------
    onnx : the serialised model.
    flags : the builder's flags and shapes, as JSON values.
    runtime : "tensorrt" or "tensorrt_rtx".
    version : of that runtime.
    compute_capabilities : of the GPUs that the engine is for, for example ["8.6"].
    gpu_name, l4t : name of the GPU and release of its Jetson Linux; None where the engine does not
        depend on them.

    Returns
    -------
    16 hexadecimal digits.
    """
    facts = [runtime, version, list(compute_capabilities), gpu_name, l4t]
    text = json.dumps([hashlib.sha256(onnx).hexdigest(), dict(flags), *facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
