"""runtime/pictures/bmp.py: BMP files with run lengths are read as Pillow reads them, or refused."""

import struct

import numpy as np
import pytest
from cases import case
from picture_files import encode, pillow_rgb, smooth
from PIL import Image

import runtime.pictures.bmp
from runtime.errors import InputError
from runtime.pictures.load import load_image

INDEX = smooth()[..., 2] >> 3  # (40, 64), 0 to 12
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 3)).astype(np.uint8)
END = b"\0\1"


def file_of(body, bits=8, height=40, colours=COLOURS):
    """Return the bytes of a BMP file of 64 pixels width; ``body`` are its run lengths."""
    head = struct.pack("<IiiHHIIiiII", 40, 64, height, 1, bits, 8 // bits, 0, 0, 0, len(colours), 0)
    palette = np.insert(colours[:, ::-1], 3, 0, axis=1).astype(np.uint8).tobytes()
    start = 14 + len(head) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + head + palette + body


def row_of(values, bits, single):
    """Return a row as runs of two pixels, or as pixels one by one."""
    if single:
        packed = bytes(values) if bits == 8 else bytes(values[::2] << 4 | values[1::2])
        return bytes((0, len(values))) + packed + bytes(len(packed) % 2) + b"\0\0"
    pairs = values.reshape(-1, 2).tolist()
    if bits == 8:
        return b"".join(bytes((1, a, 1, b)) for a, b in pairs) + b"\0\0"
    return b"".join(bytes((2, a << 4 | b)) for a, b in pairs) + b"\0\0"


def test_runs_and_single_pixels_of_8_and_4_bits():
    for bits in (8, 4):
        for single in (False, True):
            for end in (END, b""):
                with case(bits, single, end):
                    body = b"".join(row_of(row, bits, single) for row in INDEX[::-1])
                    picture, warnings = load_image(file_of(body + end, bits))
                    assert np.array_equal(picture, COLOURS[INDEX]) and warnings == []
                    assert picture.flags.c_contiguous and picture.flags.writeable
                    down = b"".join(row_of(row, bits, single) for row in INDEX)
                    picture, _ = load_image(file_of(down + end, bits, height=-40))
                    assert np.array_equal(picture, COLOURS[INDEX])


def test_bmp_with_run_lengths_equals_pillow():
    body = b"".join(row_of(row, 8, y % 2) for y, row in enumerate(INDEX[::-1])) + END
    data = file_of(body)
    assert np.array_equal(load_image(data)[0], pillow_rgb(data))


def test_rows_that_are_longer_than_the_picture_are_cut():
    """ImageMagick writes rows of a multiple of 4 pixels."""
    for single in (False, True):
        for more in (2, 30):
            wide = np.pad(INDEX, ((0, 0), (0, more)), constant_values=9)
            body = b"".join(row_of(row, 8, single) for row in wide[::-1])
            with case(single, more):
                picture, _ = load_image(file_of(body + END))
                assert np.array_equal(picture, COLOURS[INDEX])


def test_runs_that_begin_beyond_the_end_of_a_row_are_cut():
    row = bytes((64, 5, 10, 6, 200, 7)) + b"\0\0"
    picture, _ = load_image(file_of(row * 40 + END))
    assert (picture == COLOURS[5]).all()


def test_an_odd_number_of_single_pixels_is_padded():
    for bits, sizes in ((8, (5, 59)), (4, (6, 58))):
        body = b"".join(
            row_of(row[: sizes[0]], bits, True)[:-2] + row_of(row[sizes[0] :], bits, True)
            for row in INDEX[::-1]
        )
        with case(bits):
            assert np.array_equal(load_image(file_of(body, bits))[0], COLOURS[INDEX])


def test_pixels_that_the_file_leaves_out_have_the_first_colour():
    expected = np.zeros_like(INDEX)
    expected[36, 5:9] = 7
    expected[35, 0] = 3
    body = b"\0\2\5\3" + b"\4\7" + b"\0\0" + b"\1\3"  # a move of 5 to the right and 3 up
    for end in (END, b"\0\2\0\xff"):  # a move out of the picture
        assert np.array_equal(load_image(file_of(body + end))[0], COLOURS[expected])


def test_a_few_colours_and_none_stated():
    body = b"".join(row_of(row % 3, 8, True) for row in INDEX[::-1]) + END
    picture, _ = load_image(file_of(body, colours=COLOURS[:3]))
    assert np.array_equal(picture, COLOURS[INDEX % 3])
    all_colours = np.resize(COLOURS, (256, 3))
    data = bytearray(file_of(body, colours=all_colours))
    data[46:50] = bytes(4)  # 0 stands for 256
    assert np.array_equal(load_image(data)[0], COLOURS[INDEX % 3])


def test_a_file_that_ends_before_its_picture_is_refused():
    for bits in (8, 4):
        for single in (False, True):
            body = b"".join(row_of(row, bits, single) for row in INDEX[::-1])
            whole = file_of(body, bits)
            for size in range(len(whole) - len(body), len(whole) - 4, 7):
                with (
                    case(bits, single, size),
                    pytest.raises(InputError, match=r"damaged|truncated"),
                ):
                    load_image(whole[:size])
    with pytest.raises(
        InputError, match=r"(?s)damaged BMP: its run lengths end before.*fix: fetch"
    ):
        load_image(whole[: len(whole) // 2])


def test_wrong_bits_and_palettes_are_refused():
    data = file_of(row_of(INDEX[0], 8, True) * 40 + END)
    for place, value in ((28, 4), (30, 2), (14, 200)):
        damaged = bytearray(data)
        damaged[place] = value
        with case(place), pytest.raises(InputError, match="damaged BMP"):
            load_image(damaged[: 14 + 40 + 30] if place == 14 else damaged)


def test_a_large_file_with_run_lengths_is_refused(monkeypatch):
    data = file_of(row_of(INDEX[0], 8, True) * 40 + END)
    monkeypatch.setattr(runtime.pictures.bmp, "MOST_BYTES", len(data))
    load_image(data)
    with pytest.raises(InputError, match=r"(?s)run lengths of \d+ bytes, wanted at m.*fix: conv"):
        load_image(data + b"\0")


def test_bmp_without_run_lengths_is_read_by_opencv():
    for mode in ("RGB", "L", "P"):
        source = Image.fromarray(smooth()).convert(mode)
        picture, _ = load_image(encode(source, "BMP"))
        assert np.array_equal(picture, np.asarray(source.convert("RGB")))
