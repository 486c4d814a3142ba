"""python -m runtime: what it says, in text and in JSON, and what its exit codes mean."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fake_tensorrt
import numpy as np
import pytest
from bundles import CONFIG, tensors, tiny_parts

from runtime import build, cli, doctor, network
from runtime.__main__ import main
from runtime.bundle import MANIFEST, Bundle, file_entry, seal, write_bundle
from runtime.device import CudaDevice, cuda_problem
from runtime.engine import OnnxEngine
from runtime.errors import DeviceError, EngineMismatch, InputError, MissingBackend

ROOT = Path(__file__).resolve().parents[2]
SIZE, CLASSES = (24, 32), 3
no_gpu = pytest.mark.skipif(cuda_problem() is None, reason="says what is said without a GPU")


def shapes(graphs):
    """Least, usual and largest shape of every free input: all for one picture size."""
    parameters, _ = network.shapes(CONFIG, CLASSES)
    sizes = dict(zip(("height", "width"), SIZE, strict=True)) | {"classes": CLASSES}
    sizes["parameters"] = sum(int(np.prod(s)) for s in parameters.values())
    out = {}
    for name, graph in graphs.items():
        free = [p for p in graph["inputs"] if any(isinstance(n, str) for n in p["shape"])]
        out[name] = {p["name"]: [[sizes.get(n, n) for n in p["shape"]]] * 3 for p in free}
    return out


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """Two valid bundles without engines, with a recipe: "kmeans" and "network"."""
    folder = tmp_path_factory.mktemp("templates")
    for name in ("kmeans", "network"):
        manifest, files = tiny_parts(with_network=name == "network")
        for engine in manifest["engines"]:
            del files[engine["file"]]
        manifest["engines"] = []
        manifest["recipe"] |= {
            "command": "python -m export --model tiny --target onnx,rtx",
            "targets": ["onnx", "rtx"],
            "compute_capabilities": ["8.6"],
            "shapes": shapes(manifest["graphs"]),
        }
        write_bundle(folder / name, manifest, files)
    return folder


@pytest.fixture
def bundle(templates, tmp_path):
    """A copy of the k-means bundle's folder."""
    return Path(shutil.copytree(templates / "kmeans", tmp_path / "tiny.bundle"))


@pytest.fixture
def network_bundle(templates, tmp_path):
    return Path(shutil.copytree(templates / "network", tmp_path / "network.bundle"))


