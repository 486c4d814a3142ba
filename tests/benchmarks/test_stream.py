"""benchmarks/quality/stream.py: short videos and few frames."""

import cv2
import numpy as np
import pytest
from cases import case

from benchmarks.quality import datasets, stream
from runtime.errors import InputError


def write_video(path, count):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 20, (32, 24))
    for i in range(count):
        writer.write(np.full((24, 32, 3), 9 * i, np.uint8))
    writer.release()
    return path


@pytest.fixture
def network(monkeypatch):
    """Stands for the network of the data set: two classes, the left and the right half."""

    class Halves:
        names = ("left", "right")

        def __call__(self, picture, _):
            guide = np.full((9, 16, 2), 0.1, np.float32)
            guide[:, :8, 0] = guide[:, 8:, 1] = 0.9
            return guide

    monkeypatch.setattr(datasets, "prior_path", lambda name: name)
    monkeypatch.setattr(stream.NetworkPrior, "from_onnx", lambda path: Halves())


def test_a_video_of_few_frames_is_measured(tmp_path, network):
    path = write_video(tmp_path / "a.avi", 3)
    rows = stream.latency(path, 9, 500.0, 1)
    assert [(row["scale"], row["warm steps"]) for row in rows] == [
        (0.25, 1), (0.25, 2), (0.5, 1), (0.5, 2)
    ]  # fmt: skip
    assert all(row["frames"] + row["dropped"] == 9 and row["total p50 ms"] > 0 for row in rows)


def test_what_cannot_be_measured_is_one_sentence(tmp_path, network):
    one, two = write_video(tmp_path / "one.avi", 1), write_video(tmp_path / "two.avi", 2)
    (tmp_path / "bad.avi").write_bytes(b"no video" * 99)
    for path, count, message in (
        (one, 9, "one.avi has one frame; wanted at least 2"),
        (tmp_path / "bad.avi", 9, "bad.avi cannot be opened as a video"),
        (tmp_path / "none.avi", 9, "none.avi does not exist"),
        (two, 1, "paced is 1, and only the first frame, .* wanted more frames\n  fix: --paced"),
    ):
        with case(message), pytest.raises(InputError, match=message):
            stream.latency(path, count, 500.0, 1)


def test_an_output_that_cannot_be_written_ends_it_before_the_measurement(tmp_path):
    with pytest.raises(InputError, match="is a folder, wanted a file name"):
        stream.main(["-o", str(tmp_path)])
