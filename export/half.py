"""Conversion of a network to FP16, for strongly typed engines.

Every runtime computes in the types that the ONNX file states. So ONNX Runtime, TensorRT 10 and 11
and TensorRT for RTX use the same file, and the file that was checked is the file that is shipped.

ONNX Runtime's CPU provider cannot check an FP16 graph. On x86 (seen with 1.31, at every
optimisation level) it computes in FP32 and leaves out the rounding between arithmetic operators. So
a value of 240,000, which is infinite on a GPU, may not be noticed. :func:`as_rounded_float32` adds
nodes that round, which ONNX Runtime 1.17 and later does not remove. :func:`fp16_overflow` measures
the magnitudes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from export.inference import store_unknown_types
from runtime.engines.onnx import OnnxEngine
from runtime.errors import BundleError, InputError, first_line

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto


HALF_MAX = 65504.0
LIMIT = HALF_MAX / 2  # other pictures may reach larger values than those that were tried
# Operators that stay FP32: those that sum over many elements, and those whose results exceed the
# range of FP16 or need more than its 11 bits.
KEPT = frozenset(
    "BatchNormalization CumSum Exp GlobalAveragePool GlobalLpPool GridSample GroupNormalization "
    "InstanceNormalization LayerNormalization Log LogSoftmax LpNormalization LRN "
    "MeanVarianceNormalization Pow RMSNormalization Reciprocal ReduceL1 ReduceL2 ReduceLogSum "
    "ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare RoiAlign "
    "Softmax Softplus Sqrt".split()
)
QDQ = ("QuantizeLinear", "DequantizeLinear")
QUANTISED = ("Conv", "MatMul", "Gemm")
_SHAPE_OF = ("Shape", "Size")  # their output does not depend on the values of the input
_TYPED = ("to", "dtype", "output_datatype")  # attributes that fix the type of an output


class Overflow(NamedTuple):
    """A tensor with a value beyond the range of FP16, or too near to its end.

    Parameters
    ----------
    tensor : its name.
    node : the name of the node that makes it.
    largest : its largest magnitude, computed in FP32.
    """

    tensor: str
    node: str
    largest: float


def to_half(data: bytes) -> tuple[bytes, list[str]]:
    """The network in FP16, with FP32 inputs and outputs.

    Normalisations, soft-max, reductions and powers stay FP32 (:data:`KEPT`). So do shape
    arithmetic, operators without FP16, nodes with an attribute for the type of their output (Cast),
    nodes that read a DequantizeLinear, and nodes with constants that FP16 cannot hold: beyond
    65504, or so small that their rounding error is more than twice that of normal FP16 numbers. All
    other nodes between FP32 nodes stay FP32, too, except convolutions and matrix products.

    Parameters
    ----------
    data : serialised ONNX, FP32, without control flow and external data.

    Returns
    -------
    The serialised network, and the nodes that stay FP32, in graph order and without those of Q/DQ:
    "name (operator)" or "name (operator: reason)".

    Raises
    ------
    InputError : the network has FP16 already, If, Loop or Scan, local functions, or a constant that
        is no number.
    BundleError : no ONNX, or a network whose types cannot be inferred.

    Example
    -------
    >>> half, kept = to_half(Path("prior.onnx").read_bytes())
    >>> precision_of(parse(half))
    'fp16'
    """
    from onnx import TensorProto, helper

    model, types = _typed(data)
    graph = model.graph
    if TensorProto.FLOAT16 in types.values():
        raise InputError("the network has FP16 tensors already; wanted FP32", fix="drop --half")
    why = _kept(model, types)

    # An FP32 tensor can have two forms, FP32 and FP16. Find the form that its node makes, and the
    # forms that the nodes which read it need.
    nothing: tuple[set[int], set[int]] = (set(), set())
    ports = {
        node.name: nothing if why.get(node.name, "") else _half_ports(node, model, types)
        for node in graph.node
    }
    outputs = {value.name for value in graph.output}
    other: dict[str, str] = {}  # tensor -> name of its second form
    taken, made_half = set(types), set()
    wanted_half: set[str] = set()
    wanted_float = set(outputs)
    for node in graph.node:
        reads, makes = ports[node.name]  # positions of inputs and outputs that become FP16
        for i, name in enumerate(node.input):
            (wanted_half if i in reads else wanted_float).add(name)
        made_half |= {node.output[i] for i in makes}

    def second(name: str) -> str:
        """A new name for the form of a tensor that does not have the tensor's own name."""
        if name not in other:
            other[name] = name + ("_float" if name in made_half - outputs else "_half")
            while other[name] in taken:
                other[name] += "_"
            taken.add(other[name])
        return other[name]

    def form(name: str, half: bool) -> str:
        """The name of a tensor's FP16 form (``half``) or FP32 form. The form that a node makes has
        the tensor's own name; but the own name of an output of the network is always FP32."""
        return name if half == (name in made_half - outputs) else second(name)

    def casts(name: str) -> Iterator[NodeProto]:
        """The Cast from the form of ``name`` that is made to the other form, if a node needs it."""
        is_half = name in made_half
        if types.get(name) == TensorProto.FLOAT and name in (
            wanted_float if is_half else wanted_half
        ):
            to = TensorProto.FLOAT if is_half else TensorProto.FLOAT16
            start, end = form(name, is_half), form(name, not is_half)
            yield helper.make_node("Cast", [start], [end], name=f"cast_{end}", to=to)

    nodes = [cast for value in graph.input for cast in casts(value.name)]
    for node in graph.node:
        reads, makes = ports[node.name]
        made = list(node.output)
        node.input[:] = [
            form(name, i in reads) if types.get(name) == TensorProto.FLOAT else name
            for i, name in enumerate(node.input)
        ]
        node.output[:] = [form(name, True) if i in makes else name for i, name in enumerate(made)]
        nodes += [node, *(cast for name in made for cast in casts(name))]
    tensors = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or tensor.name in wanted_float:
            tensors.append(tensor)
        if tensor.data_type == TensorProto.FLOAT and tensor.name in wanted_half:
            tensors.append(_as_half(tensor, form(tensor.name, True)))
    _replace(graph, nodes, tensors)
    return checked(model), [
        f"{name} ({reason})" for name, reason in why.items() if reason and reason not in QDQ
    ]


