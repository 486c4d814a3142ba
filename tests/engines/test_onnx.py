"""runtime/engine.py: what is no ONNX, weights kept elsewhere, wrong calls, a missing ONNX Runtime.

Some files are written byte by byte, as an attacker would: protobuf allows more than onnx.helper
makes.
"""

import subprocess
import sys

import numpy as np
import pytest

import runtime.engine
from runtime import OnnxEngine, load_engine
from runtime.engine import MAX_BYTES, _external_locations
from runtime.errors import BundleError, InputError, MissingBackend

onnx = pytest.importorskip("onnx", reason="the networks are made with onnx: pip install onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402 (after importorskip)

FLOAT = TensorProto.FLOAT
SECRET = np.array([7, 8], np.float32)
BESIDE = np.array([3, 4], np.float32)


def info(name, shape=(2,), kind=FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def model_of(nodes, inputs=(), outputs=("y",), initializers=(), functions=(), domains=()):
    graph = helper.make_graph(
        list(nodes), "g", list(inputs), [info(o) for o in outputs], list(initializers)
    )
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=8)


def double():
    """y = x + x."""
    return model_of([helper.make_node("Add", ["x", "x"], ["y"])], [info("x", ("n", 2))])


def external(location, name="w"):
    """A float tensor of two values that lie in another file."""
    tensor = TensorProto(name=name, data_type=FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def in_initializer(location):
    identity = helper.make_node("Identity", ["w"], ["y"])
    return model_of([identity], initializers=[external(location)])


def in_constant(location):
    return model_of([helper.make_node("Constant", [], ["y"], value=external(location))])


def branch(location):
    identity = helper.make_node("Identity", ["w"], ["z"])
    return helper.make_graph([identity], "then", [], [info("z")], [external(location)])


def in_subgraph(location):
    condition = numpy_helper.from_array(np.array(True), "condition")
    both = {"then_branch": branch(location), "else_branch": branch(location)}
    return model_of(
        [helper.make_node("If", ["condition"], ["y"], **both)], initializers=[condition]
    )


def in_nested_subgraph(location):
    inner = in_subgraph(location).graph
    inner.output[0].name = inner.node[0].output[0] = "inner"
    condition = numpy_helper.from_array(np.array(True), "outer")
    both = {"then_branch": inner, "else_branch": inner}
    return model_of([helper.make_node("If", ["outer"], ["y"], **both)], initializers=[condition])


def function(location, **attributes):
    nodes = [helper.make_node("Constant", [], ["out"], value=external(location))]
    return helper.make_function(
        "own", "F", [], ["out"], nodes, [helper.make_opsetid("", 17)], **attributes
    )


def in_function(location):
    call = helper.make_node("F", [], ["y"], domain="own")
    return model_of([call], functions=[function(location)], domains=["own"])


def in_function_default(location):
    default = helper.make_attribute("value", external(location))
    own = function("beside.bin", attribute_protos=[default])
    call = helper.make_node("F", [], ["y"], domain="own")
    return model_of([call], functions=[own], domains=["own"])


def in_tensor_list(location):
    node = helper.make_node("Identity", ["w"], ["y"])
    node.attribute.append(helper.make_attribute("many", [external(location), external(location)]))
    return model_of([node], initializers=[external("beside.bin")])


def in_graph_list(location):
    node = helper.make_node("Identity", ["w"], ["y"])
    node.attribute.append(helper.make_attribute("many", [branch(location)]))
    return model_of([node], initializers=[external("beside.bin")])


def in_sparse(location):
    model = in_initializer("beside.bin")
    indices = numpy_helper.from_array(np.array([0, 1]), "i")
    model.graph.sparse_initializer.add(values=external(location), indices=indices, dims=[2])
    return model


def in_sparse_indices(location):
    model = in_initializer("beside.bin")
    values = numpy_helper.from_array(SECRET, "v")
    model.graph.sparse_initializer.add(values=values, indices=external(location), dims=[2])
    return model


def in_sparse_attribute(location):
    sparse = onnx.SparseTensorProto(values=external(location), dims=[2])
    node = helper.make_node("Constant", [], ["y"])
    node.attribute.append(helper.make_attribute("sparse_value", sparse))
    return model_of([node])


PLACES = [
    in_initializer, in_constant, in_subgraph, in_nested_subgraph, in_function,
    in_function_default, in_tensor_list, in_graph_list, in_sparse, in_sparse_indices,
    in_sparse_attribute,
]  # fmt: skip


# Protobuf by hand


def varint(n):
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def key(number, wire=2):
    return varint(number << 3 | wire)


def field(number, body, tag=None):
    return (tag or key(number)) + varint(len(body)) + body


def overflowing(number):
    """The key of ``number`` with bits above the 32nd, which protobuf's C++ parser drops."""
    low = number << 3 | 2
    return bytes([low & 127 | 128, low >> 7 & 127 | 128, 128, 128, 0x10])


def padded(number):
    """The key of ``number`` in more bytes than it needs, which every parser accepts."""
    low = number << 3 | 2
    return bytes([low & 127 | 128, low >> 7 & 127 | 128, 128, 128, 0])


def by_hand(entry, *, tensor_tag=None):
    """in_initializer with ``entry`` for its external data."""
    number = lambda n, value: key(n, 0) + varint(value)  # noqa: E731
    tensor = number(1, 2) + number(2, 1) + field(8, b"w") + field(13, entry, tensor_tag)
    tensor += number(14, 1)
    node = helper.make_node("Identity", ["w"], ["y"]).SerializeToString()
    graph = field(1, node) + field(2, b"g") + field(5, tensor)
    graph += field(12, info("y").SerializeToString())
    opset = helper.make_opsetid("", 17).SerializeToString()
    return number(1, 8) + field(7, graph) + field(8, opset)


KEY, BAD, GOOD = field(1, b"location"), field(2, b"../secret.bin"), field(2, b"beside.bin")


@pytest.fixture
def folder(tmp_path):
    """A folder with weights beside the model, weights above it, and a link to those."""
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "beside.bin").write_bytes(BESIDE.tobytes())
    (tmp_path / "secret.bin").write_bytes(SECRET.tobytes())
    (inside / "link.bin").symlink_to("../secret.bin")
    (inside / "fine.bin").symlink_to("beside.bin")
    (inside / "loop.bin").symlink_to("loop.bin")
    (inside / "up").symlink_to("..")
    (inside / "data").mkdir()
    (inside / "data" / "deep.bin").write_bytes(BESIDE.tobytes())
    return inside


def write(folder, content, name="m.onnx"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    return path


@pytest.fixture
def not_opened(monkeypatch):
    """ONNX Runtime must not see the file."""

    def opened(*_, **__):
        pytest.fail("ONNX Runtime was given the file")

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)


# Files that are no network


@pytest.mark.parametrize(
    "content",
    [
        b"not a network",
        b"\n",
        b"<html>404</html>" * 100,
        b"\x80\x04\x95pickle",
        b"PK\3\4" + b"\0" * 99,
        b"\x7fELF" + b"\1" * 50,
        b"\0" * 1000,
        b"\xff" * 1000,
    ],
)
def test_other_files_are_refused(tmp_path, content):
    with pytest.raises(BundleError, match=r"m.onnx (is no ONNX file|cannot be loaded): .*\n  fix"):
        load_engine(write(tmp_path, content))


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
    with pytest.raises(InputError, match=r"(?s)no.onnx does not exist or is no file.*fix: seen"):
        load_engine(tmp_path / "no.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(InputError, match=r"folder.onnx does not exist or is no file"):
        load_engine(tmp_path / "folder.onnx")


@pytest.mark.parametrize("name", ["m.pt", "m", "m.onnx.zip", "m.engine", ".onnx", ""])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"has suffix '.*'; wanted an .onnx file"):
        load_engine(tmp_path / name if name else "")


@pytest.mark.parametrize("name", ["x" * 5000 + ".onnx", "a\0b.onnx"])
def test_impossible_names_are_refused(name):
    with pytest.raises(InputError, match=r"does not exist or is no file"):
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
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    last = (folder / "fuzzed.onnx").read_bytes()[:1000]
    assert run.returncode == 0, f"{run.stderr[-1500:]}\nafter {last!r}"
    refused, loaded = map(int, (folder / "counts").read_text().split())
    assert refused > 700 and loaded < refused  # some changes hurt nobody
    assert run.stdout == ""


@pytest.mark.parametrize("text", [b"Add", b"\x12\1n"], ids=["operator", "dimension"])
def test_names_that_are_no_text(tmp_path, capfd, text):
    data = double().SerializeToString()
    assert data.count(text) == 1
    with pytest.raises(BundleError, match=r"m.onnx cannot be loaded: .*\n  fix: "):
        load_engine(write(tmp_path, data.replace(text, text[:-1] + b"\x99")))
    assert capfd.readouterr() == ("", "")  # ONNX Runtime's own fallback would print


def test_deep_nesting_is_no_recursion_and_takes_no_time(tmp_path):
    body = b""
    for _ in range(5000):  # graph > node > attribute > graph > ...
        body = field(1, field(5, field(6, body)))
    assert list(_external_locations(field(7, body))) == []
    with pytest.raises(BundleError, match=r"m.onnx (is no ONNX file|cannot be loaded)"):
        load_engine(write(tmp_path, field(7, body)))


# Weights in other files


def test_weights_beside_the_model_work(folder):
    for location in ("beside.bin", "./beside.bin", "data/deep.bin"):
        with load_engine(write(folder, in_initializer(location))) as engine:
            assert np.array_equal(engine()[0], BESIDE)


def test_weights_saved_by_onnx_work(tmp_path):
    model = model_of(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        [info("x")],
        initializers=[numpy_helper.from_array(BESIDE, "w")],
    )
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data",
                    size_threshold=0)  # fmt: skip
    assert (tmp_path / "m.data").exists()
    (y,) = load_engine(tmp_path / "m.onnx")(np.ones(2, np.float32))
    assert np.array_equal(y, BESIDE + 1)


