"""From a prior to a bundle, by python -m export and by its Python: what is written, what the gate
refuses, and what a Segmenter makes of it. Engines for TensorRT for RTX are really built."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from conftest import scene
from test_prior import NAMES, nearest_colour, save

import runtime
from benchmarks import cases
from export import check, pack
from export.__main__ import main
from export.models import load_model, onnx_file
from export.pack import ExportOptions, export_bundle
from runtime import build as engines
from runtime import golden
from runtime.bundle import Bundle, file_entry, load_tensors
from runtime.device import cuda_devices
from runtime.engine import OnnxEngine
from runtime.errors import (
    DeviceError,
    InputError,
    VerificationFailed,
)
from runtime.ops import Refiner
from runtime.preprocess import Preprocess
from sdk import RefineConfig, Segmenter

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
torch = pytest.importorskip("torch", reason="networks are exported by torch: pip install torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("onnxslim", reason="needs onnxslim")

from onnx import numpy_helper  # noqa: E402 (after importorskip)

ROOT = Path(__file__).parents[1]
SIZE = (64, 96)  # of the small SegFormer; its refinement works at half of it
CAPABILITIES = ("8.6", "8.9", "12.0")
RTX = ("--target", "rtx", "--compute-capability", ",".join(CAPABILITIES))
needs_rtx = pytest.mark.skipif(
    "tensorrt_rtx" not in {d.name for p in sys.path if os.path.isdir(p) for d in os.scandir(p)},
    reason="TensorRT for RTX is not installed: pip install 'dynaguide-edge[rtx]'",
)
no_gpu = pytest.mark.skipif(bool(cuda_devices()), reason="there is a GPU here")
needs_data = pytest.mark.skipif(
    cases.data_root() is None, reason="developer data set absent: set SEG_DATA=/path/to/data"
)


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    def refused(self, code, *texts):
        """It failed in one error with a fix or a value wanted, and said ``texts``."""
        assert self.code == code, self
        assert self.err.count("error: ") == 1 and "Traceback" not in self.err, self.err
        for text in texts:
            assert text in self.err, self.err
        return True


def export(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(w) for w in words])
        except SystemExit as end:
            code = end.code
    return Ended(code, out.getvalue(), err.getvalue())


def files(folder):
    """Everything in a folder, by name."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def graph(bundle, name):
    return onnx.load_from_string(bundle.graph(name))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where passed golden tests are noted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dynaguide-edge" / "golden"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def photos(work):
    folder = work / "photos"
    folder.mkdir()
    for seed in range(4):
        picture = (255 * scene(96, 144, seed=seed)[0]).astype(np.uint8)
        assert cv2.imwrite(str(folder / f"{seed}.png"), picture[..., ::-1])
    return folder


@pytest.fixture(scope="module")
def photo(photos):
    return cv2.imread(str(photos / "1.png"))[..., ::-1].copy()


@pytest.fixture(scope="module")
def colours(work):
    """A network of free size that knows four colours."""
    return save(work / "colours.onnx", *nearest_colour(), classes=NAMES, licence="MIT")


