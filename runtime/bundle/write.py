"""Write a bundle whole or not at all, and add an engine to a bundle."""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shlex
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from runtime.bundle.manifest import (
    MANIFEST,
    MANIFEST_BYTES,
    file_entry,
    parse_manifest,
    seal,
    short,
)
from runtime.bundle.read import Bundle
from runtime.errors import BundleError, InputError
from runtime.files import file_error, replace_file, shown, sync_folder, write_new

LOG = logging.getLogger("dg.bundle")
_TRIES = 100  # of a rename that other writers of the same folder disturb


def write_bundle(
    path: str | os.PathLike[str], manifest: Mapping[str, Any], files: Mapping[str, bytes]
) -> Bundle:
    """Write a bundle to a temporary folder, check it there, and rename the folder to ``path``.

    An existing bundle is replaced; nothing else is. Several processes may write to the same
    ``path``; the last bundle remains. :func:`replaced_folder` says what remains after a crash.

    Parameters
    ----------
    path : the bundle's folder.
    manifest : from :func:`runtime.bundle.manifest.make_manifest`, not sealed yet.
    files : the bytes of each file that the manifest lists, by its path inside the bundle.

    Returns
    -------
    The bundle that was written.

    Raises
    ------
    InputError : ``path`` is something other than a bundle, or cannot be written.
    BundleError : manifest and files do not fit together; nothing is written.
    """
    check_replaceable(path)
    place = Path(os.path.realpath(Path(path)))  # so that a link to a bundle remains a link
    data = _sealed(manifest)
    with replaced_folder(place) as new:
        _fill(new, {**files, MANIFEST: data})
        written = _checked(new)
        check_replaceable(place)  # again, because writing took time
    # If path is the current folder, this process still has the replaced folder under that path.
    return Bundle(Path(path) if Path(path).name else place, written.manifest)


@contextmanager
def replaced_folder(place: Path) -> Iterator[Path]:
    """A new, empty folder to fill, which replaces ``place`` when the block ends without an error.

    The new folder lies beside ``place`` until it is complete. After an error ``place`` is
    unchanged. After a crash ``place`` is the old folder, the new one, or, between two renames,
    missing; it is never incomplete. The next call for the same place then restores a missing old
    folder and removes the temporary folders. If a temporary folder cannot be removed, a warning
    names it.

    Raises
    ------
    InputError : a folder cannot be written, or other processes write to ``place`` all the time.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(place)
        with ExitStack() as stack:
            new = _new_folder(place, stack)
            yield new
            _exchange(new, place)
            sync_folder(place.parent)
    except OSError as error:
        raise file_error("written", place, error) from error


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Check that an export may and can write to ``path``: it does not exist, is an empty folder or
    is a bundle, and a folder can be made beside it.

    Raises
    ------
    InputError : it is something else, or cannot be written, or its manifest cannot be read.
    """
    folder = place = Path(path)  # Path("") is the current folder
    try:
        place = Path(os.path.realpath(folder))
        replaceable = _is_replaceable(place)
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        if getattr(error, "filename", None) == str(place / MANIFEST):
            raise file_error("read", folder / MANIFEST, error) from error
        raise file_error("written", folder, error) from error
    if not replaceable:
        raise InputError(
            f"{shown(folder)} exists and is no bundle; it is left alone",
            fix="choose another folder with -o",
        )
    check_writable(folder)


def check_writable(folder: Path) -> None:
    """Check that a folder can be made at ``folder`` or replaced there, by making another one beside
    it, or in the nearest folder above that exists, and removing that.

    Raises
    ------
    InputError : the operating system does not allow it.
    """
    try:
        place = Path(os.path.realpath(folder))
        above = next(parent for parent in place.parents if os.path.lexists(parent))
        temporary = tempfile.mkdtemp(prefix=_work_prefix(place), dir=above)
        with suppress(FileNotFoundError):  # another writer has removed it
            os.rmdir(temporary)
        before, effective = _identity(place), os.access in os.supports_effective_ids
        writable = os.access(place, os.W_OK, effective_ids=effective)
        if before is not None and not writable and _identity(place) == before:
            # A folder that is not writable cannot be moved into another folder.
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise file_error("written", folder, error) from error


def _is_replaceable(place: Path) -> bool:
    """Whether ``place`` does not exist, or is an empty folder or a bundle, even a damaged one.
    OSError if it cannot be read, or a folder above cannot, or for a loop of links."""
    while (before := _identity(place)) is not None:
        # The answer "no" counts only if no other writer has replaced the folder in the meantime.
        answer = _is_empty_or_bundle(place)
        if answer or _identity(place) == before:
            return answer
    return True


def _identity(place: Path) -> tuple[int, int] | None:
    """Two numbers that change if another folder is renamed to ``place``; None if nothing has this
    path. OSError if a folder above cannot be read, or for a loop of links."""
    try:
        found = place.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_ctime_ns


