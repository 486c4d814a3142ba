"""The header of every picture format: what whole files of other libraries state, and refusals."""

import io
import struct
import time
import zlib
from dataclasses import astuple

import cv2
import numpy as np
import pytest
import stated_pictures as stated
import tifffile
from cases import case
from picture_files import encode, smooth, tiff_file
from PIL import Image, features

import runtime.pictures.limits
from runtime.errors import InputError
from runtime.pictures.header import read_header
from runtime.pictures.limits import FREE_PIXELS, MAX_PIXELS

RGBA = np.dstack([smooth(), smooth()[..., 0]])
WIDE = smooth()[..., 0].astype(np.uint16) * 257
AVIF = features.check("avif")


def opencv(suffix, picture, *options):
    done, data = cv2.imencode(suffix, picture, options)
    assert done
    return data.tobytes()


def tif(picture, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, picture, **options)
    return file.getvalue()


def facts(data):
    """The kind, bits, channels and alpha of a file of 64 x 40 pixels."""
    kind, height, width, bits, channels, alpha, orientation, _ = astuple(read_header(data, "it"))
    assert (height, width, orientation) == (40, 64, 1)
    return kind, bits, channels, alpha


def mode(name):
    return Image.fromarray(RGBA if "A" in name else smooth()).convert(name)


def whole_files():
    """Yield files that are legal, and what their headers state."""
    grey, rgb = smooth()[..., 0], smooth()
    for name, channels in (("L", 1), ("RGB", 3), ("CMYK", 4)):
        for progressive in (False, True):
            data = encode(mode(name), "JPEG", progressive=progressive)
            yield data, ("JPEG", 8, channels, False)
    for name, bits, channels, alpha in (
        *(("1", 1, 1, False), ("P", 8, 1, False), ("L", 8, 1, False), ("LA", 8, 2, True)),
        *(("RGB", 8, 3, False), ("RGBA", 8, 4, True)),
    ):
        yield encode(mode(name), "PNG"), ("PNG", bits, channels, alpha)
    yield encode(mode("P"), "PNG", transparency=0), ("PNG", 8, 1, True)
    yield opencv(".png", WIDE), ("PNG", 16, 1, False)
    moving = {"save_all": True, "append_images": [mode("L")], "default_image": True}
    yield encode(mode("RGB"), "PNG", **moving), ("PNG", 8, 3, False)
    for name, bits, channels in (("1", 1, 1), ("L", 8, 1), ("P", 8, 1), ("RGB", 8, 3)):
        yield encode(mode(name), "BMP"), ("BMP", bits, channels, False)
    for compression, mask in ((3, 0xFF000000), (3, 0), (0, 0)):
        data = stated.bmp(
            64, 40, bits=32, compression=compression, version=108, data=RGBA.tobytes()
        )
        data = data[:66] + struct.pack("<I", mask) + data[70:]  # of the alpha channel
        yield data, ("BMP", 8, 4, mask > 0)
    for data, bits, channels, alpha in (
        *((encode(mode(n), "TIFF"), 8, c, False) for n, c in (("L", 1), ("RGB", 3), ("CMYK", 4))),
        *((encode(mode(n), "TIFF"), 8, c, True) for n, c in (("LA", 2), ("RGBA", 4))),
        *((encode(mode("1"), "TIFF", compression=c), 1, 1, False) for c in ("group4", "group3")),
        *((encode(mode("RGB"), "TIFF", compression=c), 8, 3, False) for c in ("jpeg", "packbits")),
        (encode(mode("YCbCr"), "TIFF"), 8, 3, False),
        (encode(mode("P"), "TIFF", compression="tiff_lzw"), 8, 1, False),
        *((tif(WIDE, byteorder=o, bigtiff=b), 16, 1, False) for o in "<>" for b in (0, 1)),
        *((tiff_file(rgb, 2, order=o, tile=(16, 16)), 8, 3, False) for o in "<>"),
        (tiff_file(rgb, 2, planar=True, deflate=True), 8, 3, False),
        (tiff_file(RGBA, 2, tags={338: [0]}), 8, 4, False),
    ):
        yield data, ("TIFF", bits, channels, alpha)
    for options in ({"lossless": True}, {"quality": 50}):
        yield encode(mode("RGB"), "WEBP", **options), ("WebP", 8, 3, False)
        yield encode(mode("RGBA"), "WEBP", **options), ("WebP", 8, 4, True)
    moving = {"save_all": True, "append_images": [mode("L").convert("RGB")]}
    yield encode(mode("RGB"), "WEBP", **moving), ("WebP", 8, 3, False)
    yield encode(mode("P"), "GIF"), ("GIF", 8, 1, False)
    used = mode("P").getpixel((5, 5))
    yield encode(mode("P"), "GIF", transparency=used), ("GIF", 8, 1, True)
    yield encode(mode("RGB"), "GIF", **moving), ("GIF", 8, 1, False)
    for name, channels in (("L", 1), ("RGB", 3), ("RGBA", 4)):
        for options in ({}, {"no_jp2": True}, {"tile_size": (16, 16), "num_resolutions": 2}):
            data = encode(mode(name), "JPEG2000", **options)
            yield data, ("JPEG 2000", 8, channels, channels == 4)
    yield encode(Image.fromarray(WIDE), "JPEG2000"), ("JPEG 2000", 16, 1, False)
    for suffix, picture, bits, channels in (
        *((".pbm", grey, 1, 1), (".pgm", grey, 8, 1), (".ppm", rgb, 8, 3), (".pgm", WIDE, 16, 1)),
    ):
        for binary in (0, 1):
            data = opencv(suffix, picture, cv2.IMWRITE_PXM_BINARY, binary)
            yield data, ("PNM", bits, channels, False)
    for picture, bits, channels in ((grey, 8, 1), (rgb, 8, 3), (RGBA, 8, 4), (WIDE, 16, 1)):
        yield opencv(".pam", picture), ("PAM", bits, channels, channels == 4)
    for picture, channels in ((grey, 1), (rgb, 3)):
        yield opencv(".ras", picture), ("Sun raster", 8, channels, False)
    for name, channels in (("L", 1), ("RGB", 3), ("RGBA", 4)) if AVIF else ():
        yield encode(mode(name), "AVIF"), ("AVIF", 8, channels, channels == 4)
    if AVIF:
        yield encode(mode("RGB"), "AVIF", **moving), ("AVIF", 8, 3, False)


