"""The headers of picture files: the format and the size, before OpenCV decodes the file."""

from __future__ import annotations

import re

from runtime.errors import InputError

MAX_PIXELS = 2**28  # 16384 x 16384; a damaged or malicious file may state a larger size
AGAIN = "fetch or save the picture again"
# A JPEG marker that has a body, or the end marker D9. In coded data the byte after FF is 00, or D0
# to D7 (a restart marker). The pattern matches none of these, so a search skips the coded data.
_MARKER = re.compile(rb"\xff+([\x02-\xcf\xd9-\xfe])")


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
