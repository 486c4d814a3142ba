"""export/models.py and export/to_onnx.py: checkpoints whole and broken, files, the frozen ONNX."""

import ast
import json
import os
import pickle
import re
import shutil
import socket
import sys
from dataclasses import replace

import numpy as np
import pytest
from developer_data import needs_data
from exporting import tiny_segformer
from scenes import scene

from benchmarks import cases
from export.models import PriorModel, load_model, onnx_file, segformer, serialised
from export.to_onnx import freeze, frozen_preprocess
from runtime.engine import OnnxEngine
from runtime.errors import BundleError, InputError, MissingBackend, VerificationFailed
from runtime.preprocess import Preprocess
from sdk import Segmenter

torch = pytest.importorskip("torch", reason="networks are exported by torch: pip install torch")
onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("onnxslim", reason="needs onnxslim")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402 (after importorskip)

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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tiny checkpoint in Hugging Face's format."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-segformer"
    network = tiny_segformer(NAMES, seed=1)
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to break."""
    return shutil.copytree(whole, tmp_path / "copy")


@pytest.fixture(scope="module")
def frozen(whole):
    return freeze(segformer(whole))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def state(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def save(folder, tensors):
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit(path, **changes):
    """Change a JSON file; None takes a key out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


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


# Checkpoints


def test_checkpoint_is_read_whole(whole):
    model = load_model("segformer", whole)
    assert (model.name, model.names, model.output) == ("tiny-segformer", NAMES, "logits")
    assert model.trained and "research" in model.licence
    assert model.preprocess.size(480, 640) == SIZE
    own = transformers.SegformerForSemanticSegmentation.from_pretrained(whole).eval()
    x = model.preprocess(picture())
    with torch.no_grad():
        wanted = own(torch.from_numpy(x)).logits.numpy()
    np.testing.assert_array_equal(run(model, x), wanted)
    assert wanted.shape == (1, 5, 16, 24) and np.ptp(wanted.argmax(1)) > 0


