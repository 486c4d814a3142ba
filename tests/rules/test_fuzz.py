"""The script that runs the fuzz targets, in a clone without .venv."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).with_name("fuzz.sh")


def test_a_missing_python_is_one_line():
    done = subprocess.run(
        ["bash", SCRIPT],
        env={**os.environ, "PYTHON": "/nowhere/python"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith('fuzz.sh: /nowhere/python is missing; run "make test" first, or ')
