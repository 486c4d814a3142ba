"""ONNX Runtime as an engine: what is no ONNX, wrong calls, devices, a missing ONNX Runtime."""

import subprocess
import sys

import numpy as np
import pytest
from cases import case
from onnx_files import field, in_initializer, in_subgraph, info, model_of, write

import runtime.engines.onnx
from runtime import OnnxEngine, load_engine
from runtime.engines.onnx_file import MAX_BYTES, external_locations
from runtime.errors import BundleError, InputError, MissingBackend

onnx = pytest.importorskip("onnx", reason="the networks are made with onnx: pip install onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
from onnx import TensorProto, helper  # noqa: E402 (after importorskip)


def double():
    """y = x + x."""
    return model_of([helper.make_node("Add", ["x", "x"], ["y"])], [info("x", ("n", 2))])


# Files that are no network


NO_NETWORKS = [
    b"not a network",
    b"\n",
    b"\x80\x04\x95pickle",
    b"PK\3\4" + b"\0" * 99,
    b"\x7fELF" + b"\1" * 50,
    b"\0" * 1000,
    b"\xff" * 1000,
]


def test_other_files_are_refused(tmp_path):
    for content in NO_NETWORKS:
        with case(content[:9]):
            with pytest.raises(
                BundleError, match=r"m.onnx (is no ONNX file|cannot be loaded): .*\n  fix"
            ):
                load_engine(write(tmp_path, content))


def test_what_was_saved_in_place_of_the_model_is_named(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 99\n"
    for content, what, fix in [
        (pointer, "a Git LFS pointer", "git lfs pull"),
        (b"\n<!DOCTYPE HTML><html>", "a web page", "/resolve/"),
        (b"<html>404</html>", "a web page", "/resolve/"),
    ]:
        with case(what):
            for source in (write(tmp_path, content), content):
                with pytest.raises(BundleError, match=rf"is {what}, not the .*\n  fix: .*{fix}"):
                    OnnxEngine(source, name="m.onnx")
            model = write(tmp_path, in_initializer("m.data"))
            (tmp_path / "m.data").write_bytes(content)
            with pytest.raises(BundleError, match=rf"m.onnx needs .*'m.data', which is {what}"):
                load_engine(model)


def test_empty_file_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"m.onnx has 0 bytes; an ONNX file has 1 to 2147483647"):
        load_engine(write(tmp_path, b""))


def test_file_too_large_for_protobuf_is_refused_unread(tmp_path, not_opened):
    path = tmp_path / "m.onnx"
    with open(path, "wb") as file:
        file.truncate(MAX_BYTES)  # sparse: takes no room
    with pytest.raises(BundleError, match=f"m.onnx has {MAX_BYTES} bytes"):
        load_engine(path)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no.onnx does not exist\n  fix: check the path"):
        load_engine(tmp_path / "no.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(InputError, match=r"folder.onnx is a folder, wanted an .onnx file"):
        load_engine(tmp_path / "folder.onnx")


def test_other_suffixes_are_refused(tmp_path):
    for name in ["m.pt", "m", "m.onnx.zip", "m.engine", ".onnx", ""]:
        with case(name):
            with pytest.raises(InputError, match=r"has suffix '.*'; wanted an .onnx file"):
                load_engine(tmp_path / name if name else "")


def test_impossible_names_are_refused():
    for name, reason in [("x" * 5000 + ".onnx", "name too long"), ("a\0b.onnx", "null byte")]:
        with case(name[:9]):
            with pytest.raises(InputError, match=f"cannot be read: .*{reason}"):
                load_engine(name)


FUZZ = """
import random, sys
from pathlib import Path
from runtime import load_engine
from runtime.errors import BundleError, InputError

folder, seed = Path(sys.argv[1]), int(sys.argv[2])
rng, counts = random.Random(seed), {"refused": 0, "loaded": 0}
originals = [p.read_bytes() for p in sorted(folder.glob("*.onnx"))]
path = folder / "fuzzed.onnx"

def cases():
    for data in originals:
        for end in range(0, len(data), 1 + len(data) // 150):
            yield data[:end]
        for _ in range(150):
            changed = bytearray(data)
            for _ in range(rng.choice((1, 1, 2, 8))):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            yield bytes(changed)
        for _ in range(50):  # a piece cut out or doubled
            a, b = sorted(rng.randrange(len(data)) for _ in range(2))
            yield data[:a] + data[b:]
            yield data[:b] + data[a:]
    for _ in range(300):
        yield rng.randbytes(rng.randrange(1, 300))

for data in cases():
    path.unlink(missing_ok=True)  # writing over a file waits for the disk on some systems
    path.write_bytes(data)  # stays behind if this one crashes
    try:
        load_engine(path, threads=1).close()
        counts["loaded"] += 1
    except (BundleError, InputError) as error:
        assert str(error).startswith(str(path)), error
        counts["refused"] += 1
(folder / "counts").write_text(f"{counts['refused']} {counts['loaded']}")
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_files_give_one_clean_error(folder, seed):
    """In a process of its own: a crash or a hang must fail this test, not end the run."""
    for make in (double, lambda: in_initializer("beside.bin"), lambda: in_subgraph("beside.bin")):
        write(folder, make(), f"{len(list(folder.glob('*.onnx')))}.onnx")
    command = [sys.executable, "-c", FUZZ, str(folder), str(seed)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    last = (folder / "fuzzed.onnx").read_bytes()[:1000]
    assert run.returncode == 0, f"{run.stderr[-1500:]}\nafter {last!r}"
    refused, loaded = map(int, (folder / "counts").read_text().split())
    assert refused > 700 and loaded < refused  # some changes hurt nobody
    assert run.stdout == ""


def test_names_that_are_no_text(tmp_path, capfd):
    for text in [b"Add", b"\x12\1n"]:
        with case(text):
            data = double().SerializeToString()
            assert data.count(text) == 1
            with pytest.raises(BundleError, match=r"m.onnx cannot be loaded: .*\n  fix: "):
                load_engine(write(tmp_path, data.replace(text, text[:-1] + b"\x99")))
            assert capfd.readouterr() == ("", "")  # ONNX Runtime's own fallback would print


def test_deep_nesting_is_no_recursion_and_takes_no_time(tmp_path):
    body = b""
    for _ in range(5000):  # graph > node > attribute > graph > ...
        body = field(1, field(5, field(6, body)))
    assert list(external_locations(field(7, body))) == []
    with pytest.raises(BundleError, match=r"m.onnx (is no ONNX file|cannot be loaded)"):
        load_engine(write(tmp_path, field(7, body)))


# Running


def test_ports_metadata_and_answer(tmp_path):
    model = double()
    helper.set_model_props(model, {"classes": '["a"]'})
    engine = load_engine(str(write(tmp_path, model, "UPPER.ONNX")), threads=2)
    assert isinstance(engine, OnnxEngine) and engine.metadata == {"classes": '["a"]'}
    (port,) = engine.inputs
    assert port == ("x", ("n", 2), "tensor(float)")
    assert [p.name for p in engine.outputs] == ["y"]
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert np.array_equal(engine(x)[0], 2 * x)
    assert np.array_equal(engine(x[::-1].T.astype(np.float64).T)[0], 2 * x[::-1])  # cast


def test_arrays_are_cast_to_the_input_s_type(tmp_path):
    for kind in [TensorProto.FLOAT16, TensorProto.UINT8]:
        with case(kind):
            add = helper.make_node("Identity", ["x"], ["y"])
            graph = helper.make_graph([add], "g", [info("x", (2,), kind)], [info("y", (2,), kind)])
            model = helper.make_model(
                graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
            )
            (y,) = load_engine(write(tmp_path, model))(np.array([1.0, 2.0]))
            assert y.dtype == helper.tensor_dtype_to_np_dtype(kind) and y.tolist() == [1, 2]


def test_wrong_number_of_arrays(tmp_path):
    engine = load_engine(write(tmp_path, double()))
    x = np.zeros((1, 2), np.float32)
    for arrays in ((), (x, x)):
        with pytest.raises(
            InputError, match=rf"m.onnx got {len(arrays)} arrays; wanted x \('n', 2"
        ):
            engine(*arrays)


def test_wrong_shapes(tmp_path):
    for shape in [(2,), (1, 3), (1, 2, 2), ()]:
        with case(shape):
            engine = load_engine(write(tmp_path, double()))
            with pytest.raises(InputError, match=r"m.onnx fails on \(.*\): .*"):
                engine(np.zeros(shape, np.float32))
            assert np.array_equal(engine(np.ones((1, 2)))[0], [[2, 2]])  # and it goes on


def test_a_dimension_of_0_is_mended_by_an_export(tmp_path):
    """Some programs write 0 for a free dimension, and ONNX Runtime takes no other number then."""
    model = double()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 0
    with pytest.raises(
        InputError, match=r"fix: .* of 0; python -m export --model m\.onnx mends it"
    ):
        load_engine(write(tmp_path, model))(np.zeros((1, 2), np.float32))


def test_lists_work_as_arrays_do(tmp_path):
    assert load_engine(write(tmp_path, double()))([[1, 2]])[0].tolist() == [[2, 4]]


def test_context_manager_closes(tmp_path):
    with load_engine(write(tmp_path, double())) as engine:
        assert engine(np.ones((1, 2)))[0].tolist() == [[2, 2]]
    with pytest.raises(InputError, match=r"m.onnx"):
        engine(np.ones((1, 2)))
    engine.close()  # twice does no harm
    with pytest.raises(LookupError), load_engine(tmp_path / "m.onnx") as engine:
        raise LookupError
    with pytest.raises(InputError):  # closed by the error too
        engine(np.ones((1, 2)))


def test_missing_onnx_runtime_is_named_with_the_fix(tmp_path, monkeypatch):
    path = write(tmp_path, double())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = r"ONNX Runtime is needed to run m.onnx, but .*\n  fix: pip install onnxruntime"
    with pytest.raises(MissingBackend, match=message):
        load_engine(path)
    with pytest.raises(BundleError, match="has 0 bytes"):  # a bad file is told first
        load_engine(write(tmp_path, b"", "empty.onnx"))


def test_nothing_is_printed_by_onnx_runtime(folder, capfd):
    for content in (b"abc" * 99, in_initializer("beside.bin"), double()):
        try:
            engine = load_engine(write(folder, content))
            engine(np.zeros((7, 7, 7), np.float32))
        except (BundleError, InputError):
            pass
    assert capfd.readouterr() == ("", "")


def test_name_is_kept(tmp_path):
    path = write(tmp_path, double())
    assert load_engine(path).name == "m.onnx"


# Devices


def test_cuda_is_refused_with_the_reason_and_nothing_else_is_tried(tmp_path, monkeypatch):
    path = write(tmp_path, double())
    monkeypatch.setattr(runtime.engines.onnx, "cuda_absence", lambda: "no CUDA driver: gone")
    with pytest.raises(
        MissingBackend, match=r"device 'cuda' cannot run m.onnx: .*\n  fix: use dev"
    ):
        load_engine(path, device="cuda")
    with pytest.raises(InputError, match="device is 'tpu'; wanted 'cpu', 'cuda'"):
        load_engine(path, device="tpu")


def test_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    path = write(tmp_path, double())
    monkeypatch.setattr(runtime.engines.onnx, "cuda_absence", lambda: "")
    monkeypatch.setattr(runtime.engines.onnx, "cuda_devices", lambda: ["one"])
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(InputError, match="device is 'cuda:7'; this machine has 1 GPUs"):
        load_engine(path, device="cuda:7")


def test_a_provider_that_falls_back_is_an_error(tmp_path, monkeypatch):
    """ONNX Runtime without a GPU takes its CPU provider and says nothing."""
    path = write(tmp_path, double())
    monkeypatch.setattr(runtime.engines.onnx, "cuda_absence", lambda: "")
    monkeypatch.setattr(runtime.engines.onnx, "cuda_devices", lambda: ["one"])
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(
        (MissingBackend, BundleError), match=r"ONNX Runtime took CPU|cannot be loade"
    ):
        load_engine(path, device="cuda")


def test_bytes_are_loaded_like_files_but_hold_all_their_weights(tmp_path):
    data = double().SerializeToString()
    with OnnxEngine(data, name="from memory") as engine:
        assert engine.name == "from memory" and engine.backend == "onnxruntime-cpu"
    with pytest.raises(BundleError, match="from memory has 0 bytes"):
        OnnxEngine(b"", name="from memory")
    outside = in_initializer("beside.bin")
    with pytest.raises(BundleError, match=r"keeps weights in 'beside.bin', outside of itself"):
        OnnxEngine(outside.SerializeToString())


def test_threads_do_not_spin_unless_asked():
    """They would take the processors from the refinement that follows."""
    for spin in [False, True]:
        with case(spin):
            from bundles import nearest_colour

            engine = OnnxEngine(nearest_colour(), spin=spin)
            options = engine._session.get_session_options()
            assert options.get_session_config_entry("session.intra_op.allow_spinning") == str(
                int(spin)
            )