@pytest.fixture(scope="module")
def built(templates, tmp_path_factory):
    """The k-means bundle with real engines of TensorRT for RTX."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX builds the engines")
    place = tmp_path_factory.mktemp("built") / "tiny.bundle"
    shutil.copytree(templates / "kmeans", place)
    assert main(["build", str(place), "--json"]) == 0
    return place


@pytest.fixture
def with_engines(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "tiny.bundle"))


def change(bundle, edit):
    """Edit the manifest and seal it again."""
    path = bundle / MANIFEST
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(seal(manifest)))


def put(bundle, entry, data):
    """Replace a file and its entry in the sealed manifest."""
    (bundle / entry["file"]).write_bytes(data)

    def edit(manifest):
        every = [*manifest["graphs"].values(), *manifest["engines"], *manifest["golden"]]
        for other in [*every, manifest["init"]]:
            if other["file"] == entry["file"]:
                other |= file_entry(entry["file"], data)

    change(bundle, edit)


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def answer(capsys, *arguments):
    """Exit code and the one JSON document of a command."""
    code = main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def text(capsys, *arguments):
    code = main([*map(str, arguments)])
    return (code, *capsys.readouterr())


def process(*arguments, **options):
    command = [sys.executable, "-m", "runtime", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120, **options
    )


# Usage


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["inspct", "x"], "invalid choice: 'inspct'", "did you mean inspect?"),
        (["check", "x", "--devce", "cuda"], "does not know '--devce'", "did you mean --device?"),
        (["check", "x", "--devce=cuda"], "does not know '--devce'", "did you mean --device?"),
        (["build", "x", "--dry"], "does not know '--dry'", "did you mean --dry-run?"),
        (["build", "x", "--target", "rtxx"], "invalid choice: 'rtxx'", "did you mean rtx?"),
        (["inspect", "a", "b"], "does not know 'b'", "see: python -m runtime inspect --help"),
        (["inspect"], "required: BUNDLE", "see: python -m runtime inspect --help"),
        ([], "required: COMMAND", "see: python -m runtime --help"),
    ],
)
def test_a_usage_error_names_the_nearest_word(capsys, arguments, what, fix):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert what in err and err.endswith(f"  fix: {fix}\n") and err.startswith("error: ")
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and err == ""
    assert json.loads(out).keys() == {"error", "fix"}


@pytest.mark.parametrize("command", ["inspect", "check", "build"])
def test_no_bundle_is_an_error_with_a_fix(capsys, tmp_path, command):
    code, out, err = text(capsys, command, tmp_path / "none")
    assert code == 1 and out == "" and "none is no folder" in err and "\n  fix: " in err
    code, document = answer(capsys, command, tmp_path)  # a folder, but no bundle
    assert code == 5 and "is no bundle" in document["error"] and document["fix"]


# doctor


def test_doctor_reports_this_machine():
    done = process("doctor", "--json")
    report = json.loads(done.stdout)
    assert report["targets"]["cpu"]["ready"] and "problems" in report
    assert done.returncode == int(any(p["kind"] == "broken" for p in report["problems"]))


@pytest.mark.parametrize(("kind", "code"), [("missing", 0), ("clash", 0), ("broken", 1)])
def test_doctor_fails_only_for_what_is_broken(capsys, monkeypatch, kind, code):
    found = {"problems": [{"kind": kind, "what": "it", "fix": "mend it"}]}
    monkeypatch.setattr(doctor, "report", lambda: found)
    monkeypatch.setattr(doctor, "render", lambda report: "one\ntwo")
    assert text(capsys, "doctor") == (code, "one\ntwo\n", "")
    assert answer(capsys, "doctor") == (code, found)


# inspect


def test_inspect_says_what_is_in_the_bundle(capsys, network_bundle):
    code, out, err = text(capsys, "inspect", network_bundle)
    assert code == 0 and err == ""
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100 and lines[0].endswith("every sha256 OK")
    manifest = json.loads((network_bundle / MANIFEST).read_text())
    for entry in (*manifest["graphs"].values(), *manifest["golden"], manifest["init"]):
        assert f"{entry['file']}  " in out and f"sha256 {entry['sha256'][:12]} OK" in out
    for said in (
        "tiny, trained; gives logits",
        "3: brick, grass, sea",
        "stretch to 24 x 32 (area",
        "RGB / 255, minus 0.485 0.456 0.406",
        "residual; steps 3 (default 10); channels 4 (default 32); scale 1.0 (default 0.5)",
        "1 x classes x height x width",
        "opset 18  fp32",
        "no engines",
        "update 1e-07, agreement 1",
        "  python -m export --model tiny --target onnx,rtx",
    ):
        assert said in " ".join(out.split()) or said in out


def test_inspect_calls_random_weights_untrained(capsys, network_bundle):
    change(network_bundle, lambda m: m["model"].update(trained=False))
    assert "UNTRAINED" in text(capsys, "inspect", network_bundle)[1]


def test_inspect_in_json(capsys, bundle):
    code, document = answer(capsys, "inspect", bundle)
    assert code == 0 and document["ok"] and "error" not in document
    assert document["manifest"] == Bundle.open(bundle).manifest
    assert document["refine_changes"] == {
        "steps": [3, 10],
        "channels": [4, 32],
        "scale": [1.0, 0.5],
    }
    assert {f["file"] for f in document["files"]} == set(contents(bundle)) - {MANIFEST}


def test_inspect_names_every_damaged_file(capsys, bundle):
    for name in ("refine_map.onnx", "init.safetensors"):
        data = bytearray((bundle / name).read_bytes())
        data[-1] ^= 1
        (bundle / name).write_bytes(data)
    code, out, err = text(capsys, "inspect", bundle)
    assert code == 5 and out.count("DAMAGED") == 3 and "2 DAMAGED" in out
    assert "refine_map.onnx has sha256" in err and "\n  fix: " in err
    code, document = answer(capsys, "inspect", bundle)
    assert code == 5 and not document["ok"] and document["error"] and document["fix"]
    bad = {f["file"] for f in document["files"] if not f["ok"]}
    assert bad == {"refine_map.onnx", "init.safetensors"}


def test_inspect_shows_engines_without_tensorrt(capsys, with_engines):
    code, out, _ = text(capsys, "inspect", with_engines)
    assert code == 0
    for engine in Bundle.open(with_engines).manifest["engines"]:
        assert f"{engine['graph']:11} {engine['key']}  TensorRT for RTX {engine['version']}" in out
        assert f"header says version {engine['version']}, {engine['size']} bytes" in out
    assert "layers: 100% fp32" in out and "parameters_out  float32" in out


def test_inspect_compares_a_plans_header_with_the_manifest(capsys, with_engines):
    change(with_engines, lambda m: m["engines"][0].update(version="1.6.0.2"))
    code, _, err = text(capsys, "inspect", with_engines)
    assert code == 5 and "built it, the manifest says 1.6.0.2" in err
    assert "runtime build --force" in err
    change(with_engines, lambda m: m["engines"][0].update(version="1.7.1.116"))
    entry = Bundle.open(with_engines).manifest["engines"][0]
    put(with_engines, entry, (with_engines / entry["file"]).read_bytes()[:-5])
    code, _, err = text(capsys, "inspect", with_engines)
    assert code == 5 and "cut short" in err


def test_inspect_loads_no_runtime(built):
    code = (
        "import sys; from runtime.__main__ import main; main(['inspect', sys.argv[1]]);"
        "heavy = {'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'onnx', 'torch', 'cv2', 'tqdm'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(built)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_what_a_stranger_wrote_cannot_steer_the_terminal(capsys, bundle):
    def edit(manifest):
        manifest["recipe"] |= {"command": "rm\x1b[2J", "targets": "\u202e"}
        manifest["verification"] = {"a": {"b\x1b]0;c": ["\x07"] * 9}, "d": [{}], "e": 1e300}
        manifest["verification"]["deep"] = {"1": {"2": {"3": {"4": {"5": {"6": 7}}}}}}

    change(bundle, edit)
    code, out, _ = text(capsys, "inspect", bundle)
    assert code == 0 and "rm?[2J" in out
    assert all(c.isprintable() or c == "\n" for c in out)


def test_a_receipt_of_any_form_is_shown(capsys, with_engines):
    for receipt in ({}, {"layers": 3}, {"layers": {"fp16": "x", "int8": 2**70}, "matrix": []}):
        change(with_engines, lambda m, r=receipt: m["engines"][0].update(receipt=r))
        code, out, _ = text(capsys, "inspect", with_engines)
        assert code == 0 and "no layers counted" in out


def test_shares_are_of_the_layers(capsys, with_engines):
    receipt = {"layers": {"fp32": 1, "fp16": 3}, "matrix": {"fp16": 2}, "source": "engine"}
    change(with_engines, lambda m: m["engines"][0].update(receipt=receipt))
    _, out, _ = text(capsys, "inspect", with_engines)
    assert (
        "4 layers: 75% fp16, 25% fp32; 2 convolutions and matrix products: 100% fp16 (by the "
        in " ".join(out.split())
    )


def test_a_terminal_without_unicode_is_served(bundle):
    change(bundle, lambda m: m["model"].update(name="städte"))
    change(bundle, lambda m: m["recipe"].update(command="größe"))
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = process("inspect", bundle, env=env)
    assert done.returncode == 0 and "gr\\xf6\\xdfe" in done.stdout


def test_a_reader_that_leaves_is_no_traceback(bundle):
    command = [sys.executable, "-m", "runtime", "inspect", str(bundle)]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


# check


@pytest.mark.parametrize("kind", ["kmeans", "network"])
def test_check_runs_the_golden_vectors_twice(capsys, templates, kind):
    code, out, err = text(capsys, "check", templates / kind)
    assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 100
    assert out.splitlines()[-1] == f"{kind} is sound: {10 if kind == 'kmeans' else 12} ok"
    code, document = answer(capsys, "check", templates / kind)
    assert code == 0 and document["ok"] and document["device"] == "cpu"
    golden = {c["check"]: c["numbers"] for c in document["checks"] if "golden, " in c["check"]}
    assert golden.keys() == {"golden, refined by native", "golden, refined by onnx"}
    for numbers in golden.values():
        assert numbers["labels"] >= 0.99 and numbers["prior"] == 1
        assert ("input" in numbers) == (kind == "network")


def test_check_fails_for_a_damaged_file_and_asks_it_nothing(capsys, bundle):
    (bundle / "refine_step.onnx").write_bytes(b"x" * 10)
    code, out, _ = text(capsys, "check", bundle)
    assert code == 5 and "refine_step.onnx" in out and "FAILED: " in out and "fix: " in out
    assert "golden                              not run here" in out
    code, document = answer(capsys, "check", bundle)
    assert code == 5 and not document["ok"] and "10 bytes" in document["error"]


def test_check_catches_changed_answers(capsys, bundle):
    from safetensors.numpy import load

    entry = Bundle.open(bundle).manifest["golden"][0]
    arrays = load((bundle / entry["file"]).read_bytes())
    arrays["labels"] = np.ascontiguousarray(arrays["labels"][:, ::-1])
    put(bundle, entry, tensors(arrays))
    code, document = answer(capsys, "check", bundle)
    failed = [c["check"] for c in document["checks"] if c["state"] == "FAILED"]
    assert code == 5 and failed == ["golden, refined by native", "golden, refined by onnx"]
    assert "does not give its golden answers" in document["error"]


def test_check_catches_a_graph_that_computes_something_else(capsys, bundle):
    """The step graph of another learning rate: right ports and hash, wrong answers."""
    from dataclasses import replace

    from export.refine_step import build_step

    entry = Bundle.open(bundle).manifest["graphs"]["refine_step"]
    put(bundle, entry, build_step(replace(CONFIG, lr=1.0)).SerializeToString())
    code, document = answer(capsys, "check", bundle)
    assert code == 5
    assert [c["check"] for c in document["checks"] if c["state"] == "FAILED"] == [
        "golden, refined by onnx"
    ]


def test_check_compares_ports_with_the_manifest(capsys, bundle):
    change(bundle, lambda m: m["graphs"]["refine_map"]["outputs"].pop())
    code, document = answer(capsys, "check", bundle)
    assert code == 5 and "the manifest says" in document["error"]


def test_check_without_onnx_runtime(capsys, monkeypatch, bundle):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, out, _ = text(capsys, "check", bundle)
    assert code == 4 and "fix: pip install onnxruntime" in out and "not wholly checked" in out


@no_gpu
def test_check_on_cuda_without_a_gpu(capsys, bundle):
    code, document = answer(capsys, "check", bundle, "--device", "cuda")
    assert code == 4 and document["fix"]
    code, document = answer(capsys, "check", bundle, "--device", "tpu")
    assert code == 1 and "device is 'tpu'" in document["error"]


@no_gpu
def test_engines_that_cannot_run_here_are_no_failure_unless_asked_for(capsys, with_engines):
    code, out, _ = text(capsys, "check", with_engines)
    assert code == 0 and out.count("not run here: no GPU: ") == 2
    assert out.splitlines()[-1].endswith("is sound: 12 ok, 2 not run here")
    code, out, _ = text(capsys, "check", with_engines, "--engines")
    assert code == 4 and out.count("MISSING: no GPU: ") == 2
    assert "not wholly checked" in out.splitlines()[-1]


def test_engines_that_are_asked_for_must_be_there(capsys, bundle):
    code, document = answer(capsys, "check", bundle, "--engines")
    assert code == 4 and "has no engines" in document["error"]
    assert document["fix"] == f"python -m runtime build {bundle}"


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU, for the loader and the command line."""
    for module in ("runtime.load", "runtime.__main__"):
        monkeypatch.setattr(f"{module}.cuda_problem", lambda: None)
        monkeypatch.setattr(
            f"{module}.cuda_devices", lambda: [CudaDevice(0, "Pretended", "8.6", 2**33, 2**32)]
        )


