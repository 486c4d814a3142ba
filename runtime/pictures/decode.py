"""Decoding picture files with OpenCV."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from runtime.errors import InputError
from runtime.opencv import cv2
from runtime.pictures.header import AGAIN, check_size, scan

_log: Any = getattr(cv2.utils, "logging", cv2)  # OpenCV 4 has setLogLevel in cv2 itself
_log_lock, _log_users, _log_level = threading.Lock(), 0, 0


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
    kind, alpha = scan(data, name)
    if not kind:  # scan has not read the header: decode once to find the dtype and the channels
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
    check_size(picture.shape[0], picture.shape[1], name)
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
