"""Types and shapes of the tensors of an ONNX graph, also where onnx's own inference ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.errors import BundleError, first_line

if TYPE_CHECKING:
    from onnx import ModelProto

# onnx infers nothing for these operators, and then nothing behind them. Their output has the type
# and the shape of their first input.
_LIKE_INPUT = frozenset(["GroupNormalization"])
_QUANTISED = frozenset(
    "ConvInteger DequantizeLinear MatMulInteger QLinearConv QLinearMatMul".split()
)


def infer_shapes(model: ModelProto) -> ModelProto:
    """A copy of the model whose value_info contains every type and shape that can be inferred.

    Parameters
    ----------
    model : without local functions. It is not changed.
    """
    import onnx

    if any(node.op_type in _LIKE_INPUT for node in model.graph.node):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        for node in copy.graph.node:
            if node.op_type in _LIKE_INPUT:
                node.op_type = "Identity"
                del node.input[1:], node.attribute[:]
        model = copy
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def store_unknown_types(model: ModelProto) -> None:
    """Replace the model's value_info by the types of those tensors that onnx cannot infer. With
    them, onnx's checker and its strict inference accept the model."""
    graph = model.graph
    del graph.value_info[:]
    unknown = {n.output[0] for n in graph.node if n.op_type in _LIKE_INPUT}
    if unknown:
        known = infer_shapes(model).graph.value_info
        graph.value_info.extend(value for value in known if value.name in unknown)


def check_valid(model: ModelProto, name: str, *, full: bool = False) -> None:
    """Check a model by onnx's own checker.

    Parameters
    ----------
    name : of the network, for messages.
    full : infer and compare the types and shapes, too.

    Raises
    ------
    BundleError : the checker refuses the model.
    """
    import onnx

    try:
        onnx.checker.check_model(model, full_check=full)
    except (
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        UnicodeDecodeError,  # for names that are no text
    ) as error:
        raise BundleError(
            f"{name} is no valid ONNX network: {first_line(error)}",
            fix="check it with: check-model FILE, or export it again",
        ) from error


def precision_of(model: ModelProto) -> str:
    """The precision of the model's weights, as the manifest writes it: "fp32"; "int8" if layers
    read quantised values, "fp16" if any weights are FP16; or "int8+fp16"."""
    from onnx import TensorProto

    nodes = model.graph.node
    constants = [a.t for n in nodes if n.op_type == "Constant" for a in n.attribute]
    weights = [*model.graph.initializer, *constants]
    found = {
        "int8": any(n.op_type in _QUANTISED for n in nodes),
        "fp16": any(w.data_type == TensorProto.FLOAT16 for w in weights),
    }
    return "+".join(name for name, is_there in found.items() if is_there) or "fp32"