def pretend_engines(monkeypatch, bundle, spoil=lambda outputs: outputs, size=SIZE):
    """Put engines of the fake TensorRT into a bundle: they compute on ONNX Runtime."""
    functions, engines = {}, []
    manifest = Bundle.open(bundle).manifest
    plain = {"float32": "FLOAT", "int32": "INT32", "int64": "INT64"}
    (bundle / "engines").mkdir()
    for i, graph in enumerate(("refine_step", "refine_map")):
        session = OnnxEngine((bundle / f"{graph}.onnx").read_bytes())

        def compute(inputs, session=session):
            outputs = session(*(inputs[p.name] for p in session.inputs))
            names = (p.name for p in session.outputs)
            return spoil(dict(zip(names, outputs, strict=True)))

        functions[graph] = compute
        sizes = {"height": size[0], "width": size[1], "classes": CLASSES}
        sizes["parameters"] = shapes(manifest["graphs"])[graph]["parameters"][0][0]
        ports = {
            kind: [
                p | {"shape": [sizes.get(n, n) for n in p["shape"]]}
                for p in manifest["graphs"][graph][kind]
            ]
            for kind in ("inputs", "outputs")
        }
        plan = fake_tensorrt.plan(
            graph,
            *({p["name"]: (p["shape"], plain[p["dtype"]]) for p in ps} for ps in ports.values()),
        )
        file = f"engines/{i:016x}.engine"
        (bundle / file).write_bytes(plan)
        engines.append(
            file_entry(file, plan)
            | {"key": f"{i:016x}", "graph": graph, "runtime": "tensorrt", "version": "10.3.0"}
            | {"compute_capabilities": ["8.6"], "gpu_name": "Pretended", "l4t": None}
            | {"platform": "linux-x86_64", "shapes": {}, "flags": {}, "receipt": {}, "seconds": 1}
            | ports
        )
    change(bundle, lambda m: m.update(engines=engines))
    return fake_tensorrt.install(
        monkeypatch, functions=functions, capabilities=[(8, 6)], memory=2**24
    )