WHOLE = list(whole_files())


def test_whole_files_state_what_they_hold():
    assert {expected[0] for _, expected in WHOLE} >= {"JPEG", "PNG", "BMP", "TIFF", "WebP", "GIF"}
    for i, (data, expected) in enumerate(WHOLE):
        with case(i, expected):
            assert facts(data) == expected


def test_orientation_of_every_format():
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", *["AVIF"] * AVIF):
        for orientation in range(1, 9):
            with case(kind, orientation):
                exif = Image.Exif()
                exif[274] = orientation
                data = encode(mode("RGB"), kind, exif=exif)
                assert read_header(data, "it").orientation == orientation
    for orientation in (0, 9, 60000):
        data = tiff_file(smooth(), 2, tags={274: [orientation]})
        assert read_header(data, "it").orientation == 1


def test_the_first_exif_of_a_file_counts():
    exifs = [tiff_file(smooth()[:2, :2], 2, tags={274: [n]}) for n in (6, 3)]
    named = [b"Exif\0\0" + exif for exif in exifs]
    segments = [b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif for exif in named]
    webp = (stated.webp_canvas(9, 9, 8), stated.webp_lossless(9, 9))
    for name, data in (
        ("JPEG", stated.jpeg(9, 9, more=b"".join(segments))),
        ("PNG", stated.png(9, 9, chunks=b"".join(stated.png_chunk(b"eXIf", e) for e in exifs))),
        ("WebP", stated.webp(*webp, *((b"EXIF", exif) for exif in exifs))),
        ("WebP, as in JPEG", stated.webp(*webp, *((b"EXIF", exif) for exif in named))),
    ):
        with case(name):
            assert read_header(data, "it").orientation == 6


def test_largest_value_of_netpbm():
    for data, expected in (
        (b"P5 1 1 100\n\0", 100),
        (b"P5 1 1 255\n\0", 0),
        (b"P6 1 1 4095\n" + bytes(6), 4095),
        (b"P2 # words\n1 1 # more\n100\n0\n", 0),  # OpenCV scales these
        (b"P2 1 1 4095\n0\n", 4095),
        (b"P7\n# words\nWIDTH 1\nHEIGHT 1\nDEPTH 1\nMAXVAL 9\nENDHDR\n\0", 9),
    ):
        with case(data):
            assert read_header(data, "it").maximum == expected


