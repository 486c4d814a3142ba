"""ONNX files as other programs write them: free channels, weights among the inputs, operators that
onnx cannot infer, FP16, weights behind links. The frozen network returns what the file returns."""

import os
from dataclasses import replace

import numpy as np
import pytest
from cases import case
from exporting import export, graph
from one_layer_networks import NAMES, nearest_colour, save

from export.half import as_rounded_float32, to_half
from export.inference import precision_of
from export.int8 import to_int8
from export.models.onnx_file import onnx_file
from export.to_onnx import freeze
from runtime.bundle.read import Bundle
from runtime.engines.onnx import OnnxEngine
from runtime.errors import BundleError, InputError

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
pytest.importorskip("onnxslim", reason="needs onnxslim")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402 (after importorskip)


def network(path, **changes):
    weight, bias = nearest_colour()
    return save(path, weight, bias, **changes)


def edit(path, change):
    """Apply ``change`` to the model in a file."""
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    return path


def noise(*size):
    return np.random.default_rng(0).standard_normal((1, 3, *size), np.float32)


def same_answer(path, data, size=(24, 40)):
    """The frozen network returns what the file returns; its output has a shape."""
    with OnnxEngine(path) as before, OnnxEngine(data) as after:
        wanted, found = before(noise(*size))[0], after(noise(*size))[0]
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
        return after.inputs[0].shape, after.outputs[0].shape


# The input's dimensions

SPELLINGS = [
    ("batch_size", "num_channels", "height", "width"),  # as Hugging Face's optimum writes them
    ("n", "n", "n", "n"),
    ("n", 3, "side", "side"),
    (None, None, None, None),
    (0, 0, 0, 0),
    (-1, -1, -1, -1),
    (-1, 3, 0, "w"),
]


def test_free_dimensions_in_every_spelling(tmp_path):
    for dims in SPELLINGS:
        with case(dims):
            path = network(tmp_path / "net.onnx", inputs=(dims,))
            whole = network(tmp_path / "whole.onnx")  # ONNX Runtime does not run a dimension of 0
            model = onnx_file(path, (24, 40))
            assert same_answer(whole, freeze(model)) == ((1, 3, 24, 40), (1, 4, 24, 40))
            same_answer(whole, model.onnx)  # the export runs it, too
            free = freeze(onnx_file(path), dynamic=True)
            shapes = same_answer(whole, free)
            assert shapes[0] == (1, 3, "height", "width") and shapes[1][:2] == (1, 4)
            assert len({*shapes[1]}) == 4


def test_outputs_may_use_the_names_of_the_input(tmp_path):
    def names(model):
        for dim in model.graph.output[0].type.tensor_type.shape.dim:
            dim.dim_param = "num_channels"

    path = network(tmp_path / "net.onnx", inputs=(("n", "num_channels", "h", "w"),))
    edit(path, lambda m: m.graph.output[0].type.tensor_type.shape.dim.extend(
        [onnx.TensorShapeProto.Dimension()] * 4))  # fmt: skip
    data = freeze(onnx_file(edit(path, names), (24, 40)))
    assert same_answer(path, data)[1] == (1, 4, 24, 40)


def test_other_inputs_are_refused_with_a_fix(tmp_path):
    for dims, fix in [
        ((1, 24, 40, 3), "tf2onnx has --inputs-as-nchw"),
        ((1, "h", "w", 3), "tf2onnx has --inputs-as-nchw"),
        ((2, 3, 24, 40), "batch 1, or with a free batch"),
        ((1, 4, 24, 40), "one input"),
    ]:
        with case(dims), pytest.raises(BundleError, match=f"wanted one .*\n  fix: .*{fix}"):
            onnx_file(network(tmp_path / "net.onnx", inputs=(dims,)))