def save_checkpoint(folder, change=lambda head: None):
    """A small SegFormer in Hugging Face's format; ``change`` gets its decode head."""
    names = ["wall", "sky", "grass", "road", "tree"]
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        hidden_sizes=[8, 16],
        num_attention_heads=[1, 2],
        decoder_hidden_size=16,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = transformers.SegformerForSemanticSegmentation(config)
    for parameter in network.parameters():  # scores that differ from place to place
        parameter.data.mul_(4)
    with torch.no_grad():
        change(network.decode_head)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        network.save_pretrained(folder)
    height, width = SIZE
    settings = {"size": {"height": height, "width": width}, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def checkpoint(work):
    return save_checkpoint(work / "hub" / "tiny")


@pytest.fixture(scope="module")
def plain(work, colours, photos):
    """The command of a small bundle, and that bundle."""
    words = ("--model", colours, "--imgsz", "48x72", "--pictures", photos)
    path = work / "plain.bundle"
    assert export(*words, "-o", path, "-q").code == 0
    return words, path


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
    assert [line.split()[0] for line in lines] == ["saved", "verify", "receipt", "receipt", "next"]
    assert str(path) in lines[0] and "2 engines" in lines[0]
    assert "100% fp32" in lines[2] and "8.6,8.9,12.0" in lines[2]
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
    assert m["recipe"]["command"].startswith(f"python -m export --model {colours} --imgsz 48x72")
    assert m["recipe"]["shapes"]["prior"] == {}  # fixed
    assert m["recipe"]["shapes"]["refine_step"]["image"] == [[1, 3, 24, 36]] * 3
    assert m["verification"]["pictures"] == ["photos"]
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
def test_segformer_in_int8(tmp_path, checkpoint, photos, half):
    words = ("--model", "segformer", "--weights", checkpoint, "--int8", "--data", photos)
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
        "import torch\nfrom export.models import PriorModel\nfrom runtime.preprocess import "
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
    low = golden.working_picture(photo, config)
    h, w = low.shape[:2]
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
    assert export(*words).refused(1, "state.safetensors cannot be read: No such file")
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


@no_gpu
@pytest.mark.parametrize(
    "words, targets, imgsz, workspace",
    [
        (("--format", "engine", "--imgsz", "480", "640"), ["trt"], (480, 640), None),
        (("--format", "tensorrt", "--imgsz", "480x640"), ["trt"], (480, 640), None),
        (("--target", "ort", "--imgsz", "640", "--workspace", "2"), ["onnx"], (640, 640), 2**31),
        (("--workspace", "2048M", "--device", "0"), ["onnx"], None, 2**31),
        (("--workspace", "auto", "--device", "cuda:0"), ["onnx"], None, None),
        (("--target", "onnx, TRT,onnx", "--fp16", "--batch", "1"), ["onnx", "trt"], None, None),
        (("--target", "rtx", "--compute-capability", "sm_86, 12.0"), ["rtx"], None, None),
        (("--opt-shape", "64", "--dynamic", "--no-simplify"), ["onnx"], (64, 64), None),
        (("--device", "cuda:1", "--target", "trt", "--opt-level", "5"), ["trt"], None, None),
    ],
)
def test_the_words_of_other_tools(monkeypatch, words, targets, imgsz, workspace):
    seen = []

    def stop(model, out, options, **_):
        seen.append(options)
        raise DeviceError("far enough")

    monkeypatch.setattr(pack, "export_bundle", stop)
    assert export("--model", "kmeans", *words).refused(1, "far enough")
    (options,) = seen
    assert [*options.targets] == targets and options.imgsz == imgsz
    assert options.workspace == workspace and options.half == ("--fp16" in words)
    assert options.device == int("cuda:1" in words)
    assert options.simplify != ("--no-simplify" in words)
    assert options.compute_capabilities == (("8.6", "12.0") if targets == ["rtx"] else ())


def test_json_is_one_document(tmp_path, plain):
    words, _ = plain
    ended = export(*words, "--json", "-q", "-o", tmp_path / "b")
    document = json.loads(ended.out)
    assert ended.code == 0 and ended.err == "" and document["missing"] is None
    assert document["bundle"] == str(tmp_path / "b")
    assert document["manifest"] == Bundle.open(tmp_path / "b").manifest
    ended = export(*words, "--json", "-o", "", "--target", "onnx")
    assert ended.code == 1 and "is left alone" in json.loads(ended.out)["error"]
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
    assert "verify the prior on 4 pictures" in stages
    assert "emit and verify the residual step" in stages
    assert export(*words, "--quiet", "-o", tmp_path / "b").err == ""


@pytest.mark.parametrize(
    "words, texts",
    [
        (("--targt", "rtx"), ["does not know '--targt'", "did you mean --target?"]),
        (("--tar", "rtx"), ["does not know '--tar'"]),
        (("--refine", "fsat"), ["invalid choice: 'fsat'", "did you mean fast?"]),
        (("--refine", "dynaseg_fsf"), ["invalid choice: 'dynaseg_fsf'", "--help"]),
        (("--batch", "2"), ["--batch: invalid choice: 2"]),
        (("--opt-level", "6"), ["--opt-level: invalid choice: 6"]),
        (("--steps", "few"), ["--steps: invalid int value: 'few'"]),
        (("extra",), ["does not know 'extra'"]),
    ],
)
def test_usage(words, texts):
    assert export("--model", "kmeans", *words).refused(2, *texts)


@pytest.mark.parametrize(
    "words, texts",
    [
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
        (("--workspace", "2Q"), ["workspace is '2Q'; wanted GiB (2), MiB (2048M) or auto"]),
        (("--workspace", "1K"), ["workspace is '1K'"]),
        (("--device", "cpu"), ["device is 'cpu'; engines are built on a GPU"]),
        (("--device", "tpu"), ["device is 'tpu'; wanted"]),
        (("--lr", "-1"), ["lr is -1.0; wanted a number from 0 to 10"]),
        (("--scale", "2"), ["scale is 2.0; wanted a number above 0, at most 1"]),
        (("--weights", "."), ["weights are for segformer only"]),
        (("--pictures", "nowhere.png"), ["nowhere.png does not exist", "seen from"]),
        (("--pictures", "empty"), ["no pictures in empty"]),
        (("--pictures", "bad.png"), ["bad.png cannot be read as a picture"]),
        (("--int8", "--data", "bad.png"), ["bad.png cannot be read as a picture"]),
        (("--int8", "--data", "empty"), ["no pictures in empty"]),
        (("--int8", "--data", "0.png", "--dynamic"), ["INT8 wants a fixed input size"]),
        (("--timing-cache", "empty", "--target", "trt"),
         ["timing cache empty cannot be read: Is a directory"]),
        (("--timing-cache", "no/t.cache", "--target", "trt"),
         ["timing cache no/t.cache has no folder", "mkdir -p no"]),
        (("-o", "empty/.."), ["exists and is no bundle; it is left alone", "choose another"]),
        (("-o", "bad.png"), ["bad.png exists and is no bundle"]),
        (("--triton", "triton", "-o", "taken.bundle"), ["taken exists and is no Triton model"]),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(tmp_path, monkeypatch, colours, photos, words, texts):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("triton/taken").mkdir(parents=True)
    Path("bad.png").write_bytes(b"no picture")
    Path("0.png").write_bytes((photos / "0.png").read_bytes())
    before = files(tmp_path)
    ended = export("--model", colours, "--pictures", photos, "-q", "-o", "b", *words)
    assert ended.refused(1, *texts)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "words, texts",
    [
        (("--model", "kmenas"), ["model is 'kmenas'", "did you mean --model kmeans?"]),
        (("--model", "no.onnx"), ["no.onnx"]),
        (("--model", "nothing.here:at_all"), ["cannot be imported"]),
        (("--model", "export.models:BUILT_IN"), ["is a tuple; wanted a function"]),
        (("--model", "segformer", "--weights", "nvidia/mit-b0"), ["hf download nvidia/mit-b0"]),
        (("--model", "segformer", "--imgsz", "8"), ["SegFormer wants at least 32 x 32"]),
        (("--half",), ["half and int8 are for networks; kmeans has none"]),
        (("--triton", "t"), ["triton serves networks; kmeans has none"]),
    ],
)
def test_models_that_cannot_be_exported(tmp_path, photos, words, texts):
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
        ({"compute_capabilities": ("8.6",)}, "is for target rtx"),
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


# The gate


@pytest.fixture
def gate(tmp_path, plain, photos):
    """The export of words fails with code 3 and texts, and writes nothing, where there is no bundle
    and where there is one."""
    new, old = tmp_path / "new.bundle", tmp_path / "old.bundle"
    shutil.copytree(plain[1], old)

    def refuses(texts, *words):
        before = files(tmp_path)
        for path in (new, old):
            ended = export(*words, "--pictures", photos, "-q", "-o", path)
            assert ended.refused(3, *texts) and ended.out == ""
            assert files(tmp_path) == before

    return refuses


def test_a_planted_fp16_overflow(tmp_path, photos, gate):
    """What a layer makes is 20,000 times larger and the next weights as much smaller: the answer
    in FP32 stays, and FP16 holds all of the weights."""

    def plant(head):
        head.batch_norm.weight *= 2e4
        head.batch_norm.bias *= 2e4
        head.classifier.weight *= 1000 / 2e4
        head.classifier.bias *= 1000

    words = ("--model", "segformer", "--weights", save_checkpoint(tmp_path / "hub", plant))
    assert export(*words, "--pictures", photos, "-q", "-o", tmp_path / "fp32").code == 0
    gate(["overflows in FP16", "FP16 ends at 65504"], *words, "--half")


def test_int8_that_has_gone_wrong(tmp_path, photos, gate):
    """One channel of a huge range leaves the others nothing of INT8's 255 steps."""

    def plant(head):
        head.batch_norm.weight[0] *= 3000
        head.batch_norm.bias[0] *= 3000
        head.classifier.weight[:, 0] /= 3000

    words = ("--model", "segformer", "--weights", save_checkpoint(tmp_path / "hub", plant))
    assert export(*words, "--pictures", photos, "-q", "-o", tmp_path / "fp32").code == 0
    words += ("--int8", "--data", photos)
    gate(["in int8: ", "% of the labels agree", "--data more"], *words)


def test_least_agreement_is_the_users_own(checkpoint, photos, gate):
    words = ("--model", "segformer", "--weights", checkpoint, "--int8", "--data", photos)
    gate(["wanted 100.00%"], *words, "--min-agreement", 1)


def test_nan(tmp_path, gate):
    def plant(head):
        head.classifier.bias[2] = float("nan")

    folder = save_checkpoint(tmp_path / "hub", plant)
    texts = ["gives NaN or infinite scores"]
    words = ("--model", "segformer", "--weights", folder, "--no-simplify")
    gate(texts, *words)


def changed(model, change):
    """A model's bytes after ``change``, which gets its graph."""
    change(model.graph)
    return model.SerializeToString()


def test_a_frozen_network_that_is_another(monkeypatch, colours, gate):
    freeze = pack.freeze

    def wrong(*arguments, **options):
        model = onnx.load_from_string(freeze(*arguments, **options))
        bias = next(t for t in model.graph.initializer if list(t.dims) == [4])
        shifted = numpy_helper.to_array(bias) + np.float32([0, 9, 0, 0])
        return changed(model, lambda g: bias.CopyFrom(numpy_helper.from_array(shifted, bias.name)))

    monkeypatch.setattr(pack, "freeze", wrong)
    texts = ["colours in fp32: ", "of the labels agree with the original; wanted 99.90%"]
    gate(texts, "--model", colours)


def test_scores_that_differ_where_labels_agree(monkeypatch, colours, gate):
    freeze = pack.freeze

    def wrong(*arguments, **options):
        model = onnx.load_from_string(freeze(*arguments, **options))
        tensors = [t for t in model.graph.initializer if 4 in t.dims]
        for t in tensors:
            t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t) * np.float32(1.01), t.name))
        return model.SerializeToString()

    monkeypatch.setattr(pack, "freeze", wrong)
    gate(["differs by", "wanted at most 0.001 of that"], "--model", colours)


