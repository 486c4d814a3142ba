"""The exporter puts operators behind outputs of other forms, so that bundles have one form."""

import numpy as np
import pytest
from cases import case
from drawn_pictures import quadrants
from one_layer_networks import FLOAT, MEAN, STD, nearest_colour, save

from export.models import PriorModel
from export.standard_output import standardised
from runtime.engines.onnx import OnnxEngine
from runtime.errors import BundleError, VerificationFailed
from runtime.prior.network import NetworkPrior
from runtime.prior.preprocess import Preprocess

onnx = pytest.importorskip("onnx", reason="pip install onnx")
torch = pytest.importorskip("torch", reason="pip install torch==2.13.0")
from onnx import TensorProto  # noqa: E402 (after importorskip)

SIZE = (24, 32)
RULE = Preprocess(mean=tuple(MEAN), std=tuple(STD), height=SIZE[0], width=SIZE[1])
PICTURES = [quadrants(*SIZE)[0], quadrants(*SIZE)[0][::-1].copy()]
FEEDS = [RULE(picture) for picture in PICTURES]
LAST = {"perm": [0, 2, 3, 1]}
ONE = (np.array([[9.0, -3, -4]]), [0.5])
ARG_MAX = ("ArgMax", {"axis": 1, "keepdims": 1})


def file_model(path, **options):
    return PriorModel(name="net", onnx=path.read_bytes(), preprocess=RULE, **options)


def runs(model):
    with OnnxEngine(model.onnx) as engine:
        assert len(engine.outputs) == 1
        return [engine(feed)[0] for feed in FEEDS]


def of_opset(path, version):
    model = onnx.load(path)
    model.opset_import[0].version = version
    onnx.save(model, path)


def test_every_form_becomes_that_of_bundles(tmp_path):
    for weights, tail, kind, output in [
        (nearest_colour(), [], FLOAT, "logits"),
        (nearest_colour(), [("Softmax", {"axis": 1})], FLOAT, "probabilities"),
        (nearest_colour(), [("Transpose", LAST)], FLOAT, "logits"),
        (nearest_colour(), [("Squeeze", {})], FLOAT, "logits"),
        (nearest_colour(), [("Transpose", LAST), ("Squeeze", {})], FLOAT, "logits"),
        (nearest_colour(), [("Cast", {"to": TensorProto.DOUBLE})], TensorProto.DOUBLE, "logits"),
        (ONE, [], FLOAT, "logits"),
        (ONE, [("Sigmoid", {})], FLOAT, "probabilities"),
        (ONE, [("Sigmoid", {}), ("Squeeze", {})], FLOAT, "probabilities"),
        (ONE, [("Sigmoid", {}), ("Transpose", LAST)], FLOAT, "probabilities"),
        (nearest_colour(), [ARG_MAX], TensorProto.INT64, "labels"),
        (nearest_colour(), [ARG_MAX, ("Transpose", LAST)], TensorProto.INT64, "labels"),
        (nearest_colour(), [ARG_MAX, ("Squeeze", {})], TensorProto.INT64, "labels"),
        *(
            (nearest_colour(), [ARG_MAX, ("Cast", {"to": to})], to, "labels")
            for to in (FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.UINT16)
        ),
    ]:
        path = save(tmp_path / "m.onnx", *weights, tail=tail, out=kind)
        names = [name for name, _ in tail]
        for opset in (17, 13, 11) if "Softmax" not in names else (17,):
            with case(kind, opset, *names):
                of_opset(path, opset)
                standard = standardised(file_model(path), FEEDS)
                assert standard.model.output == output
                assert standardised(file_model(path, output=output), FEEDS).notes == []
                prior = NetworkPrior(OnnxEngine(path), RULE)
                for picture, out in zip(PICTURES, runs(standard.model), strict=True):
                    assert out.ndim == (3 if output == "labels" else 4) and len(out) == 1
                    assert out.dtype == (np.int32 if output == "labels" else np.float32)
                    assert output == "labels" or out.shape[1] >= 2
                    # The bundle's prior reads it as the file's prior reads the original.
                    bundle = NetworkPrior(prior.engine, RULE, output=output)
                    np.testing.assert_allclose(bundle.guide(out), prior(picture, None), atol=1e-6)
                same = standard.model.onnx == path.read_bytes()
                assert same == (names in ([], ["Softmax"]) and len(weights[1]) > 1)


def test_decisions_are_said(tmp_path):
    for weights, tail, match in [
        (nearest_colour(), [("Softmax", {"axis": 1})], "taken as probabilities"),
        (ONE, [], "the logit of the foreground"),
        (ONE, [("Sigmoid", {})], "probability of the foreground"),
        (nearest_colour(), [ARG_MAX, ("Cast", {"to": FLOAT})], "taken as labels"),
    ]:
        with case(match):
            path = save(tmp_path / "m.onnx", *weights, tail=tail)
            (note,) = standardised(file_model(path), FEEDS).notes
            assert match in note
    path = save(tmp_path / "m.onnx", *nearest_colour(), tail=[ARG_MAX], out=TensorProto.INT64)
    assert standardised(file_model(path), FEEDS).notes == []  # whole numbers leave no choice


