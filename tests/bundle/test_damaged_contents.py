"""Files that fit their hash and hold something else: tensors, graphs, golden vectors."""

import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import case
from hostile_bundles import at, attempt, damage, everything, put, run_golden

from runtime.bundle.read import Bundle
from runtime.errors import BundleError, MissingBackend
from runtime.tensors import load_tensors

onnx = pytest.importorskip("onnx", reason="the graphs are made with onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")
pytest.importorskip("safetensors", reason="needs safetensors: pip install safetensors")
from bundles import tensors  # noqa: E402 (after importorskip)

SUPPORT = Path(__file__).resolve().parents[1] / "support"


def test_120_damaged_files_with_fitting_hashes(pristine, place):
    for where in ["init", "golden.0", "engines.0", "licence"]:
        with case(where):
            manifest, files = pristine["network"]
            for seed in range(120):
                data = damage(random.Random(seed), files[at(manifest, where)["file"]])
                put(place, pristine, where, data)
                result = attempt(place, f"{where} seed {seed}", everything)
                if result is not None:
                    assert result[1][at(manifest, where)["file"]] == data, seed


def header(text, payload=b"", size=None):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + payload


def tensor(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = [
    b"x",
    header({}, size=2**63),
    header({}, size=2**64 - 1),
    header({}, size=100_000_001),
    header(b"not json"),
    header(b'{"a":' * 10_000),
    header({"a": tensor()}),  # no data
    header({"a": tensor(shape=(2**62,))}, bytes(4)),
    header({"a": tensor(shape=(2**32, 2**32))}, bytes(4)),
    header({"a": tensor(shape=(-1,))}, bytes(4)),
    header({"a": tensor(offsets=(4, 0))}, bytes(4)),
    header({"a": tensor(offsets=(0, 2**63))}, bytes(4)),
    header({"a": tensor(), "b": tensor()}, bytes(4)),  # overlapping
    header({"a": tensor(), "b": tensor(offsets=(2, 6))}, bytes(6)),
    header({"a": tensor(offsets=(4, 8))}, bytes(8)),  # a hole
    header({"a": tensor("F64")}, bytes(4)),
    header({"a": tensor("F99")}, bytes(4)),
    header({"a": tensor(5)}, bytes(4)),
    header({"a": tensor()}, bytes(5)),
    header({"a": 5}),
    header([]),
    header({"a": tensor("BF16", (2,))}, bytes(4)),
    header({"a": tensor("F8_E4M3", (4,))}, bytes(4)),
    header({"a": tensor("F8_E5M2", (4,))}, bytes(4)),
    header({"a": tensor("F8_E8M0", (4,))}, bytes(4)),
    header({"a": tensor("F4", (8,))}, bytes(4)),
    header({"a": tensor("C64", (1,), (0, 8))}, bytes(8)),
    header({"a": tensor("F32", (0, 2**62), (0, 0))}),
    header({"a": tensor("F32", (1,) * 100)}, bytes(4)),
    header({"__metadata__": 5}),
    header({"": tensor()}, bytes(4)),
    header({f"t{i}": tensor(shape=(0,), offsets=(0, 0)) for i in range(5000)}),
    header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
           b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
]  # fmt: skip


def test_hostile_safetensors(pristine, place):
    for data in HOSTILE:
        for where in ["init", "golden.0"]:
            with case(where, data[:80]):
                put(place, pristine, where, data)
                result = attempt(place, f"{where} {data[:80]!r}", everything)
                assert result is None or where == "init"
                try:
                    arrays = load_tensors(data, "x.safetensors")
                except BundleError as error:
                    assert str(error).startswith("x.safetensors is no safetensors file: ")
                else:
                    assert all(type(a) is np.ndarray and a.flags.owndata for a in arrays.values())


def test_tensors_without_safetensors(monkeypatch):
    for name in ["safetensors", "safetensors.numpy"]:
        with case(name), monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(
                MissingBackend, match=r"(?s)needed to read x, but .*pip install safetensors"
            ):
                load_tensors(b"", "x")


def test_weights_outside_of_a_graph(pristine, place):
    for location in [
        "../outside/secret.bin",
        "/etc/passwd",
        "weight.bin",
        "..\\outside\\secret.bin",
        "",
        "x\0y",
    ]:
        for graph in ["prior", "refine_step"]:
            with case(graph, location):
                model = onnx.load_from_string(pristine["network"][1][f"{graph}.onnx"])
                first = model.graph.initializer[0]
                first.ClearField("raw_data")
                first.data_location = onnx.TensorProto.EXTERNAL
                first.external_data.add(key="location", value=location)
                put(place, pristine, f"graphs.{graph}", model.SerializeToString())
                (place / "weight.bin").write_bytes(bytes(1000))  # even where it is there
                assert attempt(place, location) is None
                with pytest.raises(
                    BundleError, match=rf"(?s)x.bundle/{graph}.onnx keeps weights in .*not load"
                ):
                    Bundle.open(place).graph(graph)


def test_500_damaged_graphs_with_fitting_hashes(tmp_path):
    """In one process of their own, so that a crash inside ONNX Runtime is seen and named."""
    command = f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); from pathlib import Path; "
    command += "from hostile_bundles import graph_cases; graph_cases(Path(sys.argv[1]), 500)"
    done = subprocess.run(
        [sys.executable, "-c", command, tmp_path],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34)),
    )
    lines = done.stdout.splitlines()
    last = next((line for line in reversed(lines) if line.startswith("case")), "before any case")
    assert done.returncode == 0, f"{last}: code {done.returncode}\n{done.stderr[-3000:]}"
    assert lines.count("refused") + lines.count("loads") == 500
    assert lines.count("refused") > 100 and lines.count("loads") > 5


def test_the_golden_of_a_bundle_that_was_tampered_with_is_refused(pristine, place):
    arrays = load_tensors(pristine["network"][1]["golden/000.safetensors"], "golden")
    put(place, pristine, "golden.0", tensors(arrays | {"labels": arrays["labels"][::-1]}))
    assert attempt(place, "golden", run_golden) is None
