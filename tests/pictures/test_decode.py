"""runtime/pictures/decode.py: each format is read as Pillow reads it, refused, or warned of."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from cases import case
from picture_files import (
    OPENCV,
    bmp_file,
    difference,
    encode,
    pillow_rgb,
    png_file,
    read_by_opencv,
    smooth,
    sun_raster_file,
    tiff_file,
)
from PIL import Image, features

import runtime.pictures.decode
from runtime.errors import InputError
from runtime.pictures.load import load_image

ALPHA = np.tile(np.arange(64, dtype=np.uint8) * 4, (40, 1))
LOSSLESS = {"lossless": True, "exact": True}
SCALED = "The picture has {} bits per channel; it was scaled to 8."
DROPPED = "The alpha channel was dropped; flatten the picture if its transparency matters."


def wide(picture):
    """The same picture in 16 bits."""
    return picture.astype(np.uint16) * 257


def grey_rgb(grey):
    return np.stack([grey] * 3, axis=-1)


def with_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def avif_is_read():
    return features.check("avif") and read_by_opencv(encode(smooth(), "AVIF"))


# Orientation


def test_orientation_is_applied_in_every_format():
    kinds = {"JPEG": {}, "PNG": {}, "TIFF": {}, "WEBP": LOSSLESS}
    if avif_is_read():
        kinds["AVIF"] = {"quality": 100, "subsampling": "4:4:4"}
    for kind, options in kinds.items():
        for orientation in range(1, 9):
            for picture in (smooth(), np.dstack([smooth(), ALPHA + 1])):
                if kind == "JPEG" and picture.shape[2] == 4:
                    continue
                with case(kind, orientation, picture.shape):
                    data = encode(picture, kind, exif=with_orientation(orientation), **options)
                    found, warnings = load_image(data)
                    assert found.shape == ((40, 64, 3) if orientation <= 4 else (64, 40, 3))
                    assert difference(found, pillow_rgb(data)) <= 3 and found.flags.c_contiguous
                    assert warnings == ([DROPPED] if picture.shape[2] == 4 else [])


def test_wrong_orientation_is_upright():
    for orientation in (0, 9):
        for kind in ("JPEG", "PNG", "TIFF"):
            with case(kind, orientation):
                data = encode(smooth(), kind, exif=with_orientation(orientation))
                assert load_image(data)[0].shape == (40, 64, 3)


def test_16_bit_and_grey_pictures_are_turned_upright():
    for stored in (wide(smooth()), wide(smooth()[..., 0]), smooth()[..., 0]):
        with case(stored.shape, stored.dtype):
            exif = with_orientation(6).tobytes()[6:]
            data = png_file(stored, chunks=[(b"eXIf", exif)])
            upright = np.rot90(stored if stored.dtype == np.uint8 else (stored // 257), -1)
            expected = upright.astype(np.uint8)
            found, _ = load_image(data)
            assert np.array_equal(found, expected if expected.ndim == 3 else grey_rgb(expected))


# Alpha


def test_alpha_is_dropped_with_a_warning_and_the_colours_stay():
    files = [("PNG", {}), ("WEBP", LOSSLESS), ("TIFF", {}), ("JPEG2000", {})]
    if avif_is_read():
        files.append(("AVIF", {"quality": 100, "subsampling": "4:4:4"}))
    for kind, options in files:
        with case(kind):
            data = encode(np.dstack([smooth(), ALPHA]), kind, **options)
            picture, warnings = load_image(data)
            assert difference(picture, smooth()) <= (3 if kind == "AVIF" else 0)
            assert warnings == [DROPPED]


def test_alpha_of_grey_and_of_palettes():
    grey = np.dstack([smooth()[..., 0], ALPHA])
    palette = Image.fromarray(smooth()).convert("P")
    files = [
        (encode(Image.merge("LA", [*map(Image.fromarray, np.moveaxis(grey, -1, 0))]), "PNG"), grey),
        (png_file(wide(grey)), grey),
        (encode(palette, "PNG", transparency=0), None),
    ]
    for data, stored in files:
        picture, warnings = load_image(data)
        expected = pillow_rgb(data) if stored is None else grey_rgb(stored[..., 0])
        assert np.array_equal(picture, expected) and warnings[0] == DROPPED


def test_files_without_alpha_are_not_warned_of():
    inks = Image.fromarray(smooth()).convert("CMYK")
    files = [encode(inks, "TIFF"), encode(inks, "JPEG"), encode(smooth(), "BMP")]
    gif = encode(smooth(), "GIF")
    for data in [*files, *([gif] if read_by_opencv(gif) else [])]:
        assert load_image(data)[1] == []


def test_transparent_colour_of_a_gif_is_warned_of():
    palette = Image.fromarray(smooth()).convert("P", palette=Image.Palette.ADAPTIVE)
    data = encode(palette, "GIF", transparency=3)
    if read_by_opencv(data):
        assert load_image(data)[1] == [DROPPED]


# Bits


def test_16_bits_are_rounded_to_8_with_a_warning():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for data in [
        *(cv2.imencode(suffix, values)[1].tobytes() for suffix in (".png", ".tif", ".pgm")),
        cv2.imencode(".jp2", values, [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])[1].tobytes(),
    ]:
        with case(data[:4]):
            picture, warnings = load_image(data)
            assert np.array_equal(picture[..., 1], np.round(values / 257).astype(np.uint8))
            assert warnings == [SCALED.format(16)]


def test_16_bit_colour_keeps_its_channels_and_alpha_is_reported_too():
    picture, warnings = load_image(png_file(wide(np.dstack([smooth(), ALPHA]))))
    assert np.array_equal(picture, smooth())
    assert warnings == [DROPPED, SCALED.format(16)]


def test_fewer_bits_in_16_are_warned_of():
    """A camera's 12 bits, saved in the lower bits of 16; and a picture that is dark."""
    for largest, said in [(1023, True), (4095, True), (16383, True), (16384, False), (0, False)]:
        grey = np.linspace(0, largest, 40 * 64).astype(np.uint16).reshape(40, 64)
        colour = np.stack([grey // 2, grey, grey // 3], axis=-1)
        for data in (png_file(grey), png_file(colour), tiff_file(grey, 1), tiff_file(colour, 2)):
            with case(largest, data[:4]):
                _, warnings = load_image(data)
                assert warnings[0] == SCALED.format(16) and len(warnings) == 1 + said
                if said:
                    assert f"largest value of the picture is {largest} of 65535" in warnings[1]
                    assert "12 or 14 bits must be multiplied by 64, 16 or 4" in warnings[1]


def test_avif_of_10_and_12_bits_is_read_at_its_own_scale():
    if not avif_is_read():
        return
    for bits in (10, 12):
        with case(bits):
            values = np.round(smooth() * ((2**bits - 1) / 255)).astype(np.uint16)
            options = [cv2.IMWRITE_AVIF_DEPTH, bits, cv2.IMWRITE_AVIF_QUALITY, 100]
            done, data = cv2.imencode(".avif", values[..., ::-1], options)
            assert done
            picture, warnings = load_image(data.tobytes())
            assert np.abs(picture.astype(int) - smooth()).mean() < 2
            assert warnings == [SCALED.format(bits)]


def jpeg_2000_of_12_bits(values):
    """Write a lossless file of 16 bits, and state 12: the middle of the range is stored as 0."""
    data = bytearray(
        encode(Image.fromarray((values + (2**15 - 2**11)).astype(np.uint16)), "JPEG2000")
    )
    size = data.index(b"\xff\x51")  # the marker SIZ
    assert data[size + 40] == 15
    data[size + 40] = 11
    header = data.find(b"ihdr")
    data[header + 14] = 11
    return bytes(data)


def test_jpeg_2000_of_12_bits_is_read_at_its_own_scale():
    values = np.round(smooth()[..., 0] * (4095 / 255)).astype(int)
    picture, warnings = load_image(jpeg_2000_of_12_bits(values))
    assert np.array_equal(picture, grey_rgb(smooth()[..., 0]))
    assert warnings == [SCALED.format(12)]


def test_grey_jpeg_2000_with_and_without_its_container():
    grey = Image.fromarray(smooth()[..., 0])
    for options in ({}, {"no_jp2": True}):
        for source in (grey, Image.fromarray(wide(smooth()[..., 0])), Image.fromarray(smooth())):
            with case(options, source.mode):
                picture, _ = load_image(encode(source, "JPEG2000", **options))
                expected = smooth() if source.mode == "RGB" else grey_rgb(smooth()[..., 0])
                assert np.array_equal(picture, expected)
    grey = Image.new("LA", (64, 40), (100, 50))
    picture, notes = load_image(encode(grey, "JPEG2000", no_jp2=True))
    assert (picture == 100).all() and notes == [DROPPED]


def test_grey_and_palettes_of_few_bits():
    grey = smooth()[..., 0]
    for bits in (1, 2, 4):
        with case(bits):
            data = png_file(grey >> (8 - bits), bits=bits)
            picture, warnings = load_image(data)
            assert np.array_equal(picture, pillow_rgb(data)) and warnings == []
            palette = Image.fromarray(smooth()).quantize(2**bits)
            data = encode(palette, "PNG", bits=bits)
            picture, warnings = load_image(data)
            assert np.array_equal(picture, pillow_rgb(data)) and warnings == []


def test_grey_palette_and_bilevel():
    for kind in ["PNG", "TIFF", "BMP"]:
        for mode in ["L", "P", "1"]:
            with case(mode, kind):
                source = Image.fromarray(smooth()).convert(mode)
                picture, warnings = load_image(encode(source, kind))
                assert np.array_equal(picture, np.asarray(source.convert("RGB"))) and warnings == []


# Netpbm


def test_netpbm_is_scaled_by_its_largest_value():
    grey = smooth()[..., 0]
    for largest in (15, 100, 255, 1000, 4095, 65535):
        for colour in (False, True):
            with case(largest, colour):
                source = smooth() if colour else grey
                values = np.round(source * (largest / 255)).astype(">u2" if largest > 255 else "u1")
                expected = values * (255 / largest)
                expected = expected if colour else grey_rgb(expected)
                head = b"64 40\n%d\n" % largest
                words = b" ".join(b"%d" % v for v in values.ravel()) + b"\n"
                pam = b"P7\nWIDTH 64\nHEIGHT 40\nDEPTH %d\nMAXVAL %d\nTUPLTYPE %s\nENDHDR\n"
                tuples = (3, largest, b"RGB") if colour else (1, largest, b"GRAYSCALE")
                for data in (
                    (b"P6\n" if colour else b"P5\n") + head + values.tobytes(),
                    (b"P3\n" if colour else b"P2\n") + head + words,
                    pam % tuples + values.tobytes(),
                ):
                    picture, _ = load_image(data)  # OpenCV truncates the 8 bits of a text file
                    bound = 1 if data[:2] in (b"P2", b"P3") and largest < 255 else 0.5
                    assert np.abs(picture - expected).max() <= bound + 1e-6, data[:2]


def test_bitmaps_of_netpbm():
    white = smooth()[..., 0] > 90
    words = b"\n".join(b" ".join(b"%d" % v for v in row) for row in ~white & 1) + b"\n"
    pam = b"P7\nWIDTH 64\nHEIGHT 40\nDEPTH 1\nMAXVAL 1\nTUPLTYPE BLACKANDWHITE\nENDHDR\n"
    for data in (
        b"P4\n64 40\n" + np.packbits(~white, axis=1).tobytes(),
        b"P1\n64 40\n" + words,
        pam + white.tobytes(),
    ):
        with case(data[:2]):
            picture, warnings = load_image(data)
            assert np.array_equal(picture, grey_rgb(white * np.uint8(255))) and warnings == []


def test_text_netpbm_needs_no_space_at_its_end():
    for kind, size in (("P2", 1), ("P3", 3)):
        with case(kind):
            values = " ".join(["7"] * (4 * size))
            picture, notes = load_image(f"{kind}\n2 2\n255\n{values}".encode())
            assert notes == [] and picture.tolist() == [[[7] * 3] * 2] * 2


def test_gif_with_a_background_outside_its_palette():
    palette = Image.fromarray(smooth()).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    data = bytearray(encode(palette, "GIF"))
    if read_by_opencv(bytes(data)):
        wanted = load_image(bytes(data))[0]
        for background in (2 << (data[10] & 7), 255):
            data[11] = background
            assert np.array_equal(load_image(bytes(data))[0], wanted)
        assert np.array_equal(
            load_image(bytes(data[:-1]))[0], wanted
        )  # without the mark of its end


def test_pam_with_alpha():
    head = b"P7\nWIDTH 64\nHEIGHT 40\nDEPTH %d\nMAXVAL %d\nTUPLTYPE %s_ALPHA\nENDHDR\n"
    for colours, word in ((smooth(), b"RGB"), (smooth()[..., :1], b"GRAYSCALE")):
        values = np.dstack([colours, ALPHA])
        for stored, largest in ((values, 255), (wide(values).astype(">u2"), 65535)):
            with case(word, largest):
                data = head % (values.shape[2], largest, word) + stored.tobytes()
                picture, warnings = load_image(data)
                assert np.array_equal(picture, colours.repeat(3 // colours.shape[2], axis=2))
                assert warnings[0] == DROPPED
                with pytest.raises(InputError, match="truncated PAM"):
                    load_image(data[:-1])


# BMP and Sun raster


def test_bmp_with_masks():
    usual, swapped = (0xFF0000, 0xFF00, 0xFF), (0xFF, 0xFF00, 0xFF0000)
    for masks, header in [(usual, 40), (usual, 52), (usual, 56), (swapped, 56), (swapped, 108)]:
        with case(masks, header):
            picture, warnings = load_image(bmp_file(smooth(), masks, header=header))
            assert np.array_equal(picture, smooth()) and warnings == []
    for masks, header in [(swapped, 40), (swapped, 52), ((0xFF000000, 0xFF0000, 0xFF00), 40)]:
        with (
            case(masks, header),
            pytest.raises(InputError, match=r"(?s)BMP file with its colours in .*fix: convert"),
        ):
            load_image(bmp_file(smooth(), masks, header=header))


def test_sun_raster():
    grey, bgr = smooth()[..., 0], smooth()[..., ::-1]
    picture, warnings = load_image(sun_raster_file(bgr.reshape(40, -1), 24, 64))
    assert np.array_equal(picture, smooth()) and warnings == []
    assert np.array_equal(load_image(sun_raster_file(grey, 8, 64))[0], grey_rgb(grey))
    for bits, rows in [
        (1, np.packbits(grey > 90, axis=1)),
        (32, np.dstack([grey, bgr]).reshape(40, -1)),
    ]:
        with (
            case(bits),
            pytest.raises(
                InputError, match=f"file of {bits} bits per pixel, which OpenCV misreads"
            ),
        ):
            load_image(sun_raster_file(rows, bits, 64))


# Pages


def test_the_first_page_is_read():
    pages = [Image.fromarray(smooth()), Image.fromarray(smooth()[:, ::-1])]
    for kind, options in [
        *(("TIFF", {}), ("PNG", {}), ("PNG", {"default_image": True}), ("WEBP", LOSSLESS)),
        ("GIF", {}),
    ]:
        with case(kind, options):
            data = encode(pages[0], kind, save_all=True, append_images=pages[1:], **options)
            if not read_by_opencv(data):
                with pytest.raises(InputError, match=rf"OpenCV {cv2.__version__} cannot read it"):
                    load_image(data)
            else:
                assert np.array_equal(load_image(data)[0], pillow_rgb(data))


# JPEG


def test_jpeg_is_close_to_pillow():
    inks = cv2.resize(
        np.random.default_rng(0).integers(0, 256, (6, 8, 4), dtype=np.uint8), (64, 48)
    )
    for name, data in {
        "colour": encode(smooth(), "JPEG"),
        "progressive": encode(smooth(), "JPEG", progressive=True),
        "grey": encode(smooth()[..., 0], "JPEG"),
        "RGB": encode(smooth(), "JPEG", keep_rgb=True),
        "inks of Adobe": encode(Image.fromarray(inks, "CMYK"), "JPEG", quality=95),
        "restart": encode(smooth(), "JPEG", restart_marker_rows=1),
    }.items():
        with case(name):
            picture, warnings = load_image(data)
            assert difference(picture, pillow_rgb(data)) <= 3 and warnings == []


def test_jpeg_with_missing_data_is_refused_before_libjpeg_prints(capfd):
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    for name, data in {
        "plain": encode(noise, "JPEG", quality=90),
        "grey": encode(noise[..., 0], "JPEG"),
        "optimised": encode(noise, "JPEG", optimize=True),
    }.items():
        scan = data.index(b"\xff\xda") + 20
        for part in (1, 25, 50, 99):
            with case(name, part):
                cut = data[: scan + (len(data) - scan) * part // 100] + b"\xff\xd9"
                with pytest.raises(
                    InputError,
                    match=r"(?s)JPEG: a part of its picture data is missing \(\d.* % of it was",
                ):
                    load_image(cut)
    assert capfd.readouterr().err == ""


def test_jpeg_that_lost_a_restart_segment_is_refused(capfd):
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    data = encode(noise, "JPEG", restart_marker_rows=1)
    second, third = data.index(b"\xff\xd0"), data.index(b"\xff\xd1")
    assert difference(load_image(data)[0], pillow_rgb(data)) <= 3
    with pytest.raises(InputError, match=r"(?s)picture data is missing \(80\.0 % of.*fix: fetch"):
        load_image(data[:second] + data[third:])
    assert capfd.readouterr().err == ""


def test_jpeg_cut_anywhere_is_refused(capfd):
    for progressive in (False, True):
        with case(progressive):
            data = encode(smooth(), "JPEG", progressive=progressive)
            assert (b"\xff\xc2" in data) == progressive
            for end in range(3, len(data)):
                with pytest.raises(InputError, match=r"truncated JPEG|damaged JPEG|not a picture"):
                    load_image(data[:end])
    assert capfd.readouterr().err == ""


def test_jpeg_of_12_bits_and_lossless_jpeg_are_refused_with_their_kind(capfd):
    data = bytearray(encode(smooth()[..., 0], "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 4] = 12
    with pytest.raises(InputError, match="JPEG of 12 bits with sequential coding, which OpenCV"):
        load_image(data)
    data[frame + 1], data[frame + 4] = 0xC3, 8
    with pytest.raises(InputError, match="JPEG of 8 bits with lossless coding, which OpenCV"):
        load_image(data)
    assert capfd.readouterr().err == ""


# Damage


def test_png_with_a_wrong_checksum_is_refused_before_libpng_prints(capfd):
    data = encode(smooth(), "PNG")
    with_text = data[:33] + struct.pack(">I", 1) + b"tE\1ta" + bytes(4) + data[33:]
    for place in (18, 30, 100, len(data) - 20, None):
        with case(place):
            damaged = bytearray(data if place else with_text)  # a chunk's name is letters
            if place:
                damaged[place] ^= 1
            with pytest.raises(InputError, match=r"(?s)damaged PNG.*fix: fetch or save"):
                load_image(damaged)
    assert capfd.readouterr().err == ""


def test_wrong_checksum_of_a_comment_is_no_damage():
    chunk = struct.pack(">I", 3) + b"tEXta\0b" + struct.pack(">I", zlib.crc32(b"tEXta\0b") ^ 1)
    data = encode(smooth(), "PNG")
    assert np.array_equal(load_image(data[:33] + chunk + data[33:])[0], smooth())


def test_other_kinds_cut_in_half_are_refused_in_silence(capfd):
    for kind in ["BMP", "TIFF", "WEBP", "PPM"]:
        with case(kind):
            data = encode(smooth(), kind)
            with pytest.raises(InputError, match=r"damaged|truncated"):
                load_image(data[: len(data) // 2])
            if OPENCV >= (4, 13):  # older ones print some errors whatever the log level
                assert capfd.readouterr().err == ""


def test_damage_and_formats_that_opencv_lacks_have_different_fixes(monkeypatch):
    decode = runtime.pictures.decode
    monkeypatch.setattr(decode.cv2, "imdecode", lambda *_: None)
    for kind in ("GIF", "WEBP"):
        for version in ((4, 11), (4, 12)):
            monkeypatch.setattr(decode, "OPENCV_VERSION", version)
            lacks = kind == "GIF" and version == (4, 11)
            said = "GIF, and OpenCV .* fix: update" if lacks else "damaged .*, or O.* fix: fetch"
            with case(kind, version), pytest.raises(InputError, match=f"(?s){said}"):
                load_image(encode(smooth(), kind))


def test_other_values_than_the_header_states(monkeypatch):
    """A JPEG 2000 file can state other bits for each channel; what OpenCV returns is checked."""
    files = encode(smooth(), "BMP"), encode(smooth(), "JPEG2000")
    opencv = runtime.pictures.decode.cv2
    monkeypatch.setattr(opencv, "imdecode", lambda *_: np.zeros((4, 5, 3), np.float32))
    with pytest.raises(InputError, match="holds float32 values, wanted uint8 or uint16"):
        load_image(files[0])
    monkeypatch.setattr(opencv, "imdecode", lambda *_: np.full((4, 5, 3), 300, np.uint16))
    picture, _ = load_image(files[1])
    assert picture.dtype == np.uint8 and (picture == 255).all()
