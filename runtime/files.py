"""Writing files whole or not at all, errors of the operating system, and the cache folder."""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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


def file_error(
    action: str, path: str | os.PathLike[str], error: OSError | ValueError
) -> InputError:
    """Return the error for a file or folder that the operating system refuses: one sentence.

    Parameters
    ----------
    action : what was tried, as the word after "cannot be": "read", "written", "created".
    error : what the operating system raised. Python raises a ValueError for a path with a zero
        byte.

    Example
    -------
    >>> raise file_error("read", "locked/a.png", error)  # ... cannot be read: Permission denied
    """
    name = shown(path)
    if isinstance(error, FileNotFoundError):
        return InputError(
            f"{name} does not exist", fix=f"check the path; the current folder is {here()}"
        )
    reason = getattr(error, "strerror", None) or str(error)
    fixes = {
        errno.ENAMETOOLONG: "check that it is a path; the bytes of a file are passed as bytes",
        errno.ELOOP: "remove the links that name each other",
        errno.ENOSPC: "free some space",
        errno.EROFS: "choose another folder; this one is on a disk that is mounted read-only",
        errno.ENOTDIR: "check the path; a part of it is a file, not a folder",
    }
    fix = fixes.get(getattr(error, "errno", None) or 0, "check its permissions")
    return InputError(f"{name} cannot be {action}: {reason}", fix=fix)


def stat_of(path: str | os.PathLike[str]) -> os.stat_result | None:
    """Return what the operating system knows of a file or folder, or None if there is none.

    Methods such as ``Path.is_dir`` raise PermissionError and other errors on Python 3.10 to 3.13;
    use this function where the path is the user's.

    Raises
    ------
    InputError : the operating system does not say, for example because a folder is not readable.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise file_error("read", path, error) from error


def here() -> str:
    """Return the current folder, or "(removed)" if it no longer exists."""
    try:
        return os.getcwd()
    except OSError:
        return "(removed)"


def shown(path: str | os.PathLike[str]) -> str:
    """Return a path for a message: one line of at most 200 characters."""
    text = os.fsdecode(path).replace("\n", "\\n")
    return text if len(text) <= 200 else f"{text[:150]}... ({len(text)} characters)"


@contextmanager
def utf8_name(path: str | os.PathLike[str]) -> Iterator[str]:
    """Give a file a name in UTF-8, for a library that takes no other: a ``with`` block.

    OpenCV crashes on a name that is not UTF-8, and ONNX Runtime refuses it. For such a name the
    value is the name of a temporary link to the file, with the same suffix, which is removed at the
    end of the block. For any other name the value is ``path``. A library that creates the link's
    file creates the file ``path``.

    Raises
    ------
    InputError : the link cannot be made.

    Example
    -------
    >>> with utf8_name(path) as name: video = cv2.VideoCapture(name)
    """
    text = os.fsdecode(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        pass
    else:
        yield text
        return
    with tempfile.TemporaryDirectory(prefix="dg-") as folder:
        link = os.path.join(folder, "name" + Path(text).suffix.encode("ascii", "ignore").decode())
        try:
            os.symlink(os.path.abspath(text), link)
        except OSError as error:
            raise file_error("linked", path, error) from error
        yield link


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
