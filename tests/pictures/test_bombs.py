"""Small files that state large pictures are refused at once and without memory, at the door that
users have. A fresh process refuses all of them, so that its peak of memory can be read."""

import json
import pickle
import struct
import subprocess
import sys
import zlib

import pytest
import stated_pictures as stated

from runtime.pictures.tiff import REVERSED

SECONDS, MEBIBYTES = 3, 64
CHILD = """
import json, pickle, sys, time
from runtime.errors import InputError
from runtime.pictures.load import load_image

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

def refuse(data):
    start = time.perf_counter()
    try:
        load_image(data)
        said = ""
    except InputError as error:
        said = str(error)
    return said, time.perf_counter() - start, peak()

cases = pickle.load(open(sys.argv[1], "rb"))
refuse(b"x")
before = peak()
for name, data in cases:
    said, seconds, after = refuse(data)
    print(json.dumps([name, said, seconds, (after - before) / 1024]), flush=True)
"""
EMPTY = zlib.compress(bytes(1000))
COMPRESSIONS = (
    *((1, 8, EMPTY), (2, 1, b"\x35"), (3, 1, b"\0\1"), (4, 1, b"\0\x10\1\0\x10\1")),
    *((5, 8, b"\x80\0\x20\x10"), (6, 8, b"\xff\xd8\xff\xd9"), (7, 8, b"\xff\xd8\xff\xd9")),
    *((8, 8, EMPTY), (32946, 8, EMPTY), (32766, 2, b"x"), (32773, 8, b"\x81\0" * 10)),
    *((32809, 4, b"x"), (34661, 1, b"x"), (34676, 16, b"x"), (34677, 8, b"x"), (34712, 8, b"x")),
    *((34887, 8, b"Lerc2 "), (34925, 8, b"\xfd7zXZ\0"), (50000, 8, b"\x28\xb5\x2f\xfd\0\0")),
    (50001, 8, b"RIFF"),
)
TILE = {273: None, 278: None, 279: None, 324: [16]}


def stated_sizes():
    """Yield a name and a file that states too large a size, in every format and in every place."""
    for n in (30000, 65535):
        yield f"JPEG {n}", stated.jpeg(n, n)
        yield f"JPEG, progressive {n}", stated.jpeg(n, n, frame=0xC2)
        second = b"\xff\xc2" + struct.pack(">HBHHBBBB", 11, 8, n, n, 1, 1, 0x11, 0)
        yield f"JPEG, second frame {n}", stated.jpeg(8, 8, more=second)
        yield f"GIF screen {n}", stated.gif(n, n)
        yield f"GIF screen and picture {n}", stated.gif(n, n, (n, n))
        yield f"GIF picture {n}", stated.gif(9, 9, (n, n))
        yield f"BMP, old {n}", stated.bmp(n, n, bits=8, version=12)
        yield f"AVIF, track {n}", stated.avif_track(n, n, (n, n), (n, n))
        yield f"AVIF, frame {n}", stated.avif(9, 9, (n, n))
    for n in (30000, 2**24):
        canvas, picture = stated.webp_canvas, stated.webp_lossless(9, 9)
        yield f"WebP canvas {n}", stated.webp(canvas(n, n), picture)
        frame = stated.webp_frame(9, 9, picture)
        yield f"WebP animation {n}", stated.webp(canvas(n, n, 2), frame)
        frame = stated.webp_frame(n, n, picture)
        yield f"WebP frame {n}", stated.webp(canvas(9, 9, 2), frame)
    for n in (30000, 2**31 - 1):
        for bits, compression in ((1, 0), (4, 2), (8, 1), (16, 3), (24, 0), (32, 0)):
            data = stated.bmp(n, n, bits=bits, compression=compression)
            yield f"BMP {bits} bits {compression} {n}", data
        yield f"BMP, top down {n}", stated.bmp(n, -n - 1, bits=8, compression=1)
    for n in (30000, 2**31 - 1, 2**32 - 1):
        for compression, bits, data in COMPRESSIONS:
            for order in "<>":
                tags = {259: [compression], 258: [bits]}
                yield f"TIFF {compression} {n}", stated.tiff(n, n, tags, data=data, order=order)
        yield f"BigTIFF {n}", stated.tiff(n, n, {259: [8]}, data=EMPTY, big=True)
        for compression in (1, 8):
            tags = TILE | {259: [compression], 322: [n], 323: [n], 325: [len(EMPTY)]}
            yield f"TIFF tile {compression} {n}", stated.tiff(99, 99, tags, data=EMPTY)
        yield f"PNG {n}", stated.png(n, n)
        yield f"PNG frame {n}", stated.png(9, 9, chunks=stated.png_frame(n, n))
        yield f"JPEG 2000 {n}", stated.jpeg2000(n, n, channels=3)
        yield f"JPEG 2000, boxes {n}", stated.jp2(n, n, stated.jpeg2000(9, 9))
        yield f"JPEG 2000, in boxes {n}", stated.jp2(9, 9, stated.jpeg2000(n, n))
        yield f"AVIF {n}", stated.avif(n, n, (9, 9))
        yield f"Sun raster {n}", stated.sun_raster(n, n)
        yield f"Sun raster, run lengths {n}", stated.sun_raster(n, n, 8, 2)
    for n in (30000, 2**31 - 1, 10**30):
        for kind in range(1, 7):
            yield f"PNM {kind} {n}", b"P%d\n# words\n%d %d\n255\n0 1 2 3" % (kind, n, n)
        yield f"PAM {n}", stated.pam(n, n)
        yield f"PAM depth {n}", stated.pam(9, 9, n)
        yield f"PFM {n}", b"PF\n%d %d\n-1\n" % (n, n)
        yield f"HDR {n}", b"#?RGBE\nFORMAT=32-bit_rle_rgbe\n\n-Y %d +X %d\n" % (n, n)