def test_large_pictures_of_one_colour_pass():
    side = 3000
    assert side * side > FREE_PIXELS
    black, rgb = Image.new("L", (side, side)), Image.new("RGB", (side, side))
    bits = Image.new("1", (side, side))
    files = [
        *(encode(picture, "PNG", compress_level=9) for picture in (black, rgb, bits)),
        *(encode(bits, "TIFF", compression=c) for c in ("group4", "group3", "tiff_ccitt")),
        *(
            encode(black, "TIFF", compression=c)
            for c in ("tiff_adobe_deflate", "tiff_lzw", "packbits", "jpeg")
        ),
        tif(np.zeros((side, side), np.uint8), compression="deflate", tile=(1024, 1024)),
        *(encode(black, "JPEG", quality=1, optimize=o) for o in (False, True)),
        encode(rgb, "JPEG", quality=1, progressive=True, optimize=True),
        *(encode(black, "GIF"), encode(rgb, "WEBP", lossless=True), encode(rgb, "WEBP", quality=1)),
        encode(black, "JPEG2000"),
        *(encode(rgb, "AVIF", speed=10, quality=1) for _ in range(AVIF)),
    ]
    for i, data in enumerate(files):
        with case(i, data[:12]):
            header = read_header(data, "it")
            assert (header.height, header.width) == (side, side)


def refused(data, match):
    with case(match, data[:60]), pytest.raises(InputError, match=rf"(?s)^it .*{match}"):
        read_header(data, "it")


def test_other_values_than_whole_numbers_of_16_bits_are_refused():
    grey = smooth()[..., 0]
    signed = bytearray(stated.jpeg2000(64, 40))
    signed[42] |= 0x80
    for data, dtype in (
        (b"PF\n2 2\n-1\n" + bytes(48), "float32"),
        (b"Pf 2 2 1\n" + bytes(16), "float32"),
        (opencv(".hdr", smooth().astype(np.float32)), "float32"),
        (tif(grey.astype(np.float32)), "float32"),
        (tif(grey.astype(np.int16)), "int16"),
        (tif(grey.astype(np.uint32)), "uint32"),
        (stated.tiff(64, 40, {262: [32844]}), "float32"),
        (bytes(signed), "int8"),
    ):
        refused(data, f"holds {dtype} values, wanted 8 or 16 bits per channel.*fix: map the values")


