"""Encoding of pictures and label maps."""

from __future__ import annotations

import cv2
import numpy as np

from runtime.errors import InputError
from runtime.pictures import SUFFIXES, quiet_opencv


def encode_image(array: np.ndarray, suffix: str) -> bytes:
    """Encode (H, W, 3) uint8 RGB, (H, W) uint8 or (H, W) uint16 as the file type of ``suffix``."""
    suffix = suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"suffix is {suffix!r}, wanted one of {', '.join(SUFFIXES)}")
    shape, dtype = array.shape, array.dtype
    colour = array.ndim == 3 and shape[2] == 3 and dtype == np.uint8
    grey = array.ndim == 2 and dtype in (np.uint8, np.uint16)
    if not (colour or grey) or array.size == 0:
        raise InputError(f"array is {shape} {dtype}, wanted (H, W, 3) uint8 or (H, W) uint8/uint16")
    if dtype == np.uint16 and suffix not in (".png", ".tif", ".tiff"):
        raise InputError(f"{suffix} cannot hold 16 bits per pixel", fix="use .png or .tif")
    pixels = np.ascontiguousarray(array)
    try:
        with quiet_opencv():
            if colour:
                pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
            done, data = cv2.imencode(suffix, pixels)
    except cv2.error:
        done = False
    if not done:
        raise InputError(
            f"OpenCV cannot encode {shape[1]} x {shape[0]} pixels as {suffix}",
            fix="use .png: JPEG ends at 65500 pixels a side, WebP at 16383",
        )
    return data.tobytes()