def as_rounded_float32(data: bytes, *, rounded: bool = True) -> bytes:
    """An FP32 network that computes the results of an FP16 network on any provider.

    Every operator computes in FP32, and each of its outputs that is FP16 in ``data`` is rounded to
    FP16, with overflow to infinity. A GPU that accumulates in FP32 computes the same. This needs
    ONNX Runtime 1.17 or later: earlier ones leave out the rounding.

    Parameters
    ----------
    data : serialised ONNX in FP16.
    rounded : False leaves out the rounding, to show how far a value is out of range.

    Raises
    ------
    InputError, BundleError : as for :func:`to_half`, which refuses FP16; this function does not.

    Example
    -------
    >>> half, _ = to_half(Path("prior.onnx").read_bytes())
    >>> with Frozen("prior", data=as_rounded_float32(half)) as graph:
    ...     scores = graph(preprocess(picture))
    """
    model, types = _typed(data)
    _compute_in_float32(model, types, rounded=rounded)
    return checked(model)


def _compute_in_float32(model: ModelProto, types: dict[str, int], *, rounded: bool) -> None:
    """Change a model as :func:`as_rounded_float32` describes. ``types`` maps a tensor's name to its
    element type."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    nodes = []
    for node in graph.node:
        halves = [name for name in node.output if types.get(name) == TensorProto.FLOAT16]
        to_half_already = node.op_type == "Cast" and bool(halves)
        if not rounded and to_half_already:
            next(a for a in node.attribute if a.name == "to").i = TensorProto.FLOAT
        if not rounded or not halves:
            nodes.append(node)
            continue
        node.output[:] = [f"{name}/exact" if name in halves else name for name in node.output]
        nodes.append(node)
        for name in halves:
            last = f"{name}/exact"
            if not to_half_already:
                nodes.append(
                    helper.make_node("Cast", [last], [f"{name}/16"], to=TensorProto.FLOAT16)
                )
                last = f"{name}/16"
            nodes.append(helper.make_node("Cast", [last], [name], to=TensorProto.FLOAT))
    tensors = []
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            array = numpy_helper.to_array(tensor).astype(np.float32)
            tensor = numpy_helper.from_array(array, tensor.name)
        tensors.append(tensor)
    _replace(graph, nodes, tensors)


def fp16_overflow(
    data: bytes, feeds: Iterable[np.ndarray], *, limit: float = LIMIT
) -> list[Overflow]:
    """Find the tensors with values near or beyond the end of FP16's range. This works also on a
    provider that computes FP16 networks in FP32.

    Parameters
    ----------
    data : the network in FP16 (:func:`to_half`). For an FP32 network the result is empty.
    feeds : (1, 3, h, w) float32 each, preprocessed real pictures.
    limit : largest magnitude allowed, by default half of FP16's.

    Returns
    -------
    The FP16 tensors whose largest magnitude, computed in FP32, is above ``limit`` or not finite, in
    graph order, so that the first is the cause.

    Raises
    ------
    InputError, BundleError : as for :func:`as_rounded_float32`.

    Example
    -------
    >>> half, _ = to_half(Path("prior.onnx").read_bytes())
    >>> fp16_overflow(half, [preprocess(picture)])  # all values fit
    []
    """
    from onnx import TensorProto, helper, numpy_helper

    half, types = _typed(data)
    made = [
        (name, node.name)
        for node in half.graph.node
        for name in node.output
        if types.get(name) == TensorProto.FLOAT16
    ]
    if not made:
        return []
    _compute_in_float32(half, types, rounded=False)
    graph = half.graph
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "flat/shape"))
    for name, _ in made:  # one number for each tensor, so that no whole tensor is stored
        graph.node.extend(
            [
                helper.make_node("Abs", [name], [f"{name}/abs"]),
                helper.make_node("Reshape", [f"{name}/abs", "flat/shape"], [f"{name}/flat"]),
                helper.make_node("ReduceMax", [f"{name}/flat"], [f"{name}/max"], keepdims=1),
            ]
        )
    graph.node.append(
        helper.make_node("Concat", [f"{name}/max" for name, _ in made], ["all/max"], axis=0)
    )
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("all/max", TensorProto.FLOAT, [len(made)]))
    largest = np.zeros(len(made))
    with OnnxEngine(half.SerializeToString(), name="the magnitudes of the FP16 network") as engine:
        for feed in feeds:
            found = engine(feed)[0]
            largest = np.maximum(largest, np.where(np.isfinite(found), found, np.inf))
    return [
        Overflow(name, node, float(value))
        for (name, node), value in zip(made, largest, strict=True)
        if value > limit
    ]


def parse(data: bytes, *, named: bool = False) -> ModelProto:
    """The model in serialised ONNX.

    Parameters
    ----------
    data : the bytes.
    named : whether every node gets a name of its own, and constant nodes become initializers.

    Raises
    ------
    BundleError : the bytes are no ONNX.
    InputError : with ``named``, a constant that is no number.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_from_string(data)
    except DecodeError as error:
        raise BundleError(f"no ONNX model: {error}", fix="export it again") from error
    if not named:
        return model
    graph, seen = model.graph, set()
    constants = [n for n in graph.node if n.op_type == "Constant"]
    for node in constants:
        array = _constant(node)
        graph.initializer.append(onnx.numpy_helper.from_array(array, node.output[0]))
        graph.node.remove(node)
    for i, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.name or node.op_type}_{i}"
        seen.add(node.name)
    return model


