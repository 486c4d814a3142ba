"""Damaged ONNX files: refused or accepted quickly, and no place of weights in another file that
protobuf finds is overlooked."""

import pytest
from fuzzing import DAMAGES, damaged, inputs, limits, refusal
from hypothesis import given
from hypothesis import strategies as st

from runtime.engines.onnx_file import check_file, check_self_contained, external_locations
from runtime.errors import BundleError

onnx = pytest.importorskip("onnx", reason="the networks are made with onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")

from bundles import nearest_colour  # noqa: E402 (after importorskip)
from google.protobuf.message import DecodeError  # noqa: E402
from onnx_files import in_initializer, in_subgraph  # noqa: E402

SEEDS = [
    nearest_colour(),
    in_initializer("net.data").SerializeToString(),
    in_initializer("../secret.bin").SerializeToString(),
    in_subgraph("net.data").SerializeToString(),
]


def locations(message):
    """Every external data location in a message, by protobuf's own code."""
    found = []
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for one in value if isinstance(value, (list, tuple)) or hasattr(value, "add") else [value]:
            if field.name == "external_data" and one.key == "location":
                found.append(one.value)
            found += locations(one)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    (folder / "net.data").write_bytes(bytes(8))
    return folder


@inputs(300)
@given(seed=st.sampled_from(SEEDS), damages=DAMAGES, repeated=st.integers(0, 9))
def test_no_place_of_weights_is_overlooked(folder, seed, damages, repeated):
    data = damaged(seed, damages) * (1 + (repeated == 0))
    with limits(seconds=0.5):
        whole = refusal(lambda: check_self_contained(data, "x") or True, BundleError)
    path = folder / "net.onnx"
    path.write_bytes(data)
    with limits(seconds=0.5):
        found = refusal(lambda: check_file(path), BundleError)
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError:
        return
    seen = locations(model)
    assert not (whole and seen), seen
    if found is not None:
        assert {*seen} <= {*found[1]} <= {"net.data"}
        assert {*seen} <= {*external_locations(data)}
