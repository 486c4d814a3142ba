"""The inputs of the profiler: missing files, names of any kind, and hashes of models."""

import os
from argparse import Namespace

import cv2
import numpy as np
import pytest
from cases import case

pytest.importorskip("scipy", reason="the profiler needs SciPy")
pytest.importorskip("matplotlib", reason="the profiler's page needs matplotlib")

from benchmarks import __main__ as command
from benchmarks.latency import inputs
from runtime.errors import InputError


def test_files_that_are_missing_are_named(capsys):
    for argv, message in (
        (["--picture", "none.png"], "none.png"),
        (["--video", "none.mp4"], "none.mp4 does not exist"),
        (["nothing.onnx"], "nothing.onnx"),
        (["nothing"], "which does not exist"),
        (["--refine", ",".join(map(str, range(60)))], "these are 120 rows; wanted at most 100"),
        (["--picture", "README.md", "--labels", "none.png"], "README.md"),
        (["--video", "rtsp://me:s3cret@cam/1"], "rtsp://cam/1 is a URL, wanted a path"),
        (["--video", "tests"], "tests cannot be opened as a video"),
        (["--video", "x" * 300], "cannot be read: File name too long"),
    ):
        assert command.main(["latency", *argv]) == 1, argv
        told = capsys.readouterr()
        assert message in told.err and "Traceback" not in told.err and not told.out, argv


def asked(**options):
    """Options with which nothing else is read than ``options`` name."""
    return Namespace(**{"video": None, "picture": None, "labels": None, "imgsz": None} | options)


def test_videos_of_any_name_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = (os.fsdecode(b"caf\xe9.avi"), "-x.avi", "100%d.avi", "http:x.avi")
    writer = cv2.VideoWriter("a.avi", cv2.VideoWriter.fourcc(*"MJPG"), 20, (32, 24))
    for i in range(3):
        writer.write(np.full((24, 32, 3), (20, 20, 60 * i + 20), np.uint8))  # BGR
    writer.release()
    for name in names:
        with case(ascii(name)):
            (tmp_path / name).write_bytes((tmp_path / "a.avi").read_bytes())
            pictures, truths = inputs.load_pictures(asked(video=name))
            colours = [p.mean((0, 1)) for p in pictures]
            wanted = [(60 * i + 20, 20, 20) for i in (0, 1, 2, 1)]
            assert np.allclose(colours, wanted, atol=5) and truths is None


def test_labels_that_cannot_be_read_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture, folder = np.zeros((4, 5, 3), np.uint8), tmp_path / os.fsdecode(b"d\xe9")
    folder.mkdir()
    for path, pixels in (("p.png", picture), ("3.png", picture), ("1.png", picture[..., 0] + 7)):
        (folder / path).write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    (folder / "loop").symlink_to("loop")
    (folder / "empty.png").write_bytes(b"")
    shown = asked(picture=[str(folder / "p.png")])
    for name, message in (
        ("none.png", "none.png does not exist"),
        ("", "is a folder, wanted a picture"),
        ("loop", "loop cannot be read: Too many levels"),
        ("empty.png", "empty.png is empty"),
        ("3.png", "3.png is no picture with one channel of class numbers"),
    ):
        with case(name), pytest.raises(InputError, match=message):
            shown.labels = [str(folder / name)]
            inputs.load_pictures(shown)
    shown.labels = [str(folder / "1.png")]
    assert (inputs.load_pictures(shown)[1][0] == 7).all()


def test_a_model_is_known_by_its_hash(tmp_path):
    from bundles import tiny_bundle

    (tmp_path / "x.onnx").write_bytes(b"abc")
    assert inputs.hashes(str(tmp_path / "x.onnx")) == {
        "x.onnx": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    }
    tiny_bundle(tmp_path / "a.bundle", with_network=False)
    (found,) = inputs.hashes(str(tmp_path / "a.bundle")).items()
    (tmp_path / "a.bundle" / "notes.txt").write_text("not the bundle's")
    assert inputs.hashes(str(tmp_path / "a.bundle")) == dict([found])
    assert found[0] == "a.bundle/manifest.json" and len(found[1]) == 64
    assert inputs.hashes("kmeans") == {}
