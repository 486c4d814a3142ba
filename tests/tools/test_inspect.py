"""python -m runtime inspect: what it says of a bundle, in text and in JSON."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runtime_commands import answer, change, contents, process, put, text

from runtime.bundle.manifest import MANIFEST
from runtime.bundle.read import Bundle

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def network_bundle(templates, tmp_path):
    return Path(shutil.copytree(templates / "network", tmp_path / "network.bundle"))


# inspect


def test_inspect_says_what_is_in_the_bundle(capsys, network_bundle):
    code, out, err = text(capsys, "inspect", network_bundle)
    assert code == 0 and err == ""
    lines = out.splitlines()
    commands = [line for line in lines if line.startswith("  trtexec ")]  # are not wrapped
    assert max(len(line) for line in lines if line not in commands) <= 100
    assert lines[0].endswith("every sha256 OK")
    manifest = json.loads((network_bundle / MANIFEST).read_text())
    for entry in (*manifest["graphs"].values(), *manifest["golden"], manifest["init"]):
        assert f"{entry['file']}  " in out and f"sha256 {entry['sha256'][:12]} OK" in out
    for said in (
        "tiny; returns logits",
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
    change(network_bundle, lambda m: m["model"].update(trained=False))
    assert "tiny, UNTRAINED: its " in text(capsys, "inspect", network_bundle)[1]


def test_inspect_says_how_trained_weights_are_used(capsys, network_bundle):
    """The graph cnn says that the weights were trained; the default of 10 steps is for others."""

    shutil.copy(network_bundle / "refine_map.onnx", network_bundle / "cnn.onnx")

    def trained(m, steps):
        m["graphs"]["cnn"] = m["graphs"]["refine_map"] | {"file": "cnn.onnx"}
        m["refine"]["steps"] = steps

    for steps, said in (
        (0, "steps 0: the trained weights are used as they are; channels 4 (default 32); scale"),
        (2, "steps 2: from the trained weights; channels 4 (default 32); scale"),
        (10, "steps 10: from the trained weights; channels 4 (default 32); scale"),
    ):
        change(network_bundle, lambda m, steps=steps: trained(m, steps))
        code, out, _ = text(capsys, "inspect", network_bundle)
        assert code == 0 and f"refine residual; {said}" in " ".join(out.split())


def test_inspect_prints_the_command_of_trtexec_for_each_graph(capsys, network_bundle):
    _, out, _ = text(capsys, "inspect", network_bundle)
    _, document = answer(capsys, "inspect", network_bundle)
    graphs = Bundle.open(network_bundle).manifest["graphs"]
    assert document["trtexec"].keys() == graphs.keys()
    for name, command in document["trtexec"].items():
        assert f"\n  {command}\n" in out
        place = f"--onnx={network_bundle}/{name}.onnx --saveEngine={name}.engine"
        assert command.startswith(f"trtexec {place} --")
        free = {
            p["name"] for p in graphs[name]["inputs"] if any(isinstance(n, str) for n in p["shape"])
        }
        for port in graphs[name]["inputs"]:
            assert (f"{port['name']}:" in command) == (port["name"] in free)
        assert command.endswith(" --noTF32")  # FP32
    assert "image:1x3x24x32,guide:1x3x24x32,parameters:" in document["trtexec"]["refine_step"]
    change(network_bundle, lambda m: m["graphs"]["prior"].update(precision="fp16"))
    _, document = answer(capsys, "inspect", network_bundle)
    assert document["trtexec"]["prior"].endswith(" --noTF32 --stronglyTyped")
    for chosen, names in [("prior", ["prior"]), ("refine", ["refine_step", "refine_map"]), (3, [])]:
        change(network_bundle, lambda m, chosen=chosen: m["recipe"].update(engines=chosen))
        assert list(answer(capsys, "inspect", network_bundle)[1]["trtexec"]) == names
    change(network_bundle, lambda m: m["recipe"].pop("engines"))
    change(network_bundle, lambda m: m["recipe"].pop("shapes"))
    code, document = answer(capsys, "inspect", network_bundle)
    assert code == 0 and document["trtexec"] == {}
    assert "trtexec" not in text(capsys, "inspect", network_bundle)[1]


def test_inspect_says_what_the_commands_of_trtexec_do_not_build(capsys, bundle):
    title = "\ntrtexec: commands that build engines of TensorRT outside of the bundle\n"
    rtx = "  note: trtexec does not build engines of TensorRT for RTX\n"
    sizes = "  note: the recipe has one size; for a range add --minShapes and --maxShapes\n"
    assert title + rtx + "  trtexec --" in text(capsys, "inspect", bundle)[1]
    change(bundle, lambda m: m["recipe"].update(targets=["onnx", "trt"], dynamic=True))
    assert title + sizes + "  trtexec --" in text(capsys, "inspect", bundle)[1]

    def widen(manifest):
        for ports in manifest["recipe"]["shapes"].values():
            ports["image"][2][-1] += 8  # other inputs have one shape, as in an export

    change(bundle, widen)
    out = text(capsys, "inspect", bundle)[1]
    assert title + "  trtexec --" in out and " --minShapes=" in out


def test_inspect_shows_the_workspace_in_gib(capsys, with_engines):
    for workspace, words in [
        (2**31, "2 GiB"),
        (300 * 2**20, "0.293 GiB"),
        (None, "default"),
        (10**400, "1" + "0" * 79),
    ]:
        flags = {"workspace": workspace, "level": 2}
        change(with_engines, lambda m, flags=flags: m["engines"][0].update(flags=flags))
        out = text(capsys, "inspect", with_engines)[1]
        assert f" s, workspace {words}, level 2 " in " ".join(out.split())


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


def test_a_receipt_of_any_form_is_shown_and_shares_are_of_the_layers(capsys, with_engines):
    for receipt in ({}, {"layers": 3}, {"layers": {"fp16": "x", "int8": 2**70}, "matrix": []}):
        change(with_engines, lambda m, r=receipt: m["engines"][0].update(receipt=r))
        code, out, _ = text(capsys, "inspect", with_engines)
        assert code == 0 and "no layers counted" in out
    receipt = {"layers": {"fp32": 1, "fp16": 3}, "matrix": {"fp16": 2}, "source": "engine"}
    change(with_engines, lambda m: m["engines"][0].update(receipt=receipt))
    _, out, _ = text(capsys, "inspect", with_engines)
    assert (
        "4 layers: 75% fp16, 25% fp32; 2 convolutions and matrix products: 100% fp16 (by the "
        in " ".join(out.split())
    )


def test_a_terminal_without_unicode_and_a_reader_that_leaves(bundle):
    change(bundle, lambda m: m["model"].update(name="städte"))
    change(bundle, lambda m: m["recipe"].update(command="größe"))
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = process("inspect", bundle, env=env)
    assert done.returncode == 0 and "gr\\xf6\\xdfe" in done.stdout

    command = [sys.executable, "-m", "runtime", "inspect", str(bundle)]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""
