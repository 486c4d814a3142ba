"""Bundles seen from outside: by a Segmenter on every backend that can be had or pretended, and by
tools of others (Polygraphy, onnx.checker, ONNX Runtime, Triton's own description of its config)."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import fake_tensorrt
import numpy as np
import onnxruntime
import pytest
import safetensors.numpy
from cases import case
from exporting import ROOT, RTX, export, graph, needs_rtx, no_gpu
from one_layer_networks import NAMES

from runtime.bundle import open
from runtime.bundle.manifest import file_entry
from runtime.bundle.read import Bundle
from runtime.bundle.write import add_engine, write_bundle
from runtime.device.driver import CudaDevice
from runtime.engines.onnx import OnnxEngine
from runtime.engines.plan import read_header
from runtime.errors import BundleError, EngineMismatch, InputError, MissingBackend
from runtime.tensors import load_tensors
from sdk import RefineConfig, Segmenter
from sdk.__main__ import main as dg

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")


@pytest.fixture
def copy(plain, tmp_path):
    """Writes a copy of the small bundle, with changes to its manifest and files."""

    def write(change):
        bundle = Bundle.open(plain[1])
        m = json.loads(json.dumps(bundle.manifest))
        entries = (*m["graphs"].values(), m["init"], m["licence"], *m["golden"])
        data = {entry["file"]: bundle.read(entry) for entry in entries}
        change(m, data)
        return write_bundle(tmp_path / "copy.bundle", m, data)

    return write


# By a Segmenter


def test_native_and_graph_give_the_same_labels(plain, photo):
    native, ours = Segmenter(plain[1]), Segmenter(plain[1], refine_backend="onnx")
    one, two = native(photo), ours(photo)
    assert (one.labels == two.labels).mean() > 0.999 and one.labels.shape == photo.shape[:2]
    assert np.abs(one.confidence - two.confidence).max() < 1e-3
    assert one.stats["steps"] == two.stats["steps"] == 10 and len(np.unique(one.labels)) > 1
    prior_alone = Segmenter(plain[1], refine=None)(photo)
    assert (one.labels != prior_alone.labels).any()  # the refinement does something
    info = ours.info()
    assert info["bundle"] == str(plain[1]) and info["device"] == "cpu"
    assert info["prior"].startswith("onnxruntime") and info["prior"].endswith("fp32")
    assert info["refine"].startswith("onnxruntime") and native.info()["refine"].startswith("cpu-")
    assert info["engine"] is None and info["precision"] == "fp32"
    assert ours.info()["refine"] in two.backend


def test_the_self_test_runs_once_for_each_way_to_run(plain, copy):
    first = Segmenter(plain[1]).info()["self_test"]
    assert first["labels"] >= 0.99 and first["prior"] == 1 and first["input"] == 0
    assert Segmenter(plain[1]).info()["self_test"] is None  # noted in the cache folder
    assert Segmenter(plain[1], refine_backend="onnx").info()["self_test"] is not None
    assert Segmenter(plain[1], refine_backend="onnx").info()["self_test"] is None
    assert Segmenter(plain[1], self_test="always").info()["self_test"] == first
    other = copy(lambda m, data: m.update(name="other"))  # another bundle, another test
    assert Segmenter(other.path).info()["self_test"] is not None
    with pytest.raises(InputError, match="self_test is 'sometimes'; wanted 'once'"):
        Segmenter(plain[1], self_test="sometimes")


def test_other_golden_answers_are_noticed(copy):
    for name in ["labels", "guide", "input"]:
        with case(name):
            from safetensors.numpy import save

            def tamper(m, data, name=name):
                file = m["golden"][0]["file"]
                arrays = load_tensors(data[file], file)
                change = {"labels": lambda a: a.max() - a, "guide": lambda a: a[..., ::-1],
                          "input": lambda a: a + 1}[name]  # fmt: skip
                arrays[name] = np.ascontiguousarray(change(arrays[name]))
                data[file] = save(arrays)
                m["golden"][0].update(file_entry(file, data[file]))

            path = copy(tamper).path
            for _ in range(2):  # a failed test is not noted as passed
                with pytest.raises(
                    BundleError, match=r"does not give its golden answers.*\n  fix: "
                ):
                    Segmenter(path)
            Segmenter(path, self_test="never")


def test_what_a_bundle_fixes(plain):
    path = plain[1]
    with pytest.raises(InputError, match="imgsz is fixed by the bundle\n  fix: leave it out"):
        Segmenter(path, imgsz=64)
    with pytest.raises(InputError, match="backend is 'tensorrt'; wanted one of"):
        Segmenter(path, backend="tensorrt")
    with pytest.raises(InputError, match="refine_backend is 'tensorrt'; wanted 'native' or one of"):
        Segmenter(path, refine_backend="tensorrt")
    for backend in ("rtx", "trt"):
        for options in ({"backend": backend}, {"refine_backend": backend}):
            with pytest.raises(InputError, match=f"{backend}' runs on a GPU; device is 'cpu'"):
                Segmenter(path, **options)


def test_refinement_by_hand(plain):
    """What docs/export.md tells those who have ONNX Runtime and OpenCV, and not this package."""
    folder = plain[1]
    golden = safetensors.numpy.load_file(folder / "golden" / "000.safetensors")
    init = safetensors.numpy.load_file(folder / "init.safetensors")
    step = onnxruntime.InferenceSession(folder / "refine_step.onnx")
    final = onnxruntime.InferenceSession(folder / "refine_map.onnx")
    h, w = golden["labels"].shape
    image = cv2.resize(golden["picture"], (w, h), interpolation=cv2.INTER_AREA)
    image = image.astype(np.float32).transpose(2, 0, 1)[None] / 255
    small = golden["guide"].shape[0] < h or golden["guide"].shape[1] < w
    how = cv2.INTER_LINEAR if small else cv2.INTER_AREA
    guide = np.stack([cv2.resize(p, (w, h), interpolation=how)
                      for p in golden["guide"].transpose(2, 0, 1)])  # fmt: skip
    mean = guide.mean((1, 2))
    guide[mean <= min(5e-4, mean.max() / 2)] = 0
    guide = (guide / guide.sum(0))[None]
    orders = step.get_modelmeta().custom_metadata_map
    state = {
        kind: np.concatenate([init[name].ravel() for name in json.loads(orders[f"dg.{kind}"])])
        for kind in ("parameters", "buffers")
    }
    state["momenta"] = np.zeros_like(state["parameters"])
    losses = []
    for _ in range(10):
        feed = {"image": image, "guide": guide, **state}
        came = dict(zip((o.name for o in step.get_outputs()), step.run(None, feed), strict=True))
        losses.append(came["losses"][0])
        state = {name: came[f"{name}_out"] for name in state}
    feed = {"image": image, "guide": guide, **state}
    (labels,) = final.run(["labels"], {i.name: feed[i.name] for i in final.get_inputs()})
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-4)
    assert (labels.reshape(h, w) == golden["labels"]).mean() > 0.999


def test_other_options_than_the_graphs(plain, photo):
    for config, match in [
        (RefineConfig(lam=1.0), r"lam is 1\.0; the graph was exported with 4\.0\n  fix: "),
        (RefineConfig(channels=16), "channels is 16; the graph was exported with 32"),
        (RefineConfig(objective="dynaguide"), "objective is 'dynaguide'; the graph was exported"),
    ]:
        with case(match):
            with pytest.raises(InputError, match=match):
                Segmenter(plain[1], refine=config, refine_backend="onnx")(photo)
            Segmenter(plain[1], refine=RefineConfig(steps=2, scale=0.2), refine_backend="onnx")(
                photo
            )


@no_gpu
def test_without_a_gpu_the_reason_is_told(plain):
    path = plain[1]
    with pytest.raises(MissingBackend, match=r"(?i)cuda.*\n  fix: "):
        Segmenter(path, device="cuda")
    for backend in ("trt", "rtx", "onnx"):
        with pytest.raises(MissingBackend, match=r"(?i)cuda.*\n  fix: "):
            Segmenter(path, device="cuda", backend=backend, refine=None)


@pytest.fixture
def gpu(monkeypatch, tmp_path, plain):
    """A pretended GPU; its ``add`` puts engines into a copy of the bundle, which compute what the
    bundle's ONNX files do."""
    fake = fake_tensorrt.install(monkeypatch, memory=2**30)
    monkeypatch.setattr(open, "cuda_problem", lambda: None)
    monkeypatch.setattr(
        open, "cuda_devices", lambda: [CudaDevice(0, "Pretended GPU 0", "8.7", 2**33, 2**33)]
    )
    source = Bundle.open(plain[1])
    m = source.manifest
    entries = (*m["graphs"].values(), m["init"], m["licence"], *m["golden"])
    fake.bundle = write_bundle(
        tmp_path / "gpu.bundle", m, {e["file"]: source.read(e) for e in entries}
    )
    arrays = source.tensors(m["golden"][0])
    height, width = arrays["labels"].shape

    def add(name, key, **changes):
        engine = OnnxEngine(source.graph(name))

        def compute(inputs):
            fake.calls[f"run {key}"] += 1
            return dict(
                zip(
                    (p.name for p in engine.outputs),
                    engine(*(inputs[p.name] for p in engine.inputs)),
                    strict=True,
                )
            )

        fake.functions[key] = compute
        sizes = {"height": height, "width": width, "classes": 4}
        shapes = source.manifest["recipe"]["shapes"][name]
        kinds = {"float32": "FLOAT", "int32": "INT32", "int64": "INT64"}
        ports = {}
        for which in ("inputs", "outputs"):
            for port in m["graphs"][name][which]:
                fixed = shapes.get(port["name"].removesuffix("_out"), [None])[0]
                if fixed is None or port["name"] in ("image", "guide"):
                    fixed = [sizes.get(n, n) for n in port["shape"]]
                ports.setdefault(which, {})[port["name"]] = (fixed, kinds[port["dtype"]])
        plan = fake_tensorrt.plan(key, ports["inputs"], ports["outputs"])
        file = f"engines/{key}.engine"
        entry = file_entry(file, plan) | {
            "key": key, "graph": name, "runtime": "tensorrt", "version": "10.3.0.26",
            "compute_capabilities": ["8.7"], "gpu_name": "Pretended GPU 0", "l4t": None,
            "platform": "linux-aarch64", "shapes": shapes, "flags": {},
            "receipt": {"layers": {"fp32": 1}, "source": "inspector"}, "seconds": 1.0,
            "inputs": [{"name": n, "dtype": p["dtype"], "shape": list(ports["inputs"][n][0])}
                       for p in m["graphs"][name]["inputs"] for n in [p["name"]]],
            "outputs": [{"name": n, "dtype": p["dtype"], "shape": list(ports["outputs"][n][0])}
                        for p in m["graphs"][name]["outputs"] for n in [p["name"]]],
        }  # fmt: skip
        fake.bundle = add_engine(fake.bundle, entry | changes, plan)

    fake.add = add
    return fake


