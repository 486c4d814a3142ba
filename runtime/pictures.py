"""Finding picture files, decoding them, and the demo photo."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import InputError, MissingBackend
from runtime.opencv import cv2

MAX_PIXELS = 2**28  # 16384 x 16384; a damaged or malicious file may state a larger size
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_AGAIN = "fetch or save the picture again"
# A JPEG marker that has a body, or the end marker D9. In coded data the byte after FF is 00, or D0
# to D7 (a restart marker). The pattern matches none of these, so a search skips the coded data.
_MARKER = re.compile(rb"\xff+([\x02-\xcf\xd9-\xfe])")
_log: Any = getattr(cv2.utils, "logging", cv2)  # OpenCV 4 has setLogLevel in cv2 itself
_log_lock, _log_users, _log_level = threading.Lock(), 0, 0


def load_image(source: Any, *, color: str = "rgb") -> tuple[np.ndarray, list[str]]:
    """Read a picture.

    Parameters
    ----------
    source : a path, the bytes of an encoded file, or a (H, W, 3) uint8 array. A file may be grey,
        palette, colour or CMYK, with 8 or 16 bits per channel. Its EXIF orientation is applied (in
        WebP from OpenCV 4.13 on). Of a file with several pages the first page is read.
    color : "rgb" or "bgr", the channel order of an array; it is ignored for files.

    Returns
    -------
    (H, W, 3) uint8 RGB, C-contiguous, a copy; and a list of warnings, one sentence each.

    Raises
    ------
    InputError : the file cannot be read, is damaged, is not a picture, or has other values than 8
        or 16 bits; the picture has more than MAX_PIXELS pixels; the array has another shape or
        dtype; ``source`` has another type; or ``color`` is another word.
    """
    if color not in ("rgb", "bgr"):
        raise InputError(
            f"color is {color!r}, wanted 'rgb' or 'bgr'",
            fix="'bgr' for pictures that OpenCV has read, else 'rgb'",
        )
    if isinstance(source, np.ndarray):
        _check_array(source)
        if color == "bgr":
            return cv2.cvtColor(np.ascontiguousarray(source), cv2.COLOR_BGR2RGB), []
        return np.array(source, order="C"), []
    if isinstance(source, (str, os.PathLike)):
        path = Path(os.fsdecode(source))
        return _decode(_read(path), str(path))
    try:
        data = bytes(memoryview(source))
    except TypeError:
        raise InputError(
            f"source is a {type(source).__name__}, wanted a path, bytes or (H, W, 3) uint8 array",
            fix="for a PIL image or a tensor on the CPU: np.asarray(source)",
        ) from None
    return _decode(data, f"source ({len(data)} bytes)")


def read_pictures(paths: Sequence[Path]) -> list[np.ndarray]:
    """Read all pictures that ``paths`` name, as :func:`picture_files` lists them.

    Returns
    -------
    A list of (H, W, 3) uint8 RGB arrays.

    Raises
    ------
    InputError : a path does not exist, a file cannot be read or decoded, or there is no picture.
    """
    return [load_image(path)[0] for path in picture_files(paths)]


def picture_files(paths: Sequence[Path]) -> list[Path]:
    """List the picture files that ``paths`` name.

    Parameters
    ----------
    paths : files, which are listed whatever their suffix is, and folders. A folder is replaced by
        its files that have one of SUFFIXES, in the order of their names.

    Raises
    ------
    InputError : a path does not exist, or there is no picture in the folders.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"{path} does not exist", fix=_not_found())
    if not files:
        names = ", ".join(map(str, paths))
        raise InputError(
            f"no pictures in {names}; wanted {', '.join(SUFFIXES)}",
            fix="name a folder that directly contains pictures",
        )
    return files


