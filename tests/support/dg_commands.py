"""The command line dg, and the files that it reads and writes."""

import json
import os
import subprocess
import sys

import cv2
import pytest
from drawn_pictures import quadrants
from PIL import Image

PICTURE = quadrants(48, 64)[0]


def picture_file(path, array=None, **options):
    """Write ``array`` (PICTURE when None) as the kind of picture that ``path`` names."""
    Image.fromarray(PICTURE if array is None else array).save(path, **options)
    return str(path)


def plain_environment():
    """The user's: nothing that changes how Python buffers or warns."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}


def dg(*arguments, **options):
    """python -m sdk in a process of its own."""
    command = [sys.executable, "-m", "sdk", *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": 600, **options}
    return subprocess.run(command, env=plain_environment(), check=False, **options)


def strict(text):
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in the JSON"))


def files(folder):
    """Names of all files, hidden and temporary ones too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def labels_of(folder, stem):
    return cv2.imread(str(folder / f"{stem}_labels.png"), cv2.IMREAD_UNCHANGED)
