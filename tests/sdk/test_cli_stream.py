"""sdk/__main__.py stream: video, labels, JSON and state, also where it is interrupted."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from cases import case
from dg_commands import PICTURE

from runtime.errors import InputError
from sdk import Segmenter, StreamState
from sdk.__main__ import main
from sdk.result import FrameInfo
from sdk.video_writer import Video

# --- stream --------------------------------------------------------------------------------------


def clip(path, count=12):
    """A small video: a disc that moves."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 20, (64, 48))
    for i in range(count):
        frame = np.full((48, 64, 3), (40, 90, 160), np.uint8)
        cv2.circle(frame, (10 + 3 * i, 24), 9, (200, 60, 30), -1)
        writer.write(frame)
    writer.release()
    return path


def test_stream_writes_video_labels_json_and_state(tmp_path, capsys):
    source, save = clip(tmp_path / "a.avi"), tmp_path / "out.mp4"
    labels, state = tmp_path / "labels", tmp_path / "state.safetensors"
    command = ["stream", str(source), "--save", str(save), "--labels", str(labels), "--json",
               "--state", str(state), "--warm-steps", "1", "--cold-steps", "3"]  # fmt: skip
    before = signal.getsignal(signal.SIGTERM)
    assert main(command) == 0
    assert signal.getsignal(signal.SIGTERM) == before
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [d["frame"]["index"] for d in lines] == list(range(12))
    assert [d["stats"]["steps"] for d in lines] == [3] + [1] * 11
    assert "12 frames, 0 dropped, 1.2 steps a frame" in err
    p50, p99 = np.percentile([d["timings"]["total"] for d in lines], (50, 99))
    assert f"{p50:.1f} ms a frame (p50), {p99:.1f} ms (p99)" in err
    assert [p.name for p in sorted(labels.iterdir())] == [f"{i:06d}.png" for i in range(12)]
    video = cv2.VideoCapture(str(save))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 12 and video.get(cv2.CAP_PROP_FPS) == 20
    assert video.read()[1].shape == (48, 64, 3)
    video.release()
    assert {p.name for p in tmp_path.iterdir()} == {"a.avi", "out.mp4", "labels", state.name}
    assert main([*command[:2], "--state", str(state), "--json", "--frames", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["frame"]["start"] == "warm"


def test_stream_refuses(tmp_path, monkeypatch, capsys):
    for arguments, message in [
        (("none.mp4",), "none.mp4 does not exist"),
        (("7777",), "camera 7777 cannot be opened"),
        (("a.avi", "--save", "out.txt"), "out.txt is no video; wanted .mp4"),
        (("a.avi", "--save", "none/out.mp4"), "none does not exist\n  fix: mkdir -p none"),
        (("a.avi", "--frames", "0"), "frames is 0"),
        (("a.avi", "--rate", "0"), "rate is 0"),
        (("a.avi", "--show"), "there is no display"),
        (("a.avi", "--state", "a.avi"), "a.avi would be overwritten"),
        (("a.avi", "--save", "a.avi"), "a.avi would be overwritten"),
        (("a.avi", "--labels", "a.avi"), "a.avi would be overwritten"),
        ((".", "--labels", "."), "would be overwritten"),
        (("a.avi", "--state", "none/s"), "none does not exist\n  fix: mkdir -p"),
        (("rtsp://me:secret@127.0.0.1:9/x",), "rtsp://127.0.0.1:9/x cannot be opened"),
    ]:
        with case(*arguments):
            monkeypatch.chdir(tmp_path)
            monkeypatch.delenv("DISPLAY", raising=False)
            monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
            clip(tmp_path / "a.avi", 2)
            assert main(["stream", *arguments]) == 1
            out, err = capsys.readouterr()
            assert message in err and "secret" not in err and "Traceback" not in err and not out
            assert [p.name for p in tmp_path.iterdir()] == ["a.avi"]


def test_an_interrupted_stream_keeps_what_it_has(tmp_path):
    """Three streams run at the same time; each is ended by another signal."""
    frames = tmp_path / "frames"
    frames.mkdir()
    for i in range(400):
        cv2.imwrite(str(frames / f"{i}.png"), PICTURE)
    processes = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        out = tmp_path / number.name
        out.mkdir()
        processes[number] = subprocess.Popen(
            [sys.executable, "-m", "sdk", "stream", str(frames), "--save", str(out / "a.mp4"),
             "--state", str(out / "s"), "--json", "--warm-steps", "50", "--drop", "none"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )  # fmt: skip
    for number, process in processes.items():
        for _ in range(5):
            assert process.stdout.readline()
        process.send_signal(number)
    for number, process in processes.items():
        with case(number.name):
            _, err = process.communicate(timeout=300)
            assert process.returncode == 130 and "Traceback" not in err, err
            out = tmp_path / number.name
            assert sorted(p.name for p in out.iterdir()) == ["a.mp4", "s"]
            video = cv2.VideoCapture(str(out / "a.mp4"))
            assert video.get(cv2.CAP_PROP_FRAME_COUNT) >= 5
            video.release()
            assert StreamState.load(out / "s").frames >= 5


def test_a_stream_under_nohup_continues_after_sighup(tmp_path, monkeypatch):
    save = Video.write

    def hung_up(video, result):
        signal.raise_signal(signal.SIGHUP)
        save(video, result)

    monkeypatch.setattr(Video, "write", hung_up)
    source = clip(tmp_path / "a.avi", 2)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(["stream", str(source), "--save", str(tmp_path / "b.avi")]) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_further_signals_do_not_interrupt_the_finishing_of_outputs(tmp_path, monkeypatch):
    endings = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    write, close = Video.write, Video.close

    def end(*_):
        raise KeyboardInterrupt

    def write_and_end(video, result):
        write(video, result)
        if first:
            signal.raise_signal(first)

    def close_and_end(video):
        for number in endings:
            signal.raise_signal(number)
        close(video)

    monkeypatch.setattr(Video, "write", write_and_end)
    monkeypatch.setattr(Video, "close", close_and_end)
    before = [signal.signal(number, end) for number in endings]  # the default would end the tests
    source = clip(tmp_path / "a.avi", 2)
    try:
        for first, code in ((None, 0), *((number, 130) for number in endings)):
            with case(first):
                out = tmp_path / str(first)
                out.mkdir()
                words = ["--save", str(out / "b.avi"), "--state", str(out / "s")]
                assert main(["stream", str(source), *words]) == code
                assert sorted(p.name for p in out.iterdir()) == ["b.avi", "s"]
                assert [signal.getsignal(number) for number in endings] == [end] * 3
    finally:
        for number, handler in zip(endings, before, strict=True):
            signal.signal(number, handler)


def test_a_video_that_the_disk_could_not_hold_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    result = Segmenter(lambda p: np.zeros(p.shape[:2], np.int32), refine=None)(PICTURE)
    video = Video(path, 25.0)
    for _ in range(5):
        video.write(result)
    release = video._writer.release

    class Full:
        def release(self):
            release()
            (part,) = tmp_path.glob(".*")
            part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])

    video._writer = Full()
    with pytest.raises(InputError, match="could not be written whole"):
        video.close()
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    for size in ((1, 1), (1, 30)):
        with pytest.raises(InputError, match="cannot be written"):
            small = Segmenter(lambda p: np.zeros(p.shape[:2], np.int32), refine=None)
            Video(tmp_path / "b.avi", 25.0).write(small(np.zeros((*size, 3), np.uint8)))


def test_a_video_has_the_colours_of_the_overlay_and_repeats_it_for_dropped_frames(tmp_path):
    picture = np.full((48, 64, 3), (200, 60, 20), np.uint8)
    result = Segmenter(lambda p: np.zeros(p.shape[:2], np.int32), refine=None)(picture)
    video = Video(tmp_path / "a.avi", 25.0)
    for index, dropped in ((0, 0), (3, 2), (4, 2)):
        video.write(replace(result, frame=FrameInfo(index, 0.0, dropped, "warm", [])))
    video.close()
    written = cv2.VideoCapture(str(tmp_path / "a.avi"))
    assert written.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    colours = written.read()[1][..., ::-1].mean((0, 1))
    written.release()
    np.testing.assert_allclose(colours, result.overlay().mean((0, 1)), atol=8)
    assert colours[0] > colours[2] + 20  # exchanged channels would differ


def test_a_full_disk_behind_stdout_is_one_line(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    cv2.imwrite(str(tmp_path / "0.png"), PICTURE)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sdk", "stream", str(tmp_path), "--json"],
            stdout=full, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": ""},
        )  # fmt: skip
    assert done.returncode == 1 and "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
