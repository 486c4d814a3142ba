"""python -m runtime check: golden vectors, damaged bundles, engines that answer wrongly."""

import shutil
import sys
from pathlib import Path

import fake_tensorrt
import numpy as np
import pytest
from bundles import CONFIG, tensors
from cases import case
from permissions import obeyed
from runtime_commands import CLASSES, SIZE, answer, change, contents, no_gpu, put, shapes, text

from runtime.bundle.manifest import file_entry
from runtime.bundle.open import open_prior, open_refinement
from runtime.bundle.read import Bundle
from runtime.engines.onnx import OnnxEngine
from runtime.errors import EngineMismatch

# check


def test_check_runs_the_golden_vectors_twice(capsys, templates):
    for kind in ["kmeans", "network"]:
        with case(kind):
            code, out, err = text(capsys, "check", templates / kind)
            assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 100
            assert out.splitlines()[-1] == f"{kind} is sound: {10 if kind == 'kmeans' else 12} ok"
            code, document = answer(capsys, "check", templates / kind)
            assert code == 0 and document["ok"] and document["device"] == "cpu"
            golden = {
                c["check"]: c["numbers"] for c in document["checks"] if "golden, " in c["check"]
            }
            assert golden.keys() == {"golden, refined by native", "golden, refined by onnx"}
            for numbers in golden.values():
                assert numbers["labels"] >= 0.99 and numbers["prior"] == 1
                assert ("input" in numbers) == (kind == "network")


def test_check_compares_files_and_ports_with_the_manifest(capsys, bundle):
    """A damaged file is not opened."""
    whole = contents(bundle)
    change(bundle, lambda m: m["graphs"]["refine_map"]["outputs"].pop())
    code, document = answer(capsys, "check", bundle)
    assert code == 5 and "the manifest says" in document["error"]
    for name, data in whole.items():
        (bundle / name).write_bytes(data)
    (bundle / "refine_step.onnx").write_bytes(b"x" * 10)
    code, out, _ = text(capsys, "check", bundle)
    assert code == 5 and "refine_step.onnx" in out and "FAILED: " in out and "fix: " in out
    said = " ".join(out.split())
    assert "golden not run here: the golden vectors were not compared, because these " in said
    assert "because these checks failed: refine_step.onnx" in said
    code, document = answer(capsys, "check", bundle)
    assert code == 5 and not document["ok"] and "10 bytes" in document["error"]


@pytest.mark.parametrize("name", ["refine_map.onnx", "golden"])
def test_check_of_a_file_that_cannot_be_read_is_a_failure_of_this_machine(capsys, bundle, name):
    mode = (bundle / name).stat().st_mode
    (bundle / name).chmod(0)
    with obeyed():
        code, out, _ = text(capsys, "check", bundle)
        said = " ".join(out.split())
        assert code == 1 and "Permission denied fix: check its permissions" in said
        assert "golden not run here" in said and out.splitlines()[-1].startswith("tiny.bundle FAIL")
        code, document = answer(capsys, "check", bundle)
        assert code == 1 and not document["ok"] and "Permission denied" in document["error"]
        (bundle / "refine_step.onnx").write_bytes(b"x")
        assert text(capsys, "check", bundle)[0] == 5  # that the bundle is bad counts more
    (bundle / name).chmod(mode)


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


def test_check_without_onnx_runtime(capsys, monkeypatch, bundle):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, out, _ = text(capsys, "check", bundle)
    assert code == 4 and "fix: pip install onnxruntime" in out and "not wholly checked" in out
    (bundle / "refine_step.onnx").write_bytes(b"x" * 10)
    code, document = answer(capsys, "check", bundle)
    assert {c["state"] for c in document["checks"]} >= {"FAILED", "MISSING"}
    assert code == 5  # that the bundle is bad counts more


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
    assert out.splitlines()[-1].endswith(
        "is sound, but 2 engines were not run: 12 ok, 2 not run here"
    )
    assert answer(capsys, "check", with_engines)[1]["engines_not_run"] == 2
    change(with_engines, lambda m: m["engines"].pop())
    out = text(capsys, "check", with_engines)[1]
    assert "is sound, but 1 engine was not run: " in out.splitlines()[-1]
    code, out, _ = text(capsys, "check", with_engines, "--engines")
    assert code == 4 and out.count("MISSING: no GPU: ") == 1
    assert "not wholly checked" in out.splitlines()[-1]


def test_a_damaged_engine_is_built_again(capsys, with_engines):
    """The fix of other files, to export the bundle again, is not the shortest. A damaged engine is
    a failed check, and is not counted as an engine that this machine cannot run."""
    fix = f"python -m runtime build {with_engines}; or export it again, or copy it again from a "
    first, second = (
        with_engines / e["file"] for e in Bundle.open(with_engines).manifest["engines"]
    )
    whole = first.read_bytes()
    for damage in (first.unlink, lambda: first.write_bytes(whole[::-1])):
        damage()
        for command in ("check", "inspect"):
            with case(command, first.exists()):
                code, document = answer(capsys, command, with_engines)
                assert code == 5 and document["fix"].startswith(fix)
        assert answer(capsys, "check", with_engines)[1]["engines_not_run"] == 1
    second.unlink()
    assert answer(capsys, "check", with_engines)[1]["engines_not_run"] == 0
    (with_engines / "refine_map.onnx").unlink()
    assert answer(capsys, "inspect", with_engines)[1]["fix"].startswith("export it again, or copy")


