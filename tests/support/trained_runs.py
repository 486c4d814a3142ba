"""Runs of the trainer whose clusters are known: a backbone that sees four colours, and its head.

The backbone has no trained weights; ``replace_backbones`` lets the code that loads backbones return
it. Each position of its features is nearly a one-hot vector of the nearest of COLOURS, and the
prototypes of the head are such vectors in another order.
"""

import json
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
from drawn_pictures import COLOURS

torch = pytest.importorskip("torch", reason="heads are trained by torch: pip install torch")

from export.backbones import Backbone  # noqa: E402 (after importorskip)
from export.train.checkpoint import pack, write_checkpoint  # noqa: E402
from export.train.config import LoopConfig  # noqa: E402
from export.train.run import BEST, CHECKPOINT, ENTRY, SCHEMA  # noqa: E402
from export.train.segunify import from_settings  # noqa: E402

STRIDE = 8
SOURCE = "/home/somebody/weights/colours.pth"
ORDER = (2, 0, 3, 1)  # the colour of each cluster
NAMES = ["brick", "grass", "sea", "sand"]  # of COLOURS


class Colours(torch.nn.Module):
    """Soft-max over the distances to COLOURS, of squares of STRIDE pixels."""

    def __init__(self):
        super().__init__()
        colours = torch.tensor(COLOURS / 127.5 - 1, dtype=torch.float32)  # mean and std are 0.5
        self.conv = torch.nn.Conv2d(3, 4, 1)
        self.conv.weight.data = (10 * 2 * colours)[..., None, None]
        self.conv.bias.data = -10 * (colours**2).sum(1)

    def forward(self, x):
        return self.conv(torch.nn.functional.avg_pool2d(x, STRIDE)).softmax(1)


def backbone(**changes):
    """The backbone, with other fields as ``changes`` says."""
    fields = {
        "name": "colours",
        "module": Colours().eval().requires_grad_(False),
        "channels": 4,
        "stride": STRIDE,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "source": SOURCE,
        "features": "tokens",
        "sha256": "ab" * 32,
        "licence": "MIT",
    }
    return Backbone(**fields | changes)


def replace_backbones(monkeypatch, load=None):
    """Let ``load(source, features)`` stand for export.backbones.load.load_backbone."""

    def known(source, features):
        assert features == "tokens"
        return backbone(source=source)

    module = SimpleNamespace(load_backbone=load or known, check_torch=lambda: None)
    monkeypatch.setitem(sys.modules, "export.backbones.load", module)


def method(**changes):
    """SegUnify with known clusters: cluster k is the colour ORDER[k]."""
    settings = {"clusters": 4, "intra_shift": 0.1, "inter_shift": 0.5, "dim": 4}
    settings |= {"projector": "smooseg", "dropout": 0.0}
    made = from_settings(settings | changes, 4)
    with torch.no_grad():
        for parameter in made.module.projector.parameters():
            parameter.zero_()
        made.module.projector.linear[0].weight.copy_(torch.eye(4)[..., None, None])
        made.module.teacher.copy_(torch.eye(4)[list(ORDER)])
    return made


def write_run(
    folder, data, *, made=None, own=None, size=64, step=3, best=None, loop=None, **changes
):
    """Write a run of 3 steps, and return its folder.

    ``data`` are the pictures' folders, ``made`` the method, ``own`` the backbone, ``step`` that of
    the last checkpoint, and ``best`` that of the chosen one, if it is another one.
    """
    made, own = made or method(), own or backbone()
    folder.mkdir(parents=True, exist_ok=True)
    entry = {
        "schema": SCHEMA,
        "method": made.name,
        "settings": made.settings(),
        "options": {},
        "backbone": own.entry(),
        "data": [str(path) for path in data],
        "files": 4,
        "files_sha256": "cd" * 32,
        "views": {"size": size, "crops": "centre"},
        "loop": loop_entry(**loop or {}),
        "versions": {"torch": "2"},
        "command": "python -m export train segunify --data /home/somebody/pictures",
    }
    (folder / ENTRY).write_text(json.dumps(entry | changes))
    for file, number in ((CHECKPOINT, step), (BEST, best)):
        if number is not None:
            write_checkpoint(folder, checkpoint(made, number, best), file)
    return folder


def loop_entry(**changes):
    """The field "loop" of run.json."""
    return asdict(LoopConfig(**{"steps": 3, "seed": 7, "every": 3} | changes))


def checkpoint(made, step, best=None):
    """The bytes of a checkpoint; ``best`` is the step of the chosen one."""
    chosen = None if best is None else {"step": best, "value": 0.5}
    state = {"step": step, "broken": {}, "losses": {}, "seconds": 0.0, "best": chosen}
    return pack(made.module, made.optimiser(1e-4), state | {"log": {"count": 0, "sums": {}}})


def mosaic(seed, height=96, width=128):
    """A picture of 8 x 8 fields of COLOURS with noise, and which colour is where."""
    rng = np.random.default_rng(seed)
    truth = np.kron(rng.integers(0, 4, (8, 8)), np.ones((height // 8, width // 8), int))
    picture = COLOURS[truth] + rng.integers(-20, 21, (height, width, 3))
    return np.clip(picture, 0, 255).astype(np.uint8), truth.astype(np.uint8)