def _constant(node: NodeProto) -> np.ndarray:
    """The value of a constant node. InputError if it is no number."""
    from onnx import helper, numpy_helper

    value = helper.get_attribute_value(node.attribute[0])
    kind = node.attribute[0].name
    if kind == "value":
        return numpy_helper.to_array(value)
    if kind in ("value_float", "value_floats"):
        return np.asarray(value, np.float32)
    if kind in ("value_int", "value_ints"):
        return np.asarray(value, np.int64)
    raise InputError(f"constant {node.name} is a {kind}; wanted numbers", fix="export it in FP32")


def _typed(data: bytes) -> tuple[ModelProto, dict[str, int]]:
    """The model, and the element type of each of its tensors. InputError for a model with inner
    graphs or functions; BundleError for no ONNX, or types that cannot be inferred."""
    import onnx

    model = parse(data, named=True)
    inside = [n.op_type for n in model.graph.node if any(a.HasField("g") for a in n.attribute)]
    if inside or model.functions:
        raise InputError(
            f"the network has {inside[0] if inside else 'local functions'}; lower precision wants "
            "a plain graph",
            fix="freeze it for a fixed input size",
        )
    store_unknown_types(model)
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise BundleError(f"the network's types cannot be inferred: {first_line(error)}") from error
    graph = inferred.graph
    types = {t.name: t.data_type for t in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    for node in graph.node:
        for name in node.output:
            if name and not types.get(name):
                raise BundleError(f"the network's types cannot be inferred: {name} has none")
    return model, types


def _half_ports(
    node: NodeProto, model: ModelProto, types: dict[str, int]
) -> tuple[set[int], set[int]]:
    """Positions of the FP32 inputs and outputs that the operator also takes in FP16."""
    import onnx

    version = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    schema = onnx.defs.get_schema(node.op_type, version, node.domain)

    def allowed(names: Any, formal: Any) -> set[int]:
        return {
            i
            for i, name in enumerate(names)
            if types.get(name) == onnx.TensorProto.FLOAT
            and "tensor(float16)" in formal[min(i, len(formal) - 1)].types
        }

    return allowed(node.input, schema.inputs), allowed(node.output, schema.outputs)


def _kept(model: ModelProto, types: dict[str, int]) -> dict[str, str | None]:
    """For each node with FP32 tensors, by its name: the reason why it stays FP32, or None if it
    becomes FP16."""
    from onnx import TensorProto, numpy_helper

    graph = model.graph
    arrays = {
        t.name: numpy_helper.to_array(t)
        for t in graph.initializer
        if t.data_type == TensorProto.FLOAT
    }
    unfit = {name for name, array in arrays.items() if not _fits(array)}
    makers = {name: node for node in graph.node for name in node.output}
    users: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node.name)
    from_input = {value.name for value in graph.input}  # tensors that depend on the input's values
    why: dict[str, str | None] = {}
    for node in graph.node:
        if node.op_type not in _SHAPE_OF and from_input & set(node.input):
            from_input |= set(node.output)
        names = [*node.input, *node.output]
        if not any(types.get(name) == TensorProto.FLOAT for name in names):
            continue
        ports = _half_ports(node, model, types)
        sources = [makers[name].op_type for name in node.input if name in makers]
        lost = sorted(unfit & {node.input[i] for i in ports[0]})
        why[node.name] = None
        if node.op_type in (*KEPT, *QDQ) or any(a.name in _TYPED for a in node.attribute):
            why[node.name] = node.op_type
        elif node.op_type not in _SHAPE_OF and not from_input & set(node.output):
            why[node.name] = f"{node.op_type}: shape arithmetic"
        elif not any(ports):
            why[node.name] = f"{node.op_type}: FP32 only"
        elif "DequantizeLinear" in sources:
            why[node.name] = f"{node.op_type}: INT8"
        elif lost:
            why[node.name] = f"{node.op_type}: {lost[0]} does not fit FP16"
    changed = True
    while changed:  # two casts would cost more than a node between FP32 nodes gains
        changed = False
        for node in graph.node:
            before = [makers[name].name for name in node.input if name in makers]
            after = [name for output in node.output for name in users.get(output, [])]
            if (
                why.get(node.name, "") is None
                and node.op_type not in QUANTISED
                and before
                and after
                and any(why.get(name) for name in before)
                and all(why.get(name) for name in after)
            ):
                why[node.name], changed = f"{node.op_type}: between FP32 nodes", True
    return why


def _fits(array: np.ndarray) -> bool:
    """Whether FP16 holds the values about as exactly as it holds normal numbers, with 11 bits."""
    finite = array[np.isfinite(array)].astype(np.float64)
    if not finite.size:
        return True
    with np.errstate(over="ignore"):
        error = np.linalg.norm(finite - finite.astype(np.float16))
    return bool(error <= 2.0**-10 * np.linalg.norm(finite))


def _as_half(tensor: TensorProto, name: str) -> TensorProto:
    """A copy of a constant in FP16, with another name."""
    from onnx import numpy_helper

    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), name)


def _replace(graph: Any, nodes: list[Any], tensors: list[Any]) -> None:
    """Replace all nodes and initializers. Unused initializers and the recorded types are
    removed."""
    used = {name for node in nodes for name in node.input}
    kept_nodes, kept_tensors = list(nodes), [t for t in tensors if t.name in used]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(kept_nodes)
    graph.initializer.extend(kept_tensors)


def checked(model: ModelProto) -> bytes:
    """The model's bytes, after onnx has checked the whole model.

    Raises
    ------
    onnx.checker.ValidationError, onnx.shape_inference.InferenceError : the model is not valid. This
        is an error of this package.
    """
    import onnx

    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)
