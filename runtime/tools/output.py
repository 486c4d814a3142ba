"""Text and JSON on stdout for the commands of python -m runtime."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from runtime.errors import SdkError

WIDTH, COLUMN = 100, 14  # characters: of a line, and of its first column
TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}


def engine_words(engine: Mapping[str, Any]) -> str:
    """Describe an engine in one line: the TensorRT and the platform that built it, and its GPUs."""
    gpus = f"compute capability {', '.join(engine['compute_capabilities']) or 'unknown'}"
    if engine["gpu_name"]:
        gpus = f"{engine['gpu_name']} only ({gpus})"
    l4t = f", L4T {engine['l4t']}" if engine["l4t"] else ""
    title = f"{TITLES[engine['runtime']]} {engine['version']}"
    return f"{title} for {gpus}{l4t}, built on {engine['platform']}"


def receipt_words(receipt: Mapping[str, Any]) -> str:
    """Describe the precisions of an engine: which share of its layers computes in each, and which
    share of its convolutions and matrix products."""
    parts = []
    for key, title in (("layers", "layers"), ("matrix", "convolutions and matrix products")):
        counts = receipt.get(key)
        numbers = counts if isinstance(counts, dict) else {}
        numbers = {k: v for k, v in numbers.items() if type(v) is int and 0 < v < 2**53}
        total = sum(numbers.values())
        shares = [
            f"{v / total:.0%} {k}" for k, v in sorted(numbers.items(), key=lambda pair: -pair[1])
        ]
        if shares:
            parts.append(f"{total} {title}: {', '.join(shares)}")
    return f"{'; '.join(parts) or 'no layers counted'} (by the {receipt.get('source', '?')})"


def pairs(values: Mapping[str, Any]) -> str:
    """Join a mapping as "name value, name value". Floats have four significant digits, lists end
    after four members and texts after 80 characters; None is shown as "default"."""

    def text(value: Any) -> str:
        if isinstance(value, list):
            return listed(value, 4)
        if value is None:
            return "default"
        return f"{value:.4g}" if isinstance(value, float) else str(value)[:80]

    return ", ".join(f"{name} {text(value)}" for name, value in values.items())


def listed(members: Sequence[Any], most: int) -> str:
    """Join the first ``most`` members with commas; if there are more, add the number of all."""
    more = f", ... ({len(members)} in all)" if len(members) > most else ""
    return ", ".join(str(member)[:80] for member in members[:most]) + more


def size(count: int) -> str:
    """Return a number of bytes with its unit: B, kB or MB."""
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def rows(*rows: tuple[str, str]) -> Iterator[str]:
    """Yield lines of two columns from pairs of a name and a text, which is wrapped to WIDTH."""
    for name, text in rows:
        head = f"  {name:{COLUMN - 2}}"
        if not head.endswith(" "):  # the name is too long: its text begins on the next line
            yield head
            head = " " * COLUMN
        for line in wrapped(text, WIDTH - COLUMN):
            yield head + line
            head = " " * COLUMN


def wrapped(text: str, width: int) -> list[str]:
    """Split ``text`` into lines of at most ``width`` characters; a longer word is not broken."""
    lines = textwrap.wrap(
        text, width, break_long_words=False, break_on_hyphens=False, replace_whitespace=True
    )
    return lines or [""]


def as_json(problem: SdkError | None) -> dict[str, str]:
    """Return the JSON fields of an error; an empty dict for None."""
    if problem is None:
        return {}
    return {"error": problem.message, "fix": problem.fix}


def finish(as_json: bool, document: Mapping[str, Any], lines: Iterable[str]) -> None:
    """Print the result of a command: ``document`` if ``as_json``, else ``lines``."""
    if as_json:
        print_json(document)
    else:
        say(lines)


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document."""
    print(json.dumps(document, indent=1, default=_plain))


def _plain(value: Any) -> Any:
    """Convert a NumPy number to a Python number, for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} in a JSON document")


def say(lines: Iterable[str]) -> None:
    """Print lines. A control character is printed as "?"."""
    for line in (line for text in lines for line in text.splitlines() or [""]):
        print("".join(c if c.isprintable() else "?" for c in line), flush=True)
