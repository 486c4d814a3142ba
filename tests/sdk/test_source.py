"""sdk/source.py: what a text names, what is shown of it, and opening videos of any name."""

import errno
import os
import socket
import stat
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
from cases import case

from runtime.errors import InputError
from sdk.capture import Capture
from sdk.source import named_source, open_video, shown_name
from sdk.video_writer import frame_rate

UNDECODABLE = os.fsdecode(b"caf\xe9.avi")
NAMES = (
    UNDECODABLE, "-x.avi", "a b#c.avi", "a ! b.avi", "100%.avi", "a%03d.avi", "clip_0001.avi",
    "http:x.avi", "pipe:0.avi", "concat:a|b.avi", "\u65e5\u672c.avi", "2024", "\u00b2", "c:",
)  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The bytes of an MP4 video of three frames, 20 a second; only FFmpeg can read it."""
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 20, (32, 24))
    for i in range(3):
        writer.write(np.full((24, 32, 3), 60 * i, np.uint8))
    writer.release()
    return path.read_bytes()


def test_what_a_text_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2024").mkdir()
    (tmp_path / "a ! b").write_bytes(b"")
    long = "fakesrc name=" + "x" * 5000 + " ! appsink"
    for text, found in (
        ("2024", Path("2024")),
        ("./2024", Path("2024")),
        ("2025", 2025),
        ("0", 0),
        ("007", 7),
        ("./2025", Path("2025")),
        ("-1", Path("-1")),
        ("\u00b2", Path("\u00b2")),
        ("\u0663", Path("\u0663")),  # an Arabic digit
        ("9" * 5000, Path("9" * 5000)),
        ("a ! b", Path("a ! b")),
        ("a ! c", "a ! c"),
        (long, long),
        ("rtsp://cam/1", "rtsp://cam/1"),
        ("RTSP://Cam/A", "rtsp://Cam/A"),
        ("c:/x.mp4", Path("c:/x.mp4")),
        ("c://x.mp4", Path("c://x.mp4")),
        ("file:///a%20b%25.mp4", Path("/a b%.mp4")),
        ("File://localhost/a#b?c.mp4", Path("/a#b?c.mp4")),
        ("file:/a.mp4", Path("/a.mp4")),
        ("file:///caf%E9.avi", Path("/" + UNDECODABLE)),
        ("file://other/a.mp4", Path("file://other/a.mp4")),
        ("a\0b", Path("a\0b")),
        ("\ud800", Path("\ud800")),
    ):
        with case(text[:40]):
            assert named_source(text) == found and type(named_source(text)) in (
                int,
                str,
                type(Path()),
            )


def test_digits_are_a_path_if_it_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="camera 2024 cannot be opened"), Capture("2024") as none:
        list(none)
    (tmp_path / "2024").mkdir()
    cv2.imwrite("2024/a.png", np.full((4, 5, 3), 7, np.uint8))
    with Capture("2024") as capture:
        assert not capture.live and [frame.picture.max() for frame in capture] == [7]
    with pytest.raises(InputError, match="camera 2024 cannot be opened"), Capture(2024) as camera:
        list(camera)
    for text in ("\u00b2", "./7", "-1"):
        with case(text), pytest.raises(InputError, match="does not exist"):
            Capture(text)
    with pytest.raises(InputError, match="source is empty"):
        Capture("")


def test_videos_of_any_name_are_read(tmp_path, monkeypatch, clip):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        with case(ascii(name)):
            (tmp_path / name).write_bytes(clip)
            for source in (name, Path(name), tmp_path / name):
                with Capture(source) as capture:
                    levels = [frame.picture.mean() for frame in capture]
                assert np.allclose(levels, [0, 60, 120], atol=3) and not capture.notes
                assert frame_rate(source) == 20
    folder = tmp_path / os.fsdecode(b"d\xe9")
    folder.mkdir()
    (folder / "a.avi").write_bytes(clip)
    with Capture(folder / "a.avi") as capture:
        assert len(list(capture)) == 3
    with Capture("file://" + str(tmp_path) + "/caf%E9.avi") as capture:
        assert len(list(capture)) == 3 and not capture.live


def test_a_video_that_is_not_utf8_can_be_read_from_its_middle(tmp_path, clip):
    (tmp_path / UNDECODABLE).write_bytes(clip)
    with open_video(tmp_path / UNDECODABLE) as video:
        for frame in (2, 0, 1):
            assert video.set(cv2.CAP_PROP_POS_FRAMES, frame)
            assert abs(video.read()[1].mean() - 60 * frame) < 3


def test_texts_that_are_not_utf8_are_refused():
    for text in ("rtsp://u:secret@h/\udce9", "filesrc location=\udce9 ! appsink", "http://h/\0x"):
        with case(ascii(text)):
            with (
                pytest.raises(InputError, match="are not UTF-8") as caught,
                Capture(text) as capture,
            ):
                list(capture)
            assert "secret" not in str(caught.value)
            assert frame_rate(text) is None


def test_no_other_file_than_the_named_one_is_opened(tmp_path, clip):
    """OpenCV's image sequences would play seq_1.mp4 and seq_2.mp4, which only OpenCV can read."""
    data = cv2.imencode(".pam", np.zeros((24, 32, 3), np.uint8))[1].tobytes()
    for i in (1, 2):
        (tmp_path / f"seq_{i}.mp4").write_bytes(data)
    with pytest.raises(InputError, match=r"seq_1.mp4 cannot be opened as a video"):
        with open_video(tmp_path / "seq_1.mp4"):
            pass
    (tmp_path / "a ! b.avi").write_bytes(clip)
    with pytest.raises(InputError, match="the GStreamer pipeline cannot be opened"):
        with open_video(f"{tmp_path}/a ! b.avi"):  # a pipeline is no name of a file for FFmpeg
            pass
    for name in ("seq_3.mp4", "seq_%d.mp4", "seq_%d.png"):
        with case(name), pytest.raises(InputError, match="does not exist"):
            Capture(tmp_path / name)


