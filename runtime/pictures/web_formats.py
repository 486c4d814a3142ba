"""The headers of JPEG, PNG, GIF and WebP files."""

from __future__ import annotations

import re
import zlib

from runtime.errors import InputError
from runtime.pictures import tiff
from runtime.pictures.limits import AGAIN, FREE_PIXELS, File, Header

# A JPEG marker that has a body, or the end marker D9. In coded data the byte after FF is 00, or D0
# to D7 (a restart marker). The pattern matches none of these, so a search skips the coded data.
_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")
# The most pixels that one byte decodes to: a Huffman code has at least one bit, for a block or, in
# the lossless process C3, for a pixel. Arithmetic codes of one colour have no such limit.
_JPEG_SHRINK = {0xC0: 512, 0xC1: 512, 0xC2: 512, 0xC3: 8}
_SCAN_WORK = 2**28  # blocks of 8 x 8 pixels, summed over all scans: some seconds of decoding
_SEGMENTS = 2**16  # of a JPEG or GIF file; more take seconds
_METADATA = 2**26  # bytes of texts and profiles of a PNG file after decompression
_SHRINK = 1032  # the most bytes that one byte of deflate data decodes to
_GIF_SHRINK = 2731  # 4096 pixels from a code of 12 bits


def read_jpeg(file: File) -> Header:
    """Read the header of a JPEG file, and check that the file has an end marker.

    A progressive file may consist of thousands of scans without data, each of which takes as long
    as a scan with data, so the number of scans is limited.

    Raises
    ------
    InputError : the picture has too many pixels or too few bytes, the file has too many segments or
        scans, or the end marker is missing; it is JPEG-LS or states its height only behind its
        data.
    """
    data, position, scans, work, most, segments = file.data, 2, 0, 0, 0, 0
    blocks: list[int] = []
    frame: tuple[int, int, int, int] | None = None
    orientation = 0
    while match := _MARKER.search(data, position):
        marker, body = match[1][0], match.end()
        length, segments = _uint(data, body, 2), segments + 1
        _check_segments(file, segments)
        if marker == 0xD9:
            if frame is None:
                raise file.damaged("it has no frame header")
            if most:
                file.holds(64 * sum(blocks), most)
            return Header("JPEG", *frame, orientation=orientation or 1)
        if marker == 0xDA:
            scans += 1
            work += _uint(data, body + 2, 1) * max(blocks, default=0)  # channels of this scan
            if work > _SCAN_WORK:
                raise file.damaged(f"it has too many scans, {scans} or more")
        elif marker == 0xE1 and not orientation and data[body + 2 : body + 8] == b"Exif\0\0":
            orientation = _exif_orientation(data[body + 8 : body + length])
        elif marker == 0xF7 and frame is None:
            raise InputError(
                f"{file.name} is a JPEG-LS file, which is not read", fix="convert it to PNG"
            )
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
            stated = data[body + 2 : body + length]
            if len(stated) >= 6:
                if stated[1:3] == b"\0\0":
                    raise InputError(
                        f"{file.name} is a JPEG that is not read: it states a size of "
                        f"{_uint(stated, 3, 2)} x 0 pixels, and its height only behind its data "
                        "(DNL), or nowhere",
                        fix="save the picture again with another program",
                    )
                height, width = file.size(_uint(stated, 1, 2), _uint(stated, 3, 2))
                frame = height, width, stated[0], stated[5]
                blocks = _jpeg_blocks(height, width, stated[7::3])
                most = _JPEG_SHRINK.get(marker, 0)
        position = body + length
    raise InputError(f"{file.name} is a truncated JPEG: its end marker is missing", fix=AGAIN)


