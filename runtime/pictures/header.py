"""The headers of picture files: the format and the size, before OpenCV decodes the file."""

from __future__ import annotations

import re
from dataclasses import dataclass

from runtime.errors import InputError

MAX_PIXELS = 2**28  # 16384 x 16384; a damaged or malicious file may state a larger size
AGAIN = "fetch or save the picture again"
# A JPEG marker that has a body, or the end marker D9. In coded data the byte after FF is 00, or D0
# to D7 (a restart marker). The pattern matches none of these, so a search skips the coded data.
_MARKER = re.compile(rb"\xff+([\x02-\xcf\xd9-\xfe])")


@dataclass(frozen=True)
class Tiff:
    """What decoding a TIFF file needs to know of its first picture.

    Attributes
    ----------
    photometric : tag 262: 0 white is zero, 1 black is zero, 2 RGB, 3 palette, 5 inks, 6 YCbCr, ...
    compression : tag 259: 1 none, 4 CCITT G4, 5 LZW, 7 JPEG, 8 deflate, 32773 PackBits, ...
    planar : the channels are stored one after the other, not pixel by pixel.
    tile : (height, width) of the tiles, or None: the picture is stored in strips.
    extra : the first value of tag 338: 1 an alpha channel that the colours are multiplied by, 2 an
        alpha channel, 0 another channel; None without the tag.
    """

    photometric: int
    compression: int
    planar: bool
    tile: tuple[int, int] | None
    extra: int | None


@dataclass(frozen=True)
class Header:
    """What the header of a picture file states.

    Attributes
    ----------
    kind : "JPEG", "PNG", "BMP", "TIFF", "WebP", "AVIF", "JPEG 2000", "GIF", "PNM", "PAM" or
        "Sun raster".
    height, width : pixels as stored, before the orientation is applied.
    bits : per stored channel, 1 to 16; of an index, where the picture has a palette.
    channels : stored per pixel, an alpha channel included; 1 where the picture has a palette.
    alpha : the picture has an alpha channel, or a colour that is transparent.
    orientation : 1 to 8 as in EXIF; 1 is upright.
    maximum : the largest value of a channel, where PNM or PAM state less than 2**bits - 1; else 0.
    tiff : of a TIFF file only.
    """

    kind: str
    height: int
    width: int
    bits: int
    channels: int
    alpha: bool = False
    orientation: int = 1
    maximum: int = 0
    tiff: Tiff | None = None


def read_header(data: bytes, name: str) -> Header:
    """Read the header of a picture file, and check its size.

    Raises
    ------
    InputError : the format is not in the list, or the picture has more than MAX_PIXELS pixels.
    """
    kind, alpha = scan(data, name)
    if kind == "PNG":
        colour = data[25:26]
        channels = {2: 3, 4: 2, 6: 4}.get(colour[0], 1) if colour else 1
        size = _uint(data, 20, 4), _uint(data, 16, 4)
        at = data.find(b"eXIf")
        turned = exif_orientation(data[at + 4 : at + 4 + _uint(data, at - 4, 4)]) if at > 0 else 1
        return Header("PNG", *size, _uint(data, 24, 1), channels, alpha, turned)
    if kind == "JPEG":
        turned, position = 1, 2
        while match := _MARKER.search(data, position):
            marker, body = match[1][0], match.end()
            if marker == 0xE1 and data[body + 2 : body + 8] == b"Exif\0\0":
                turned = exif_orientation(data[body + 8 : body + _uint(data, body, 2)])
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                size = _uint(data, body + 3, 2), _uint(data, body + 5, 2)
                bits, channels = _uint(data, body + 2, 1), _uint(data, body + 7, 1)
                return Header("JPEG", *size, bits, channels, orientation=turned)
            position = body + _uint(data, body, 2)
    raise InputError(f"{name} is not a picture, or a damaged one", fix="convert it to PNG or JPEG")


def exif_orientation(exif: bytes) -> int:
    """Return tag 274 of an EXIF block, 1 to 8, or 1 if the block does not contain it."""
    order = "little" if exif[:2] == b"II" else "big"
    uint = lambda start, size: int.from_bytes(exif[start : start + size], order)  # noqa: E731
    start = uint(4, 4)
    for entry in range(start + 2, start + 2 + 12 * uint(start, 2), 12):
        if uint(entry, 2) == 274:
            return uint(entry + 8, 2) if 1 <= uint(entry + 8, 2) <= 8 else 1
    return 1


def scan(data: bytes, name: str) -> tuple[str, bool]:
    """Check the size and the end marker of a JPEG or PNG file.

    OpenCV allocates the whole picture before it checks the data, and its older versions fill the
    missing part of a truncated file with grey.

    Returns
    -------
    "JPEG", "PNG", or "" for any other file; and whether a PNG has transparency.

    Raises
    ------
    InputError : the picture has more than MAX_PIXELS pixels, or the end marker is missing.
    """
    kind, alpha = "", False
    if data.startswith(b"\xff\xd8\xff"):
        kind, position = "JPEG", 2
        while match := _MARKER.search(data, position):
            marker, body = match[1][0], match.end()
            if marker == 0xD9:
                return kind, alpha
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
                check_size(_uint(data, body + 3, 2), _uint(data, body + 5, 2), name)
            position = body + _uint(data, body, 2)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        check_size(_uint(data, 20, 4), _uint(data, 16, 4), name)
        kind, position, alpha = "PNG", 8, data[25:26] in (b"\4", b"\6")
        while position + 12 <= len(data):  # chunk: length, type, body, checksum
            chunk = data[position + 4 : position + 8]
            if chunk == b"IEND":
                return kind, alpha
            alpha |= chunk == b"tRNS"
            position += 12 + _uint(data, position, 4)
    else:
        return kind, alpha
    raise InputError(f"{name} is a truncated {kind}: its end marker is missing", fix=AGAIN)


def _uint(data: bytes, start: int, size: int) -> int:
    return int.from_bytes(data[start : start + size], "big")


def check_size(height: int, width: int, name: str) -> None:
    """Refuse a picture of more than MAX_PIXELS pixels; the message calls it ``name``.

    Raises
    ------
    InputError : it has more.
    """
    if height * width > MAX_PIXELS:
        raise InputError(
            f"{name} has {width} x {height} pixels, wanted at most {MAX_PIXELS}",
            fix="scale it down or cut it into tiles",
        )
