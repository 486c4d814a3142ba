"""Reading a label map: a PNG whose values are the labels of the pixels."""

from __future__ import annotations

import zlib

import numpy as np

from runtime.errors import InputError
from runtime.opencv import cv2
from runtime.pictures.decode import check_png, quiet_opencv
from runtime.pictures.header import read_header
from runtime.pictures.limits import AGAIN

_GREY, _PALETTE = 0, 3  # colour types of PNG
_WANTED = "wanted a PNG with one channel of 8 or 16 bits, or with a palette"


def decode_labels(data: bytes, name: str) -> np.ndarray:
    """Decode a label map.

    Parameters
    ----------
    data : the bytes of a grey PNG of 8 or 16 bits, whose values are the labels; or of a PNG with a
        palette, whose indices are the labels: the colours of the palette have no meaning.
    name : what messages call the file.

    Returns
    -------
    (H, W) uint8 or uint16. An orientation in the file's metadata is not applied.

    Raises
    ------
    InputError : the file is damaged, too large, or something else than described above.

    Example
    -------
    >>> decode_labels(Path("street.png").read_bytes(), "street.png").max()
    18
    """
    header = read_header(data, name)
    if header.kind != "PNG":
        raise InputError(
            f"{name} is a {header.kind} file; {_WANTED}", fix="save the labels as a PNG"
        )
    depth, kind = data[24], data[25]
    if kind not in (_GREY, _PALETTE):
        raise InputError(
            f"{name} is a PNG of several channels; {_WANTED}",
            fix="save the label of each pixel as grey; colours are no labels",
        )
    if kind == _GREY and depth < 8:  # programs scale these values to 0 to 255 when they read them
        raise InputError(
            f"{name} is a grey PNG of {depth} bit{'s' * (depth != 1)}; {_WANTED}",
            fix="save it with 8 bits per pixel",
        )
    check_png(data, name)
    if kind == _PALETTE:
        data = _with_grey_palette(data, depth)
    flags = cv2.IMREAD_COLOR if kind == _PALETTE else cv2.IMREAD_ANYDEPTH
    flags |= cv2.IMREAD_IGNORE_ORIENTATION
    try:
        with quiet_opencv():
            found = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:  # OpenCV's own limits on width, height and pixels
        raise InputError(f"OpenCV refuses {name}: {error.err}", fix="scale it down") from error
    if found is None:
        raise InputError(f"{name} is a damaged PNG file", fix=AGAIN)
    return np.ascontiguousarray(found if found.ndim == 2 else found[..., 0])


def _with_grey_palette(data: bytes, depth: int) -> bytes:
    """Return a PNG with the palette (0, 0, 0), (1, 1, 1) and so on, and without transparency, so
    that its colours are its indices."""
    ramp = np.repeat(np.arange(2**depth, dtype=np.uint8), 3).tobytes()
    parts, position = [data[:8]], 8
    while position + 12 <= len(data):  # a chunk: length, kind, body, checksum
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        kind, chunk = data[position + 4 : position + 8], data[position:end]
        if kind == b"PLTE":
            checksum = zlib.crc32(kind + ramp)
            chunk = len(ramp).to_bytes(4, "big") + kind + ramp + checksum.to_bytes(4, "big")
        if kind != b"tRNS":
            parts.append(chunk)
        position = end
    return b"".join(parts)
