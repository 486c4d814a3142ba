"""runtime/pictures/tiff.py: a TIFF file is read as the same picture in a PNG file, or refused."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from cases import case
from picture_files import difference, encode, pillow_rgb, smooth, tiff_file
from PIL import Image, ImageCms

from runtime.errors import InputError
from runtime.pictures import tiff
from runtime.pictures.load import load_image

# OpenCV 4.10 and newer refuse 8-bit tiles without compression whose bytes are no multiple of 1024.
LAYOUTS = [
    *({}, {"order": ">"}, {"deflate": True}, {"tile": (16, 16)}, {"tile": (48, 80)}),
    *({"tile": (16, 16), "deflate": True}, {"tile": (48, 80), "deflate": True}),
    {"tile": (32, 32), "order": ">"},
]
ALPHA = np.tile(np.arange(64, dtype=np.uint8) * 3 + 60, (40, 1))


def wide(picture):
    """The same picture in 16 bits."""
    return picture.astype(np.uint16) * 257


def grey_png(grey):
    return load_image(encode(grey, "PNG"))[0]


def test_grey_and_colour_of_8_and_16_bits():
    grey = smooth()[..., 0]
    for layout in LAYOUTS:
        for pixels, photometric, expected in [
            (smooth(), 2, smooth()),
            (grey, 1, grey_png(grey)),
            (~grey, 0, grey_png(grey)),  # white is zero
        ]:
            with case(layout, photometric):
                picture, warnings = load_image(tiff_file(pixels, photometric, **layout))
                assert np.array_equal(picture, expected) and warnings == []
                assert picture.flags.c_contiguous and picture.flags.writeable
                picture, warnings = load_image(tiff_file(wide(pixels), photometric, **layout))
                assert np.array_equal(picture, expected)
                assert warnings == ["The picture has 16 bits per channel; it was scaled to 8."]


def test_bilevel_of_both_polarities():
    white = smooth()[..., 0] > 90
    for deflate in (False, True):
        for photometric, bits in ((1, white), (0, ~white)):
            with case(deflate, photometric):
                tags = {256: [64], 258: [1]}
                data = tiff_file(np.packbits(bits, axis=1), photometric, deflate=deflate, tags=tags)
                picture, warnings = load_image(data)
                assert np.array_equal(picture, grey_png(white)) and warnings == []


def test_12_bits_are_read_at_their_own_scale():
    grey = smooth()[..., 0]
    twelve = np.round(grey * (4095 / 255)).astype(">u2").view(np.uint8).reshape(40, 64, 2)
    bits = np.unpackbits(twelve, axis=2)[..., 4:].reshape(40, -1)
    for photometric, stored in ((1, bits), (0, 1 - bits)):
        data = tiff_file(np.packbits(stored, axis=1), photometric, tags={256: [64], 258: [12]})
        picture, warnings = load_image(data)
        assert np.array_equal(picture, grey_png(grey))
        assert warnings == ["The picture has 12 bits per channel; it was scaled to 8."]


def test_channels_stored_one_after_the_other():
    for layout in [{}, {"tile": (16, 16)}, {"order": ">"}]:
        for pixels in (smooth(), wide(smooth())):
            with case(layout, pixels.dtype):
                data = tiff_file(pixels, 2, planar=True, **layout)
                assert np.array_equal(load_image(data)[0], smooth())
    assert np.array_equal(
        load_image(tiff_file(smooth(), 2, planar=True, deflate=True))[0], smooth()
    )
    grey = np.dstack([smooth()[..., 0], ALPHA])
    for tile in (None, (16, 16), (32, 32)):
        data = tiff_file(grey, 1, planar=True, tile=tile, tags={338: [2]})
        assert np.array_equal(load_image(data)[0], grey_png(grey[..., 0]))


def test_a_last_strip_at_the_end_of_the_file_is_read():
    file, planes = io.BytesIO(), wide(smooth()).transpose(2, 0, 1)
    tifffile.imwrite(file, planes, photometric="rgb", planarconfig="separate", rowsperstrip=7)
    assert file.getvalue().endswith(planes[2, -5:].tobytes())
    assert np.array_equal(load_image(file.getvalue())[0], smooth())


def test_what_opencv_misreads_is_refused():
    grey = np.dstack([smooth()[..., 0], ALPHA])
    for pixels, photometric, layout, what in [
        (wide(smooth()), 2, {"planar": True}, "16 bits per channel in compressed planes"),
        (
            *(wide(smooth()), 2, {"planar": True, "tile": (16, 16)}),
            "16 bits per channel in compressed planes",
        ),
        (grey, 1, {"planar": True}, "grey or a palette with alpha in compressed planes"),
        (grey, 1, {"tile": (48, 80)}, "grey or a palette with alpha in compressed tiles"),
        (wide(grey), 0, {"tile": (32, 48)}, "grey or a palette with alpha in compressed tiles"),
    ]:
        data = tiff_file(pixels, photometric, deflate=True, **layout)
        with (
            case(what, layout),
            pytest.raises(InputError, match=f"(?s)holds {what}, which OpenCV misreads.*fix: conv"),
        ):
            load_image(data)


def test_channels_that_are_not_stated_to_be_rgb_are_refused():
    """OpenCV reads the first of them in 8 bits, and takes them for RGB in 16."""
    for pixels in (smooth(), wide(smooth()), np.dstack([smooth(), ALPHA])):
        for photometric in (0, 1):
            for layout in [*LAYOUTS, {"planar": True}]:
                with (
                    case(pixels.shape, pixels.dtype, photometric, layout),
                    pytest.raises(
                        InputError, match=r"(?s)holds [34] channels, and does.*fix: select"
                    ),
                ):
                    load_image(tiff_file(pixels, photometric, **layout))


def test_reversed_bits_are_read_by_opencv():
    flipped = np.packbits(np.unpackbits(smooth(), axis=2).reshape(40, 64, 3, 8)[..., ::-1], axis=3)
    data = tiff_file(flipped[..., 0], 2, tile=(32, 32), tags={266: [2]})
    assert np.array_equal(load_image(data)[0], smooth())


def test_straight_alpha_leaves_the_colours_as_they_are_stored():
    picture, grey = np.dstack([smooth(), ALPHA]), np.dstack([smooth()[..., 0], ALPHA])
    for layout in LAYOUTS:
        for pixels, photometric, expected in [
            (picture, 2, smooth()),
            (grey, 1, grey_png(smooth()[..., 0])),
        ]:
            if photometric == 1 and layout == {"tile": (48, 80), "deflate": True}:
                continue  # refused, see above
            for stored in (pixels, wide(pixels)):
                with case(layout, photometric, stored.dtype):
                    data = tiff_file(stored, photometric, tags={338: [2]}, **layout)
                    found, warnings = load_image(data)
                    assert np.array_equal(found, expected)
                    assert "alpha channel was dropped" in warnings[0]
                    assert len(warnings) == (2 if stored.dtype == np.uint16 else 1)


def test_multiplied_alpha_is_divided_out_as_pillow_does():
    multiplied = np.round(smooth() * (ALPHA[..., None] / 255)).astype(np.uint8)
    for layout in LAYOUTS:
        with case(layout):
            data = tiff_file(np.dstack([multiplied, ALPHA]), 2, tags={338: [1]}, **layout)
            picture, warnings = load_image(data)
            assert difference(picture, pillow_rgb(data)) <= 1
            assert difference(picture, smooth()) <= 3  # multiplied by at least 60 / 255
            assert len(warnings) == 1 and "alpha channel was dropped" in warnings[0]
            exact = np.round(wide(smooth()) * (ALPHA[..., None] / 255)).astype(np.uint16)
            data = tiff_file(np.dstack([exact, wide(ALPHA)]), 2, tags={338: [1]}, **layout)
            assert difference(load_image(data)[0], smooth()) == 0
    clear = tiff_file(np.zeros((4, 5, 4), np.uint8), 2, tags={338: [1]})
    assert not load_image(clear)[0].any()


def test_multiplied_grey_remains_so_with_a_warning():
    for stored in (np.dstack([ALPHA // 2, ALPHA]), wide(np.dstack([ALPHA // 2, ALPHA]))):
        picture, warnings = load_image(tiff_file(stored, 1, tags={338: [1]}))
        assert np.array_equal(picture, grey_png(ALPHA // 2))
        assert "stored multiplied by the alpha channel" in warnings[0]
        assert "alpha channel was dropped" in warnings[1]


def test_a_channel_that_is_no_alpha_is_dropped_with_another_warning():
    for tags in ({338: [0]}, {}):
        picture, warnings = load_image(tiff_file(np.dstack([smooth(), ALPHA]), 2, tags=tags))
        assert np.array_equal(picture, smooth())
        assert warnings == ["The channels beyond the colours were dropped."]


def test_orientation_of_every_layout():
    pictures = [smooth(), smooth()[..., 0], wide(smooth()), np.dstack([smooth(), ALPHA])]
    for orientation in range(1, 9):
        for layout in [*LAYOUTS, {"planar": True}]:
            for pixels in pictures:
                with case(orientation, layout, pixels.shape, pixels.dtype):
                    if pixels.ndim == 2 and "planar" in layout:
                        continue
                    tags = {274: [orientation]} | ({338: [2]} if pixels.shape[-1] == 4 else {})
                    data = tiff_file(pixels, 2 if pixels.ndim == 3 else 1, tags=tags, **layout)
                    expected = pixels if pixels.dtype == np.uint8 else (pixels // 257).astype("u1")
                    exif = Image.Exif()
                    exif[274] = orientation
                    png = encode(
                        expected[..., :3] if pixels.ndim == 3 else expected, "PNG", exif=exif
                    )
                    picture, _ = load_image(data)
                    assert np.array_equal(picture, pillow_rgb(png))
                    assert picture.flags.c_contiguous


def test_palettes():
    rng = np.random.default_rng(0)
    for bits, layout in [
        *((8, layout) for layout in [{}, {"tile": (16, 16)}, {"deflate": True}]),
        (16, {}),
        (16, {"tile": (16, 16)}),
    ]:
        with case(bits, layout):
            colours = rng.integers(0, 65536, (3, 1 << bits)).astype(np.uint16)
            colours[:, -1] = 65535
            index = rng.integers(0, 1 << bits, (40, 64)).astype(f"u{bits // 8}")
            data = tiff_file(index, 3, tags={320: colours.ravel().tolist()}, **layout)
            picture, warnings = load_image(data)
            expected = (colours >> 8).astype(np.uint8).T[index]
            assert difference(picture, expected) <= 1 and warnings == []
    colours, index = colours[:, :256], smooth()[..., 0]
    for layout in [{}, {"tile": (16, 16)}, {"planar": True}]:
        tags = {320: colours.ravel().tolist(), 338: [2]}
        picture, warnings = load_image(tiff_file(np.dstack([index, ALPHA]), 3, tags=tags, **layout))
        assert difference(picture, (colours >> 8).astype(np.uint8).T[index]) <= 1
        assert "alpha channel was dropped" in warnings[0]
    few = tiff_file(smooth()[..., 0], 3, tile=(16, 16), tags={320: [0] * 30})
    with pytest.raises(InputError, match="damaged TIFF: it has no palette"):
        load_image(few)


def test_colours_of_palette_files_with_8_bits_in_their_table():
    """Old writers store 0..255 in the table, which has 16 bits."""
    colours = np.random.default_rng(0).integers(0, 256, (3, 256))
    index = smooth()[..., 0]
    for tile in (None, (16, 16)):
        picture, _ = load_image(
            tiff_file(index, 3, tile=tile, tags={320: colours.ravel().tolist()})
        )
        assert np.array_equal(picture, colours.T[index])


def test_inks_have_the_colours_of_pillow_and_no_alpha():
    inks = Image.fromarray(smooth()).convert("CMYK")
    for compression in (None, "tiff_lzw", "packbits"):
        with case(compression):
            data = encode(inks, "TIFF", compression=compression)
            picture, warnings = load_image(data)
            assert difference(picture, pillow_rgb(data)) <= 1 and warnings == []


def test_luma_and_chroma_have_the_colours_of_pillow():
    for compression in (None, "tiff_lzw", "jpeg"):
        with case(compression):
            data = encode(
                Image.fromarray(smooth()).convert("YCbCr"), "TIFF", compression=compression
            )
            picture, warnings = load_image(data)
            assert difference(picture, pillow_rgb(data)) <= 3 and warnings == []


def test_cielab_is_read_with_a_warning():
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    to_lab = ImageCms.buildTransform(*profiles, "RGB", "LAB")
    data = encode(ImageCms.applyTransform(Image.fromarray(smooth()), to_lab), "TIFF")
    picture, warnings = load_image(data)
    assert picture.shape == (40, 64, 3)
    assert warnings == ["The picture is stored as CIELab; its RGB colours are approximate."]


def test_other_values_are_refused_with_their_type(capfd):
    for dtype in ["i1", "i2", "i4", "u4", "f2", "f4", "f8", "c8"]:
        for shape in ((40, 64), (40, 64, 3)):
            with case(dtype, shape):
                pixels = np.zeros(shape, dtype)
                name = np.dtype(dtype).name
                with pytest.raises(
                    InputError,
                    match=rf"(?s)holds {name} values, wanted 8 or 16.*fix: map the values",
                ):
                    load_image(tiff_file(pixels, 1 if len(shape) == 2 else 2))
    assert capfd.readouterr().err == ""


def test_kinds_that_opencv_cannot_read_are_refused_with_what_they_are():
    grey = smooth()[..., 0]
    for data, what in [
        (tiff_file(grey[:, :32], 1, tags={256: [64], 258: [4]}), "grey of 4 bits"),
        (tiff_file(grey[:, :16], 0, tags={256: [64], 258: [2]}), "grey of 2 bits"),
        (tiff_file(wide(np.zeros((40, 64, 4), np.uint8)), 5), "CMYK of 16 bits"),
        (tiff_file(wide(grey), 3, deflate=True), "a compressed palette of 16 bits"),
    ]:
        with (
            case(what),
            pytest.raises(
                InputError, match=rf"(?s)TIFF file with {what}, which OpenCV.*fix: convert"
            ),
        ):
            load_image(data)


def test_first_page_is_read():
    pages = [Image.fromarray(smooth()), Image.fromarray(smooth()[::-1])]
    data = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert np.array_equal(load_image(data)[0], smooth())


def test_damage_to_tiles_that_are_read_here_is_refused(capfd):
    whole = tiff_file(smooth(), 2, tile=(16, 16))
    for tags in [
        *(
            {324: [8]},
            {324: [10**7] * 12},
            {324: [0] * 12},
            {324: None, 273: None},
            {322: [0]},
            {323: [0]},
        ),
        *({322: None}, {258: [8, 8, 16]}, {277: [1]}),
    ]:
        with case(tags), pytest.raises(InputError, match=r"damaged|truncated"):
            load_image(tiff_file(smooth(), 2, tile=(16, 16), tags=tags))
    beyond = tiff_file(smooth(), 2, tile=(16, 16), tags={324: [10**7] * 12})
    with pytest.raises(InputError, match="a tile or strip ends after the end of the file"):
        load_image(beyond)
    for cut in range(8, len(whole), 97):
        with case(cut), pytest.raises(InputError):
            load_image(whole[:cut])
    assert capfd.readouterr().err == ""


def test_directories_outside_the_file_are_refused():
    for order in "<>":
        for start in (7, 2**31, 2**32 - 1):
            small = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
            large = (b"II+\0" if order == "<" else b"MM\0+") + struct.pack(order + "HH", 8, 0)
            for data in (small, large + struct.pack(order + "Q", start << 32 | start)):
                with case(order, start, len(data)), pytest.raises(InputError, match="damaged TIFF"):
                    load_image(data)


def test_the_first_of_two_equal_tags_counts():
    data = tiff_file(smooth(), 2, tile=(16, 16), tags={274: [6], 275: [1]})
    data = data.replace(struct.pack("<HHI", 275, 3, 1), struct.pack("<HHI", 274, 3, 1))
    assert np.array_equal(load_image(data)[0], np.rot90(smooth(), -1))


def test_a_directory_has_65535_tags_at_most():
    """A file of gigabytes may state as many tags as it has bytes."""
    unknown, width = bytes(20), struct.pack("<HHQQ", 256, 3, 1, 5)
    for count, found in ((65534, True), (65535, False)):
        head = b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, count + 1)
        assert (256 in tiff.directory(head + unknown * count + width).tags) == found


def test_a_palette_of_4_bits_is_read():
    index = smooth()[..., 0] >> 4
    colours = np.random.default_rng(0).integers(0, 256, (3, 16)) * 257
    tags = {256: [64], 258: [4], 320: colours.ravel().tolist()}
    picture, _ = load_image(tiff_file(index[:, ::2] << 4 | index[:, 1::2], 3, tags=tags))
    assert np.array_equal(picture, (colours // 257).T[index])


def test_only_compressions_that_opencv_decodes_are_read():
    """OpenCV reads some of the others as black, without an error."""
    for number in sorted({*range(12), *range(32766, 32775), 32946, 34712, 50002, 65535}):
        data = tiff_file(smooth(), 2, tags={259: [number]})
        if number not in (1, 2, 3, 4, 5, 7, 8, 32773, 32946):
            with (
                case(number),
                pytest.raises(
                    InputError, match=rf"(?s)with compression {number}\b.*OpenCV.*fix: convert"
                ),
            ):
                load_image(data)
    with pytest.raises(InputError, match=r"with compression 34712 \(JPEG 2000\), which OpenCV"):
        load_image(tiff_file(smooth(), 2, tags={259: [34712]}))
    white = Image.fromarray(smooth()).convert("1")
    for compression in ("raw", "tiff_ccitt", "group3", "group4", "tiff_lzw", "packbits"):
        with case(compression):
            picture, _ = load_image(encode(white, "TIFF", compression=compression))
            assert np.array_equal(picture, np.asarray(white.convert("RGB")))
    for number in (8, 32946):
        picture, _ = load_image(tiff_file(smooth(), 2, deflate=True, tags={259: [number]}))
        assert np.array_equal(picture, smooth())


def test_damaged_deflate_is_refused(capfd):
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    for layout in ({}, {"tile": (48, 80)}, {"tile": (16, 16)}, {"planar": True}):
        data = tiff_file(noise, 2, deflate=True, **layout)
        assert np.array_equal(load_image(data)[0], noise)
        found = tiff.directory(data)
        starts = found.tags[324 if "tile" in layout else 273].tolist()
        for start in starts:
            damaged = bytearray(data)
            damaged[start + 100] ^= 1
            with case(layout, start), pytest.raises(InputError, match="deflate data is wrong"):
                load_image(damaged)
        short = zlib.compress(b"1").ljust(99)
        with pytest.raises(InputError, match="deflate data is not complete"):
            load_image(data[: starts[-1]] + short + data[starts[-1] + len(short) :])
    assert capfd.readouterr().err == ""


def test_deflate_with_rows_below_the_picture_or_reversed_bits_is_read():
    striped = np.repeat(smooth()[:, :1], 64, axis=1)
    rows = np.vstack([striped, striped])  # two strips of 30 rows, 20 of them below the picture
    parts = [zlib.compress(part.tobytes()) for part in (rows[:30], rows[30:60])]
    for order in (1, 2):
        blocks = [np.frombuffer(part, np.uint8) for part in parts]
        if order == 2:
            blocks = [np.packbits(np.unpackbits(b).reshape(-1, 8)[:, ::-1]) for b in blocks]
        stored, sizes = b"".join(b.tobytes() for b in blocks), [len(b) for b in blocks]
        tags = {259: [8], 266: [order], 273: [8, 8 + sizes[0]], 278: [30], 279: sizes}
        data = tiff_file(striped, 2, tags=tags)
        with case(order):
            picture, _ = load_image(data[:8] + stored + data[8 + len(stored) :])
            assert np.array_equal(picture, striped)


def test_deflate_without_its_end_is_refused():
    for more, size, read in (
        (0, 0, 1),
        (40, 0, 1),
        (0, -1, 0),
        (0, -4, 0),
        (999, 0, 1),  # more rows than the picture has
        (999, -4, 1),  # the checksum is behind the rows that are decoded
    ):
        block = zlib.compress(bytes((40 + more) * 64 * 3))
        tags = {259: [8], 273: [8], 278: [40], 279: [len(block) + size]}
        data = tiff_file(smooth(), 2, tags=tags)
        data = data[:8] + block + data[8 + len(block) :]
        with case(more, size):
            if read:
                assert not load_image(data)[0].any()
            else:
                with pytest.raises(InputError, match="deflate data is not complete"):
                    load_image(data)


def test_strips_outside_the_file_are_refused_in_every_compression():
    for compression in ("tiff_lzw", "packbits", "jpeg", "tiff_adobe_deflate"):
        data = encode(smooth(), "TIFF", compression=compression)
        found = tiff.directory(data)
        for tag, value, what in (
            (273, len(data), "ends after the end of the file"),
            (273, 0, "is missing"),
            (279, 0, "is missing"),
        ):
            damaged = bytearray(data)
            struct.pack_into("<H", damaged, found.places[tag], value)
            with case(compression, tag), pytest.raises(InputError, match=f"damaged TIFF: .*{what}"):
                load_image(damaged)


def test_luma_and_chroma_of_deflate_are_checked_at_their_size():
    for right, below in ((1, 1), (2, 1), (2, 2)):
        blocks = 40 * 64 // (right * below)
        block = zlib.compress(bytes(range(128)) * (blocks * (right * below + 2) // 128))
        tags = {259: [8], 262: [6], 273: [8], 278: [40], 279: [len(block)], 530: [right, below]}
        data = tiff_file(smooth(), 6, tags=tags)
        with case(right, below):
            assert load_image(data[:8] + block + data[8 + len(block) :])[0].shape == (40, 64, 3)
            wrong = zlib.compress(b"1").ljust(len(block), b"\0")
            with pytest.raises(InputError, match="deflate data is not complete"):
                load_image(data[:8] + wrong + data[8 + len(block) :])


def test_many_small_tiles_are_refused():
    """Python and libtiff need a microsecond or more for each."""
    for side in (1, 16):
        size = {256: [256 * side], 257: [256 * side]}
        tags = size | {322: [side], 323: [side], 324: [8] * 2**16}
        data = tiff_file(np.zeros((16, 16), np.uint8), 1, tile=(16, 16), tags=tags)
        data += bytes(max(0, 65536 * side * side - len(data)))
        assert load_image(data)[0].shape == (256 * side, 256 * side, 3)
    tags |= {256: [257], 257: [257], 322: [1], 323: [1]}
    data = tiff_file(np.zeros((16, 16), np.uint8), 1, tile=(16, 16), tags=tags) + bytes(99999)
    with pytest.raises(InputError, match=r"(?s)of 66049 strips or tiles, wanted .*fix: convert"):
        load_image(data)


def test_a_reduced_copy_is_warned_of():
    for tags, reduced in (({254: [1]}, 1), ({254: [2]}, 0), ({255: [2]}, 1), ({255: [1]}, 0)):
        picture, warnings = load_image(tiff_file(smooth(), 2, tags=tags))
        assert np.array_equal(picture, smooth())
        said = "The first picture of the file is a reduced copy of another one, which was not read."
        assert warnings == [said] * reduced


def test_few_bits_where_white_is_zero_are_warned_of():
    grey = np.linspace(0, 4095, 40 * 64).astype(np.uint16).reshape(40, 64)
    for layout in LAYOUTS:
        with case(layout):
            picture, warnings = load_image(tiff_file(grey, 0, **layout))
            assert np.array_equal(picture[..., 0], 255 - np.round(grey / 257).astype(np.uint8))
            assert "largest value of the picture is 4095 of 65535" in warnings[1]
            assert "the result is bright" in warnings[1]
