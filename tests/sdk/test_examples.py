"""The programs in examples/, where an output cannot be written."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
from cases import case

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_reader_that_ends_is_no_traceback(tmp_path):
    path = tmp_path / "a.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 20, (64, 48))
    for i in range(20):
        writer.write(np.full((48, 64, 3), 10 * i, np.uint8))
    writer.release()
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "camera.py"), str(path)],
        env={"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(EXAMPLES.parent)},  # without a display
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline().startswith("frame 0: ")
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(timeout=300) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_missing_folder_is_one_sentence_before_the_work(tmp_path):
    for name in ("panels.py", "flicker.py"):
        with case(name):
            run = subprocess.run(
                [sys.executable, str(EXAMPLES / name), str(tmp_path / "none/a.png")],
                capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            assert run.returncode == 1 and run.stdout == ""
            assert run.stderr.startswith("error: folder ") and "none does not exist" in run.stderr
            assert "Traceback" not in run.stderr
