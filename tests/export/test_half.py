"""FP16 graphs: what stays FP32, and overflow that runtimes hide."""

import numpy as np
import pytest
from cases import case
from graphs_of_precision import FLOAT, HALF, agreement, answer, graph, tiny, types

from export.half import HALF_MAX, as_rounded_float32, fp16_overflow, to_half
from runtime.engines.onnx import OnnxEngine
from runtime.errors import BundleError, InputError

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")
from onnx import TensorProto, helper  # noqa: E402 (after importorskip)


def test_half_has_fp32_ports_and_fp16_inside(network):
    data, feeds = network
    half, kept = to_half(data)
    found, nodes = types(half)
    assert found["images"] == found["logits"] == FLOAT
    for name, node in nodes.items():
        ins = {found[i] for i in node.input if found.get(i) in (FLOAT, HALF)}
        if node.op_type in ("LayerNormalization", "Softmax"):
            assert ins == {FLOAT} and f"{name} ({node.op_type})" in kept
        elif node.op_type in ("Conv", "MatMul", "Gemm", "Add", "Erf", "Resize"):
            assert ins - {FLOAT if node.op_type == "Resize" else None} == {HALF}, name
    assert len(kept) == sum(n.op_type in ("LayerNormalization", "Softmax") for n in nodes.values())
    assert len(half) < 0.75 * len(data)
    for x in feeds:
        exact = answer(data, x)
        for version in (half, as_rounded_float32(half)):
            ours = answer(version, x)
            assert 0 < np.abs(ours - exact).max() < 5e-3 * np.abs(exact).max()
            assert agreement(ours, exact) > 0.99
    assert fp16_overflow(half, feeds) == []


