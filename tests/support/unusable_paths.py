"""Paths that the operating system refuses."""

import contextlib
import os
from typing import NamedTuple

from permissions import obeyed

NOT_UTF8 = os.fsdecode(b"caf\xe9")  # as old archives and cameras with Latin-1 have names


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
def locked(path):
    """Let nobody read or write a file or folder in the block."""
    mode = path.stat().st_mode & 0o777
    path.chmod(0)
    try:
        with obeyed():
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
