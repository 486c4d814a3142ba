"""Paths that the operating system refuses, and permissions that bind root, too."""

import contextlib
import ctypes
import os
from typing import NamedTuple

NOT_UTF8 = os.fsdecode(b"caf\xe9")  # as old archives and cameras with Latin-1 have names
_LIBC = ctypes.CDLL(None)
_DAC = 0b110  # the capabilities by which root reads and writes what is locked


class Bad(NamedTuple):
    """A path that cannot be used, and what the message says of it."""

    kind: str
    path: str
    reason: str


def bad_paths(folder, suffix=""):
    """Paths of all kinds that no program can read, in an existing folder."""
    (folder / "file").write_text("x")
    (folder / f"loop{suffix}").symlink_to(f"loop{suffix}")
    (folder / "locked").mkdir()
    (folder / f"locked/x{suffix}").write_text("x")
    (folder / "locked").chmod(0)
    return [
        Bad("missing", str(folder / f"no{suffix}"), "does not exist"),
        Bad("below a file", str(folder / f"file/x{suffix}"), "does not exist"),
        Bad("long name", str(folder / f"{'n' * 300}{suffix}"), "File name too long"),
        Bad("long path", f"{'n' * 5000}{suffix}", "File name too long"),
        Bad("link loop", str(folder / f"loop{suffix}"), "Too many levels of symbolic links"),
        Bad("locked folder", str(folder / f"locked/x{suffix}"), "Permission denied"),
        Bad("below a locked one", str(folder / f"locked/no/x{suffix}"), "Permission denied"),
    ]


@contextlib.contextmanager
def permissions_bind():
    """Let permissions bind this thread in the block, also if root runs it."""
    if os.geteuid() != 0:
        yield
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the structure, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, for two words of bits
    assert _LIBC.capget(header, sets) == 0
    before = sets[0]
    sets[0] &= ~_DAC
    assert _LIBC.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = before
        assert _LIBC.capset(header, sets) == 0


@contextlib.contextmanager
def locked(path):
    """Let nobody read or write a file or folder in the block."""
    mode = path.stat().st_mode & 0o777
    path.chmod(0)
    try:
        with permissions_bind():
            yield
    finally:
        path.chmod(mode)


@contextlib.contextmanager
def removed_folder(folder):
    """Let the working folder be one that was removed."""
    before = os.getcwd()
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()
    try:
        yield
    finally:
        os.chdir(before)
