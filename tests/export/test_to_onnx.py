"""export/to_onnx.py: the frozen network is the network, and its file is complete."""

import ast
import json
import os
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import NAMES, SIZE, picture, run

from export.models import PriorModel
from export.models.segformer import segformer
from export.to_onnx import freeze, frozen_preprocess
from runtime.engines.onnx import OnnxEngine
from runtime.errors import InputError
from runtime.prior.preprocess import Preprocess
from sdk import Segmenter

torch = pytest.importorskip("torch", reason="networks are exported by torch: pip install torch")
onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("onnxslim", reason="needs onnxslim")


@pytest.fixture(scope="module")
def frozen(whole):
    return freeze(segformer(whole))


# Freezing a module


def test_frozen_network_is_the_network(whole, frozen):
    model = segformer(whole)
    with OnnxEngine(frozen) as engine:
        assert [(p.name, p.shape) for p in engine.inputs] == [("images", (1, 3, *SIZE))]
        assert [(p.name, p.shape) for p in engine.outputs] == [("logits", (1, 5, 16, 24))]
        x = model.preprocess(picture())
        exact, ours = run(model, x), engine(x)[0]
    np.testing.assert_allclose(ours, exact, atol=1e-5 * np.abs(exact).max())
    np.testing.assert_array_equal(ours.argmax(1), exact.argmax(1))


def test_same_model_gives_the_same_bytes(whole, frozen):
    assert freeze(segformer(whole)) == frozen


def test_nothing_of_this_machine_is_in_the_file(whole, frozen):
    model = onnx.load_from_string(frozen)
    onnx.checker.check_model(model, full_check=True)
    assert {o.domain: o.version for o in model.opset_import} == {"": 18}
    for text in (str(whole.parent), os.getcwd(), os.path.expanduser("~"), "site-packages", ".py"):
        assert text.encode() not in frozen
    nodes = model.graph.node
    assert len(nodes) > 50 and not any(n.doc_string or n.metadata_props for n in nodes)
    assert not model.functions and not model.graph.value_info
    assert not any(t.data_location for t in model.graph.initializer)


def test_metadata_is_what_others_parse(frozen):
    with OnnxEngine(frozen) as engine:
        meta = engine.metadata
    users = "description author version license task batch imgsz names".split()
    assert set(users) <= set(meta)
    assert json.loads(meta["imgsz"]) == [64, 96] and meta["batch"] == "1"
    assert ast.literal_eval(meta["names"]) == dict(enumerate(NAMES))
    assert json.loads(meta["classes"]) == NAMES
    assert "research" in meta["license"] and meta["output"] == "logits"


def test_frozen_file_works_without_a_bundle(whole, frozen, tmp_path):
    model = segformer(whole)
    (tmp_path / "prior.onnx").write_bytes(frozen)
    image = picture()
    result = Segmenter(str(tmp_path / "prior.onnx"), refine=None)(image)
    assert result.names == NAMES
    wanted = run(model, model.preprocess(image))[0]
    with OnnxEngine(frozen) as engine:
        assert Preprocess.from_metadata(engine.metadata, "x", SIZE) == replace(
            model.preprocess, long_side=96
        )
    seen = np.unique(result.labels)
    assert set(seen) <= set(np.unique(wanted.argmax(0)))


def test_dynamic_network_takes_other_sizes(whole):
    model = segformer(whole)
    data = freeze(model, dynamic=True)
    with OnnxEngine(data) as engine:
        assert engine.inputs[0].shape == (1, 3, "height", "width")
        assert len(set(engine.outputs[0].shape)) == 4  # no two free sides share a name
        for size in ((64, 96), (96, 64), (32, 160), (128, 128)):
            x = np.random.default_rng(0).standard_normal((1, 3, *size), np.float32)
            exact = run(model, x)
            np.testing.assert_allclose(engine(x)[0], exact, atol=1e-5 * np.abs(exact).max())
        own = Preprocess.from_metadata(engine.metadata, "x")
    assert own == frozen_preprocess(model, dynamic=True)
    assert own.size(480, 640) == (64, 96) and own.resize == "long_side"
    with pytest.raises(InputError, match=r"imgsz is \(60, 96\).*wants multiples of 32, at least"):
        freeze(model, imgsz=(60, 96), dynamic=True)


def test_size_and_simplifying_can_be_chosen(whole, frozen):
    plain = freeze(segformer(whole), imgsz=(32, 64), simplify=False)
    with OnnxEngine(plain) as engine:
        assert engine.inputs[0].shape == (1, 3, 32, 64)
    nodes = [len(onnx.load_from_string(d).graph.node) for d in (plain, frozen)]
    assert nodes[1] < nodes[0]


def test_module_that_torch_cannot_export():
    class Net(torch.nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    pp = Preprocess(mean=(0, 0, 0), std=(1, 1, 1), height=32, width=32)
    with pytest.raises(InputError, match=r"torch cannot export p at \(32, 32\): .*\n  fix: "):
        freeze(PriorModel(name="p", module=Net(), preprocess=pp))