def test_relative_model_path_finds_its_weights(folder, monkeypatch):
    write(folder, in_initializer("beside.bin"))
    monkeypatch.chdir(folder)
    assert np.array_equal(load_engine("m.onnx")()[0], BESIDE)
    monkeypatch.chdir(folder.parent)
    assert np.array_equal(load_engine("model/m.onnx")()[0], BESIDE)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "location", ["../secret.bin", "data/../../secret.bin", "link.bin", "up/secret.bin", "ABSOLUTE"]
)
def test_weights_outside_the_folder_are_refused(folder, not_opened, place, location):
    if location == "ABSOLUTE":
        location = str(folder.parent / "secret.bin")
    path = write(folder, place(location))
    assert location in set(_external_locations(path.read_bytes()))
    message = r"m.onnx keeps weights in .*, outside its own folder; not loaded\n  fix: save"
    with pytest.raises(BundleError, match=message):
        load_engine(path)


@pytest.mark.parametrize("place", PLACES)
def test_missing_weights_are_named(folder, not_opened, place):
    with pytest.raises(BundleError, match=r"m.onnx needs its weights file 'gone.bin', which is mi"):
        load_engine(write(folder, place("gone.bin")))


@pytest.mark.parametrize("location", ["ABSOLUTE", "../model/beside.bin", "data/../beside.bin"])
def test_a_detour_into_the_folder_is_refused_too(folder, not_opened, location):
    """It would break when the folder is renamed."""
    location = str(folder / "beside.bin") if location == "ABSOLUTE" else location
    with pytest.raises(BundleError, match="outside its own folder"):
        load_engine(write(folder, in_initializer(location)))