def test_check_asks_engines_for_the_golden_answers(capsys, monkeypatch, bundle, gpu):
    pretend_engines(monkeypatch, bundle)
    code, document = answer(capsys, "check", bundle, "--engines")
    numbers = {c["check"]: c.get("numbers") for c in document["checks"]}
    assert code == 0 and numbers["golden, on trt engines"]["labels"] >= 0.99
    assert sum(c["check"].startswith("engine ") for c in document["checks"]) == 2


def test_check_catches_an_engine_that_answers_wrongly(capsys, monkeypatch, bundle, gpu):
    def spoil(outputs):
        return {k: v[..., ::-1] if k in ("scores", "labels") else v for k, v in outputs.items()}

    pretend_engines(monkeypatch, bundle, spoil)
    code, document = answer(capsys, "check", bundle)
    failed = [c["check"] for c in document["checks"] if c["state"] == "FAILED"]
    assert code == 5 and failed == ["golden, on trt engines"]


def test_engines_of_another_size_cannot_give_the_golden_answers(capsys, monkeypatch, bundle, gpu):
    pretend_engines(monkeypatch, bundle, size=(16, 16))
    code, document = answer(capsys, "check", bundle)
    last = document["checks"][-1]
    assert code == 0 and last["state"] == "not run here"
    assert "refined at 24 x 32, the engines take 16 x 16 alone" in last["detail"]
    assert answer(capsys, "check", bundle, "--engines")[0] == 5


