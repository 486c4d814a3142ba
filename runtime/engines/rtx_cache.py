"""The runtime cache of TensorRT for RTX: a file with the kernels that it compiled for an engine, so
that the next process does not compile them again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from runtime.engines.tensorrt import LOG
from runtime.files import cache_folder, replace_file


class RuntimeCache:
    """The compiled kernels of one engine, in a file of the project's cache folder.

    The name of the file is a hash of the plan, of the library's version and of the GPU. Its content
    is the SHA-256 of the kernels, then the kernels. A file that is missing, damaged or made by
    another driver, or that cannot be read or written, stops nothing: the library compiles the
    kernels again. The first such reason except a missing file is logged as a warning.

    Parameters
    ----------
    config : TensorRT's IRuntimeConfig of the engine, which gets the cache. The GPU's context must
        be the current one.
    plan : the bytes of the engine.
    version : of the library, for example "1.7.1.116".
    gpu : the name and the compute capability of the GPU.
    name : of the engine, for the warning.

    Examples
    --------
    >>> cache = RuntimeCache(config, plan, version="1.7.1.116", gpu="RTX 4090 (8, 9)", name="prior")
    >>> context = engine.create_execution_context(config)  # compiles only what the file lacks
    >>> cache.save()
    """

    def __init__(self, config: Any, plan: bytes, *, version: str, gpu: str, name: str) -> None:
        self._name, self._warned = name, False
        self._path = _path(plan, version, gpu)
        self._stored = b""  # SHA-256 of the kernels in the file
        self._cache = config.create_runtime_cache()
        if self._cache is None or not config.set_runtime_cache(self._cache):
            self._cache = None
            self._warn("the library refuses a runtime cache")
        elif self._path is None:
            self._warn("there is no home folder for the cache")
        else:
            self._load(self._path)

    def _load(self, path: Path) -> None:
        """Read the file, if it exists."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            self._warn(f"{path} cannot be read: {error.strerror}")
            return
        digest, kernels = data[:32], data[32:]
        if hashlib.sha256(kernels).digest() != digest:
            self._warn(f"{path} is damaged")
        elif not self._cache.deserialize(kernels):
            self._warn(f"the library refuses {path}, as after an update of the driver")
        else:
            self._stored = digest

    def save(self) -> None:
        """Replace the file by the kernels that were compiled or loaded until now, if there are new
        ones."""
        if self._cache is None or self._path is None:
            return
        memory = self._cache.serialize()
        kernels = b"" if memory is None else bytes(memory)
        digest = hashlib.sha256(kernels).digest()
        if not kernels or digest == self._stored:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, digest + kernels)
        except OSError as error:
            self._warn(f"{self._path} cannot be written: {error.strerror}")
            return
        self._stored = digest

    def _warn(self, why: str) -> None:
        """Log why kernels are compiled again; only the first reason is logged."""
        if not self._warned:
            LOG.warning("%s: the kernels are compiled again: %s", self._name, why)
        self._warned = True


def _path(plan: bytes, version: str, gpu: str) -> Path | None:
    """The file of an engine; None without a cache folder."""
    folder = cache_folder()
    text = "\n".join((hashlib.sha256(plan).hexdigest(), version, gpu))
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    return None if folder is None else folder / "rtx" / f"{key}.kernels"