@pytest.mark.parametrize("location", ["", ".", "data", "loop.bin", "x" * 300, "a\0b", "a\\..\\b"])
def test_locations_that_are_no_file(folder, not_opened, location):
    with pytest.raises(
        BundleError, match=r"m\.onnx (needs its weights file|keeps weights in|is no)"
    ):
        load_engine(write(folder, by_hand(KEY + field(2, location.encode()))))


def test_location_that_is_no_text(folder, not_opened):
    with pytest.raises(BundleError, match=r"m.onnx is no ONNX file: .*utf-8"):
        load_engine(write(folder, by_hand(KEY + field(2, b"\xff\xfe"))))


@pytest.mark.parametrize(
    "entry",
    [
        KEY + BAD,
        BAD + KEY,  # the value before its key
        field(1, b"offset") + BAD + KEY,  # the last key counts
        KEY + GOOD + BAD,  # the last value counts
        field(3, b"junk") + KEY + key(4, 0) + varint(5) + BAD,  # unknown fields between
        key(5, 1) + b"\0" * 8 + KEY + key(6, 5) + b"\0" * 4 + BAD,
        field(1, b"location", padded(1)) + field(2, b"../secret.bin", padded(2)),
    ],
)
def test_entries_written_by_hand_are_understood(folder, not_opened, entry):
    path = write(folder, by_hand(entry))
    assert list(_external_locations(path.read_bytes())) == ["../secret.bin"]
    with pytest.raises(BundleError, match="outside its own folder"):
        load_engine(path)


