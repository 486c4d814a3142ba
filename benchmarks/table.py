"""Tables for people and JSON for programs."""

from __future__ import annotations

import json
import lzma
import secrets
from pathlib import Path
from typing import Any

from runtime.errors import InputError

WIDTH = 100  # of a line of JSON that holds a whole table of plain values


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; columns in the order of first appearance."""
    return _lines(*_cells(rows))


def fitted(rows: list[dict[str, Any]], width: int) -> str:
    """A table no wider than that, if it can be: else with the rows side by side, some at a time.
    0: of any width."""
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
    """InputError where a result could not be written later."""
    if path is None:
        return
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder, wanted a file name")
        place = next(p for p in path.absolute().parents if p.exists())
        made = place / f".{secrets.token_hex(8)}"
        made.mkdir()  # as the missing folders will be, or a file
        made.rmdir()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def as_json(document: Any) -> str:
    """The document, with one line for each list of plain values and each short table of them."""
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
    """Write ``document`` and, if there are any, its ``raw`` samples, each whole or not at all,
    making the folder if needed."""
    from runtime.files import write_atomic

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, as_json(document).encode())
    if raw is not None:
        write_atomic(raw_path(path), packed(raw))


def raw_path(path: Path) -> Path:
    """Where the samples of the result ``path`` are: NAME.raw.json.xz beside NAME.json."""
    return path.with_suffix(".raw.json.xz")


def packed(samples: Any) -> bytes:
    """Samples as they are written: JSON, packed by xz."""
    return lzma.compress(json.dumps(samples).encode())
