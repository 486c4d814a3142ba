"""Small ONNX models that TensorRT builds, as bytes."""

from dataclasses import fields

import numpy as np
import pytest

from runtime.engines.recipe import EngineRecipe
from runtime.engines.tensorrt_build import build_engine

onnx = pytest.importorskip("onnx", reason="the onnx package makes the models")

helper, numpy_helper, FLOAT = onnx.helper, onnx.numpy_helper, onnx.TensorProto.FLOAT


def model(nodes, weights, shape=(1, 3, 16, 16), dtype=np.float32, names=("image", "scores")):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(names[0], kind, shape)],
        [helper.make_tensor_value_info(names[1], kind, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opset = [helper.make_opsetid("", 18)]
    made = helper.make_model(graph, opset_imports=opset, ir_version=9)
    return made.SerializeToString()


def kernel(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def convolution(dtype=np.float32, shape=(1, 3, 16, 16)):
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["scores"]),
    ]
    return model(nodes, {"w": kernel(4, 3, 3, 3).astype(dtype)}, shape, dtype)


def build(data, **options):
    options = {"runtime": "tensorrt_rtx", "compute_capabilities": ("8.6",), **options}
    flags = {f.name: options.pop(f.name) for f in fields(EngineRecipe) if f.name in options}
    return build_engine(data, EngineRecipe(**flags), **options)


# TensorRT itself: the same builder behind its name, since it cannot run here

LAYERS = {
    "Layers": [
        "a name alone",
        {
            "Name": "conv",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Format/Datatype": "Thirty-two wide channel vectorized row major Int8"}],
            "Outputs": [{"Format/Datatype": "Row major linear FP32"}],
        },
        {
            "LayerType": "gemm",
            "Inputs": [{"Format/Datatype": "Half"}],
            "Outputs": [{"Format/Datatype": "Half"}],
        },
        {"LayerType": "kgen", "Outputs": [{"Format/Datatype": "Float"}]},
        {"LayerType": "Reformat", "Outputs": [{"Format/Datatype": "Float"}]},
        {"LayerType": "kgen", "Outputs": [{"Format/Datatype": "Int32"}]},
        {"LayerType": "kgen", "Outputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]},
        {"LayerType": "kgen", "Outputs": []},
    ]
}