def test_the_engine_of_this_gpu_is_picked_and_run(gpu, plain, photo):
    gpu.add("prior", "1" * 16, gpu_name="Another GPU")
    gpu.add("prior", "2" * 16)
    gpu.add("prior", "3" * 16, compute_capabilities=["8.6"], gpu_name=None)
    seg = Segmenter(gpu.bundle.path, device="cuda", backend="trt", refine=None)
    result = seg(photo)
    assert gpu.calls["run " + "2" * 16] > 0
    assert not gpu.calls["run " + "1" * 16] and not gpu.calls["run " + "3" * 16]
    info = seg.info()
    assert info["engine"] == "2" * 16 and info["device"] == "cuda"
    assert info["prior"] == "tensorrt-10.3.0.26 fp32" and info["self_test"]["prior"] == 1
    assert np.array_equal(result.labels, Segmenter(plain[1], refine=None)(photo).labels)


def test_refinement_by_engines(gpu, plain, photo):
    for key, name in enumerate(("prior", "refine_step", "refine_map")):
        gpu.add(name, f"{key:016x}")
    seg = Segmenter(gpu.bundle.path, device="cuda", backend="trt", refine_backend="trt")
    assert seg.info()["self_test"]["labels"] >= 0.99
    result = seg(photo)
    assert gpu.calls["run " + f"{1:016x}"] >= 20 and gpu.calls["run " + f"{2:016x}"] >= 2
    assert result.stats["steps"] == 10 and "tensorrt-10.3.0.26 fp32 step" in result.backend
    assert (result.labels == Segmenter(plain[1])(photo).labels).mean() > 0.999


