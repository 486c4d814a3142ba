"""engines/port.py: the table of data types, and ports as manifests have them."""

import numpy as np
import pytest
from cases import case

from runtime.engines import tensorrt
from runtime.engines.port import (
    DTYPES,
    Port,
    dtype_of_tensorrt,
    manifest_dtype,
    numpy_dtype,
    onnx_dtype,
    triton_dtype,
)


def test_each_name_leads_to_the_others():
    for dtype in DTYPES:
        with case(dtype.name):
            assert onnx_dtype(dtype.name) == dtype.onnx and manifest_dtype(dtype.onnx) == dtype.name
            assert (
                numpy_dtype(dtype.onnx) is dtype.numpy and triton_dtype(dtype.name) == dtype.triton
            )
            if dtype.tensorrt:
                assert dtype_of_tensorrt(dtype.tensorrt) == dtype.onnx
            if dtype.numpy is not None:
                assert np.dtype(dtype.numpy).name == dtype.name


def test_every_name_stands_once():
    for column in ("name", "onnx", "triton"):
        assert len({getattr(dtype, column) for dtype in DTYPES}) == len(DTYPES)


def test_onnx_runtime_calls_them_so():
    """A model with an input of each type."""
    onnx = pytest.importorskip("onnx", reason="the onnx package makes the model")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime reads the model")
    known = [dtype for dtype in DTYPES if dtype.numpy is not None]
    kinds = [onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype.numpy)) for dtype in known]
    ports = [
        [onnx.helper.make_tensor_value_info(f"{end}{i}", kind, [1]) for i, kind in enumerate(kinds)]
        for end in "xy"
    ]
    nodes = [onnx.helper.make_node("Identity", [f"x{i}"], [f"y{i}"]) for i in range(len(kinds))]
    graph = onnx.helper.make_graph(nodes, "types", *ports)
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    assert [port.type for port in session.get_inputs()] == [dtype.onnx for dtype in known]


def test_tensorrt_and_triton_call_them_so():
    """The names in the documents of both (nvinfer1::DataType, ModelConfig's DataType), which need
    not be installed here."""
    tensorrt_names = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
    lacks = ("float64", "int16", "uint16", "uint32", "uint64")
    tensorrt_names |= dict.fromkeys(lacks, "")
    for dtype in DTYPES:
        assert dtype.tensorrt == tensorrt_names.get(dtype.name, dtype.name.upper())
        short = dtype.name.replace("bfloat", "bf").replace("float", "fp")
        assert dtype.triton == f"TYPE_{short.upper()}"


def test_what_the_table_does_not_have():
    assert numpy_dtype("tensor(string)") is None
    assert manifest_dtype("tensor(string)") == "string" and onnx_dtype("string") == "tensor(string)"
    assert dtype_of_tensorrt("FP8") == "FP8"
    with pytest.raises(KeyError, match="string"):
        triton_dtype("string")


def test_a_port_as_the_manifest_has_it():
    port = Port("image", (1, 3, "height", None), "tensor(float)")
    assert port.numpy is np.float32
    assert port.entry() == {"name": "image", "dtype": "float32", "shape": [1, 3, "height", -1]}


def test_gpus_of_tensorrt_for_rtx_are_those_of_the_library():
    pytest.importorskip("tensorrt_rtx", reason="pip install 'dynaguide-edge[rtx]'")
    assert tensorrt.supported_compute_capabilities() == [*tensorrt.RTX_CAPABILITIES]
