"""Picture files that the tests write: with Pillow, and byte by byte where Pillow cannot."""

import io
import struct
import zlib

import cv2
import numpy as np
from PIL import Image, ImageOps

OPENCV = tuple(int(part) for part in cv2.__version__.split(".")[:2])


def smooth(height=40, width=64):
    """Draw a picture that JPEG keeps well and that no flip or channel swap leaves as it is."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 3, y * 4, x + y], axis=-1).astype(np.uint8)


def encode(picture, kind, **options):
    """Return the bytes of a file that Pillow writes of an array or a picture of PIL."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def pillow_rgb(data):
    """Return the (H, W, 3) uint8 RGB that Pillow reads of a file, turned upright."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def difference(a, b):
    """Return the largest difference of two uint8 pictures of one size."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return int(np.abs(a.astype(int) - b).max())


def read_by_opencv(data):
    """Return whether the installed OpenCV reads a file at all."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) is not None


def tiff_file(pixels, photometric, *, tile=None, planar=False, deflate=False, order="<", tags=None):
    """Return the bytes of a TIFF file.

    ``pixels`` are (H, W) or (H, W, C) of any dtype. ``tile`` is the height and width of tiles; else
    strips of 7 rows are written. ``planar`` stores one channel after the other. ``tags`` adds tags
    or replaces them: a list of numbers for each, or None to leave the tag out.
    """
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    height, width, channels = pixels.shape
    bits, form = 8 * pixels.dtype.itemsize, {"u": 1, "i": 2, "f": 3, "c": 6}[pixels.dtype.kind]
    high, wide = tile or (7, width)
    if tile:
        below, right = -height % high, -width % wide
        pixels = np.pad(pixels, ((0, below), (0, right), (0, 0)), mode="edge")
    blocks = [
        plane[y : y + high, x : x + wide].astype(pixels.dtype.newbyteorder(order)).tobytes()
        for plane in (np.split(pixels, channels, axis=2) if planar else [pixels])
        for y in range(0, height, high)
        for x in range(0, width, wide)
    ]
    if deflate:
        blocks = [zlib.compress(block) for block in blocks]
    starts = np.cumsum([8] + [len(block) for block in blocks]).tolist()
    entries = {
        **{256: [width], 257: [height], 258: [bits] * channels, 259: [8 if deflate else 1]},
        **{262: [photometric], 277: [channels], 284: [1 + planar], 339: [form] * channels},
        **({322: [wide], 323: [high]} if tile else {278: [high]}),
        **{324 if tile else 273: starts[:-1], 325 if tile else 279: [len(b) for b in blocks]},
    }
    entries |= tags or {}
    entries = {tag: entries[tag] for tag in sorted(entries) if entries[tag] is not None}
    body, later, place = b"", b"", starts[-1] + starts[-1] % 2
    for tag, values in entries.items():
        long = tag in (273, 279, 324, 325)
        raw = struct.pack(f"{order}{len(values)}{'I' if long else 'H'}", *values)
        if len(raw) > 4:  # stored behind the directory
            at = place + 2 + 12 * len(entries) + 4 + len(later)
            raw, later = struct.pack(order + "I", at), later + raw
        body += struct.pack(order + "HHI", tag, 4 if long else 3, len(values)) + raw.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", place)
    directory = struct.pack(order + "H", len(entries)) + body + bytes(4) + later
    return (head + b"".join(blocks)).ljust(place, b"\0") + directory


def png_file(pixels, *, bits=0, chunks=()):
    """Return the bytes of a PNG file of 1 to 16 bits, from (H, W) or (H, W, C).

    ``chunks`` are pairs of a name and a body, which are written before the pixels.
    """
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    height, width, channels = pixels.shape
    bits = bits or 8 * pixels.dtype.itemsize
    if bits < 8:
        each = np.unpackbits(pixels.astype(np.uint8), axis=2)[..., -bits:]
        rows = np.packbits(each.reshape(height, -1), axis=1)
    else:
        rows = pixels.astype(f">u{bits // 8}")
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    )


def bmp_file(picture, masks, *, header=40):
    """Return the bytes of a BMP file of 32 bits per pixel with masks of red, green, blue."""
    shifts = [(mask & -mask).bit_length() - 1 for mask in masks]
    pixels = (picture[::-1].astype("<u4") << np.array(shifts, np.uint32)).sum(2).astype("<u4")
    height, width = pixels.shape
    body = struct.pack("<IiiHHIIiiII", header, width, height, 1, 32, 3, 4 * pixels.size, 0, 0, 0, 0)
    body = (body + struct.pack("<3I", *masks)).ljust(header, b"\0")
    start = 14 + len(body)
    return (
        b"BM" + struct.pack("<IHHI", start + 4 * pixels.size, 0, 0, start) + body + pixels.tobytes()
    )


def sun_raster_file(rows, bits, width):
    """Return the bytes of a Sun raster file from its rows, each of which has an even length."""
    fields = (0x59A66A95, width, len(rows), bits, rows.size, 1, 0, 0)
    return struct.pack(">8I", *fields) + rows.tobytes()