def test_an_optimum_file_becomes_a_bundle(tmp_path, photos):
    for dims in (SPELLINGS[0], (0, 0, 0, 0)):
        with case(dims):
            path = network(tmp_path / "net.onnx", inputs=(dims,), classes=NAMES)
            words = ("--model", path, "--imgsz", "48x72", "--pictures", photos, "-q")
            ended = export(*words, "-o", tmp_path / "net.bundle")
            assert ended.code == 0, ended
            (port,) = Bundle.open(tmp_path / "net.bundle").manifest["graphs"]["prior"]["inputs"]
            assert port["shape"] == [1, 3, 48, 72]


# Weights among the inputs


def old(model):
    """Write a model as versions of ONNX before IR 4 did."""
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, [*tensor.dims])
        )


def test_weights_among_the_inputs(tmp_path):
    path = edit(network(tmp_path / "net.onnx", inputs=((1, 3, 24, 40),), opset=8), old)
    for simplify in (True, False):
        with case(f"simplify={simplify}"):
            data = freeze(onnx_file(path), simplify=simplify)
            assert same_answer(path, data) == ((1, 3, 24, 40), (1, 4, 24, 40))
            model = onnx.load_from_string(data)
            assert [v.name for v in model.graph.input] == ["image"] and model.ir_version >= 4
    half, _ = to_half(data)
    with OnnxEngine(half) as engine:
        assert engine(noise(24, 40))[0].shape == (1, 4, 24, 40)


# Operators that onnx cannot infer


@pytest.fixture
def grouped(tmp_path):
    """A network with group normalisation in the middle; onnx infers nothing behind it."""
    groups = ("GroupNormalization", {"num_groups": 2}, *(np.full(4, n, np.float32) for n in (1, 0)))
    last = ("Conv", {}, np.eye(4, dtype=np.float32)[..., None, None])
    return network(tmp_path / "net.onnx", tail=(groups, ("Relu", {}), last), opset=21, ir=10)


def test_shapes_behind_group_normalisation(grouped):
    for simplify in (True, False):
        data = freeze(onnx_file(grouped, (24, 40)), simplify=simplify)
        assert same_answer(grouped, data)[1] == (1, 4, 24, 40)
        onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
        # The operator itself stays: engines have a layer for it.
        assert "GroupNormalization" in {n.op_type for n in onnx.load_from_string(data).graph.node}
    free = freeze(onnx_file(grouped), dynamic=True)
    assert same_answer(grouped, free)[1][:2] == (1, 4)


def test_group_normalisation_in_lower_precision(grouped):
    data = freeze(onnx_file(grouped, (24, 40)))
    feeds = [noise(24, 40)]
    with OnnxEngine(data) as engine:
        (wanted,) = engine(*feeds)
    half, kept = to_half(data)
    assert any("GroupNormalization" in name for name in kept)
    for lower in (
        as_rounded_float32(half),
        to_int8(data, feeds)[0],
        to_int8(data, feeds, half=True)[0],
    ):
        onnx.checker.check_model(onnx.load_from_string(lower), full_check=True)
        with OnnxEngine(lower) as engine:
            (found,) = engine(*feeds)
        assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


def test_a_shape_that_only_a_run_tells(tmp_path):
    """The target of Reshape is computed from values, so that nobody can infer it."""

    def reshape(model):
        nodes, inner = model.graph.node, model.graph
        nodes.pop()
        inner.initializer.append(numpy_helper.from_array(np.array([0.0], np.float32), "zero"))
        nodes.extend([
            helper.make_node("Shape", ["scores"], ["sizes"]),
            helper.make_node("ReduceMax", ["scores"], ["most"], keepdims=0),
            helper.make_node("Mul", ["most", "zero"], ["nothing"]),
            helper.make_node("Cast", ["nothing"], ["as_int"], to=TensorProto.INT64),
            helper.make_node("Add", ["sizes", "as_int"], ["wanted"]),
            helper.make_node("Reshape", ["scores", "wanted"], ["t0"]),
        ])  # fmt: skip

    path = edit(network(tmp_path / "net.onnx", tail=(("Relu", {}),)), reshape)
    assert same_answer(path, freeze(onnx_file(path, (24, 40))))[1] == (1, 4, 24, 40)
    free = same_answer(path, freeze(onnx_file(path), dynamic=True))[1]
    assert free[:2] == (1, 4) and all(isinstance(n, str) for n in free[2:])


