"""Small graphs whose precision is changed, and what ONNX Runtime answers for them."""

import numpy as np
import pytest
from scenes import scene

from export.models import PriorModel
from export.to_onnx import freeze
from runtime.engines.onnx import OnnxEngine
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