def test_one_picture_can_settle_what_the_others_leave_open(tmp_path):
    """The first picture has the labels 0 and 1 alone, which could be probabilities."""
    path = save(tmp_path / "m.onnx", *nearest_colour(), tail=[ARG_MAX, ("Cast", {"to": FLOAT})])
    half = RULE(np.repeat(PICTURES[0][:1], SIZE[0], 0))
    with pytest.raises(BundleError, match=r"zeros and ones(.|\n)*--output labels(.|\n)*--pictures"):
        standardised(file_model(path), [half])
    assert standardised(file_model(path, output="labels"), [half]).model.output == "labels"
    for feeds in ([half, FEEDS[0]], [FEEDS[0], half]):
        assert standardised(file_model(path), feeds).model.output == "labels"


def test_other_outputs_and_what_they_need_are_removed(tmp_path):
    path = save(tmp_path / "m.onnx", *nearest_colour())
    model = onnx.load(path)
    weight = onnx.numpy_helper.from_array(np.ones((64, 3, 1, 1), np.float32), "wide")
    model.graph.initializer.append(weight)
    model.graph.node.append(onnx.helper.make_node("Conv", ["image", "wide"], ["aux"]))
    model.graph.output.insert(0, onnx.helper.make_tensor_value_info("aux", FLOAT, None))
    onnx.save(model, path)
    standard = standardised(file_model(path), FEEDS)
    assert "aux" in standard.notes[0] and "(1, 64, 24, 32)" in standard.notes[0]
    kept = onnx.load_from_string(standard.model.onnx)
    assert [o.name for o in kept.graph.output] == ["scores"]
    assert {t.name for t in kept.graph.initializer} == {"weight", "bias"}
    assert len(kept.graph.node) == 1


def test_names_of_the_operators_that_the_network_has_already(tmp_path):
    path = save(tmp_path / "m.onnx", *ONE)
    before = runs(standardised(file_model(path), FEEDS).model)
    model = onnx.load(path)
    model.graph.node[0].output[0] = model.graph.output[0].name = "prior_0"
    onnx.save(model, path)
    np.testing.assert_array_equal(runs(standardised(file_model(path), FEEDS).model), before)


def test_inner_graphs_keep_what_they_read(tmp_path):
    """The branches of an If read the outer graph's values, which no node's input names."""
    path = save(tmp_path / "m.onnx", *ONE)
    model = onnx.load(path)
    helper, graph = onnx.helper, model.graph
    value = helper.make_tensor_value_info("branch", FLOAT, None)
    read = helper.make_graph([helper.make_node("Neg", ["scores"], ["branch"])], "b", [], [value])
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "condition"))
    graph.node.append(
        helper.make_node("If", ["condition"], ["y"], then_branch=read, else_branch=read)
    )
    graph.output[0].name = "y"
    onnx.save(model, path)
    before = runs(file_model(path))
    for one, two in zip(before, runs(standardised(file_model(path), FEEDS).model), strict=True):
        np.testing.assert_array_equal(two[:, 1], one[:, 0])


def test_names_of_one_channel(tmp_path):
    path = save(tmp_path / "m.onnx", *ONE)
    model = standardised(file_model(path, names=["person"]), FEEDS).model
    assert model.names == ["background", "person"] and runs(model)[0].shape == (1, 2, *SIZE)


class Net(torch.nn.Module):
    """One random layer, and what the words of ``then`` say."""

    def __init__(self, then):
        super().__init__()
        self.conv, self.then = torch.nn.Conv2d(3, 1 if "one" in then else 4, 1), then
        torch.nn.init.normal_(self.conv.weight, std=2, generator=torch.Generator().manual_seed(0))

    def forward(self, x):
        x = self.conv(x)
        x = x.softmax(1) if "soft" in self.then else x
        x = x.argmax(1) if "labels" in self.then else x
        return x.permute(0, 2, 3, 1) if "last" in self.then else x


def test_modules():
    for then, output, dtype in [
        (("soft",), "probabilities", np.float32),
        ((), "logits", np.float32),
        (("last",), "logits", np.float32),
        (("one",), "logits", np.float32),
        (("one", "last"), "logits", np.float32),
        (("labels",), "labels", np.int32),
    ]:
        with case(*then):
            net = Net(then)
            found = standardised(PriorModel(name="net", module=net, preprocess=RULE), FEEDS).model
            assert found.output == output
            assert (found.module is net) == (then in ((), ("soft",)))
            for feed in FEEDS:
                with torch.no_grad():
                    out, raw = (m(torch.from_numpy(feed)) for m in (found.module, net))
                assert out.numpy().dtype == dtype
                raw = raw.permute(0, 3, 1, 2) if "last" in then else raw
                torch.testing.assert_close(out[:, -1:] if "one" in then else out, raw.to(out.dtype))
                assert out.shape == ((1, *SIZE) if "labels" in then else (1, out.shape[1], *SIZE))


