"""export/models: the choice of a model, and models of the user's own."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from cases import case
from checkpoints import picture, small_onnx

from export.models import PriorModel
from export.models.load import load_model
from export.models.onnx_file import onnx_file
from export.models.segformer import segformer
from export.to_onnx import freeze
from runtime.engines.onnx import OnnxEngine
from runtime.errors import InputError, MissingBackend, VerificationFailed
from runtime.prior.preprocess import Preprocess

torch = pytest.importorskip("torch", reason="networks are exported by torch: pip install torch")
onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("onnxslim", reason="needs onnxslim")


# The choice of a model


def test_unknown_model_suggests_the_nearest():
    other = "export the network to ONNX and pass --model NAME.onnx"
    for text, near in [
        ("segfromer", "segformer"),
        ("Kmeans", "kmeans"),
        ("k-means", "kmeans"),
        ("yolo", None),
    ]:
        with case(text):
            with pytest.raises(
                InputError, match="wanted segformer, kmeans, a path ending"
            ) as caught:
                load_model(text)
            assert caught.value.fix == (f"did you mean --model {near}?" if near else other)


def test_a_picture_is_no_model():
    for text in ("x.jpg", "photos/Street.PNG"):
        with case(text), pytest.raises(InputError, match=r"\n  fix: pass pictures by --pictures"):
            load_model(text)


def test_weights_and_size_where_they_mean_nothing():
    with pytest.raises(
        InputError, match="weights are for segformer and runs of the trainer; model"
    ):
        load_model("kmeans", "x")
    with pytest.raises(InputError, match="imgsz is for networks; kmeans has none"):
        load_model("kmeans", None, (32, 32))
    with pytest.raises(InputError, match=r"imgsz is .*wanted"):
        load_model("segformer", None, (32, 0))
    model = load_model("kmeans")
    assert (model.module, model.onnx, model.preprocess, model.trained) == (None, None, None, True)
    with pytest.raises(InputError, match="kmeans is no network; there is nothing to freeze"):
        freeze(model)


def test_missing_packages_say_what_to_install(monkeypatch, whole, tmp_path):
    path = small_onnx(tmp_path / "a.onnx")
    model = onnx_file(path)
    for package, call in (
        ("transformers", lambda: segformer(whole)),
        ("onnx", lambda: onnx_file(path)),
        ("onnx", lambda: freeze(model)),
        ("onnxslim", lambda: freeze(model)),
        ("onnxscript", lambda: freeze(segformer(whole))),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(MissingBackend, match=r"fix: pip install 'dynaguide-edge\[export\]"):
                call()


USERS = """
import torch
from export.models import PriorModel
from runtime.prior.preprocess import Preprocess

class Net(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x, -x], 1)

def net(imgsz):
    height, width = imgsz or (32, 64)
    pp = Preprocess(mean=(0, 0, 0), std=(1, 1, 1), height=height, width=width, color="bgr")
    return PriorModel(name="mine", module=Net(), preprocess=pp, names=list("abcdef"), opset=18)

def no_size():
    return None

def wrong(imgsz):
    return Net()

number = 3
"""


def test_users_own_model(tmp_path, monkeypatch):
    (tmp_path / "users_nets.py").write_text(USERS)
    (tmp_path / "broken_nets.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    model = load_model("users_nets:net", None, 48)
    with OnnxEngine(freeze(model)) as engine:
        assert [p.shape for p in engine.inputs] == [(1, 3, 48, 48)]
        x = model.preprocess(picture())
        np.testing.assert_allclose(engine(x)[0], np.concatenate([x, -x], 1))
        assert engine.metadata["input_layout"] == "NCHW BGR"
    for text, match in (
        ("users_nets:nothing", "has no attribute 'nothing'\n  fix: name a function"),
        ("users_nets:no_size", "cannot be called with the input size: .*\n  fix: def NAME"),
        ("no_such_file:net", "cannot be imported: No module named 'no_such_file'"),
        ("broken_nets:net", "cannot be imported: No module named 'no_such_package'"),
        ("users nets:net", "cannot be imported: "),
        ("users_nets:number", "is a int; wanted a function"),
        ("users_nets:wrong", "returned a Net; wanted an export.models.PriorModel"),
    ):
        with pytest.raises(InputError, match=match):
            load_model(text)


class Answers(torch.nn.Module):
    """Gives what ``change`` makes of one channel."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x[:, :1])


OTHER_ANSWERS = [
    (lambda x: (x, x), None, r"net returns a tuple; wanted one tensor: .*\n  fix: wrap it"),
    (lambda x: {"out": x}, None, r"net returns a dict; wanted one tensor"),
    (lambda x: x[0, 0], None, r"net returns \(32, 48\); wanted one tensor"),
    (lambda x: x, ["a", "b"], r"net returns 1 classes, but has 2 names\n  fix: "),
    (lambda x: x.reshape(7, -1), None, r"net fails on \(1, 3, 32, 48\) float32: .*\n  fix: "),
]


def test_modules_that_answer_otherwise():
    for change, names, match in OTHER_ANSWERS:
        with case(match):
            pp = Preprocess(mean=(0, 0, 0), std=(1, 1, 1), height=32, width=48)
            with pytest.raises(InputError, match=match):
                freeze(PriorModel(name="net", module=Answers(change), preprocess=pp, names=names))


def test_scores_that_are_no_numbers():
    pp = Preprocess(mean=(0, 0, 0), std=(1, 1, 1), height=32, width=48)
    model = PriorModel(name="net", module=Answers(lambda x: x * torch.nan), preprocess=pp)
    with pytest.raises(VerificationFailed, match=r"net returns NaN or infinite scores\n  fix: "):
        freeze(model)


def test_prior_model_checks_itself():
    pp = Preprocess(mean=(0, 0, 0), std=(1, 1, 1), height=32, width=32)
    long = replace(pp, resize="long_side")
    for changes, match in (
        ({"module": torch.nn.Identity(), "onnx": b"x", "preprocess": pp}, "not both"),
        ({"onnx": b"x"}, "and its preprocess"),
        ({"preprocess": pp}, "and its preprocess"),
        ({"onnx": b"x", "preprocess": long}, "resizes by 'long_side'; wanted 'stretch'"),
        ({"onnx": b"x", "preprocess": pp, "output": "scores"}, "output is 'scores'; wanted logits"),
        ({"onnx": "x.onnx", "preprocess": pp}, r"onnx is a str; wanted bytes\n  fix: .*read_bytes"),
        ({"names": {0: "a", 2: "b"}}, "prior p: names has the class numbers"),
        ({"names": "ab"}, "prior p: names is 'ab', which is neither JSON nor a Python literal"),
    ):
        with pytest.raises(InputError, match=match):
            PriorModel(name="p", **changes)
    for names in (["a", "b"], ("a", "b"), {1: "b", 0: "a"}, {"0": "a", "1": "b"}):
        assert PriorModel(name="p", names=names).names == ["a", "b"]
