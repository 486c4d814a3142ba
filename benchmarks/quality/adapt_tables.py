"""The tables of python -m benchmarks adapt, and the compact form of its results."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.quality.runs import spread
from benchmarks.table import as_markdown


def packed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with its cases as a list of "tables", which fits a small file: the names of a
    table's values are listed once, as "columns". None stands for a value that a row lacks."""
    found = {key: document[key] for key in ("environment", "forms")} | {"tables": []}
    for name, case in document["cases"].items():
        known = dict.fromkeys(key for row in case["rows"] for key in row)
        columns = [key for key in known if key != "method"]
        rows = [
            {"method": row["method"], "values": [row.get(key) for key in columns]}
            for row in case["rows"]
        ]
        found["tables"].append({"case": name} | case | {"columns": columns, "rows": rows})
    return found


def unpacked(document: dict[str, Any]) -> dict[str, Any]:
    """The reverse of :func:`packed`."""
    cases = {}
    for case in document["tables"]:
        rows = [
            {"method": row["method"]}
            | {
                key: value
                for key, value in zip(case["columns"], row["values"], strict=True)
                if value is not None
            }
            for row in case["rows"]
        ]
        cases[case["case"]] = {key: case[key] for key in ("main", "own", "base")} | {"rows": rows}
    return {key: document[key] for key in ("environment", "forms")} | {"cases": cases}


def tables(document: dict[str, Any]) -> str:
    """The tables of a document in Markdown: for each case the scores and the sequences, then the
    gains that decide. A cell is the mean over the seeds, and in brackets the lowest and highest."""
    parts = []
    for name, case in document["cases"].items():
        if case["rows"]:
            parts += [f"**{name}: scores**", as_markdown(_scores(case))]
            parts += [f"**{name}: sequences**", as_markdown(_sequences(case))]
    if lines := gains(document["cases"]):
        parts += ["**Gains against cold**", as_markdown(lines)]
    return "\n\n".join(parts)


def gains(cases: dict[str, Any]) -> list[dict[str, Any]]:
    """For each form and number of steps the gains of all sequences: the mean of the main score over
    the seeds, less that of cold refinement. "own": in sequences that were trained on; "others": in
    the other ones. Only the cases count in which as many forms were measured as in any other."""
    found: dict[str, dict[str, list[tuple[float, str]]]] = {}
    counts = {name: len({row.get("form") for row in case["rows"]}) for name, case in cases.items()}
    for name, case in cases.items():
        groups = _groups(case) if counts[name] == max(counts.values()) else {}
        for method, rows in groups.items():
            if "form" not in rows[0]:
                continue
            for key in _names(rows[0]):
                part = "own" if key.removeprefix("in ") in case["own"] else "others"
                gain = np.mean([row[key] for row in rows]) - groups["cold"][0][key]
                place = f"{name}, {key.removeprefix('in ')}"
                found.setdefault(method, {}).setdefault(part, []).append((float(gain), place))
    lines = []
    for method, parts in found.items():
        line: dict[str, Any] = {"method": method}
        for part in ("own", "others"):
            values = parts.get(part, [])
            worst = min(values, default=None)
            line[f"{part}: mean"] = f"{np.mean([v for v, _ in values]):+.4f}" if values else ""
            line[f"{part}: worst"] = f"{worst[0]:+.4f} ({worst[1]})" if worst else ""
        lines.append(line)
    return lines


def _scores(case: dict[str, Any]) -> list[dict[str, Any]]:
    lines = []
    for method, rows in _groups(case).items():
        worst = min(rows, key=lambda row: row["worst gain"])
        line = {"method": method, case["main"]: _cell(rows, "main")}
        line |= {key: _cell(rows, key) for key in ("mIoU", "F") if key in rows[0]}
        for other in ("prior", "cold"):
            line[f"> {other}"] = _cell(rows, f"wins {other}", 0)
        line["worst picture, against cold"] = f"{worst['worst']} {worst['worst gain']:+.3f}"
        line["ms"] = _cell(rows, "ms", 0)
        line["of the prior"] = _cell(rows, "prior ms", 0)
        lines.append(line)
    return lines


def _sequences(case: dict[str, Any]) -> list[dict[str, Any]]:
    lines = []
    for method, rows in _groups(case).items():
        line = {"method": method}
        for key in _names(rows[0]):
            name = key.removeprefix("in ")
            line[name if name in case["own"] else f"{name} (not trained on)"] = _cell(rows, key)
        lines.append(line)
    return lines


def _groups(case: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each method, which are those of its seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in case["rows"]:
        groups.setdefault(row["method"], []).append(row)
    return groups


def _names(row: dict[str, Any]) -> list[str]:
    return [key for key in row if key.startswith("in ")]


def _cell(rows: list[dict[str, Any]], key: str, digits: int = 3) -> str:
    """The values of a key; "" where it is missing."""
    return spread([row[key] for row in rows if row.get(key) is not None], digits)
