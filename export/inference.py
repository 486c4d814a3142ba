"""What an ONNX graph says of itself: types and shapes of its tensors, also where onnx's own
inference ends; its precision; whether it was exported in training mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from runtime.errors import BundleError, first_line

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# onnx infers nothing for these operators, and then nothing behind them. Their output has the type
# and the shape of their first input.
_LIKE_INPUT = frozenset(["GroupNormalization"])
_QUANTISED = frozenset(
    "ConvInteger DequantizeLinear MatMulInteger QLinearConv QLinearMatMul".split()
)
_RANDOM = frozenset(
    "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike".split()
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
    read quantised values, "fp16" if any weights are FP16; or "int8+fp16".

    Example
    -------
    >>> precision_of(onnx.load("prior.onnx"))
    'fp32'
    """
    from onnx import TensorProto

    nodes = model.graph.node
    constants = [a.t for n in nodes if n.op_type == "Constant" for a in n.attribute]
    weights = [*model.graph.initializer, *constants]
    found = {
        "int8": any(n.op_type in _QUANTISED for n in nodes),
        "fp16": any(w.data_type == TensorProto.FLOAT16 for w in weights),
    }
    return "+".join(name for name, is_there in found.items() if is_there) or "fp32"


def check_not_training(model: ModelProto, name: str) -> None:
    """Check that a network computes the same output in each run, also inside branches and local
    functions.

    Parameters
    ----------
    name : of the network, for messages.

    Raises
    ------
    BundleError : operators return random values, or are in training mode: BatchNormalization with
        the statistics of the picture, Dropout that drops values.
    """
    found = set()
    for body in (model.graph, *model.functions):
        graphs = [*_with_branches(body)]
        nodes = [node for graph in graphs for node in graph.node]
        constants = {t.name: t for graph in graphs for t in getattr(graph, "initializer", ())}
        for node in nodes:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                constants[node.output[0]] = node.attribute[0].t
        bools = {key: t for key, t in constants.items() if t.data_type == t.BOOL}
        trues = {key for key, t in bools.items() if any(t.raw_data or t.int32_data)}
        found |= {node.op_type for node in nodes if _in_training(node, trues)}
    if found:
        raise BundleError(
            f"{name} was exported in training mode, or returns random values: it contains "
            f"{', '.join(sorted(found))}",
            fix="export it after model.eval(); in forward: dropout(x, training=self.training)",
        )


def _with_branches(body: Any) -> Iterator[Any]:
    """A graph or a local function, and the graphs inside its nodes."""
    yield body
    for node in body.node:
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _with_branches(graph)


def _in_training(node: NodeProto, trues: set[str]) -> bool:
    """Whether a node returns random values or is in training mode. ``trues`` are the names of the
    constants that are true."""
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "Dropout":
        return len(node.input) > 2 and node.input[2] in trues
    if node.op_type == "BatchNormalization":
        # Before opset 14, further outputs say that it is in training mode.
        modes = [attribute.i for attribute in node.attribute if attribute.name == "training_mode"]
        return any(modes) or (not modes and any(node.output[1:]))
    return node.op_type in _RANDOM
