"""Tables for people, JSON for programs, and where the numbers were made."""

from __future__ import annotations

import datetime
import json
import os
import platform
import secrets
import subprocess
from pathlib import Path
from typing import Any

import cv2
import numpy as np

import runtime
from runtime.backend import default_threads
from runtime.errors import InputError
from sdk.image import write_atomic


def environment() -> dict[str, Any]:
    """Machine, versions, date and commit."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
        else:  # ARM's names no model; the board's does
            board = Path("/proc/device-tree/model")
            cpu = board.read_text().strip("\0\n") if board.exists() else cpu
    except OSError:
        pass  # not Linux
    return {
        "cpu": cpu,
        "threads": default_threads(),
        "target": runtime.target(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; columns in the order of first appearance."""
    return _lines(*_cells(rows))


def fitted(rows: list[dict[str, Any]], width: int) -> str:
    """A table no wider than that, if it can be: else with the rows side by side, some at a time.
    0: of any width."""
    whole = table(rows)
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


def write_json(path: Path, document: Any) -> None:
    """Write ``document`` whole or not at all, making the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(document, indent=1) + "\n").encode())
