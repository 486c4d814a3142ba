"""Writing annotated videos, the live window, and the names of label pictures."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import InputError, MissingBackend
from runtime.files import (
    check_place,
    file_error,
    put_in_place,
    shown,
    temporary_name,
    utf8_name,
    write_new,
)
from runtime.opencv import cv2
from sdk.result import Result
from sdk.source import named_source, open_video

VIDEOS = {".mp4": "mp4v", ".avi": "MJPG", ".mkv": "mp4v"}  # codecs in OpenCV's wheel from PyPI


class Video:
    """Writes an annotated video.

    The frames are written to a temporary file, which :meth:`close` renames to ``path``. All frames
    are scaled to the size of the first one, whose odd sides are reduced by one pixel.

    Parameters
    ----------
    path : a file name that ends in .mp4, .avi or .mkv.
    rate : frames per second.

    Raises
    ------
    InputError : ``path`` has another suffix, is a folder, a pipe or a device, or cannot be written,
        or its folder does not exist.
    """

    def __init__(self, path: Path, rate: float) -> None:
        if path.suffix.lower() not in VIDEOS:
            raise InputError(
                f"{shown(path)} is no video; wanted {', '.join(VIDEOS)}",
                fix=f"--save {shown(path.with_suffix('.mp4')) if path.name else 'out.mp4'}",
            )
        check_place(path)
        self.path, self.rate = path, rate
        try:  # In a relative path FFmpeg could take a part before ":" for a protocol.
            self._part = Path(os.path.abspath(temporary_name(path)))
        except OSError as error:  # the current folder was removed
            raise file_error("written", path, error) from error
        self._link = ExitStack()  # removes the link of utf8_name
        self._writer: Any = None
        self._size, self._dropped, self._written = (0, 0), 0, 0

    def write(self, result: Result) -> None:
        """Append the overlay of a result, and repeat it for each frame that was dropped before it.

        Raises
        ------
        InputError : OpenCV cannot write the video, or the picture has fewer than 2 x 2 pixels.
        """
        drawn = cv2.cvtColor(result.overlay(), cv2.COLOR_RGB2BGR)
        if self._writer is None:
            height, width = drawn.shape[:2]
            if min(height, width) < 2:
                raise InputError(
                    f"a video of {width} x {height} pixels cannot be written",
                    fix="leave --save out; --labels writes pictures of any size",
                )
            # Codecs store colour at half the size, so width and height have to be even.
            self._size = (width - width % 2, height - height % 2)
            code = cv2.VideoWriter.fourcc(*VIDEOS[self.path.suffix.lower()])
            name = self._link.enter_context(utf8_name(self._part))
            try:
                write_new(self._part, b"", durable=False)  # this error says more than OpenCV's
            except OSError as error:
                self._remove_part()
                raise file_error("written", self.path, error) from error
            writer = cv2.VideoWriter(name, code, self.rate, self._size)
            if not writer.isOpened():
                self._remove_part()
                raise InputError(
                    f"OpenCV cannot write {shown(self.path)} at {width} x {height}",
                    fix="try .avi, or another frame rate",
                )
            self._writer = writer
        if drawn.shape[1::-1] != self._size:
            drawn = cv2.resize(drawn, self._size, interpolation=cv2.INTER_AREA)
        dropped = result.frame.dropped if result.frame else 0
        for _ in range(1 + dropped - self._dropped):
            self._writer.write(drawn)
            self._written += 1
        self._dropped = dropped

    def close(self) -> None:
        """Finish the video and rename it to ``path``. Without a frame no file is written.

        Raises
        ------
        InputError : the video is not whole, for example because the disk is full, or ``path``
            cannot be written. An older file at ``path`` is kept.
        """
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        self._link.close()
        if not self._is_whole():  # OpenCV reports no error when the disk is full.
            self._remove_part()
            raise InputError(
                f"{shown(self.path)} could not be written whole; an older file of this name is "
                "kept",
                fix=f"free some space: df -h {shown(self.path.parent)}",
            )
        put_in_place(self._part, self.path)

    def _remove_part(self) -> None:
        """Remove the temporary file and its link."""
        self._link.close()
        with suppress(OSError):
            self._part.unlink()

    def _is_whole(self) -> bool:
        """Whether the temporary file contains all frames and the last one can be read."""
        try:
            with open_video(self._part) as video:
                count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
                video.set(cv2.CAP_PROP_POS_FRAMES, max(0, self._written - 1))
                return count >= self._written and bool(video.read()[0])
        except InputError:
            return False


class Window:
    """A window that shows results; ``open`` is False after the user closed it or pressed q.

    Raises
    ------
    InputError : this Linux machine has no display.
    """

    def __init__(self, title: str) -> None:
        if sys.platform.startswith("linux") and not (
            os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        ):
            raise InputError("there is no display", fix="leave --show out, or use --save out.mp4")
        # OpenCV crashes on a title that is not UTF-8.
        self.title, self.open = title.encode(errors="replace").decode(), True

    def show(self, result: Result) -> None:
        """Show the overlay of a result.

        Raises
        ------
        MissingBackend : this OpenCV was built without support for windows.
        """
        try:
            cv2.imshow(self.title, cv2.cvtColor(result.overlay(), cv2.COLOR_RGB2BGR))
            key = cv2.waitKey(1) & 0xFF
            self.open = key != ord("q") and cv2.getWindowProperty(self.title, 0) >= 0
        except cv2.error as error:
            raise MissingBackend(
                f"this OpenCV has no windows ({error.err})",
                fix="pip uninstall -y opencv-python-headless; pip install opencv-python",
            ) from error

    def close(self) -> None:
        """Close the window."""
        cv2.destroyAllWindows()


def label_name(index: int) -> str:
    """Return the file name for the labels of frame ``index``: "000012.png"."""
    return f"{index:06d}.png"


def frame_rate(source: Any) -> float | None:
    """Return the frames per second that a video file states; None for any other source, and for a
    file that cannot be read.

    Parameters
    ----------
    source : a source of :class:`sdk.capture.Capture`.
    """
    if isinstance(source, str):
        source = named_source(source)
    if not isinstance(source, os.PathLike):
        return None
    path = Path(os.fsdecode(source))
    if not os.path.isfile(path):  # unlike Path.is_file, it raises no error
        return None
    try:
        with open_video(path) as video:
            rate = float(video.get(cv2.CAP_PROP_FPS))
    except InputError:
        return None
    return rate if np.isfinite(rate) and rate > 0 else None