def test_a_cut_file_is_refused_in_every_format():
    for data, (kind, *_) in WHOLE:
        if kind in ("TIFF", "JPEG 2000") or data[:2] in (b"P1", b"P2", b"P3"):
            continue  # the decoder sees where the data end
        with case(kind):
            for size in (len(data) // 2, 30):
                with pytest.raises(InputError, match=f"is a (truncated|damaged) {kind}"):
                    read_header(data[:size], "it")


def test_every_length_and_every_damaged_byte_is_a_header_or_an_input_error():
    rng = np.random.default_rng(0)
    files = [data[:600] for data, _ in WHOLE] + [data[-600:] for data, _ in WHOLE]
    files += [stated.avif(64, 40), stated.avif(9, 9, inside=True), stated.jpeg2000(64, 40)]
    files += [stated.avif_track(9, 9, (9, 9), (9, 9)), stated.jp2(9, 9, stated.jpeg2000(9, 9))]
    for data in files:
        for _ in range(60):
            damaged = bytearray(data[: rng.integers(len(data) + 1)])
            for _ in range(rng.integers(4) if damaged else 0):
                damaged[rng.integers(len(damaged))] = rng.choice([0, 1, 127, 128, 255])
            try:
                header = read_header(bytes(damaged), "it")
            except InputError as error:
                assert str(error).startswith("it ")
                continue
            assert 1 <= header.height * header.width <= MAX_PIXELS and 1 <= header.bits <= 16


def test_the_limit_is_inclusive(monkeypatch):
    for limit in (40 * 64, 40 * 64 - 1):
        monkeypatch.setattr(runtime.pictures.limits, "MAX_PIXELS", limit)
        for data, expected in WHOLE:
            with case(limit, expected):
                if limit == 40 * 64:
                    read_header(data, "it")
                else:
                    refused(data, "64 x 40 pixels, wanted at most 2559")


def test_a_size_of_zero_is_refused():
    for make in (
        *(stated.png, stated.jpeg, stated.gif, stated.bmp, stated.tiff, stated.jpeg2000),
        *(stated.pam, stated.sun_raster, lambda w, h: b"P5 %d %d 255\n" % (w, h), stated.avif),
    ):
        for size in ((0, 5), (5, 0)):
            if make is stated.jpeg2000 and 0 in size:
                refused(make(*size), "damaged JPEG 2000: it states a size of")
            elif make is not stated.avif:
                refused(make(*size), f"it states a size of {size[0]} x {size[1]} pixels")
    refused(stated.avif(0, 5, (1, 1)), "it states a size of 0 x 5 pixels")


# One format after the other


def test_jpeg():
    refused(b"\xff\xd8\xff\xd9", "damaged JPEG: it has no frame header")
    refused(stated.jpeg(8, 8, scans=0, data=b"")[:-2], "truncated JPEG: its end marker")
    refused(stated.jpeg(16000, 16000), r"truncated JPEG: \d+ bytes, wanted at least 500000")
    whole = stated.jpeg(2048, 2048, frame=0xC2, scans=4096)  # blocks: 256 * 256 = 2**16
    assert read_header(whole, "it").width == 2048
    refused(
        stated.jpeg(2048, 2048, frame=0xC2, scans=4097), "damaged JPEG: it has too many scans, 4097"
    )
    of_two_channels = whole.replace(b"\xff\xda\0\x08\1", b"\xff\xda\0\x08\2")
    refused(of_two_channels, "damaged JPEG: it has too many scans, 2049 or more")
    for frame in (0xC1, 0xC3):
        refused(stated.jpeg(16000, 16000, frame=frame), "truncated JPEG: .* wanted at least")
    arithmetic = stated.jpeg(16000, 16000, frame=0xC9)  # of one colour
    assert read_header(arithmetic, "it").width == 16000
    refused(stated.jpeg(2048, 2048, frame=0xCA, scans=4097), "it has too many scans, 4097 or more")
    second = b"\xff\xc1" + struct.pack(">HBHHBBBB", 11, 8, 30000, 30000, 1, 1, 0x11, 0)
    refused(stated.jpeg(8, 8, more=second), "30000 x 30000 pixels")


def test_segments_are_limited():
    gif = stated.gif(9, 9, (9, 9))
    for kind, make in (
        ("JPEG", lambda count: stated.jpeg(8, 8, more=b"\xff\xfe\0\2" * (count - 6))),
        ("GIF", lambda count: gif[:19] + b"!\xfe\0" * (count - 1) + gif[19:]),
    ):
        assert read_header(make(2**16), "it").kind == kind
        refused(make(2**16 + 1), f"damaged {kind}: it has more than 65536 segments")


def test_sides_are_limited():
    for make in (stated.png, lambda *size: stated.tiff(*size, data=bytes(10**6))):
        for size in ((10**6, 1), (1, 10**6)):
            assert read_header(make(*size), "it").width == size[0]
        refused(make(10**6 + 1, 1), "has 1000001 x 1 pixels, wanted at most 1000000 on each side")
        refused(make(1, 10**6 + 1), "has 1 x 1000001 pixels, wanted at most 1000000 on each side")


def test_markers_of_jpeg_are_searched_in_linear_time():
    start = time.perf_counter()
    refused(b"\xff\xd8\xff" + b"\xff" * 5_000_000, "truncated JPEG")
    refused(b"\xff\xd8\xff" + b"\xff\xff\0" * 2_000_000, "truncated JPEG")
    assert time.perf_counter() - start < 3


def test_png():
    refused(stated.png(8, 8)[:-12], "truncated PNG: its end marker is missing")
    header = stated.png(8, 8)[8:33]
    refused(stated.png(8, 8, chunks=header), "damaged PNG: its first chunk must be IHDR")
    refused(stated.png(8, 8)[:8] + stated.png(8, 8)[33:], "damaged PNG: its first chunk must be")
    refused(stated.png(8, 8, bits=17), "damaged PNG: it states 3 channels of 17 bits")
    refused(stated.png(9, 9, chunks=stated.png_frame(30000, 30000)), "30000 x 30000 pixels")
    refused(stated.png(16000, 16000), r"damaged PNG: \d+ bytes cannot hold 16000 x 16000 pixels")


def test_texts_of_png_are_limited():
    text = zlib.compress(bytes(2**20))
    chunk = stated.png_chunk(b"zTXt", b"k\0\0" + text)
    assert read_header(stated.png(8, 8, chunks=chunk * 64), "it").width == 8
    for kind, start in ((b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"iCCP", b"k\0\0")):
        chunk = stated.png_chunk(kind, start + text)
        refused(stated.png(8, 8, chunks=chunk * 65), "more than 67108864 bytes of texts and colour")
    plain = stated.png_chunk(b"iTXt", b"k\0\0\0\0\0" + bytes(2**20))
    refused(stated.png(8, 8, chunks=plain * 65), "more than 67108864 bytes of texts")
    small = stated.png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"words"))  # as 2**14 bytes each
    assert read_header(stated.png(8, 8, chunks=small * 4096), "it").width == 8
    refused(stated.png(8, 8, chunks=small * 4097), "more than 67108864 bytes of texts")
    for body in (b"k\0\0not deflate", b"", b"k", b"k\0\1"):
        chunks = stated.png_chunk(b"zTXt", body) + stated.png_chunk(b"iTXt", body)
        assert read_header(stated.png(8, 8, chunks=chunks), "it").width == 8