def test_rounding_is_that_of_numpy():
    """Each FP16 operator in FP32, then rounded: the emulation against NumPy, bit for bit."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 3, 8, 8), np.float32)
    w = rng.standard_normal((1, 3, 1, 1)).astype(np.float32)
    data = graph(
        [
            ("Mul", ["x", "w"], ["a"], {}),
            ("Add", ["a", "x"], ["b"], {}),
            ("Relu", ["b"], ["y"], {}),
        ],
        {"w": w},
    )
    half, kept = to_half(data)
    assert kept == []
    xh, wh = x.astype(np.float16), w.astype(np.float16)
    wanted = np.maximum(xh * wh + xh, 0).astype(np.float32)
    np.testing.assert_array_equal(answer(as_rounded_float32(half), x), wanted)
    assert (answer(data, x) != wanted).any()


DELICATE = [
    ("Softmax", {"axis": 1}),
    ("GlobalAveragePool", {}),
    ("ReduceMean", {}),
    ("ReduceMax", {}),
    ("Exp", {}),
    ("Sqrt", {}),
]


def test_delicate_operators_stay_fp32():
    for operator, attributes in DELICATE:
        with case(operator):
            data = graph([("Relu", ["x"], ["a"], {}), (operator, ["a"], ["b"], attributes),
                          ("Relu", ["b"], ["y"], {})])  # fmt: skip
            half, kept = to_half(data)
            assert kept == [f"{operator.lower()}1 ({operator})"]
            found, nodes = types(half)
            assert found[nodes["relu0"].output[0]] == HALF == found[nodes["relu2"].input[0]]
            assert found[nodes[f"{operator.lower()}1"].output[0]] == FLOAT
            x = np.random.default_rng(0).standard_normal((1, 3, 8, 8), np.float32)
            np.testing.assert_allclose(answer(half, x), answer(data, x), rtol=2e-3)


def test_between_fp32_nodes_nothing_is_cast():
    """A normalisation spelled out: its variance and epsilon stay FP32."""
    nodes = [
        ("ReduceMean", ["x"], ["mean"], {}),
        ("Sub", ["x", "mean"], ["d"], {}),
        ("Pow", ["d", "two"], ["square"], {}),
        ("ReduceMean", ["square"], ["variance"], {}),
        ("Add", ["variance", "eps"], ["safe"], {}),
        ("Sqrt", ["safe"], ["deviation"], {}),
        ("Div", ["d", "deviation"], ["y"], {}),
    ]
    data = graph(nodes, {"two": np.float32(2), "eps": np.float32(1e-5)})
    half, kept = to_half(data)
    assert "add4 (Add: between FP32 nodes)" in kept or "add4 (Add: eps does not fit FP16)" in kept
    assert not any(k.startswith(("div", "sub")) for k in kept)
    x = 300 + 0.5 * np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    assert np.isfinite(answer(as_rounded_float32(half), x)).all()


def test_constants_that_fp16_cannot_hold_stay():
    for weight, fits in [
        (1.0, True),
        (60_000.0, True),
        (70_000.0, False),
        (1e-6, False),
        (0.0, True),
        (np.inf, True),
    ]:
        with case(weight):
            w = np.full((1, 3, 1, 1), weight, np.float32)
            half, kept = to_half(graph([("Add", ["x", "w"], ["y"], {})], {"w": w}))
            assert kept == ([] if fits else ["add0 (Add: w does not fit FP16)"])
            x = np.zeros((1, 3, 8, 8), np.float32)
            np.testing.assert_allclose(answer(half, x), x + w, rtol=1e-3)


def test_shape_arithmetic_stays_exact():
    """Sizes above 2048 have no FP16 number of their own."""
    nodes = [
        ("Shape", ["x"], ["shape"], {}),
        ("Cast", ["shape"], ["sides"], {"to": FLOAT}),
        ("Mul", ["sides", "two"], ["twice"], {}),
        ("Cast", ["twice"], ["target"], {"to": TensorProto.INT64}),
        ("Relu", ["x"], ["positive"], {}),
        ("Resize", ["positive", "", "", "target"], ["y"], {"mode": "nearest"}),
    ]
    two = np.array([1, 1, 1, 2], np.float32)
    data = graph(nodes, {"two": two}, shape=(1, 1, 1, "w"))
    half, kept = to_half(data)
    assert kept == ["cast1 (Cast)", "mul2 (Mul: shape arithmetic)", "cast3 (Cast)"]
    x = np.random.default_rng(0).standard_normal((1, 1, 1, 2051), np.float32)
    np.testing.assert_allclose(answer(half, x), answer(data, x), rtol=1e-3)
    assert answer(half, x).shape == (1, 1, 1, 4102)


def test_tensors_with_several_users_and_taken_names():
    """One tensor wanted in both forms, an output that others use, a name that is taken."""
    nodes = [
        ("Relu", ["x"], ["a"], {}),
        ("Exp", ["a"], ["a_float"], {}),
        ("Mul", ["a", "w"], ["b"], {}),
        ("Mul", ["w", "a_float"], ["c"], {}),
        ("Add", ["b", "c"], ["y"], {}),
        ("Softmax", ["w"], ["w_half"], {"axis": 1}),
        ("Add", ["y", "w_half"], ["z"], {}),
    ]
    w = np.random.default_rng(1).standard_normal((1, 3, 1, 1)).astype(np.float32)
    data = graph(nodes, {"w": w}, out="y")
    model = onnx.load_from_string(data)
    model.graph.output.append(helper.make_tensor_value_info("z", FLOAT, (1, 3, 8, 8)))
    half, _ = to_half(model.SerializeToString())
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8), np.float32)
    with OnnxEngine(model.SerializeToString()) as exact, OnnxEngine(half) as ours:
        assert [p.name for p in ours.outputs] == ["y", "z"]
        for a, b in zip(exact(x), ours(x), strict=True):
            np.testing.assert_allclose(a, b, atol=5e-3)


def test_labels_stay_integers():
    data = graph([("Mul", ["x", "x"], ["s"], {}), ("ArgMax", ["s"], ["y"], {"axis": 1})],
                 out_type=TensorProto.INT64)  # fmt: skip
    half, _ = to_half(data)
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8), np.float32)
    assert (answer(half, x) == answer(data, x)).mean() > 0.98


def test_what_cannot_become_half():
    data = graph([("Relu", ["x"], ["y"], {})])
    with pytest.raises(InputError, match="has FP16 tensors already; wanted FP32"):
        to_half(to_half(data)[0])
    with pytest.raises(BundleError, match="no ONNX model"):
        to_half(b"\xff\xff\xff")
    then = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["t"])], "then", [],
        [helper.make_tensor_value_info("t", FLOAT, (1, 3, 8, 8))])  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Abs", ["x"], ["e"])], "else", [],
        [helper.make_tensor_value_info("e", FLOAT, (1, 3, 8, 8))])  # fmt: skip
    branch = ("If", ["c"], ["y"], {"then_branch": then, "else_branch": other})
    with pytest.raises(InputError, match="has If; lower precision wants a plain graph\n  fix: "):
        to_half(graph([branch], {"c": np.array(True)}))
    bad = onnx.load_from_string(graph([("MatMul", ["x", "w"], ["y"], {})],
                                      {"w": np.ones((3, 3), np.float32)}))  # fmt: skip
    with pytest.raises(BundleError, match="types cannot be inferred"):
        to_half(bad.SerializeToString())


# Overflow


@pytest.mark.parametrize(
    "where, scale", [("before the classifier", 2e4), ("before the concatenation", 1e5)]
)
def test_planted_overflow_is_caught_though_onnx_runtime_may_hide_it(network, where, scale):
    """The same network in exact arithmetic, one layer much larger: infinite on a GPU.

    ONNX Runtime's CPU provider hides it between convolutions, at every level of optimisation.
    """
    import onnxruntime

    healthy, feeds = network
    data, _ = tiny(where=where, scale=scale)
    half, kept = to_half(data)
    assert not any("fit" in node for node in kept)  # all weights are in range
    x = feeds[0]
    exact = answer(data, x)
    np.testing.assert_allclose(exact, answer(healthy, x), atol=1e-4 * np.abs(exact).max())

    assert not np.isfinite(answer(as_rounded_float32(half), x)).all()
    found = fp16_overflow(half, feeds)
    assert found and found[0].largest > HALF_MAX and found[0].node
    assert fp16_overflow(to_half(healthy)[0], feeds) == []

    for name in ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL"):
        options = onnxruntime.SessionOptions()
        level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{name}")
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(half, options, providers=["CPUExecutionProvider"])
        plain = session.run(None, {"images": x})[0]
        if where == "before the concatenation" or not np.isfinite(plain).all():
            continue  # copying operators have FP16 kernels: here a plain run may see it
        assert agreement(plain, exact) > 0.99, "hidden: it looks right"


def test_overflow_is_measured_and_ordered():
    w = np.full((1, 3, 1, 1), 300, np.float32)
    nodes = [
        ("Mul", ["x", "w"], ["a"], {}),
        ("Mul", ["a", "w"], ["b"], {}),
        ("Div", ["b", "w"], ["y"], {}),
    ]
    half, _ = to_half(graph(nodes, {"w": w}))
    small, large = (np.full((1, 3, 8, 8), v, np.float32) for v in (0.1, 2.0))
    assert fp16_overflow(half, [small]) == []
    found = fp16_overflow(half, [small, large])
    assert [(f.tensor, f.node) for f in found] == [("b", "mul1")]
    assert found[0].largest == pytest.approx(180_000, rel=1e-3)
    assert [f.tensor for f in fp16_overflow(half, [large], limit=500)] == ["a", "b", "y_half"]
    assert fp16_overflow(graph(nodes, {"w": w}), [large]) == []  # FP32 has none
    near = np.full((1, 3, 8, 8), 0.5, np.float32)  # 45,000: finite, without headroom
    assert np.isfinite(answer(as_rounded_float32(half), near)).all()
    assert [f.tensor for f in fp16_overflow(half, [near])] == ["b"]


def test_values_that_are_infinite_in_fp32_are_reported():
    w = np.full((1, 3, 1, 1), 6e4, np.float32)
    nodes, last = [], "x"
    for i in range(10):
        nodes.append(("Mul", [last, "w"], [f"m{i}"], {}))
        last = f"m{i}"
    half, _ = to_half(graph([*nodes, ("Relu", [last], ["y"], {})], {"w": w}))
    found = fp16_overflow(half, [np.ones((1, 3, 8, 8), np.float32)])
    assert found[0].tensor == "m0" and found[-1].largest == np.inf
