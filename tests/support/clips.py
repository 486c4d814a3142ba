"""Clips of a ball that crosses a box, and a prior that mostly knows them."""

import cv2
import numpy as np

from sdk import Segmenter

NAMES = ["ground", "ball", "box", "sky"]
HEIGHT, WIDTH = 72, 96
COLOURS = {
    "day": [(90, 120, 70), (200, 60, 40), (60, 70, 180), (170, 200, 230)],
    "night": [(20, 15, 30), (160, 160, 20), (10, 90, 60), (60, 20, 70)],
}


def view(at, *, place="day", box=True, seed=None):
    """A frame and its truth: a ball rolls over the ground before a box and the sky."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    truth = np.where(y < 24, 3, 0)
    if place == "night":
        truth = np.where(x < 40, 3, 0)
    if box:
        truth[30:55, 60:85] = 2
    truth[(y - 50) ** 2 + (x - 15 - 2 * at) ** 2 < 120] = 1
    rng = np.random.default_rng(1000 + at if seed is None else seed)
    picture = np.array(COLOURS[place])[truth] + rng.normal(0, 10, (HEIGHT, WIDTH, 3))
    return np.clip(picture, 0, 255).astype(np.uint8), truth


class Prior:
    """Knows the truth of each frame, coarsely and with ``noise``; gives what ``wrong`` says for the
    frames in it. Frames are told by their order."""

    def __init__(self, truths, names=NAMES, noise=0.1, wrong=None, sure=0.8):
        self.truths, self.names, self.wrong = truths, names, wrong or {}
        self.noise, self.sure, self.at = noise, sure, 0

    def __call__(self, picture):
        truth = self.wrong.get(self.at, self.truths[self.at])
        rng = np.random.default_rng(self.at)
        self.at += 1
        count = max(int(t.max()) for t in [*self.truths, *self.wrong.values()]) + 1
        soft = np.full((*truth.shape, count), (1 - self.sure) / count)
        soft += self.sure * np.eye(count)[truth]
        soft = cv2.resize(soft, (WIDTH // 8, HEIGHT // 8), interpolation=cv2.INTER_AREA)
        soft = np.maximum(soft + self.noise * rng.standard_normal(soft.shape), 0) + 1e-6
        return (soft / soft.sum(-1, keepdims=True)).astype(np.float32)


def clip(count=12, **options):
    frames, truths = zip(*(view(i, **options) for i in range(count)), strict=True)
    return list(frames), list(truths)


def followed(frames, prior, refine="residual", **options):
    """Results of a stream over ``frames``."""
    return list(Segmenter(prior, refine=refine).stream(frames, **options))


def events(results):
    return {r.frame.index: r.frame.events for r in results if r.frame.events}
