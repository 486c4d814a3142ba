"""The folder that a run is written into: made, locked for one process, and cleaned."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from export.lock import open_lock, take_lock
from export.train.run import (
    BEST,
    CHECKPOINT,
    CURVES,
    ENTRY,
    LOCK,
    LOG_FILE,
    NAMES,
    check_first_checkpoint,
    read_entry,
)
from runtime.errors import InputError
from runtime.files import file_error, shown, stat_of

_OWN = {ENTRY, CHECKPOINT, BEST, LOG_FILE, CURVES, NAMES}
_EARLY = {ENTRY, LOG_FILE}  # the files of a run before its first checkpoint
# The names of runtime.files.temporary_name for the files of a run.
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp\.(json|safetensors|csv|png)")


@contextmanager
def claimed(folder: Path, *, resume: bool) -> Iterator[None]:
    """Use a folder for training: a ``with`` block, in which no other process can train in it.

    Temporary files that an ended process has left in a run are removed. A new folder is made; it
    is removed again if the block ends by an error before run.json is written. Of a folder that
    is refused, no file is changed or removed. A run that ended before its first checkpoint has
    nothing to continue from, so a new run may take its folder.

    Parameters
    ----------
    folder : of the run.
    resume : whether the folder contains a run that is resumed; else it must be new or empty, or
        contain a run without a checkpoint. A killed process may have left the lock in it, which is
        an empty file, and temporary files.

    Raises
    ------
    InputError : the folder contains a run with a checkpoint although ``resume`` is False, or other
        files; another process trains in it; or it cannot be made, read or written.
    BundleError : the run in the folder has lost its checkpoint.

    Example
    -------
    >>> with claimed(Path("runs/city"), resume=False): train(...)
    """
    made, lock = _made(folder), folder / LOCK
    descriptor, new = None, False
    try:
        _check_content(folder, resume)
        descriptor, new = open_lock(lock)
        if not take_lock(descriptor, lock):
            new = False  # it is the other process's now
            raise InputError(
                f"another process trains in {shown(folder)}",
                fix="wait until it ends, or choose another -o",
            )
        _check_content(folder, resume)  # again: another process may have ended in between
        _remove_temporary(folder)
        yield
    finally:
        if not os.path.lexists(folder / ENTRY):
            if new:
                with suppress(OSError):
                    lock.unlink()
            if made:
                with suppress(OSError):
                    folder.rmdir()
        if descriptor is not None:
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


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise file_error("used", folder, error) from error


def _check_content(folder: Path, resume: bool) -> None:
    """Check that nothing else is in the folder than ``resume`` says. Nothing is changed."""
    if resume:
        check_first_checkpoint(folder, read_entry(folder))
        return
    names = _names(folder)
    if CHECKPOINT in names and ENTRY in names:
        raise InputError(
            f"{shown(folder)} contains a run",
            fix="--resume continues it; or choose another -o, or remove the folder",
        )
    if ENTRY in names:
        check_first_checkpoint(folder, read_entry(folder))
        names -= _EARLY
    if LOCK in names and _is_empty_file(folder / LOCK):
        names = {name for name in names - {LOCK} if not _TEMPORARY.fullmatch(name)}
    if names:
        rest = all(name in _OWN or _TEMPORARY.fullmatch(name) for name in names)
        kind = "the rest of a run" if rest else "other files"
        raise InputError(
            f"{shown(folder)} contains {kind}: {', '.join(map(shown, sorted(names)[:5]))}",
            fix="choose another -o",
        )


def _is_empty_file(path: Path) -> bool:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return True  # another process has just removed it
    except OSError as error:
        raise file_error("read", path, error) from error
    return stat.S_ISREG(found.st_mode) and found.st_size == 0


def _remove_temporary(folder: Path) -> None:
    """Remove the temporary files that an ended process has left in a run."""
    try:
        for name in filter(_TEMPORARY.fullmatch, _names(folder)):
            os.unlink(folder / name)
    except OSError as error:
        raise file_error("used", folder, error) from error
