"""Decoding picture files with OpenCV."""

from __future__ import annotations

import math
import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from runtime.device.choose import module_of
from runtime.errors import InputError
from runtime.opencv import cv2
from runtime.pictures import bmp, tiff
from runtime.pictures.header import read_header
from runtime.pictures.limits import AGAIN, MAP, Header

_log: Any = getattr(cv2.utils, "logging", cv2)  # OpenCV 4 has setLogLevel in cv2 itself
_log_lock, _log_users, _log_level = threading.Lock(), 0, 0
# OpenCV applies the orientation of some formats in some versions only, so it is applied here.
_GREY = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
_COLOUR = _GREY | cv2.IMREAD_COLOR
OPENCV_VERSION = tuple(int(part) for part in re.findall(r"\d+", cv2.__version__)[:2])


def decode(data: bytes, name: str) -> tuple[np.ndarray, list[str]]:
    """Decode a picture file.

    Parameters
    ----------
    name : what messages call the file.

    Returns
    -------
    The results of :func:`runtime.pictures.load.load_image`.

    Raises
    ------
    InputError : the file is empty, damaged, no picture, or has other values than 8 or 16 bits.
    """
    if not data:
        raise InputError(f"{name} is empty (0 bytes)", fix=AGAIN)
    header, warnings = read_header(data, name), list[str]()
    inverted = False
    if header.kind == "JPEG":
        _check_jpeg(data, header, name)
    elif header.kind == "PNG":
        check_png(data, name)
    elif why := _misread(data, header):
        raise InputError(f"{name} is a {header.kind} file {why}", fix="convert it to PNG")
    if header.kind == "TIFF":
        picture, inverted = _decode_tiff(data, name, header.alpha, warnings)
    elif header.kind == "BMP" and bmp.has_run_lengths(data):
        picture = _decode_run_lengths(data, header, name)
    elif header.kind == "PAM":
        picture = _decode_pam(data, header)
    else:  # OpenCV refuses a grey JPEG 2000 codestream, also with alpha, in colour
        grey = header.kind == "JPEG 2000" and header.channels <= 2
        if header.kind == "GIF":
            if data[11] >= 2 << (data[10] & 7):  # OpenCV refuses a background outside the palette
                data = data[:11] + b"\0" + data[12:]
            data += b";"  # OpenCV wants the mark of the end, which some files lack
        elif header.kind == "PNM":
            data += b"\n"  # OpenCV wants a space after the last decimal number
        picture = _imdecode(data, _GREY if grey else _COLOUR, name)
    if picture is None and header.kind in ("GIF", "AVIF") and OPENCV_VERSION < (4, 12):
        raise InputError(
            f"{name} is of the format {header.kind}, and OpenCV {cv2.__version__} cannot read it",
            fix="update OpenCV to 4.12 or newer, or convert it to PNG",
        )
    if picture is None:
        channels = f"{header.channels} channel{'s' if header.channels > 1 else ''}"
        raise InputError(
            f"{name} is a damaged {header.kind} file, or OpenCV {cv2.__version__} cannot read it "
            f"({header.width} x {header.height} pixels, {channels} of {header.bits} bits)",
            fix="fetch it again; if other programs show it, convert it to PNG or JPEG",
        )
    if picture.dtype not in (np.uint8, np.uint16):
        raise InputError(f"{name} holds {picture.dtype} values, wanted uint8 or uint16", fix=MAP)
    if header.alpha:
        warnings.append(
            "The alpha channel was dropped; flatten the picture if its transparency matters."
        )
    picture = _to_8_bits(picture, header, inverted, warnings)
    return _to_upright_rgb(picture, header.orientation), warnings


