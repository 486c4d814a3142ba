"""Writing files whole or not at all, names and errors of files, and the cache folder."""

from __future__ import annotations

import errno
import os
import secrets
import shlex
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from runtime.errors import InputError, first_line
from runtime.urls import without_passwords

_APPLICATION = "dynaguide-edge"
_MOST_LINKS = 40  # links that a path may follow, as in Linux
_FIXES = {
    errno.EAGAIN: "end other programs, or raise the limit for processes: ulimit -u",
    errno.EDQUOT: "free some space, or ask for a larger quota",
    errno.EFBIG: "raise the limit for the size of a file: ulimit -f",
    errno.ELOOP: "remove the links that name each other",
    errno.EMFILE: "raise the limit for open files: ulimit -n",
    errno.ENFILE: "close other programs; the system has too many open files",
    errno.ENOMEM: "close other programs",
    errno.ENOSPC: "free some space; the disk is full",
    errno.ENOTDIR: "check the path; a part of it is a file, not a folder",
    errno.ENXIO: "start the program that reads from it first, or name a file",
    errno.EROFS: "choose another folder; this one is on a disk that is mounted read-only",
}


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all: write a temporary file beside it, then rename that.

    If ``path`` is a link, the file that it names is written. A FIFO, a character device
    (/dev/null) and an open file of this process (/dev/stdout) are not replaced: the data are
    written into them. An older file keeps its permissions.

    Raises
    ------
    InputError : ``path`` is a folder or no name at all, its folder does not exist, or the file
        cannot be written.
    """
    path = to_path(path)
    check_place(path, pipe=True)
    try:
        replace_file(path, data)
    except (OSError, ValueError) as error:
        raise file_error("written", path, error) from error


def to_path(path: str | bytes | os.PathLike[str]) -> Path:
    """Return the path of a file whose name a caller passes.

    Raises
    ------
    InputError : ``path`` is of another type, such as an open file.

    Example
    -------
    >>> to_path(b"a.png")
    PosixPath('a.png')
    """
    try:
        return Path(os.fsdecode(path))
    except TypeError:
        kind = type(path).__name__
        raise InputError(
            f"path is a {kind}; wanted the name of a file", fix='pass a text, as "out.png"'
        ) from None


def check_place(path: Path, *, pipe: bool = False) -> None:
    """Check that a file can be written at ``path``.

    Parameters
    ----------
    pipe : ``path`` may also be a FIFO or a character device.

    Raises
    ------
    InputError : ``path`` is a folder, or is not a file; or its folder does not exist, or is not
        writable.
    """
    found = stat_of(path, "written")
    mode = stat.S_IFREG if found is None else found.st_mode
    if stat.S_ISDIR(mode):
        fix = f"add a name: {shown(path)}/NAME"
        raise InputError(f"{shown(path)} is a folder, wanted a file name", fix=fix)
    try:
        target = _followed(path)
        written_into = _is_pipe(target)
    except (OSError, ValueError) as error:
        raise file_error("written", path, error) from error
    if not (pipe if written_into else stat.S_ISREG(mode)):
        raise InputError(
            f"{shown(path)} is a FIFO, a socket, a device or an open file; wanted a file name",
            fix="name a file",
        )
    folder = target.parent
    inside = stat_of(folder, "written")
    if inside is None:
        fix = f"mkdir -p {shlex.quote(shown(folder))}"
        raise InputError(f"folder {shown(folder)} does not exist", fix=fix)
    if not stat.S_ISDIR(inside.st_mode):
        raise InputError(f"{shown(folder)} is a file, wanted a folder", fix="choose another folder")
    effective = os.access in os.supports_effective_ids
    if not written_into and not os.access(folder, os.W_OK | os.X_OK, effective_ids=effective):
        raise InputError(
            f"{shown(path)} cannot be written: folder {shown(folder)} is not writable",
            fix=f"check the permissions of {shown(folder)}, or choose another folder",
        )


def _followed(path: Path) -> Path:
    """Return the path that a link names, even if that file does not exist yet.

    A link in /proc, which is an open file of a process, is returned as it is.

    Raises
    ------
    OSError : the links name each other.
    """
    for _ in range(_MOST_LINKS):
        if not os.path.islink(path) or os.path.realpath(path.parent).startswith("/proc/"):
            return path
        path = path.parent / os.readlink(path)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))


def temporary_name(path: Path) -> Path:
    """Make a name for a hidden temporary file with the same suffix as ``path``, or without a suffix
    if that is long. The folder is that of ``path``, or of the file that the link ``path`` names.

    Raises
    ------
    OSError : ``path`` is a link, and links name each other.
    """
    suffix = path.suffix if len(path.suffix) <= 16 else ""
    return _followed(path).parent / f".{secrets.token_hex(8)}.tmp{suffix}"


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a finished temporary file to ``path``, or to the file that the link ``path`` names. An
    older file's permissions are kept.

    Parameters
    ----------
    temporary : a file with a name of :func:`temporary_name`.

    Raises
    ------
    InputError : ``path`` cannot be written, or is not a file; the temporary file is removed.
    """
    try:
        target = _followed(path)
        _keep_mode(temporary, _mode(target))
        os.replace(temporary, target)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise file_error("written", path, error) from error


