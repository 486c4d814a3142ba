"""export/precision.py: FP16 and INT8 graphs, what stays FP32, and overflow that runtimes hide."""

import numpy as np
import pytest
from developer_data import needs_data
from scenes import scene

from benchmarks.quality import datasets
from export.half import HALF_MAX, as_rounded_float32, fp16_overflow, to_half
from export.int8 import to_int8
from export.models import PriorModel
from export.models.onnx_file import onnx_file
from export.to_onnx import freeze
from runtime.engines.onnx import OnnxEngine
from runtime.errors import BundleError, InputError
from runtime.prior.preprocess import Preprocess

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402 (after importorskip)

FLOAT, HALF, INT8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8
SIZE = (32, 64)


def graph(nodes, tensors=(), *, shape=(1, 3, 8, 8), out="y", opset=18, out_type=FLOAT):
    """A serialised model from "x" to ``out``; nodes are (operator, inputs, outputs, attributes)."""
    made = [
        helper.make_node(kind, ins, outs, name=f"{kind.lower()}{i}", **attributes)
        for i, (kind, ins, outs, attributes) in enumerate(nodes)
    ]
    inner = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, shape)],
        [helper.make_tensor_value_info(out, out_type, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in dict(tensors).items()],
    )
    model = helper.make_model(inner, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model).SerializeToString()


def answer(data, x):
    with OnnxEngine(data) as engine:
        return engine(x)[0]


def types(data):
    """Element type of every tensor, and the nodes by name."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(data), strict_mode=True)
    found = {t.name: t.data_type for t in model.graph.initializer}
    for v in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        found[v.name] = v.type.tensor_type.elem_type
    return found, {n.name: n for n in model.graph.node}


def agreement(a, b):
    return (a.argmax(1) == b.argmax(1)).mean()


def tiny(*, where="", scale=1.0):
    """A small SegFormer in ONNX. ``scale`` multiplies the activations of one layer and divides the
    next weights, which leaves the answer as it is and takes them out of FP16's range."""
    torch = pytest.importorskip("torch", reason="networks are exported by torch")
    pytest.importorskip("transformers", reason="needs transformers")
    from exporting import tiny_segformer

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = tiny_segformer("abcde", seed=0)

        def forward(self, images):
            return self.network(images).logits

    module = Logits()
    head = module.network.decode_head
    head.classifier.weight.data.mul_(1000)
    fuse = head.linear_fuse.weight.data
    if where == "before the concatenation":
        head.linear_projections[0].proj.weight.data.mul_(scale)
        head.linear_projections[0].proj.bias.data.mul_(scale)
        # Stages are in reverse order.
        fuse[:, -module.network.config.decoder_hidden_size :] /= scale
    elif where == "before the classifier":
        head.batch_norm.weight.data.mul_(scale)
        head.batch_norm.bias.data.mul_(scale)
        head.classifier.weight.data.div_(scale)
    pp = Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3, height=SIZE[0], width=SIZE[1])
    return freeze(PriorModel(name="tiny", module=module, preprocess=pp)), pp


def pictures(pp, count=2):
    images = [scene(60, 90, seed=seed)[0] for seed in range(count)]
    return [pp((255 * image).astype(np.uint8)) for image in images]


@pytest.fixture(scope="module")
def network():
    data, pp = tiny()
    return data, pictures(pp)


# FP16


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


@pytest.mark.parametrize(
    "operator, attributes",
    [
        ("Softmax", {"axis": 1}),
        ("GlobalAveragePool", {}),
        ("ReduceMean", {}),
        ("ReduceMax", {}),
        ("Exp", {}),
        ("Sqrt", {}),
    ],
)
def test_delicate_operators_stay_fp32(operator, attributes):
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


@pytest.mark.parametrize(
    "weight, fits",
    [(1.0, True), (60_000.0, True), (70_000.0, False), (1e-6, False), (0.0, True), (np.inf, True)],
)
def test_constants_that_fp16_cannot_hold_stay(weight, fits):
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


# INT8


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


# Engines are really built


def build(data, capabilities=("SM86",)):
    """Layers by output type in TensorRT for RTX's network, and the size of the engine."""
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flag)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(data), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(capabilities)
    for i, name in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    ports = [network.get_input(0), network.get_output(0)]
    assert {p.dtype for p in ports} == {trt.DataType.FLOAT}
    plan = builder.build_serialized_network(network, config)
    counts = {}
    for layer in layers:
        kind = layer.get_output(0).dtype.name
        counts[kind] = counts.get(kind, 0) + 1
    return counts, plan.nbytes


@pytest.mark.parametrize("precision", ["half", "int8", "int8 half"])
def test_tensorrt_for_rtx_builds_it(network, precision):
    data, feeds = network
    if precision == "half":
        built = to_half(data)[0]
    else:
        built = to_int8(data, feeds, half="half" in precision)[0]
    counts, size = build(built)
    assert size > 10_000
    assert ("INT8" in counts) == ("int8" in precision)
    assert ("HALF" in counts) == ("half" in precision)
    if precision == "half":
        assert counts["HALF"] > 2 * counts["FLOAT"]


# Real priors on real pictures


@needs_data
@pytest.mark.data
@pytest.mark.parametrize("precision, least", [("half", 0.99), ("int8", 0.93), ("int8 half", 0.93)])
def test_real_prior_keeps_its_labels(precision, least):
    import cv2

    model = onnx_file(datasets.data_root() / "priors" / "espnetv2_s0.5_voc_256x256.onnx")
    data = freeze(model)
    photos = sorted((datasets.data_root() / "coco_mini" / "images").glob("*.jpg"))
    feeds = [model.preprocess(cv2.imread(str(p))[..., ::-1].copy()) for p in photos[:20]]
    if precision == "half":
        lower = to_half(data)[0]
    else:
        lower = to_int8(data, feeds[4:], half="half" in precision)[0]
    assert fp16_overflow(lower, feeds[:4]) == []
    agreed = [agreement(answer(as_rounded_float32(lower), x), answer(data, x)) for x in feeds[:4]]
    assert np.mean(agreed) > least
    build(lower)
