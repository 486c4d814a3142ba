"""Files that a user names: the checks before they are read, their bytes, and their names in texts
that must be UTF-8."""

from __future__ import annotations

import os
import re
import shlex
import stat
import tempfile
from pathlib import Path

from runtime.errors import InputError
from runtime.files import file_error, is_utf8, shown, stat_of

# How files begin that people take for a model: the start in lower case, what the file is, the fix.
_OTHERS = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file itself",
        "git lfs install && git lfs pull, in the repository that the file is from",
    ),
    (
        (b"<!doctype html", b"<html"),
        "a web page, not the file itself",
        "download the file itself: on Hugging Face its address contains /resolve/, not /blob/",
    ),
)


def missing(path: str | os.PathLike[str]) -> InputError:
    """Return the error for a path that does not exist, or that is an address on the internet."""
    if re.match(r"[A-Za-z][\w+.-]+:/", os.fsdecode(path)):
        return InputError(
            f"{shown(path)} is no file of this machine, and nothing is downloaded",
            fix="download it, and name the file",
        )
    return file_error("read", path, FileNotFoundError())


def check_regular(path: Path, wanted: str) -> int:
    """Check that a file exists and is a regular file, because reading a pipe or a device may never
    end.

    Parameters
    ----------
    wanted : what the path should name, for the message: "an .onnx file".

    Returns
    -------
    The size of the file in bytes.

    Raises
    ------
    InputError : the file does not exist, is something else, or a folder of its path cannot be read.

    Example
    -------
    >>> check_regular(Path("prior.onnx"), "an .onnx file")
    4120
    """
    found = stat_of(path)
    if found is None:
        raise missing(path)
    if not stat.S_ISREG(found.st_mode):
        kind, fix = "a pipe, a device or a socket", "save its data in a file"
        if stat.S_ISDIR(found.st_mode):
            kind, fix = "a folder", "name the file in it"
        raise InputError(f"{shown(path)} is {kind}, wanted {wanted}", fix=fix)
    return found.st_size


def read_regular(path: Path, wanted: str) -> bytes:
    """Return the bytes of a regular file.

    ``wanted`` is as for :func:`check_regular`.

    Raises
    ------
    InputError : the file cannot be read; also that of :func:`check_regular`.
    """
    check_regular(path, wanted)
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise file_error("read", path, error) from error


def other_content(data: bytes) -> tuple[str, str] | None:
    """Return what a file is that was saved in place of the wanted one, and the fix.

    Parameters
    ----------
    data : the file, or its first 100 bytes.

    Returns
    -------
    Two texts for a Git LFS pointer or a web page; None for all other files.

    Examples
    --------
    >>> other_content(b"<!DOCTYPE html>...")[0]
    'a web page, not the file itself'
    """
    start = data[:100].lstrip().lower()
    return next(((what, fix) for begin, what, fix in _OTHERS if start.startswith(begin)), None)


def other_file(path: Path) -> tuple[str, str] | None:
    """Return what :func:`other_content` returns for the first bytes of a regular file.

    Raises
    ------
    InputError : the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return other_content(file.read(100))
    except OSError as error:
        raise file_error("read", path, error) from error


def temporary_folder() -> str:
    """Return the folder for temporary files that libraries open, which take names in UTF-8 only.

    Raises
    ------
    InputError : its name is not UTF-8, or no folder can be written.
    """
    try:
        folder = tempfile.gettempdir()
    except OSError as error:
        raise InputError(
            f"no temporary file can be written: {error.strerror}",
            fix="free some space, or name a folder: TMPDIR=FOLDER in the environment",
        ) from error
    if not is_utf8(folder):
        raise InputError(
            f"the folder for temporary files, {utf8_text(folder)}, has a name that is not UTF-8",
            fix="name another one: TMPDIR=/tmp in the environment",
        )
    return folder


def utf8_text(name: str) -> str:
    """Return a name as text that UTF-8 can store: bytes that are no UTF-8 become numbers.

    Example
    -------
    >>> utf8_text(os.fsdecode(b"caf\\xe9.png"))
    'caf\\\\udce9.png'
    """
    return name.encode("utf-8", "backslashreplace").decode()


def shell_word(word: str) -> str:
    """Return a word of a command line, quoted so that it can be copied into bash. The result is
    UTF-8, even for the name of a file that is not.

    Examples
    --------
    >>> print(shell_word("my city.bundle"))
    'my city.bundle'
    >>> print(shell_word(os.fsdecode(b"caf\\xe9")))
    $'caf\\xe9'
    """
    if utf8_text(word) == word:
        return shlex.quote(word)
    parts = (
        chr(b) if 32 <= b < 127 and b not in b"'\\" else f"\\x{b:02x}" for b in os.fsencode(word)
    )
    return f"$'{''.join(parts)}'"
