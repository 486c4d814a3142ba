"""Damaged picture files: the header is read or refused within small time and memory, and decoding
never crashes."""

import cv2
import numpy as np
import pytest
from encoded_pictures import HEIGHT, WIDTH, encoded
from fuzzing import DAMAGES, damaged, inputs, limits, refusal
from hypothesis import given
from hypothesis import strategies as st
from picture_worker import Worker

from runtime.errors import InputError
from runtime.pictures.header import read_header
from runtime.pictures.limits import MAX_PIXELS

FILES = encoded()
NAMES = sorted(FILES)
SECONDS, BYTES = 0.2, 2**24  # for one header


def parts(first, second, cut):
    """The beginning of one file and the end of another."""
    at = cut % (len(first) + 1)
    return first[:at] + second[at:]


def test_valid_files_state_their_size():
    assert len(NAMES) > 30
    for name, data in FILES.items():
        header = read_header(data, name)
        stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        sizes = {(header.height, header.width), (header.width, header.height)}
        assert stored is None or stored.shape[:2] in sizes, name
        assert name.startswith(("text", "less")) or (header.height, header.width) == (HEIGHT, WIDTH)


@inputs(700)
@given(
    name=st.sampled_from(NAMES),
    other=st.sampled_from(NAMES),
    cut=st.integers(0, 2**16),
    damages=DAMAGES,
    how=st.integers(0, 9),
)
def test_any_header_is_read_or_refused(name, other, cut, damages, how):
    data = parts(FILES[name], FILES[other], cut) if how == 0 else FILES[name]
    data = damaged(data, damages) if how < 9 else data[: cut % len(data)]
    with limits(SECONDS, BYTES):
        header = refusal(lambda: read_header(data, "x"), InputError)
    if header is not None:
        assert 1 <= header.height * header.width <= MAX_PIXELS
        assert 1 <= header.bits <= 16 and 1 <= header.channels and 1 <= header.orientation <= 8


@inputs(150)
@given(start=st.sampled_from(NAMES), bytes_=st.binary(max_size=300), keep=st.integers(0, 64))
def test_any_bytes_after_a_signature(start, bytes_, keep):
    data = FILES[start][:keep] + bytes_
    with limits(SECONDS, BYTES):
        refusal(lambda: read_header(data, "x"), InputError)


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.close()


@inputs(200)
@given(name=st.sampled_from(NAMES), damages=DAMAGES, cut=st.integers(0, 2**16))
def test_decoding_never_crashes(worker, name, damages, cut):
    """In a process of its own: a picture of the header's size, or an InputError."""
    data = damaged(FILES[name], damages) if cut % 8 else FILES[name][: cut % len(FILES[name])]
    found = worker.load(data)
    assert "shape" in found or "refused" in found, found
    if "shape" in found:
        height, width = found["header"]
        assert found["shape"] in ([height, width, 3], [width, height, 3])
