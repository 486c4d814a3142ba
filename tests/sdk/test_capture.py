"""sdk/capture.py: every source, its pace, and what goes wrong with it."""

import gc
import threading
import time
from itertools import pairwise

import cv2
import numpy as np
import pytest
from cases import case

from runtime.errors import DeviceError, InputError
from sdk.capture import BROKEN, QUEUE, Capture


def pictures(count, height=24, width=32):
    """Frames whose grey level is three times their number, up to 85."""
    return [np.full((height, width, 3), 3 * i % 256, np.uint8) for i in range(count)]


def write_video(path, frames, rate=20):
    """An .avi whose frames are grey levels."""
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), rate, (width, height))
    assert writer.isOpened()
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


def taken(source, **options):
    with Capture(source, **options) as capture:
        return list(capture)


def level(frame):
    return round(float(frame.picture.mean()) / 3)


def test_an_iterable_in_order_and_its_colours():
    frame = np.zeros((4, 5, 3), np.uint8)
    frame[..., 0] = 200
    rgb, bgr = (taken([frame], color=c)[0].picture for c in ("rgb", "bgr"))
    assert (rgb == frame).all() and (bgr == frame[..., ::-1]).all()
    frames = taken(iter(pictures(20)))
    assert [f.index for f in frames] == list(range(20)) == [level(f) for f in frames]
    assert all(a.time <= b.time for a, b in pairwise(frames))


def test_a_folder_is_read_by_number(tmp_path):
    for i in (1, 2, 10):
        cv2.imwrite(str(tmp_path / f"frame{i}.png"), pictures(11)[i])
    (tmp_path / "notes.txt").write_text("no picture")
    assert [level(f) for f in taken(tmp_path)] == [1, 2, 10]
    assert [level(f) for f in taken(str(tmp_path))] == [1, 2, 10]


def test_a_video(tmp_path):
    frames = taken(write_video(tmp_path / "a.avi", pictures(30)))
    assert [level(f) for f in frames] == list(range(30))
    assert frames[0].picture.shape == (24, 32, 3) and not any(f.notes for f in frames)


def test_a_video_gives_rgb(tmp_path):
    frame = np.empty((24, 32, 3), np.uint8)
    frame[:] = 20, 60, 200  # the blue, green and red that OpenCV writes
    for got in taken(write_video(tmp_path / "a.avi", [frame] * 2)):
        np.testing.assert_allclose(got.picture.mean((0, 1)), [200, 60, 20], atol=8)


def test_a_video_is_released_whenever_it_ends(tmp_path, monkeypatch):
    path, opened = write_video(tmp_path / "a.avi", pictures(30)), []
    (tmp_path / "b.avi").write_bytes(b"no video" * 99)
    real = cv2.VideoCapture

    class Recorded:
        def __init__(self, *source):
            self.video, self.released = real(*source), False
            opened.append(self)

        def __getattr__(self, name):
            return getattr(self.video, name)

        def release(self):
            self.released = True
            self.video.release()

    monkeypatch.setattr(cv2, "VideoCapture", Recorded)
    assert len(taken(path)) == 30
    with Capture(path) as capture:
        next(iter(capture))  # the reader ends first
    capture._thread.join(60)
    with pytest.raises(InputError, match="cannot be opened"):
        taken(tmp_path / "b.avi")
    assert [video.released for video in opened] == [True] * 3


def test_a_folder_with_hidden_and_other_files(tmp_path):
    for i in (10, 9, 2):
        cv2.imwrite(str(tmp_path / f"frame{i}.png"), pictures(11)[i])
        (tmp_path / f"._frame{i}.png").write_bytes(b"\0\5\x16\7" + bytes(82))  # as macOS writes
    (tmp_path / "frame3.png").mkdir()
    (tmp_path / "frame4.PNG").symlink_to("missing")
    frames = taken(tmp_path)
    assert [level(f) for f in frames] == [2, 9, 10]
    assert [len(f.notes) for f in frames] == [0, 1, 0] and "frame4.PNG" in frames[1].notes[0]


def test_a_damaged_video_says_where_it_ended(tmp_path):
    """The header says 60 frames, half of them are gone."""
    path = write_video(tmp_path / "a.avi", pictures(60))
    data = path.read_bytes()
    index = data.rindex(b"idx1")
    middle = data.index(b"movi") + (index - data.index(b"movi")) // 2
    path.write_bytes(data[:middle] + bytes(index - middle) + data[index:])
    with Capture(path) as capture:
        got = [level(f) for f in capture]
    assert 10 < len(got) < 50
    assert capture.notes == [f"{path} ended after {len(got)} of 60 frames"]


def test_what_is_no_source_is_refused_at_once():
    for source, message in [
        ("none.mp4", "none.mp4 does not exist"),
        (None, "source is None"),
        (True, "source is True"),
        (-1, "source is -1"),
        (3.5, "source is a float"),
        (b"abc", "source is a bytes"),
        (np.zeros((4, 4, 3), np.uint8), "source is a ndarray"),
    ]:
        with case(message), pytest.raises(InputError, match=message):
            Capture(source)


