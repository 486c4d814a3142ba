"""Reading a picture from what the user passes: a path, encoded bytes, a file object, a picture of
PIL, or an array."""

from __future__ import annotations

import os
import stat
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from runtime.checks import on_gpu
from runtime.errors import InputError, first_line
from runtime.files import file_error, shown, stat_of
from runtime.opencv import cv2
from runtime.pictures.decode import decode
from runtime.pictures.header import START, format_of
from runtime.pictures.limits import check_size
from runtime.urls import is_url, without_secrets

MOST_BYTES = 2**31 - 1  # of an encoded file: OpenCV decodes no more
_CHUNK = 2**24  # bytes of one read
_ALPHA = ("LA", "PA", "RGBA", "RGBa")  # PIL's modes that have transparency
# Files, archives and compressed files raise these; objects of users most often raise RuntimeError.
_READ_ERRORS = (OSError, EOFError, ValueError, TypeError, RuntimeError, zlib.error, cv2.error)
# PIL raises these for a file that is truncated, damaged or closed, and for unknown modes.
_PIL_ERRORS = (OSError, ValueError, SyntaxError, AssertionError, AttributeError)


def load_image(source: Any, *, color: str = "rgb") -> tuple[np.ndarray, list[str]]:
    """Read a picture.

    Parameters
    ----------
    source : one of these.

        - A path, or the bytes of an encoded file (bytes, bytearray, memoryview, mmap). A file may
          be grey, palette, colour or CMYK, with 8 or 16 bits per channel. Its EXIF orientation is
          applied. Of a file with several pages the first page is read. A pipe and /dev/stdin are
          paths. URLs are not read.
        - A file object: its ``read`` returns the bytes of an encoded file, from the present
          position to the end. It is not closed.
        - A picture of PIL in any mode but "I" and "F", as PIL shows it: its EXIF orientation is not
          applied.
        - An array (H, W, 3) uint8; or grey, (H, W) or (H, W, 1) uint8, which is copied to the three
          channels. Objects with ``__array__``, such as tensors on the CPU, are arrays.
    color : "rgb" or "bgr", the channel order of an array; it is ignored for all other sources.

    Returns
    -------
    (H, W, 3) uint8 RGB, C-contiguous, a copy; and a list of warnings, one sentence each.

    Raises
    ------
    InputError : the file cannot be read, is damaged, is not a picture, has other values than 8 or
        16 bits, or more than MOST_BYTES bytes; the picture has more than MAX_PIXELS pixels; the
        array has another shape or dtype; ``source`` is a URL, a device or of another type; or
        ``color`` is another word.

    Example
    -------
    >>> pixels, warnings = load_image(io.BytesIO(data))
    """
    if color not in ("rgb", "bgr"):
        raise InputError(
            f"color is {color!r}, wanted 'rgb' or 'bgr'",
            fix="'bgr' for pictures that OpenCV has read, else 'rgb'",
        )
    if isinstance(source, np.ndarray):
        return _from_array(source, color, "source"), []
    if isinstance(source, (str, os.PathLike)):
        return _from_path(source)
    if hasattr(source, "mode") and hasattr(source, "convert"):
        return _from_pil(source)
    try:
        view = memoryview(source)
    except TypeError:
        pass
    else:
        if view.ndim != 1:
            return _from_array(np.asarray(view), color, "np.asarray(source)"), []
        return _from_bytes(source if isinstance(source, bytes) else bytes(view))
    if hasattr(source, "read"):
        name = getattr(source, "name", None)
        return _from_file(source, shown(name) if name and isinstance(name, str) else "source")
    if on_gpu(source):
        raise InputError(
            "source is on a GPU; wanted a picture on the host",
            fix="copy it first: x.cpu() in PyTorch, x.get() in CuPy",
        )
    if hasattr(source, "__array__"):
        try:
            array = np.asarray(source)
        except (RuntimeError, TypeError, ValueError) as error:  # RuntimeError: it requires a grad
            raise InputError(
                f"source is a {type(source).__name__} that NumPy cannot read: {first_line(error)}",
                fix="pass a NumPy array, (H, W, 3) uint8",
            ) from error
        return _from_array(array, color, "np.asarray(source)"), []
    raise InputError(
        f"source is a {type(source).__name__}, wanted a path, bytes, a file object, a picture of "
        "PIL or an (H, W, 3) uint8 array",
        fix="pass pictures one by one" if isinstance(source, (list, tuple)) else "",
    )


