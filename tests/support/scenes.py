"""Pictures that the tests draw, with guides that mostly know them."""

import numpy as np


def scene(height, width, classes=5, seed=3):
    """Draw noisy coloured discs and a guide that mostly knows them.

    Returns image (H, W, 3), soft guide (H, W, classes), both float32, and hard guide (H, W) int32.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    truth = np.zeros((height, width), int)
    for k in range(1, classes):
        top, left = rng.uniform(0, height), rng.uniform(0, width)
        radius = rng.uniform(0.15, 0.4) * min(height, width)
        truth[(y - top) ** 2 + (x - left) ** 2 < radius**2] = k
    colours = rng.uniform(0.1, 0.9, (classes, 3))
    image = colours[truth] + 0.1 * (x / width)[..., None]
    image = np.clip(image + rng.normal(0, 0.03, image.shape), 0, 1).astype(np.float32)
    scores = np.exp(2 * np.eye(classes)[truth] + rng.normal(0, 0.7, (height, width, classes)))
    soft = (scores / scores.sum(-1, keepdims=True)).astype(np.float32)
    return image, soft, soft.argmax(-1).astype(np.int32)
