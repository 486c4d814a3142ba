"""From a prior to a bundle, by python -m export and by its Python: what is written, and what the
command line takes and refuses. Engines for TensorRT for RTX are really built."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from cases import case
from exporting import CAPABILITIES, RTX, export, files, graph, needs_rtx, no_gpu
from one_layer_networks import NAMES

import runtime
from export import pack
from export.pack import ExportOptions
from runtime.bundle import engines
from runtime.bundle.manifest import file_entry
from runtime.bundle.read import Bundle
from runtime.core.refiner import Refiner
from runtime.engines.onnx import OnnxEngine
from runtime.engines.recipe import EngineRecipe
from runtime.errors import (
    DeviceError,
    InputError,
)
from runtime.prior.preprocess import Preprocess
from runtime.tensors import load_tensors
from sdk import RefineConfig, Segmenter

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
torch = pytest.importorskip("torch", reason="networks are exported by torch: pip install torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("onnxslim", reason="needs onnxslim")


# What is written


@needs_rtx
def test_kmeans_with_engines_built_ahead_of_time(work, photos):
    path = work / "k.bundle"
    ended = export("--model", "kmeans", "--imgsz", 96, 144, "--pictures", photos, *RTX, "-o", path)
    assert ended.code == 0
    bundle = Bundle.open(path)
    bundle.check_files()
    m = bundle.manifest
    assert set(m["graphs"]) == {"refine_step", "refine_map"} and m["preprocess"] is None
    assert m["prior"] == {"kind": "kmeans", "clusters": 5, "temperature": 12.0}
    assert [e["graph"] for e in m["engines"]] == ["refine_step", "refine_map"]
    for engine in m["engines"]:
        assert engine["compute_capabilities"] == [*CAPABILITIES]
        assert engine["receipt"]["layers"].keys() == {"fp32"} and engine["gpu_name"] is None
        assert engine["shapes"]["image"] == [[1, 3, 48, 72]] * 3
        shapes = {p["name"]: p["shape"] for p in engine["inputs"]}
        assert shapes["image"] == [1, 3, 48, 72] and shapes["guide"] == [1, 5, 48, 72]
    # the last lines: the artifact, the verification, the receipts, the next command
    lines = ended.out.splitlines()
    kinds = ["saved", "verify", "verify", "receipt", "receipt", "next"]
    assert [line.split()[0] for line in lines] == kinds
    assert str(path) in lines[0] and "2 engines" in lines[0]
    assert lines[1] == "verify   on 1 picture: 0.png"  # k-means uses the first picture only
    assert "100% fp32" in lines[3] and "8.6,8.9,12.0" in lines[3]
    assert lines[-1] == f"next     python -m sdk predict PICTURE --prior {path}"
    # and the bar of TensorRT's own progress
    assert "build refine_step for rtx ..." in ended.err and "100 %" in ended.err


def test_a_network_and_how_it_is_fed(plain, photos, colours):
    bundle = Bundle.open(plain[1])
    bundle.check_files()
    m = bundle.manifest
    assert m["model"] == {"name": "colours", "trained": True} and m["classes"] == NAMES
    assert m["licence"]["text"] == "MIT" and m["sdk"] == runtime.__version__
    assert m["recipe"]["targets"] == ["onnx"] and m["engines"] == []
    command = (
        "python -m export --model colours.onnx --imgsz 48x72 --pictures photos -o plain.bundle"
    )
    assert m["recipe"]["command"] == f"{command} -q"  # without this machine's folders
    assert m["recipe"]["shapes"]["prior"] == {}  # fixed
    assert m["recipe"]["shapes"]["refine_step"]["image"] == [[1, 3, 24, 36]] * 3
    assert m["verification"]["pictures"] == [f"{i}.png" for i in range(4)]
    assert m["verification"]["prior"]["pictures"] == 4
    assert m["verification"]["prior"]["frozen"]["agreement"] == 1
    assert 0 < m["verification"]["refine"]["update"] < 5e-5
    assert m["verification"]["refine"]["agreement"] > 0.99
    # the golden picture is the first, and its input is made by the rule of the manifest
    arrays = bundle.tensors(m["golden"][0])
    first = cv2.imread(str(photos / "0.png"))[..., ::-1]
    assert np.array_equal(arrays["picture"], first)
    rule = Preprocess.from_manifest(m["preprocess"])
    assert (rule.resize, rule.height, rule.width, rule.color) == ("stretch", 48, 72, "rgb")
    assert np.array_equal(arrays["input"], rule(arrays["picture"]))
    with OnnxEngine(bundle.graph("prior")) as engine:
        scores = engine(arrays["input"])[0][0]
    assert np.array_equal(arrays["guide"].argmax(-1), scores.argmax(0))
    assert m["golden"][0]["steps"] == 10 and len(np.unique(arrays["labels"])) > 1


def test_the_prior_of_a_bundle_works_alone(plain, photo, tmp_path):
    (tmp_path / "prior.onnx").write_bytes(Bundle.open(plain[1]).graph("prior"))
    alone = Segmenter(tmp_path / "prior.onnx")(photo)
    whole = Segmenter(plain[1])(photo)
    assert np.array_equal(alone.labels, whole.labels) and alone.names == whole.names == NAMES
    assert len(np.unique(whole.labels)) > 1


@needs_rtx
def test_segformer_in_fp16(work, checkpoint, photos):
    words = ("--model", "segformer", "--weights", checkpoint, "--half", "--pictures", photos)
    ended = export(*words, *RTX, "-o", work / "half.bundle", "-q")
    assert ended.code == 0 and ended.err == ""
    m = Bundle.open(work / "half.bundle").manifest
    prior = m["graphs"]["prior"]
    assert prior["precision"] == "fp16" and m["model"]["trained"]
    kept = {text.partition("(")[2].rstrip(")").partition(":")[0] for text in prior["kept_fp32"]}
    assert {"LayerNormalization", "Softmax"} <= kept
    assert {p["dtype"] for p in (*prior["inputs"], *prior["outputs"])} == {"float32"}
    assert m["verification"]["prior"]["fp16"]["agreement"] >= 0.995
    assert m["verification"]["prior"]["frozen"]["agreement"] >= 0.999
    by_graph = {e["graph"]: e["receipt"]["layers"] for e in m["engines"]}
    assert by_graph["prior"].keys() == {"fp16", "fp32"} and by_graph["prior"]["fp16"] > 10
    assert by_graph["refine_step"].keys() == {"fp32"}
    assert "verify   prior fp16 vs fp32: " in ended.out
    # the same network again: the same graphs and the same engine, byte for byte
    again = export(*words, *RTX, "-o", work / "again.bundle", "-q")
    assert again.code == 0
    n = Bundle.open(work / "again.bundle").manifest
    assert n["graphs"] == m["graphs"] and n["init"] == m["init"] and n["golden"] == m["golden"]
    for key in ("key", "graph", "size", "inputs", "outputs", "receipt"):
        assert [e[key] for e in n["engines"]] == [e[key] for e in m["engines"]]
    # The builder itself (1.7.1) arranges the refinement's plans in one of a few ways.
    assert n["engines"][0]["sha256"] == m["engines"][0]["sha256"]


@pytest.mark.parametrize("half", [False, True])
def test_segformer_in_int8(tmp_path, checkpoint_onnx, photos, half):
    words = ("--model", checkpoint_onnx, "--int8", "--data", photos)
    words += ("--fraction", 0.5, "--pictures", photos, *(["--fp16"] if half else []))
    assert export(*words, "-o", tmp_path / "b", "-q").code == 0
    bundle = Bundle.open(tmp_path / "b")
    m, precision = bundle.manifest, "int8+fp16" if half else "int8"
    assert m["graphs"]["prior"]["precision"] == precision
    assert m["verification"]["prior"][precision]["agreement"] >= 0.97
    hashed = [file_entry("", (photos / f"{i}.png").read_bytes())["sha256"] for i in (0, 1)]
    assert m["verification"]["calibration"]["sha256"] == hashed
    kinds = [node.op_type for node in graph(bundle, "prior").graph.node]
    assert kinds.count("QuantizeLinear") > 3
    types = {tensor.data_type for tensor in graph(bundle, "prior").graph.initializer}
    assert (onnx.TensorProto.FLOAT16 in types) == half == bool(m["graphs"]["prior"]["kept_fp32"])
    assert Segmenter(bundle.path).info()["precision"] == precision


def test_an_untrained_network_says_so_loudly(tmp_path, photos, monkeypatch):
    real = transformers.SegformerConfig

    def smaller(**options):
        sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1] * 4, "decoder_hidden_size": 8}
        return real(**options, **sizes)

    monkeypatch.setattr(transformers, "SegformerConfig", smaller)
    words = ("--model", "segformer", "--imgsz", 64, "--pictures", photos)
    ended = export(*words, "-q", "-o", tmp_path / "b")
    assert ended.code == 0
    assert ended.err.startswith("WARNING: segformer-b0-untrained has RANDOM weights")
    assert "warning  the prior has RANDOM weights" in ended.out
    m = Bundle.open(tmp_path / "b").manifest
    assert m["model"] == {"name": "segformer-b0-untrained", "trained": False}
    assert m["licence"]["text"] == "none: random weights"


def test_a_users_own_network(tmp_path, monkeypatch, photos):
    (tmp_path / "mine_for_a_test.py").write_text(
        "import torch\nfrom export.models import PriorModel\nfrom runtime.prior.preprocess import "
        "Preprocess\n\ndef network(imgsz):\n    height, width = imgsz or (32, 48)\n"
        "    torch.manual_seed(0)\n    module = torch.nn.Conv2d(3, 4, 3, padding=1)\n"
        "    pp = Preprocess(mean=(0.5,) * 3, std=(0.1,) * 3, height=height, width=width)\n"
        "    return PriorModel(name='mine', module=module, preprocess=pp)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ("--model", "mine_for_a_test:network", "--pictures", photos, "-q")
    assert export(*words, "-o", tmp_path / "b").code == 0
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.manifest["classes"] is None and bundle.preprocess().size(1, 1) == (32, 48)
    shapes = bundle.manifest["recipe"]["shapes"]
    assert shapes["refine_step"]["guide"] == [[1, 4, 16, 24]] * 3
    assert export(*words, "-o", tmp_path / "b", "--imgsz", 40).code == 0
    assert Bundle.open(tmp_path / "b").preprocess().size(1, 1) == (40, 40)


@needs_rtx
def test_free_sizes_with_a_profile(tmp_path, colours, photos, photo):
    words = ("--model", colours, "--pictures", photos, "--dynamic", "--refine", "dynaguide")
    sizes = ("--min-shape", 32, "--opt-shape", "48x72", "--max-shape", "96", "144")
    path = tmp_path / "b"
    ended = export(*words, *sizes, *RTX[:3], "8.6", "--steps", 2, "-o", path, "-q")
    assert ended.code == 0, ended.err
    bundle = Bundle.open(path)
    m = bundle.manifest
    three = {e["graph"]: e["shapes"] for e in m["engines"]}
    assert three["prior"] == {"image": [[1, 3, 32, 32], [1, 3, 48, 72], [1, 3, 96, 144]]}
    assert three["refine_step"]["image"] == [[1, 3, 16, 16], [1, 3, 24, 36], [1, 3, 48, 72]]
    assert three["refine_step"]["guide"] == [[1, 4, 16, 16], [1, 4, 24, 36], [1, 4, 48, 72]]
    ports = next(e["inputs"] for e in m["engines"] if e["graph"] == "prior")
    assert ports == [{"name": "image", "dtype": "float32", "shape": [1, 3, "height", "width"]}]
    assert bundle.preprocess().resize == "long_side" and bundle.preprocess().long_side == 72
    first = Segmenter(path, refine_backend="onnx")(photo)
    assert first.labels.shape == photo.shape[:2] and first.stats["objective"] == "dynaguide"


@pytest.mark.parametrize("name", ["dynaguide", "dynaguide_code", "fast"])
def test_the_step_is_that_of_the_refinement_asked_for(tmp_path, plain, photo, name):
    words, _ = plain
    path = tmp_path / "b"
    changes = ("--steps", 3, "--seed", 5, "--lr", 0.02, "--scale", 0.3)
    assert export(*words, "--refine", name, *changes, "-o", path, "-q").code == 0
    bundle = Bundle.open(path)
    wanted = RefineConfig.preset(name, steps=3, seed=5, lr=0.02, scale=0.3)
    assert bundle.refine() == wanted and bundle.manifest["golden"][0]["steps"] == 3
    options = {p.key: p.value for p in graph(bundle, "refine_step").metadata_props}["dg.options"]
    assert json.loads(options)["objective"] == wanted.objective
    inputs = [p["name"] for p in bundle.manifest["graphs"]["refine_step"]["inputs"]]
    assert ("assign" in inputs) == (wanted.objective == "dynaguide")
    native = Segmenter(path)(photo)
    ours = Segmenter(path, refine_backend="onnx", self_test="always")
    assert ours.info()["self_test"]["labels"] >= 0.99
    assert (ours(photo).labels == native.labels).mean() > 0.99
    assert native.stats["steps"] == 3


@pytest.mark.parametrize("name", ["residual", "dynaguide_code"])
def test_weights_trained_beforehand(tmp_path, plain, photo, name):
    from safetensors.numpy import save_file

    words, _ = plain
    config = RefineConfig.preset(name, steps=3, lr=0.2)
    h, w = config.working_size(*photo.shape[:2])
    low = np.ascontiguousarray(photo[::2, ::2], np.float32)[:h, :w] / 255
    guide = np.random.default_rng(0).dirichlet(np.ones(4), (h, w)).astype(np.float32)
    refiner = Refiner(h, w, classes=4 if name == "residual" else None, **config.options())
    refiner.run(low, guide, steps=20)
    save_file(refiner.state_dict(), tmp_path / "state.safetensors")

    words += ("--refine", name, "--steps", 3, "-q")
    trained, fresh = tmp_path / "trained", tmp_path / "fresh"
    assert export(*words, "--init", tmp_path / "state.safetensors", "-o", trained).code == 0
    assert export(*words, "-o", fresh).code == 0
    bundle = Bundle.open(trained)
    m = bundle.manifest
    assert "cnn" in m["graphs"] and "cnn" not in Bundle.open(fresh).manifest["graphs"]
    assert m["verification"]["cnn"]["scores"] < 1e-4
    kept = load_tensors((trained / "init.safetensors").read_bytes(), "init")
    for key, value in refiner.state_dict().items():
        assert np.array_equal(kept[key], value), key
    assert [p["name"] for p in m["graphs"]["cnn"]["inputs"]] == (
        ["image", "guide"] if name == "residual" else ["image"]
    )
    # a Segmenter starts from them, on either backend, and says so in its golden test
    start = replace(bundle.refine(), steps=0)
    maps = {}
    for which, path in (("trained", trained), ("fresh", fresh)):
        for backend in ("native", "onnx"):
            seg = Segmenter(path, refine=start, refine_backend=backend, filter=None)
            assert seg.info()["self_test"]["labels"] >= 0.99
            maps[which, backend] = seg(photo).confidence
    assert np.abs(maps["trained", "native"] - maps["trained", "onnx"]).max() < 1e-4
    assert np.abs(maps["trained", "native"] - maps["fresh", "native"]).max() > 1e-2


def test_weights_of_another_network(tmp_path, plain):
    from safetensors.numpy import save_file

    words, _ = plain
    path = tmp_path / "state.safetensors"
    refiner = Refiner(8, 8, classes=3, **RefineConfig().options())
    save_file(refiner.state_dict(), path)
    words += ("--init", path, "-o", tmp_path / "b", "-q")
    assert export(*words).refused(1, "conv3")  # the network has four classes
    assert export(*words, "--refine", "dynaguide").refused(1, "state")
    path.write_bytes(b"no tensors")
    assert export(*words).refused(5, "state.safetensors is no safetensors file")
    path.unlink()
    assert export(*words).refused(1, "state.safetensors does not exist")
    assert not (tmp_path / "b").exists()


# The command line


@no_gpu
@needs_rtx
@pytest.mark.skipif("tensorrt" in sys.modules, reason="TensorRT is loaded")
def test_trt_is_left_for_the_device(tmp_path, plain):
    words, _ = plain
    path = tmp_path / "b"
    ended = export(*words, "--target", "rtx,trt", *RTX[2:3], "86", "-o", path)
    assert ended.refused(4, "the engines are not built: ")
    assert ended.err.splitlines()[-1] == f"  fix: on the device: python -m runtime build {path}"
    assert ended.out.splitlines()[-1] == f"next     on the device: python -m runtime build {path}"
    m = Bundle.open(path).manifest
    Bundle.open(path).check_files()
    assert m["recipe"]["targets"] == ["rtx", "trt"] and len(m["engines"]) == 3
    assert {e["runtime"] for e in m["engines"]} == {"tensorrt_rtx"}
    assert Segmenter(path).info()["self_test"]["labels"] == 1


@needs_rtx
def test_timings_are_read_and_written(tmp_path, plain, monkeypatch):
    """TensorRT for RTX in the place of TensorRT, which needs a GPU."""
    words, seen = plain[0], []
    wanted, build = engines.wanted_engines, engines.build

    def timed(entry, *arguments, timing_cache, **options):
        seen.append(timing_cache)
        whole, plan, _ = build(entry, *arguments, **options)
        return whole, plan, (timing_cache or b"") + b"."

    def both(manifest, graphs, target, **options):
        return wanted(manifest, graphs, "rtx", **options) if target == "trt" else []

    monkeypatch.setattr(engines, "wanted_engines", both)
    monkeypatch.setattr(engines, "build", timed)
    words += ("--target", "rtx,trt", *RTX[2:3], "8.6", "-o", tmp_path / "b", "-q")
    words += ("--timing-cache", tmp_path / "times")
    for count in (3, 6):
        assert export(*words).code == 0
        assert (tmp_path / "times").read_bytes() == count * b"."
    assert seen == [count * b"." for count in range(6)]


WORDS = [
    (("--format", "engine", "--imgsz", "480", "640"), ["trt"], (480, 640), None),
    (("--format", "tensorrt", "--imgsz", "480x640"), ["trt"], (480, 640), None),
    (("--target", "ort", "--imgsz", "640", "--workspace", "2"), ["onnx"], (640, 640), 2**31),
    (("--workspace", "2048M", "--device", "0"), ["onnx"], None, 2**31),
    (("--workspace", "auto", "--device", "cuda:0"), ["onnx"], None, None),
    (("--target", "onnx, TRT,onnx", "--fp16", "--batch", "1"), ["onnx", "trt"], None, None),
    (("--target", "rtx", "--compute-capability", "sm_86, 12.0"), ["rtx"], None, None),
    (("--opt-shape", "64", "--dynamic", "--no-simplify"), ["onnx"], (64, 64), None),
    (("--device", "cuda:1", "--target", "trt", "--opt-level", "5"), ["trt"], None, None),
]


@no_gpu
def test_the_words_of_other_tools(monkeypatch):
    seen = []

    def stop(model, out, options, **_):
        seen.append(options)
        raise DeviceError("far enough")

    monkeypatch.setattr(pack, "export_bundle", stop)
    for words, targets, imgsz, workspace in WORDS:
        with case(*words):
            seen.clear()
            assert export("--model", "kmeans", *words).refused(1, "far enough")
            (options,) = seen
            assert [*options.targets] == targets and options.imgsz == imgsz
            assert options.engine.workspace == workspace and options.half == ("--fp16" in words)
            assert options.device == int("cuda:1" in words)
            assert options.simplify != ("--no-simplify" in words)
            assert options.engine.compute_capabilities == (
                ("8.6", "12.0") if targets == ["rtx"] else ()
            )


def test_json_is_one_document(tmp_path, plain):
    words, _ = plain
    ended = export(*words, "--json", "-q", "-o", tmp_path / "b")
    document = json.loads(ended.out)
    assert ended.code == 0 and ended.err == "" and document["missing"] is None
    assert document["bundle"] == str(tmp_path / "b")
    assert document["manifest"] == Bundle.open(tmp_path / "b").manifest
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("")
    ended = export(*words, "--json", "-o", tmp_path / "other", "--target", "onnx")
    assert ended.code == 1 and "is left alone" in json.loads(ended.out)["error"]
    ended = export(*words, "--json", "-o", "")
    assert ended.code == 2 and "it is empty; wanted a path" in json.loads(ended.out)["error"]
    ended = export(*words, "--json", "--taregt", "onnx")
    assert ended.code == 2 and json.loads(ended.out)["fix"] == "did you mean --target?"


@no_gpu
def test_json_says_what_is_missing(tmp_path, plain):
    words, _ = plain
    ended = export(*words, "--json", "-q", "-o", tmp_path / "b", "--target", "trt")
    assert ended.code == 4 and "tensorrt" in json.loads(ended.out)["missing"].lower()


def test_quiet_and_not(tmp_path, plain):
    words, _ = plain
    loud = export(*words, "-o", tmp_path / "b")
    stages = [line.removesuffix(" ...") for line in loud.err.splitlines()]
    assert stages[0] == "freeze colours" and stages[-1] == f"write {tmp_path / 'b'}"
    assert "verify the prior on 4 pictures: 0.png, 1.png, 2.png, 3.png" in stages
    assert "export and verify the residual step" in stages
    assert export(*words, "--quiet", "-o", tmp_path / "b").err == ""


USAGE = [
    (("--targt", "rtx"), ["does not know '--targt'", "did you mean --target?"]),
    (("--tar", "rtx"), ["does not know '--tar'"]),
    (("--refine", "fsat"), ["invalid choice: 'fsat'", "did you mean fast?"]),
    (("--refine", "dynaseg_fsf"), ["invalid choice: 'dynaseg_fsf'", "--help"]),
    (("--batch", "2"), ["--batch: invalid choice: 2"]),
    (("--opt-level", "6"), ["--opt-level: invalid choice: 6"]),
    (("--steps", "few"), ["--steps: invalid int value: 'few'"]),
    (("extra",), ["does not know 'extra'"]),
]


def test_usage():
    for words, texts in USAGE:
        with case(*words):
            assert export("--model", "kmeans", *words).refused(2, *texts)


IMPOSSIBLE = [
    (("--target", "rxt"), ["target is ['rxt']; wanted some of"]),
    (("--target", ","), ["target is empty"]),
    (("--int8",), ["int8 needs pictures to calibrate with", "--data DIR"]),
    (("--data", "."), ["data is for int8 only"]),
    (("--min-shape", "64"), ["are for dynamic shapes", "add --dynamic"]),
    (("--opt-shape", "64"), ["opt-shape is for dynamic shapes", "--imgsz"]),
    (("--dynamic", "--target", "trt", "--min-shape", "64"), ["smallest and the largest size"]),
    (("--dynamic", "--opt-shape", "64", "--imgsz", "96"), ["imgsz and opt-shape differ"]),
    (("--dynamic", "--imgsz", "64", "--min-shape", "96"),
     ["min-shape is (96, 96); wanted at most (64, 64)"]),
    (("--dynamic", "--imgsz", "64", "--max-shape", "32x96"),
     ["max-shape is (32, 96); wanted at least (64, 64)"]),
    (("--compute-capability", "8.6"), ["compute-capability is for target rtx", "leave it out"]),
    (("--target", "rtx", "--compute-capability", "ampere"), ["compute-capability is 'ampere'"]),
    (("--min-agreement", "1.5"), ["min-agreement is 1.5; wanted above 0, at most 1"]),
    (("--min-agreement", "0"), ["min-agreement is 0.0; wanted above 0"]),
    (("--fraction", "0", "--int8", "--data", "."), ["fraction is 0.0; wanted above 0"]),
    (("--imgsz", "64", "64", "3"), ["imgsz is '64 64 3'; wanted HEIGHTxWIDTH"]),
    (("--imgsz", "0x64"), ["imgsz is '0x64'"]),
    (("--imgsz", "big"), ["imgsz is 'big'"]),
    (("--imgsz", "²"), ["imgsz is '²'"]),
    (("--imgsz", "9" * 5000), ["imgsz is '999"]),
    (("--workspace", "2Q"), ["workspace is '2Q'; wanted GiB (2), MiB (2048M) or auto"]),
    (("--workspace", "1K"), ["workspace is '1K'"]),
    (("--device", "cpu"), ["device is 'cpu'; engines are built on a GPU"]),
    (("--device", "tpu"), ["device is 'tpu'; wanted"]),
    (("--lr", "-1"), ["lr is -1.0; wanted a number from 0 to 10"]),
    (("--scale", "2"), ["scale is 2.0; wanted a number above 0, at most 1"]),
    (("--weights", "."), ["weights are for segformer and runs"]),
    (("--pictures", "nowhere.png"), ["nowhere.png does not exist", "current folder is"]),
    (("--pictures", "empty"), ["no pictures in empty"]),
    (("--pictures", "bad.png"), ["bad.png is not a picture"]),
    (("--int8", "--data", "bad.png"), ["bad.png is not a picture"]),
    (("--int8", "--data", "empty"), ["no pictures in empty"]),
    (("--int8", "--data", "0.png", "--dynamic"), ["INT8 wants a fixed input size"]),
    (("--timing-cache", "empty", "--target", "trt"),
     ["timing cache empty is a folder, wanted a file"]),
    (("--timing-cache", "no/t.cache", "--target", "trt"),
     ["timing cache no/t.cache has no folder", "mkdir -p no"]),
    (("-o", "empty/.."), ["exists and is no bundle; it is left alone", "choose another"]),
    (("-o", "bad.png"), ["bad.png exists and is no bundle"]),
    (("--triton", "models", "-o", "taken.bundle"), ["taken exists and is no Triton model"]),
    (("--triton", "0.png"), ["triton is '0.png', and 0.png is a file; wanted a folder"]),
    (("--triton", "0.png/models"), ["triton is '0.png/models', and 0.png is a file"]),
    (("--triton", "b"), ["repository b would be in the bundle b,", "outside of the bundle"]),
    (("--triton", "./b/models/"), ["repository b/models would be in the bundle b,"]),
    (("--triton", "."), ["bundle b would be in the Triton repository .,"]),
    (("--triton", "models", "-o", "models/b"), ["bundle models/b would be in the Triton repos"]),
    (("--triton", "link", "-o", "models/a/b"), ["bundle models/a/b would be in the Triton repos"]),
    (("--triton", "triton"), ["a folder triton here would hide the Python package"]),
]  # fmt: skip


def test_what_cannot_be_done_is_said(tmp_path, monkeypatch, colours, photos):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("models/taken").mkdir(parents=True)
    Path("link").symlink_to("models")
    Path("bad.png").write_bytes(b"no picture")
    Path("0.png").write_bytes((photos / "0.png").read_bytes())
    before = files(tmp_path)
    for words, texts in IMPOSSIBLE:
        with case(*words):
            ended = export("--model", colours, "--pictures", photos, "-q", "-o", "b", *words)
            assert ended.refused(1, *texts)
            assert files(tmp_path) == before


NO_MODELS = [
    (("--model", "kmenas"), ["model is 'kmenas'", "did you mean --model kmeans?"]),
    (("--model", "no.onnx"), ["no.onnx"]),
    (("--model", "nothing.here:at_all"), ["cannot be imported"]),
    (("--model", "export.models.load:BUILT_IN"), ["is a tuple; wanted a function"]),
    (("--model", "segformer", "--weights", "nvidia/mit-b0"), ["hf download nvidia/mit-b0"]),
    (("--model", "segformer", "--imgsz", "8"), ["SegFormer wants at least 32 x 32"]),
    (("--half",), ["half and int8 are for networks; kmeans has none"]),
    (("--triton", "t"), ["triton serves networks; kmeans has none"]),
]


def test_models_that_cannot_be_exported(tmp_path, photos):
    for words, texts in NO_MODELS:
        with case(*words):
            out = tmp_path / "b"
            assert export("--pictures", photos, "-q", "-o", out, *words).refused(1, *texts)
            assert not out.exists()


@no_gpu
def test_rtx_has_to_know_the_gpus(tmp_path, plain):
    words = (*plain[0], "--target", "rtx", "-o", tmp_path / "b")
    assert export(*words).refused(1, "there is none here to ask", "--compute-capability 8.6")
    pytest.importorskip("tensorrt_rtx", reason="pip install 'dynaguide-edge[rtx]'")
    ended = export(*words, "--compute-capability", "8.6,8.7")
    assert ended.refused(1, "cannot build for compute capability 8.7", "--target trt")
    assert not (tmp_path / "b").exists()


def test_without_the_demo_photo(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert export("-o", tmp_path / "b").refused(4, "scikit-image", "--pictures FILE...")


def test_options_in_python():
    assert [ExportOptions(half=h, int8=i, data=(Path("."),) * i).precision
            for h in (0, 1) for i in (0, 1)] == ["fp32", "int8", "fp16", "int8+fp16"]  # fmt: skip
    for options, match in (
        ({"targets": ()}, "target is empty"),
        ({"targets": ("onnx", "tensorrt")}, r"target is \['tensorrt'\]"),
        ({"int8": True}, "int8 needs pictures"),
        ({"data": (Path("."),)}, "data is for int8 only"),
        ({"max_shape": (64, 64)}, "add --dynamic"),
        ({"dynamic": True, "targets": ("rtx",), "min_shape": (1, 1)}, "smallest and the largest"),
        ({"engine": EngineRecipe(compute_capabilities=("8.6",))}, "is for target rtx"),
        ({"min_agreement": 0.0}, "min-agreement is 0"),
        ({"fraction": 1.01}, "fraction is 1.01"),
    ):
        with pytest.raises(InputError, match=match):
            ExportOptions(**options)


def test_a_bundle_is_replaced_and_other_folders_are_not(tmp_path, plain):
    words, _ = plain
    out = tmp_path / "x.bundle"
    assert export(*words, "-o", out, "-q").code == 0
    first = Bundle.open(out).manifest
    assert export(*words, "--seed", 3, "-o", out, "-q").code == 0
    assert Bundle.open(out).refine().seed == 3 and first["refine"]["seed"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["x.bundle"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("keep me")
    assert export(*words, "-o", other).refused(1, "exists and is no bundle; it is left alone")
    assert files(other) == {"letter.txt": b"keep me"}