def path_of(source: Any) -> Path | None:
    """Return the path of a picture that :func:`load_image` has read; None if it was no path.

    Example
    -------
    >>> path_of("street.jpg"), path_of(b"...")
    (PosixPath('street.jpg'), None)
    """
    return Path(os.fsdecode(source)) if isinstance(source, (str, os.PathLike)) else None


def _from_path(source: str | os.PathLike[str]) -> tuple[np.ndarray, list[str]]:
    """Read the file that a path names."""
    text = os.fsdecode(source)
    if not text:
        raise InputError("source is an empty text, wanted a path", fix="name a picture file")
    if isinstance(source, str) and is_url(text):
        raise InputError(
            f"{shown(without_secrets(text))} is a URL, wanted a path: URLs are not read",
            fix="download the picture; or pass its bytes: urllib.request.urlopen(url).read()",
        )
    path, name = Path(text), shown(text)
    found = stat_of(path)
    mode, size = (found.st_mode, found.st_size) if found is not None else (stat.S_IFREG, 0)
    if stat.S_ISDIR(mode):
        raise InputError(f"{name} is a folder, wanted a picture", fix="pass its files one by one")
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or text == "/dev/stdin"):
        raise InputError(  # a device such as /dev/zero has no end
            f"{name} is a device or a socket, wanted a picture file", fix="pass a file or a pipe"
        )
    if size > MOST_BYTES:
        raise _too_large(name)
    try:
        with path.open("rb") as file:
            if stat.S_ISREG(mode):
                if start := file.read(START):
                    format_of(start, name)  # a large file that is no picture is not read whole
                file.seek(0)
                return decode(file.read(), name)
            return decode(_read_all(file, name), name)
    except OSError as error:
        raise file_error("read", path, error) from error


def _from_file(file: Any, name: str) -> tuple[np.ndarray, list[str]]:
    """Read a file object, which messages call ``name``."""
    data = _read_all(file, name)
    if not data:
        raise InputError(
            f"{name} has no bytes after its position",
            fix="go back to its beginning first: source.seek(0)",
        )
    return decode(data, f"{name} ({len(data)} bytes)")


def _read_all(file: Any, name: str) -> bytes:
    """Return the bytes from the position of ``file`` to its end, which messages call ``name``."""
    parts: list[bytes] = []
    size = 0
    recognised = False
    while True:
        try:
            part = file.read(_CHUNK if recognised else START)
        except _READ_ERRORS as error:
            raise InputError(
                f"{name} cannot be read: {first_line(error)}",
                fix="check the file or the connection; open a file as bytes: open(path, 'rb')",
            ) from error
        if part is not None and not isinstance(part, bytes):
            raise InputError(
                f"{name} is no file of bytes: read() returned a {type(part).__name__}",
                fix="open it as bytes: open(path, 'rb')",
            )
        if not recognised and parts and (not part or size >= START):
            format_of(b"".join(parts)[:START], name)
            recognised = True
        if not part:
            return parts[0] if len(parts) == 1 else b"".join(parts)
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise _too_large(name)


def _too_large(name: str) -> InputError:
    return InputError(
        f"{name} has more than {MOST_BYTES} bytes, wanted a smaller picture file",
        fix="scale it down or cut it into tiles",
    )


def _from_bytes(data: bytes) -> tuple[np.ndarray, list[str]]:
    """Decode the bytes of a file."""
    if len(data) > MOST_BYTES:
        raise _too_large("source")
    try:
        return decode(data, f"source ({len(data)} bytes)")
    except InputError as error:
        if 0 < len(data) < 4096 and data.isascii() and data.decode().isprintable():
            fix = f"{error.fix}; if the bytes are a path, pass it as text: source.decode()"
            raise InputError(error.message, fix=fix) from error
        raise


