"""Which pictures an export is verified with, and which ones INT8 is calibrated with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from export.options import ExportOptions
from runtime.pictures.files import demo_photo, picture_files, read_pictures
from runtime.tools.inspect import picture_words

HELD_OUT = 8  # at most this many files of --data verify, and are not used to calibrate


class Pictures(NamedTuple):
    """The pictures that an export is verified with.

    Parameters
    ----------
    arrays : (H, W, 3) uint8 RGB each.
    names : the name of each picture, without its folder.
    note : which pictures they are, e.g. "of --data, not used to calibrate"; "" if the user named
        them.
    """

    arrays: Sequence[np.ndarray]
    names: list[str]
    note: str = ""

    def __str__(self) -> str:
        """How many pictures they are, and which, e.g. "1 picture: the demo photo"."""
        return picture_words(self.names, self.note)


def choose_pictures(options: ExportOptions) -> tuple[Pictures, list[Path]]:
    """Choose the pictures to verify and to calibrate with.

    The pictures of ``options.pictures`` verify. If it is empty, a quarter of the files of
    ``options.data`` verifies, at most HELD_OUT files, spread evenly, and these are not used to
    calibrate. With fewer than 4 files the demo photo verifies.

    Parameters
    ----------
    options : its ``pictures``, ``data`` and ``fraction`` are used.

    Returns
    -------
    The pictures to verify with, and the files to calibrate with: the first of those of
    ``options.data`` that are left, as many as ``options.fraction`` says; none without ``data``.

    Raises
    ------
    InputError : a path does not exist, a picture cannot be read, or there is no picture.
    MissingBackend : the demo photo is needed, and scikit-image is not installed.

    Examples
    --------
    >>> pictures, files = choose_pictures(ExportOptions(int8=True, data=(Path("city"),)))
    >>> str(pictures)  # of a folder with 8 pictures
    '2 pictures of --data, not used to calibrate: c.png, g.png'
    """
    data: dict[Path, Path] = {}  # a file that is named twice counts once
    for path in picture_files(options.data) if options.data else []:
        data.setdefault(path.resolve(), path)
    if options.pictures:
        shown, held = picture_files(options.pictures), []
    else:
        count = min(HELD_OUT, len(data) // 4)
        shown = held = [
            [*data.values()][(2 * i + 1) * len(data) // (2 * count)] for i in range(count)
        ]
    free = [path for path in data.values() if path not in held]
    files = free[: max(1, round(len(data) * options.fraction))]
    if not shown:
        photo = demo_photo("name pictures to check with: --pictures FILE...")
        note = "(--data has fewer than 4 pictures)" if data else ""
        return Pictures([photo], ["the demo photo"], note), files
    note = "of --data, not used to calibrate" if held else ""
    both = len({path.resolve() for path in shown} & {path.resolve() for path in files})
    if both:
        note = f"({both} of them also used to calibrate)"
    return Pictures(read_pictures(shown), [_name(path) for path in shown], note), files


def _name(path: Path) -> str:
    """The file's name as UTF-8 text. Bytes that are no UTF-8 are written as numbers."""
    return path.name.encode("utf-8", "backslashreplace").decode("utf-8")
