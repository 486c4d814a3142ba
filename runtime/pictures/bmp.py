"""BMP files with run lengths, of which OpenCV misreads some without an error."""

from __future__ import annotations

import numpy as np

from runtime.opencv import cv2

MOST_BYTES = 2**24  # of such a file: Python needs about half a microsecond for a run of two bytes


def has_run_lengths(data: bytes) -> bool:
    """Return whether a BMP file has run lengths of 8 or 4 bits per pixel."""
    return data[14] >= 40 and int.from_bytes(data[30:34], "little") in (1, 2)


def run_length_pixels(data: bytes, height: int, width: int) -> np.ndarray:
    """Decode a BMP file with run lengths.

    ImageMagick writes rows that are longer than the picture, which OpenCV misreads. Pixels beyond
    the end of a row are dropped here; pixels that the file leaves out have the first colour.

    Returns
    -------
    (height, width, 3) uint8 BGR.

    Raises
    ------
    ValueError : the file ends before the picture does, or its palette or bits are wrong.
    """
    place, head, bits = int.from_bytes(data[10:14], "little"), data[14], data[28]
    colours = int.from_bytes(data[46:50], "little") or 2**bits
    palette = np.zeros((256, 1, 4), np.uint8)
    stored = np.frombuffer(data, np.uint8)[14 + head : 14 + head + 4 * min(colours, 256)]
    if bits * data[30] != 8 or not stored.size or stored.size % 4:
        raise ValueError("its bits per pixel or its palette are wrong")
    palette[: stored.size // 4] = stored.reshape(-1, 1, 4)
    indices = np.zeros(height * width, np.uint8)  # the system provides its memory when it is used
    pixels = indices.data
    each = [bytes((v,)) if bits == 8 else bytes((v >> 4, v & 15)) for v in range(256)]
    x = y = 0
    try:
        while y < height - 1 or (y == height - 1 and x < width):
            count, value = data[place], data[place + 1]
            place += 2
            if count:  # a run
                part = (each[value] * count)[:count]
            elif value == 0:  # the end of a row
                x, y = 0, y + 1
                continue
            elif value == 1:  # the end of the picture
                break
            elif value == 2:  # a move
                x, y, place = x + data[place], y + data[place + 1], place + 2
                continue
            else:  # pixels one by one
                size = -(-value * bits // 8)
                part = b"".join([each[byte] for byte in data[place : place + size]])[:value]
                place += size + size % 2
            if x < width:
                start = y * width + x
                pixels[start : start + min(len(part), width - x)] = part[: width - x]
            x += len(part)
    except IndexError:
        raise ValueError("its run lengths end before the picture does") from None
    rows = indices.reshape(height, width)
    if data[25] < 128:  # a negative height means top to bottom
        rows = rows[::-1]
    return cv2.applyColorMap(rows, palette[..., :3])