def test_check_says_which_engines_are_for_another_machine(capsys, monkeypatch, bundle, gpu):
    fake = pretend_engines(monkeypatch, bundle)
    change(bundle, lambda m: m["engines"][0].update(gpu_name="Orin"))
    code, out, _ = text(capsys, "check", bundle)
    assert code == 0 and "no trt engine of refine_step for Pretended" in " ".join(out.split())
    assert "golden, on trt engines" not in out
    sys.modules["tensorrt"].__version__ = fake.version = "10.7.0"
    code, out, _ = text(capsys, "check", bundle)
    assert code == 0 and "built with tensorrt 10.3.0" in " ".join(out.split())
    code, document = answer(capsys, "check", bundle, "--engines")
    assert code == 5 and "runtime build" in document["fix"]


# build


def test_build_finishes_the_engines_here(capsys, bundle):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX builds the engines")
    before = contents(bundle)
    code, out, err = text(capsys, "build", bundle, "--dry-run")
    assert code == 0 and out.count("would build") == 2 and "why: the bundle has none" in out
    assert contents(bundle) == before and err == ""

    code, out, err = text(capsys, "build", bundle)
    assert code == 0 and out.count("\nbuilt  ") + out.startswith("built ") == 2
    assert out.endswith(f"\nnext         python -m runtime check {bundle}\n")
    assert "100% fp32" in out and "2 built, 0 up to date" in out
    assert "build refine_step with TensorRT for RTX (the bundle has none) ..." in err
    assert err.count("  100 % ") == 2 and "\r" not in err
    engines = Bundle.open(bundle).manifest["engines"]
    assert {e["graph"] for e in engines} == {"refine_step", "refine_map"}
    Bundle.open(bundle).check_files()

    after = contents(bundle)
    code, document = answer(capsys, "build", bundle)
    assert code == 0 and document["built"] == document["to_build"] == []
    assert document["up_to_date"] == [e["key"] for e in engines]
    assert contents(bundle) == after

    (bundle / engines[0]["file"]).write_bytes(b"damaged")
    code, document = answer(capsys, "build", bundle)
    assert code == 0 and [e["key"] for e in document["built"]] == [engines[0]["key"]]
    assert "has 7 bytes" in document["to_build"][0]["why"]
    assert contents(bundle).keys() == after.keys()
    Bundle.open(bundle).check_files()


