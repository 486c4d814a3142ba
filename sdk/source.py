"""What a stream's source is, its name in messages, and opening it with OpenCV."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from runtime.errors import InputError
from runtime.files import file_error, shown, stat_of, utf8_name
from runtime.opencv import cv2
from runtime.pictures.decode import quiet_opencv
from runtime.urls import without_secrets

_URL = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_FILE_URL = re.compile(r"file:(?://(?:localhost)?(?=/))?(/(?!/).*)", re.IGNORECASE | re.DOTALL)


def named_source(text: str) -> int | str | Path:
    """Decide what a text names, without opening it.

    Returns
    -------
    The path of a file or folder, if one of this name exists. Else the number of a camera for ASCII
    digits; the text itself for a URL and for a GStreamer pipeline, which contains " ! "; the path
    in a file: URL; or the text as a path, which does not exist.

    Examples
    --------
    >>> named_source("0"), named_source("RTSP://cam/1"), named_source("file:///a%20b.mp4")
    (0, 'rtsp://cam/1', PosixPath('/a b.mp4'))
    """
    if os.path.exists(text):  # unlike Path.exists, it raises no error
        return Path(text)
    if re.fullmatch("[0-9]{1,9}", text):
        return int(text)
    if found := _FILE_URL.fullmatch(text):
        return Path(unquote(found[1], errors="surrogateescape"))
    if " ! " in text:
        return text
    if found := _URL.match(text):  # FFmpeg knows schemes in small letters only
        return found[0].lower() + text[found.end() :]
    return Path(text)


def shown_name(source: str) -> str:
    """Return a text that names a source without user names, passwords and values of a query, as one
    line that every terminal and window can show.

    Of a GStreamer pipeline only the names of the elements remain. The name of a file or folder that
    exists is not changed.

    Examples
    --------
    >>> shown_name("rtsp://me:secret@10.0.0.7/1?token=abc")
    'rtsp://10.0.0.7/1?token=***'
    >>> shown_name("rtspsrc location=rtsp://10.0.0.7 user-pw=secret ! appsink")
    'rtspsrc ! appsink'
    """
    text = source
    if not os.path.exists(source):
        text = _elements(source) if " ! " in source else without_secrets(source)
    return shown(text.encode(errors="replace").decode())


def _elements(pipeline: str) -> str:
    """Return a GStreamer pipeline with the names of its elements only; *** replaces a word that is
    no name."""
    quoted = r"\"(?:\\.|[^\"\\])*(?:\"|$)|'(?:\\.|[^'\\])*(?:'|$)"
    parts = re.sub(quoted, "", pipeline, flags=re.DOTALL).split(" ! ")
    words = [part.split(maxsplit=1)[0] if part.strip() else "" for part in parts]
    return " ! ".join(word if re.fullmatch(r"[A-Za-z][\w/-]*", word) else "***" for word in words)


def name_of(source: int | str | Path) -> str:
    """Return what messages call a source."""
    if isinstance(source, int):
        return f"camera {source}"
    if isinstance(source, str):
        return "the GStreamer pipeline" if " ! " in source else shown_name(source)
    return shown(source)


def mode_of(path: Path) -> int:
    """Return the mode of a file or folder, as os.stat does.

    Raises
    ------
    InputError : it does not exist, or the operating system returns an error.
    """
    found = stat_of(path)
    if found is None:
        raise file_error("read", shown_name(str(path)), FileNotFoundError())
    return found.st_mode


@contextmanager
def open_video(source: int | str | Path) -> Iterator[Any]:
    """Open a video with OpenCV, for a with block; the end of the block releases the video.

    Parameters
    ----------
    source : the number of a camera; the path of a file; or a URL or a GStreamer pipeline, as
        :func:`named_source` returns them.

    Yields
    ------
    An opened cv2.VideoCapture.

    Raises
    ------
    InputError : the file does not exist or cannot be read, the text contains characters that are
        not UTF-8, or OpenCV cannot open the source.

    Examples
    --------
    >>> with open_video(Path("cam.mp4")) as video: good, bgr = video.read()
    """
    if isinstance(source, Path):
        if stat.S_ISREG(mode_of(source)):
            try:
                source.open("rb").close()
            except OSError as error:
                raise file_error("read", source, error) from error
        # In a relative path FFmpeg could take a part before ":" for a protocol.
        with utf8_name(os.path.abspath(source)) as name:
            yield from _opened(name, source)
        return
    if isinstance(source, str) and _unusable(source):
        raise InputError(
            f"{name_of(source)} contains characters that are not UTF-8",
            fix="in a URL write such a byte as % and two hexadecimal digits",
        )
    yield from _opened(source, source)


def _unusable(text: str) -> bool:
    """Whether OpenCV crashes on a text, or reads a part of it only."""
    try:
        return b"\0" in text.encode()
    except UnicodeEncodeError:
        return True


def _opened(wanted: int | str, source: int | str | Path) -> Iterator[Any]:
    """Yield the opened video once, then release it. OpenCV opens ``wanted``, which messages call
    by the name of ``source``."""
    video = cv2.VideoCapture()
    try:
        with quiet_opencv():
            if not any(video.open(wanted, api, _options(api)) for api in _apis(source)):
                raise InputError(
                    f"{name_of(source)} cannot be opened as a video", fix=_hint(source)
                )
        yield video
    finally:
        video.release()


def _apis(source: int | str | Path) -> list[int]:
    """Return the parts of OpenCV that can open a source, in OpenCV's order.

    For a file or URL these are all but CAP_IMAGES, which opens other files than the named one
    (a1.mp4, a2.mp4, ... if a1.mp4 is a picture) and prints a URL with its password.
    """
    if isinstance(source, int):
        return [cv2.CAP_ANY]
    if isinstance(source, str) and " ! " in source:
        return [cv2.CAP_GSTREAMER]
    registry = cv2.videoio_registry
    found = [api for api in registry.getStreamBackends() if registry.hasBackend(api)]
    return [api for api in found if api != cv2.CAP_IMAGES]


def _options(api: int) -> list[int]:
    """Return OpenCV's options for a part that opens a source.

    FFmpeg gets one thread. If FFmpeg cannot start a thread of its own, OpenCV returns wrong frames
    and no error.
    """
    return [cv2.CAP_PROP_N_THREADS, 1] if api == cv2.CAP_FFMPEG else []


def _hint(source: int | str | Path) -> str:
    """Return what the user can do about a source that cannot be opened."""
    if isinstance(source, int):
        return "check that it is plugged in and free: v4l2-ctl --list-devices"
    if isinstance(source, Path):
        return "check that a player can open it"
    if " ! " in source:
        return "try it with gst-launch-1.0; pip's OpenCV has no GStreamer, JetPack's has"
    return "check that a player can open it; in a password write / as %2F and @ as %40"
