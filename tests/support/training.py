"""What the tests of the trainer share: pictures, a tiny backbone, and its command line.

Run as a program, this module trains on the tiny backbone in processes of their own, of which each
ends itself at one of MOMENTS. It prints their exit codes, and writes what they print on stderr into
FOLDER/MOMENT.txt and the runs into FOLDER/MOMENT:

    python tests/support/training.py FOLDER segunify --data PICTURES ...
"""

import contextlib
import io
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest

import export.backbones.load
import export.train.loop
from export.__main__ import main
from export.backbones import Backbone

torch = pytest.importorskip("torch", reason="heads are trained by torch: pip install torch")
pytest.importorskip("matplotlib", reason="the losses are drawn by matplotlib")

CHANNELS, STRIDE = 6, 8
# Three clusters of codes with four numbers, on views of 32 x 32 pixels, which have 4 x 4 features.
TINY = (
    *("--imgsz", "32", "--clusters", "3", "--dim", "4", "--intra-shift", "0.3"),
    *("--inter-shift", "0.5", "--threads", "1", "--no-cache"),
)
MOMENTS = ("step", "rename", "log", "SIGINT", "SIGTERM")


def draw_pictures(folder, count, broken=()):
    """Write pictures of 32 x 40 pixels; those with the numbers ``broken`` are no pictures."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(3)
    for number in range(count):
        coarse = rng.integers(0, 256, (3, 4, 3)).astype(np.uint8)
        picture = cv2.resize(coarse, (40, 32), interpolation=cv2.INTER_NEAREST)
        assert cv2.imwrite(str(folder / f"{number:02}.png"), picture)
        if number in broken:
            (folder / f"{number:02}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    return folder


def tiny_backbone(source="tiny", features=None, *, trained=True):
    """One convolution with fixed random weights."""
    module = torch.nn.Conv2d(3, CHANNELS, STRIDE, stride=STRIDE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / STRIDE)
    return Backbone(
        name="tiny", module=module.eval().requires_grad_(False), channels=CHANNELS, stride=STRIDE,
        mean=(0.5,) * 3, std=(0.25,) * 3, source=source, features=features or "only",
        sha256="ab" * 32, trained=trained,
    )  # fmt: skip


class Ended:
    """How a command ended."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    def refused(self, code, *texts):
        """It failed in one error, which contains ``texts``."""
        assert self.code == code, (self.code, self.out, self.err)
        assert self.err.count("error: ") == 1 and "Traceback" not in self.err, self.err
        for text in texts:
            assert text in self.err, self.err
        return True


def no_curves(*_):
    """Stands for draw_curves, which takes most of the time of a tiny run."""


class Terminal(io.StringIO):
    """What is written on a terminal."""

    def isatty(self):
        return True


def train(*words, backbone=tiny_backbone, curves=no_curves, stream=io.StringIO):
    """python -m export train in this process, on the tiny backbone, without curves."""
    out, err = io.StringIO(), stream()
    with (
        mock.patch.object(export.backbones.load, "load_backbone", backbone),
        mock.patch.object(export.train.loop, "draw_curves", curves),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = main(["train", *map(str, words)])
        except SystemExit as end:
            code = end.code
    return Ended(code, out.getvalue(), err.getvalue())


def trained(data, out, *words):
    """Train a tiny head without an error; returns the folder of the run."""
    ended = train("segunify", "--data", data, "-o", out, *TINY, "-q", *words)
    assert ended.code == 0, ended.err
    return out


def log_rows(run):
    """log.csv without the seconds."""
    lines = (run / "log.csv").read_text().splitlines()
    return [line.rpartition(",")[0] for line in lines]


def _call_then(end, at, before):
    """A function that calls ``before``, and at its call number ``at`` first calls ``end``."""
    count = 0

    def call(*arguments):
        nonlocal count
        count += 1
        if count == at:
            end()
        return before(*arguments)

    return call


def _end_at(moment):
    """Replace a function, so that this process ends at ``moment``: during the update number 7,
    before or after the second checkpoint is renamed, or by a signal during the update number 5."""
    from export.train.segunify import SegUnify

    kill = partial(os.kill, os.getpid())
    before_update, replace, renamed = SegUnify.before_update, os.replace, 0

    def rename(source, target):
        nonlocal renamed
        renamed += str(target).endswith("checkpoint.safetensors")
        if renamed == 2 and moment == "rename":
            kill(signal.SIGKILL)
        replace(source, target)
        if renamed == 2:
            kill(signal.SIGKILL)

    if moment in ("rename", "log"):
        os.replace = rename
    else:
        number = signal.SIGKILL if moment == "step" else getattr(signal, moment)
        at = 7 if moment == "step" else 5
        SegUnify.before_update = _call_then(partial(kill, number), at, before_update)


def _run_until(moment, folder, words):
    """Train until ``moment`` in a new process, whose number is returned."""
    child = os.fork()
    if child:
        return child
    stderr = os.open(folder / f"{moment}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(stderr, 2)
    if moment == "step":
        words = [*words, "--workers", "1"]
    _end_at(moment)
    sys.exit(main(["train", *words, "-o", str(folder / moment)]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    export.backbones.load.load_backbone = tiny_backbone
    export.train.loop.draw_curves = no_curves
    folder = Path(sys.argv[1])
    # What all children need is imported once.
    import export.models.segunify
    import export.train.features

    torch.optim.Adam(torch.nn.Linear(1, 1).parameters())
    children = {m: _run_until(m, folder, sys.argv[2:]) for m in MOMENTS}
    codes = {m: os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for m, c in children.items()}
    print(json.dumps(codes))