def test_gif():
    assert read_header(stated.gif(9, 9, flags=1), "it").alpha
    refused(b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0) + b";", "it contains no picture")
    refused(stated.gif(9, 9, (30000, 30000)), "30000 x 30000 pixels")
    refused(stated.gif(16000, 16000), "its first frame has 1 x 1 pixels of 16000 x 16000")
    refused(stated.gif(16000, 16000, (16000, 16000)), "damaged GIF: 4 bytes cannot hold")
    assert read_header(stated.gif(4000, 4000, (1000, 1000)), "it").width == 4000  # a sixteenth
    refused(stated.gif(4000, 4000, (999, 1000)), "its first frame has 999 x 1000 pixels of")
    data = bytes(2 * 81 + 4096)
    assert read_header(stated.gif(9, 9, (9, 9), data=data), "it").width == 9
    refused(stated.gif(9, 9, (9, 9), data=data + b"\0"), "9 x 9 pixels have 4259 bytes of data")


def test_bmp():
    for version in (12, 40, 108, 124):
        header = read_header(stated.bmp(5, 7, data=bytes(16 * 7), version=version), "it")
        assert (header.height, header.width) == (7, 5)
    assert read_header(stated.bmp(5, -7, data=bytes(16 * 7)), "it").height == 7  # top to bottom
    refused(stated.bmp(5, -(2**31)), "5 x 2147483648 pixels")
    refused(stated.bmp(-5, 7), "it states a size of -5 x 7 pixels")
    refused(stated.bmp(5, 7, bits=13), "it states 13 bits per pixel")
    refused(stated.bmp(5, 7), r"truncated BMP: 56 bytes, wanted at least 165")
    for mask in (0, 0xFF000000):  # of alpha, behind the header
        masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, mask)
        data = stated.bmp(1, 1, bits=32, compression=6, data=masks + bytes(4))
        assert read_header(data, "it").alpha == (mask > 0)
    run_lengths = stated.bmp(2048, 2048, bits=8, compression=1)
    assert read_header(run_lengths, "it").width == 2048  # up to FREE_PIXELS
    refused(stated.bmp(2049, 2048, bits=8, compression=1), "truncated BMP: 1080 bytes, wanted")