def test_files_that_cannot_be_read_are_one_sentence(tmp_path, monkeypatch, clip):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.avi").symlink_to("loop.avi")
    (tmp_path / "file").write_bytes(b"")
    for name, message in (
        ("none.mp4", "none.mp4 does not exist"),
        ("file/a.mp4", "file/a.mp4 does not exist"),
        ("loop.avi", "loop.avi cannot be read: Too many levels"),
        ("x" * 300, "cannot be read: File name too long"),
        ("\0", "cannot be read: embedded null byte"),
    ):
        with case(ascii(name)):
            for source in (name, Path(name)):
                with pytest.raises(InputError, match=message):
                    Capture(source)
            assert frame_rate(name) is None
    (tmp_path / "bad.avi").write_bytes(b"no video" * 99)
    assert frame_rate("bad.avi") is None
    (tmp_path / "a.avi").write_bytes(clip)

    def locked(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="Permission denied\n"):
        patch.setattr(os, "stat", locked)
        Capture(Path("a.avi"))
    with (
        monkeypatch.context() as patch,
        pytest.raises(InputError, match=r"a.avi cannot be read: Per"),
    ):
        patch.setattr(Path, "open", locked)
        with open_video(Path("a.avi")):
            pass


# What the user writes, and what is shown. The secrets are "s3", "c/r", "e@t" and the like.
SHOWN = [
    ("rtsp://10.0.0.7:554/1", "rtsp://10.0.0.7:554/1"),
    ("rtsp://me:s3cret@10.0.0.7/1", "rtsp://10.0.0.7/1"),
    ("RTSP://me:s3cret@cam/1", "RTSP://cam/1"),
    ("rtsp://me:s3/cret@cam/1", "rtsp://cam/1"),
    ("rtsp://me:s3@cret@cam/1", "rtsp://cam/1"),
    ("rtsp://me:s3?cret@cam/1", "rtsp://cam/1"),
    ("rtsp://me:s3#cret@cam/1", "rtsp://cam/1"),
    ("rtsp://me:123/s3cret@cam/1", "rtsp://cam/1"),
    ("rtsp://me:s3cret", "rtsp://me:***"),
    ("rtsp://me:123s3/cret", "rtsp://me:***"),
    ("rtsp://me:s3cret cret/1", "rtsp://me:***"),
    ("rtsp://cam/user=s3_password=s3_cret_channel=1_stream=0.sdp",
     "rtsp://cam/user=***_password=***_channel=1_stream=0.sdp"),
    ("rtsp://cam:554/user=s3&pwd=cret&channel=1", "rtsp://cam:554/user=***&pwd=***&channel=***"),
    ("rtsp://cam/token=s3/cret/KEY=s3cret?x", "rtsp://cam/token=***/KEY=***?***"),
    ("cam/user=s3_passwd=cret_x=1.sdp", "cam/user=***_passwd=***_x=1.sdp"),
    ("rtsp://me:s3 cret@cam/1", "rtsp://cam/1"),
    ("rtsp://me:s3\ncret@cam/1", "rtsp://cam/1"),
    ("rtsp://s3cret@cam/1", "rtsp://cam/1"),
    ("rtsp://me:s3%2Fcret@cam/1", "rtsp://cam/1"),
    ("rtsp://me%3As3cret%40cam/1", "rtsp://cam/1"),
    ("rtsp://me:s3cret@[fe80::1]:554/1", "rtsp://[fe80::1]:554/1"),
    (" rtsp://me:s3cret@cam/1", "rtsp://cam/1"),
    ("rtsp:/me:s3cret@cam/1", "rtsp:/cam/1"),
    ("me:s3cret@cam/1", "me:cam/1"),
    ("http://cam/a?token=s3cret", "http://cam/a?token=***"),
    ("http://cam/a?user=s3&pwd=cret&x", "http://cam/a?user=***&pwd=***&***"),
    ("http://cam/a?s3cret", "http://cam/a?***"),
    ("http://cam/a?x=s3=cret;b=cret", "http://cam/a?x=***;b=***"),
    ("http://cam/a#access_token=s3cret", "http://cam/a#access_token=***"),
    ("http://cam/a?mail=me@home&token=s3cret", "http://home&token=***"),
    ("http:/cam/a?token=s3cret", "http:/cam/a?token=***"),
    ("http://proxy/rtsp://me:s3cret@cam/1", "http://cam/1"),
    ("srt://cam:9?passphrase=s3cret&mode=caller", "srt://cam:9?passphrase=***&mode=***"),
    ("rtmp://cam/app user=me pass=s3cret", "rtmp://cam/app user=*** pass=***"),
    ("rtspsrc location=rtsp://me:s3cret@cam user-pw=s3 ! decodebin ! appsink",
     "rtspsrc ! decodebin ! appsink"),
    ('rtspsrc user-pw="s3 ! cret" location=x ! appsink', "rtspsrc ! appsink"),
    ("rtspsrc user-pw='s3 ! cret' ! appsink", "rtspsrc ! appsink"),
    ("rtsp://me:s3cret@cam ! decodebin", "*** ! decodebin"),
    ("rtsp://me:s3 ! cret@cam ! decodebin", "*** ! *** ! decodebin"),
    ("rtspsrc user-pw=s3cret location=x", "rtspsrc user-pw=*** location=***"),
    *((f"a.mp4 {word}=s3cret", f"a.mp4 {word}=***") for word in
      ("pass", "password", "passphrase", "pw", "pwd", "token", "api_key", "KEY")),
    ("a@b.mp4", "a@b.mp4"),
    ("night 10:30 a.mp4", "night 10:30 a.mp4"),
    ("runs/lr=0.1/a b.mp4", "runs/lr=0.1/a b.mp4"),
    ("0", "0"),
]  # fmt: skip


