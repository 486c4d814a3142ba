"""Graphs of every precision: TensorRT builds them, and real priors keep their labels."""

import re

import numpy as np
import pytest
from cases import case
from developer_data import needs_data
from graphs_of_precision import FLOAT, HALF, agreement, answer, graph, types

from benchmarks.quality import datasets
from export.half import as_rounded_float32, fp16_overflow, to_half
from export.int8 import to_int8
from export.models.onnx_file import onnx_file
from export.to_onnx import freeze

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")


def lowered(precision, data, feeds):
    """The network in "half", "int8" or "int8 half"."""
    if precision == "half":
        return to_half(data)[0]
    return to_int8(data, feeds, half="half" in precision)[0]


def test_inputs_and_outputs_are_fp32_in_every_precision(network):
    data, feeds = network
    for precision in ["half", "int8", "int8 half"]:
        with case(precision):
            built = lowered(precision, data, feeds)
            inner = onnx.load_from_string(built).graph
            assert {types(built)[0][p.name] for p in (*inner.input, *inner.output)} == {FLOAT}
            assert answer(built, feeds[0]).dtype == np.float32


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


def test_tensorrt_for_rtx_builds_it(network):
    for precision in ["half", "int8", "int8 half"]:
        with case(precision):
            data, feeds = network
            built = lowered(precision, data, feeds)
            counts, size = build(built)
            assert size > 10_000
            assert ("INT8" in counts) == ("int8" in precision)
            assert ("HALF" in counts) == ("half" in precision)
            if precision == "half":
                assert counts["HALF"] > 2 * counts["FLOAT"]


def quantised_chain(kind):
    """Three convolutions in INT8, one scale per output channel, with bias and ReLU, in FP32 or FP16
    (``kind``). The scales have that type, too."""
    number = {FLOAT: np.float32, HALF: np.float16}[kind]
    rng = np.random.default_rng(0)
    nodes, last = [("Cast", ["x"], ["r0"], {"to": kind})], "r0"
    tensors = {"s": number(0.02), "zero": np.int8(0), "zeros": np.zeros(32, np.int8)}
    for i in range(3):
        tensors[f"w{i}"] = rng.integers(-127, 128, (32, 32, 3, 3)).astype(np.int8)
        tensors[f"t{i}"] = rng.uniform(1e-3, 2e-3, 32).astype(number)
        tensors[f"b{i}"] = rng.standard_normal(32).astype(number)
        nodes += [
            ("QuantizeLinear", [last, "s", "zero"], [f"q{i}"], {}),
            ("DequantizeLinear", [f"q{i}", "s", "zero"], [f"d{i}"], {}),
            ("DequantizeLinear", [f"w{i}", f"t{i}", "zeros"], [f"v{i}"], {"axis": 0}),
            ("Conv", [f"d{i}", f"v{i}", f"b{i}"], [f"c{i}"], {"pads": [1] * 4}),
            ("Relu", [f"c{i}"], [f"r{i + 1}"], {}),
        ]
        last = f"r{i + 1}"
    nodes.append(("Cast", [last], ["y"], {"to": FLOAT}))
    return graph(nodes, tensors, shape=(1, 32, 64, 64), opset=19)


def built_layers(data):
    """Kind, types of inputs and types of outputs of each layer of the engine that TensorRT for RTX
    builds. The builder's log lists them; the engine inspector would need a GPU."""
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13")
    lines = []

    class Log(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)

        def log(self, severity, message):
            lines.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse(data), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None
    pattern = (
        r"^Name: .*?, LayerType: (\w+), Inputs: \[(.*?)\], Constants: .*?, Outputs: \[(.*?)\], T"
    )
    return [
        (kind, *(re.findall(r"Datatype: (\w+)", ports) for ports in (inputs, outputs)))
        for kind, inputs, outputs in re.findall(pattern, "\n".join(lines), re.MULTILINE)
        if kind not in ("signal", "wait")
    ]


def test_fp16_scales_do_not_make_an_engine_of_fewer_layers():
    """Why to_int8 writes FP32 scales also beside FP16: docs/export.md has the numbers of larger
    networks. When this test fails, TensorRT for RTX gains from FP16 scales; measure again."""
    counts = {}
    for kind in (FLOAT, HALF):
        layers = built_layers(quantised_chain(kind))
        products = [(ins, outs) for name, ins, outs in layers if name == "correlation"]
        assert products == 3 * [(["Int8"], ["Float"])]
        counts["FP32" if kind == FLOAT else "FP16"] = len(layers)
    print("layers by the type of the scales:", counts)
    assert counts["FP16"] >= counts["FP32"] > 3


# Real priors on real pictures


@needs_data
@pytest.mark.data
def test_real_prior_keeps_its_labels():
    for precision, least in [("half", 0.99), ("int8", 0.93), ("int8 half", 0.93)]:
        with case(precision):
            import cv2

            model = onnx_file(datasets.data_root() / "priors" / "espnetv2_s0.5_voc_256x256.onnx")
            data = freeze(model)
            photos = sorted((datasets.data_root() / "coco_mini" / "images").glob("*.jpg"))
            feeds = [model.preprocess(cv2.imread(str(p))[..., ::-1].copy()) for p in photos[:20]]
            lower = lowered(precision, data, feeds[4:])
            assert fp16_overflow(lower, feeds[:4]) == []
            agreed = [
                agreement(answer(as_rounded_float32(lower), x), answer(data, x)) for x in feeds[:4]
            ]
            assert np.mean(agreed) > least
            build(lower)
