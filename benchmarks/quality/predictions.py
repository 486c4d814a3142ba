"""Predictions of any program: finding their files, and reading them."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.errors import InputError
from runtime.files import file_error, shown
from runtime.opencv import cv2
from runtime.pictures.label_map import decode_labels
from runtime.pictures.load import load_image

SEVERAL_CHANNELS = (b"\2", b"\4", b"\6")  # the types of PNG, in byte 25


def find(folder: Path, names: Sequence[str], every: Sequence[str]) -> tuple[list[Path], int]:
    """Find the prediction of each picture.

    It is the PNG below a folder whose relative path without suffix is the name. If no other picture
    of ``every`` has the same stem, it can also have this stem in any folder. "_labels" can be added
    to both, as the SDK's command predict does. A file whose relative path is the name of another
    picture is of that one.

    Parameters
    ----------
    names : of the pictures to score, with their folder, as "dog/00000".
    every : the names of all pictures of the part.

    Returns
    -------
    The files in the order of ``names``, and the number of PNG files that belong to no name.

    Raises
    ------
    InputError : the folder cannot be read; a picture has no prediction, or several.

    Example
    -------
    >>> find(Path("found"), ["dog/00000"], ["bear/00000", "dog/00000"])[0]
    [PosixPath('found/dog/00000_labels.png')]
    """
    files, owned = files_below(folder, ".png"), set(every)
    by_name: defaultdict[str, list[Path]] = defaultdict(list)
    by_stem: defaultdict[str, list[Path]] = defaultdict(list)
    for path in files:
        own = path.relative_to(folder).with_suffix("")
        if own.as_posix() not in owned:
            own = own.with_name(own.name.removesuffix("_labels") or own.name)
        whole = own.as_posix() in owned
        (by_name[own.as_posix()] if whole else by_stem[own.name]).append(path)
    shared = Counter(Path(name).name for name in every)
    found: list[Path] = []
    missing: list[str] = []
    for name in names:
        stem = Path(name).name
        fitting = by_name[name] + (by_stem[stem] if shared[stem] == 1 else [])
        if len(fitting) > 1:
            raise InputError(
                f"picture {name} has {len(fitting)} predictions: {', '.join(map(shown, fitting))}",
                fix="leave one of them",
            )
        found += fitting
        missing += [] if fitting else [name]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} pictures have no prediction in {shown(folder)};"
            f" the first is {missing[0]}",
            fix=f"save it as {shown(folder / missing[0])}.png, or name those to score by --list",
        )
    return found, len(files) - len(set(found))


def files_below(folder: Path, suffix: str) -> list[Path]:
    """All files with a suffix below a folder, in the order of their paths.

    Links to folders are followed, except to a folder that contains the link. Hidden files and
    folders are left out.

    Raises
    ------
    InputError : a folder cannot be read.
    """
    return sorted(_below(folder, suffix, frozenset()))


def _below(folder: Path, suffix: str, above: frozenset[str]) -> list[Path]:
    real = os.path.realpath(folder)
    if real in above:
        return []
    try:
        with os.scandir(folder) as entries:
            seen = [(entry.name, entry.is_dir()) for entry in entries]
    except OSError as error:
        raise file_error("read", folder, error) from error
    found = []
    for name, is_folder in seen:
        if name.startswith("."):
            continue
        if is_folder:
            found += _below(folder / name, suffix, above | {real})
        elif name.lower().endswith(suffix):
            found.append(folder / name)
    return found


def contents(path: Path) -> bytes:
    """The bytes of a file.

    Raises
    ------
    InputError : it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise file_error("read", path, error) from error


def label_map(path: Path) -> np.ndarray:
    """Read a label map: (H, W) int32.

    The labels are the numbers of a grey PNG of 8 or 16 bits, or the indices of one with a palette.
    In a PNG with colours each colour is a label, whose number is red + 256 green + 65536 blue.

    Raises
    ------
    InputError : the file cannot be read, is damaged, or has an alpha channel or colours of 16 bits.
    """
    data = contents(path)
    if data.startswith(b"\x89PNG") and data[25:26] in SEVERAL_CHANNELS:
        return codes(stored(path))
    return decode_labels(data, shown(path)).astype(np.int32)


def stored(path: Path) -> np.ndarray:
    """(H, W) uint8 or uint16 of a grey picture, (H, W, 3) uint8 RGB of one with colours.

    Raises
    ------
    InputError : the file cannot be read, is damaged, or has an alpha channel or colours of 16 bits.
    """
    colours = load_image(path)[0]  # raises the error for a file that is missing or damaged
    found = cv2.imdecode(np.frombuffer(contents(path), np.uint8), cv2.IMREAD_UNCHANGED)
    if found is not None and found.ndim == 2 and found.dtype.kind == "u":
        return np.asarray(found)
    if found is None or found.dtype != np.uint8 or found.shape[2] != 3:
        raise InputError(
            f"{shown(path)} is no label map: it has an alpha channel, or colours of 16 bits",
            fix="save the labels as a grey PNG of 8 or 16 bits",
        )
    return colours


def codes(colours: np.ndarray) -> np.ndarray:
    """The number of each colour, (..., 3) uint8: red + 256 green + 65536 blue, (...) int32."""
    return colours.astype(np.int32) @ np.array([1, 256, 65536], np.int32)


def grey_mask(path: Path) -> np.ndarray:
    """Read a mask of the foreground: (H, W) float64 in [0, 1], the grey values divided by 255.

    Raises
    ------
    InputError : the file cannot be read, is no 8-bit grey picture, or has no values but 0 and 1.
    """
    load_image(path)  # raises the error for a file that is missing or damaged
    found = cv2.imdecode(np.frombuffer(contents(path), np.uint8), cv2.IMREAD_UNCHANGED)
    what = ""
    if found is None or found.ndim != 2:
        what = "several channels, or a palette"
    elif found.dtype != np.uint8:
        what = "16 bits"
    elif found.max() == 1:
        what = "no values but 0 and 1"
    if what:
        raise InputError(
            f"{shown(path)} has {what}; wanted a grey mask from 0, background, to 255, foreground",
            fix="save mask * 255 as an 8-bit grey PNG",
        )
    assert found is not None  # load_image has read the file
    grey: np.ndarray = found / np.float64(255)
    return grey