def test_an_engine_for_another_device(gpu):
    with pytest.raises(EngineMismatch, match="has no trt engine of prior for Pretended GPU 0"):
        Segmenter(gpu.bundle.path, device="cuda", backend="trt", refine=None)
    gpu.add("prior", "1" * 16, gpu_name="Another GPU")
    gpu.add("prior", "3" * 16, compute_capabilities=["8.6"], gpu_name=None)
    with pytest.raises(EngineMismatch, match=r"\(8.7\); it has .*8.6.*\n  fix: python -m runtime"):
        Segmenter(gpu.bundle.path, device="cuda", backend="trt", refine=None)
    with pytest.raises(EngineMismatch, match="has no rtx engine of prior"):
        Segmenter(gpu.bundle.path, device="cuda", backend="rtx", refine=None)
    gpu.add("prior", "4" * 16, version="10.4.0.1")
    with pytest.raises(EngineMismatch, match=r"built with tensorrt 10.4.0.1.*loaded 10.3.0"):
        Segmenter(gpu.bundle.path, device="cuda", backend="trt", refine=None)


def test_an_engine_that_answers_wrongly(gpu):
    gpu.add("prior", "2" * 16)
    right = gpu.functions["2" * 16]
    gpu.functions["2" * 16] = lambda inputs: {k: -v for k, v in right(inputs).items()}
    with pytest.raises(EngineMismatch, match=r"golden answers.*\n(.*\n)?  fix: python -m runtime"):
        Segmenter(gpu.bundle.path, device="cuda", backend="trt", refine=None)