def test_engines_that_are_asked_for_must_be_there(capsys, bundle):
    code, document = answer(capsys, "check", bundle, "--engines")
    assert code == 4 and "has no engines" in document["error"]
    assert document["fix"] == f"python -m runtime build {bundle}"


REFINE = ("refine_step", "refine_map")


def pretend_engines(monkeypatch, bundle, spoil=lambda outputs: outputs, size=SIZE, graphs=REFINE):
    """Put engines of the fake TensorRT into a bundle: they compute on ONNX Runtime."""
    functions, engines = {}, []
    manifest = Bundle.open(bundle).manifest
    plain = {"float32": "FLOAT", "int32": "INT32", "int64": "INT64"}
    (bundle / "engines").mkdir()
    for i, graph in enumerate(graphs):
        session = OnnxEngine((bundle / f"{graph}.onnx").read_bytes())

        def compute(inputs, session=session):
            outputs = session(*(inputs[p.name] for p in session.inputs))
            names = (p.name for p in session.outputs)
            return spoil(dict(zip(names, outputs, strict=True)))

        functions[graph] = compute
        sizes = {"height": size[0], "width": size[1], "classes": CLASSES}
        if graph != "prior":
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
    assert document["engines_not_run"] == 0
    assert text(capsys, "check", bundle)[1].splitlines()[-1] == "tiny.bundle is sound: 15 ok"


def test_a_bundle_with_an_engine_of_its_prior_only(capsys, monkeypatch, tmp_path, templates, gpu):
    """The refinement runs natively; its engines are not missed, and are refused with another fix
    than to build them, which the recipe excludes."""
    bundle = Path(shutil.copytree(templates / "network", tmp_path / "network.bundle"))
    change(bundle, lambda m: m["recipe"].update(engines="prior"))
    pretend_engines(monkeypatch, bundle, graphs=("prior",))
    code, document = answer(capsys, "check", bundle, "--engines")
    numbers = {c["check"]: c.get("numbers") for c in document["checks"]}
    assert code == 0 and numbers["golden, on trt engines"]["prior"] == 1
    assert document["engines_not_run"] == 0
    opened, on_trt = Bundle.open(bundle), {"backend": "trt", "device": "cuda"}
    assert open_prior(opened, **on_trt)[0].backend == "tensorrt-10.3.0 fp32"
    fix = r"fix: refine_backend='native'; or export the bundle again with --engines all"
    with pytest.raises(EngineMismatch, match=r"no trt engine of refine_step(.|\n)*" + fix):
        open_refinement(opened, **on_trt)
    change(bundle, lambda m: m["recipe"].update(engines="refine") or m["engines"].clear())
    with pytest.raises(EngineMismatch, match=r"engine of prior(.|\n)*fix: backend='onnx'; or exp"):
        open_prior(Bundle.open(bundle), **on_trt)
    with pytest.raises(EngineMismatch, match=r"of refine_step(.|\n)*fix: python -m runtime build"):
        open_refinement(Bundle.open(bundle), **on_trt)
    code, out, _ = text(capsys, "inspect", bundle)
    assert code == 0 and "no engines; the export chose those of refine_step and refine_map" in out


def test_an_engine_that_cannot_refine_alone_is_not_run(
    capsys, monkeypatch, tmp_path, templates, gpu
):
    bundle = Path(shutil.copytree(templates / "network", tmp_path / "network.bundle"))
    pretend_engines(monkeypatch, bundle, graphs=("prior", "refine_step"))
    code, document = answer(capsys, "check", bundle)
    golden = [c["state"] for c in document["checks"] if c["check"] == "golden, on trt engines"]
    assert code == 0 and golden == ["ok"] and document["engines_not_run"] == 1


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
    assert "refined at 24 x 32, the engines take only 16 x 16" in last["detail"]
    assert document["engines_not_run"] == 2  # they were loaded only
    assert answer(capsys, "check", bundle, "--engines")[0] == 5


def test_check_says_which_engines_are_for_another_machine(capsys, monkeypatch, bundle, gpu):
    fake = pretend_engines(monkeypatch, bundle)
    change(bundle, lambda m: m["engines"][0].update(gpu_name="Orin"))
    code, out, _ = text(capsys, "check", bundle)
    assert code == 0 and "no trt engine of refine_step for Pretended" in " ".join(out.split())
    assert "is sound, but 2 engines were not run: " in out  # one alone cannot refine
    assert "golden, on trt engines" not in out
    sys.modules["tensorrt"].__version__ = fake.version = "10.7.0"
    code, out, _ = text(capsys, "check", bundle)
    assert code == 0 and "built with tensorrt 10.3.0" in " ".join(out.split())
    code, document = answer(capsys, "check", bundle, "--engines")
    assert code == 5 and "runtime build" in document["fix"]