@pytest.mark.parametrize("refine", ["residual", "dynaguide"])
def test_a_step_that_climbs(monkeypatch, refine, gate):
    build_step = pack.build_step

    def wrong(config):
        model = build_step(config)
        (node,) = [n for n in model.graph.node if "parameters_out" in n.output]
        assert node.op_type == "Sub"
        node.op_type = "Add"
        return model

    monkeypatch.setattr(pack, "build_step", wrong)
    words = ("--refine", refine, "--steps", 3, "--imgsz", "48x72")
    gate(["refine_step.onnx: one step's update is 2 from float64"], *words)


def scaled(model, output, factor):
    """The model with one of its outputs multiplied."""
    graph = model.graph
    (node,) = [n for n in graph.node if output in n.output]
    node.output[list(node.output).index(output)] = "before"
    graph.initializer.append(numpy_helper.from_array(np.float32(factor), "factor"))
    graph.node.append(onnx.helper.make_node("Mul", ["before", "factor"], [output]))
    return model


@pytest.mark.parametrize("factor", [1.001, np.nan])
def test_a_map_that_is_wrong(monkeypatch, factor, gate):
    build_map = pack.build_map
    monkeypatch.setattr(
        pack, "build_map", lambda config: scaled(build_map(config), "scores", factor)
    )
    gate(["its scores ", "(wanted 0.0001)"], "--imgsz", "48x72")