def test_other_ways_to_store_the_weights_give_the_same_network(whole, folder):
    x = np.random.default_rng(0).standard_normal((1, 3, *SIZE), np.float32)
    wanted = run(segformer(whole), x)
    os.remove(folder / "model.safetensors")
    torch.save(state(whole), folder / "pytorch_model.bin")
    np.testing.assert_array_equal(run(segformer(folder), x), wanted)
    os.remove(folder / "pytorch_model.bin")
    own = transformers.SegformerForSemanticSegmentation.from_pretrained(whole)
    own.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    np.testing.assert_array_equal(run(segformer(folder), x), wanted)
    own.half().save_pretrained(folder / "half")
    shutil.copy(whole / "preprocessor_config.json", folder / "half")
    single = segformer(folder / "half")  # computed in FP32 whatever the file holds
    np.testing.assert_allclose(run(single, x), wanted, atol=2e-3 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "break_it, error, match",
    [
        (lambda f: os.remove(f / "config.json"), InputError, r"config.json is missing.*\n.*copy"),
        (lambda f: (f / "config.json").write_text("{"), InputError, "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), InputError, "holds a list; wanted a JSON"),
        (lambda f: os.remove(f / "preprocessor_config.json"), InputError,
         r"preprocessor_config.json is missing"),
        (lambda f: os.remove(f / "model.safetensors"), BundleError, "cannot be loaded: .*no file"),
        (lambda f: edit(f / "config.json", model_type="bert"), InputError,
         "is for 'bert'; wanted 'segformer'\n.*--model PATH.onnx"),
        (lambda f: edit(f / "config.json", id2label={"0": "a", "2": "b"}), InputError,
         "id2label has other keys than 0, 1, 2"),
        (lambda f: edit(f / "config.json", hidden_sizes=[8, 24]), BundleError,
         "mismatched: .*and [0-9]+ more"),
        (lambda f: edit(f / "config.json", depths=[2, 1]), BundleError,
         r"missing: segformer\.\S+, .* and [0-9]+ more"),
        (lambda f: edit(f / "config.json", depths=None, hidden_sizes=None), BundleError,
         "are not those of the network in config.json"),
    ],
)  # fmt: skip
def test_broken_folder_is_named(folder, break_it, error, match):
    break_it(folder)
    with pytest.raises(error, match=match):
        segformer(folder)


def test_missing_head_is_no_random_head(folder):
    tensors = state(folder)
    del tensors["decode_head.classifier.weight"]
    save(folder, tensors)
    with pytest.raises(BundleError, match=r"config.json; missing: decode_head.classifier.weight\n"):
        segformer(folder)


def test_extra_and_misshapen_weights_are_named(folder):
    tensors = state(folder)
    tensors["decode_head.second.weight"] = torch.zeros(3)
    save(folder, tensors)
    with pytest.raises(BundleError, match=r"unexpected: decode_head.second.weight\n"):
        segformer(folder)
    del tensors["decode_head.second.weight"]
    tensors["decode_head.classifier.bias"] = torch.zeros(7)
    save(folder, tensors)
    with pytest.raises(BundleError, match=r"mismatched: decode_head.classifier.bias\n"):
        segformer(folder)


@pytest.mark.parametrize("length", [0, 4, 8, 2000, -1])
def test_truncated_weights_are_named(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BundleError, match="copy cannot be loaded: "):
        segformer(folder)


class Attack:
    """A pickle that runs code when it is read."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_pickled_code_is_refused_and_does_not_run(folder, tmp_path, write):
    proof = tmp_path / "it-ran"
    os.remove(folder / "model.safetensors")
    write({"decode_head.classifier.bias": Attack(proof)}, folder / "pytorch_model.bin")
    with pytest.raises(BundleError, match=r"(?s)no plain weights.*fix: .*safetensors"):
        segformer(folder)
    assert not proof.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes()) if write is not torch.save else None
    assert proof.exists() == (write is not torch.save)  # the attack is a real one


def test_code_in_the_folder_does_not_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    edit(folder / "config.json", auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Config"})
    assert segformer(folder).names == NAMES


@pytest.mark.parametrize("name", ["nvidia/segformer-b0-finetuned-ade-512-512", "no-such-folder"])
def test_nothing_is_downloaded(name):
    with pytest.raises(
        InputError, match=r"nothing is downloaded\n  fix: .*hf download .*--weights"
    ):
        load_model("segformer", name)


@pytest.mark.parametrize(
    "changes, size",
    [
        ({"size": 128}, (128, 128)),
        ({"size": {"shortest_edge": 160}}, (160, 160)),
        ({"size": {"height": 32, "width": 160}}, (32, 160)),
        ({"size": None}, (512, 512)),
    ],
)
def test_size_is_read_in_all_its_spellings(folder, changes, size):
    edit(folder / "preprocessor_config.json", **changes)
    assert segformer(folder).preprocess.size(1, 1) == size
    assert segformer(folder, (64, 32)).preprocess.size(1, 1) == (64, 32)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_mean": None, "image_std": None, "do_rescale": None, "rescale_factor": None},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 1]},
        {"do_rescale": False, "image_mean": [123.7, 116, 104], "image_std": [58.4, 57, 57.4]},
    ],
)
def test_normalisation_is_that_of_hugging_face(folder, changes):
    """Without resizing nothing but rounding may differ."""
    edit(folder / "preprocessor_config.json", **changes)
    processor = transformers.SegformerImageProcessor.from_pretrained(folder)
    image = picture(*SIZE)
    wanted = processor(image, return_tensors="np")["pixel_values"]
    ours = segformer(folder).preprocess(image)
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)


def test_resizing_is_near_that_of_hugging_face(folder):
    """Averaging against Pillow's triangle filter; the bounds are what was seen, rounded up."""
    processor = transformers.SegformerImageProcessor.from_pretrained(folder)
    ours = segformer(folder).preprocess
    image = picture(321, 481)
    difference = ours(image) - processor(image, return_tensors="np")["pixel_values"]
    assert np.abs(difference).mean() < 0.02 and np.abs(difference).max() < 0.8
    assert abs(difference.mean()) < 2e-3  # no shift


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"do_resize": False}, "do_resize is False; wanted true"),
        ({"do_normalize": "yes"}, "do_normalize is 'yes'; wanted true or false"),
        ({"do_pad": True}, "do_pad is True; wanted false: this step is not supported"),
        ({"resample": 3}, r"resample is 3; wanted 2 \(bilinear\)"),
        ({"size": {"longest_edge": 512}}, "size is {'longest_edge': 512}; wanted a number"),
        ({"size": "big"}, "size is 'big'; wanted a number"),
        ({"size": {"height": 0, "width": 3}}, "size is .*wanted a number"),
        ({"rescale_factor": 0}, "rescale_factor is 0; wanted a number above 0"),
        ({"rescale_factor": "x"}, "rescale_factor is 'x'; wanted a number above 0"),
        ({"image_mean": [0.5]}, r"image_mean is \[0.5\]; wanted three numbers"),
        ({"image_std": [1, 1, "a"]}, "image_std is .*; wanted three numbers"),
        ({"image_std": [1, 1, 0]}, "std is .*wanted three numbers"),
        ({"size": 16}, r"imgsz is \(16, 16\); SegFormer wants at least 32 x 32"),
    ],
)
def test_unknown_preprocessing_names_the_key(folder, changes, match):
    edit(folder / "preprocessor_config.json", **changes)
    with pytest.raises(InputError, match=match):
        segformer(folder)


