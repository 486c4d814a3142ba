"""FeatureCache: features of views, kept on the disk between epochs and between runs."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save
from torch import Tensor

from runtime.errors import InputError, first_line
from runtime.files import cache_folder, file_error, replace_file, shown, temporary_name

LOG = logging.getLogger("dg.train")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_HEADER = 1024  # bytes: more than the header of an entry has
_SHARE = 16  # the folder is measured again after each 1/16 of the limit that is written
_SUBFOLDER = re.compile(r"[0-9a-f]{2}")
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors|\.[0-9a-f]{16}\.tmp\.safetensors")


def default_folder() -> Path:
    """Return the folder of the cache that is used if no other is named.

    Raises
    ------
    InputError : the user has no home folder.
    """
    folder = cache_folder()
    if folder is None:
        raise InputError(
            "there is no home folder for the cache of features", fix="--cache DIR, or --no-cache"
        )
    return folder / "features"


class FeatureCache:
    """Features of views on the disk, one safetensors file for each view.

    Several processes may use one folder at the same time: an entry is written whole or not at all.
    An entry that is damaged, truncated or of another form counts as missing, and is replaced.

    An entry's time of modification is the time of its last use. If a new entry does not fit,
    entries that were not used since this object was made are removed, those that were not used for
    the longest time first. Only files whose names are those of entries are counted and removed.
    Another process's entries are counted after each 1/16 of the limit that this process writes, so
    that n processes can exceed the limit by n/16 of it. If there is too little space, also on the
    disk, no further features are stored, which is logged once; stored ones are still read.

    Parameters
    ----------
    folder : is made if it does not exist.
    limit : most bytes of all entries.

    Raises
    ------
    InputError : the folder cannot be made or written.

    Example
    -------
    >>> cache = FeatureCache(default_folder(), 10 * 2**30)
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.storing = True
        self._size: int | None = None  # bytes of all entries; None before they are measured
        self._written = 0  # bytes written since then
        self._start = 0  # nanoseconds, by the clock of the file system
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = temporary_name(folder / "probe")
            probe.touch()
            self._start = probe.stat().st_mtime_ns
            probe.unlink()
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) in _FULL:
                return self._stop(first_line(error))
            message = file_error("written", folder, error).message
            raise InputError(
                f"the cache of features cannot be used: {message}", fix="--no-cache or --cache DIR"
            ) from error

    def get(self, key: str, shape: Sequence[int]) -> Tensor | None:
        """Return stored features, float32 of this shape, or None if there are none."""
        path = self._path(key)
        try:
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode) or found.st_size > 4 * math.prod(shape) + _HEADER:
                return None
            parts = dict(deserialize(path.read_bytes()))
        except (OSError, SafetensorError):
            return None
        forms = {name: (part["dtype"], list(part["shape"])) for name, part in parts.items()}
        if forms != {"features": ("F32", list(shape)), "check": ("U32", [1])}:
            return None
        data = parts["features"]["data"]
        if int.from_bytes(parts["check"]["data"], "little") != _checksum(key, data):
            return None
        with suppress(OSError):
            os.utime(path)
        return torch.frombuffer(data, dtype=torch.float32).reshape(tuple(shape))

    def put(self, key: str, features: Tensor) -> None:
        """Store features, a float32 tensor on the CPU, if there is space."""
        if not self.storing:
            return
        array = np.ascontiguousarray(features.numpy())
        check = np.array([_checksum(key, array.data.cast("B"))], np.uint32)
        data = save({"features": array, "check": check})
        path = self._path(key)
        try:
            if not self._fits(len(data)):
                return self._stop(f"its limit of {self.limit} bytes is reached")
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, data, temporary=temporary_name(path))
        except OSError as error:
            return self._stop(first_line(error))

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _stop(self, reason: str) -> None:
        self.storing = False
        LOG.warning(
            "The cache of features in %s stores no further features: %s.",
            shown(self.folder),
            reason,
        )

    def _fits(self, needed: int) -> bool:
        """Count an entry of ``needed`` bytes, and make room for it; return whether it fits.

        Raises
        ------
        OSError : the folder cannot be read, or an entry cannot be removed.
        """
        part = self.limit // _SHARE
        if self._size is None or self._size + needed > self.limit or self._written > part:
            entries = sorted(self._entries())
            self._size, self._written = sum(size for _, size, _ in entries), 0
            if self._size + needed > self.limit:
                for used, size, path in entries:
                    if used >= self._start or self._size + max(needed, part) <= self.limit:
                        break
                    path.unlink(missing_ok=True)
                    self._size -= size
        if self._size + needed > self.limit:
            return False
        self._size += needed
        self._written += needed
        return True

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """List the entries: time of the last use in nanoseconds, bytes, path.

        Raises
        ------
        OSError : a folder cannot be read.
        """
        for folder in os.scandir(self.folder):
            if not _SUBFOLDER.fullmatch(folder.name) or not folder.is_dir(follow_symlinks=False):
                continue
            for file in os.scandir(folder):
                if not _ENTRY.fullmatch(file.name):
                    continue
                with suppress(FileNotFoundError):  # another process has removed it
                    found = file.stat(follow_symlinks=False)
                    if stat.S_ISREG(found.st_mode):
                        yield found.st_mtime_ns, found.st_size, Path(file.path)


def _checksum(key: str, data: bytes | bytearray | memoryview) -> int:
    """The checksum of an entry: CRC-32 of the key and the features. It finds damage, and entries
    that were renamed."""
    return zlib.crc32(data, zlib.crc32(key.encode()))