def _check_jpeg(data: bytes, header: Header, name: str) -> None:
    """Refuse a JPEG file whose data ends too early, which libjpeg would fill with grey, and kinds
    that OpenCV does not read."""
    walk = module_of("cpu").walk_jpeg(data)
    if walk.problem:
        share = ""
        if walk.found < walk.wanted:
            share = f" ({100 * walk.found / walk.wanted:.1f} % of it was found)"
        raise InputError(f"{name} is a damaged or truncated JPEG: {walk.problem}{share}", fix=AGAIN)
    if header.bits != 8 or walk.coding in ("lossless", "other"):
        raise InputError(
            f"{name} is a JPEG of {header.bits} bits with {walk.coding} coding, which OpenCV does "
            "not read",
            fix="convert it to PNG",
        )


def check_png(data: bytes, name: str) -> None:
    """Check a PNG file for damaged critical chunks, which libpng would report on stderr.

    Raises
    ------
    InputError : the checksum of such a chunk is wrong.
    """
    position = 8
    while position + 12 <= len(data):  # a chunk: length, type, body, checksum
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        checksum = int.from_bytes(data[end : end + 4], "big")
        wrong = checksum != zlib.crc32(memoryview(data)[position + 4 : end])
        if not kind.isalpha() or (wrong and kind[:1].isupper()):  # upper case: critical
            raise InputError(f"{name} is a damaged PNG: a checksum in it is wrong", fix=AGAIN)
        if kind == b"IEND":
            return
        position = end + 4


def _misread(data: bytes, header: Header) -> str:
    """Return what OpenCV misreads in a BMP or Sun raster file, as the end of a sentence, or ""."""
    if header.kind == "Sun raster" and data[12:16] in (b"\0\0\0\1", b"\0\0\0\x20"):
        return f"of {data[15]} bits per pixel, which OpenCV misreads"
    if header.kind == "BMP" and data[28] == 32 and data[14] < 56 and data[30] == 3:
        if data[54:66] != b"\0\0\xff\0\0\xff\0\0\xff\0\0\0":  # masks of red, green, blue
            return "with its colours in another order than BGR, which OpenCV misreads"
    return ""


def _decode_tiff(
    data: bytes, name: str, alpha: bool, warnings: list[str]
) -> tuple[np.ndarray | None, bool]:
    """Decode a TIFF file to (H, W) grey or (H, W, 3) BGR, not yet turned upright; and return
    whether the values must be inverted, because white is 0."""
    found = tiff.directory(data)
    photometric = found.value(tiff.PHOTOMETRIC, -1)
    multiplied = found.extra > 0 and found.value(tiff.EXTRA, 0) == tiff.MULTIPLIED
    inverted = photometric == tiff.WHITE_IS_ZERO
    try:
        tiff.check_blocks(data, found)
        picture = tiff.raw_pixels(data, found)
    except ValueError as error:
        raise InputError(f"{name} is a damaged TIFF: {error}", fix=AGAIN) from error
    if picture is not None:
        channels = [2, 1, 0, 3][: picture.shape[2]]  # BGR, as OpenCV returns
        picture = picture[..., 0] if len(channels) < 3 else picture[..., channels]
        picture = np.ascontiguousarray(picture)
    else:
        bgra = multiplied and photometric == tiff.RGB
        flags = cv2.IMREAD_UNCHANGED if bgra else _COLOUR
        picture = _imdecode(tiff.for_opencv(data, found), flags, name)
        if picture is None:
            return None, False
        inverted &= picture.dtype == np.uint16  # OpenCV has inverted 8 bits
    if picture.dtype == np.uint8 and found.value(tiff.BITS) > 8 and photometric != tiff.PALETTE:
        picture = picture * np.uint16(257)  # OpenCV keeps the upper 8 bits of grey with alpha
    if picture.ndim == 3 and picture.shape[2] == 4:
        colours = cv2.cvtColor(picture, cv2.COLOR_BGRA2BGR)
        if multiplied:  # divide by alpha
            divisor = cv2.cvtColor(picture[..., 3], cv2.COLOR_GRAY2BGR)
            colours = cv2.divide(colours, divisor, scale=np.iinfo(picture.dtype).max)
        picture = colours
    elif multiplied:
        warnings.append("The colours are stored multiplied by the alpha channel; they remain so.")
    if found.extra > 0 and not alpha:
        warnings.append("The channels beyond the colours were dropped.")
    if photometric == tiff.CIELAB:
        warnings.append("The picture is stored as CIELab; its RGB colours are approximate.")
    if found.reduced:
        warnings.append(
            "The first picture of the file is a reduced copy of another one, which was not read."
        )
    return picture, inverted


