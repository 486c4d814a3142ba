"""sdk/video_writer.py: where videos are written, and the title of the window."""

import os
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from cases import case

from runtime.errors import InputError
from sdk import Segmenter
from sdk.source import open_video
from sdk.video_writer import Video, Window


@pytest.fixture(scope="module")
def result():
    """A result of one class, 48 x 64 pixels."""
    segmenter = Segmenter(lambda p: np.zeros(p.shape[:2], np.int32), refine=None)
    return segmenter(np.full((48, 64, 3), 90, np.uint8))


def written(path, result):
    """The number of frames of a video with three frames that is written to ``path``."""
    video = Video(path, 25.0)
    for _ in range(3):
        video.write(result)
    video.close()
    with open_video(Path(path)) as read:
        return int(read.get(cv2.CAP_PROP_FRAME_COUNT))


def test_videos_of_any_name_are_written(tmp_path, monkeypatch, result):
    monkeypatch.chdir(tmp_path)
    folder = os.fsdecode(b"d\xe9")
    for name in (
        os.fsdecode(b"caf\xe9.mp4"), f"{folder}/a.avi", f"{folder}/b.mkv", "-x.mp4", "a b#c.mp4",
        "100%d.avi", "http:/a.mp4", "pipe:/1.avi",
    ):  # fmt: skip
        with case(ascii(name)):
            path = Path(name)
            path.parent.mkdir(exist_ok=True)
            assert written(path, result) == 3
            assert not [p.name for p in path.parent.iterdir() if p.name.startswith(".")]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, result):
    folder, links = tmp_path / os.fsdecode(b"d\xe9"), tmp_path / "links"
    folder.mkdir()
    links.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(links))
    video = Video(folder / "a.mp4", 25.0)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(InputError, match=r"a.mp4 cannot be.*: No sp"),
    ):
        patch.setattr("sdk.video_writer.write_new", full)
        video.write(result)
    assert not list(links.iterdir())
    video.close()
    gone = tmp_path / "gone"
    gone.mkdir()
    video = Video(gone / "a.mp4", 25.0)
    gone.rmdir()
    with pytest.raises(InputError, match=r"a.mp4 cannot be written"):
        video.write(result)
    assert not [*folder.iterdir(), *links.iterdir()]


def test_the_link_of_a_video_is_removed_when_it_is_closed(tmp_path, monkeypatch, result):
    folder, links = tmp_path / os.fsdecode(b"d\xe9"), tmp_path / "links"
    folder.mkdir()
    links.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(links))
    video = Video(folder / "a.avi", 25.0)
    video.write(result)
    assert list(links.iterdir())
    video.close()
    assert not list(links.iterdir()) and os.listdir(folder) == ["a.avi"]


def test_a_codec_that_fails_leaves_no_file(tmp_path, monkeypatch, result):
    class Closed:
        fourcc = staticmethod(lambda *_: 0)

        def __init__(self, *_):
            pass

        def isOpened(self):
            return False

    monkeypatch.setattr(cv2, "VideoWriter", Closed)
    with pytest.raises(
        InputError, match=r"OpenCV cannot write .*a.mp4 at 64 x 48\n  fix: try .avi"
    ):
        Video(tmp_path / "a.mp4", 25.0).write(result)
    assert not list(tmp_path.iterdir())


def test_a_removed_current_folder(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(InputError, match=r"a.mp4 cannot be written"):
        Video(Path("a.mp4"), 25.0)


def test_the_title_of_a_window_is_utf8(monkeypatch, result):
    titles = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "imshow", lambda title, picture: titles.append(title))
    monkeypatch.setattr(cv2, "waitKey", lambda delay: -1)
    monkeypatch.setattr(cv2, "getWindowProperty", lambda title, number: titles.append(title) or 1)
    window = Window(os.fsdecode(b"caf\xe9"))
    window.show(result)
    assert titles == ["caf?"] * 2 and window.open