def _is_empty_or_bundle(place: Path) -> bool:
    try:
        if not os.listdir(place):
            return True
        if not stat.S_ISREG(os.stat(place / MANIFEST).st_mode):  # reading a pipe might never end
            return False
        with (place / MANIFEST).open("rb") as file:
            return b'"dg-bundle/' in file.read(MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return False


def add_engine(bundle: Bundle, entry: Mapping[str, Any], plan: bytes) -> Bundle:
    """Add an engine to a bundle, or replace the engine with the same key.

    The engine's file is written first, and then the manifest that names it. Each is written to a
    temporary file, which is renamed. An engine with the same key is removed from the manifest
    before its file is replaced. So the bundle is valid after a crash, too.

    Parameters
    ----------
    bundle : the bundle.
    entry : the engine's entry, as :func:`runtime.bundle.engines.build` returns it.
    plan : the engine.

    Returns
    -------
    The bundle with its new manifest.

    Raises
    ------
    BundleError : entry and plan do not fit together, or the manifest would not be valid.
    InputError : the bundle cannot be written.
    """
    if not file_entry(entry["file"], plan).items() <= entry.items():
        raise BundleError(
            f"{entry['file']} is not the engine that its entry describes", fix="build it again"
        )
    try:
        with _locked(bundle.path):
            manifest = Bundle.open(bundle.path).manifest  # others may have added engines
            others = [e for e in manifest["engines"] if e["key"] != entry["key"]]
            without = _sealed({**manifest, "engines": others})
            whole = _sealed({**manifest, "engines": [*others, dict(entry)]})
            parse_manifest(whole, f"{bundle.name}/{MANIFEST}")
            if len(others) < len(manifest["engines"]):
                _replace(bundle.path, MANIFEST, without)
            _replace(bundle.path, entry["file"], plan)
            _replace(bundle.path, MANIFEST, whole)
    except OSError as error:
        raise file_error("written", bundle.path, error) from error
    return Bundle.open(bundle.path)


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of the manifest's file, sealed. BundleError for a value that JSON does not have."""
    try:
        return (json.dumps(seal(manifest), indent=1) + "\n").encode()
    except ValueError as error:  # NaN, half a surrogate pair
        raise BundleError(
            f"the manifest cannot be written: {short(error)}", fix="see the value that it names"
        ) from error


def _fill(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write ``files`` into an empty folder, and wait until all are on the disk."""
    for file, data in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        write_new(folder / file, data, durable=True)
    for inner in {(folder / file).parent for file in files}:
        sync_folder(inner)


def _checked(new: Path) -> Bundle:
    """Open a bundle in a temporary folder and check its files. OSError instead of an InputError,
    which would name a file in the temporary folder."""
    try:
        bundle = Bundle.open(new)
        bundle.check_files()
    except InputError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise
    return bundle


def _replace(folder: Path, file: str, data: bytes) -> None:
    """Write ``file`` under another name and rename it. BundleError if its folder is a link."""
    target = folder / file
    if target.parent.is_symlink():
        raise BundleError(
            f"{folder.name}/{file} lies behind a link; not written",
            fix="put a real folder in the place of the link",
        )
    target.parent.mkdir(exist_ok=True)
    prefix = f".{target.name}.partial-"
    for name in os.listdir(target.parent):
        if name.startswith(prefix):  # left by a writer that was killed
            (target.parent / name).unlink()
    partial = target.with_name(prefix + secrets.token_hex(4))
    replace_file(target, data, temporary=partial, durable=True)


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Lock a folder for a block. The lock also ends when the process ends. BlockingIOError if
    another process has the lock and ``wait`` is False."""
    import fcntl  # some systems that can read bundles do not have this module

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _work_prefix(place: Path) -> str:
    """The start of the names of temporary folders for ``place``."""
    return f".{place.name}.partial-"


def _new_folder(place: Path, stack: ExitStack) -> Path:
    """Make the folder "new" in a temporary folder for ``place``. The end of ``stack`` unlocks and
    removes the temporary folder."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=_work_prefix(place), dir=place.parent))
        stack.callback(_remove_rest, work)
        try:
            stack.enter_context(_locked(work))
            (work / "new").mkdir()
        except FileNotFoundError:
            continue  # another writer has removed it, because it was not locked yet
        stack.callback(_put_back, work, place)
        return work / "new"


def _exchange(new: Path, place: Path) -> None:
    """Rename the complete folder ``new`` to ``place``. An older folder there is moved beside
    ``new`` first, also one that another writer renames to ``place`` in the meantime."""
    old = new.with_name("old")
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):
            place.rename(old)
        try:
            new.rename(place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _discard(old)
        else:
            _discard(old)
            return
    raise InputError(
        f"{shown(place)} cannot be written: other exports write it at this moment",
        fix="run it again, or choose another place",
    )


def _discard(old: Path) -> None:
    """Rename an old folder, if there is one, so that :func:`_put_back` does not move it back. A
    folder that is only partly removed must not be moved back."""
    with suppress(FileNotFoundError):
        old.rename(old.with_name(f"trash-{secrets.token_hex(4)}"))


def _put_back(work: Path, place: Path) -> None:
    """Remove the temporary folder ``work``. If it contains the old folder, and ``place`` does not
    exist, the old folder is moved back first."""
    old = work / "old"
    if old.exists() and not place.exists():
        try:
            old.rename(place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # those of another writer
                raise
    _discard(old)
    shutil.rmtree(work, ignore_errors=True)


def _remove_rest(work: Path) -> None:
    """Remove what :func:`_put_back` could not remove. If a part of it remains, a warning names the
    folder."""
    if work.exists():
        _remove_locked(work)
    if work.exists():
        LOG.warning(
            "%s cannot be removed, and is no longer needed; remove it: rm -rf %s",
            shown(work),
            shlex.quote(shown(work)),
        )


def _remove_locked(path: Path) -> None:
    """Remove a folder whose inner folders are not writable, or with few open files left: only one
    folder is open at a time."""
    with suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
            return
        with suppress(OSError):
            path.chmod(0o700)
        for name in os.listdir(path):
            _remove_locked(path / name)
        path.rmdir()


def _remove_abandoned(place: Path) -> None:
    """Remove the temporary folders of processes that were killed."""
    for name in os.listdir(place.parent):
        if name.startswith(_work_prefix(place)) and not (place.parent / name).is_symlink():
            try:
                with _locked(place.parent / name, wait=False):
                    _put_back(place.parent / name, place)
                _remove_rest(place.parent / name)
            except OSError:  # a process still writes to it, or another program made it
                continue
