"""Reading the arrays of MATLAB files, in which BSDS500 and the tiles of Potsdam are distributed."""

from __future__ import annotations

import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import InputError, MissingBackend, first_line
from runtime.files import file_error, shown


def matlab_array(path: Path, key: str) -> np.ndarray:
    """Read one array of a MATLAB file of version 4 to 7.

    Raises
    ------
    InputError : the file cannot be read, is damaged or has another format, or lacks ``key``.
    MissingBackend : SciPy is not installed.
    """
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise MissingBackend(
            f"SciPy is needed to read {shown(path)}, but {error}",
            fix="pip install 'dynaguide-edge[bench]'",
        ) from error
    try:
        data = path.read_bytes()
    except OSError as error:
        raise file_error("read", path, error) from error
    try:
        return np.asarray(loadmat(BytesIO(data), variable_names=[key])[key])
    except KeyError as error:
        raise InputError(
            f"{shown(path)} contains no array '{key}'", fix="copy the data set again"
        ) from error
    except (  # what SciPy raises for damaged files
        OSError, ValueError, TypeError, LookupError, NameError, AttributeError, RuntimeError,
        zlib.error, MatReadError,
    ) as error:  # fmt: skip
        raise InputError(
            f"{shown(path)} is no MATLAB file that SciPy can read: {first_line(error)}",
            fix="copy the data set again; a file of MATLAB 7.3 must be saved as version 7",
        ) from error


def label_matrix(numbers: Any, path: Path, key: str) -> np.ndarray:
    """Check a matrix of a MATLAB file: (H, W) int32 in [0, 65535].

    Parameters
    ----------
    key : the array that contains the matrix.

    Raises
    ------
    InputError : it has another shape, type or range.
    """
    numbers = np.asarray(numbers)
    whole = numbers.ndim == 2 and numbers.dtype.kind in "iu" and numbers.size
    if not whole or numbers.min() < 0 or numbers.max() > 65535:
        raise wrong_form(path, key)
    return numbers.astype(np.int32)


def wrong_form(path: Path, key: str) -> InputError:
    """The error for an array that has another form than that of the data set."""
    return InputError(
        f"the array '{key}' of {shown(path)} has another form than that of the data set",
        fix="copy the data set again",
    )