def test_files_that_are_no_stream(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), pictures(1)[0])
    (tmp_path / "b.PNG").write_bytes(b"")
    for name in ("a.png", "b.PNG"):
        with pytest.raises(InputError, match="is a picture, not a stream\n  fix: dg predict"):
            Capture(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures in"):
        Capture(tmp_path / "empty")
    (tmp_path / "a.mp4").write_bytes(b"no video" * 99)
    with pytest.raises(InputError, match="cannot be opened as a video\n  fix: check that"):
        taken(tmp_path / "a.mp4")


def test_live_sources_that_are_not_there():
    for source, message in [
        (9876, "camera 9876 cannot be opened.*\n  fix: check that it is plugged in"),
        ("videotestsrc ! appsink", "the GStreamer pipeline cannot be opened"),
        ("rtsp://user:secret@127.0.0.1:9/x", "rtsp://127.0.0.1:9/x cannot be opened"),
    ]:
        with case(message):
            with pytest.raises(InputError, match=message) as caught:
                taken(source)
            assert "secret" not in str(caught.value)


def test_wrong_options():
    for options, message in [
        ({"drop": "newest"}, "drop is 'newest'"),
        ({"color": "grey"}, "color is 'grey'"),
        ({"rate": 0}, "rate is 0"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"timeout": -1}, "timeout is -1"),
    ]:
        with case(message), pytest.raises(InputError, match=message):
            Capture([], **options)


def test_no_frame_at_all():
    with pytest.raises(InputError, match="the source has no frame"):
        taken([])


def test_no_readable_frame_says_why(tmp_path):
    data = cv2.imencode(".png", pictures(1)[0])[1].tobytes()
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(data[:50])
    floats = [np.zeros((4, 5, 3), np.float32)] * 2
    for source, options, message in (
        (tmp_path, {}, r"the last of 3 errors: frame 2 was left out: .*2.png is a truncated PNG"),
        (floats, {}, r"the last of 2 errors: frame 1 was left out: .*float32"),
        ([object()], {}, r"the error: frame 0 was left out: source is a object"),
        ([b"x"] * (BROKEN - 1), {"drop": "oldest"}, rf"the last of {BROKEN - 1} errors: frame"),
        ([b"x"] * 2, {"rate": 100}, r"the last of 2 errors: frame 1"),
    ):
        with case(message):
            with pytest.raises(InputError, match="no readable frame; " + message) as caught:
                taken(source, **options)
            assert caught.value.fix


def test_a_thread_that_cannot_be_started(monkeypatch):
    capture = Capture(pictures(1))
    with monkeypatch.context() as patch:

        def full(*_, **__):
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", full)
        with pytest.raises(DeviceError, match=r"thread .* cannot be started: can't .*\n  fix: end"):
            with capture:
                pass
    with capture:
        assert len(list(capture)) == 1


