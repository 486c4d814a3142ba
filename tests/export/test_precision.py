"""Graphs of every precision: TensorRT builds them, and real priors keep their labels."""

import numpy as np
import pytest
from cases import case
from developer_data import needs_data
from graphs_of_precision import agreement, answer

from benchmarks.quality import datasets
from export.half import as_rounded_float32, fp16_overflow, to_half
from export.int8 import to_int8
from export.models.onnx_file import onnx_file
from export.to_onnx import freeze

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")


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
def test_real_prior_keeps_its_labels():
    for precision, least in [("half", 0.99), ("int8", 0.93), ("int8 half", 0.93)]:
        with case(precision):
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
            agreed = [
                agreement(answer(as_rounded_float32(lower), x), answer(data, x)) for x in feeds[:4]
            ]
            assert np.mean(agreed) > least
            build(lower)