def _from_pil(picture: Any) -> tuple[np.ndarray, list[str]]:
    """Convert a picture of PIL, which need not be loaded yet."""
    mode, (width, height) = picture.mode, picture.size
    found = f"source is a picture of PIL of mode {mode} and {width} x {height} pixels"
    if mode in ("I", "F") or not width * height:
        raise InputError(
            f"{found}, wanted 8 or 16 bits per channel and at least one pixel",
            fix="map the values to 0..255, and pass an array",
        )
    check_size(height, width, "source")
    deep = mode.startswith("I;16")
    alpha = mode in _ALPHA or "transparency" in picture.info
    try:
        turned = picture.getexif().get(0x0112, 1) > 1  # the tag of the orientation
        if not deep:
            picture = (picture.convert("RGBA") if alpha else picture).convert("RGB")
        pixels = np.array(picture)
    except _PIL_ERRORS as error:
        raise InputError(
            f"{found}, which PIL cannot read: {first_line(error)}",
            fix="check its file; if it is closed, call picture.load() before",
        ) from error
    warnings = []
    if alpha:
        warnings.append(
            "The alpha channel was dropped; flatten the picture if its transparency matters."
        )
    if deep:
        pixels = cv2.convertScaleAbs(pixels.astype(np.uint16), alpha=1 / 257)
        pixels = cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
        warnings.append("The picture has 16 bits per channel; it was scaled to 8.")
    if turned:
        warnings.append(
            "The EXIF orientation of the PIL picture is not applied; "
            "PIL.ImageOps.exif_transpose applies it."
        )
    return pixels, warnings


def _from_array(array: np.ndarray, color: str, name: str) -> np.ndarray:
    """Return a copy of an array, (H, W, 3) uint8 RGB. ``name`` is its expression in messages."""
    array = np.asarray(array)  # a subclass, such as a masked array, becomes a plain array
    _check_array(array, name)
    if array.ndim == 2 or array.shape[2] == 1:
        grey = np.ascontiguousarray(array).reshape(array.shape[:2])
        return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    if color == "bgr":
        return cv2.cvtColor(np.ascontiguousarray(array), cv2.COLOR_BGR2RGB)
    return np.array(array, order="C")


def _check_array(array: np.ndarray, name: str) -> None:
    """Check shape, dtype and size of an array; the fix of the InputError says how to convert it."""
    shape, dtype = array.shape, array.dtype
    picture = array.ndim == 2 or (array.ndim == 3 and shape[2] in (1, 3))
    if picture and dtype == np.uint8 and array.size:
        return check_size(shape[0], shape[1], "source")
    found, fixes, sides = f"a {shape} {dtype} array", [], list(shape)
    part = name  # the expression of the picture in the array
    while len(sides) > 2 and sides[0] == 1 and (len(sides) > 3 or sides[2] not in (1, 3, 4)):
        part, sides = f"{part}[0]", sides[1:]  # an axis for a batch of one
    if array.size == 0:
        fixes.append("check the crop or the camera")
    elif len(sides) == 1:
        fixes.append(f"for an encoded file pass {part}.tobytes()")
    elif len(sides) > 3:
        fixes.append(f"pass the pictures one by one, as {part}[0]")
    elif len(sides) == 3 and sides[2] in (2, 4):
        part = f"{part}[..., {0 if sides[2] == 2 else ':3'}]"
        fixes.append(f"drop alpha: {part}")
    elif len(sides) == 3 and sides[0] == 3 != sides[2]:
        part = f"{part}.transpose(1, 2, 0)"
        fixes.append(part)
    elif part != name:
        fixes.append(part)
    if dtype.kind == "b":
        fixes.append(f"for black and white: {part}.astype(np.uint8) * 255")
    elif dtype.kind in "fiu" and array.size:
        finite = array[np.isfinite(array)]
        if finite.size < array.size:
            found += " with NaN or infinity"
            fixes.append("replace these values")
        if finite.size and dtype != np.uint8:
            low, high = float(finite.min()), float(finite.max())
            found += f" with values from {low:g} to {high:g}"
            fixes.append(_to_uint8(part, dtype.kind, low, high))
    elif dtype != np.uint8:
        fixes.append(f"scale the values to 0..255 and cast: {part}.astype(np.uint8)")
    raise InputError(f"source is {found}, wanted (H, W, 3) uint8", fix="; ".join(fixes))


def _to_uint8(part: str, kind: str, low: float, high: float) -> str:
    """Return the fix for values of another dtype than uint8, from ``low`` to ``high``."""
    if kind == "f" and 0 <= low and high <= 1:
        return f"multiply values in [0, 1] by 255 and cast: ({part} * 255).astype(np.uint8)"
    if 0 <= low and high <= 255:
        return f"cast the values, which are in [0, 255]: {part}.astype(np.uint8)"
    undo = ", after undoing the normalisation" if kind == "f" and low < 0 and high < 10 else ""
    return f"scale the values to 0..255{undo} and cast: np.clip({part}, 0, 255).astype(np.uint8)"
