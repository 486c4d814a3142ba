"""Checks of an ONNX file before ONNX Runtime reads it: its size, and where its weights are
stored."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath

from runtime.engines.named_files import (
    check_regular,
    other_content,
    other_file,
    read_regular,
    temporary_folder,
)
from runtime.errors import BundleError
from runtime.files import file_error, is_utf8, shown

MAX_BYTES = 2**31  # protobuf's own limit: files must be smaller
MAX_LINKS = 40  # links that are followed from a model file; Linux follows as many
_LINK = "dg-model.onnx"  # the name of a temporary link to a model
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
    _check_size(len(data), name)
    outside = next(iter(_locations(data, name)), None)
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
    InputError : the file does not exist or is no regular file; it or its weights cannot be read.
    BundleError : no ONNX, 2 GiB or more, or weights that are missing, are no file, or lie outside
        the folder.

    Example
    -------
    >>> model, weights = check_file(Path("snapshots/1234/model.onnx"))
    >>> weights
    {'model.onnx_data': PosixPath('/cache/models--net/blobs/56ab')}
    """
    wanted = "an .onnx file"
    _check_size(check_regular(path, wanted), shown(path))
    locations = sorted(set(_locations(read_regular(path, wanted), shown(path))))
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


@contextmanager
def names_in_utf8(model: Path, weights: dict[str, Path]) -> Iterator[str]:
    """Make a path in UTF-8 for a model, because ONNX Runtime takes no other: a ``with`` block.

    Parameters
    ----------
    model, weights : from :func:`check_file`.

    Returns
    -------
    The path of the model; if it is not UTF-8, the path of a link in a temporary folder, which also
    contains links to the weights, and is removed at the end of the block.

    Raises
    ------
    InputError : the links cannot be made.

    Example
    -------
    >>> with names_in_utf8(*check_file(path)) as name: session = InferenceSession(name)
    """
    if is_utf8(str(model)):
        yield str(model)
        return
    with ExitStack() as stack:
        try:
            place = tempfile.TemporaryDirectory(prefix="dg-", dir=temporary_folder())
            folder = stack.enter_context(place)
            for name, file in {_LINK: Path(os.path.abspath(model)), **weights}.items():
                link = Path(folder, name)
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.is_symlink():  # "a.bin" and "./a.bin" are one file
                    os.symlink(file, link)
        except OSError as error:
            raise file_error("linked", model, error) from error
        yield os.path.join(folder, _LINK)


def _check_size(size: int, name: str) -> None:
    """BundleError for a number of bytes that no ONNX file has."""
    if not 0 < size < MAX_BYTES:
        raise BundleError(f"{name} has {size} bytes; an ONNX file has 1 to {MAX_BYTES - 1}")


def _locations(data: bytes, name: str) -> list[str]:
    """Every external data location in a model. BundleError if the bytes are no ONNX."""
    if other := other_content(data):
        raise BundleError(f"{name} is {other[0]}", fix=other[1])
    try:
        return list(external_locations(data))
    except (IndexError, UnicodeDecodeError, ValueError) as error:
        raise BundleError(f"{name} is no ONNX file: {error}", fix="export it again") from error


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
    needed = f"{shown(path)} needs its weights file {location!r}, which"
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
    try:
        is_file = stat.S_ISREG(os.stat(real).st_mode)
    except PermissionError as error:
        raise file_error("read", real, error) from error
    except (OSError, ValueError):
        is_file = False
    if not is_file:
        linked = f"is a link to {real} and " if real != file else ""
        what = "is no file" if os.path.lexists(real) else "is missing"
        raise BundleError(f"{needed} {linked}{what}", fix=_AGAIN)
    if other := other_file(real):
        raise BundleError(f"{needed} is {other[0]}", fix=other[1])
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
