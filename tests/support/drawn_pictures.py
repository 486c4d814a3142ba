"""Pictures of 8-bit colours that the tests draw, and which region is where in them."""

import cv2
import numpy as np

COLOURS = np.array([[200, 40, 40], [40, 180, 60], [40, 60, 200], [230, 220, 60]], np.uint8)


def quadrants(height=80, width=120):
    """Four colours, one per quadrant: the picture and which is where."""
    y, x = np.mgrid[:height, :width]
    truth = 2 * (y >= height // 2) + (x >= width // 2)
    return COLOURS[truth], truth


def disc(noise, size=96):
    """A noisy disc on a noisy ground."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    truth = ((y - size / 2) ** 2 + (x - size / 2) ** 2 < (0.3 * size) ** 2).astype(int)
    colours = np.array([[70, 90, 110], [170, 140, 90]])
    picture = colours[truth] + rng.normal(0, noise, (size, size, 3))
    return np.clip(picture, 0, 255).astype(np.uint8), truth


def photo_like(height=60, width=90):
    """Smooth colours with noise, where nothing is exact and rounding could show."""
    rng = np.random.default_rng(1)
    coarse = rng.uniform(0, 255, (4, 6, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