def test_what_is_no_segmentation_or_not_what_it_is_said_to_be(tmp_path):
    for weights, tail, output, match in [
        (nearest_colour(), [("GlobalAveragePool", {}), ("Squeeze", {})], None, "wanted"),
        (nearest_colour(), [("Transpose", {"perm": [0, 1, 3, 2]})], None, "aspect ratio"),
        (nearest_colour(), [("Sigmoid", {})], None, "sigmoids of classes that overlap"),
        (nearest_colour(), [], "labels", "is said to return labels"),
        (ONE, [], "probabilities", "calls its output probabilities"),
        (nearest_colour(), [ARG_MAX], "logits", "int64 values, but is said to return logits"),
    ]:
        with case(match), pytest.raises(BundleError, match=match):
            kind = TensorProto.INT64 if tail == [ARG_MAX] else FLOAT
            path = save(tmp_path / "m.onnx", *weights, tail=tail, out=kind)
            standardised(file_model(path, output=output), FEEDS)


def test_operators_that_compute_other_values_are_found(tmp_path, monkeypatch):
    import export.standard_output as module

    path, real = save(tmp_path / "m.onnx", *ONE), module.standard
    monkeypatch.setattr(module, "standard", lambda *a, **k: real(*a, **k)[::-1])
    with pytest.raises(VerificationFailed, match="differ from the output"):
        standardised(file_model(path), FEEDS)


def test_labels_beyond_the_names(tmp_path):
    """A bundle with fewer names than labels would refuse its pictures."""
    for kind in (TensorProto.INT64, FLOAT):
        with case(kind):
            tail = [ARG_MAX, ("Cast", {"to": kind})]
            path = save(tmp_path / "m.onnx", *nearest_colour(), tail=tail, out=kind)
            with pytest.raises(BundleError, match="returned label 3, but has 3 names: a, b, c"):
                standardised(file_model(path, names=list("abc")), FEEDS)
    few = RULE(np.repeat(PICTURES[0][:1], SIZE[0], 0))  # its labels are 0 and 1
    path = save(tmp_path / "m.onnx", *nearest_colour(), tail=[ARG_MAX], out=TensorProto.INT64)
    assert standardised(file_model(path, names=list("abc")), [few]).model.output == "labels"
    for feeds in ([few, FEEDS[0]], [FEEDS[0], few]):
        with pytest.raises(BundleError, match="returned label 3, but has 3 names"):
            standardised(file_model(path, names=list("abc")), feeds)


def test_infinite_scores_of_one_picture(tmp_path):
    path = save(tmp_path / "m.onnx", np.ones((1, 3)), tail=[("Reciprocal", {})])
    ones, zeros = (np.full((1, 3, *SIZE), n, np.float32) for n in (1, 0))
    assert standardised(file_model(path, output="logits"), [ones]).model.output == "logits"
    for feeds in ([ones, zeros], [zeros, ones]):
        with pytest.raises(VerificationFailed, match="net returns NaN or infinite scores"):
            standardised(file_model(path, output="logits"), feeds)


def test_the_chosen_output(tmp_path):
    path = save(tmp_path / "m.onnx", *nearest_colour())
    model = onnx.load(path)
    model.graph.node.append(onnx.helper.make_node("Neg", ["scores"], ["other"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("other", FLOAT, None))
    onnx.save(model, path)
    first, chosen = (
        runs(standardised(file_model(path, output_name=name), FEEDS).model)
        for name in (None, "other")
    )
    for one, two in zip(first, chosen, strict=True):
        assert np.array_equal(one, -two)
    # The network that was made has one output, perhaps of another name.
    assert standardised(file_model(path, output_name="other"), FEEDS).model.output_name is None


def test_the_kind_chooses_between_scores_and_labels(tmp_path):
    path = save(tmp_path / "m.onnx", *nearest_colour())
    model = onnx.load(path)
    model.graph.node.append(onnx.helper.make_node("ArgMax", ["scores"], ["classes"], axis=1))
    kind = onnx.helper.make_tensor_value_info("classes", TensorProto.INT64, None)
    model.graph.output.append(kind)
    onnx.save(model, path)
    for output in ("logits", "labels"):
        with case(output):
            out = runs(standardised(file_model(path, output=output), FEEDS).model)[0]
            assert out.shape == ((1, *SIZE) if output == "labels" else (1, 4, *SIZE))
    with pytest.raises(BundleError, match="several of these could be the segmentation"):
        standardised(file_model(path), FEEDS)
