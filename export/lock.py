"""The lock on a folder that one process at a time writes. A process that ends or is killed leaves
the file of the lock behind at most, and another process can lock it at once."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from runtime.files import file_error


def open_lock(lock: Path) -> tuple[int, bool]:
    """Open the file of a lock; it is made if it does not exist.

    Parameters
    ----------
    lock : the file. A link is refused.

    Returns
    -------
    The descriptor, which the caller closes and thereby unlocks; and whether the file is new.

    Raises
    ------
    InputError : the file cannot be written.

    Example
    -------
    >>> descriptor, new = open_lock(Path("runs/city/lock"))
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        with suppress(FileExistsError):
            return os.open(lock, flags | os.O_EXCL, 0o666), True
        return os.open(lock, flags, 0o666), False
    except OSError as error:
        raise file_error("written", lock, error) from error


def take_lock(descriptor: int, lock: Path) -> bool:
    """Lock an open file against other processes, without waiting.

    Parameters
    ----------
    descriptor, lock : of :func:`open_lock`.

    Returns
    -------
    False if another process holds the lock, or has removed the file in the meantime, so that a
    third process may hold a new one.

    Raises
    ------
    InputError : the file system has no locks.

    Example
    -------
    >>> take_lock(descriptor, Path("runs/city/lock"))
    True
    """
    try:
        # lockf, not flock: child processes do not inherit this lock, so that a folder whose writer
        # was killed can be written at once.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.lstat(lock))
    except (BlockingIOError, PermissionError, FileNotFoundError):
        return False
    except OSError as error:
        raise file_error("locked", lock, error) from error