@needs_rtx
def test_engines_of_a_default_bundle_take_the_golden_picture(tmp_path, photos):
    """Engines are made for one size: the golden picture has to be refined at it."""
    path = tmp_path / "k.bundle"
    assert export("--model", "kmeans", "--pictures", photos, *RTX[:3], "8.6", "-o", path).code == 0
    bundle = Bundle.open(path)
    golden = bundle.tensors(bundle.manifest["golden"][0])
    step = next(e for e in bundle.manifest["engines"] if e["graph"] == "refine_step")
    image = next(p for p in step["inputs"] if p["name"] == "image")
    assert list(golden["labels"].shape) == image["shape"][2:]


def test_the_command_line_takes_bundles(plain, photos, tmp_path, capsys):
    words = ["--prior", str(plain[1]), "-o", str(tmp_path / "out")]
    assert dg(["predict", str(photos / "0.png"), str(photos / "1.png"), "--json", *words]) == 0
    documents = json.loads(capsys.readouterr().out)
    assert [Path(d["picture"]).name for d in documents] == ["0.png", "1.png"]
    assert (tmp_path / "out" / "0_labels.png").is_file()
    assert dg(["demo", str(photos / "0.png"), *words]) == 0
    assert "10 steps" in capsys.readouterr().out


# By tools of others


@pytest.fixture(scope="module", params=["residual", "dynaguide", "segformer"])
def bundle(request, work, photos, colours, checkpoint_onnx):
    words = {
        "residual": ("--model", colours, "--imgsz", "48x72", "--half"),
        "dynaguide": ("--model", colours, "--imgsz", 48, "--refine", "dynaguide"),
        "segformer": ("--model", checkpoint_onnx, "--int8", "--data", photos),
    }[request.param]  # fmt: skip
    path = work / f"{request.param}.bundle"
    ended = export(*words, "--pictures", photos, "-q", "-o", path, "--triton", work / "triton")
    assert ended.code == 0, ended
    assert ended.out.splitlines()[-1].startswith("triton   tritonserver --model-repository ")
    return Bundle.open(path)