def replace_file(
    path: Path, data: bytes, *, temporary: Path | None = None, durable: bool = False
) -> None:
    """Write a file whole or not at all, without the checks of :func:`write_atomic`.

    Parameters
    ----------
    temporary : the temporary file, in the folder of ``path``; None makes a new name, and writes the
        target if ``path`` is a link, a FIFO or a character device.
    durable : return only after the file and its name are on the disk.

    Raises
    ------
    OSError : the file cannot be written.
    """
    if temporary is None:
        path = _followed(path)
        if _is_pipe(path):
            return _write_into(path, data)
        temporary = temporary_name(path)
    try:
        write_new(temporary, data, durable=durable, mode=_mode(path))
        os.replace(temporary, path)
        if durable:
            sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _mode(path: Path) -> int | None:
    """Return the mode of a file, or None if it does not exist.

    Raises
    ------
    OSError : the operating system returns an error, or ``path`` is not a file, so that it must not
        be replaced.
    """
    mode = _any_mode(path)
    if mode is not None and not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a file", os.fspath(path))
    return mode


def _any_mode(path: Path) -> int | None:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _keep_mode(temporary: Path, mode: int | None) -> None:
    """Copy the permissions of an older file, if there is one, to the file that replaces it."""
    if mode is not None:
        with suppress(OSError):  # some file systems have no permissions
            os.chmod(temporary, mode & 0o777)


def _is_pipe(path: Path) -> bool:
    """Whether data are written into ``path``, which is then a FIFO, a character device or an open
    file of a process, instead of replacing it."""
    mode = _any_mode(path) or 0
    # _followed() leaves only the links in /proc.
    return os.path.islink(path) or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _write_into(path: Path, data: bytes) -> None:
    """Write into a FIFO, a character device or an open file of a process. A FIFO that no program
    reads is an OSError."""
    if os.path.realpath(path.parent) == f"/proc/{os.getpid()}/fd":
        descriptor = os.dup(int(path.name))
    else:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
        os.set_blocking(descriptor, True)
    with open(descriptor, "wb") as file:
        file.write(data)


def write_new(path: Path, data: bytes, *, durable: bool, mode: int | None = None) -> None:
    """Write a file that does not exist yet.

    Parameters
    ----------
    durable : return only after the file's content is on the disk.
    mode : the mode of the file that will be replaced; None for the mode of new files.

    Raises
    ------
    OSError : the file exists, or cannot be written.
    """
    with path.open("xb") as file:
        _keep_mode(path, mode)
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
    name, code = shown(path), getattr(error, "errno", None)
    fix = _FIXES.get(code or 0, "check its permissions")
    if isinstance(error, FileNotFoundError):
        if os.path.islink(path):
            fix = "restore the link's target, or remove the link"
            return InputError(f"{name} is a link whose target does not exist", fix=fix)
        if action == "read":
            fix = f"check the path; the current folder is {here()}"
            return InputError(f"{name} does not exist", fix=fix)
        fix = f"check that its folder exists; the current folder is {here()}"
    elif code == errno.ENAMETOOLONG:
        fix = "choose a shorter name"
        if action == "read":
            fix = "check that it is a path; in Python, the content of a file is passed as bytes"
    elif isinstance(error, ValueError):
        fix = "check the path"
    return InputError(f"{name} cannot be {action}: {first_line(error)}", fix=fix)


def stat_of(path: str | os.PathLike[str], action: str = "read") -> os.stat_result | None:
    """Return what the operating system knows about a file or folder, or None if it does not exist.

    Methods such as ``Path.is_dir`` raise PermissionError and other errors on Python 3.10 to 3.13;
    use this function where the path is the user's.

    Parameters
    ----------
    action : what is tried, for the message: "read" or "written".

    Raises
    ------
    InputError : the operating system returns an error, for example because a folder is not
        readable.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise file_error(action, path, error) from error


def real_path(path: str | os.PathLike[str]) -> str:
    """Return a path without links, to compare it with other paths. A path that the operating system
    cannot resolve is returned as it is."""
    try:
        return os.path.realpath(os.fsdecode(path))
    except (OSError, ValueError):
        return os.fsdecode(path)


def here() -> str:
    """Return the current folder, or "(removed)" if it no longer exists."""
    try:
        return one_line(os.getcwd())
    except OSError:
        return "(removed)"


def shown(path: str | os.PathLike[str]) -> str:
    """Return a path for a message: :func:`one_line`, of at most 200 characters."""
    text = one_line(path)
    return text if len(text) <= 200 else f"{text[:150]}... ({len(text)} characters)"


def one_line(path: str | os.PathLike[str]) -> str:
    """Return a path as one line of printable characters, without the password of a URL.

    Another character becomes its escape. A byte of a name that is not in the encoding of the file
    system is such a character: the name b"caf\\xe9" is shown as "caf\\udce9".
    """
    name = os.fsdecode(path)
    text = without_passwords(name)
    if text != name and os.path.lexists(name):  # it is not a URL
        text = name
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextmanager
def utf8_name(path: str | os.PathLike[str]) -> Iterator[str]:
    """Make a name in UTF-8 for a file, because a library takes no other: a ``with`` block.

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
    if is_utf8(text):
        yield text
        return
    with ExitStack() as stack:
        try:
            folder = tempfile.TemporaryDirectory(prefix="dg-", ignore_cleanup_errors=True)
            suffix = Path(text).suffix.encode("ascii", "ignore").decode()
            link = os.path.join(stack.enter_context(folder), f"name{suffix}")
            if not is_utf8(link):
                raise ValueError(f"{shown(folder.name)} is not UTF-8 either")
            os.symlink(text if os.path.isabs(text) else os.path.join(os.getcwd(), text), link)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{shown(path)} is not UTF-8, and no link to it can be made: {first_line(error)}",
                fix="rename it, or set TMPDIR to a folder that you can write, with a name in UTF-8",
            ) from error
        yield link


def is_utf8(name: str) -> bool:
    """Whether the bytes of a name in the file system are its UTF-8."""
    try:
        return os.fsencode(name) == name.encode()
    except UnicodeEncodeError:
        return False


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
