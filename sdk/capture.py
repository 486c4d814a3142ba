"""Frames from a camera, a video, a network stream, a folder or an iterable, read by a thread."""

from __future__ import annotations

import os
import queue
import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from runtime.checks import check_count, check_positive
from runtime.errors import InputError
from runtime.pictures import SUFFIXES, load_image

QUEUE = 4  # frames that wait at most
BROKEN = 10  # unreadable frames in a row end a stream
DROPS = ("oldest", "none")


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture of a stream."""

    index: int  # in the source, from 0; gaps where frames were dropped or broken
    time: float  # seconds since the first frame, when it was captured
    picture: np.ndarray  # (H, W, 3) uint8 RGB
    notes: list[str]  # what happened to the frames before it


class Capture:
    """Reads ``source`` in a thread of its own, which a with statement starts and ends; iterate over
    it inside.

    Parameters
    ----------
    source : a camera's number; a path of a video; a folder of pictures, in the order of their
        names (numbers by value); a URL (rtsp://, http://, ...) or a GStreamer pipeline (with a
        " ! ") that OpenCV can open; or an iterable of pictures, each a path, bytes or a
        (H, W, 3) uint8 array. An iterable is advanced by the thread.
    drop : when frames come faster than they are taken: "oldest" keeps the newest only, "none" lets
        QUEUE of them wait, and then the source. None: "oldest" for cameras, URLs and pipelines, and
        wherever ``rate`` is given.
    rate : frames per second: a file or an iterable is played at it, a camera thinned out to it.
    color : channel order of an iterable's arrays, "rgb" or "bgr".
    timeout : seconds without a frame after which the source counts as stalled.

    Raises
    ------
    InputError : an option out of range; while iterating: a source that cannot be opened, has no
        frame, stalls, or gives BROKEN unreadable frames in a row. What an iterable raises passes
        through.
    """

    def __init__(
        self,
        source: Any,
        *,
        drop: str | None = None,
        rate: float | None = None,
        color: str = "rgb",
        timeout: float = 10.0,
    ) -> None:
        if drop is not None and drop not in DROPS:
            raise InputError(f"drop is {drop!r}; wanted 'oldest' or 'none'")
        if color not in ("rgb", "bgr"):
            raise InputError(f"color is {color!r}; wanted 'rgb' or 'bgr'")
        self._rate = None if rate is None else check_positive("rate", rate)
        self._timeout = check_positive("timeout", timeout)
        if self._rate is not None:
            self._timeout = max(self._timeout, 2 / self._rate)
        self._color = color
        self.live = False  # whether it makes frames at its own pace
        self._open = self._opener(source)
        oldest = self.live or rate is not None
        self._drop = drop or ("oldest" if oldest else "none")
        self.dropped = 0
        self.notes: list[str] = []  # at the end: what happened after the last frame
        size = 1 if self._drop == "oldest" else QUEUE
        self._frames: queue.Queue[Frame | BaseException | None] = queue.Queue(size)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._read, name="capture", daemon=True)

    def _opener(self, source: Any) -> Any:
        """A function that gives (index, picture or the error of an unreadable one) one by one."""
        if isinstance(source, bool) or source is None:
            raise InputError(f"source is {source!r}; wanted a video, a folder, a camera number")
        if isinstance(source, (int, np.integer)):
            self.live = True
            number = check_count("source", source, 0, 2**16)
            return lambda: self._video(number, f"camera {number}")
        if isinstance(source, (str, os.PathLike)):
            text = os.fspath(source)
            if isinstance(text, bytes):
                text = os.fsdecode(text)
            if " ! " in text:
                self.live = True
                return lambda: self._video(text, "the GStreamer pipeline", cv2.CAP_GSTREAMER)
            if re.match(r"[a-z][a-z0-9+.-]+://", text):
                self.live = not text.startswith("file:")
                return lambda: self._video(text, shown_name(text))
            path = Path(text)
            if path.is_dir():
                files = sorted(
                    (p for p in path.iterdir() if p.suffix.lower() in SUFFIXES), key=_order
                )
                if not files:
                    raise InputError(f"folder {path} has no picture ({', '.join(SUFFIXES)})")
                return lambda: self._pictures(files)
            if not path.exists():
                raise InputError(f"{path} does not exist", fix=f"seen from {Path.cwd()}")
            if path.suffix.lower() in SUFFIXES:
                raise InputError(
                    f"{path} is a picture, not a stream", fix="dg predict, or seg(path)"
                )
            return lambda: self._video(text, text)
        if isinstance(source, Iterable) and not isinstance(source, (np.ndarray, bytes)):
            return lambda: self._pictures(source)
        raise InputError(
            f"source is a {type(source).__name__}; wanted a video, a folder, a camera number, "
            "a URL or an iterable of pictures"
        )

    def _pictures(self, source: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        for index, item in enumerate(source):
            try:
                yield index, load_image(item, color=self._color)
            except InputError as error:
                yield index, InputError(f"frame {index} was left out: {error}")

    def _video(self, source: Any, name: str, api: int = cv2.CAP_ANY) -> Iterator[tuple[int, Any]]:
        """By OpenCV. A file that ends early says so."""
        video = cv2.VideoCapture(source, api)
        try:
            if not video.isOpened():
                fix = {
                    "camera": "check that it is plugged in and free: v4l2-ctl --list-devices",
                    "the GStreamer": "try it with gst-launch-1.0; pip's OpenCV has no GStreamer, "
                    "JetPack's has",
                }
                hints = [text for start, text in fix.items() if name.startswith(start)]
                hint = hints[0] if hints else "check that a player can open it"
                raise InputError(f"{name} cannot be opened as a video", fix=hint)
            count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
            index, at = -1, 0.0
            rate = video.get(cv2.CAP_PROP_FPS)
            while not self._ends.is_set():
                good, frame = video.read()
                if not good:
                    break
                index += 1
                at = video.get(cv2.CAP_PROP_POS_MSEC)
                if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                    yield (
                        index,
                        InputError(
                            f"frame {index} was left out: it is {frame.shape} {frame.dtype}"
                        ),
                    )
                    continue
                yield index, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            if self.live and count < 1 and not self._ends.is_set():
                raise InputError(f"{name} gave no further frame after {index + 1}",
                                 fix="check the connection")  # fmt: skip
            # Where there is no index, the count is an estimate from the duration.
            short = index + 1 < 0.9 * count and (rate <= 0 or at < 0.9e3 * count / rate)
            if short and not self.live and not self._ends.is_set():
                yield index + 1, InputError(f"{name} ended after {index + 1} of {count} frames")
        finally:
            video.release()

    def _read(self) -> None:
        """The thread: read, keep the pace, hand over."""
        last: BaseException | None = None
        try:
            opened, self._open = self._open(), None  # which holds the source
            with closing(opened) as frames:
                del opened
                self._hand_over_all(frames)
        except BaseException as error:  # handed to the consumer, who raises it
            last = error
        self._put(last, always=True)

    def _hand_over_all(self, frames: Iterator[tuple[int, Any]]) -> None:
        start = due = 0.0
        notes: list[str] = []
        broken = 0
        for index, picture in frames:
            now = time.monotonic()
            start, due = start or now, due or now
            if isinstance(picture, InputError):
                broken += 1
                notes.append(picture.message)
                if broken >= BROKEN:
                    raise InputError(f"{broken} frames in a row are unreadable: {picture}")
                continue
            broken = 0
            if isinstance(picture, tuple):
                picture, warnings = picture
                notes += warnings
            if self._rate is not None:
                if self.live and now < due:
                    continue  # thinned out
                if self._ends.wait(max(due - now, 0)):
                    return
                now = time.monotonic()
                due = max(due, now - 1 / self._rate) + 1 / self._rate  # no debt after a pause
            if not self._put(Frame(index, now - start, picture, notes)):
                return
            notes = []
        self.notes = notes

    def _put(self, item: Frame | BaseException | None, *, always: bool = False) -> bool:
        """Queue it; False when nobody waits any more."""
        while not self._ends.is_set():
            try:
                if self._drop == "oldest" and not always:
                    self._frames.put_nowait(item)
                else:
                    self._frames.put(item, timeout=0.1)
                return True
            except queue.Full:
                if self._drop == "oldest" and not always:
                    try:
                        old = self._frames.get_nowait()
                    except queue.Empty:
                        continue
                    self.dropped += 1
                    if isinstance(old, Frame) and isinstance(item, Frame):
                        item.notes[:0] = old.notes
        return False

    def __iter__(self) -> Iterator[Frame]:
        any_frame = False
        while True:
            try:
                item = self._frames.get(timeout=self._timeout)
            except queue.Empty:
                raise InputError(
                    f"the source stalled: no frame for {self._timeout:g} s",
                    fix="check the camera or the connection, or give a longer timeout",
                ) from None
            if isinstance(item, BaseException):
                raise item
            if item is None:
                if not any_frame:
                    raise InputError("the source has no frame")
                return
            any_frame = True
            yield item

    def close(self) -> None:
        """Stop reading and release the source. A read that hangs is left to the thread, which
        releases the source when it comes back."""
        self._ends.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1.0)

    def __enter__(self) -> Capture:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def shown_name(source: str) -> str:
    """A URL without the user's name and password."""
    return re.sub(r"//[^/]*@", "//", source)


def _order(path: Path) -> list[Any]:
    """Names with numbers by value: frame2 before frame10."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(p), "") if p.isdigit() else (-1, p) for p in parts]
