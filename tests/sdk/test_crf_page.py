"""docs/crf.md: its code runs, and its drawn pictures show what the page says about them."""

import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from drawn_pictures import photo_like

from sdk import SdkError
from sdk.__main__ import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/crf.md").read_text(encoding="utf-8")
SCRIPT = ROOT / "examples/filters.py"
METHODS = ("prior", "guided filter", "dense CRF", "refinement")


@cache
def script():
    """The module examples/filters.py."""
    spec = importlib.util.spec_from_file_location("filters", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shares(scene, inside=lambda truth: truth >= 0):
    """By method, the share of the pixels ``inside`` that are wrong."""
    picture, probabilities, truth = scene()
    where = inside(truth)
    results = {m: script().segment(picture, probabilities, m) for m in METHODS}
    return {m: float((labels != truth)[where].mean()) for m, labels in results.items()}


def test_only_the_crf_and_the_refinement_remove_spots():
    wrong = shares(script().spots)
    assert wrong["prior"] > 0.05 and wrong["guided filter"] > 0.02
    assert wrong["dense CRF"] < 1e-3 and wrong["refinement"] < 1e-3


def test_the_crf_finds_the_boundary_that_the_coarse_prior_misses():
    wrong = shares(script().coarse_prior)
    assert wrong["guided filter"] > 0.02
    assert wrong["dense CRF"] < 1e-3 < wrong["refinement"] < 0.01


def test_only_the_refinement_corrects_the_large_area_in_noise():
    wrong = shares(script().large_area)
    assert min(wrong["guided filter"], wrong["dense CRF"]) > 0.06
    assert wrong["refinement"] < 0.02


def test_the_crf_erases_the_wire_in_noise_but_not_without_noise(monkeypatch):
    lost = shares(script().thin_object, lambda truth: truth == 2)
    assert lost["guided filter"] < lost["refinement"] < 0.5 < 0.8 < lost["dense CRF"]
    noisy = script().noisy
    monkeypatch.setattr(script(), "noisy", lambda picture, deviation: noisy(picture, 1))
    assert shares(script().thin_object, lambda truth: truth == 2)["dense CRF"] < 0.1


def test_the_guided_filter_keeps_the_square_of_the_grounds_colour():
    lost = shares(script().same_colour, lambda truth: truth * (script().X > 90) == 1)
    assert lost["prior"] < lost["guided filter"] < 0.15
    assert lost["dense CRF"] > 0.9 and lost["refinement"] > 0.9


def test_a_certain_prior_keeps_its_spots_unless_the_floor_is_raised():
    import runtime

    picture, probabilities, truth = script().spots()
    guess = cv2.resize(probabilities, truth.shape[::-1]).argmax(-1)
    certain = np.float32([[0.99, 0.01], [0.01, 0.99]])[guess]
    kept = runtime.dense_crf(picture, certain).argmax(-1)
    assert (guess != truth).mean() > 0.05 and (kept != guess).mean() < 0.01
    assert (runtime.dense_crf(picture, certain, floor=0.1).argmax(-1) != truth).mean() < 1e-3


def test_the_script_draws_the_sheets_of_the_page(tmp_path):
    pytest.importorskip("skimage", reason="the demo photo is scikit-image's")
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr
    names = re.findall(r"\]\(images/(\w+\.jpg)\)", PAGE)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names) and len(names) == 2
    for name, rows in zip(sorted(names), (5, 2), strict=True):
        drawn, shown = (cv2.imread(str(f / name)) for f in (tmp_path, ROOT / "docs/images"))
        assert drawn.shape == shown.shape
        # The strips of 26 rows contain times, in the font of this OpenCV.
        differ = np.abs(drawn.astype(int) - shown).max(-1) > 64
        assert differ.reshape(rows, -1, differ.shape[1])[:, 26:].mean() < 1e-3, name
        assert (ROOT / "docs/images" / name).stat().st_size < 150_000


def test_a_missing_folder_is_one_sentence_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(script(), "drawn_sheet", lambda: pytest.fail("this is the work"))
    with pytest.raises(SdkError, match="none does not exist"):
        script().main(tmp_path / "none")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "none")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("error: folder ") and "none does not exist" in run.stderr
    assert "Traceback" not in run.stderr


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("street.jpg", photo_like())
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        names = {}
        exec(block.replace("prior.onnx", "kmeans"), names)
        if "seg" in names:
            assert names["seg"]("street.jpg").labels.shape == (60, 90)
        else:
            assert names["labels"].shape == (360, 480)
    (command,) = re.findall(r"^ {4}python -m sdk (.*)$", PAGE, re.MULTILINE)
    assert main(shlex.split(command.replace("prior.onnx", "kmeans"))) == 0
    assert Path("out/street_labels.png").exists()
    capsys.readouterr()