def missing_data():
    """Yield a name and a file that states an allowed size without the data for it."""
    n = 16000
    yield "GIF screen", stated.gif(n, n)
    yield "GIF", stated.gif(n, n, (n, n))
    yield "JPEG", stated.jpeg(n, n)
    yield "JPEG, progressive", stated.jpeg(n, n, frame=0xC2)
    yield "PNG", stated.png(n, n)
    for bits, compression in ((1, 0), (4, 2), (8, 1), (16, 3), (24, 0), (32, 0)):
        yield f"BMP {bits} {compression}", stated.bmp(n, n, bits=bits, compression=compression)
    for compression, bits, data in COMPRESSIONS:
        tags = {259: [compression], 258: [bits]}
        yield f"TIFF {compression}", stated.tiff(n, n, tags, data=data)
    strips = {259: [8], 278: [10], 273: [16] * 1600, 279: [500] * 1600}  # one strip, many times
    yield "TIFF, one strip", stated.tiff(n, n, strips, data=zlib.compress(bytes(10 * n)))
    for compression in (1, 8):
        for side in (1, 16, n):
            tags = TILE | {259: [compression], 322: [side], 323: [side], 325: [len(EMPTY)]}
            size = 99 if side == n else n
            yield f"TIFF tile {compression} {side}", stated.tiff(size, size, tags, data=EMPTY)
    yield "WebP, lossy", stated.webp(stated.webp_lossy(n, n))
    frame = stated.webp_frame(9, 9, stated.webp_lossless(9, 9))
    yield "WebP, animation", stated.webp(stated.webp_canvas(n, n, 2), frame)
    yield "AVIF", stated.avif(n, n, (16, 16))
    yield "AVIF, inside", stated.avif(n, n, (16, 16), inside=True)
    yield "AVIF, track", stated.avif_track(n, n, (n, n), (16, 16))
    for kind in range(1, 7):
        yield f"PNM {kind}", b"P%d\n%d %d\n%s" % (kind, n, n, b"" if kind in (1, 4) else b"255\n")
    yield "PAM", stated.pam(n, n, 4)
    yield "Sun raster", stated.sun_raster(n, n)
    yield "Sun raster, run lengths", stated.sun_raster(n, n, 8, 2)


