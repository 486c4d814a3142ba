"""A tiny random backbone, pictures, and the features that a batch must have."""

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import torch

from export.backbones.base import Backbone
from export.train.features import FeatureBatches
from export.train.views import ViewRule, view_pixels
from runtime.opencv import cv2
from runtime.pictures.load import load_image

CHANNELS, SIZE, STRIDE = 5, 32, 16
RULE, FIVE = ViewRule(size=SIZE), ViewRule(size=SIZE, crops="five")
MANY = 10**9  # bytes


class Network(torch.nn.Module):
    """A convolution that records the number of views of each call."""

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, CHANNELS, STRIDE, STRIDE)
        self.calls = []

    def forward(self, images):
        self.calls.append(len(images))
        return self.convolution(images)


def tiny_backbone():
    """A backbone with random weights, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Network().eval().requires_grad_(False)
    return Backbone(
        name="tiny", module=module, channels=CHANNELS, stride=STRIDE, mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.25, 0.3), source="tiny", features="last", sha256="0" * 64,
    )  # fmt: skip


def write_picture(path, seed, alpha=False):
    """Write a random picture that depends on the seed alone."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (36 + seed % 3, 40, 3 + alpha), np.uint8)
    assert cv2.imwrite(str(path), pixels)


def seven_pictures(folder):
    """Write seven pictures into a new folder and return their paths."""
    folder = folder / "pictures"
    folder.mkdir()
    paths = [folder / f"{i}.png" for i in range(7)]
    for i, path in enumerate(paths):
        write_picture(path, i)
    return paths


def many_files(files, count):
    """Copy the seven pictures so often that some of the copies may be broken."""
    folder = files[0].parent.parent / "many"
    folder.mkdir()
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        shutil.copy(files[i % 7], path)
    return paths


def spoil(path):
    """Cut off most of a picture file."""
    path.write_bytes(path.read_bytes()[:60])


def batches(files, backbone, first=0, last=6, *, rule=RULE, batch=4, **options):
    """Yield the features of the steps ``first`` to ``last - 1``."""
    options = {"seed": 3, "device": "cpu"} | options
    return FeatureBatches(files, rule, backbone, batch=batch, **options).batches(first, last)


def expected(path, backbone, rule=RULE, crop=0):
    """The features of one view, from the definition."""
    pixels = view_pixels(load_image(path)[0], rule, crop) / 255
    image = (pixels - np.array(backbone.mean)) / np.array(backbone.std)
    with torch.no_grad():
        return backbone.module(torch.from_numpy(image.transpose(2, 0, 1)[None]).float())[0]


def views_of(batch, files, backbone, rule=RULE):
    """The number of the view that each row of a batch is."""
    all_views = [expected(f, backbone, rule, c) for f in files for c in range(rule.count)]
    distances = (batch[:, None] - torch.stack(all_views)[None]).abs().amax((2, 3, 4))
    assert (distances.min(1).values < 1e-4).all()
    return distances.argmin(1).tolist()


def equal(one, other):
    """Whether two rows of tensors have the same bits."""
    one, other = list(one), list(other)
    return len(one) == len(other) and all(map(torch.equal, one, other))


def children():
    """The processes that this one started."""
    path = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children")
    return [int(word) for word in path.read_text().split()]
