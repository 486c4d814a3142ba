"""Checks of an ONNX file before ONNX Runtime reads it: its size, and where its weights are
stored."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from runtime.errors import BundleError, InputError

MAX_BYTES = 2**31  # protobuf's own limit: files must be smaller
MAX_LINKS = 40  # links that are followed from a model file; Linux follows as many
_AGAIN = "copy or download the model again, together with its weights file"


def check_self_contained(data: bytes, name: str) -> None:
    """Check that the bytes are a protobuf message and contain all weights.

    Parameters
    ----------
    data : a serialised model.
    name : of the model, for messages.

    Raises
    ------
    BundleError : no ONNX, 2 GiB or more, or weights in another file.
    """
    if not 0 < len(data) < MAX_BYTES:
        raise BundleError(f"{name} has {len(data)} bytes; an ONNX file has 1 to {MAX_BYTES - 1}")
    try:
        outside = next(external_locations(data), None)
    except (IndexError, UnicodeDecodeError, ValueError) as error:
        raise BundleError(f"{name} is no ONNX file: {error}", fix="export it again") from error
    if outside is not None:
        raise BundleError(
            f"{name} keeps weights in {outside!r}, outside of itself; not loaded",
            fix="save the model without external data",
        )


def check_file(path: Path) -> tuple[Path, dict[str, Path]]:
    """Check that a file is a protobuf message and that its weights are in its own folder.

    Two kinds of links are followed. If the file is a link, and its weights are not beside the link
    but beside the file that the link points to, this file is the model. In the cache of a model
    hub, a link FOLDER/snapshots/.../NAME may point to a file in FOLDER/blobs. FOLDER must not be
    the root folder or the user's home.

    Parameters
    ----------
    path : an .onnx file, or a link to one.

    Returns
    -------
    The path of the model that has the weights beside it; and for each external data location of
    the model the file that it means, with all links resolved. The second is empty if the model
    contains all of its weights.

    Raises
    ------
    InputError : the file does not exist or cannot be read.
    BundleError : no ONNX, 2 GiB or more, or weights that are missing, are no file, or lie outside
        the folder.

    Example
    -------
    >>> model, weights = check_file(Path("snapshots/1234/model.onnx"))
    >>> weights
    {'model.onnx_data': PosixPath('/cache/models--net/blobs/56ab')}
    """
    if not _is_file(path):
        raise InputError(
            f"{path} does not exist or is no file",
            fix=f"check the path; the current folder is {Path.cwd()}",
        )
    size = path.stat().st_size
    if not 0 < size < MAX_BYTES:
        raise BundleError(f"{path} has {size} bytes; an ONNX file has 1 to {MAX_BYTES - 1}")
    try:
        locations = sorted(set(external_locations(path.read_bytes())))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}", fix=f"see: ls -l {path}"
        ) from error
    except (IndexError, UnicodeDecodeError, ValueError) as error:
        raise BundleError(f"{path} is no ONNX file: {error}", fix="export it again") from error
    for location in locations:
        parts = PurePosixPath(location.replace("\\", "/")).parts
        if PurePosixPath(location).is_absolute() or ".." in parts:
            raise BundleError(
                f"{path} keeps weights in {location!r}, outside its own folder; not loaded",
                fix="save the model with its data beside it (onnx.save_model, location='NAME')",
            )
    model = _beside_weights(path, locations)
    folder = model.parent.resolve()
    return model, {location: _weights(path, folder, location) for location in locations}


def _beside_weights(path: Path, locations: list[str]) -> Path:
    """The path, or, if the weights are not beside it, the first file with the weights beside it
    that the path points to as a link. Without such a file the path."""
    link = path
    for _ in range(MAX_LINKS):
        if all(os.path.lexists(link.parent / location) for location in locations):
            return link
        if not link.is_symlink():
            break
        link = link.parent / link.readlink()
    return path


def _weights(path: Path, folder: Path, location: str) -> Path:
    """The file of a location, with links resolved. BundleError if it is missing, is no file, or
    lies neither in the folder nor in the hub cache that the folder belongs to."""
    file = folder / location
    needed = f"{path} needs its weights file {location!r}, which"
    try:
        real = file.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise BundleError(f"{needed} cannot be found: {error}", fix=_AGAIN) from error
    if not real.is_relative_to(folder) and real.parent != _blobs(folder):
        raise BundleError(
            f"{path} keeps weights in {location!r}, which is a link to {real}, outside its own "
            "folder; not loaded",
            fix="if you trust these weights, replace the link with a copy of the file",
        )
    if not _is_file(real):
        linked = f"is a link to {real} and " if real != file else ""
        what = "is no file" if _exists(real) else "is missing"
        raise BundleError(f"{needed} {linked}{what}", fix=_AGAIN)
    return real


def _blobs(folder: Path) -> Path | None:
    """The folder ``blobs`` of the hub cache that contains a folder: the cache is the parent of a
    folder ``snapshots`` above the files. None if the folder is in no hub cache."""
    for snapshots in (folder, *folder.parents):
        cache = snapshots.parent
        if snapshots.name == "snapshots" and (cache / "blobs").is_dir():
            forbidden = (Path(cache.anchor), Path(os.path.expanduser("~")).resolve())
            return None if cache in forbidden else cache / "blobs"
    return None


def _exists(path: Path) -> bool:
    """Whether something has this path; False also for paths that nothing can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _is_file(path: Path) -> bool:
    """Whether the path is a file; False also for paths that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


# Where onnx.proto stores tensors: message -> {number of a field: message inside}. Field 13 of a
# tensor contains its external_data entries (field 1 is the key, field 2 the value).
_NESTED = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}


def external_locations(data: bytes) -> Iterator[str]:
    """Every external data location in a serialised model, whichever runtime will read it.

    Parameters
    ----------
    data : a serialised ModelProto. It is parsed here, without protobuf's own code.

    Raises
    ------
    IndexError, ValueError : the bytes are no protobuf message.
    UnicodeDecodeError : a location is no UTF-8.
    """
    todo = [("model", memoryview(data))]
    while todo:
        kind, message = todo.pop()
        entry: dict[int, memoryview] = {}
        for number, value in _fields(message):
            if kind == "entry":
                entry[number] = value
            elif number in _NESTED[kind]:
                todo.append((_NESTED[kind][number], value))
        if kind == "entry" and bytes(entry.get(1, b"")) == b"location":
            yield bytes(entry.get(2, b"")).decode()


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of the length-delimited fields of a protobuf message."""
    at, size = 0, len(message)

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    while at < size:
        key = varint() & 0xFFFFFFFF  # as protobuf reads it
        wire = key & 7
        if wire == 2:
            length = varint()
            if at + length > size:
                raise ValueError("a field reaches past the end of the file")
            yield key >> 3, message[at : at + length]
            at += length
        elif wire == 0:
            varint()
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
