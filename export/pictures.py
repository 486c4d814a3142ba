"""Which pictures an export is verified with, and which ones INT8 is calibrated with."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from export.options import ExportOptions
from runtime.engines.named_files import utf8_text
from runtime.pictures.files import demo_photo, picture_files
from runtime.pictures.load import load_image
from runtime.tools.inspect import picture_words

LOG = logging.getLogger("dg.export")
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
    return Pictures([*each_picture(shown)], [utf8_text(path.name) for path in shown], note), files


def each_picture(files: Iterable[Path]) -> Iterator[np.ndarray]:
    """Read pictures as the SDK does, one after the other. What the SDK warns of is logged to
    "dg.export" at the end, one line for each warning.

    Parameters
    ----------
    files : picture files.

    Yields
    ------
    (H, W, 3) uint8 RGB arrays.

    Raises
    ------
    InputError : a file cannot be read, is damaged, or is no picture.

    Example
    -------
    >>> for picture in each_picture([Path("a.png"), Path("b.png")]): print(picture.shape)
    """
    warnings: dict[str, list[str]] = {}
    for path in files:
        picture, found = load_image(path)
        for text in found:
            warnings.setdefault(text, []).append(utf8_text(path.name))
        yield picture
    for text, names in warnings.items():
        LOG.warning("%s: %s", picture_words(names), text)
