"""INT8 graphs: their scales, their pattern beside FP16, and what is refused."""

import numpy as np
import pytest
from cases import case
from graphs_of_precision import FLOAT, HALF, INT8, agreement, answer, graph, types

from export.half import as_rounded_float32, fp16_overflow
from export.int8 import to_int8
from runtime.errors import InputError

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")
from onnx import numpy_helper  # noqa: E402 (after importorskip)


def test_int8_has_symmetric_scales_per_channel(network):
    data, feeds = network
    quantised, receipt = to_int8(data, iter(feeds))
    model = onnx.load_from_string(quantised)
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    makers = {n.output[0]: n for n in model.graph.node}
    nodes = {n.name: n for n in model.graph.node}
    assert receipt["pictures"] == len(feeds) and receipt["kept"] == []
    assert len(receipt["quantised"]) >= 10
    for name in receipt["quantised"]:
        node = nodes[name]
        activation, weight = (makers[i] for i in node.input[:2])
        assert activation.op_type == weight.op_type == "DequantizeLinear", name
        assert makers[activation.input[0]].op_type == "QuantizeLinear"
        q, scale, zero = (tensors[i] for i in weight.input)
        axis = next((a.i for a in weight.attribute if a.name == "axis"), 1)
        assert q.dtype == np.int8 and not zero.any() and not tensors[activation.input[2]].any()
        assert scale.shape == (q.shape[axis],), name
        assert all(tensors[i].dtype == np.float32 for i in node.input[2:])  # biases
    grouped = [n for n in nodes.values() if any(a.name == "group" and a.i > 1 for a in n.attribute)]
    assert grouped and not {n.name for n in grouped} & set(receipt["quantised"])
    assert {p.key for p in model.metadata_props} >= {"mean", "std", "imgsz"}
    exact = np.concatenate([answer(data, x) for x in feeds])
    ours = np.concatenate([answer(quantised, x) for x in feeds])
    assert agreement(ours, exact) > 0.9
    again, _ = to_int8(data, iter(feeds))
    assert again == quantised


def test_int8_with_half_keeps_the_pattern_in_fp32(network):
    data, feeds = network
    mixed, receipt = to_int8(data, feeds, half=True)
    found, nodes = types(mixed)
    assert HALF in found.values() and INT8 in found.values()
    for name in receipt["quantised"]:
        assert {found[i] for i in nodes[name].input} == {FLOAT}
        assert f"{name} ({nodes[name].op_type}: INT8)" in receipt["kept"]
    assert not any("QuantizeLinear" in k for k in receipt["kept"])
    exact = np.concatenate([answer(data, x) for x in feeds])
    ours = np.concatenate([answer(as_rounded_float32(mixed), x) for x in feeds])
    assert agreement(ours, exact) > 0.9
    assert fp16_overflow(mixed, feeds) == []


def of_opset(opset):
    """Two convolutions; between them, operators whose axes are attributes up to opset 12. And x."""
    rng = np.random.default_rng(0)
    nodes = [
        ("Conv", ["x", "w"], ["a"], {}),
        ("Unsqueeze", ["a"], ["b"], {"axes": [0]}),
        ("Squeeze", ["b"], ["c"], {"axes": [0]}),
        ("Conv", ["c", "v"], ["y"], {}),
    ]
    shapes = {"w": (5, 3, 1, 1), "v": (4, 5, 1, 1)}
    weights = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    model = onnx.load_from_string(graph(nodes, weights, opset=opset))
    model.metadata_props.add(key="mean", value="0.5, 0.5, 0.5")
    return model.SerializeToString(), rng.standard_normal((1, 3, 8, 8)).astype(np.float32)


def test_int8_of_opsets_without_axes():
    """Scales per channel need the axis that DequantizeLinear has from opset 13 on."""
    for opset in (11, 12):
        for half in (False, True):
            with case(f"opset {opset}, half={half}"):
                data, x = of_opset(opset)
                quantised, receipt = to_int8(data, [x], half=half)
                model = onnx.load_from_string(quantised)
                assert [o.version for o in model.opset_import] == [13]
                assert [p.key for p in model.metadata_props] == ["mean"]
                assert len(receipt["quantised"]) == 2
                exact = answer(data, x)
                error = np.abs(answer(as_rounded_float32(quantised), x) - exact).max()
                assert error < 0.02 * np.abs(exact).max()
    data, x = of_opset(10)
    with pytest.raises(InputError, match="opset 10; INT8 wants 11 or later\n  fix: export"):
        to_int8(data, [x])


def test_opset_that_cannot_be_converted_is_refused(monkeypatch):
    from onnx import version_converter

    def refuse(*_):
        raise RuntimeError("no adapter for Fancy\nand more")

    data, x = of_opset(12)
    monkeypatch.setattr(version_converter, "convert_version", refuse)
    wanted = "opset 12, and cannot be converted to 13, which INT8 wants: no adapter for Fancy\n"
    with pytest.raises(InputError, match=wanted):
        to_int8(data, [x])


def test_int8_refusals(network):
    data, feeds = network
    with pytest.raises(InputError, match="pictures to calibrate with, got none\n  fix: --data"):
        to_int8(data, [])
    free = graph([("Relu", ["x"], ["y"], {})], shape=(1, 3, "h", "w"))
    with pytest.raises(InputError, match="wants a fixed input size; x is free"):
        to_int8(free, feeds)
    relu = graph([("Relu", ["x"], ["y"], {})])
    with pytest.raises(InputError, match="none of Conv, MatMul, Gemm to quantise"):
        to_int8(relu, [np.ones((1, 3, 8, 8), np.float32)])
