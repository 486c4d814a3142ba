"""Resizing of maps with any number of channels, by OpenCV."""

from __future__ import annotations

import numpy as np


def resize(planes: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, K) uint8 or float32 to (height, width, K).

    Averages (INTER_AREA) when no side grows, else interpolates between pixel centres
    (INTER_LINEAR).
    """
    if planes.shape[:2] == (height, width):
        return planes
    import cv2

    shrinks = height <= planes.shape[0] and width <= planes.shape[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    out = np.empty((height, width, planes.shape[2]), planes.dtype)
    for k in range(0, planes.shape[2], 4):  # OpenCV averages at most four channels at a time
        part = np.ascontiguousarray(planes[..., k : k + 4])
        out[..., k : k + 4] = cv2.resize(part, (width, height), interpolation=how).reshape(
            height, width, -1
        )
    return out