def _jpeg_blocks(height: int, width: int, sampling: bytes) -> list[int]:
    """Return the blocks of each channel; a byte of each is 16 * horizontal + vertical sampling."""
    widest = max((byte >> 4 for byte in sampling), default=0) or 1
    highest = max((byte & 15 for byte in sampling), default=0) or 1
    return [
        (height * (byte & 15) // highest // 8) * (width * (byte >> 4) // widest // 8)
        for byte in sampling
    ]


def read_png(file: File) -> Header:
    """Read the header of a PNG file, and check that the file has an end marker.

    Compressed texts and colour profiles are decompressed, up to a limit: libpng takes half a
    minute for 7 MB of them.

    Raises
    ------
    InputError : the picture or a frame has too many pixels or too few bytes, the texts and
        profiles are too large, or the end marker is missing.
    """
    data, position, coded, allowed = file.data, 8, 0, _METADATA
    turned, alpha = 0, data[25:26] in (b"\4", b"\6")
    while (end := position + 12 + (length := _uint(data, position, 4))) <= len(data):
        kind, body = data[position + 4 : position + 8], position + 8  # length, kind, body, checksum
        if (kind == b"IHDR") != (position == 8):
            raise file.damaged("its first chunk must be IHDR, and no other one")
        if kind == b"IHDR":
            height, width = file.size(_uint(data, body + 4, 4), _uint(data, body, 4))
        elif kind == b"fcTL":  # a frame of an animation
            file.size(_uint(data, body + 8, 4), _uint(data, body + 4, 4))
        elif kind == b"IDAT":
            coded += length
        elif kind == b"tRNS":
            alpha = True
        elif kind == b"eXIf" and not turned:
            turned = _exif_orientation(data[body : end - 4])
        elif kind in (b"zTXt", b"iTXt", b"iCCP"):
            allowed -= max(_text_size(data, kind, body, end - 4, allowed), 2**14)
            if allowed < 0:
                raise InputError(
                    f"{file.name} has more than {_METADATA} bytes of texts and colour profiles",
                    fix="save the picture again without its metadata",
                )
        elif kind == b"IEND":
            bits, channels = data[24], {2: 3, 4: 2, 6: 4}.get(data[25], 1)
            if height * width > FREE_PIXELS:
                rows_of_bytes = height * (width * channels * bits // 8)
                if coded * _SHRINK < rows_of_bytes:
                    raise file.damaged(f"{coded} bytes cannot hold {width} x {height} pixels")
            return Header("PNG", height, width, bits, channels, alpha, turned or 1)
        position = end
    raise InputError(f"{file.name} is a truncated PNG: its end marker is missing", fix=AGAIN)


def _text_size(data: bytes, kind: bytes, start: int, end: int, most: int) -> int:
    """Return the number of bytes of a text or profile; the work stops at more than ``most``."""
    start = data.find(b"\0", start, end) + 2  # behind the keyword and the compression method
    if kind == b"iTXt":
        if data[start - 1 : start] != b"\1":  # not compressed
            return end - start
        start = data.find(b"\0", start + 1, end) + 1  # behind the language
        start = data.find(b"\0", start, end) + 1  # behind the keyword in that language
    size, rest, reader = 0, data[start:end], zlib.decompressobj()
    try:
        while rest and size <= most and not reader.eof:
            size += len(reader.decompress(rest, 2**20))
            rest = reader.unconsumed_tail
    except zlib.error:  # a damaged text, which libpng skips
        pass
    return size


def read_gif(file: File) -> Header:
    """Read the header of a GIF file up to the end of the first picture, which OpenCV decodes.

    The screen is allocated as a whole, so a large one must be covered by the first picture. A clear
    code takes OpenCV as long as a thousand pixels, so the first picture may have no more bytes than
    an encoder writes for it.

    Raises
    ------
    InputError : the screen or the first picture has too many pixels, too few bytes, or too many;
        or the file has too many extensions.
    """
    data = file.data
    height, width = file.size(file.uint(8, 2, "little"), file.uint(6, 2, "little"))
    position, alpha, segments = 13 + _table(file.uint(10, 1)), False, 0
    while (block := file.uint(position, 1)) != 0x2C:
        if block != 0x21:
            raise file.damaged("it contains no picture")
        segments += 1
        _check_segments(file, segments)
        if data[position + 1 : position + 3] == b"\xf9\4":
            alpha = bool(file.uint(position + 3, 1) & 1)
        position, _ = _blocks(file, position + 2)
    rows, columns = file.size(
        file.uint(position + 7, 2, "little"), file.uint(position + 5, 2, "little")
    )
    _check_covered(file, (height, width), (rows, columns))
    position += 10 + _table(file.uint(position + 9, 1)) + 1
    _, coded = _blocks(file, position)
    if coded > 2 * rows * columns + 4096:
        raise file.damaged(f"{columns} x {rows} pixels have {coded} bytes of data")
    if rows * columns > FREE_PIXELS and coded * _GIF_SHRINK < rows * columns:
        raise file.damaged(f"{coded} bytes cannot hold {columns} x {rows} pixels")
    return Header("GIF", height, width, 8, 1, alpha)


def _check_segments(file: File, count: int) -> None:
    """Refuse a file of more than _SEGMENTS segments, most of which must be empty."""
    if count > _SEGMENTS:
        raise file.damaged(f"it has more than {_SEGMENTS} segments")


def _table(flags: int) -> int:
    """Return the bytes of the colour table of a GIF file."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _blocks(file: File, position: int) -> tuple[int, int]:
    """Skip the blocks of a GIF file; return the position behind them, and their bytes."""
    total, data = 0, file.data
    while position < len(data) and data[position]:
        total += data[position]
        position += data[position] + 1
    file.wants(position + 1)
    return position + 1, total


def _check_covered(file: File, canvas: tuple[int, int], frame: tuple[int, int]) -> None:
    """Refuse a large canvas of which the first frame covers less than a sixteenth."""
    pixels = canvas[0] * canvas[1]
    if pixels > FREE_PIXELS and pixels > 16 * frame[0] * frame[1]:
        raise file.damaged(
            f"its first frame has {frame[1]} x {frame[0]} pixels of {canvas[1]} x {canvas[0]}"
        )


def read_webp(file: File) -> Header:
    """Read the header of a WebP file: the sizes of the canvas and of the first frame.

    A lossless file may state a picture of one colour in 34 bytes, so it has no least size.

    Raises
    ------
    InputError : the canvas or the frame has too many pixels, or the file is truncated.
    """
    data, position, canvas, frame = file.data, 12, None, None
    alpha, turned, chunks = False, 0, 0
    file.wants(8 + file.uint(4, 4, "little"))
    while position + 8 <= len(data) and chunks < 2**16:
        chunk, length = data[position : position + 4], file.uint(position + 4, 4, "little")
        body, chunks = position + 8, chunks + 1
        if chunk == b"VP8X":
            alpha = bool(file.uint(body, 1) & 0x10)
            canvas = file.size(*(file.uint(body + at, 3, "little") + 1 for at in (7, 4)))
        elif chunk == b"ANMF" and frame is None:
            frame = file.size(*(file.uint(body + at, 3, "little") + 1 for at in (9, 6)))
            _check_covered(file, canvas or frame, frame)
        elif chunk == b"VP8 " and frame is None:
            frame = file.size(*(file.uint(body + at, 2, "little") & 0x3FFF for at in (8, 6)))
            file.holds(frame[0] * frame[1], 1024)  # 2 bits for a block of 16 x 16 pixels
        elif chunk == b"VP8L" and frame is None:
            packed = file.uint(body + 1, 4, "little")
            frame = file.size((packed >> 14 & 0x3FFF) + 1, (packed & 0x3FFF) + 1)
            alpha |= canvas is None and bool(packed >> 28 & 1)
        elif chunk == b"EXIF" and not turned:
            turned = _exif_orientation(data[body : body + length].removeprefix(b"Exif\0\0"))
        position = body + length + length % 2
    if frame is None:
        raise file.damaged("it contains no picture")
    return Header("WebP", *(canvas or frame), 8, 3 + alpha, alpha, turned or 1)


def _exif_orientation(exif: bytes) -> int:
    """Return tag 274 of an EXIF block, 1 to 8, or 1 if the block does not contain it."""
    return tiff.directory(exif).orientation if exif[:2] in (b"II", b"MM") else 1


def _uint(data: bytes, start: int, size: int) -> int:
    """Read a number; the bytes that the file lacks are left out."""
    return int.from_bytes(data[start : start + size], "big")
