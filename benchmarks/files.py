"""Reading the videos and class numbers that benchmarks use."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from runtime.errors import InputError
from runtime.files import file_error, shown
from runtime.opencv import cv2
from runtime.pictures.load import load_image
from sdk.source import open_video


def video_frames(path: Path, most: int) -> list[np.ndarray]:
    """Read the first frames of a video, at most ``most``.

    Returns
    -------
    At least one (H, W, 3) uint8 RGB array.

    Raises
    ------
    InputError : the file does not exist, cannot be read, is no video, or has no frame.
    """
    frames: list[np.ndarray] = []
    with open_video(path) as video:
        while len(frames) < most and (got := video.read())[0]:
            frames.append(cv2.cvtColor(got[1], cv2.COLOR_BGR2RGB))
    if not frames:
        raise InputError(
            f"{shown(path)} has no frame that OpenCV can read",
            fix="convert it: ffmpeg -i VIDEO video.mp4",
        )
    return frames


def class_numbers(path: Path, flags: int = cv2.IMREAD_UNCHANGED) -> np.ndarray:
    """Read the class numbers of pixels from a picture with one channel: (H, W), uint8 or uint16.

    Parameters
    ----------
    flags : of cv2.imdecode; cv2.IMREAD_GRAYSCALE makes one channel of several.

    Raises
    ------
    InputError : the file cannot be read, is no picture, or has several channels.
    """
    load_image(path)  # raises the error for a file that is missing, damaged or too large
    try:
        data = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise file_error("read", path, error) from error
    found = cv2.imdecode(data, flags)
    if found is None or found.ndim != 2:
        raise InputError(
            f"{shown(path)} is no picture with one channel of class numbers",
            fix="save the class numbers as an 8-bit grey PNG",
        )
    return np.asarray(found)
