"""Writing files and folders whole or not at all, and the cache folder."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from runtime.errors import InputError

_APPLICATION = "dynaguide-edge"


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all: write a temporary file beside it, then rename that.

    Raises
    ------
    InputError : ``path`` is a folder, its folder does not exist, or the file cannot be written.
    """
    path = Path(path)
    check_place(path)
    try:
        replace_file(path, data)
    except OSError as error:
        raise _unwritable(path, error) from error


def check_place(path: Path) -> None:
    """Check that ``path`` can be the name of a file.

    Raises
    ------
    InputError : ``path`` is a folder, or its folder does not exist.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder, wanted a file name", fix=f"add a name: {path}/NAME")
    if not path.parent.is_dir():
        raise InputError(f"folder {path.parent} does not exist", fix=f"mkdir -p {path.parent}")


def temporary_name(path: Path) -> Path:
    """Make a name for a hidden temporary file in the folder of ``path``, with the same suffix."""
    return path.parent / f".{secrets.token_hex(8)}.tmp{path.suffix}"


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a finished temporary file to ``path``.

    Raises
    ------
    InputError : ``path`` cannot be written; the temporary file is removed.
    """
    try:
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def replace_file(
    path: Path, data: bytes, *, temporary: Path | None = None, durable: bool = False
) -> None:
    """Write a file whole or not at all, without the checks of :func:`write_atomic`.

    Parameters
    ----------
    temporary : the temporary file, in the folder of ``path``; None makes a new name.
    durable : return only after the file and its name are on the disk.

    Raises
    ------
    OSError : the file cannot be written.
    """
    temporary = temporary or temporary_name(path)
    try:
        write_new(temporary, data, durable=durable)
        os.replace(temporary, path)
        if durable:
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_new(path: Path, data: bytes, *, durable: bool) -> None:
    """Write a file that does not exist yet.

    Parameters
    ----------
    durable : return only after the file's content is on the disk.

    Raises
    ------
    OSError : the file exists, or cannot be written.
    """
    with path.open("xb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names of the files in a folder are on the disk.

    Raises
    ------
    OSError : the folder cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path | None:
    """Return the folder for results that can be computed again; it may not exist yet.

    It is "dynaguide-edge" in the folder that XDG_CACHE_HOME names, else in ~/.cache. A relative
    XDG_CACHE_HOME is ignored, as the XDG base directory specification demands.

    Returns
    -------
    The folder, or None if the user has no home folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():
        return base / _APPLICATION
    try:
        return Path.home() / ".cache" / _APPLICATION
    except RuntimeError:
        return None


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path} cannot be written: {error.strerror or error}",
        fix=f"check the permissions of {path.parent} and the space left on it",
    )
