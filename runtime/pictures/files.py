"""Lists of picture files, and the demo photo."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import InputError, MissingBackend
from runtime.files import file_error, shown, stat_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


def picture_files(paths: Sequence[Path]) -> list[Path]:
    """List the picture files that ``paths`` name.

    Parameters
    ----------
    paths : files, which are listed whatever their suffix is, and folders. A folder is replaced by
        its files that have one of SUFFIXES, in capital or small letters. The order is that of the
        names, with numbers by value ("f2.png" before "f10.png") and capital letters like small
        ones. Hidden files, whose names start with a dot, are left out. Links whose target is
        missing are listed, so that reading names them.

    Raises
    ------
    InputError : a path does not exist or cannot be read, or there is no picture in the folders.

    Examples
    --------
    >>> picture_files([Path("city"), Path("more/a.png")])  # city contains f2.png and f10.PNG
    [PosixPath('city/f2.png'), PosixPath('city/f10.PNG'), PosixPath('more/a.png')]
    """
    files: list[Path] = []
    hidden = 0
    for path in paths:
        found = stat_of(path)
        if found is None:
            raise file_error("read", path, FileNotFoundError())
        if stat.S_ISDIR(found.st_mode):
            names = _picture_names(path)
            seen = [name for name in names if not name.startswith(".")]
            hidden += len(names) - len(seen)
            files += [path / name for name in sorted(seen, key=_order)]
        elif stat.S_ISREG(found.st_mode):
            files.append(path)
        else:
            raise InputError(
                f"{shown(path)} is neither a file nor a folder", fix="name a picture or a folder"
            )
    if not files:
        where = ", ".join(map(shown, paths))
        left = (
            f"; {hidden} hidden file{'s were' if hidden > 1 else ' was'} left out" if hidden else ""
        )
        raise InputError(
            f"no pictures in {where}; wanted {', '.join(SUFFIXES)}{left}",
            fix="name a folder that directly contains pictures"
            + (", or rename the files: hidden names start with a dot" if hidden else ""),
        )
    return files


def _picture_names(folder: Path) -> list[str]:
    """Return the names of all files in a folder that have one of SUFFIXES, hidden ones included."""
    try:
        with os.scandir(folder) as entries:
            return [
                entry.name
                for entry in entries
                if Path(entry.name.lstrip(".")).suffix.lower() in SUFFIXES
                and (entry.is_file(follow_symlinks=False) or _links_to_file(entry))
            ]
    except OSError as error:
        raise file_error("read", folder, error) from error


def _links_to_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder is a link to a file, or to a target that is missing."""
    return entry.is_symlink() and (os.path.isfile(entry.path) or not os.path.exists(entry.path))


def _order(name: str) -> tuple[list[Any], str]:
    """Return the sort key of a file name. The name itself orders names that are else equal."""
    # re.split returns texts at even positions and numbers at odd ones.
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def demo_photo(instead: str = "name a picture: dg demo PICTURE") -> np.ndarray:
    """Return NASA's portrait of Eileen Collins (public domain), a file of scikit-image's wheel.

    Parameters
    ----------
    instead : what the user can do without scikit-image; it becomes part of the error's fix.

    Returns
    -------
    (512, 512, 3) uint8 RGB.

    Raises
    ------
    MissingBackend : scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise MissingBackend(
            "the demo photo is part of scikit-image, which is not installed",
            fix=f"pip install 'dynaguide-edge[demo]', or {instead}",
        ) from error
    return np.asarray(data.astronaut())
