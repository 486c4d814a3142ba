"""Networks that were exported in training mode, or return random values, are refused by name."""

import numpy as np
import pytest
from cases import case
from one_layer_networks import nearest_colour, save

from export.models import PriorModel
from export.models.onnx_file import onnx_file
from export.to_onnx import freeze
from runtime.errors import BundleError
from runtime.prior.preprocess import Preprocess

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
pytest.importorskip("onnxslim", reason="needs onnxslim")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402 (after importorskip)

NORMAL = [np.ones(4, np.float32)] * 4  # scale, shift, mean, variance
TRAINING = r" was exported in training mode.*: it contains "


def network(path, *tail, opset=17):
    return save(path, *nearest_colour(), tail=tail, opset=opset)


def edit(path, change):
    model = onnx.load(path)
    change(model.graph.node[-1], model)
    onnx.save(model, path)
    return path


def in_branch(node, model):
    """Put the last node into a branch of an If."""
    node.CopyFrom(helper.make_node("If", ["yes"], node.output, **dict.fromkeys(
        ("then_branch", "else_branch"),
        helper.make_graph([helper.make_node("RandomUniformLike", ["scores"], ["z"])], "b", [],
                          [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]),
    )))  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))


def in_function(node, model):
    """Put the last node into a local function."""
    model.functions.append(
        helper.make_function(
            "own", "Noise", ["x"], ["y"], [helper.make_node("RandomNormalLike", ["x"], ["y"])],
            [helper.make_opsetid("", 17)],
        )
    )  # fmt: skip
    model.opset_import.append(helper.make_opsetid("own", 1))
    node.op_type, node.domain = "Noise", "own"


def constant_node(node, model):
    """The training_mode of a Dropout becomes the output of a node."""
    name = node.input[2]
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    model.graph.node.insert(0, helper.make_node("Constant", [], [name], value=tensor))
    model.graph.initializer.remove(tensor)


def number(node, model):
    """The training_mode of a Dropout is stored as a number, not as bytes."""
    (tensor,) = (t for t in model.graph.initializer if t.name == node.input[2])
    tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.BOOL, [], [True]))
    assert not tensor.raw_data


def test_files_in_training_mode_are_refused(tmp_path):
    path, ratio = tmp_path / "net.onnx", np.array(0.3, np.float32)
    dropout = ("Dropout", {}, ratio, np.array(True))
    for operator, tail, opset, change in [
        ("Dropout", dropout, 17, None),
        ("Dropout", dropout, 17, constant_node),
        ("Dropout", dropout, 17, number),
        ("BatchNormalization", ("BatchNormalization", {"training_mode": 1}, *NORMAL), 17, None),
        (
            "BatchNormalization",
            ("BatchNormalization", {}, *NORMAL),
            9,
            lambda node, model: node.output.extend("abcd"),
        ),
        ("RandomNormalLike", ("RandomNormalLike", {}), 17, None),
        ("Bernoulli", ("Bernoulli", {}), 17, None),
        ("RandomUniformLike", ("Identity", {}), 17, in_branch),
        ("RandomNormalLike", ("Identity", {}), 17, in_function),
    ]:
        with case(operator, opset, getattr(change, "__name__", None)):
            network(path, tail, opset=opset)
            if change is not None:
                edit(path, change)
            with pytest.raises(BundleError, match=f"net.onnx{TRAINING}{operator}\n  fix: .*eval()"):
                onnx_file(path)


def test_the_same_operators_in_evaluation_mode_are_taken(tmp_path):
    path, ratio = tmp_path / "net.onnx", np.array(0.3, np.float32)
    for tail in [
        ("Dropout", {}, ratio),
        ("Dropout", {}, ratio, np.array(False)),
        ("BatchNormalization", {"training_mode": 0}, *NORMAL),
        ("BatchNormalization", {}, *NORMAL),
    ]:
        with case(tail[0], len(tail)):
            assert onnx_file(network(path, tail)).onnx
    normal = ("BatchNormalization", {}, *NORMAL)
    network(path, normal, opset=9)
    # Outputs without a name are those that are left out.
    assert onnx_file(edit(path, lambda node, model: node.output.extend(["", ""]))).onnx


def test_operators_of_other_domains_may_have_the_same_names(tmp_path):
    def other_domain(node, model):
        node.domain = "own"
        model.opset_import.append(helper.make_opsetid("own", 1))

    path = tmp_path / "net.onnx"
    for operator in ("Bernoulli", "RandomNormalLike"):
        with case(operator):
            assert onnx_file(edit(network(path, (operator, {})), other_domain)).onnx


def test_modules_are_set_to_evaluation_mode(tmp_path):
    torch = pytest.importorskip("torch", reason="networks are exported by torch")
    pytest.importorskip("onnxscript", reason="torch's exporter needs onnxscript")

    class Drops(torch.nn.Module):
        def __init__(self, always):
            super().__init__()
            self.always = always
            self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))

        def forward(self, x):
            return torch.nn.functional.dropout(self.layers(x), 0.2, self.always or self.training)

    rule = Preprocess(mean=(0.5,) * 3, std=(0.2,) * 3, height=16, width=24)
    assert freeze(PriorModel(name="own", module=Drops(False).train(), preprocess=rule))
    with pytest.raises(BundleError, match=rf"own{TRAINING}Dropout\n  fix: .*self\.training"):
        freeze(PriorModel(name="own", module=Drops(True), preprocess=rule))
