"""What is known of a plan: its header, its receipt and its key."""

import json

import numpy as np
import pytest
from cases import case
from tensorrt_models import LAYERS, build, convolution, helper, kernel, model

from runtime.engines.plan import (
    PlanHeader,
    check_receipt,
    engine_key,
    inspector_receipt,
    read_header,
)
from runtime.errors import BundleError, InputError, VerificationFailed

onnx = pytest.importorskip("onnx", reason="the onnx package makes the models")


def quantized():
    weights = {
        "scale": np.float32(0.02),
        "zero": np.int8(0),
        "w": (30 * kernel(4, 3, 3, 3)).astype(np.int8),
        "scales": np.full(4, 0.03, np.float32),
        "zeros": np.zeros(4, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["w", "scales", "zeros"], ["k"], axis=0),
        helper.make_node("Conv", ["x", "k"], ["scores"], pads=[1, 1, 1, 1]),
    ]
    return model(nodes, {name: np.asarray(value) for name, value in weights.items()})


# Receipts


def test_receipts_of_real_networks(rtx, no_gpu):
    full = build(convolution()).receipt
    assert full == {
        "source": "network",
        "layers": {"fp32": 2},
        "matrix": {"fp32": 1},
        "quantize": 0,
        "other": 0,
    }
    half = build(convolution(np.float16)).receipt
    assert half["layers"] == {"fp16": 2} and half["matrix"] == {"fp16": 1}
    int8 = build(quantized()).receipt
    assert int8["matrix"] == {"int8": 1} and int8["quantize"] == 3 and int8["other"] > 0
    for asked, right in (("fp32", full), ("fp16", half), ("int8", int8)):
        for receipt in (full, half, int8):
            if receipt is right:
                check_receipt(receipt, asked)
            else:
                with pytest.raises(VerificationFailed, match=f"^{asked} was asked for, but "):
                    check_receipt(receipt, asked)


def test_receipt_of_an_engine():
    assert inspector_receipt(json.dumps(LAYERS)) == {
        "source": "engine",
        "layers": {"int8": 1, "fp16": 1, "fp32": 1},
        "matrix": {"int8": 1, "fp16": 1},
        "other": 5,
    }


def receipt(layers, matrix, quantize=0):
    return {"source": "engine", "layers": layers, "matrix": matrix, "quantize": quantize}


WRONG = [
    ("fp32", receipt({"fp32": 9, "fp16": 1}, {}), "1 layers are below FP32, 0 quantise .eng"),
    ("fp32", receipt({"fp32": 9}, {}, 2), "0 layers are below FP32, 2 quantise"),
    ("fp16", receipt({"fp32": 9}, {"fp32": 4}), "no layer computes in FP16"),
    ("fp16", receipt({"fp16": 5, "fp32": 9}, {"fp16": 1, "fp32": 3}), "only 1 of 4 conv"),
    ("int8", receipt({"fp32": 9}, {"fp32": 4}), "no quantise or dequantise layer"),
    ("int8", receipt({"fp16": 9}, {"fp16": 4}, 3), "none of 4 convolutions .* is INT8"),
    ("fp16", receipt({}, {}), "no layer's precision is known .engine: nothing"),
]


def test_a_receipt_that_is_not_what_was_asked():
    for asked, found, message in WRONG:
        with case(asked, found):
            with pytest.raises(VerificationFailed, match=message):
                check_receipt(found, asked)


def test_a_receipt_that_is():
    check_receipt(receipt({"fp16": 5, "fp32": 9}, {"fp16": 2, "fp32": 2}), "fp16")
    check_receipt(receipt({"fp16": 5, "int8": 1}, {"fp16": 2, "int8": 1}, 2), "int8")
    with pytest.raises(InputError, match="asked is 'half'; wanted"):
        check_receipt(receipt({"fp16": 5}, {}), "half")


# Headers


HEADER = b"vtrt" + bytes(12) + (40).to_bytes(8, "little") + bytes([1, 7, 1, 116]) + bytes(12)


def test_header():
    assert read_header(HEADER) == PlanHeader(40, "1.7.1.116")
    assert read_header(b"ftrt" + HEADER[4:]) is None
    assert read_header(b"") is None


def test_a_plan_of_the_wrong_size():
    for size in [1, 3, 4, 20, 27, 39, 41]:
        with case(size):
            with pytest.raises(
                BundleError, match=f"the plan has {size} bytes.*(.|\n)*fix: copy it again"
            ):
                read_header((HEADER + b"x")[:size])


def test_metadata_before_the_plan_is_named():
    text = json.dumps({"task": "segment", "names": {"0": "road"}}).encode()
    data = len(text).to_bytes(4, "little") + text + HEADER
    with pytest.raises(BundleError, match=f"{len(text)} bytes of JSON.*Ultralytics") as caught:
        read_header(data)
    assert caught.value.fix == f"drop the first {len(text) + 4} bytes"
    assert read_header(data[len(text) + 4 :]) == PlanHeader(40, "1.7.1.116")


# Keys


def test_key_changes_with_each_fact():
    facts = {
        "onnx": b"model",
        "flags": {"level": 3, "half": False},
        "runtime": "tensorrt",
        "version": "10.3.0",
        "compute_capabilities": ["8.7"],
        "gpu_name": "Orin",
        "l4t": "36.4.0",
    }
    others = {
        "onnx": b"other",
        "flags": {"level": 3, "half": True},
        "runtime": "tensorrt_rtx",
        "version": "10.3.1",
        "compute_capabilities": ["8.6"],
        "gpu_name": None,
        "l4t": "36.4",
    }

    def key(onnx, flags, **rest):
        return engine_key(onnx, flags, **rest)

    keys = [key(**facts), *(key(**{**facts, name: value}) for name, value in others.items())]
    assert len(set(keys)) == len(keys) == 8
    assert all(len(k) == 16 and int(k, 16) >= 0 for k in keys)
    assert key(**{**facts, "flags": {"half": False, "level": 3}}) == keys[0]
    assert keys[0] == "b6c6edc826760463"  # bundles on disk depend on it
