"""Resizing of maps with any number of channels, by OpenCV."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.device.transfer import module_of_array


def resize(planes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, K) uint8 or float32 to (height, width, K), on the host.

    If no side grows, pixels are averaged (INTER_AREA); else values are interpolated between pixel
    centres (INTER_LINEAR). An array of this size already is returned itself.
    """
    if planes.shape[:2] == (height, width):
        return planes
    from runtime.opencv import cv2

    shrinks = height <= planes.shape[0] and width <= planes.shape[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    out = np.empty((height, width, planes.shape[2]), planes.dtype)
    for k in range(0, planes.shape[2], 4):  # OpenCV averages at most four channels at a time
        part = np.ascontiguousarray(planes[..., k : k + 4])
        out[..., k : k + 4] = cv2.resize(part, (width, height), interpolation=how).reshape(
            height, width, -1
        )
    return out


def working_picture(picture: Any, height: int, width: int) -> Any:
    """Return a picture at another size, as by :func:`resize`: (height, width, 3) float32 in [0, 1],
    on the same device. ``picture`` is a result of :func:`runtime.device.transfer.upload`."""
    if isinstance(picture, np.ndarray):
        return resize(picture, height, width).astype(np.float32) / 255
    return module_of_array(picture).working_picture(picture, height, width, device=picture.device)


def resized(planes: Any, size: tuple[int, int]) -> Any:
    """Resize (h, w, C) float32 on the GPU to (height, width, C), as :func:`resize` does."""
    if planes.shape[:2] == tuple(size):
        return planes
    return module_of_array(planes).resize_planes(planes, *size, device=planes.device)