def test_build_force_builds_again(capsys, with_engines):
    code, document = answer(capsys, "build", with_engines, "--force", "--dry-run")
    assert code == 0 and [e["why"] for e in document["to_build"]] == ["--force"] * 2


@pytest.mark.parametrize(
    ("edit", "options", "why"),
    [
        ({"version": "1.6.0.2"}, [], "TensorRT for RTX 1.6.0.2 -> {version}"),
        ({}, ["--compute-capability", "8.9,sm_120"], "compute capability 8.6 -> 8.9, 12.0"),
        ({}, ["--workspace", "1.5"], f"workspace None -> {3 * 2**29}"),
        ({"shapes": {}}, [], "other shapes"),
        ({}, [], "the graph has changed"),
    ],
)
def test_build_says_why_an_engine_is_stale(capsys, with_engines, edit, options, why):
    def make_stale(manifest):
        for engine in manifest["engines"]:
            engine |= {"key": engine["key"][::-1], **edit}

    change(with_engines, make_stale)
    code, document = answer(capsys, "build", with_engines, "--dry-run", *options)
    import tensorrt_rtx

    assert code == 0
    assert [e["why"] for e in document["to_build"]] == [
        why.format(version=tensorrt_rtx.__version__)
    ] * 2


def test_ctrl_c_leaves_the_bundle_as_it_was(bundle):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX builds the engines")
    before = contents(bundle)
    command = [sys.executable, "-u", "-m", "runtime", "build", str(bundle)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as child:
        said = ""
        while "%" not in said:
            said = child.stderr.readline()
            assert said
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "error: interrupted" in err and "Traceback" not in err
    assert contents(bundle) == before


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (DeviceError("out", fix="more"), 1), (MemoryError(), 1)],
)
def test_a_build_that_fails_adds_nothing(capsys, monkeypatch, bundle, error, code):
    """Not even the engine that was done before."""
    pytest.importorskip("tensorrt_rtx", reason="its version is in the keys")
    done = []

    def fail_at_second(entry, *_, **__):
        if done:
            raise error
        done.append(entry)
        plan = b"plan"
        file = file_entry(entry["file"], plan)
        ports = {"inputs": [], "outputs": [], "receipt": {}, "seconds": 1}
        return {**entry, **file, **ports}, plan, None

    monkeypatch.setattr(build, "build", fail_at_second)
    before = contents(bundle)
    assert answer(capsys, "build", bundle)[0] == code
    assert len(done) == 1 and contents(bundle) == before


