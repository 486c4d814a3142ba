"""Is B slower than A? Compare two latency documents row by row, by the times of all samples.

    python -m benchmarks compare A.json B.json [--fail-over 5%] [--percentile 50,99] [--force]

A percentile is slower if the 95 % interval of B / A lies above 1. (The interval is from a
bootstrap, in blocks where neighbouring samples correlate.) The exit code is 6 if a percentile is
slower by more than --fail-over. It is 1 if something could not be compared: a row is in one
document only, or the samples are too few for a percentile that --percentile names (without this
option: for p50). Documents of different machines, and unstable and partial rows, are refused.
--force compares what can be compared.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from benchmarks import table
from benchmarks.latency import samples
from benchmarks.latency.document import DASH, KEY, too_few
from benchmarks.latency.options import percentiles
from benchmarks.latency.reading import load
from runtime.errors import ExitCode, InputError
from runtime.tools.cli import Parser, option, some_path

AUTO = [50.0, 90.0, 95.0, 99.0]
# Keys of the environment. A difference in MACHINE is refused, one in SOFTWARE causes a warning.
MACHINE = ("cpu", "target", "threads", "jetson", "cpu_mhz_limits", "GPUs")
SOFTWARE = ("python", "numpy", "opencv", "versions", "governors", "drivers")


def ratio(a: np.ndarray, b: np.ndarray, q: float) -> tuple[float, float, float]:
    """Percentile q of b divided by that of a, and the two ends of its 95 % interval.

    Parameters
    ----------
    a, b : 1-D float64 samples in the order in which they were taken, in the same unit.
    q : a share in (0, 1): 0.99 is p99.
    """
    spread = samples.resampled(b, q, seed=1) / samples.resampled(a, q, seed=0)
    low, high = np.percentile(spread, [2.5, 97.5])
    return samples.percentile(b, q) / samples.percentile(a, q), float(low), float(high)


def verdict(found: tuple[float, float, float], most: float) -> str:
    """A ratio and its interval in a word: "no difference" if the interval contains 1, else "faster"
    or "slower"; "REGRESSION" if it is slower by more than the share ``most``."""
    estimate, low, high = found
    if low > 1:
        return "REGRESSION" if estimate > 1 + most else "slower"
    return "faster" if high < 1 else "no difference"


def share(text: str) -> float:
    """Read a share: 0.05 from "5%" or "0.05".

    Raises
    ------
    InputError : the text is no share in [0, 1).
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise InputError(f"fail-over is {text!r}; wanted a share below 100%, as 5% or 0.05")
    return value


def compare(
    a: dict[str, Any], b: dict[str, Any], percentiles: list[float] | None, most: float
) -> tuple[list[dict[str, Any]], bool]:
    """Compare the rows that both documents have.

    Parameters
    ----------
    a, b : documents as :func:`benchmarks.latency.reading.load` returns them.
    percentiles : in per cent; None stands for 50, 90, 95 and 99.
    most : a percentile that is slower by more than this share is a regression.

    Returns
    -------
    A table with a line for each row and percentile, and whether there is a regression. Where the
    samples are too few for a percentile, its line has dashes; :func:`dashes` explains them.
    """
    lines, failed = [], False
    for before, row in pairs(a, b):
        old, new = (np.array(r["total_ms"], np.float64) for r in (before, row))
        worth = min(map(samples.independent, (old, new)))  # number of independent samples
        for p in percentiles or AUTO:
            line = {"row": row["name"], "percentile": f"p{p:g}"}
            if worth < samples.needed(p / 100):
                lines.append(line | dict.fromkeys(("A ms", "B ms", "B / A", "verdict"), DASH))
                continue
            found = ratio(old, new, p / 100)
            said = verdict(found, most)
            failed |= said == "REGRESSION"
            line |= {"A ms": f"{samples.percentile(old, p / 100):.2f}"}
            line |= {"B ms": f"{samples.percentile(new, p / 100):.2f}"}
            line |= {"B / A": f"{found[0]:.3f} [{found[1]:.3f}, {found[2]:.3f}]"}
            lines.append(line | {"verdict": said})
    return lines, failed


def dashes(lines: list[dict[str, Any]]) -> str:
    """The line that explains the dashes in the table of :func:`compare`; "" if it has no dashes."""
    names = dict.fromkeys(line["percentile"] for line in lines if line["verdict"] == DASH)
    return too_few({name: samples.needed(float(name[1:]) / 100) for name in names})


