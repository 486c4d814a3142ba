"""Read latency documents: check them, and compute the statistics of their total times again."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.latency.document import (
    KEY,
    MODES,
    MOST_ROWS,
    OUTLIER,
    PARTS,
    RAW,
    SCHEMA,
    Row,
    summarise,
    summarise_totals,
)
from runtime.checks import is_number
from runtime.errors import InputError

OLDER = ("dg-latency/1",)  # files of this schema contain all samples
SUMMED_UP = ("stage_p50_ms", "stage_percentiles_ms", "summary")
LONGEST = 1e9  # milliseconds
_TEXTS = ("mode", "refine", "device", "backend", "precision")
_LISTS = ("total_ms", "start_s", "steps_done")


def load(path: Path) -> dict[str, Any]:
    """Read a document from a file. The statistics of the total times are not those of the file:
    they are computed again.

    Raises
    ------
    InputError : the file cannot be read, or `benchmarks latency` has not written it.
    """
    try:
        document = json.loads(path.read_bytes())
        json.dumps(document, ensure_ascii=False).encode()  # refuses lone surrogates
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}",
            fix="python -m benchmarks latency -o DIR writes DIR/latency.json",
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is no JSON: {str(error)[:80]}", fix="measure again, or leave the file out"
        ) from None
    wrong = _wrong(document)
    if wrong:
        raise InputError(
            f"{path} is not what 'benchmarks latency' writes: {wrong}",
            fix="measure again, or leave the file out",
        )
    rows = [_summarised(r, document["percentiles"]) for r in document["rows"]]
    return document | {"rows": rows}


def _summarised(r: dict[str, Any], percentiles: list[float]) -> dict[str, Any]:
    """A checked row of a file, as summarise returns rows; RAW is missing if the file lacks it."""
    row = Row(**{f.name: r[f.name] for f in fields(Row) if f.name in r})
    if "stages_ms" in r:
        return summarise(row, percentiles)
    o = r["summary"]["outliers"]
    known = dict(zip(o["index"], zip(o["start_s"], o["cpu_mhz"], strict=True), strict=True))
    kept = {f.name: getattr(row, f.name) for f in fields(Row) if f.name not in RAW}
    kept |= {k: r[k] for k in ("stage_p50_ms", "stage_percentiles_ms")}
    return kept | summarise_totals(row, percentiles, known)


def _wrong(d: Any) -> str:
    """A phrase that says what is wrong with a document; "" if nothing is."""
    if not isinstance(d, dict) or d.get("schema") not in (SCHEMA, *OLDER):
        return f"its schema is not {SCHEMA}"
    kinds = {"scope": str, "device_time": str, "prior": str, "partial": bool, "command": list}
    kinds |= {"environment": dict, "hashes": dict, "picture": list, "rows": list}
    kinds |= dict.fromkeys((*PARTS, "percentiles"), list)
    for name, kind in kinds.items():
        if not isinstance(d.get(name), kind):
            return f"{name} is missing or no {kind.__name__}"
    wanted = d["percentiles"]
    if len(wanted) > MOST_ROWS or not all(_is_number(p) and 1 <= p <= 99.99 for p in wanted):
        return f"percentiles are not at most {MOST_ROWS} numbers from 1 to 99.99"
    if len(d["rows"]) > MOST_ROWS:
        return f"it has {len(d['rows'])} rows; wanted at most {MOST_ROWS}"
    if not all(isinstance(part, dict) for name in PARTS for part in d[name]):
        return f"{', '.join(PARTS)} do not hold tables alone"
    o = d.get("overhead")
    if o is not None and not (
        isinstance(o, dict)
        and all(_is_number(o.get(k)) for k in ("ms_a_stage", "share"))
        and isinstance(o.get("of"), str)
    ):
        return "overhead does not hold ms_a_stage, share and of"
    for i, row in enumerate(d["rows"]):
        if wrong := _wrong_row(row, d["schema"]):
            return f"row {i}: {wrong}"
    if len({tuple(row[k] for k in KEY) for row in d["rows"]}) < len(d["rows"]):
        return "two of its rows have the same configuration"
    return ""


def _wrong_row(r: Any, schema: str) -> str:
    """What is wrong with a row; "" if nothing is."""
    if not isinstance(r, dict):
        return "it is no dictionary"
    names, with_samples = {f.name for f in fields(Row)}, schema in OLDER or any(k in r for k in RAW)
    wanted = names - {"device_ms"} if with_samples else (names | {*SUMMED_UP}) - {*RAW}
    if not wanted <= {*r}:
        return "fields are missing"
    if not all(isinstance(r[k], str) for k in _TEXTS):
        return f"{', '.join(_TEXTS)} are not all texts"
    if r["mode"] not in MODES or (r["rate"] is None) == (r["mode"] == "paced"):
        return f"its mode is none of {', '.join(MODES)}, or its rate is not that of a paced one"
    if r["mode"] != "paced" and (r["late"] or r["unserved"]):
        return "late and unserved are not 0, although it is not paced"
    counts = [r[k] for k in ("steps", "threads", "late", "unserved", "cold")]
    if not all(isinstance(n, int) and 0 <= n < 2**53 for n in counts):
        return "its counts are not whole numbers"
    wrong = _wrong_samples(r) if with_samples else _wrong_sums(r)
    if wrong:
        return wrong
    if not all(0 < t < LONGEST for t in r["total_ms"]):
        return f"its times are not within 0 to {LONGEST:g} ms"
    single = [r["load_ms"], r["first_ms"], 1 if r["rate"] is None else r["rate"]]
    if not all(map(_is_number, single)):
        return "load, first or rate is no number"
    q = r["quality"]
    if not isinstance(q, dict) or not isinstance(q.get("what"), str):
        return "its quality does not say what it is"
    return "" if "value" not in q or _is_number(q["value"]) else "its quality is no number"


def _wrong_samples(r: dict[str, Any]) -> str:
    """What is wrong with the samples of a row that contains all of them; "" if nothing is."""
    device = r.get("device_ms", {})  # older documents do not have it
    n, stages = len(r["total_ms"]) if isinstance(r["total_ms"], list) else -1, r["stages_ms"]
    columns = [r[k] for k in _LISTS] + (list(stages.values()) if isinstance(stages, dict) else [0])
    columns.append([0 if c is None else c for c in r["cpu_mhz"]] if _is_list(r["cpu_mhz"]) else 0)
    columns += list(device.values()) if isinstance(device, dict) else [0]
    if not all(_is_list(c) and len(c) == n and all(map(_is_number, c)) for c in columns):
        return "its samples are no lists of numbers of one length"
    return ""


def _wrong_sums(r: dict[str, Any]) -> str:
    """What is wrong with the times and statistics of a row that contains no other samples than the
    total times; "" if nothing is."""
    if not _is_list(r["total_ms"]) or not all(map(_is_number, r["total_ms"])):
        return "its total times are no list of numbers"
    spread = r["stage_percentiles_ms"]
    found = [r["stage_p50_ms"], *(spread.values() if isinstance(spread, dict) else [0])]
    if not all(map(_is_table, found)):
        return "its stages are no tables of numbers"
    outliers = r["summary"].get("outliers") if isinstance(r["summary"], dict) else None
    return "" if _are_outliers(outliers) else "its outliers are no columns of one length"


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _are_outliers(o: Any) -> bool:
    if not isinstance(o, dict) or not all(_is_list(o.get(k)) for k in OUTLIER):
        return False
    values = [0 if v is None else v for k in OUTLIER for v in o[k]]
    return all(map(_is_number, values)) and len({len(o[k]) for k in OUTLIER}) == 1


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_number(value: Any) -> bool:
    return is_number(value, -1e15, 1e15)