@pytest.mark.parametrize("factor", [1.001, np.nan])
def test_a_trained_network_that_is_wrong(tmp_path, monkeypatch, factor, gate):
    from safetensors.numpy import save_file

    def wrong(config, state=None):
        model = build_map(config, state=state)
        return model if state is None else scaled(model, "scores", factor)

    build_map = pack.build_map
    monkeypatch.setattr(pack, "build_map", wrong)
    refiner = Refiner(8, 8, classes=5, **RefineConfig().options())
    (tmp_path / "hub").mkdir()
    save_file(refiner.state_dict(), tmp_path / "hub" / "s.safetensors")
    words = ("--init", tmp_path / "hub" / "s.safetensors", "--imgsz", "48x72")
    gate(["cnn.onnx: scores are ", "from float64"], *words)


def test_a_loop_that_ends_elsewhere(monkeypatch, gate):
    real = check.refine

    def other(low, guide, **options):
        found = real(low, guide, **options)
        return found._replace(labels=1 - found.labels) if hasattr(found, "_replace") else replace(
            found, labels=1 - found.labels
        )  # fmt: skip

    monkeypatch.setattr(check, "refine", other)
    texts = ["of the labels agree with the native core", "wanted 99%"]
    gate(texts, "--imgsz", "48x72")


