"""The same labels as before: SHA-256 of what every preset gives, on every instruction set.

``tests/data/no_change.json`` was written at commit 8add09d, before files were moved, from what

    SEG_ISA=base python tests/test_no_change.py

prints for each instruction set, and ``tests/data/kmeans.bundle`` by that commit's exporter. Neither
is written anew when code is moved or renamed. Only an intended change of the algorithm may do that,
and its commit says why.

The labels must not depend on anything but our own native code: guides are multiples of 1/64, and
working sizes are the picture's own or divide it, so that OpenCV's and NumPy's sums are exact.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import runtime
from runtime.bundle.read import Bundle
from runtime.core.config import PRESETS, RefineConfig
from sdk import Segmenter

DATA = Path(__file__).resolve().parent / "data"
SIZES = ((48, 64), (64, 48), (60, 80), (96, 128), (47, 61), (61, 33), (17, 97), (1, 40))
STEPS = 12  # of the published objectives, whose mapping freezes after 10


def drawn(number):
    """A noisy picture of overlapping discs and the guide that mostly knows them.

    Returns (H, W, 3) uint8, and a guide: (H, W, 4) float32 multiples of 1/64 that sum to 1, or for
    odd numbers (H, W) int32 labels, some unknown.
    """
    height, width = SIZES[number]
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:height, :width]
    truth = np.zeros((height, width), np.int64)
    for k in (1, 2, 3, 1):
        cy, cx, r = (int(rng.integers(0, n)) for n in (height, width, max(height, width) // 3))
        truth[(y - cy) ** 2 + (x - cx) ** 2 < r * r] = k
    colours = rng.integers(20, 236, (4, 3))
    picture = colours[truth] + rng.integers(-20, 21, (height, width, 3))
    wrong = rng.random((height, width)) < 0.2
    hard = np.where(wrong, rng.integers(0, 4, truth.shape), truth).astype(np.int32)
    if number % 2:
        return picture.astype(np.uint8), np.where(rng.random(truth.shape) < 0.1, -1, hard)
    sure = rng.integers(16, 49, (height, width, 1))
    parts = np.where(np.arange(4) == hard[..., None], sure + (64 - sure) // 4, (64 - sure) // 4)
    parts[..., 0] += 64 - parts.sum(-1)
    return picture.astype(np.uint8), (parts / 64).astype(np.float32)


def hashes():
    """preset -> SHA-256 of the labels of each picture, on the instruction set in use."""
    out = {}
    for preset in PRESETS:
        steps = {} if PRESETS[preset].get("objective", "residual") == "residual" else STEPS
        out[preset] = []
        for number in range(len(SIZES)):
            picture, guide = drawn(number)
            changes = {"steps": steps} if steps else {}
            if number >= 4:
                changes["scale"] = 1.0
            config = RefineConfig.preset(preset, **changes)
            prior = Known(guide)
            labels = Segmenter(prior, refine=config, min_area=0)(picture).labels
            assert labels.dtype == np.int32 and labels.shape == picture.shape[:2]
            out[preset].append(hashlib.sha256(labels.astype("<i4").tobytes()).hexdigest())
    return out


class Known:
    """A prior whose answer is known beforehand."""

    names = ("background", "first", "second", "third")

    def __init__(self, guide):
        self.guide = guide

    def __call__(self, picture):
        return self.guide


def test_labels_are_what_they_were(isa):
    if platform.machine() != "x86_64":
        pytest.skip("labels were recorded on x86-64")
    command = [sys.executable, str(Path(__file__).resolve())]
    places = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"SEG_ISA": isa, "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout).values()
    wanted = json.loads((DATA / "no_change.json").read_text())[isa]
    differ = [
        f"{preset}, picture {number} of {SIZES[number]}"
        for preset, row in wanted.items()
        for number, value in enumerate(row)
        if found[preset][number] != value
    ]
    assert found.keys() == wanted.keys() and not differ, "; ".join(differ)


def test_a_bundle_of_an_older_version_is_read_and_gives_its_golden_answers():
    bundle = Bundle.open(DATA / "kmeans.bundle")
    assert bundle.manifest["sdk"] == "0.1.0" and bundle.manifest["created"] < "2026-12"
    bundle.check_files()
    segmenter = Segmenter(DATA / "kmeans.bundle", self_test="always")
    golden = segmenter.info()["self_test"]
    assert golden["prior"] >= 0.99 and golden["labels"] >= 0.99 and golden["losses"] < 0.02
    graphs = Segmenter(DATA / "kmeans.bundle", refine_backend="onnx", self_test="always")
    assert graphs.info()["self_test"]["labels"] >= 0.99
    assert segmenter(drawn(3)[0]).labels.shape == SIZES[3]


if __name__ == "__main__":
    print(json.dumps({runtime.isa(): hashes()}, indent=1))
