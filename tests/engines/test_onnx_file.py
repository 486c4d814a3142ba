"""Weights that an ONNX file keeps in other files: beside it they are read, elsewhere refused.

Some files are written byte by byte, as no writer of ONNX would write them.
"""

import numpy as np
import pytest
from cases import case
from onnx_files import (
    BESIDE,
    SECRET,
    branch,
    external,
    field,
    in_initializer,
    in_subgraph,
    info,
    key,
    model_of,
    varint,
    write,
)

from runtime import load_engine
from runtime.engines.onnx_file import external_locations
from runtime.errors import BundleError

onnx = pytest.importorskip("onnx", reason="the networks are made with onnx: pip install onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
from onnx import helper, numpy_helper  # noqa: E402 (after importorskip)


def in_constant(location):
    return model_of([helper.make_node("Constant", [], ["y"], value=external(location))])


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


def test_weights_outside_the_folder_are_refused(folder, not_opened):
    for place in PLACES:
        for location in [
            "../secret.bin",
            "data/../../secret.bin",
            "link.bin",
            "up/secret.bin",
            "ABSOLUTE",
        ]:
            with case(place.__name__, location):
                if location == "ABSOLUTE":
                    location = str(folder.parent / "secret.bin")
                path = write(folder, place(location))
                assert location in set(external_locations(path.read_bytes()))
                fix = "replace the link" if location in ("link.bin", "up/secret.bin") else "save"
                message = (
                    r"m.onnx keeps weights in .*, outside its own folder; not loaded\n  fix: .*"
                )
                with pytest.raises(BundleError, match=message + fix):
                    load_engine(path)


def test_missing_weights_are_named(folder, not_opened):
    for place in PLACES:
        with case(place.__name__):
            with pytest.raises(
                BundleError, match=r"m.onnx needs its weights file 'gone.bin', which is mi"
            ):
                load_engine(write(folder, place("gone.bin")))


def test_a_detour_into_the_folder_is_refused_too(folder, not_opened):
    """It would break when the folder is renamed."""
    for location in ["ABSOLUTE", "../model/beside.bin", "data/../beside.bin"]:
        with case(location):
            location = str(folder / "beside.bin") if location == "ABSOLUTE" else location
            with pytest.raises(BundleError, match="outside its own folder"):
                load_engine(write(folder, in_initializer(location)))


def test_locations_that_are_no_file(folder, not_opened):
    for location in ["", ".", "data", "loop.bin", "x" * 300, "a\0b", "a\\..\\b"]:
        with case(location):
            with pytest.raises(
                BundleError, match=r"m\.onnx (needs its weights file|keeps weights in|is no)"
            ):
                load_engine(write(folder, by_hand(KEY + field(2, location.encode()))))


def test_location_that_is_no_text(folder, not_opened):
    with pytest.raises(BundleError, match=r"m.onnx is no ONNX file: .*utf-8"):
        load_engine(write(folder, by_hand(KEY + field(2, b"\xff\xfe"))))


BY_HAND = [
    KEY + BAD,
    BAD + KEY,  # the value before its key
    field(1, b"offset") + BAD + KEY,  # the last key counts
    KEY + GOOD + BAD,  # the last value counts
    field(3, b"junk") + KEY + key(4, 0) + varint(5) + BAD,  # unknown fields between
    key(5, 1) + b"\0" * 8 + KEY + key(6, 5) + b"\0" * 4 + BAD,
    field(1, b"location", padded(1)) + field(2, b"../secret.bin", padded(2)),
]


def test_entries_written_by_hand_are_understood(folder, not_opened):
    for entry in BY_HAND:
        with case(entry):
            path = write(folder, by_hand(entry))
            assert list(external_locations(path.read_bytes())) == ["../secret.bin"]
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


def test_a_field_number_above_32_bits_hides_nothing(folder, not_opened):
    for where in ["tensor", "key", "value"]:
        with case(where):
            if where == "tensor":
                data = by_hand(KEY + BAD, tensor_tag=overflowing(13))
            elif where == "key":
                data = by_hand(field(1, b"location", overflowing(1)) + BAD)
            else:
                data = by_hand(KEY + GOOD + field(2, b"../secret.bin", overflowing(2)))
            with pytest.raises(BundleError, match=r"m.onnx (keeps weights in|is no ONNX file)"):
                load_engine(write(folder, data))


BROKEN = [
    (b"\x80" * 11, "a number of more than 64 bits"),
    (key(7) + varint(100) + b"short", "a field reaches past the end of the file"),
    (key(7, 3), "wire type 3"),
    (key(7, 6), "wire type 6"),
    (b"\x3a", "index out of"),
]


def test_broken_protobuf_is_named(tmp_path, not_opened):
    for data, match in BROKEN:
        with case(match):
            with pytest.raises(BundleError, match=f"m.onnx is no ONNX file: .*{match}"):
                load_engine(write(tmp_path, data))
