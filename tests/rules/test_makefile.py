"""When make builds the core again, and what it says about CUDA. A script stands for Python."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Python of the virtual environment: setup_cuda.py prints a line; other commands are logged.
PYTHON = """#!/bin/sh
case "$1" in
  setup_cuda.py) echo "CUDA core: chosen for $SEG_CUDA,$SEG_CUDA_ARCHS,$SEG_CUDA_WITHOUT_GPU" ;;
  *) echo "$*: $SEG_CUDA,$SEG_CUDA_ARCHS,$SEG_CUDA_WITHOUT_GPU" >>log ;;
esac
"""
PIP = "-m pip install -q --disable-pip-version-check -e"


@pytest.fixture
def make(tmp_path):
    """Runs make in a copy of the project; returns its lines about CUDA, and the logged commands."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("setup.py", "setup_cuda.py", "pyproject.toml", "runtime/csrc/x.cpp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(PYTHON)
    (tmp_path / ".venv/bin/python").chmod(0o755)

    def run(goal, **environment):
        (tmp_path / "log").write_text("")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SEG_", "MAKE"))}
        done = subprocess.run(
            ["make", goal], cwd=tmp_path, capture_output=True, text=True, env=kept | environment
        )
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stdout.splitlines() if line.startswith("CUDA")]
        return said, (tmp_path / "log").read_text().splitlines()

    return run


def test_make_says_once_what_is_chosen(make):
    assert make("demo") == (
        ["CUDA core: chosen for ,,"],
        [f"{PIP} .[run,demo]: ,,", "-m sdk demo -o out: ,,"],
    )
    assert make("demo") == ([], ["-m sdk demo -o out: ,,"])  # nothing has changed


def test_tests_without_a_gpu_want_one_architecture(make):
    said, ran = make("test")
    assert said == ["CUDA core: chosen for ,,75"] and ran[0] == f"{PIP} .[run,test]: ,,75"
    said, _ = make("demo")
    assert said == ["CUDA core: chosen for ,,"]
    assert make("test")[0] == []
    said, _ = make("test", SEG_CUDA_ARCHS="75,90")
    assert said == ["CUDA core: chosen for ,75,90,75"]


def test_another_wish_builds_again_and_none_does_not(make):
    def built(goal, **environment):
        said, ran = make(goal, **environment)
        return len(said), sum("pip" in line for line in ran)

    for wish, times in (
        ({}, 1),
        ({}, 0),
        ({"SEG_CUDA_ARCHS": "75"}, 1),
        ({"SEG_CUDA_ARCHS": "75"}, 0),
        ({}, 0),  # no wish: the last one holds
        ({"SEG_CUDA": ""}, 0),
        ({"SEG_CUDA_ARCHS": "87"}, 1),
        ({"SEG_CUDA": "0"}, 1),
        ({"SEG_CUDA": "0"}, 0),
        ({"SEG_CUDA": "1"}, 1),
    ):
        assert built("demo", **wish) == (times, times), wish


def test_a_changed_source_builds_again(make, tmp_path):
    for goal in ("demo", "test"):
        make(goal)
        later = (tmp_path / ".venv" / goal).stat().st_mtime + 5
        for name in ("setup_cuda.py", "runtime/csrc/x.cpp"):
            os.utime(tmp_path / name, (later, later))
            said, ran = make(goal)
            assert len(said) == 1 and "pip install" in ran[0], (goal, name)
            os.utime(tmp_path / name, (1, 1))
