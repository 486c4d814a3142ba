"""Encoding of pictures and label maps as files."""

from __future__ import annotations

import numpy as np

from runtime.errors import InputError
from runtime.opencv import cv2
from runtime.pictures.decode import quiet_opencv
from runtime.pictures.files import SUFFIXES


def encode_image(array: np.ndarray, suffix: str) -> bytes:
    """Encode a picture.

    Parameters
    ----------
    array : (H, W, 3) uint8 RGB, (H, W) uint8 or (H, W) uint16.
    suffix : the file type, as ".png"; uint16 needs .png, .tif or .tiff.

    Returns
    -------
    The bytes of the file.

    Raises
    ------
    InputError : ``array`` has another shape or dtype, ``suffix`` is unknown, or the file type
        cannot store the array.
    MemoryError : there is too little memory.
    """
    suffix = suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"suffix is {suffix!r}, wanted one of {', '.join(SUFFIXES)}", fix="use .png"
        )
    shape, dtype = array.shape, array.dtype
    colour = array.ndim == 3 and shape[2] == 3 and dtype == np.uint8
    grey = array.ndim == 2 and dtype in (np.uint8, np.uint16)
    if not (colour or grey) or array.size == 0:
        raise InputError(
            f"array is {shape} {dtype}, wanted (H, W, 3) uint8 or (H, W) uint8/uint16",
            fix="convert it, e.g. with array.astype(np.uint8), and check that it is not empty",
        )
    if dtype == np.uint16 and suffix not in (".png", ".tif", ".tiff"):
        raise InputError(f"{suffix} cannot hold 16 bits per pixel", fix="use .png or .tif")
    pixels = np.ascontiguousarray(array)
    try:
        with quiet_opencv():
            if colour:
                pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
            done, data = cv2.imencode(suffix, pixels)
    except cv2.error as error:
        if getattr(error, "code", None) == cv2.Error.StsNoMem:
            raise MemoryError(f"no memory to encode {shape[1]} x {shape[0]} pixels") from error
        done = False
    if not done:
        raise InputError(
            f"OpenCV cannot encode {shape[1]} x {shape[0]} pixels as {suffix}",
            fix="use .png: JPEG allows at most 65500 pixels a side, WebP 16383",
        )
    return data.tobytes()
