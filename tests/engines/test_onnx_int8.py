"""INT8 networks on a CPU are computed as their graph says, whatever integer kernels it has.

ONNX Runtime fuses QuantizeLinear, DequantizeLinear and the layer between them into integer kernels.
On x86 processors without VNNI these add pairs of products in 16 bits, and saturate. To see that on
a processor that has VNNI: qemu-x86_64 -cpu Haswell python -m pytest -s tests/test_engine_int8.py
"""

import numpy as np
import pytest

from runtime import OnnxEngine

onnx = pytest.importorskip("onnx", reason="the networks are made with onnx: pip install onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402 (after importorskip)

HEIGHT, WIDTH, CHANNELS, CLASSES = 24, 32, 16, 8
# Powers of two, so that no product and no sum is rounded in float32: all ways are equal to the bit.
INPUT_STEP, WEIGHT_STEP, OUTPUT_STEP = 2.0**-7, 2.0**-9, 2.0**-2
WEIGHTS = np.random.default_rng(0).integers(90, 128, (CLASSES, CHANNELS, 3, 3))
WEIGHTS *= np.random.default_rng(1).choice([-1, 1], (CLASSES, CHANNELS, 1, 1))
IMAGE = np.random.default_rng(2).uniform(-1, 1, (1, CHANNELS, HEIGHT, WIDTH)).astype(np.float32)


def network():
    """A convolution between Q/DQ pairs. Two neighbouring products reach 2 * 127 * 255 in the form
    that the integer kernels use, and 16 bits end at 32767."""
    tensors = {
        "step": np.float32(INPUT_STEP),
        "zero": np.int8(0),
        "weights": WEIGHTS.astype(np.int8),
        "weight_steps": np.full(CLASSES, WEIGHT_STEP, np.float32),
        "weight_zeros": np.zeros(CLASSES, np.int8),
        "output_step": np.float32(OUTPUT_STEP),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["x"]),
        helper.make_node(
            "DequantizeLinear", ["weights", "weight_steps", "weight_zeros"], ["w"], axis=0
        ),
        helper.make_node("Conv", ["x", "w"], ["sums"], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["sums", "output_step", "zero"], ["s"]),
        helper.make_node("DequantizeLinear", ["s", "output_step", "zero"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, IMAGE.shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()],
    )
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()


def in_numpy():
    """The same by the operators' definitions, in integers."""
    codes = np.clip(np.rint(IMAGE / np.float32(INPUT_STEP)), -128, 127).astype(np.int64)
    padded = np.pad(codes[0], ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    sums = np.einsum("chwyx,ocyx->ohw", windows, WEIGHTS) * (INPUT_STEP * WEIGHT_STEP)
    return np.clip(np.rint(sums / OUTPUT_STEP), -128, 127)[None] * OUTPUT_STEP


def by_onnx_runtime(as_written):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if as_written:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(network(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": IMAGE})[0]


def test_int8_is_computed_as_written(record_property):
    wanted, fused, written = in_numpy(), by_onnx_runtime(False), by_onnx_runtime(True)
    labels = wanted.argmax(1)
    assert np.bincount(labels.ravel(), minlength=CLASSES).min() > 0  # all classes are somewhere
    assert np.abs(wanted).max() < 127 * OUTPUT_STEP  # the network itself does not saturate
    share = float((fused.argmax(1) != labels).mean())
    record_property("labels_that_fused_kernels_change", share)
    print(f"ONNX Runtime's fused integer kernels change {share:.2%} of the labels here")
    with OnnxEngine(network(), name="int8") as engine:
        ours = engine(IMAGE)[0]
        options = engine._session.get_session_options()
    np.testing.assert_array_equal(written, wanted)
    np.testing.assert_array_equal(
        ours, wanted, err_msg=f"fused kernels change {share:.2%} of the labels here"
    )
    # Where fused kernels are exact, only this tells that they are not used.
    assert options.get_session_config_entry("session.disable_quant_qdq") == "1"