def test_tiff():
    for order in "<>":
        for big in (False, True):
            data = stated.tiff(5, 7, data=bytes(35), order=order, big=big)
            assert read_header(data, "it").height == 7
            refused(stated.tiff(5, 7, data=bytes(34), order=order, big=big)[:52], "damaged TIFF")
            refused(stated.tiff(30000, 30000, order=order, big=big), "30000 x 30000 pixels")
    refused(stated.tiff(5, 7, {277: [0]}, data=bytes(35)), "it states 0 channels of 8 bits")
    refused(stated.tiff(5, 7, {256: None}), "damaged TIFF: it states no size")
    refused(b"II*\0\xff\xff\xff\xff", "damaged TIFF: it states no size")
    sampled = stated.tiff(64, 64, {262: [6], 277: [3], 530: [2, 2]}, data=bytes(6144))  # 4:2:0
    assert read_header(sampled, "it").channels == 3
    tile = {273: None, 279: None, 278: None, 324: [16], 325: [9]}
    refused(stated.tiff(9, 9, tile | {322: [30000], 323: [30000]}), "30000 x 30000 pixels")
    refused(stated.tiff(9, 9, tile | {322: [0], 323: [16]}), "it states a size of 0 x 16")
    for compression, wanted in (
        *((1, 256000000), (5, 93738), (7, 250000), (8, 248062), (32773, 4000000)),
        *((2, 2000), (3, 2000), (4, 2000)),
    ):
        tags = {259: [compression]}
        refused(stated.tiff(16000, 16000, tags), f"truncated TIFF: .*at least {wanted}")
        refused(stated.tiff(9, 9, tags | tile | {322: [16000], 323: [16000]}), "truncated TIFF")


def test_tags_of_tiff_of_every_type_are_seen():
    for kind, form in ((1, "B3x"), (3, "H2x"), (4, "I"), (6, "b3x"), (8, "h2x"), (9, "i")):
        data = bytearray(stated.tiff(9, 9, data=bytes(81)))
        place = struct.unpack_from("<I", data, 4)[0] + 2
        struct.pack_into("<HHI" + form, data, place, 256, kind, 1, 100)
        with case(kind):
            refused(bytes(data), "truncated TIFF: .* wanted at least 900")
    for kind in (2, 5, 7, 13):
        struct.pack_into("<HHII", data, place, 256, kind, 1, 100)
        refused(bytes(data), "damaged TIFF: it states no size")


def test_webp():
    canvas, frame = stated.webp_canvas, stated.webp_frame
    whole = stated.webp(stated.webp_lossless(16000, 16000))
    assert read_header(whole, "it").width == 16000  # of one colour
    refused(whole[:-1], "truncated WebP: .* wanted at least 34")
    refused(stated.webp(stated.webp_lossy(16000, 16000)), "truncated WebP: .* at least 250000")
    refused(stated.webp(canvas(9, 9)), "it contains no picture")
    refused(stated.webp(canvas(30000, 30000), stated.webp_lossless(9, 9)), "30000 x 30000 pixels")
    picture = frame(9, 9, stated.webp_lossless(9, 9))
    assert read_header(stated.webp(canvas(99, 99, 2), picture), "it").width == 99
    refused(stated.webp(canvas(16000, 16000, 2), picture), "its first frame has 9 x 9 pixels of")
    picture = frame(30000, 30000, stated.webp_lossless(9, 9))
    refused(stated.webp(canvas(9, 9, 2), picture), "30000 x 30000 pixels")