def test_outputs_that_are_no_tensor_or_missing(tmp_path):
    path = network(tmp_path / "net.onnx", tail=(("SplitToSequence", {}),))
    edit(path, lambda m: m.graph.output[0].ClearField("type"))
    with pytest.raises(InputError, match="output t0 of net is no tensor\n  fix: "):
        freeze(onnx_file(path))
    edit(path, lambda m: m.graph.output.pop())
    with pytest.raises(InputError, match="net has 1 inputs and 0 outputs; wanted one input"):
        freeze(onnx_file(path))


# FP16


def halved(model):
    """Make the whole network FP16, with its input and output."""
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16


def test_half_inputs_and_outputs_become_float32(tmp_path):
    path = edit(network(tmp_path / "net.onnx"), halved)
    data = freeze(onnx_file(path, (24, 40)))
    with OnnxEngine(path) as before, OnnxEngine(data) as after:
        assert before.inputs[0].dtype == before.outputs[0].dtype == "tensor(float16)"
        for port, shape in ((after.inputs[0], (1, 3, 24, 40)), (after.outputs[0], (1, 4, 24, 40))):
            assert port.dtype == "tensor(float)" and port.shape == shape
        assert [after.inputs[0].name, after.outputs[0].name] == ["image", "scores"]
        wanted, found = before(noise(24, 40))[0], after(noise(24, 40))[0]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max())
    weights = onnx.load_from_string(data).graph.initializer
    assert {t.data_type for t in weights} == {TensorProto.FLOAT16}  # the inside stays FP16


def test_outputs_of_double_precision_become_float32(tmp_path):
    to = TensorProto.DOUBLE
    path = network(tmp_path / "net.onnx", tail=[("Cast", {"to": to})], out=to)
    data = freeze(onnx_file(path, (24, 40)))
    with OnnxEngine(data) as engine:
        assert engine.outputs[0].dtype == "tensor(float)"
    same_answer(path, data)


def test_half_weights_may_be_rounded_again(tmp_path, photos, monkeypatch):
    """Folding a layer into another does that; the weights are FP16 before and after."""
    import onnxslim

    def rounded(model):
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(
                numpy_helper.from_array((1.002 * array).astype(array.dtype), tensor.name)
            )
        return model

    monkeypatch.setattr(onnxslim, "slim", rounded)
    path = network(tmp_path / "net.onnx")
    words = ("--model", path, "--imgsz", "48x72", "--pictures", photos, "-q", "-o", tmp_path / "b")
    assert export(*words).refused(3, "simplifying net changed its answer")
    edit(path, halved)
    assert export(*words).code == 0
    numbers = Bundle.open(tmp_path / "b").manifest["verification"]["prior"]["frozen"]
    assert numbers["max_abs"] > 1e-3 * numbers["largest"]  # more than FP32 may differ


def test_a_half_input_that_a_branch_reads(tmp_path):
    """The new name of the input is used in branches, too."""

    def branch(model):
        inner = model.graph
        out = helper.make_tensor_value_info("then", TensorProto.FLOAT16, None)
        then = helper.make_graph([helper.make_node("Relu", ["image"], ["then"])], "then", [], [out])
        out = helper.make_tensor_value_info("else", TensorProto.FLOAT16, None)
        other = helper.make_graph([helper.make_node("Neg", ["image"], ["else"])], "else", [], [out])
        inner.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
        node = helper.make_node("If", ["yes"], ["chosen"], then_branch=then, else_branch=other)
        inner.node.insert(0, node)
        inner.node[1].input[0] = "chosen"

    path = edit(edit(network(tmp_path / "net.onnx"), halved), branch)
    data = freeze(onnx_file(path, (24, 40)), simplify=False)
    with OnnxEngine(path) as before, OnnxEngine(data) as after:
        wanted, found = before(noise(24, 40))[0], after(noise(24, 40))[0]
        np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max())


