"""Read a bundle: a folder with a manifest, ONNX files, initial weights, engines and golden vectors.

The manifest's form and every path, size and hash are checked, and exactly the bytes that were
hashed are used. Hashes detect damage and mixed-up files, but no attack: whoever can change a file
of a bundle can change its hash, too. An engine is native code, so load a bundle with engines only
if you trust its author.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.bundle.manifest import MANIFEST, MANIFEST_BYTES, entries, parse_manifest, ports_entry
from runtime.core.config import RefineConfig
from runtime.engines.named_files import missing, other_content, shell_word
from runtime.engines.onnx_file import check_self_contained
from runtime.engines.port import Port
from runtime.errors import BundleError, InputError
from runtime.files import file_error, shown, stat_of
from runtime.prior.preprocess import Preprocess
from runtime.tensors import load_tensors

# Errors of the operating system that say what a bundle contains: a link, a file in place of a
# folder, a socket. All other errors are about this machine.
_WRONG = (errno.ELOOP, errno.ENOTDIR, errno.ENXIO)


class Bundle(NamedTuple):
    """A bundle whose manifest was checked. Its files are checked when they are read."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read and check the manifest.

        Parameters
        ----------
        path : the bundle's folder.

        Raises
        ------
        InputError : the folder does not exist, or it or its manifest cannot be read.
        BundleError : the folder is no bundle, or the manifest is damaged, has another schema, or
            contains a path out of the bundle.
        """
        folder = Path(path)
        found = stat_of(folder)
        if found is None:
            raise missing(folder)
        if not stat.S_ISDIR(found.st_mode):
            raise InputError(f"{shown(folder)} is no folder; a bundle is one", fix="unpack it")
        try:
            os.lstat(folder / MANIFEST)
        except FileNotFoundError as error:
            raise BundleError(
                f"{shown(folder)} is no bundle: it has no {MANIFEST}",
                fix="python -m export makes bundles; name the folder that it wrote",
            ) from error
        except OSError as error:
            raise file_error("read", folder / MANIFEST, error) from error
        data = read_file(folder, MANIFEST, None)
        manifest = parse_manifest(data, f"{folder.name}/{MANIFEST}")
        return cls(folder, manifest)

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.name

    @property
    def names(self) -> list[str] | None:
        """The names of the classes, in the order of their numbers; None where they have none."""
        return self.manifest["classes"]

    def read(self, entry: Mapping[str, Any]) -> bytes:
        """The bytes of a file of the manifest, checked against its size and sha256.

        Parameters
        ----------
        entry : the file's entry in the manifest.

        Raises
        ------
        BundleError : the file is missing, or has another size or hash.
        InputError : the operating system refuses to read it.
        """
        try:
            data = read_file(self.path, entry["file"], entry["size"])
            found = hashlib.sha256(data).hexdigest()
            if found != entry["sha256"]:
                raise BundleError(
                    f"{self.name}/{entry['file']} has sha256 {found[:16]}..., "
                    f"the manifest says {entry['sha256'][:16]}...",
                )
        except BundleError as error:
            if "runtime" not in entry:  # only engines have one
                raise
            fix = f"python -m runtime build {shell_word(str(self.path))}; or {error.fix}"
            raise BundleError(error.message, fix=fix) from error
        return data

    def graph(self, name: str) -> bytes:
        """The ONNX bytes of a graph, which contain all weights.

        Parameters
        ----------
        name : "prior", "refine_step", "refine_map" or "cnn".

        Raises
        ------
        BundleError : the bundle has no such graph, or its file is damaged.
        """
        if name not in self.manifest["graphs"]:
            raise BundleError(
                f"{self.name} has no graph {name!r}; "
                f"it has {', '.join(self.manifest['graphs']) or 'none'}",
            )
        data = self.read(self.manifest["graphs"][name])
        check_self_contained(data, f"{self.name}/{name}.onnx")
        return data

    def check_ports(self, name: str, inputs: list[Port], outputs: list[Port]) -> None:
        """Check that the inputs and outputs of a loaded graph equal those in the manifest.

        Raises
        ------
        BundleError : they differ.
        """
        entry = self.manifest["graphs"][name]
        for kind, ports in (("inputs", inputs), ("outputs", outputs)):
            if ports_entry(ports) != entry[kind]:
                raise BundleError(
                    f"{self.name}: graph {name!r} has {kind} {str(ports_entry(ports))[:800]}, "
                    f"the manifest says {str(entry[kind])[:800]}",
                )

    def tensors(self, entry: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The arrays of a safetensors file of the manifest, by name.

        Parameters
        ----------
        entry : the file's entry in the manifest.

        Raises
        ------
        BundleError : the file is damaged, or no safetensors file.
        MissingBackend : safetensors is not installed.
        """
        return load_tensors(self.read(entry), f"{self.name}/{entry['file']}")

    def preprocess(self) -> Preprocess | None:
        """How a picture becomes the input of the prior's network; None without a network."""
        entry = self.manifest["preprocess"]
        return None if entry is None else Preprocess.from_manifest(entry)

    def refine(self) -> RefineConfig:
        """The refinement that the graphs were exported with."""
        return RefineConfig(**self.manifest["refine"])

    def check_files(self) -> None:
        """Read and check every file.

        Raises
        ------
        BundleError : a file is missing or damaged.
        """
        for entry in entries(self.manifest):
            self.read(entry)


def read_file(folder: Path, file: str, size: int | None) -> bytes:
    """The bytes of a regular file inside a folder. Symbolic links inside the folder are not
    followed.

    Parameters
    ----------
    folder : the bundle's folder.
    file : a path inside it, with "/" between names; its form was checked.
    size : the size in bytes that the manifest says; None for the manifest itself.

    Raises
    ------
    BundleError : the file is missing, is no regular file, is behind a link, or has another size.
    InputError : the operating system refuses to read it, for example because of its permissions.
    """
    *folders, name = file.split("/")
    where = f"{folder.name}/{file}"
    opened: list[int] = []
    try:
        opened.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
        for part in folders:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            opened.append(os.open(part, flags, dir_fd=opened[-1]))
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe must not block
        opened.append(os.open(name, flags, dir_fd=opened[-1]))
        info = os.fstat(opened[-1])
        most = MANIFEST_BYTES if size is None else size
        if not stat.S_ISREG(info.st_mode):
            raise BundleError(f"{where} is no regular file")
        if other := other_content(os.pread(opened[-1], 100, 0)):
            raise BundleError(f"{where} is {other[0]}", fix=other[1])
        if info.st_size > most or (size is not None and info.st_size != size):
            wanted = f"at most {most}" if size is None else f"the manifest says {size}"
            raise BundleError(f"{where} has {info.st_size} bytes; {wanted}")
        parts, left = [], most + 1
        while left and (part_read := os.read(opened[-1], min(left, 2**24))):
            parts.append(part_read)
            left -= len(part_read)
        return b"".join(parts)
    except FileNotFoundError as error:
        raise BundleError(f"{where} is missing") from error
    except OSError as error:
        if error.errno not in _WRONG:
            raise file_error("read", folder / file, error) from error
        raise BundleError(
            f"{where} cannot be read: {error.strerror} (links are not followed)"
        ) from error
    finally:
        for descriptor in opened:
            os.close(descriptor)
