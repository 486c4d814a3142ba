"""TIFF files: tags, a copy that OpenCV reads as it is stored, and pixels that OpenCV misreads."""

from __future__ import annotations

import math
import struct
import zlib
from typing import NamedTuple

import numpy as np

from runtime.pictures.limits import MAP

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIPS, ORIENTATION, SAMPLES, STRIP_HEIGHT, STRIP_SIZES, PLANAR = 273, 274, 277, 278, 279, 284
COLORMAP, TILE_WIDTH, TILE_HEIGHT, TILES, TILE_SIZES, EXTRA = 320, 322, 323, 324, 325, 338
SAMPLE_FORMAT, SUBSAMPLING, NEW_KIND, OLD_KIND = 339, 530, 254, 255
WHITE_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, CIELAB = 0, 2, 3, 5, 6, 8  # values of PHOTOMETRIC
MULTIPLIED, STRAIGHT = 1, 2  # values of EXTRA: colours are stored multiplied by alpha, or not
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # channels without EXTRA, by PHOTOMETRIC
DEFLATE = (8, 32946)
# The compressions that every OpenCV of PyPI decodes: none, fax, LZW, JPEG, PackBits, deflate.
READ = (1, 2, 3, 4, 5, 7, 32773, *DEFLATE)
_UNREAD = {  # the names of well-known others; OpenCV reads some of them as black, without an error
    **{6: "old JPEG", 9: "JBIG", 10: "JBIG", 34661: "JBIG", 32809: "ThunderScan", 34887: "LERC"},
    **dict.fromkeys((33003, 33004, 33005, 34712), "JPEG 2000"),
    **dict.fromkeys((50002, 52546), "JPEG XL"),
    **dict.fromkeys((34926, 50000), "Zstandard"),
    **{22610: "JPEG XR", 34934: "JPEG XR", 34892: "lossy JPEG", 34925: "LZMA", 50001: "WebP"},
}
PNG = "convert it to PNG"
_SMALL_BLOCKS = 2**16  # the most strips or tiles of less than 256 pixels on average
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_TYPES = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 8: "i2", 9: "i4", 16: "u8", 17: "i8"}


