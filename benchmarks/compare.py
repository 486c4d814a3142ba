"""Is B slower than A? Compares two latency documents row by row, from their raw samples.

    python -m benchmarks compare A.json B.json [--fail-over 5%] [--percentile 50,99] [--force]

A percentile is slower when the 95 % interval of B / A (bootstrap, in blocks where neighbouring
samples correlate) lies above 1. Exit code 6 when one is, by more than --fail-over. Unstable or
partial runs are refused, unless forced.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report, samples
from benchmarks.latency import SCHEMA, numbers
from runtime.errors import InputError

THRESHOLD_EXCEEDED = 6
KEY = ("mode", "rate", "steps", "threads", "device", "backend", "precision")


def ratio(a: np.ndarray, b: np.ndarray, q: float) -> tuple[float, float, float]:
    """Percentile q of b over that of a, with the ends of its 95 % interval."""
    spread = samples.resampled(b, q, seed=1) / samples.resampled(a, q, seed=0)
    low, high = np.percentile(spread, [2.5, 97.5])
    return samples.percentile(b, q) / samples.percentile(a, q), float(low), float(high)


def verdict(found: tuple[float, float, float], most: float) -> str:
    """In words: "slower" and "faster" are outside chance, "REGRESSION" is too slow as well."""
    estimate, low, high = found
    if low > 1:
        return "REGRESSION" if estimate > 1 + most else "slower"
    return "faster" if high < 1 else "no difference"


def load(path: Path) -> dict[str, Any]:
    """A latency document; InputError for anything else."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    wrong = not isinstance(document, dict) or document.get("schema") != SCHEMA
    rows = [] if wrong else document.get("rows")
    if wrong or not isinstance(rows, list) or not all(_is_row(r) for r in rows):
        raise InputError(f"{path} is not what 'benchmarks latency' writes ({SCHEMA})")
    return dict(document)


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not {*KEY, "name", "total_ms", "summary"} <= set(row):
        return False
    times = row["total_ms"]
    return isinstance(times, list) and all(isinstance(t, (int, float)) and t > 0 for t in times)


def share(text: str) -> float:
    """ "5%" or "0.05" as 0.05."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 100:
        raise InputError(f"fail-over is {text!r}; wanted a share, as 5%")
    return value


def compare(
    a: dict[str, Any], b: dict[str, Any], percentiles: list[float], most: float
) -> tuple[list[dict[str, Any]], bool]:
    """A line for each row that both have and each percentile with enough samples; and whether
    there is a regression."""
    theirs = {tuple(r[k] for k in KEY): r for r in a["rows"]}
    lines, failed = [], False
    for row in b["rows"]:
        before = theirs.get(tuple(row[k] for k in KEY))
        if before is None:
            continue
        old, new = (np.array(r["total_ms"], np.float64) for r in (before, row))
        for p in percentiles:
            line = {"row": row["name"], "percentile": f"p{p:g}"}
            need = samples.needed(p / 100)
            if min(len(old), len(new)) < need:
                few = f"n/a (n={min(len(old), len(new))}, need {need})"
                lines.append(line | {"verdict": few})
                continue
            found = ratio(old, new, p / 100)
            said = verdict(found, most)
            failed |= said == "REGRESSION"
            line |= {"A ms": f"{samples.percentile(old, p / 100):.2f}"}
            line |= {"B ms": f"{samples.percentile(new, p / 100):.2f}"}
            line |= {"B / A": f"{found[0]:.3f} [{found[1]:.3f}, {found[2]:.3f}]"}
            lines.append(line | {"verdict": said})
    return lines, failed


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=Path, help="before: latency.json")
    parser.add_argument("b", type=Path, help="after: latency.json")
    parser.add_argument("--fail-over", default="5%", help="largest allowed slowdown (%(default)s)")
    parser.add_argument("--percentile", default="50,99", help="(%(default)s)")
    parser.add_argument(
        "--force", action="store_true", help="compare unstable or partial runs, too"
    )
    args = parser.parse_args(argv)
    most = share(args.fail_over)
    percentiles = numbers(args.percentile, "percentile", 1, 99.99)
    a, b = load(args.a), load(args.b)
    doubts = [
        f"{path}: {row['name']}: {'; '.join([*row['summary'].get('unstable', []), *_part(row)])}"
        for path, document in ((args.a, a), (args.b, b))
        for row in document["rows"]
        if row["summary"].get("unstable") or row.get("partial")
    ]
    if doubts and not args.force:
        raise InputError(
            "these runs cannot be trusted:\n  " + "\n  ".join(doubts),
            fix="measure longer on a quiet machine with locked clocks, or --force",
        )
    for doubt in doubts:
        print(f"warning: {doubt}", file=sys.stderr)
    for what in ("cpu", "threads", "target"):
        ends = [document["environment"].get(what) for document in (a, b)]
        if ends[0] != ends[1]:
            print(f"warning: {what} was {ends[0]}, is {ends[1]}", file=sys.stderr)
    if a.get("picture") != b.get("picture"):
        raise InputError(f"A's pictures are {a.get('picture')}, B's {b.get('picture')}")
    lines, failed = compare(a, b, percentiles, most)
    if not lines:
        raise InputError("A and B have no row in common", fix="measure both with the same options")
    print(report.table(lines))
    return THRESHOLD_EXCEEDED if failed else 0


def _part(row: dict[str, Any]) -> list[str]:
    return ["partial"] if row.get("partial") else []
