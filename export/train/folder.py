"""The folder that a run is written into: made, locked for one process, and cleaned."""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from export.train.run import BEST, CHECKPOINT, CURVES, ENTRY, LOCK, LOG_FILE, NAMES
from runtime.errors import InputError
from runtime.files import file_error, shown, stat_of

_OWN = {ENTRY, CHECKPOINT, BEST, LOG_FILE, CURVES, NAMES, LOCK}
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp(\..{1,15})?")  # of runtime.files.temporary_name


@contextmanager
def claimed(folder: Path, *, resume: bool) -> Iterator[None]:
    """Use a folder for training: a ``with`` block, in which no other process can train in it.

    Temporary files that an ended process has left are removed. A new folder is made; it is removed
    again if the block ends by an error before run.json is written.

    Parameters
    ----------
    folder : of the run.
    resume : whether the folder contains a run that is resumed; else it must be new or empty.

    Raises
    ------
    InputError : the folder contains a run although ``resume`` is False, or other files; another
        process trains in it; or it cannot be made, read or written.

    Example
    -------
    >>> with claimed(Path("runs/city"), resume=False): train(...)
    """
    made = _made(folder)
    lock = folder / LOCK
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if made:
            folder.rmdir()
        raise file_error("written", lock, error) from error
    try:
        # lockf, not flock: the processes that read pictures do not inherit this lock, so that a
        # run whose process was killed can be resumed at once.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, (BlockingIOError, PermissionError)):
            raise InputError(
                f"another process trains in {shown(folder)}",
                fix="wait until it ends, or choose another -o",
            ) from error
        raise file_error("locked", lock, error) from error
    try:
        _check_content(folder, resume)
        yield
    finally:
        if not os.path.lexists(folder / ENTRY):
            with suppress(OSError):
                lock.unlink()
            if made:
                with suppress(OSError):
                    folder.rmdir()
        os.close(descriptor)


def _made(folder: Path) -> bool:
    """Make the folder; returns whether it is new."""
    found = stat_of(folder, "written")
    if found is not None and not stat.S_ISDIR(found.st_mode):
        raise InputError(f"{shown(folder)} is no folder; a run is one", fix="choose another -o")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise file_error("created", folder, error) from error
    return found is None


def _check_content(folder: Path, resume: bool) -> None:
    """Remove temporary files, and check that nothing else is in the folder than ``resume`` says."""
    try:
        names = set(os.listdir(folder))
        for name in [name for name in names if _TEMPORARY.fullmatch(name)]:
            os.unlink(folder / name)
            names.remove(name)
    except OSError as error:
        raise file_error("used", folder, error) from error
    if resume:
        return
    if ENTRY in names:
        raise InputError(
            f"{shown(folder)} contains a run",
            fix="--resume continues it; or choose another -o, or remove the folder",
        )
    if others := sorted(names - {LOCK}):
        kind = "the rest of a run" if set(others) <= _OWN else "other files"
        raise InputError(
            f"{shown(folder)} contains {kind}: {', '.join(map(shown, others[:5]))}",
            fix="choose another -o",
        )
