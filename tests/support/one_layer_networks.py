"""ONNX networks of one layer, whose answer is known, and the metadata that makes them priors."""

import json

import numpy as np
import pytest
from drawn_pictures import COLOURS

onnx = pytest.importorskip("onnx", reason="the networks are made with onnx: pip install onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402 (after importorskip)

FLOAT = TensorProto.FLOAT
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
META = {"mean": json.dumps(MEAN.tolist()), "std": json.dumps(STD.tolist())}
NAMES = ["brick", "grass", "sea", "sand"]  # of COLOURS


def save(
    path,
    weight,
    bias=None,
    *,
    tail=(),
    out=FLOAT,
    inputs=((1, 3, "h", "w"),),
    dtype=FLOAT,
    opset=17,
    ir=8,
    **meta,
):
    """A 1x1 convolution with ``weight`` (C, 3), then the nodes of ``tail``; returns its path.

    ``tail`` holds (operator, attributes, more inputs as arrays); metadata left out is META's, None
    leaves a key out.
    """
    weight = np.asarray(weight, np.float32)
    bias = np.zeros(len(weight)) if bias is None else bias
    tensors = [
        numpy_helper.from_array(weight[..., None, None], "weight"),
        numpy_helper.from_array(np.asarray(bias, np.float32), "bias"),
    ]
    names = [f"image{i or ''}" for i in range(len(inputs))]
    nodes, last = [], "image"
    if dtype != FLOAT:
        nodes.append(helper.make_node("Cast", [last], ["as_float"], to=FLOAT))
        last = "as_float"
    nodes.append(helper.make_node("Conv", [last, "weight", "bias"], ["scores"]))
    last = "scores"
    for i, (operator, attributes, *arrays) in enumerate(tail):
        more = [f"t{i}/input{j}" for j in range(len(arrays))]
        tensors += [numpy_helper.from_array(a, n) for a, n in zip(arrays, more, strict=True)]
        nodes.append(helper.make_node(operator, [last, *more], [f"t{i}"], **attributes))
        last = f"t{i}"
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info(n, dtype, s) for n, s in zip(names, inputs, strict=True)],
        [helper.make_tensor_value_info(last, out, None)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    meta = {k: v for k, v in {**META, **meta}.items() if v is not None}
    helper.set_model_props(
        model, {k: v if isinstance(v, str) else json.dumps(v) for k, v in meta.items()}
    )
    onnx.save(model, path)
    return path


def nearest_colour():
    """Weight and bias that score each of COLOURS by its distance, from normalised input."""
    c = COLOURS / 255
    # -|x - c|^2 + |x|^2 = 2 c.x - |c|^2, with x = std * input + mean
    return 40 * 2 * c * STD, 40 * (2 * c @ MEAN - (c**2).sum(1))
