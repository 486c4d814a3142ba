"""The input and the outputs of a graph in the form that bundles have: batch 1, the chosen size,
FP32, and the shape of every output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from export.frozen import Frozen
from export.inference import check_valid, infer_shapes, store_unknown_types
from export.onnx_graph import FLOAT
from runtime.errors import InputError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TypeProto

_SIDES = {2: "height", 3: "width"}  # names of the input's free dimensions


def fix_ports(
    graph: ModelProto, name: str, size: tuple[int, int], *, dynamic: bool = False, multiple: int = 1
) -> None:
    """Give the graph an input of batch 1, three channels and the chosen size, and give every output
    its shape.

    A dimension of the input is free if the graph names it, leaves it out, or states 0 or less. Free
    dimensions of outputs get names of their own. A shape that onnx cannot infer is read from
    outputs that ONNX Runtime computes.

    Parameters
    ----------
    graph : changed in place.
    name : of the network, for messages.
    size : (height, width) of the input in pixels.
    dynamic : height and width of the input stay free, and are called so.
    multiple : the network takes sides that are multiples of this number.

    Raises
    ------
    InputError : the network has another number of inputs, or its input does not allow this size.
    BundleError : onnx's checker refuses the graph.

    Example
    -------
    >>> graph = onnx.load("prior.onnx")
    >>> fix_ports(graph, "prior", (360, 480))
    """
    _list_input_alone(graph)
    _make_float32(graph)
    _fix_input(graph, name, size, dynamic)
    inner = graph.graph
    kinds = [value.type.tensor_type.elem_type for value in inner.output]
    for value, kind in zip(inner.output, kinds, strict=True):  # the checker wants type and shape
        value.ClearField("type")
        value.type.tensor_type.elem_type = kind or FLOAT
        value.type.tensor_type.shape.SetInParent()
    check_valid(graph, name)
    for value, kind in zip(inner.output, kinds, strict=True):
        value.ClearField("type")  # the shape may use names that do not exist any more
        if kind:
            value.type.tensor_type.elem_type = kind
    store_unknown_types(graph)
    inferred = infer_shapes(graph).graph.output
    del inner.output[:]
    inner.output.extend(inferred)
    for value in inner.output:
        if value.type.WhichOneof("value") != "tensor_type":
            raise InputError(
                f"output {value.name} of {name} is no tensor",
                fix="export the network with its scores or labels as a tensor",
            )
    if not all(_is_known(value.type.tensor_type, dynamic) for value in inner.output):
        _measure_outputs(graph, name, size, dynamic, multiple)
    for value in inner.output:
        dims = value.type.tensor_type.shape.dim
        for axis, dim in enumerate(dims):
            if dim.dim_value < 1 and axis == 0 and len(dims) > 2:
                dim.dim_value = 1
            elif dim.dim_value < 1:  # each free side has a name of its own
                dim.dim_param = f"{value.name}_{axis}"


def _list_input_alone(graph: ModelProto) -> None:
    """Remove the weights from the list of inputs, where ONNX before IR 4 wanted them."""
    inner = graph.graph
    weights = {tensor.name for tensor in inner.initializer}
    inputs = [value for value in inner.input if value.name not in weights]
    del inner.input[:]
    inner.input.extend(inputs)
    graph.ir_version = max(graph.ir_version, 4)


def _make_float32(graph: ModelProto) -> None:
    """Put a Cast behind the input and before each output that is a float of another size, so that
    both are FP32. The types between them stay."""
    from onnx import TensorProto, helper

    inner = graph.graph
    others = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    for ports in (inner.input, inner.output):
        for value in ports:
            kind = value.type.tensor_type.elem_type
            if kind not in others:
                continue
            inside = f"{value.name}/{TensorProto.DataType.Name(kind).lower()}"
            _rename(inner, value.name, inside)
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            ends = (value.name, inside) if ports is inner.input else (inside, value.name)
            to = kind if ports is inner.input else TensorProto.FLOAT
            cast = helper.make_node("Cast", ends[:1], ends[1:], name=f"cast/{value.name}", to=to)
            inner.node.insert(0 if ports is inner.input else len(inner.node), cast)


def _rename(graph: GraphProto, old: str, new: str) -> None:
    """Rename a tensor in all nodes of a graph, and in the branches and loops inside them."""
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]
        for attribute in node.attribute:
            for branch in (attribute.g, *attribute.graphs):
                _rename(branch, old, new)


def _fix_input(graph: ModelProto, name: str, size: tuple[int, int], dynamic: bool) -> None:
    """Set the dimensions of the input. InputError if the graph fixes others."""
    inputs = graph.graph.input
    if len(inputs) != 1 or len(inputs[0].type.tensor_type.shape.dim) != 4 or not graph.graph.output:
        raise InputError(
            f"{name} has {len(inputs)} inputs and {len(graph.graph.output)} outputs; wanted one "
            "input (1, 3, h, w), and an output",
            fix="export the network with the picture as its only input",
        )
    dims = inputs[0].type.tensor_type.shape.dim
    came = [d.dim_value or d.dim_param for d in dims]
    for axis, (dim, number) in enumerate(zip(dims, (1, 3, *size), strict=True)):
        side = _SIDES.get(axis) if dynamic else None
        if dim.dim_value > 0 and side:
            raise InputError(
                f"{name} has a fixed {side} of {dim.dim_value}; dynamic wants it free",
                fix="drop --dynamic",
            )
        if dim.dim_value > 0 and dim.dim_value != number:
            raise InputError(
                f"{name} has a fixed input of {came}; wanted {[1, 3, *size]}",
                fix="leave --imgsz out, or export the network again with a free size",
            )
        if side:
            dim.dim_param = side
        else:
            dim.dim_value = number


def _is_known(output: TypeProto.Tensor, dynamic: bool) -> bool:
    """Whether an output has a shape: all of it, or its rank and channels if its size is free."""
    dims = [dim.dim_value > 0 for dim in output.shape.dim]
    if dynamic:
        return output.HasField("shape") and (len(dims) != 4 or dims[1])
    return output.HasField("shape") and all(dims[1:])


def _measure_outputs(
    graph: ModelProto, name: str, size: tuple[int, int], dynamic: bool, multiple: int
) -> None:
    """Set the outputs' shapes to those that ONNX Runtime returns for noise. With ``dynamic``, a
    dimension is free if it is another one for a larger input."""
    step = int(np.lcm(multiple, 32))
    sizes = [size, (size[0] + step, size[1] + 2 * step)] if dynamic else [size]
    rng = np.random.default_rng(0)
    with Frozen(name, graph) as engine:
        runs = [engine(rng.standard_normal((1, 3, *s), np.float32)) for s in sizes]
    for value, arrays in zip(graph.graph.output, zip(*runs, strict=True), strict=True):
        shape = value.type.tensor_type.shape
        shape.ClearField("dim")
        for numbers in zip(*(array.shape for array in arrays), strict=True):
            dim = shape.dim.add()
            if len(set(numbers)) == 1:
                dim.dim_value = numbers[0]