def test_jpeg_2000():
    for make in (
        stated.jpeg2000,
        lambda *size, **o: stated.jp2(*size, stated.jpeg2000(*size, **o)),
    ):
        assert read_header(make(16000, 16000), "it").width == 16000  # of one colour
        refused(make(30000, 30000), "30000 x 30000 pixels")
        refused(make(9, 9, channels=5), "has 5 channels per pixel, wanted 1 to 4")
        refused(make(255, 255, tile=(1, 1)), "it has 65025 tiles for 255 x 255 pixels")
        assert read_header(make(16, 16, tile=(1, 1)), "it").width == 16  # 256 tiles
        refused(make(17, 16, tile=(1, 1)), "it has 272 tiles for 17 x 16 pixels")
        refused(make(9, 9, tile=(0, 1)), "its tiles have no size")
        refused(make(16000, 16000, tile=(64, 64)), "truncated JPEG 2000: .* at least 875000")
        refused(make(2000, 2000, levels=1, precincts=b"\x11\x11"), "precincts for 2000 x 2000")
        one_pixel = {"levels": 0, "precincts": b"\0"}
        assert read_header(make(60, 60, **one_pixel), "it").width == 60  # 3600 precincts
        refused(make(60, 60, channels=3, **one_pixel), "it has 3600 precincts for 60 x 60 pixels")
        refused(make(2000, 2000, block=0), "it has code blocks of 16 pixels")
        refused(make(9, 9, block=5), r"code blocks of 2\*\*14 pixels")
        refused(make(9, 9, levels=33), "it states 33 levels")
        small = {"channels": 3, "levels": 0, "precincts": b"\x55"}
        refused(make(3200, 3200, **small), "it has 10000 precincts for 3200 x 3200 pixels")
        assert read_header(make(3200, 3200, **small, data=bytes(30000)), "it").width == 3200
        refused(make(3000, 3000, block=1), "code blocks of 64 pixels, and 100 bytes of data")
        many = {"block": 1, "data": bytes(32000)}  # 140625 blocks of at most 2**17 + 2197 + 8000
        assert read_header(make(3000, 3000, **many), "it").width == 3000
        refused(make(9, 9, data=b""), "damaged JPEG 2000: its tiles contain no data")
        open_ended = make(9, 9, data=b"").replace(struct.pack(">I", 14), bytes(4))
        refused(open_ended, "its tiles contain no data")  # the tile lasts to the end of the file
        assert read_header(make(16384, 16384, channels=4, data=b"\0"), "it").channels == 4
    assert read_header(stated.jpeg2000(500, 500, block=1, precincts=b"\x88" * 6), "it").width == 500
    style = bytes([1, 0, 0, 1, 0, 0, 4, 4, 0, 1, 0])
    for marker, body in ((b"\xff\x52", style), (b"\xff\x53", b"\0" + style[:1] + style[5:])):
        later = marker + struct.pack(">H", 2 + len(body)) + body  # in the header of a tile
        refused(stated.jpeg2000(2000, 2000, later=later), "precincts for 2000 x 2000 pixels")
    refused(stated.jpeg2000(9, 9, later=b"\xff\x30"), "the marker 30 in a wrong place")
    refused(stated.jpeg2000(9, 9, later=b"\xff\x52\0\4\0\0"), "a coding style is too short")
    refused(stated.jpeg2000(9, 9, later=b"\xff\x64\0\1"), "the length of a marker is too small")
    refused(
        stated.jp2(30000, 9, stated.jpeg2000(9, 9)).replace(b"ihdr" + bytes(3), b"ihdr\xff\0\0"),
        "30000 x 4278190089 pixels",
    )
    refused(stated.jp2(9, 9, b"xxxx"), "its codestream does not begin with a size")
    refused(stated.jp2(9, 9, b"")[:-8], "it contains no codestream")
    refused(stated.jp2(9, 9, b"")[:-8] + b"\0\0\0\7jp2c", "the length of a box is wrong")
    for channels in (3, 255):
        palette = stated.box(b"pclr", struct.pack(">HB", 1, channels), b"\7" * 2 * channels)
        data = stated.jp2(9, 9, stated.jpeg2000(9, 9), palette)
        if channels == 3:
            assert read_header(data, "it").channels == 1
        else:
            refused(data, "its palette has more than 4 channels")
    for kind in (0, 1, 2):  # a colour, alpha, alpha by which the colours are multiplied
        alpha = stated.box(b"cdef", struct.pack(">H6H", 2, 0, 0, 1, 1, kind, 0))
        data = stated.jp2(9, 9, stated.jpeg2000(9, 9, channels=2), alpha)
        assert read_header(data, "it").alpha == (kind > 0)


def test_avif():
    for inside in (False, True):
        assert read_header(stated.avif(16000, 16000, inside=inside), "it").width == 16000
        assert read_header(stated.avif(63, 39, (64, 40), inside=inside), "it").width == 63
        refused(stated.avif(30000, 30000, inside=inside), "30000 x 30000 pixels")
        refused(stated.avif(9, 9, (30000, 30000), inside=inside), "30000 x 30000 pixels")
        smaller = stated.avif(16000, 16000, (16, 16), inside=inside)
        refused(smaller, "it states 16000 x 16000 pixels, its frame 16 x 16")
        refused(stated.avif(9, 9, (8, 9), inside=inside), "its frame 8 x 9")
        refused(stated.avif(9, 9, (9, 8), inside=inside), "its frame 9 x 8")
    second = stated.box(b"ispe", struct.pack(">III", 0, 30000, 30000))
    refused(stated.avif(9, 9, more=[second]), "30000 x 30000 pixels")
    whole = stated.avif(9, 9)
    for name, match in (
        (b"pitm", "a box is missing"),
        (b"infe", "it contains no picture"),
        (b"ispe", "a picture states no size"),
        (b"meta", "it contains no picture"),
    ):
        refused(whole.replace(name, b"free"), match)
    refused(whole.replace(b"av01", b"grid").replace(b"ispe", b"free"), "it states no size")
    refused(whole.replace(stated.sequence_header(9, 9)[:2], b"\x32\0"), "not begin with a sequence")
    place = whole.index(b"iloc") + 10
    refused(whole[:place] + b"\xff\xff" + whole[place + 2 :], "it has more than 8448 items")
    refused(whole[:place] + b"\x20\xff" + whole[place + 2 :], "damaged|truncated")
    place = whole.index(b"ipma") + 8
    refused(whole[:place] + b"\xff\xff" + whole[place + 2 :], "it has more than 8448 items")
    refused(whole[:place] + b"\0\0\x20" + whole[place + 3 :], "damaged|truncated")