def test_by_hand_is_what_onnx_reads(folder):
    """The files above are real: with a good location they load."""
    for entry in (KEY + GOOD, GOOD + KEY, KEY + BAD + GOOD):
        assert np.array_equal(load_engine(write(folder, by_hand(entry)))()[0], BESIDE)
    with load_engine(write(folder, by_hand(KEY + GOOD, tensor_tag=padded(13)))) as engine:
        assert np.array_equal(engine()[0], BESIDE)


def test_second_entry_and_second_tensor_are_seen(folder, not_opened):
    twice = by_hand(KEY + GOOD) + field(7, field(5, field(13, KEY + BAD)))  # graphs are merged
    with pytest.raises(BundleError, match="outside its own folder"):
        load_engine(write(folder, twice))


@pytest.mark.parametrize("where", ["tensor", "key", "value"])
def test_a_field_number_above_32_bits_hides_nothing(folder, not_opened, where):
    if where == "tensor":
        data = by_hand(KEY + BAD, tensor_tag=overflowing(13))
    elif where == "key":
        data = by_hand(field(1, b"location", overflowing(1)) + BAD)
    else:
        data = by_hand(KEY + GOOD + field(2, b"../secret.bin", overflowing(2)))
    with pytest.raises(BundleError, match=r"m.onnx (keeps weights in|is no ONNX file)"):
        load_engine(write(folder, data))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\x80" * 11, "a number of more than 64 bits"),
        (key(7) + varint(100) + b"short", "a field reaches past the end of the file"),
        (key(7, 3), "wire type 3"),
        (key(7, 6), "wire type 6"),
        (b"\x3a", "index out of"),
    ],
)
def test_broken_protobuf_is_named(tmp_path, not_opened, data, match):
    with pytest.raises(BundleError, match=f"m.onnx is no ONNX file: .*{match}"):
        load_engine(write(tmp_path, data))


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


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.UINT8])
def test_arrays_are_cast_to_the_input_s_type(tmp_path, kind):
    add = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([add], "g", [info("x", (2,), kind)], [info("y", (2,), kind)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
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


@pytest.mark.parametrize("shape", [(2,), (1, 3), (1, 2, 2), ()])
def test_wrong_shapes(tmp_path, shape):
    engine = load_engine(write(tmp_path, double()))
    with pytest.raises(InputError, match=r"m.onnx fails on \(.*\): .*"):
        engine(np.zeros(shape, np.float32))
    assert np.array_equal(engine(np.ones((1, 2)))[0], [[2, 2]])  # and it goes on


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
    monkeypatch.setattr(runtime.engine, "cuda_absence", lambda: "no CUDA driver: gone")
    with pytest.raises(
        MissingBackend, match=r"device 'cuda' cannot run m.onnx: .*\n  fix: use dev"
    ):
        load_engine(path, device="cuda")
    with pytest.raises(InputError, match="device is 'tpu'; wanted 'cpu', 'cuda'"):
        load_engine(path, device="tpu")


def test_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    path = write(tmp_path, double())
    monkeypatch.setattr(runtime.engine, "cuda_absence", lambda: "")
    monkeypatch.setattr(runtime.engine, "cuda_devices", lambda: ["one"])
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(InputError, match="device is 'cuda:7'; this machine has 1 GPUs"):
        load_engine(path, device="cuda:7")


def test_a_provider_that_falls_back_is_an_error(tmp_path, monkeypatch):
    """ONNX Runtime without a GPU takes its CPU provider and says nothing."""
    path = write(tmp_path, double())
    monkeypatch.setattr(runtime.engine, "cuda_absence", lambda: "")
    monkeypatch.setattr(runtime.engine, "cuda_devices", lambda: ["one"])
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


@pytest.mark.parametrize("awake", [False, True])
def test_threads_do_not_spin_unless_asked(awake):
    """They would take the processors from the refinement that follows."""
    from bundles import nearest_colour

    engine = OnnxEngine(nearest_colour(), awake=awake)
    options = engine._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == str(int(awake))