def test_a_failure_inside_opencv_is_one_sentence(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.avi", pictures(3))
    real = cv2.VideoCapture

    class Failing:
        def __init__(self):
            self.video = real()

        def __getattr__(self, name):
            return getattr(self.video, name)

        def read(self):
            raise cv2.error("rtsp://me:secret@cam")

    monkeypatch.setattr(cv2, "VideoCapture", Failing)
    with pytest.raises(InputError, match=r"OpenCV fails at frame 0 of .*a.avi\n  fix: check that"):
        taken(path)


def test_broken_frames_are_left_out_and_named():
    frames = pictures(6)
    frames[2] = b"no picture"
    frames[3] = np.zeros((4, 4), np.uint16)
    got = taken(frames)
    assert [level(f) for f in got] == [0, 1, 4, 5] == [f.index for f in got]
    assert [n.split(":")[0] for n in got[2].notes] == [
        "frame 2 was left out", "frame 3 was left out"
    ]  # fmt: skip
    assert not got[3].notes


def test_broken_frames_at_the_end_are_named_too():
    with Capture([*pictures(2), b"no picture"]) as capture:
        assert len(list(capture)) == 2
    assert capture.notes[0].startswith("frame 2 was left out") and len(capture.notes) == 1


def test_many_broken_frames_end_it():
    with pytest.raises(InputError, match=f"{BROKEN} frames in a row are unreadable"):
        taken([*pictures(2), *[b"x"] * 50, *pictures(2)])


def test_what_the_iterable_raises_passes_through():
    def source():
        yield pictures(1)[0]
        raise OSError("the cable is out")

    with Capture(source()) as capture:
        frames = iter(capture)
        assert level(next(frames)) == 0
        with pytest.raises(OSError, match="the cable is out"):
            next(frames)


def test_a_stalled_source_is_an_error_and_no_hang():
    release = threading.Event()

    def source():
        yield pictures(1)[0]
        release.wait(600)

    with Capture(source(), timeout=0.3) as capture:
        with pytest.raises(InputError, match=r"stalled: no frame for 0.3 s"):
            list(capture)
    assert capture._thread.is_alive()  # closing has not waited for the source either
    release.set()
    capture._thread.join(60)
    assert not capture._thread.is_alive()


def told(frames, read):
    """Frames, and an event that they have all been taken."""
    yield from frames
    read.set()


def test_drop_none_waits_for_the_reader():
    ahead = 0

    def source():
        nonlocal ahead
        for frame in pictures(40):
            ahead += 1
            yield frame

    with Capture(source()) as capture:
        frames = iter(capture)
        next(frames)
        time.sleep(0.3)
        assert ahead <= QUEUE + 3
        assert [f.index for f in frames] == list(range(1, 40)) and capture.dropped == 0


def test_drop_oldest_keeps_the_newest():
    read = threading.Event()
    with Capture(told(pictures(60), read), drop="oldest") as capture:
        assert read.wait(20)
        frames = list(capture)
        assert frames[-1].index == 59 and capture.dropped == 60 - len(frames) >= 58


def test_drop_oldest_never_makes_the_source_wait():
    """A reader that takes its next frame when the source has made 20 more."""
    made = threading.Semaphore(0)

    def camera():
        for i, frame in enumerate(pictures(400)):
            yield frame
            if i % 20 == 19:
                made.release()
        made.release(400)  # for what is left

    with Capture(camera(), drop="oldest") as capture:
        seen = 0
        for _ in capture:
            assert made.acquire(timeout=60), "the source waits for the reader"
            seen += 1
        assert seen + capture.dropped == 400 and seen <= 20 + 2


def test_dropped_frames_leave_their_notes():
    frames = pictures(6)
    frames[1] = b"no picture"
    read = threading.Event()
    with Capture(told(frames, read), drop="oldest") as capture:
        assert read.wait(20)
        notes = [n for frame in capture for n in frame.notes]
        assert len(notes) == 1 and notes[0].startswith("frame 1 was left out")


def test_rate_is_kept_and_a_slow_reader_drops():
    start = time.monotonic()
    with Capture(iter(pictures(10)), rate=50) as capture:
        frames = list(capture)
        assert len(frames) + capture.dropped == 10
    assert 0.17 <= time.monotonic() - start
    assert all(f.time >= f.index / 50 - 1e-6 for f in frames)  # none comes before it is due
    read = threading.Event()
    with Capture(told(pictures(20), read), rate=100) as capture:
        seen = 0
        for _ in capture:
            assert read.wait(60)
            seen += 1
        assert seen + capture.dropped == 20 and seen <= 2
    assert len(taken(iter(pictures(20)), rate=500, drop="none")) == 20


def test_rate_by_a_clock_of_its_own(monkeypatch):
    """Frames come when they are due; after a pause there is no debt."""

    class Clock(threading.Event):
        now = 100.0

        def wait(self, timeout=None):
            self.now += timeout
            return self.is_set()

    clock = Clock()

    def source():
        for i, frame in enumerate(pictures(8)):
            clock.now += 0.5 if i == 4 else 0.003  # what making a frame takes
            yield frame

    capture = Capture(source(), rate=50, drop="none")
    capture._ends = clock
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    with capture:
        times = [frame.time for frame in capture]
    monkeypatch.undo()
    wanted = [0, 0.02, 0.04, 0.06, 0.56, 0.563, 0.58, 0.6]
    np.testing.assert_allclose(times, wanted, atol=1e-9)


def test_closing_ends_the_thread():
    def endless():
        while True:
            yield pictures(1)[0]

    for _ in range(5):
        with Capture(endless()) as capture:
            next(iter(capture))
    deadline = time.monotonic() + 20
    while any(t.name == "capture" for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [t for t in threading.enumerate() if t.name == "capture"]


def test_closing_waits_for_a_read_that_ends_within_a_second():
    def slow():
        while True:
            yield pictures(1)[0]
            time.sleep(0.2)

    with Capture(slow()) as capture:
        next(iter(capture))
    assert not [t for t in threading.enumerate() if t.name == "capture"]


def test_closing_releases_the_iterable():
    closed = threading.Event()

    def camera():
        try:
            while True:
                yield pictures(1)[0]
        finally:
            closed.set()

    gc.disable()
    try:
        with Capture(camera()) as capture:
            next(iter(capture))
        del capture
        assert closed.wait(20)
    finally:
        gc.enable()


def test_a_slow_rate_is_no_stall():
    start = time.monotonic()
    assert len(taken(iter(pictures(2)), rate=2, timeout=0.05)) == 2
    assert time.monotonic() - start > 0.45


def test_an_array_may_change_after_it_was_yielded():
    def camera():
        buffer = np.zeros((4, 5, 3), np.uint8)
        for i in range(10):
            buffer[:] = i
            yield buffer

    frames = taken(camera())
    assert [int(f.picture[0, 0, 0]) for f in frames] == list(range(10))