def test_passwords_are_never_shown():
    for source, wanted in SHOWN:
        with case(source):
            assert shown_name(source) == wanted
            assert "s3" not in wanted and "cret" not in wanted
    assert shown_name("a.mp4 secret=1") == "a.mp4 secret=***"


def test_a_name_is_shown_as_it_is_if_the_file_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("me:x@home a?b.mp4", "a=1 ! b.mp4"):
        (tmp_path / name).write_bytes(b"")
        assert shown_name(name) == name
    assert shown_name(UNDECODABLE) == "caf?.avi" and shown_name("a\nb") == "a\\nb"


def test_neither_messages_nor_logs_show_a_password(capfd):
    for source in (
        "rtsp://me:s3cret@127.0.0.1:9/x", "rtsp://me:s3/cret@127.0.0.1:9/x",
        "http://me:s3cret@127.0.0.1:9/x1?token=s3cret", "rtmp://me:s3cret@127.0.0.1:9/a/b",
        "nosuch://me:s3cret@h/x", "rtsp:/me:s3cret@127.0.0.1/x", "rtspsrc user-pw=s3cret ! appsink",
    ):  # fmt: skip
        with case(source):
            with pytest.raises(InputError) as caught, Capture(source) as capture:
                list(capture)
            shown = (
                str(caught.value) + str(caught.value.__cause__ or "") + "".join(capfd.readouterr())
            )
            assert "s3" not in shown and "cret" not in shown
    with pytest.raises(InputError, match="in a password write / as %2F and @ as %40"):
        with open_video("rtsp://me:s3/cret@127.0.0.1:9/x"):
            pass