def test_classes_without_names_have_none(folder):
    edit(folder / "config.json", id2label=None, label2id=None, num_labels=5)
    assert segformer(folder).names is None


def test_b0_and_b5_have_their_published_sizes():
    """Parameters of SegFormer's table 6 (encoder and decoder), from configs alone."""
    counts = {}
    for name, depths, sizes, width in (
        ("b0", [2, 2, 2, 2], [32, 64, 160, 256], 256),
        ("b5", [3, 6, 40, 3], [64, 128, 320, 512], 768),
    ):
        config = transformers.SegformerConfig(
            depths=depths, hidden_sizes=sizes, decoder_hidden_size=width, num_labels=150
        )
        with torch.device("meta"):  # shapes without numbers
            network = transformers.SegformerForSemanticSegmentation(config)
        counts[name] = sum(p.numel() for p in network.parameters()) / 1e6
    assert counts["b0"] == pytest.approx(3.8, abs=0.1) and counts["b5"] == pytest.approx(
        84.7, abs=1
    )


def test_untrained_b0_says_so_and_is_the_same_each_time():
    before = torch.get_rng_state()
    first, second = segformer(None, (32, 64)), segformer(None, (32, 64))
    assert torch.equal(torch.get_rng_state(), before)
    assert not first.trained and first.names is None and "untrained" in first.name
    x = np.ones((1, 3, 32, 64), np.float32)
    np.testing.assert_array_equal(run(first, x), run(second, x))
    assert sum(p.numel() for p in first.module.parameters()) == pytest.approx(3.75e6, rel=0.01)
    data = freeze(first)
    with OnnxEngine(data) as engine:
        assert "untrained" in engine.metadata["description"]
        np.testing.assert_allclose(engine(x)[0], run(first, x), atol=1e-5)


# The choice of a model


@pytest.mark.parametrize(
    "text, near",
    [("segfromer", "segformer"), ("Kmeans", "kmeans"), ("k-means", "kmeans"), ("yolo", None)],
)
def test_unknown_model_suggests_the_nearest(text, near):
    with pytest.raises(InputError, match="wanted segformer, kmeans, a path ending") as caught:
        load_model(text)
    assert caught.value.fix == (f"did you mean --model {near}?" if near else "")


def test_weights_and_size_where_they_mean_nothing():
    with pytest.raises(InputError, match="weights are for segformer only; model is 'kmeans'"):
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
from runtime.preprocess import Preprocess

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


@pytest.mark.parametrize(
    "change, names, match",
    [
        (lambda x: (x, x), None, r"net gives a tuple; wanted one tensor: .*\n  fix: wrap it"),
        (lambda x: {"out": x}, None, r"net gives a dict; wanted one tensor"),
        (lambda x: x[0, 0], None, r"net gives \(32, 48\); wanted one tensor"),
        (lambda x: x, ["a", "b"], r"net gives 1 classes, but has 2 names\n  fix: "),
        (lambda x: x.reshape(7, -1), None, r"net fails on \(1, 3, 32, 48\) float32: .*\n  fix: "),
    ],
)
def test_modules_that_answer_otherwise(change, names, match):
    pp = Preprocess(mean=(0, 0, 0), std=(1, 1, 1), height=32, width=48)
    with pytest.raises(InputError, match=match):
        freeze(PriorModel(name="net", module=Answers(change), preprocess=pp, names=names))