def test_the_bundle_states_the_precision_of_the_file(tmp_path, photos):
    half = edit(network(tmp_path / "half.onnx"), halved)
    words = ("--imgsz", "48x72", "--pictures", photos, "-q", "-o", tmp_path / "a.bundle")
    assert export("--model", half, *words).code == 0
    bundle = Bundle.open(tmp_path / "a.bundle")
    assert bundle.manifest["graphs"]["prior"]["precision"] == "fp16"
    assert "fp16" in bundle.manifest["verification"]["prior"]
    assert {p["dtype"] for p in bundle.manifest["graphs"]["prior"]["inputs"]} == {"float32"}
    assert TensorProto.FLOAT16 in {t.data_type for t in graph(bundle, "prior").graph.initializer}
    small = network(tmp_path / "int8.onnx", inputs=((1, 3, 24, 40),))
    (tmp_path / "int8.onnx").write_bytes(to_int8(freeze(onnx_file(small)), [noise(24, 40)])[0])
    words = ("--min-agreement", 0.5, "--pictures", photos, "-q", "-o", tmp_path / "b.bundle")
    assert export("--model", small, *words).code == 0
    entry = Bundle.open(tmp_path / "b.bundle").manifest["graphs"]["prior"]
    assert entry["precision"] == "int8"
    for path, kind in ((half, "FP16"), (small, "INT8")):
        for more in (("--half",), ("--int8", "--data", photos)):
            ended = export("--model", path, *more, "-q", "-o", tmp_path / "c.bundle")
            assert ended.refused(1, f"has {kind} weights already", "fix: leave them out")


def test_weights_in_constant_nodes_have_a_precision(tmp_path):
    def constants(model):
        for tensor in model.graph.initializer:
            node = helper.make_node("Constant", [], [tensor.name], value=tensor)
            model.graph.node.insert(0, node)
        del model.graph.initializer[:]

    model = onnx.load(edit(network(tmp_path / "net.onnx"), constants))
    assert precision_of(model) == "fp32"
    model = onnx.load(edit(edit(network(tmp_path / "net.onnx"), halved), constants))
    assert precision_of(model) == "fp16"


# Weights in other files


def test_weights_behind_the_links_of_a_hub_cache(tmp_path):
    whole = network(tmp_path / "whole.onnx")
    blobs, snapshot = (
        tmp_path / "hub/models--a--net/blobs",
        tmp_path / "hub/models--a--net/snapshots/1",
    )
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    onnx.save_model(onnx.load(whole), blobs / "net.onnx", save_as_external_data=True,
                    location="net.onnx_data", size_threshold=0)  # fmt: skip
    for name in ("net.onnx", "net.onnx_data"):
        os.replace(blobs / name, blobs / f"hash of {name}")
        os.symlink(f"../../blobs/hash of {name}", snapshot / name)
    same_answer(whole, freeze(onnx_file(snapshot / "net.onnx", (24, 40))))
    os.replace(blobs / "hash of net.onnx_data", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", blobs / "hash of net.onnx_data")
    with pytest.raises(BundleError, match="not loaded\n  fix: "):
        onnx_file(snapshot / "net.onnx")


def test_weights_that_end_too_early(tmp_path):
    path = network(tmp_path / "net.onnx")
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="data",
                    size_threshold=0)  # fmt: skip
    data = (tmp_path / "data").read_bytes()
    (tmp_path / "data").write_bytes(data[:-1])
    with pytest.raises(BundleError, match="cannot be loaded: data ends within the weights 'bias'"):
        onnx_file(path)


# Bytes


def test_bytes_that_are_no_onnx(tmp_path):
    model = onnx_file(network(tmp_path / "net.onnx"))
    for data in (b"hello", model.onnx[:-1]):
        with pytest.raises(BundleError, match=r"net is no ONNX model: .*\n  fix: export"):
            freeze(replace(model, onnx=data))
    named = model.onnx.replace(b"scores", b"sc\xffres")
    with pytest.raises(BundleError, match="net is no ONNX model: 'utf-8' codec"):
        freeze(replace(model, onnx=named))
