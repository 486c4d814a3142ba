"""Nothing leaves unverified: what the exporter refuses to write, and that it never writes half."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from cases import case
from developer_data import needs_data
from exporting import ROOT, RTX, export, files, freeze_checkpoint, needs_rtx, save_checkpoint
from one_layer_networks import nearest_colour, save

from benchmarks.quality import datasets
from export import check, pack
from export.frozen import Frozen
from export.models.load import load_model
from export.models.onnx_file import onnx_file
from export.pack import ExportOptions, export_bundle
from runtime.bundle import engines
from runtime.bundle.read import Bundle
from runtime.core.refiner import Refiner
from runtime.errors import (
    VerificationFailed,
)
from sdk import RefineConfig

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
torch = pytest.importorskip("torch", reason="networks are exported by torch: pip install torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("onnxslim", reason="needs onnxslim")


from onnx import numpy_helper  # noqa: E402 (after importorskip)

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


def test_labels_that_are_too_many_classes(tmp_path, photos):
    """A guide of so many classes would not fit into memory."""
    arg_max = ("ArgMax", {"axis": 1, "keepdims": 0})
    for factor, text in [
        (1_000_000, "net returned labels from 0 to 2000000; wanted -1 to 4095"),
        (-2, "net returned labels from -4 to 0; wanted -1 to 4095"),
    ]:
        with case(factor):
            tail = [arg_max, ("Mul", {}, np.array(factor))]
            out = onnx.TensorProto.INT64
            path = save(tmp_path / "net.onnx", *nearest_colour(), tail=tail, out=out)
            words = ("--model", path, "--imgsz", "48x72", "--pictures", photos, "-q")
            assert export(*words, "-o", tmp_path / "b").refused(5, text, "fix: ")
            assert not (tmp_path / "b").exists()


def planted(tmp_path, plant, **options):
    """An ONNX file of a small SegFormer that ``plant`` has changed; it gets the decode head."""
    folder = save_checkpoint(tmp_path / "hub", plant)
    return freeze_checkpoint(folder, tmp_path / "hub" / "planted.onnx", **options)


def test_a_planted_fp16_overflow(tmp_path, photos, gate):
    """What a layer makes is 20,000 times larger and the next weights as much smaller: the answer
    in FP32 stays, and FP16 holds all of the weights."""

    def plant(head):
        head.batch_norm.weight *= 2e4
        head.batch_norm.bias *= 2e4
        head.classifier.weight *= 1000 / 2e4
        head.classifier.bias *= 1000

    words = ("--model", planted(tmp_path, plant))
    assert export(*words, "--pictures", photos, "-q", "-o", tmp_path / "fp32").code == 0
    gate(["overflows in FP16", "FP16 ends at 65504"], *words, "--half")


def test_int8_that_has_gone_wrong(tmp_path, photos, gate):
    """One channel of a huge range leaves the others nothing of INT8's 255 steps."""

    def plant(head):
        head.batch_norm.weight[0] *= 3000
        head.batch_norm.bias[0] *= 3000
        head.classifier.weight[:, 0] /= 3000

    words = ("--model", planted(tmp_path, plant))
    assert export(*words, "--pictures", photos, "-q", "-o", tmp_path / "fp32").code == 0
    words += ("--int8", "--data", photos)
    gate(["in int8: ", "% of the labels agree", "--data more"], *words)


def test_least_agreement_is_the_users_own(checkpoint_onnx, photos, gate):
    words = ("--model", checkpoint_onnx, "--int8", "--data", photos)
    gate(["wanted 100.00%"], *words, "--min-agreement", 1)


def test_nan(tmp_path, gate):
    def plant(head):
        head.classifier.weight.fill_(3e38)  # finite, but the scores are not

    path = planted(tmp_path, plant, simplify=False)
    gate(["returns NaN or infinite scores"], "--model", path, "--no-simplify")


def freezes_wrongly(monkeypatch, change):
    """Lets the exporter freeze a model that ``change`` has changed."""
    freeze = pack.frozen_graph

    def wrong(*arguments, **options):
        with freeze(*arguments, **options) as graph:
            model = onnx.load_from_string(graph.data)
            change(model)
            return Frozen(graph.name, model)

    monkeypatch.setattr(pack, "frozen_graph", wrong)