def test_items_of_avif_are_limited():
    assert read_header(stated.avif(9, 9, items=8448), "it").width == 9
    refused(stated.avif(9, 9, items=8449), "damaged AVIF: it has more than 8448 items")


def test_tracks_of_avif():
    track = stated.avif_track
    assert read_header(track(9, 7, (9, 7), (9, 7)), "it").height == 7
    data = track(9, 7, (9, 7), (9, 7)).replace(b"avisavif", b"avismsf1")
    assert read_header(data, "it").height == 7
    refused(track(16000, 16000, (16, 16), (16, 16)), "a track states the sizes")
    refused(track(16000, 16000, (16000, 16000), (16, 16)), "its frame 16 x 16")
    refused(track(30000, 30000, (9, 9), (9, 9)), "30000 x 30000 pixels")
    refused(track(9, 9, (30000, 30000), (9, 9)), "30000 x 30000 pixels")
    refused(track(9, 9, (9, 9), (30000, 30000)), "30000 x 30000 pixels")


def test_netpbm():
    refused(b"P5 ", "damaged PNM: its header must consist of numbers")
    refused(b"P5 2 x 255\n", "damaged PNM: its header must consist of numbers")
    for largest in (0, 65536):
        refused(b"P5 2 2 %d\n" % largest, f"its largest value is {largest}, wanted 1 to 65535")
    refused(b"P5 " + b"9" * 5000 + b" 1 255\n", "10000000000 x 1 pixels")
    refused(b"P5" + b"#\n" * 10**6, "damaged PNM")
    for kind, size in ((1, 4 + 8), (2, 8 + 16), (3, 8 + 48), (4, 5 + 2), (5, 9 + 8), (6, 9 + 24)):
        head = b"P%d 4 2%s" % (kind, b"" if kind in (1, 4) else b" 99")
        refused(
            head + b"\n", f"truncated PNM: .* wanted at least {len(head) + size - len(head)}|at"
        )
    refused(b"P7\nWIDTH 3\n", "damaged PAM: its header has no line ENDHDR")
    refused(b"P7\nWIDTH 3\nENDHDR\n", "its header must state HEIGHT, WIDTH, DEPTH and MAXVAL")
    refused(stated.pam(9, 9).replace(b"MAX", b"WIDTH 3\nMAX"), "states a field twice")
    words = stated.pam(1, 1).replace(b"MAX", b"TUPLTYPE RGB\nTUPLTYPE words\nMAX")
    assert read_header(words + bytes(3), "it").channels == 3  # these lines are one text
    refused(stated.pam(9, 9, 5), "its depth is 5 and its largest value 255")
    refused(stated.pam(9, 9).replace(b"255", b"65536"), "its largest value 65536")
    refused(stated.pam(9, 9), "truncated PAM: 46 bytes, wanted at least 289")


def test_sun_raster():
    refused(stated.sun_raster(9, 9), "truncated Sun raster: 32 bytes, wanted at least 284")
    refused(stated.sun_raster(9, 9, bits=16), "it states 16 bits per pixel")
    assert read_header(stated.sun_raster(9, 9, 8, encoding=2), "it").bits == 8
    refused(stated.sun_raster(16000, 16000, 8, 2), "truncated Sun raster: .* at least 3000000")
    refused(stated.sun_raster(9, 2**32 - 1), "9 x 4294967295 pixels")
