"""Small checkpoints and ONNX files, and ways to change them."""

import json

import numpy as np
import pytest
from scenes import scene

torch = pytest.importorskip("torch", reason="networks are exported by torch: pip install torch")
onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("onnxslim", reason="needs onnxslim")
from onnx import helper, numpy_helper  # noqa: E402 (after importorskip)

SIZE = (64, 96)
NAMES = ["wall", "sky", "it's grass", "road", "tree"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSOR = {
    "image_processor_type": "SegformerFeatureExtractor",
    "do_resize": True,
    "size": {"height": 64, "width": 96},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [*MEAN],
    "image_std": [*STD],
    "do_reduce_labels": True,
}
META = {"mean": json.dumps(MEAN), "std": json.dumps(STD)}


def picture(height=120, width=160):
    return (255 * scene(height, width)[0]).astype(np.uint8)


def run(model, x):
    with torch.no_grad():
        return model.module(torch.from_numpy(x)).numpy()


def small_onnx(
    path, *, shape=(1, 3, "h", "w"), inside=("Conv",), domain="", outside=None, dtype=1, **meta
):
    """A file with one node for each operator inside, a 1x1 convolution first; returns its path."""
    weight = numpy_helper.from_array(np.eye(4, 3, dtype=np.float32)[..., None, None], "weight")
    nodes, last = [], "picture"
    for i, operator in enumerate(inside):
        names = [last, "weight"] if operator == "Conv" else [last]
        where = "" if operator == "Conv" else domain
        nodes.append(helper.make_node(operator, names, [f"t{i}"], name=f"n{i}", domain=where))
        last = f"t{i}"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("picture", dtype, shape)],
        [helper.make_tensor_value_info(last, dtype, None)],
        [weight],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(domain or "ai.onnx.ml", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    helper.set_model_props(model, {k: v for k, v in (META | meta).items() if v is not None})
    model.doc_string = graph.doc_string = nodes[0].doc_string = "made in /home/someone/secret"
    if outside is None:
        onnx.save(model, path)
    else:
        onnx.save(model, path, save_as_external_data=True, location=outside, size_threshold=0)
    return path
