"""ONNX files as priors: what is packed as it is, what is refused, and real ones."""

import os
import re
from dataclasses import replace

import numpy as np
import pytest
from cases import case
from checkpoints import picture, small_onnx
from developer_data import needs_data

from benchmarks.quality import datasets
from export.models.load import load_model
from export.models.onnx_file import inputs_of, onnx_file
from export.to_onnx import freeze
from runtime.engines.onnx import OnnxEngine
from runtime.errors import BundleError, InputError, VerificationFailed

torch = pytest.importorskip("torch", reason="networks are exported by torch: pip install torch")
onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("onnxslim", reason="needs onnxslim")
from onnx import TensorProto, numpy_helper  # noqa: E402 (after importorskip)

# Existing ONNX files


def test_onnx_file_is_packed(tmp_path):
    path = small_onnx(
        tmp_path / "net.onnx",
        inside=("Conv", "Softmax"),
        classes='["a", "b", "c", "d"]',
        output="probabilities (N x C)",
        licence="CC0",
        input_size='{"width": 40, "height": 20}',
        size_multiple="4",
    )
    model = load_model(str(path))
    assert (model.name, model.names, model.output) == ("net", list("abcd"), "probabilities")
    assert (model.licence, model.preprocess.size(9, 9)) == ("CC0", (20, 40))
    data = freeze(model)
    with OnnxEngine(path) as before, OnnxEngine(data) as after:
        assert after.inputs[0][:2] == ("picture", (1, 3, 20, 40))
        assert after.outputs[0][:2] == (before.outputs[0].name, (1, 4, 20, 40))
        x = model.preprocess(picture())
        np.testing.assert_allclose(after(x)[0], before(x)[0], atol=1e-6)
        assert after.metadata["license"] == "CC0" and after.metadata["output"] == "probabilities"
    assert b"secret" in path.read_bytes() and b"secret" not in data
    with OnnxEngine(freeze(model, dynamic=True)) as free:
        assert free.inputs[0].shape == (1, 3, "height", "width")
    with OnnxEngine(freeze(onnx_file(path, (8, 12)))) as other:
        assert other.inputs[0].shape == (1, 3, 8, 12)


def test_sizes_that_the_file_does_not_allow(tmp_path):
    free = small_onnx(tmp_path / "free.onnx", size_multiple="16", minimum_size="32")
    with pytest.raises(InputError, match=r"multiples of 16, at least 32\n  fix: --imgsz 64 96"):
        onnx_file(free, (60, 100))
    fixed = small_onnx(tmp_path / "fixed.onnx", shape=(1, 3, 24, 48))
    assert onnx_file(fixed).preprocess.size(1, 1) == (24, 48)
    with pytest.raises(InputError, match=r"imgsz is \(8, 8\), but fixed.onnx has a fixed input"):
        onnx_file(fixed, (8, 8))
    with pytest.raises(InputError, match=r"fixed input of .*; wanted .*8, 8"):
        freeze(onnx_file(fixed), imgsz=(8, 8))
    with pytest.raises(InputError, match="fixed height of 24; dynamic wants it free"):
        freeze(onnx_file(fixed), dynamic=True)
    batch = small_onnx(tmp_path / "batch.onnx", shape=(2, 3, 24, 48))
    with pytest.raises(BundleError, match=r"picture \(2, 3, 24, 48\) .*\n  fix: .* with batch 1"):
        onnx_file(batch)
    with pytest.raises(InputError, match=r"fixed input of \[2, 3, 24, 48\]; wanted \[1, 3, 24"):
        freeze(replace(onnx_file(fixed), onnx=batch.read_bytes()))
    named = small_onnx(tmp_path / "named.onnx", shape=("n", 3, 24, 48))
    with OnnxEngine(freeze(onnx_file(named))) as engine:
        assert engine.inputs[0].shape == (1, 3, 24, 48)


def test_one_side_of_the_input_size_and_the_other_spelling_of_licence(tmp_path):
    for text, size in [
        ('{"width": 40}', (40, 40)),
        ('{"height": 24}', (24, 24)),
        ('{"height": 24, "width": 40}', (24, 40)),
    ]:
        with case(text):
            model = onnx_file(small_onnx(tmp_path / "net.onnx", input_size=text))
            assert model.preprocess.size(9, 9) == size
    for meta, wanted in [
        ({"license": "MIT"}, "MIT"),
        ({"licence": "CC0", "license": "MIT"}, "CC0"),
        ({}, "not stated"),
    ]:
        with case(*meta):
            assert onnx_file(small_onnx(tmp_path / "net.onnx", **meta)).licence == wanted


def test_weights_beside_the_file_are_taken_in(tmp_path):
    path = small_onnx(tmp_path / "net.onnx", outside="net.data", shape=(1, 3, 8, 8))
    data = freeze(onnx_file(path))
    os.remove(tmp_path / "net.data")
    with OnnxEngine(data) as engine:
        assert engine(np.ones((1, 3, 8, 8), np.float32))[0].max() == 1
    with pytest.raises(BundleError, match=r"needs its weights file 'net.data', which is missing"):
        onnx_file(path)
    (tmp_path / "up").mkdir()
    path = small_onnx(tmp_path / "up" / "net.onnx", outside="net.data")
    path.write_bytes(path.read_bytes().replace(b"net.data", b"../n.dat"))
    with pytest.raises(BundleError, match="outside its own folder"):
        onnx_file(path)