def test_a_frozen_network_that_is_another(monkeypatch, colours, gate):
    def shift(model):
        bias = next(t for t in model.graph.initializer if list(t.dims) == [4])
        shifted = numpy_helper.to_array(bias) + np.float32([0, 9, 0, 0])
        bias.CopyFrom(numpy_helper.from_array(shifted, bias.name))

    freezes_wrongly(monkeypatch, shift)
    texts = ["colours in fp32: ", "% of the labels agree with the original", "wanted 99.90%"]
    gate(texts, "--model", colours)
    gate(texts, "--model", colours, "--min-agreement", 0.01)  # it lowers no limit of FP32


def test_a_frozen_network_of_another_aspect(monkeypatch, colours, gate):
    def turn(model):
        inner = model.graph
        (output,) = inner.output
        (last,) = [node for node in inner.node if output.name in node.output]
        last.output[0] = "before"
        turned = onnx.helper.make_node("Transpose", ["before"], [output.name], perm=[0, 1, 3, 2])
        inner.node.append(turned)
        output.type.tensor_type.ClearField("shape")

    freezes_wrongly(monkeypatch, turn)
    texts = ["colours returns (1, 4, 72, 48) for an input of (1, 3, 48, 72)", "channels first"]
    gate(texts, "--model", colours, "--imgsz", "48x72")


def test_scores_that_differ_where_labels_agree(monkeypatch, colours, gate):
    def scale(model):
        tensors = [t for t in model.graph.initializer if 4 in t.dims]
        for t in tensors:
            t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t) * np.float32(1.01), t.name))

    freezes_wrongly(monkeypatch, scale)
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


@pytest.mark.parametrize("refine", ["residual", "dynaguide"])
def test_a_step_of_another_momentum(monkeypatch, refine, gate):
    """From rest, the first step is the same; ten do not tell by their labels, either."""
    build_step = pack.build_step

    def wrong(config):
        model = build_step(replace(config, momentum=0.5))
        options = next(p for p in model.metadata_props if p.key == "dg.options")
        options.value = options.value.replace('"momentum": 0.5', '"momentum": 0.9')
        return model

    monkeypatch.setattr(pack, "build_step", wrong)
    words = ("--refine", refine, "--steps", 3, "--imgsz", "48x72")
    gate(["refine_step.onnx: one step's update is "], *words)


def test_steps_too_small_for_the_weights_numbers_pass(tmp_path, photos):
    for lr in [0, 1e-6]:
        with case(lr):
            words = (
                "--lr",
                lr,
                "--imgsz",
                "48x72",
                "--pictures",
                photos,
                "-q",
                "-o",
                tmp_path / "b",
            )
            assert export(*words).code == 0


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
        return replace(found, labels=found.labels + 1)

    monkeypatch.setattr(check, "refine", other)
    texts = ["of the labels agree with the native core", "wanted 99%"]
    gate(texts, "--imgsz", "48x72")


@needs_rtx
def test_an_engine_of_another_precision(monkeypatch, colours, gate):
    """The builder's receipt says FP32 where FP16 was asked for."""
    build = engines.build_engine

    def wrong(data, recipe, **options):
        built = build(data, recipe, **options)
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
    assert start(path, photos).wait(300) == 0
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
        assert all(name.startswith(".x.bundle.partial-") for name in left)
    (tmp_path / ".x.bundle.partial-planted").mkdir()  # a writer that was killed leaves such
    assert start(path, photos).wait(300) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["x.bundle"]
    assert any(ends[:6])


@pytest.mark.parametrize("old", [False, True])
def test_interrupted_by_the_user(tmp_path, photos, old):
    path = tmp_path / "x.bundle"
    if old:
        assert start(path, photos).wait(300) == 0
    before = files(tmp_path)
    process = start(path, photos)
    line = process.stderr.readline()
    assert line == "export and verify the residual step ...\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and err.startswith("error: interrupted\n")
    assert files(tmp_path) == before


# Real networks


@pytest.mark.data
@needs_data
def test_real_networks_pass_the_gate(tmp_path, record_property):
    for half, int8 in [(True, False), (False, True)]:
        for network, pictures in [
            ("espnetv2_s0.5_cityscapes_512x256.onnx", "camvid"),
            ("espnetv2_s0.5_voc_256x256.onnx", "bsds500"),
            ("espnetv2_s2.0_cityscapes_1024x512.onnx", "camvid"),
        ]:
            with case(network, half, int8):
                root = datasets.data_root()
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