def _decode_run_lengths(data: bytes, header: Header, name: str) -> np.ndarray:
    """Decode a BMP file with run lengths to (H, W, 3) BGR."""
    if len(data) > bmp.MOST_BYTES:
        raise InputError(
            f"{name} is a BMP with run lengths of {len(data)} bytes, wanted at most "
            f"{bmp.MOST_BYTES}",
            fix="convert it to PNG",
        )
    try:
        return bmp.run_length_pixels(data, header.height, header.width)
    except ValueError as error:
        raise InputError(f"{name} is a damaged BMP: {error}", fix=AGAIN) from error


def _decode_pam(data: bytes, header: Header) -> np.ndarray:
    """Decode a PAM file, of which OpenCV swaps red and blue, to (H, W) grey or (H, W, 3) BGR."""
    head = re.search(rb"[\r\n]ENDHDR[\r\n]", data)
    dtype, shape = np.dtype(f">u{header.bits // 8}"), (header.height, header.width, header.channels)
    pixels = np.frombuffer(data, dtype, math.prod(shape), head.end() if head else 0).reshape(shape)
    pixels = pixels[..., 2::-1] if header.channels > 2 else pixels[..., 0]
    return pixels.astype(dtype.newbyteorder("="), order="C")


def _to_8_bits(
    picture: np.ndarray, header: Header, inverted: bool, warnings: list[str]
) -> np.ndarray:
    """Scale a picture to 0..255, and append a warning if it has more bits; invert it if asked."""
    wide, top = picture.dtype == np.uint16, 255
    if wide:
        warnings.append(f"The picture has {header.bits} bits per channel; it was scaled to 8.")
        top = 2**header.bits - 1 if header.kind in ("AVIF", "JPEG 2000") else 65535
    top = header.maximum or top
    if wide and top == 65535 and 0 < (largest := int(picture.max())) < 2**14:
        warnings.append(
            f"The largest value of the picture is {largest} of 65535, so the result is "
            f"{'bright' if inverted else 'dark'}. "
            "Values of 10, 12 or 14 bits must be multiplied by 64, 16 or 4 before they are saved."
        )
    if wide or top != 255:
        scale = 1 / 257 if top == 65535 else 255 / top
        picture = cv2.convertScaleAbs(picture, alpha=scale)  # rounded
    return ~picture if inverted else picture


def _to_upright_rgb(picture: np.ndarray, orientation: int) -> np.ndarray:
    """Return RGB of grey or BGR, with an EXIF orientation applied; the input is overwritten."""
    if picture.ndim == 2:
        picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB)
    else:
        picture = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB, dst=picture)
    if orientation >= 5:
        picture = cv2.transpose(picture)
    mirror = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return picture if mirror is None else cv2.flip(picture, mirror)


def _imdecode(data: bytes, flags: int, name: str) -> np.ndarray | None:
    try:
        with quiet_opencv():
            return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:  # OpenCV's own limits on width, height and pixels
        raise InputError(f"OpenCV refuses {name}: {error.err}", fix="scale it down") from error


@contextmanager
def quiet_opencv() -> Iterator[None]:
    """Silence OpenCV's log messages inside a with block.

    OpenCV has one log level for all threads: the first thread that enters a block lowers the level,
    the last thread that leaves one restores it.
    """
    global _log_users, _log_level
    with _log_lock:
        if _log_users == 0:
            _log_level = _log.setLogLevel(0)
        _log_users += 1
    try:
        yield
    finally:
        with _log_lock:
            _log_users -= 1
            if _log_users == 0:
                _log.setLogLevel(_log_level)