UNFIT = [
    ({"mean": None}, "metadata 'mean' is missing"),
    ({"classes": '"a"'}, "metadata 'classes' is .*; wanted a list of texts"),
    ({"classes": "["}, "metadata 'classes' is '\\[', which is neither JSON nor a Python literal"),
    ({"input_size": '{"width": -1}'}, "metadata 'input_size' is"),
    ({"shape": (1, 3, 8)}, r"wants inputs .*; wanted one \(1, 3, h, w\) float32"),
    ({"dtype": TensorProto.DOUBLE}, r"wants inputs .*double.*; wanted one \(1, 3, h, w\)"),
]


def test_files_that_do_not_fit(tmp_path):
    for changes, match in UNFIT:
        with case(changes):
            if "dtype" in changes or changes.get("shape"):
                changes = changes | {"inside": ("Relu",)}
            with pytest.raises(BundleError, match=match):
                onnx_file(small_onnx(tmp_path / "net.onnx", **changes))


def test_no_onnx_at_all(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_model(str(tmp_path / "none.onnx"))
    path = small_onnx(tmp_path / "net.onnx", licence="MIT")
    whole = path.read_bytes()
    for name, data in {
        "text": b"hello",
        "a field that is too long": whole[:-1],
        "a string that is no UTF-8": whole.replace(b"MIT", b"\xff\xff\xff"),
    }.items():
        path.write_bytes(data)
        try:
            load_model(str(path))
        except BundleError as error:
            assert error.fix, name
        else:
            pytest.fail(f"{name} was loaded")


def test_inputs_are_those_that_onnx_runtime_reports(tmp_path):
    """They are read without a session."""
    for shape in ((1, 3, 8, 8), ("n", 3, "h", "w"), (None, 3, None, 8)):
        for dtype in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16):
            path = small_onnx(tmp_path / "n.onnx", inside=("Relu",), shape=shape, dtype=dtype)
            with OnnxEngine(path) as engine:
                assert inputs_of(onnx.load(path)) == engine.inputs, (shape, dtype)
    path = small_onnx(tmp_path / "n.onnx")
    model = onnx.load(path)
    weight = model.graph.initializer[0]
    model.graph.input.append(
        onnx.helper.make_tensor_value_info(weight.name, weight.data_type, [*weight.dims])
    )
    onnx.save(model, path)  # as older versions of ONNX have it
    with OnnxEngine(path) as engine:
        assert inputs_of(model) == engine.inputs and len(engine.inputs) == 1


def test_operators_outside_of_the_standard_are_named(tmp_path):
    path = small_onnx(tmp_path / "net.onnx", inside=("Conv", "Gelu"), domain="com.microsoft")
    with pytest.raises(InputError, match=re.escape("ONNX standard: com.microsoft.Gelu\n  fix: ")):
        freeze(onnx_file(path))


def test_simplifying_that_changes_the_answer_is_caught(tmp_path, monkeypatch):
    import onnxslim

    model = onnx_file(small_onnx(tmp_path / "net.onnx", shape=(1, 3, 8, 8)))

    def wrong(graph):
        (weight,) = graph.graph.initializer
        weight.CopyFrom(numpy_helper.from_array(1.001 * numpy_helper.to_array(weight), "weight"))
        return graph

    monkeypatch.setattr(onnxslim, "slim", wrong)
    with pytest.raises(VerificationFailed, match=r"simplifying net .*0.001.*\n  fix: .*--no-simpl"):
        freeze(model)
    freeze(model, simplify=False)


def test_a_graph_that_the_checker_refuses(tmp_path):
    model = onnx_file(small_onnx(tmp_path / "net.onnx", shape=(1, 3, 8, 8)))
    graph = onnx.load_from_string(model.onnx)
    graph.graph.node[0].input[1] = "nowhere"
    broken = replace(model, onnx=graph.SerializeToString())
    with pytest.raises(BundleError, match="net is no valid ONNX network: "):
        freeze(broken, simplify=False)


# Real priors


@needs_data
@pytest.mark.data
def test_real_priors_freeze_fixed_and_free():
    for name in ["s0.5_voc_256x256", "s0.5_cityscapes_512x256"]:
        with case(name):
            path = datasets.data_root() / "priors" / f"espnetv2_{name}.onnx"
            model = onnx_file(path)
            width, height = map(int, name.split("_")[-1].split("x"))
            assert model.preprocess.size(480, 640) == (height, width)
            assert model.licence.startswith("MIT") and len(model.names) in (20, 21)
            x = model.preprocess(picture(240, 320))
            with OnnxEngine(path) as engine:
                wanted = engine(x)[0]
            for dynamic, nodes in ((False, 382), (True, 835)):
                data = freeze(model, dynamic=dynamic)
                assert len(onnx.load_from_string(data).graph.node) <= nodes
                with OnnxEngine(data) as engine:
                    np.testing.assert_allclose(
                        engine(x)[0], wanted, atol=2e-6 * np.abs(wanted).max()
                    )
                    assert engine.outputs[0].name == "logits"


@needs_data
@pytest.mark.data
def test_labels_under_hugging_faces_resizing():
    """What averaging instead of Pillow's filter changes in the labels of a trained network."""
    import cv2

    path = datasets.data_root() / "priors" / "espnetv2_s2.0_voc_384x384.onnx"
    model = onnx_file(path)
    processor = transformers.SegformerImageProcessor(size={"height": 384, "width": 384})
    agreement = []
    with OnnxEngine(path) as engine:
        for photo in sorted((datasets.data_root() / "coco_mini" / "images").glob("*.jpg"))[:6]:
            image = cv2.cvtColor(cv2.imread(str(photo)), cv2.COLOR_BGR2RGB)
            theirs = processor(image, return_tensors="np")["pixel_values"]
            ours = model.preprocess(image)
            labels = [engine(x)[0].argmax(1) for x in (theirs, ours)]
            agreement.append((labels[0] == labels[1]).mean())
    assert np.mean(agreement) > 0.97 and min(agreement) > 0.9
