"""Reading frames in a thread: from a camera, a video, a network stream, a folder, an iterable."""

from __future__ import annotations

import os
import queue
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.checks import check_count, check_positive
from runtime.errors import DeviceError, InputError
from runtime.opencv import cv2
from runtime.pictures.files import SUFFIXES, picture_files
from runtime.pictures.load import load_image, path_of
from sdk.source import mode_of, name_of, named_source, open_video, shown_name

QUEUE = 4  # most frames in the queue with drop="none"
BROKEN = 10  # this many unreadable frames in a row end a stream
DROPS = ("oldest", "none")
PLAYER = "check that a player can play the source"


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a stream.

    Parameters
    ----------
    index : the frame's number in the source, from 0; dropped and unreadable frames count too.
    time : when the frame was read, in seconds since the first frame.
    picture : (H, W, 3) uint8 RGB.
    notes : what happened since the frame before, one sentence each.
    path : of the picture's file; None for a frame of a video or camera, and for an array.
    """

    index: int
    time: float
    picture: np.ndarray
    notes: list[str]
    path: Path | None = None


class Capture:
    """Reads the frames of a source in a thread.

    A with statement starts the thread and ends it; inside it, iterate over the object to get
    :class:`Frame` objects. ``dropped`` counts the dropped frames. After the last frame, ``notes``
    says what happened after it.

    Parameters
    ----------
    source : one of these. The number of a camera. The path of a video. A folder of pictures, which
        are read in the order of :func:`runtime.pictures.files.picture_files`. A URL (rtsp://,
        http://, ...) or a GStreamer pipeline (with " ! ") that OpenCV can open. An iterable of
        pictures, each a path, bytes or a (H, W, 3) uint8 array; the thread advances the iterable.
        :func:`named_source` decides what a text is.
    drop : what happens if frames are read faster than the caller uses them. "oldest" keeps only the
        newest frame. "none" keeps up to QUEUE frames, then reading waits. None means "oldest" for
        cameras, URLs and pipelines and if ``rate`` is set, else "none".
    rate : frames per second. Frames of a file or an iterable are delayed to this rate. Of a camera,
        URL or pipeline, surplus frames are left out; ``dropped`` does not count these.
    color : channel order of an iterable's arrays, "rgb" or "bgr".
    timeout : seconds without a frame after which the source counts as stalled; with ``rate`` at
        least 2 / ``rate``.

    Raises
    ------
    InputError : an option is out of range, or the source is of another type, does not exist or
        cannot be read. In the iteration: the source cannot be opened, has no readable frame,
        stalls, has BROKEN unreadable frames in a row, or is a camera, URL or pipeline that ends.
    DeviceError : at the start of the with statement: the thread cannot be started.
    Exception : in the iteration: any exception that the user's iterable raises.
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
            raise InputError(
                f"drop is {drop!r}; wanted 'oldest' or 'none'",
                fix="'none' to use every frame, 'oldest' for the least delay",
            )
        if color not in ("rgb", "bgr"):
            raise InputError(
                f"color is {color!r}; wanted 'rgb' or 'bgr'",
                fix="'bgr' for pictures that OpenCV has read, else 'rgb'",
            )
        self._rate = None if rate is None else check_positive("rate", rate)
        self._timeout = check_positive("timeout", timeout)
        if self._rate is not None:
            self._timeout = max(self._timeout, 2 / self._rate)
        self._color = color
        self.live = False  # whether frames arrive at the source's own rate, as from a camera
        self._open = self._opener(source)
        oldest = self.live or rate is not None
        self._drop = drop or ("oldest" if oldest else "none")
        self.dropped = 0
        self.notes: list[str] = []
        size = 1 if self._drop == "oldest" else QUEUE
        self._frames: queue.Queue[Frame | BaseException | None] = queue.Queue(size)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._read, name="capture", daemon=True)

    def _opener(self, source: Any) -> Any:
        """Check the source and return a function that opens it.

        The function returns an iterator over (index, item). An item is a picture, or a tuple of
        picture, warnings and path, or an InputError for an unreadable frame.
        """
        wanted = "wanted a video, a folder, a camera number, a URL or an iterable of pictures"
        if isinstance(source, bool) or source is None:
            raise InputError(f"source is {source!r}; {wanted}", fix="0 is the first camera")
        if isinstance(source, str):
            if not source:
                raise InputError(f"source is empty; {wanted}", fix="0 is the first camera")
            source = named_source(source)
        if isinstance(source, (int, np.integer)):
            self.live = True
            number = check_count("source", source, 0, 2**16)
            return lambda: self._video(number)
        if isinstance(source, str):
            self.live = True
            return lambda: self._video(source)
        if isinstance(source, os.PathLike):
            path = Path(os.fsdecode(source))
            mode = mode_of(path)
            if stat.S_ISDIR(mode):
                files = picture_files([path])
                return lambda: self._pictures(files)
            if path.suffix.lower() in SUFFIXES:
                raise InputError(
                    f"{shown_name(str(path))} is a picture, not a stream",
                    fix="dg predict, or seg(path)",
                )
            return lambda: self._video(path)
        if isinstance(source, Iterable) and not isinstance(source, (np.ndarray, bytes)):
            return lambda: self._pictures(source)
        raise InputError(
            f"source is a {type(source).__name__}; {wanted}",
            fix="pass one array as a list: [array]; encoded bytes as [data]",
        )

    def _pictures(self, source: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Read each picture of a folder or an iterable, with the warnings of :func:`load_image`."""
        for index, item in enumerate(source):
            try:
                yield index, (*load_image(item, color=self._color), path_of(item))
            except InputError as error:
                message = f"frame {index} was left out: {error.message}"
                yield index, InputError(message, fix=error.fix)

    def _video(self, source: int | str | Path) -> Iterator[tuple[int, Any]]:
        """Read a video with OpenCV.

        If a file ends before its stated number of frames, the last item is an InputError that says
        so.
        """
        with open_video(source) as video:
            name = name_of(source)
            count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
            index, at = -1, 0.0
            rate = video.get(cv2.CAP_PROP_FPS)
            while not self._ends.is_set():
                try:
                    good, frame = video.read()
                except cv2.error as error:
                    raise InputError(
                        f"OpenCV fails at frame {index + 1} of {name}", fix=PLAYER
                    ) from error
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
                raise InputError(f"{name} returned no further frame after {index + 1}",
                                 fix="check the connection")  # fmt: skip
            # In a file without an index the count is an estimate from the duration.
            short = index + 1 < 0.9 * count and (rate <= 0 or at < 0.9e3 * count / rate)
            if short and not self.live and not self._ends.is_set():
                yield index + 1, InputError(f"{name} ended after {index + 1} of {count} frames")

    def _read(self) -> None:
        """Run in the thread: put all frames into the queue, then None or an exception."""
        last: BaseException | None = None
        try:
            opened, self._open = self._open(), None  # removes the reference to the source
            with closing(opened) as frames:
                del opened
                self._queue_all(frames)
        except BaseException as error:  # __iter__ raises it in the thread of the caller
            last = error
        self._put(last, always=True)

    def _queue_all(self, frames: Iterator[tuple[int, Any]]) -> None:
        """Put each readable frame into the queue, at most ``rate`` frames per second."""
        start = due = 0.0  # times of the first frame and of the next one, by time.monotonic
        notes: list[str] = []
        broken, readable = 0, False  # unreadable frames in a row; whether any frame is readable
        for index, picture in frames:
            now = time.monotonic()
            start, due = start or now, due or now
            if isinstance(picture, InputError):
                broken, last = broken + 1, picture
                notes.append(str(picture))
                if broken >= BROKEN:
                    raise InputError(
                        f"{broken} frames in a row are unreadable: {picture.message}",
                        fix=picture.fix or PLAYER,
                    )
                continue
            broken, readable, path = 0, True, None
            if isinstance(picture, tuple):
                picture, warnings, path = picture
                notes += warnings
            if self._rate is not None:
                if self.live and now < due:
                    continue  # this frame exceeds the rate
                if self._ends.wait(max(due - now, 0)):
                    return
                now = time.monotonic()
                # After a pause the next frame is due at once, and the frames that were missed are
                # not delivered faster than the rate.
                due = max(due, now - 1 / self._rate) + 1 / self._rate
            if not self._put(Frame(index, now - start, picture, notes, path)):
                return
            notes = []
        if broken and not readable:
            errors = "the error" if broken == 1 else f"the last of {broken} errors"
            raise InputError(
                f"the source has no readable frame; {errors}: {last.message}",
                fix=last.fix or PLAYER,
            )
        self.notes = notes

    def _put(self, item: Frame | BaseException | None, *, always: bool = False) -> bool:
        """Put an item into the queue. If the queue is full and ``drop`` is "oldest", remove its
        frame first, and add that frame's notes to the item's.

        Parameters
        ----------
        always : wait for a free place in the queue, whatever ``drop`` is.

        Returns
        -------
        False if the capture was closed before the item was in the queue.
        """
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
        """Yield the frames until the source ends; raise the exception of the thread, if any."""
        any_frame = False
        while True:
            try:
                item = self._frames.get(timeout=self._timeout)
            except queue.Empty:
                raise InputError(
                    f"the source stalled: no frame for {self._timeout:g} s",
                    fix="check the camera or the connection, or set a longer timeout",
                ) from None
            if isinstance(item, BaseException):
                raise item
            if item is None:
                if not any_frame:
                    raise InputError("the source has no frame", fix="check that it is not empty")
                return
            any_frame = True
            yield item

    def close(self) -> None:
        """Stop reading and release the source.

        If a read of the source takes more than a second, this method returns before the read ends,
        and the thread releases the source later.
        """
        self._ends.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1.0)

    def __enter__(self) -> Capture:
        try:
            self._thread.start()
        except RuntimeError as error:
            raise DeviceError(
                f"the thread that reads the source cannot be started: {error}",
                fix="end other programs, or allow more threads: ulimit -u",
            ) from error
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
