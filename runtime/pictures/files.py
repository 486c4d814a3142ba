"""Lists of picture files, and the demo photo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.errors import InputError, MissingBackend
from runtime.files import here
from runtime.pictures.load import load_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


def read_pictures(paths: Sequence[Path]) -> list[np.ndarray]:
    """Read all pictures that ``paths`` name, as :func:`picture_files` lists them.

    Returns
    -------
    A list of (H, W, 3) uint8 RGB arrays.

    Raises
    ------
    InputError : a path does not exist, a file cannot be read or decoded, or there is no picture.
    """
    return [load_image(path)[0] for path in picture_files(paths)]


def picture_files(paths: Sequence[Path]) -> list[Path]:
    """List the picture files that ``paths`` name.

    Parameters
    ----------
    paths : files, which are listed whatever their suffix is, and folders. A folder is replaced by
        its files that have one of SUFFIXES, in the order of their names.

    Raises
    ------
    InputError : a path does not exist, or there is no picture in the folders.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(
                f"{path} does not exist", fix=f"check the path; the current folder is {here()}"
            )
    if not files:
        names = ", ".join(map(str, paths))
        raise InputError(
            f"no pictures in {names}; wanted {', '.join(SUFFIXES)}",
            fix="name a folder that directly contains pictures",
        )
    return files


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