def pairs(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows that have the same configuration in both documents, as pairs (a's row, b's row).
    Rows without samples are left out."""
    rows = {key(r): r for r in a["rows"] if r["total_ms"]}
    return [(rows[key(r)], r) for r in b["rows"] if r["total_ms"] and key(r) in rows]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """The configuration of a row. Rows with the same configuration are compared."""
    return tuple(row[k] for k in KEY)


def environment(document: dict[str, Any]) -> dict[str, Any]:
    """The environment of a document, with the names and the drivers of its GPUs."""
    found = document["environment"]
    before = found.get("before")
    gpus = before.get("gpus") if isinstance(before, dict) else None
    listed = [g for g in gpus if isinstance(g, dict)] if isinstance(gpus, list) else []
    return found | {"GPUs": [g.get("name") for g in listed],
                    "drivers": [g.get("driver") for g in listed]}  # fmt: skip


def differences(a: dict[str, Any], b: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    """A line for each of the ``names`` whose value differs between the documents' environments."""
    ends = [(name, *(environment(d).get(name) for d in (a, b))) for name in names]
    return [f"{name}: {was} in A, {now} in B" for name, was, now in ends if was != now]


def main(argv: list[str]) -> int:
    """Run `python -m benchmarks compare`; returns the exit code.

    Raises
    ------
    InputError : a document cannot be read, or the documents cannot be compared.
    """
    parser = Parser(
        "python -m benchmarks compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=some_path, help="before: latency.json")
    parser.add_argument("b", type=some_path, help="after: latency.json")
    parser.add_argument(
        "--fail-over", type=option(share), default="5%", help="largest allowed slowdown (5%%)"
    )
    parser.add_argument(
        "--percentile",
        type=option(percentiles),
        help="that must be compared (p50, and those of p90, p95, p99 that the samples allow)",
    )
    parser.add_argument("--force", action="store_true", help="compare what can be compared")
    args = parser.parse_args(argv)
    a, b = load(args.a), load(args.b)
    if a["picture"] != b["picture"]:
        raise InputError(
            f"A's pictures (height, width, number) are {a['picture']}, B's are {b['picture']}",
            fix="measure both with the same pictures and --imgsz",
        )
    both = pairs(a, b)
    if not both:
        raise InputError("A and B have no row in common", fix="measure both with the same options")
    doubts = differences(a, b, MACHINE)
    for path, rows in zip((args.a, args.b), zip(*both, strict=True), strict=True):
        for row in rows:
            why = [*row["summary"]["unstable"], *(["partial"] if row["partial"] else [])]
            doubts += [f"{path}: {row['name']}: {'; '.join(why)}"] if why else []
    if doubts and not args.force:
        raise InputError(
            "these documents cannot be compared:\n  " + "\n  ".join(doubts),
            fix="measure both longer, on one quiet machine with locked clocks; or add --force",
        )
    warnings = doubts + differences(a, b, SOFTWARE)
    if a["prior"] != b["prior"]:
        warnings.append(f"the model: {a['prior']} in A, {b['prior']} in B")
    for file in sorted({*a["hashes"], *b["hashes"]}):
        was, now = (d["hashes"].get(file) for d in (a, b))
        if None in (was, now):
            warnings.append(f"only one document has the sha256 of {file}")
        elif was != now:
            warnings.append(f"the sha256 of {file} differs")
    found = {key(r) for _, r in both}
    lone = [
        f"{r['name']} is in one document only"
        for d in (a, b)
        for r in d["rows"]
        if key(r) not in found
    ]
    for warning in warnings + lone:
        print(f"warning: {warning}", file=sys.stderr)
    lines, failed = compare(a, b, args.percentile, args.fail_over)
    print(table.as_markdown(lines))
    if said := dashes(lines):
        print(f"\n{said}")
    if failed:
        return ExitCode.THRESHOLD
    must = lines if args.percentile else [line for line in lines if line["percentile"] == "p50"]
    missing = lone or any(line["verdict"] == DASH for line in must)
    if missing and not args.force:
        print(
            "error: not everything could be compared, see the warnings and the table's dashes\n"
            "  fix: measure both longer, with the same options; or add --force",
            file=sys.stderr,
        )
        return ExitCode.FAILURE
    return ExitCode.DONE