@pytest.fixture
def device_build(monkeypatch, gpu):
    """TensorRT on a pretended device: building gives a plan, and times longer by one byte."""
    monkeypatch.setattr(build, "cuda_devices", lambda: [CudaDevice(0, "Orin", "8.7", 1, 1)])
    fake_tensorrt.install(monkeypatch)
    seen = []

    def pretend(entry, data, precision, *, device, timing_cache, progress):
        seen.append((entry["graph"], device, timing_cache))
        progress("Building", 1.0)
        plan = entry["graph"].encode()
        file = file_entry(entry["file"], plan)
        ports = {"inputs": [], "outputs": [], "receipt": {}, "seconds": 1}
        times = None if timing_cache is None else timing_cache + b"t"
        return {**entry, **file, **ports}, plan, times

    monkeypatch.setattr(build, "build", pretend)
    return seen


def test_the_timing_cache_is_read_and_rewritten(capsys, bundle, tmp_path, device_build):
    cache = tmp_path / "times.cache"
    options = ["--target", "trt", "--timing-cache", cache]
    assert answer(capsys, "build", bundle, *options)[0] == 0
    assert [times for _, _, times in device_build] == [b"", b"t"] and cache.read_bytes() == b"tt"
    code, document = answer(capsys, "build", bundle, *options, "--force")
    assert code == 0 and cache.read_bytes() == b"tttt"
    assert {e["gpu_name"] for e in document["built"]} == {"Orin"}
    assert len(Bundle.open(bundle).manifest["engines"]) == 2  # of the same keys: replaced
    assert sorted(p.name for p in tmp_path.iterdir()) == ["times.cache", "tiny.bundle"]


def test_a_timing_cache_that_cannot_be_used(capsys, bundle, tmp_path, device_build):
    none = tmp_path / "none" / "cache"
    code, document = answer(capsys, "build", bundle, "--target", "trt", "--timing-cache", none)
    assert code == 1 and "has no folder" in document["error"] and not device_build
    code, document = answer(capsys, "build", bundle, "--target", "trt", "--timing-cache", tmp_path)
    assert code == 1 and "cannot be read" in document["error"] and not device_build


def test_a_timing_cache_is_refused_for_rtx(capsys, bundle, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="it is asked for its version")
    code, document = answer(capsys, "build", bundle, "--timing-cache", tmp_path / "c")
    assert code == 1 and "timing-cache is for target trt" in document["error"]


def test_targets_that_cannot_be_built_here_are_named(capsys, bundle, monkeypatch, device_build):
    """The recipe's targets are built as far as this machine can."""
    change(bundle, lambda m: m["recipe"].update(targets=["trt", "rtx"]))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    code, out, err = text(capsys, "build", bundle)
    assert code == 0 and out.count("TensorRT 10.3.0 for Orin alone") == 2
    assert "not built here: rtx: tensorrt_rtx is needed" in err
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    code, _, err = text(capsys, "build", bundle)
    assert code == 4 and "tensorrt is needed" in err and "\n  fix: pip install" in err


def test_a_bundle_for_onnx_alone_gets_engines_of_tensorrt_if_it_is_here(
    capsys, bundle, monkeypatch, device_build
):
    change(bundle, lambda m: m["recipe"].update(targets=["onnx"]))
    code, document = answer(capsys, "build", bundle)
    assert code == 0 and {e["runtime"] for e in document["built"]} == {"tensorrt"}
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    code, document = answer(capsys, "build", bundle)
    assert code == 4 and "names no target with engines" in document["error"]
    assert document["fix"].endswith("or choose --target rtx")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--device", "cpu"], "engines are built on a GPU"),
        (["--device", "cuda:7"], "device is 7; wanted 0 to 0"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--workspace", "much"], "workspace is 'much'; wanted GiB"),
        (["--workspace", "0"], "workspace is '0'"),
        (["--compute-capability", "8.6,new"], "compute-capability is 'new'"),
    ],
)
def test_build_refuses_values(capsys, bundle, gpu, options, match):
    code, document = answer(capsys, "build", bundle, *options)
    assert code == 1 and match in document["error"]