@needs_rtx
def test_an_engine_of_another_precision(monkeypatch, colours, gate):
    """The builder's receipt says FP32 where FP16 was asked for."""
    build = engines.build_engine

    def wrong(data, **options):
        built = build(data, **options)
        layers = {"fp32": sum(built.receipt["layers"].values())}
        return replace(built, receipt=built.receipt | {"layers": layers})

    monkeypatch.setattr(engines, "build_engine", wrong)
    words = ("--model", colours, "--imgsz", "48x72", "--half", *RTX[:3], "8.6")
    gate(["fp16"], *words)


def test_the_gate_in_python(tmp_path, colours, photos, monkeypatch):
    model = onnx_file(colours, (48, 72))
    options = ExportOptions(pictures=(photos,), min_agreement=1.0)
    done = export_bundle(model, tmp_path / "b", options)
    assert done.missing is None and done.bundle.manifest["recipe"]["command"] == ""
    monkeypatch.setattr(check, "REFINED", 1.01)
    with pytest.raises(VerificationFailed, match="agree with the native core"):
        export_bundle(model, tmp_path / "c", options)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


# Interrupted


def start(path, photos):
    words = ("--model", "kmeans", "--imgsz", "48x72", "--pictures", photos / "0.png", "-o", path)
    return subprocess.Popen(
        [sys.executable, "-m", "export", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_killed_at_any_moment(tmp_path, photos):
    """The path is the old bundle, a whole new one, or absent; the next export cleans up."""
    path = tmp_path / "x.bundle"
    began = time.monotonic()
    assert start(path, photos).wait(60) == 0
    life = time.monotonic() - began
    rng, ends, seen = np.random.default_rng(0), [], {Bundle.open(path).manifest["sha256"]}
    for turn in range(12):
        if turn == 6:  # from here on there is none to begin with
            for entry in [*tmp_path.iterdir()]:
                subprocess.run(["rm", "-r", str(entry)], check=True)
        process = start(path, photos)
        time.sleep(life * (rng.uniform(0, 1) if turn % 2 else rng.uniform(0.85, 1.05)))
        process.kill()
        process.communicate()
        if path.exists():
            Bundle.open(path).check_files()
            seen.add(Bundle.open(path).manifest["sha256"])
        ends.append(path.exists())
        left = {p.name for p in tmp_path.iterdir()} - {path.name}
        print(left)
        assert all(name.startswith(".x.bundle.partial-") for name in left)
    (tmp_path / ".x.bundle.partial-planted").mkdir()  # a writer that was killed leaves such
    assert start(path, photos).wait(60) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["x.bundle"]
    assert any(ends[:6])


@pytest.mark.parametrize("old", [False, True])
def test_interrupted_by_the_user(tmp_path, photos, old):
    path = tmp_path / "x.bundle"
    if old:
        assert start(path, photos).wait(60) == 0
    before = files(tmp_path)
    process = start(path, photos)
    line = process.stderr.readline()
    assert line == "emit and verify the residual step ...\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.startswith("error: interrupted\n")
    assert files(tmp_path) == before


# Real networks


@pytest.mark.data
@needs_data
@pytest.mark.parametrize("half, int8", [(True, False), (False, True)])
@pytest.mark.parametrize(
    "network, pictures",
    [
        ("espnetv2_s0.5_cityscapes_512x256.onnx", "camvid"),
        ("espnetv2_s0.5_voc_256x256.onnx", "bsds500"),
    ],
)
def test_real_networks_pass_the_gate(tmp_path, record_property, network, pictures, half, int8):
    root = cases.data_root()
    found = sorted(p for p in (root / pictures).rglob("*.jpg"))
    found = found or sorted((root / pictures).rglob("*.png"))
    shown, others = found[:4], found[4:20]
    options = ExportOptions(
        half=half, int8=int8, data=tuple(others) if int8 else (), pictures=tuple(shown),
        min_agreement=0.99 if half else 0.8,
    )  # fmt: skip
    model = load_model(str(root / "priors" / network))
    m = export_bundle(model, tmp_path / "b", options).bundle.manifest
    numbers = m["verification"]["prior"][options.precision]
    record_property("agreement", numbers["agreement"])
    print(network, options.precision, numbers)
    assert m["verification"]["prior"]["frozen"]["agreement"] > 0.999
