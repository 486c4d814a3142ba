"""Small ONNX files. Some keep weights in other files, at every place where a file can say so."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the networks are made with onnx: pip install onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402 (after importorskip)

FLOAT = TensorProto.FLOAT
SECRET = np.array([7, 8], np.float32)
BESIDE = np.array([3, 4], np.float32)


def info(name, shape=(2,), kind=FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def model_of(nodes, inputs=(), outputs=("y",), initializers=(), functions=(), domains=()):
    graph = helper.make_graph(
        list(nodes), "g", list(inputs), [info(o) for o in outputs], list(initializers)
    )
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=8)


def external(location, name="w"):
    """A float tensor of two values that lie in another file."""
    tensor = TensorProto(name=name, data_type=FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def in_initializer(location):
    identity = helper.make_node("Identity", ["w"], ["y"])
    return model_of([identity], initializers=[external(location)])


def branch(location):
    identity = helper.make_node("Identity", ["w"], ["z"])
    return helper.make_graph([identity], "then", [], [info("z")], [external(location)])


def in_subgraph(location):
    condition = numpy_helper.from_array(np.array(True), "condition")
    both = {"then_branch": branch(location), "else_branch": branch(location)}
    return model_of(
        [helper.make_node("If", ["condition"], ["y"], **both)], initializers=[condition]
    )


# Protobuf by hand


def varint(n):
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def key(number, wire=2):
    return varint(number << 3 | wire)


def field(number, body, tag=None):
    return (tag or key(number)) + varint(len(body)) + body


def write(folder, content, name="m.onnx"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    return path