def other_multipliers():
    """Yield a name and a small file that would take seconds or gigabytes for another reason."""
    yield "JPEG, scans", stated.jpeg(4000, 4000, frame=0xC2, scans=10000, data=b"")
    text = zlib.compress(bytes(7_900_000))
    for kind, start in ((b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"iCCP", b"k\0\0")):
        yield f"PNG {kind}", stated.png(9, 9, chunks=stated.png_chunk(kind, start + text) * 100)
    yield "GIF, clear codes", stated.gif(9, 9, (9, 9), data=b"\0\3\4\x18\x20\x40\x80\0\1" * 100000)
    for tile in (1, 10):
        data = stated.jpeg2000(255 * tile, 255 * tile, tile=(tile, tile), channels=3)
        yield f"JPEG 2000, tiles {tile}", data
    palette = stated.box(b"pclr", struct.pack(">HB", 2, 255), b"\7" * 255, bytes(510))
    channels = stated.box(b"cmap", *(struct.pack(">HBB", 0, 1, i) for i in range(255)))
    data = stated.jp2(2000, 2000, stated.jpeg2000(2000, 2000), palette, channels)
    yield "JPEG 2000, palette", data
    yield "JPEG 2000, channels", stated.jpeg2000(1000, 1000, channels=16384)
    yield "JPEG 2000, precincts", stated.jpeg2000(2000, 2000, levels=0, precincts=b"\0")
    yield "JPEG 2000, code blocks", stated.jpeg2000(4000, 4000, block=0)
    for n, block, channels in ((2048, 1, 3), (16384, 1, 3), (16384, 1, 4), (16384, 4, 4)):
        for data in [b""] if block == 4 else [b"", b"\0", bytes(10000)]:
            made = stated.jpeg2000(n, n, block=block, channels=channels, data=data)
            yield f"JPEG 2000, {n} {block} {channels}, {len(data)} bytes", made
    for precincts in (b"\x55" * 6, b"\x65" * 6):
        yield "JPEG 2000, many precincts", stated.jpeg2000(16384, 16384, precincts=precincts)
    yield "BMP, moves", stated.bmp(11585, 11585, bits=8, compression=1, data=b"\0\2\0\0" * 270_000)
    # All tiles overlap, the last one is wrong, and the bits of each byte are in reverse.
    starts = {324: [16] * 65535 + [50], 325: [300_000] * 65536, 322: [16], 323: [16]}
    tags = TILE | {259: [8], 266: [2]} | starts
    data = zlib.compress(bytes(256)).translate(REVERSED) + bytes(300_050)
    yield "TIFF, overlapping tiles", stated.tiff(4096, 4096, tags, data=data)
    yield "AVIF, items", stated.avif(9, 9, items=60000)
    yield "a run of FF", b"\xff\xd8\xff" + b"\xff" * 2**20


@pytest.mark.parametrize("make", [stated_sizes, missing_data, other_multipliers])
def test_a_small_file_is_refused_at_once_and_without_memory(make, tmp_path):
    cases = list(make())
    assert sum(len(data) for _, data in cases) < 2**23
    (tmp_path / "cases").write_bytes(pickle.dumps(cases))
    command = [sys.executable, "-c", CHILD, str(tmp_path / "cases")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    bad = [
        f"{name}: {seconds:.1f} s, {mebibytes:.0f} MiB, {said.splitlines()[:1]}"
        for name, said, seconds, mebibytes in results
        if not said or seconds > SECONDS or mebibytes > MEBIBYTES
    ]
    assert not bad and done.returncode == 0, "\n".join([*bad, done.stderr])
    assert [name for name, *_ in results] == [name for name, _ in cases]
    assert done.stderr == ""  # no library was reached that prints