def shapes_of(bundle, name):
    """Each input of a graph, with a number for every free dimension."""
    known = bundle.manifest["recipe"]["shapes"][name]
    ports = bundle.manifest["graphs"][name]["inputs"]
    return {p["name"]: known.get(p["name"], [None, p["shape"]])[1] for p in ports}


def test_onnx_accepts_every_graph(bundle):
    for name in bundle.manifest["graphs"]:
        model = graph(bundle, name)
        onnx.checker.check_model(model, full_check=True)
        assert all(node.domain in ("", "ai.onnx") for node in model.graph.node)
        assert not any(t.external_data for t in model.graph.initializer)


POLYGRAPHY = """
import json, sys
from polygraphy.tools import main

for words in json.loads(sys.stdin.read()):
    print("COMMAND", *words, flush=True)
    sys.argv = ["polygraphy", *words]
    print("ENDED", main(), flush=True)
"""


def test_polygraphy_accepts_every_graph(bundle):
    """All commands run in one process, because importing Polygraphy takes the longest."""
    pytest.importorskip("polygraphy", reason="needs Polygraphy: pip install polygraphy")
    commands, wanted = [], []
    for name, entry in bundle.manifest["graphs"].items():
        shapes = shapes_of(bundle, name)
        arguments = [f"{n}:{json.dumps(s).replace(' ', '')}" for n, s in shapes.items()]
        file = str(bundle.path / entry["file"])
        commands.append(["inspect", "model", file])
        ports = (*entry["inputs"], *entry["outputs"])
        wanted.append([f"{port['name']} [dtype={port['dtype']}" for port in ports])
        given = ("--input-shapes", *arguments, "--val-range", "[0,0]")
        commands.append(["run", file, "--onnxrt", *given])
        wanted.append(["PASSED"])
    done = subprocess.run(
        [sys.executable, "-c", POLYGRAPHY],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    outputs = done.stdout.split("COMMAND ")[1:]
    for words, output, texts in zip(commands, outputs, wanted, strict=True):
        with case(*words[:3]):
            assert output.rstrip().endswith("ENDED 0"), output[-2000:]
            assert [text for text in texts if text not in output] == [], output[-2000:]


@needs_rtx
def test_inspect_says_what_is_in_the_plans(work, colours, photos):
    path = work / "rtx.bundle"
    words = ("--model", colours, "--imgsz", "48x72", "--pictures", photos, "--half")
    assert export(*words, *RTX, "-q", "-o", path).code == 0
    done = subprocess.run(
        [sys.executable, "-m", "runtime", "inspect", str(path), "--json"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    engines = {e["file"]: e for e in document["manifest"]["engines"]}
    listed = {f["file"]: f for f in document["files"] if f["role"] == "engine"}
    assert document["ok"] and len(engines) == 3 and listed.keys() == engines.keys()
    for file, entry in engines.items():
        plan = (path / file).read_bytes()
        header = read_header(plan)
        assert header.version == entry["version"] and header._asdict() == listed[file]["header"]
        assert len(plan) == entry["size"] == listed[file]["size"]
        for port in (*entry["inputs"], *entry["outputs"]):
            assert port["name"].encode() in plan
        ours = document["manifest"]["graphs"][entry["graph"]]
        for kind in ("inputs", "outputs"):
            assert {p["name"] for p in entry[kind]} == {p["name"] for p in ours[kind]}


def parsed(text, monkeypatch):
    """Triton's configuration by its own protobuf. The extra tritonclient[grpc] would import it with
    all of gRPC; its file needs protobuf alone."""
    client = pytest.importorskip("tritonclient", reason="needs Triton's: pip install tritonclient")
    text_format = pytest.importorskip("google.protobuf.text_format", reason="needs protobuf")
    monkeypatch.syspath_prepend(Path(client.__file__).parent / "grpc")
    pb = pytest.importorskip("model_config_pb2", reason="this tritonclient lacks model_config_pb2")
    return text_format.Parse(text, pb.ModelConfig()), pb


def test_triton_understands_its_repository(bundle, work, monkeypatch):
    folder = work / "triton" / bundle.path.stem
    config, pb = parsed((folder / "config.pbtxt").read_text(), monkeypatch)
    assert config.name == folder.name and config.max_batch_size == 0
    assert config.platform == "onnxruntime_onnx"
    assert config.default_model_filename == "model.onnx"
    entry = bundle.manifest["graphs"]["prior"]
    session = onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"))
    plain = {"float32": "tensor(float)"}
    for ours, theirs, loaded in (
        (entry["inputs"], config.input, session.get_inputs()),
        (entry["outputs"], config.output, session.get_outputs()),
    ):
        assert [p["name"] for p in ours] == [p.name for p in theirs] == [p.name for p in loaded]
        assert (
            [p["shape"] for p in ours] == [[*p.dims] for p in theirs] == [p.shape for p in loaded]
        )
        types = [pb.DataType.Name(p.data_type) for p in theirs]
        assert types == ["TYPE_" + p["dtype"].replace("float", "FP").upper() for p in ours]
        assert [plain[p["dtype"]] for p in ours] == [p.type for p in loaded]
    assert (folder / "1" / "model.onnx").read_bytes() == bundle.graph("prior")


def test_triton_of_a_free_size_and_an_odd_name(work, colours, photos, monkeypatch):
    words = ("--model", colours, "--dynamic", "--imgsz", 64, "--pictures", photos, "-q")
    for _ in range(2):  # an older model of that name is replaced
        out = work / 'a "b\\.bundle'
        assert export(*words, "-o", out, "--triton", work / "triton").code == 0
    assert sorted(p.name for p in (work / "triton").glob("*\\*")) == ['a_"b\\']
    config, _ = parsed((work / "triton" / 'a_"b\\' / "config.pbtxt").read_text(), monkeypatch)
    assert config.name == 'a_"b\\' and [*config.input[0].dims] == [1, 3, -1, -1]
    assert [*config.output[0].dims] == [1, len(NAMES), -1, -1]


def test_triton_gets_the_plan_where_there_is_one(gpu, tmp_path, monkeypatch):
    from export.triton import write_repository

    gpu.add("prior", "2" * 16)
    place = write_repository(tmp_path / "triton", gpu.bundle)
    config, _ = parsed((place / "config.pbtxt").read_text(), monkeypatch)
    assert config.platform == "tensorrt_plan" and config.default_model_filename == "model.plan"
    entry = gpu.bundle.manifest["engines"][0]
    assert (place / "1" / "model.plan").read_bytes() == gpu.bundle.read(entry)
    assert not (place / "1" / "model.onnx").exists()


def test_triton_has_the_types_that_onnx_has(copy, tmp_path, monkeypatch):
    from export.triton import write_repository

    def of_type(dtype):
        def change(m, data):
            m["graphs"]["prior"]["outputs"][0]["dtype"] = dtype

        return copy(change)

    for dtype, wanted in [
        ("float16", "FP16"), ("bfloat16", "BF16"), ("float64", "FP64"), ("bool", "BOOL"),
        *((f"{sign}int{bits}", f"{sign}INT{bits}".upper())
          for sign in ("", "u") for bits in (8, 16, 32, 64)),
    ]:  # fmt: skip
        with case(dtype):
            place = write_repository(tmp_path / "served", of_type(dtype))
            config, pb = parsed((place / "config.pbtxt").read_text(), monkeypatch)
            assert pb.DataType.Name(config.output[0].data_type) == f"TYPE_{wanted}"
    with pytest.raises(InputError, match=r"output .* of copy\.bundle is complex64, no type"):
        write_repository(tmp_path / "other", of_type("complex64"))
    assert not (tmp_path / "other").exists()


def test_triton_takes_no_kmeans(tmp_path, photos):
    from export.triton import write_repository

    path = tmp_path / "k.bundle"
    assert export("--model", "kmeans", "--pictures", photos, "-q", "-o", path).code == 0
    with pytest.raises(InputError, match=r"k\.bundle has no network to serve"):
        write_repository(tmp_path / "triton", Bundle.open(path))