def test_a_server_that_refuses_the_password(capfd):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse():
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    client.recv(4096)
                    client.sendall(b"HTTP/1.0 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=refuse, daemon=True)
        thread.start()
        url = f"http://me:s3cret@127.0.0.1:{server.getsockname()[1]}/x?token=s3cret"
        with pytest.raises(InputError, match=r"/x\?token=\*\*\* cannot be opened"):
            with open_video(url):
                pass
        server.shutdown(socket.SHUT_RDWR)
    thread.join(20)
    assert not thread.is_alive() and "s3cret" not in "".join(capfd.readouterr())


def test_a_url_of_a_video_ends_after_its_last_frame(tmp_path, clip):
    """Only a source without a number of frames, such as a camera, must not end."""
    (tmp_path / "a.mp4").write_bytes(clip)
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/a.mp4"
            with Capture(url, drop="none", timeout=60) as capture:
                assert capture.live and len(list(capture)) == 3
        finally:
            server.shutdown()
            thread.join()


def test_a_video_that_is_a_pipe(tmp_path, monkeypatch, clip):
    """A file that is no regular file is opened by OpenCV alone: it can be read only once."""
    os.mkfifo(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)

    def write():
        with open(tmp_path / "pipe", "wb") as pipe:
            pipe.write(clip)

    def refuse(path, *_, **__):
        raise OSError(errno.EPERM, "the pipe is opened twice", path)

    monkeypatch.setattr(Path, "open", refuse)
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    with Capture(tmp_path / "pipe", timeout=60) as capture:
        assert len(list(capture)) == 3
    writer.join(20)
    assert not writer.is_alive()


def test_ffmpeg_starts_no_thread(tmp_path):
    """Where FFmpeg could not start one, OpenCV returned one constant frame again and again."""
    path, tasks = tmp_path / "a.avi", Path("/proc/self/task")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 20, (320, 240))
    for _ in range(3):
        writer.write(np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8))
    writer.release()
    before = len(list(tasks.iterdir()))
    with open_video(path) as video:
        assert all(video.read()[0] for _ in range(3))
        assert len(list(tasks.iterdir())) <= before
