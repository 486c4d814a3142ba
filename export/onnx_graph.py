"""A builder of ONNX graphs, node by node."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.core import parameters
from runtime.core.options import RefineOptions

if TYPE_CHECKING:
    import onnx


OPSET, IR = 18, 9
VERSION = 1  # changes when the inputs, the outputs or the results of the graphs change
FLOAT, INT32, INT64 = 1, 6, 7  # onnx.TensorProto's numbers
FAR = 2**31 - 1  # the end index of a slice up to the last element
Shape = Sequence[int | str]


class Value:
    """A tensor of the graph under construction. Arithmetic with it adds nodes."""

    def __init__(self, graph: Graph, name: str) -> None:
        self.graph, self.name = graph, name

    def __add__(self, other: Any) -> Value:
        return self.graph.op("Add", self, other)

    def __sub__(self, other: Any) -> Value:
        return self.graph.op("Sub", self, other)

    def __rsub__(self, other: Any) -> Value:
        return self.graph.op("Sub", other, self)

    def __mul__(self, other: Any) -> Value:
        return self.graph.op("Mul", self, other)

    def __truediv__(self, other: Any) -> Value:
        return self.graph.op("Div", self, other)

    def __rtruediv__(self, other: Any) -> Value:
        return self.graph.op("Div", other, self)

    __radd__, __rmul__ = __add__, __mul__


class Graph:
    """Nodes, constants, inputs and outputs of a graph under construction, and methods that add
    groups of nodes which several graphs use.

    Attributes
    ----------
    constants : the constants by type, shape and value, so that equal ones are stored once.
    patches : the shifted copies of a map, as matrices, by the map's name. The gradients of
        convolutions that read the same map share them.

    Example
    -------
    >>> g = Graph()
    >>> image = g.input("image", onnx.TensorProto.FLOAT, (1, 3, "height", "width"))
    >>> centred = image - g.mean(image)
    >>> [node.op_type for node in g.nodes]
    ['ReduceMean', 'ReduceMean', 'Sub']
    """

    def __init__(self) -> None:
        import onnx

        self.onnx = onnx
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.constants: dict[tuple, Any] = {}
        self.patches: dict[str, list[Value]] = {}

    def input(self, name: str, kind: int, shape: Shape) -> Value:
        """Declare an input: its name, onnx's number of the element type, and its shape, with names
        for free dimensions."""
        self.inputs.append(self.onnx.helper.make_tensor_value_info(name, kind, shape))
        return Value(self, name)

    def output(self, name: str, kind: int, shape: Shape) -> None:
        """Declare an output: its name, onnx's number of the element type, and its shape. One of the
        nodes must have an output of this name."""
        self.outputs.append(self.onnx.helper.make_tensor_value_info(name, kind, shape))

    def op(self, kind: str, *inputs: Any, name: str = "", **attributes: Any) -> Value:
        """Add a node.

        Parameters
        ----------
        kind : the operator.
        inputs : values; numbers and arrays become constants.
        name : of the node and of its output; a new one when empty.
        attributes : of the node.

        Returns
        -------
        The output of the node.
        """
        name = name or f"{kind.lower()}_{len(self.nodes)}"
        values = [i if isinstance(i, Value) else self.constant(i) for i in inputs]
        names = [v.name for v in values]
        self.nodes.append(self.onnx.helper.make_node(kind, names, [name], name, **attributes))
        return Value(self, name)

    def split(self, x: Value, sizes: Sequence[int], axis: int = 0) -> list[Value]:
        """The parts of ``x``, of these sizes along ``axis``."""
        at = len(self.nodes)
        names = [f"split_{at}_{i}" for i in range(len(sizes))]
        inputs = [x.name, self.constant(tuple(sizes)).name]
        self.nodes.append(self.onnx.helper.make_node("Split", inputs, names, names[0], axis=axis))
        return [Value(self, name) for name in names]

    def constant(self, value: Any) -> Value:
        """A constant. Floats become float32 scalars, whole numbers int64 scalars, tuples of whole
        numbers int64 vectors. Arrays keep their type."""
        if isinstance(value, float):
            value = np.float32(value)
        array = np.asarray(value, np.int64 if isinstance(value, (tuple, int)) else None)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            name = f"constant_{len(self.constants)}"
            self.constants[key] = self.onnx.numpy_helper.from_array(array, name)
        return Value(self, self.constants[key].name)

    def over_pixels(self, kind: str, x: Value) -> Value:
        """(1, C, 1, 1): the operator ``kind`` (ReduceSum, ReduceMean or ReduceMax) on a map
        (1, C, H, W), along W first and then along H."""
        rows = self.op(kind, x, (3,), keepdims=1)
        return self.op(kind, rows, (2,), keepdims=1)

    def mean(self, x: Value) -> Value:
        """(1, C, 1, 1): the mean over all pixels."""
        return self.over_pixels("ReduceMean", x)

    def sum(self, x: Value) -> Value:
        """(1, C, 1, 1): the sum over all pixels."""
        return self.over_pixels("ReduceSum", x)

    def over_channels(self, kind: str, x: Value) -> Value:
        """(1, 1, H, W): the operator ``kind`` (ReduceSum or ReduceMax) on the channels of a map."""
        return self.op(kind, x, (1,), keepdims=1)

    def reshape(self, x: Value, *shape: int) -> Value:
        """The value in another shape, in which one side may be -1."""
        return self.op("Reshape", x, shape)

    def pad(self, x: Value, border: int, value: float = 0.0) -> Value:
        """The map with a border of this width in pixels on each side, filled with ``value``."""
        return self.op("Pad", x, (0, 0, border, border) * 2, value)

    def shifted(self, padded: Value, border: int, dy: int, dx: int) -> Value:
        """The map moved so that pixel (y, x) has the value of pixel (y + dy, x + dx). ``padded`` is
        the map with a border of ``border`` >= abs(dy), abs(dx) pixels."""
        starts = (border + dy, border + dx)
        ends = tuple(d - border if d < border else FAR for d in (dy, dx))
        return self.op("Slice", padded, starts, ends, (2, 3))

    def model(self, name: str, options: RefineOptions, description: str) -> onnx.ModelProto:
        """The finished model. Nodes and constants that no output needs are left out.

        Parameters
        ----------
        name : of the graph.
        options : of the refinement; they are stored in the metadata.
        description : of the graph, in words.
        """
        helper = self.onnx.helper
        needed = {o.name for o in self.outputs}
        nodes: list[onnx.NodeProto] = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                nodes.insert(0, node)
        constants = [c for c in self.constants.values() if c.name in needed]
        graph = helper.make_graph(nodes, name, self.inputs, self.outputs, constants)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR,
            producer_name="dynaguide-edge",
            model_version=VERSION,
            doc_string=description,
        )
        metadata = {
            "author": "dynaguide-edge",
            "description": description,
            "version": str(VERSION),
            "dg.objective": options.objective,
            "dg.options": json.dumps(asdict(options), sort_keys=True),
        }
        free = parameters.channel_count(options, -1) or 1  # -1 stands for the number of classes
        for kind, shapes in zip(
            ("parameters", "buffers"), parameters.shapes(options, free), strict=True
        ):
            metadata[f"dg.{kind}"] = json.dumps({name: list(s) for name, s in shapes.items()})
        helper.set_model_props(model, metadata)
        return model
