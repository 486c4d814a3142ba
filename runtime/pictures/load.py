"""Reading a picture from what the user passes: a path, encoded bytes or an array."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import InputError
from runtime.files import file_error, shown, stat_of
from runtime.opencv import cv2
from runtime.pictures.decode import decode
from runtime.pictures.header import check_size


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
        return decode(_read(path), str(path))
    try:
        data = bytes(memoryview(source))
    except TypeError:
        raise InputError(
            f"source is a {type(source).__name__}, wanted a path, bytes or (H, W, 3) uint8 array",
            fix="for a PIL image or a tensor on the CPU: np.asarray(source)",
        ) from None
    return decode(data, f"source ({len(data)} bytes)")


def _check_array(array: np.ndarray) -> None:
    """Check shape, dtype and size of an array; the fix of the InputError says how to convert it."""
    shape, dtype = array.shape, array.dtype
    if array.ndim == 3 and shape[2] == 3 and dtype == np.uint8 and array.size:
        return check_size(shape[0], shape[1], "source")
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
    found = stat_of(path)
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise InputError(
            f"{shown(path)} is a folder, wanted a picture", fix="pass its files one by one"
        )
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise file_error("read", path, error) from error
