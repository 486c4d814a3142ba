"""Files are written whole or not at all, and the one folder for what may be computed again."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from runtime.errors import InputError


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to a temporary sibling, then rename: the file is whole or untouched."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder, wanted a file name")
    if not path.parent.is_dir():
        raise InputError(f"folder {path.parent} does not exist", fix=f"mkdir -p {path.parent}")
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror}",
            fix=f"check the permissions of {path.parent} and the space left on it",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """A new hidden sibling of the same type, to be renamed to ``path``."""
    return path.parent / f".{secrets.token_hex(8)}.tmp{path.suffix}"