def demo_photo(instead: str = "name a picture: dg demo PICTURE") -> np.ndarray:
    """Return NASA's portrait of Eileen Collins (public domain), a file of scikit-image's wheel.

    Parameters
    ----------
    instead : what the user can do without scikit-image; it becomes part of the error's fix.

    Returns
    -------
    (512, 512, 3) uint8 RGB.

    Raises
    ------
    MissingBackend : scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise MissingBackend(
            "the demo photo is part of scikit-image, which is not installed",
            fix=f"pip install 'dynaguide-edge[demo]', or {instead}",
        ) from error
    return np.asarray(data.astronaut())


def _not_found() -> str:
    return f"check the path; the current folder is {Path.cwd()}"


def _check_array(array: np.ndarray) -> None:
    """Check shape, dtype and size of an array; the fix of the InputError says how to convert it."""
    shape, dtype = array.shape, array.dtype
    if array.ndim == 3 and shape[2] == 3 and dtype == np.uint8 and array.size:
        return _check_size(shape[0], shape[1], "source")
    found, fixes = f"a {shape} {dtype} array", []
    if array.size == 0:
        fixes.append("check the crop or the camera")
    elif array.ndim == 1:
        fixes.append("for an encoded file pass source.tobytes()")
    elif array.ndim == 2:
        fixes.append("np.stack([source] * 3, axis=-1) or cv2.cvtColor(source, cv2.COLOR_GRAY2RGB)")
    elif array.ndim == 3 and shape[2] == 4:
        fixes.append("drop alpha: source[..., :3]")
    elif array.ndim == 3 and shape[0] == 3 != shape[2]:
        fixes.append("source.transpose(1, 2, 0)")
    if dtype.kind == "f":
        if np.isnan(array).any():
            found += " with NaN"
            fixes.append("replace the NaN")
        fixes.append("multiply values in [0, 1] by 255 and cast: (source * 255).astype(np.uint8)")
    elif dtype != np.uint8:
        fixes.append("scale the values to 0..255 and cast: source.astype(np.uint8)")
    raise InputError(f"source is {found}, wanted (H, W, 3) uint8", fix="; ".join(fixes))


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path} is a folder, wanted a picture", fix="pass its files one by one")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist", fix=_not_found()) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}", fix="check its permissions") from error


def _decode(data: bytes, name: str) -> tuple[np.ndarray, list[str]]:
    """Decode a picture file: the results of :func:`load_image`. Messages call the file ``name``."""
    if not data:
        raise InputError(f"{name} is empty (0 bytes)", fix=_AGAIN)
    kind, alpha = _scan(data, name)
    if not kind:  # _scan has not read the header: decode once to find the dtype and the channels
        stored = _imdecode(data, cv2.IMREAD_UNCHANGED, name)
        if stored is not None and stored.dtype not in (np.uint8, np.uint16):
            raise InputError(
                f"{name} holds {stored.dtype} values, wanted 8 or 16 bits per channel",
                fix="map the values to 0..255 and pass the array",
            )
        alpha = stored is not None and stored.ndim == 3 and stored.shape[2] == 4
        del stored
    picture = _imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH, name)
    if picture is None:
        verdict = f"a damaged or unsupported {kind}" if kind else "not a picture, or a damaged one"
        raise InputError(f"{name} is {verdict}", fix="convert it to PNG or JPEG")
    _check_size(picture.shape[0], picture.shape[1], name)
    warnings = []
    if alpha:
        warnings.append(
            "The alpha channel was dropped; flatten the picture if its transparency matters."
        )
    if picture.dtype == np.uint16:
        picture = cv2.convertScaleAbs(picture, alpha=1 / 257)  # 65535 -> 255, rounded
        warnings.append("The picture has 16 bits per channel; it was scaled to 8.")
    if data[4:12] == b"ftypavif" and re.search(rb"irot|imir", data[:4096]):
        warnings.append("OpenCV ignores the rotation stored in an AVIF file.")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB, dst=picture), warnings


def _scan(data: bytes, name: str) -> tuple[str, bool]:
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
                _check_size(_uint(data, body + 3, 2), _uint(data, body + 5, 2), name)
            position = body + _uint(data, body, 2)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_size(_uint(data, 20, 4), _uint(data, 16, 4), name)
        kind, position, alpha = "PNG", 8, data[25:26] in (b"\4", b"\6")
        while position + 12 <= len(data):  # chunk: length, type, body, checksum
            chunk = data[position + 4 : position + 8]
            if chunk == b"IEND":
                return kind, alpha
            alpha |= chunk == b"tRNS"
            position += 12 + _uint(data, position, 4)
    else:
        return kind, alpha
    raise InputError(f"{name} is a truncated {kind}: its end marker is missing", fix=_AGAIN)


def _uint(data: bytes, start: int, size: int) -> int:
    return int.from_bytes(data[start : start + size], "big")


def _check_size(height: int, width: int, name: str) -> None:
    if height * width > MAX_PIXELS:
        raise InputError(
            f"{name} has {width} x {height} pixels, wanted at most {MAX_PIXELS}",
            fix="scale it down or cut it into tiles",
        )


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