def test_scores_that_are_no_numbers():
    pp = Preprocess(mean=(0, 0, 0), std=(1, 1, 1), height=32, width=48)
    model = PriorModel(name="net", module=Answers(lambda x: x * torch.nan), preprocess=pp)
    with pytest.raises(VerificationFailed, match=r"net gives NaN or infinite scores\n  fix: "):
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
    ):
        with pytest.raises(InputError, match=match):
            PriorModel(name="p", **changes)


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
    with pytest.raises(InputError, match=r"fixed input of \[2, 3, 24, 48\]; wanted \[1, 3, 24"):
        freeze(onnx_file(batch))
    named = small_onnx(tmp_path / "named.onnx", shape=("n", 3, 24, 48))
    with OnnxEngine(freeze(onnx_file(named))) as engine:
        assert engine.inputs[0].shape == (1, 3, 24, 48)


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


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"mean": None}, "metadata 'mean' is missing"),
        ({"classes": '"a"'}, "metadata 'classes' is 'a'; wanted a list of names"),
        ({"classes": "["}, "metadata 'classes' is no JSON"),
        ({"input_size": '{"width": -1}'}, "metadata 'input_size' is"),
        ({"shape": (1, 3, 8)}, r"wants inputs .*; wanted one \(1, 3, h, w\) float32"),
        ({"dtype": TensorProto.DOUBLE}, r"wants inputs .*double.*; wanted one \(1, 3, h, w\)"),
    ],
)
def test_files_that_do_not_fit(tmp_path, changes, match):
    if "dtype" in changes or changes.get("shape"):
        changes = changes | {"inside": ("Relu",)}
    with pytest.raises(BundleError, match=match):
        onnx_file(small_onnx(tmp_path / "net.onnx", **changes))


def test_no_onnx_at_all(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_model(str(tmp_path / "none.onnx"))
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(BundleError):
        load_model(str(tmp_path / "text.onnx"))


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


def test_more_than_a_file_holds():
    from google.protobuf.message import EncodeError

    class Large:
        def SerializeToString(self, deterministic):
            raise EncodeError("Failed to serialize proto")

    with pytest.raises(BundleError, match="net has 2 GiB or more with its weights"):
        serialised(Large(), "net")


# Real priors


@needs_data
@pytest.mark.data
@pytest.mark.parametrize("name", ["s0.5_voc_256x256", "s0.5_cityscapes_512x256"])
def test_real_priors_freeze_fixed_and_free(name):
    path = cases.data_root() / "priors" / f"espnetv2_{name}.onnx"
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
            np.testing.assert_allclose(engine(x)[0], wanted, atol=2e-6 * np.abs(wanted).max())
            assert engine.outputs[0].name == "logits"


@needs_data
@pytest.mark.data
def test_labels_under_hugging_faces_resizing():
    """What averaging instead of Pillow's filter changes in the labels of a trained network."""
    import cv2

    path = cases.data_root() / "priors" / "espnetv2_s2.0_voc_384x384.onnx"
    model = onnx_file(path)
    processor = transformers.SegformerImageProcessor(size={"height": 384, "width": 384})
    agreement = []
    with OnnxEngine(path) as engine:
        for photo in sorted((cases.data_root() / "coco_mini" / "images").glob("*.jpg"))[:6]:
            image = cv2.cvtColor(cv2.imread(str(photo)), cv2.COLOR_BGR2RGB)
            theirs = processor(image, return_tensors="np")["pixel_values"]
            ours = model.preprocess(image)
            labels = [engine(x)[0].argmax(1) for x in (theirs, ours)]
            agreement.append((labels[0] == labels[1]).mean())
    assert np.mean(agreement) > 0.97 and min(agreement) > 0.9