class Directory(NamedTuple):
    """The first directory of a TIFF file, which describes its first picture.

    Attributes
    ----------
    order : "<" for little endian, ">" for big endian.
    tags : the values of each tag that contains whole numbers, by the number of the tag.
    places : the position in the file of the first value of each of these tags.
    """

    order: str
    tags: dict[int, np.ndarray]
    places: dict[int, int]

    def value(self, tag: int, default: int = 1) -> int:
        """Return the first value of a tag, or the default if the tag is missing."""
        return int(self.tags[tag][0]) if tag in self.tags else default

    @property
    def orientation(self) -> int:
        """The EXIF orientation, 1 to 8; 1 if the directory states none or a wrong one."""
        found = self.value(ORIENTATION)
        return found if 1 <= found <= 8 else 1

    @property
    def reduced(self) -> bool:
        """The picture is a reduced copy of another picture of the file."""
        return self.value(NEW_KIND, 0) % 2 == 1 or self.value(OLD_KIND, 0) == 2

    @property
    def blocks(self) -> tuple[int, int, int, int, int]:
        """The rows and columns of a strip or tile; their number down, across, and in planes."""
        height, width = self.value(HEIGHT, 0), self.value(WIDTH, 0)
        rows, columns = min(self.value(STRIP_HEIGHT, height) or height, height), width
        if TILES in self.tags:
            rows, columns = self.value(TILE_HEIGHT, 0), self.value(TILE_WIDTH, 0)
        planes = self.value(SAMPLES) if self.value(PLANAR) == 2 else 1
        return rows, columns, -(-height // max(rows, 1)), -(-width // max(columns, 1)), planes

    @property
    def extra(self) -> int:
        """The number of channels beyond the colours."""
        return self.value(SAMPLES) - _COLOURS.get(self.value(PHOTOMETRIC, -1), self.value(SAMPLES))


def directory(data: bytes) -> Directory:
    """Read the first directory of a TIFF file; tags whose values are outside it are left out."""
    order, big = "<" if data[:2] == b"II" else ">", b"+" in data[2:4]
    number, first, size, field = ("Q", 8, 20, 12) if big else ("I", 2, 12, 8)
    found = Directory(order, {}, {})
    try:
        (start,) = struct.unpack_from(order + number, data, 8 if big else 4)
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
        for entry in range(start + first, start + first + size * min(count, 65535), size):
            tag, kind, n = struct.unpack_from(f"{order}HH{number}", data, entry)
            dtype, place = np.dtype(order + _TYPES.get(kind, "u1")), entry + field
            if n * dtype.itemsize > size - field:
                (place,) = struct.unpack_from(order + number, data, place)
            if kind in _TYPES and n and place + n * dtype.itemsize <= len(data):
                found.tags.setdefault(tag, np.frombuffer(data, dtype, n, place))
                found.places.setdefault(tag, place)
    except (struct.error, OverflowError):  # the directory is outside the file, at least in part
        pass
    return found


def problem(tiff: Directory) -> tuple[str, str]:
    """Return what of a TIFF file cannot be read, as the end of a sentence, and the fix, or ""."""
    bits, form, compression = tiff.value(BITS), tiff.value(SAMPLE_FORMAT), tiff.value(COMPRESSION)
    if form in (2, 3, 5, 6) or bits > 16:
        kind = {2: "int", 3: "float", 5: "complex int", 6: "complex"}.get(form, "uint")
        return f"holds {kind}{bits} values, wanted 8 or 16 bits per channel", MAP
    if compression not in READ:
        name = f" ({_UNREAD[compression]})" if compression in _UNREAD else ""
        why = f"is a TIFF file with compression {compression}{name}, which OpenCV does not read"
        return why, "convert it to PNG, or to another compression: tiffcp -c lzw in.tif out.tif"
    photometric = tiff.value(PHOTOMETRIC, -1)
    unread = {  # by kind, the bits per channel that OpenCV does not read
        "grey": photometric in (0, 1) and bits not in (1, 8, 10, 12, 14, 16),
        "CMYK": photometric == CMYK and bits > 8,
        "a compressed palette": photometric == PALETTE and bits > 8 and compression != 1,
    }
    for kind in (kind for kind, found in unread.items() if found):
        return f"is a TIFF file with {kind} of {bits} bits, which OpenCV does not read", PNG
    _, _, down, across, planes = tiff.blocks
    number = down * across * planes
    pixels = tiff.value(HEIGHT, 0) * tiff.value(WIDTH, 0) * planes
    if number > _SMALL_BLOCKS and pixels < 256 * number:
        why = f"is a TIFF file of {number} strips or tiles, wanted at most {_SMALL_BLOCKS} "
        return f"{why}of less than 256 pixels", PNG
    if tiff.extra > 1:
        why = f"holds {tiff.value(SAMPLES)} channels, and does not state that they are RGB"
        return why, "select the channels and pass the array"
    planar = tiff.value(PLANAR) == 2 and tiff.value(SAMPLES) > 1
    cut = tiff.value(WIDTH) % max(tiff.value(TILE_WIDTH), 1) > 0  # the last tiles are wider
    grey = tiff.extra > 0 and _COLOURS[tiff.value(PHOTOMETRIC, -1)] == 1
    if ((planar and bits > 8) or (grey and (planar or cut))) and not _is_raw(tiff):
        what = "grey or a palette with alpha" if grey else f"{bits} bits per channel"
        place = "planes" if planar else "tiles"
        return f"holds {what} in compressed {place}, which OpenCV misreads", PNG
    return "", ""


def for_opencv(data: bytes, tiff: Directory) -> bytes:
    """Return a TIFF file with the same pixels, which OpenCV returns as they are stored.

    OpenCV turns a TIFF picture upright whatever its flags say, and wrongly if the picture is stored
    in tiles. It multiplies 8-bit colours by an alpha channel that they are not multiplied by yet.
    """
    if tiff.value(ORIENTATION) == 1 and tiff.value(EXTRA, 0) != STRAIGHT:
        return data
    copy = bytearray(data)
    for tag, value in ((ORIENTATION, 1), (EXTRA, MULTIPLIED)):
        if tag in tiff.tags:
            np.frombuffer(copy, tiff.tags[tag].dtype, 1, tiff.places[tag])[0] = value
    return bytes(copy)


def check_blocks(data: bytes, tiff: Directory) -> None:
    """Check the strips or tiles of a compressed TIFF file.

    OpenCV makes a part black that cannot be decoded, mostly without an error. Deflate is decoded,
    which compares its checksums; of the other compressions only the place in the file is checked.

    Raises
    ------
    ValueError : a strip or tile is missing, outside the file, or its deflate data is damaged.
    """
    compression, tiled = tiff.value(COMPRESSION), TILES in tiff.tags
    if compression == 1:
        return
    rows, columns, down, across, planes = tiff.blocks
    number = down * across * planes
    missing = np.empty(0, np.uint32)
    starts = tiff.tags.get(TILES if tiled else STRIPS, missing)[:number].tolist()
    sizes = tiff.tags.get(TILE_SIZES if tiled else STRIP_SIZES, missing)[:number].tolist()
    if number == 1 and not sizes:
        sizes = [len(data) - min(starts, default=0)]
    if min(rows, columns) < 1 or min(len(starts), len(sizes)) < number:
        raise ValueError("a tile or strip is missing")
    if min(starts) < 8 or min(sizes) < 1:  # 0 stands for one that was left out
        raise ValueError("a tile or strip is missing")
    if max(map(int.__add__, starts, sizes)) > len(data):
        raise ValueError("a tile or strip ends after the end of the file")
    if compression not in DEFLATE:
        return
    whole = last = _stored_bytes(tiff, rows)
    if not tiled:
        last = _stored_bytes(tiff, tiff.value(HEIGHT) - (down - 1) * rows)
    reverse = tiff.value(FILL_ORDER) == 2
    for i, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        wanted = last if i % (down * across) >= (down - 1) * across else whole
        try:
            complete = _inflated(memoryview(data)[start : start + size], wanted, reverse) >= wanted
        except zlib.error as error:
            raise ValueError("its deflate data is wrong") from error
        if not complete:
            raise ValueError("its deflate data is not complete")


def _stored_bytes(tiff: Directory, rows: int) -> int:
    """Return how many bytes ``rows`` rows of a strip or tile have before they are compressed."""
    _, columns, _, _, planes = tiff.blocks
    channels, sampling = tiff.value(SAMPLES) // planes, tiff.tags.get(SUBSAMPLING, ())
    if channels == 3 and tiff.value(PHOTOMETRIC, -1) == YCBCR:
        right, below = (max(int(n), 1) for n in sampling) if len(sampling) == 2 else (2, 2)
        return -(-columns // right) * -(-rows // below) * (right * below + 2)
    return rows * -(-columns * channels * tiff.value(BITS) // 8)


def _inflated(block: memoryview, wanted: int, reverse: bool) -> int:
    """Return how many bytes deflate data decodes to; 0 if the data ends too early. A wrong checksum
    raises a zlib.error.

    Some writers store more rows than the picture has. Of these rows at most 64 KiB are decoded, so
    the checksum behind more of them is not compared.
    """
    inflate, found, most = zlib.decompressobj(), 0, wanted + 2**16
    for place in range(0, len(block), 2**12):  # parts, because one byte may decode to 1032
        part = bytes(block[place : place + 2**12])
        part = part.translate(REVERSED) if reverse else part
        found += len(inflate.decompress(part, most - found))
        if inflate.eof or found == most:
            return found
    return 0


def raw_pixels(data: bytes, tiff: Directory) -> np.ndarray | None:
    """Read the pixels of a TIFF file without compression that OpenCV refuses or misreads.

    OpenCV 4.10 and newer refuse 8-bit tiles whose bytes are no multiple of 1024. All versions
    misread 16-bit channels that are stored one after the other, and grey with alpha in tiles or
    stored one after the other. None reads 16-bit palettes.

    Returns
    -------
    (H, W, C) uint8 or uint16 as stored; RGB in uint8 if the file has a palette. None for a file
    that OpenCV reads.

    Raises
    ------
    ValueError : the file is damaged.
    """
    bits, channels, palette = tiff.value(BITS), tiff.value(SAMPLES), tiff.tags.get(COLORMAP)
    rows, columns, down, across, planes = tiff.blocks
    indexed = tiff.value(PHOTOMETRIC) == PALETTE
    tiled = TILES in tiff.tags
    if not _is_raw(tiff) or not (tiled or planes > 1 or (indexed and bits == 16)):
        return None
    height, width = tiff.value(HEIGHT, 0), tiff.value(WIDTH, 0)
    starts = tiff.tags.get(TILES if tiled else STRIPS, np.empty(0, np.uint32))
    starts = starts[: down * across * planes]
    if min(rows, columns) < 1 or len(starts) < down * across * planes or starts.min() < 8:
        raise ValueError("a tile or strip is missing")  # 0 stands for one that was left out
    dtype = np.dtype(f"{tiff.order}u{bits // 8}")
    pixels = np.zeros((height, width, channels), dtype.newbyteorder("="))
    for i, start in enumerate(starts.tolist()):
        plane, place = divmod(i, down * across)
        y, x = place // across * rows, place % across * columns
        stored = rows if tiled else min(rows, height - y)
        shape = (stored, columns, channels // planes)
        if start + math.prod(shape) * dtype.itemsize > len(data):
            raise ValueError("a tile or strip ends after the end of the file")
        block = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
        part = pixels[y : y + rows, x : x + columns, plane : plane + shape[2]]
        part[...] = block[: height - y, : width - x]
    if not indexed:
        return pixels
    if palette is None or len(palette) != 3 << bits:
        raise ValueError("it has no palette")
    colours = palette >> 8 if palette.max() > 255 else palette
    return colours.astype(np.uint8).reshape(3, -1).T[pixels[..., 0]]


def _is_raw(tiff: Directory) -> bool:
    """Whether the pixels are grey, RGB or of a palette, and stored without compression."""
    bits, photometric = tiff.value(BITS), tiff.value(PHOTOMETRIC, -1)
    return (
        bits in (8, 16)
        and bool(np.all(tiff.tags[BITS] == bits))
        and tiff.value(COMPRESSION) == 1 == tiff.value(FILL_ORDER)
        and 0 <= photometric <= PALETTE
        and tiff.extra >= 0
    )
