"""Write results: as Markdown tables for people, and as JSON for programs."""

from __future__ import annotations

import json
import lzma
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from runtime.errors import InputError
from runtime.files import file_error, shown, stat_of, write_atomic

WIDTH = 100  # characters; a dictionary of plain values that fits is written in one line of JSON


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table. The columns are in the order of their first appearance."""
    return _lines(*_cells(rows))


def fitted(rows: list[dict[str, Any]], width: int) -> str:
    """Rows as a Markdown table of at most ``width`` characters, if possible; 0 means any width.

    A table that is too wide is turned: its rows become columns. If not all of them fit side by
    side, the others follow in further tables.
    """
    whole = as_markdown(rows)
    if not width or len(whole.partition("\n")[0]) <= width:
        return whole
    columns, cells = _cells(rows)
    for count in range(len(rows), 0, -1):
        parts = []
        for i in range(0, len(rows), count):
            some = cells[i : i + count]
            turned = [[c, *(row[n] for row in some)] for n, c in enumerate(columns)]
            parts.append(_lines(turned[0], [line for line in turned[1:] if any(line[1:])]))
        if count == 1 or max(len(p.partition("\n")[0]) for p in parts) <= width:
            break
    return "\n\n".join(parts)


def _cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return columns, [[str(row.get(c, "")) for c in columns] for row in rows]


def _lines(columns: list[str], cells: list[list[str]]) -> str:
    widths = [max(len(c), *(len(r[i]) for r in cells)) for i, c in enumerate(columns)]

    def line(values: list[str]) -> str:
        return "| " + " | ".join(v.ljust(w) for v, w in zip(values, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(columns), rule, *map(line, cells)])


def check_out(path: Path | None) -> None:
    """Check before a measurement that its result can be written to ``path``, if it is not None.

    Raises
    ------
    InputError : the path is a folder, or its folder cannot be written or created.
    """
    if path is None:
        return
    found = stat_of(path, "written")
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise InputError(
            f"{shown(path)} is a folder, wanted a file name",
            fix="remove it, or choose another name",
        )
    if found is not None and not stat.S_ISREG(found.st_mode):
        return  # a pipe or a device, into which the result is written
    try:
        target = Path(os.path.realpath(path))  # of a link
        place = next(p for p in target.parents if stat_of(p, "written") is not None)
        made = place / f".{secrets.token_hex(8)}"
        made.mkdir()  # shows that folders and files can be created here
        made.rmdir()
    except OSError as error:
        raise file_error("written", path, error) from error


def make_folder(path: Path) -> None:
    """Create a folder, and those that contain it, unless it exists.

    Raises
    ------
    InputError : it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{shown(path)} is no folder to write to: {error.strerror}", fix="choose another folder"
        ) from error


def as_json(document: Any) -> str:
    """The document as JSON. A list of plain values is one line, and so is a dictionary of plain
    values that fits WIDTH."""
    return _json(document, 0) + "\n"


def _json(value: Any, depth: int) -> str:
    if not isinstance(value, (dict, list, tuple)) or not value:
        return json.dumps(value)
    held = value.values() if isinstance(value, dict) else value
    if not any(isinstance(v, (dict, list, tuple)) for v in held):
        numbers = not isinstance(value, dict) and not any(isinstance(v, str) for v in held)
        line = json.dumps(value, separators=(",", ": ") if numbers else None)
        if not isinstance(value, dict) or depth + len(line) <= WIDTH:
            return line
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, dict):
        parts = [f"{json.dumps(str(k))}: {_json(v, depth + 1)}" for k, v in value.items()]
        return "{" + inner + f",{inner}".join(parts) + outer + "}"
    return "[" + inner + f",{inner}".join(_json(v, depth + 1) for v in value) + outer + "]"


def write_json(path: Path, document: Any, raw: Any = None) -> None:
    """Write ``document`` to ``path``, and the samples ``raw``, if they are not None, to the file
    that :func:`raw_path` names. Each file is written completely or not at all. Missing folders are
    created.

    Raises
    ------
    InputError : a folder cannot be created, or a file cannot be written.
    """
    make_folder(path.parent)
    write_atomic(path, as_json(document).encode())
    if raw is not None:
        write_atomic(raw_path(path), packed(raw))


def raw_path(path: Path) -> Path:
    """The path of the samples of the result ``path``: NAME.raw.json.xz beside NAME.json."""
    return path.with_suffix(".raw.json.xz")


def packed(samples: Any) -> bytes:
    """The bytes of a file of samples: JSON, compressed by xz."""
    return lzma.compress(json.dumps(samples).encode())
