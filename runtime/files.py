"""Files are written whole or not at all, and the one folder for what may be computed again."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import InputError

_APPLICATION = "dynaguide-edge"


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to a temporary sibling, then rename: the file is whole or untouched.

    Raises
    ------
    InputError : ``path`` is a folder, or cannot be written.
    """
    path = Path(path)
    check_place(path)
    try:
        replace_file(path, data)
    except OSError as error:
        raise _unwritable(path, error) from error


def check_place(path: Path) -> None:
    """InputError unless ``path`` can be the name of a file: its folder exists, it is no folder."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, wanted a file name")
    if not path.parent.is_dir():
        raise InputError(f"folder {path.parent} does not exist", fix=f"mkdir -p {path.parent}")


def temporary_name(path: Path) -> Path:
    """A new hidden sibling of the same type, to be renamed to ``path``."""
    return path.parent / f".{secrets.token_hex(8)}.tmp{path.suffix}"


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a finished file to its place, or remove it and raise InputError."""
    try:
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def replace_file(
    path: Path, data: bytes, *, temporary: Path | None = None, durable: bool = False
) -> None:
    """What :func:`write_atomic` does, with OSError as the system raises it.

    Parameters
    ----------
    temporary : the sibling to write to; a new name when None.
    durable : return only when the file and its name are on the disk.
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
    """Write a file that does not exist yet; ``durable``: return only when it is on the disk."""
    with path.open("xb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Return only when the folder's names are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replaced_folder(place: Path) -> Iterator[Path]:
    """An empty folder to fill, which replaces ``place`` when the block ends without an error. An
    error leaves ``place`` as it was.

    Raises
    ------
    InputError : it cannot be written.
    """
    work = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{place.name}.partial-", dir=place.parent))
        new, old = work / "new", work / "old"
        new.mkdir()
        yield new
        if place.exists():
            place.rename(old)
        try:
            new.rename(place)
        except OSError:
            if old.exists():
                old.rename(place)
            raise
    except OSError as error:
        raise _unwritable(place, error) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def cache_folder() -> Path | None:
    """Where results are kept that may be computed again: a folder of our own in XDG_CACHE_HOME, or
    in ~/.cache. None where there is no home folder.

    A relative XDG_CACHE_HOME is ignored, as the XDG base directory specification says. The folder
    need not exist.
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