@no_gpu
@pytest.mark.parametrize(("given", "match"), [("9.0", "cannot build"), ("", "needs to know")])
def test_build_refuses_gpus_that_rtx_does_not_know(capsys, bundle, given, match):
    pytest.importorskip("tensorrt_rtx", reason="it is asked what it knows")
    code, document = answer(capsys, "build", bundle, "--dry-run", "--compute-capability", given)
    assert code == 1 and match in document["error"] and document["fix"]


@pytest.mark.parametrize(
    "changes",
    [
        {"shapes": {"refine_step": {"image": 5}, "refine_map": {}}},
        {"shapes": {"refine_step": {"image": [[1], [1]]}, "refine_map": {}}},
        {"shapes": {"refine_step": {"image": [[1, "x"], [1, 1], [1, 1]]}, "refine_map": {}}},
        {"shapes": {"refine_step": {"image": [[1], [1, 1], [1]]}, "refine_map": {}}},
        {"shapes": {"refine_step": {"image": [[-1], [-1], [-1]]}, "refine_map": {}}},
        {"compute_capabilities": {"8.6": 1}},
        {"compute_capabilities": [8.6]},
        {"workspace": "2G"},
        {"level": True},
        {"dynamic": "no"},
        {"targets": [["rtx"]]},
    ],
)
def test_build_refuses_recipes_that_say_something_else(capsys, bundle, changes):
    change(bundle, lambda m: m["recipe"].update(changes))
    code, document = answer(capsys, "build", bundle)
    assert code == 5 and "recipe does not say" in document["error"]


def test_build_needs_a_recipe(capsys, bundle):
    change(bundle, lambda m: m["recipe"].pop("shapes"))
    code, document = answer(capsys, "build", bundle)
    assert code == 5 and "recipe does not say" in document["error"]


# What the command lines share


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("a", fix="b"), 1),
        (MissingBackend("a", fix="b"), 4),
        (EngineMismatch("a", fix="b"), 5),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 1),
    ],
)
def test_errors_become_exit_codes(capsys, error, code):
    def fail():
        raise error

    assert cli.run(fail) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n  fix: ") == 1
    assert cli.run(fail, as_json=True) == code
    out, err = capsys.readouterr()
    assert err == "" and all(json.loads(out).values())
    assert cli.run(lambda: 6) == 6


def test_a_mistake_in_the_program_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)


def test_progress_is_a_line_for_each_tenth_or_a_bar(capsys, monkeypatch):
    with cli.Bar() as bar:
        bar.say("first")
        for i in range(101):
            bar.progress("phase", i / 100)
        bar.say("second")
        bar.progress("phase", 1.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "first ..." and lines[12:] == ["second ...", "  100 % phase"]
    assert lines[1:12] == [f"  {10 * i:3d} % phase" for i in range(11)]

    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    with pytest.raises(KeyboardInterrupt), cli.Bar() as bar:
        bar.say("first")
        bar.progress("Optimizing graph", 0.5)
        raise KeyboardInterrupt
    assert "Optimizing graph" in screen.getvalue() and "50%" in screen.getvalue()
    with cli.Bar(quiet=True) as bar:
        bar.say("unheard")
        bar.progress("unheard", 0.5)
    assert "unheard" not in screen.getvalue()


def test_values_of_options():
    assert cli.capabilities("8.6, sm_89,120,8.6") == ("8.6", "8.9", "12.0")
    assert cli.capabilities("") == ()
    assert cli.workspace_bytes("auto") is None and cli.workspace_bytes("2") == 2**31
    assert cli.workspace_bytes("1.5GiB") == 3 * 2**29 and cli.workspace_bytes("64m") == 2**26
    assert cli.gpu_index("cuda:1") == cli.gpu_index("1") == 1
    with pytest.raises(InputError, match="compute-capability is '8'"):
        cli.capabilities("8")
    with pytest.raises(InputError, match="workspace is '-1'"):
        cli.workspace_bytes("-1")
    with pytest.raises(InputError, match="engines are built on a GPU"):
        cli.gpu_index("cpu")
