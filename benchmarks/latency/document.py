"""What `benchmarks latency` measured, as a document: its rows, tables, CSV and trace, and the
checks of one that comes from a file."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from runtime.errors import InputError

SCHEMA = "dg-latency/1"
MODES = ("back-to-back", "paced", "stream")
MOST_ROWS = 100
KEY = ("mode", "rate", "refine", "steps", "threads", "device", "backend", "precision")
PARTS = ("memory", "power", "peers")  # tables beside the rows
LONGEST = 1e9  # milliseconds
STAGES = "Stages, median ms (medians need not add up)"
_TEXTS = ("mode", "refine", "device", "backend", "precision")
_LISTS = ("total_ms", "start_s", "steps_done")


@dataclass
class Row:
    """One configuration's measurements; lists have an entry per sample, times in milliseconds."""

    mode: str
    steps: int  # asked for
    threads: int
    refine: str = "none"  # the objective, its working scale and unusual settings
    backend: str = ""
    precision: str = "fp32"
    device: str = "cpu"
    rate: float | None = None
    load_ms: float = 0.0
    first_ms: float = 0.0
    quality: dict[str, Any] = field(default_factory=lambda: {"what": "not measured"})
    total_ms: list[float] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)  # from the row's first sample
    stages_ms: dict[str, list[float]] = field(default_factory=dict)
    steps_done: list[int] = field(default_factory=list)
    cpu_mhz: list[float | None] = field(default_factory=list)
    device_ms: dict[str, list[float]] = field(default_factory=dict)  # stages, by the GPU's clock
    cold: int = 0  # of a stream: frames that started cold
    late: int = 0  # paced: done after the next picture was due
    unserved: int = 0  # paced: due, but not begun when time was up
    partial: bool = False

    def name(self) -> str:
        """What tells rows apart."""
        rate = f" {self.rate:g}/s" if self.rate else ""
        return (
            f"{self.mode}{rate}, {counted(self.steps, 'step')}, {counted(self.threads, 'thread')}"
        )

    def add(self, due: float, begin: float, end: float, result: Any, clock: float | None) -> None:
        """A sample: when it was due, begun and done, in seconds."""
        stages = {k: v for k, v in result.timings.items() if k not in ("unaccounted", "total")}
        if self.mode == "paced":
            stages = {"queue": 1e3 * (begin - due)} | stages
        total = 1e3 * (end - due)
        stages["unaccounted"] = total - sum(stages.values())
        for name in dict.fromkeys((*stages, *self.stages_ms)):
            column = self.stages_ms.setdefault(name, [0.0] * len(self.total_ms))
            column.append(stages.get(name, 0.0))
        self.total_ms.append(total)
        self.start_s.append(due)
        self.steps_done.append(int(result.stats["steps"]))
        self.cpu_mhz.append(clock)
        for name, ms in result.stats.get("device_ms", {}).items():
            self.device_ms.setdefault(name, []).append(ms)
        frame = getattr(result, "frame", None)
        self.cold += frame is not None and frame.start == "cold"

    def cut(self) -> None:
        """Leave the samples that are whole: an interrupt may have come within the last one."""
        columns = [self.total_ms, self.start_s, self.steps_done, self.cpu_mhz]
        columns += [*self.stages_ms.values(), *self.device_ms.values()]
        n = min(map(len, columns))
        for column in columns:
            del column[n:]


def shown(text: str) -> str:
    """Without what is no text: file names may hold any bytes."""
    return text.encode(errors="replace").decode()


def counted(n: int, what: str) -> str:
    """ "1 step", "2 steps"."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def summarise(row: Row, percentiles: list[float]) -> dict[str, Any]:
    """The row as it is reported: everything measured, and what it says."""
    from benchmarks import samples

    row.cut()
    found = samples.summary(np.array(row.total_ms, np.float64), percentiles)
    if row.unserved:
        found["unstable"].append(
            f"{row.unserved} pictures were never begun: {row.rate:g}/s is more than it can do"
        )
    if row.cold and row.steps:
        found["unstable"].append(f"{row.cold} of its frames started cold, with more steps")
    stages = {k: float(np.median(v)) for k, v in row.stages_ms.items() if v}
    ran = np.array(row.steps_done)
    if "refine" in row.stages_ms and ran.size and ran.min() > 0:
        stages["refine per step"] = float(np.median(row.stages_ms["refine"] / ran))
    stages |= {f"{k}, device time": float(np.median(v)) for k, v in row.device_ms.items() if v}
    listed = [
        {"index": i, "start_s": row.start_s[i], "ms": row.total_ms[i], "cpu_mhz": row.cpu_mhz[i]}
        for i in found.get("outliers", [])
    ]
    more = {"name": row.name(), "stage_p50_ms": stages, "summary": found | {"outliers": listed}}
    return vars(row) | more


def load(path: Path) -> dict[str, Any]:
    """A document from a file. What it says of its samples is worked out again from them.

    Raises
    ------
    InputError : no such file, or not what `benchmarks latency` writes.
    """
    try:
        document = json.loads(path.read_bytes())
        json.dumps(document, ensure_ascii=False).encode()  # halves of characters are no text
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON: {str(error)[:80]}") from None
    wrong = _wrong(document)
    if wrong:
        raise InputError(f"{path} is not what 'benchmarks latency' writes: {wrong}")
    names = [f.name for f in fields(Row)]
    rows = [Row(**{k: r[k] for k in names if k in r}) for r in document["rows"]]
    return document | {"rows": [summarise(row, document["percentiles"]) for row in rows]}


def _wrong(d: Any) -> str:
    """What is wrong with a document; empty for a good one."""
    if not isinstance(d, dict) or d.get("schema") != SCHEMA:
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
        return f"{', '.join(PARTS)} hold something else than tables"
    o = d.get("overhead")
    if o is not None and not (
        isinstance(o, dict)
        and all(_is_number(o.get(k)) for k in ("ms_a_stage", "share"))
        and isinstance(o.get("of"), str)
    ):
        return "overhead is none"
    for i, row in enumerate(d["rows"]):
        if wrong := _wrong_row(row):
            return f"row {i}: {wrong}"
    if len({tuple(row[k] for k in KEY) for row in d["rows"]}) < len(d["rows"]):
        return "two of its rows are of the same configuration"
    return ""


def _wrong_row(r: Any) -> str:
    if not isinstance(r, dict) or not {f.name for f in fields(Row)} <= {*r, "device_ms"}:
        return "fields are missing"
    device = r.get("device_ms", {})  # older files have none
    if not all(isinstance(r[k], str) for k in _TEXTS):
        return f"{', '.join(_TEXTS)} are not all texts"
    if r["mode"] not in MODES or (r["rate"] is None) == (r["mode"] == "paced"):
        return f"its mode is none of {', '.join(MODES)}, or its rate is not that of a paced one"
    if r["mode"] != "paced" and (r["late"] or r["unserved"]):
        return "late and unserved are of paced rows"
    counts = [r[k] for k in ("steps", "threads", "late", "unserved", "cold")]
    if not all(isinstance(n, int) and 0 <= n < 2**53 for n in counts):
        return "its counts are not whole numbers"
    n, stages = len(r["total_ms"]) if isinstance(r["total_ms"], list) else -1, r["stages_ms"]
    columns = [r[k] for k in _LISTS] + (list(stages.values()) if isinstance(stages, dict) else [0])
    columns.append([0 if c is None else c for c in r["cpu_mhz"]] if _is_list(r["cpu_mhz"]) else 0)
    columns += list(device.values()) if isinstance(device, dict) else [0]
    if not all(_is_list(c) and len(c) == n and all(map(_is_number, c)) for c in columns):
        return "its samples are no lists of numbers of one length"
    if not all(0 < t < LONGEST for t in r["total_ms"]):
        return f"its times are not within 0 to {LONGEST:g} ms"
    single = [r["load_ms"], r["first_ms"], 1 if r["rate"] is None else r["rate"]]
    if not all(map(_is_number, single)):
        return "load, first or rate is no number"
    q = r["quality"]
    if not isinstance(q, dict) or not isinstance(q.get("what"), str):
        return "its quality is none"
    return "" if "value" not in q or _is_number(q["value"]) else "its quality is no number"


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e15 and not math.isnan(value)


def tables(document: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """All tables, by title."""
    rows = document["rows"]
    out = {"Latency, end-to-end wall time": [_latency_line(r) for r in rows], STAGES: []}
    names = dict.fromkeys(k for r in rows for k in r["stage_p50_ms"])
    last = ["unaccounted", "refine per step", *(k for k in names if k.endswith("device time"))]
    order = [k for k in names if k not in last]
    for r in rows:
        line = {"row": r["name"], "ran": f"{r['backend']} on {r['device']}, {r['precision']}"}
        for k in (*order, *(k for k in last if k in names)):
            line[k] = f"{r['stage_p50_ms'][k]:.2f}" if k in r["stage_p50_ms"] else ""
        out[STAGES].append(line)
    for part in PARTS:
        lines = [{k: _shown(v) for k, v in p.items() if k != "samples"} for p in document[part]]
        out[part.capitalize()] = lines
    return {title: lines for title, lines in out.items() if lines}


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _latency_line(row: dict[str, Any]) -> dict[str, str]:
    s, n = row["summary"], row["summary"]["n"]
    line = {"row": row["name"], "n": str(n)}
    for p, v in s["percentiles"].items():
        if v["value"] is None:
            line[f"{p} ms"] = f"n/a (n={v['n']}, need {v['need']})"
        else:
            line[f"{p} ms"] = f"{v['value']:.1f} [{v['low']:.1f}, {v['high']:.1f}]"
    line |= {"max ms": f"{s['max']:.1f}" if n else "", "first ms": f"{row['first_ms']:.0f}"}
    line |= {"load ms": f"{row['load_ms']:.0f}"}
    if row["mode"] == "paced":
        line |= {"late": str(row["late"]), "not begun": str(row["unserved"])}
    q = row["quality"]
    line["quality"] = f"{q['value']:.4f}" if "value" in q else q["what"]
    line["verdict"] = "unstable" if s["unstable"] else "stable"
    line["verdict"] += ", partial" if row["partial"] else ""
    return line


def notes(document: dict[str, Any]) -> list[str]:
    """What has to be said beside the tables."""
    e = document["environment"]
    out = [f"clock: {document['scope']}", document["device_time"]]
    made = [str(e.get(k)) for k in ("cpu", "target", "date", "commit") if e.get(k)]
    out += ["made on: " + ", ".join(made), "command: " + " ".join(map(str, document["command"]))]
    rated = dict.fromkeys(r["quality"]["what"] for r in document["rows"] if "value" in r["quality"])
    out += [f"quality: {what}" for what in rated]
    for row in document["rows"]:
        s, where = row["summary"], row["name"]
        if s["unstable"]:
            out.append(f"{where}: unstable: {'; '.join(s['unstable'])}")
        if not s["n"]:
            continue
        if s["independent"] < s["n"]:
            out.append(
                f"{where}: neighbouring samples correlate ({s['lag1']:.2f}), {s['n']} count as "
                f"{s['independent']}; intervals by block bootstrap, widened to that"
            )
        if s["period"]:
            out.append(f"{where}: repeats itself every {s['period']} samples")
        if listed := s["outliers"]:
            clocks = len({o["cpu_mhz"] for o in listed}) > 1
            shown = ", ".join(
                f"#{o['index']} at {o['start_s']:.1f} s {o['ms']:.1f} ms"
                + (f" ({o['cpu_mhz']:.0f} MHz)" if clocks and o["cpu_mhz"] else "")
                for o in listed[:5]
            )
            more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
            out.append(f"{where}: outliers {shown}{more}")
    if (o := document.get("overhead")) is not None:
        out.append(
            f"profiler: {1e3 * o['ms_a_stage']:.2f} us a stage, {o['share']:.2%} of the shortest "
            f"({o['of']})"
        )
    return out


def as_text(document: dict[str, Any], columns: int = 0) -> str:
    """Tables and notes for people, in Markdown; tables no wider than so many columns, if any."""
    found = tables(document).items()
    parts = [f"{title}:\n\n{report.fitted(lines, columns)}" for title, lines in found]
    return "\n\n".join([*parts, "\n".join(f"- {n}" for n in notes(document))])


def as_csv(document: dict[str, Any]) -> str:
    """One line a row."""
    lines = []
    for row in document["rows"]:
        line = {"clock": "end-to-end wall"} | {k: row[k] for k in KEY}
        line |= {"load_ms": row["load_ms"], "first_ms": row["first_ms"]}
        s = row["summary"]
        line |= {"n": s["n"], "mean_ms": s.get("mean"), "max_ms": s.get("max")}
        for k, v in s["percentiles"].items():
            line |= {f"{k}_ms": v["value"], f"{k}_low": v.get("low"), f"{k}_high": v.get("high")}
        line |= {k: row[k] for k in ("late", "unserved", "cold", "partial")}
        line |= {"quality": row["quality"].get("value"), "quality_what": row["quality"]["what"]}
        lines.append(line | {"unstable": "; ".join(s["unstable"])})
    out = io.StringIO()
    if lines:
        writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return out.getvalue()


def as_trace(document: dict[str, Any]) -> str:
    """Chrome's trace format, in microseconds. Pictures that wait overlap, so waiting is an
    asynchronous event."""
    events: list[dict[str, Any]] = []
    for pid, row in enumerate(document["rows"], 1):
        about = {"pid": pid, "tid": 1}
        events.append(about | {"ph": "M", "name": "process_name", "args": {"name": row["name"]}})
        stages = dict(row["stages_ms"])
        queue = stages.pop("queue", [0.0] * len(row["total_ms"]))
        stages.pop("unaccounted", None)  # lies between the others, nobody knows where
        for i, start in enumerate(row["start_s"]):
            due, at = 1e6 * start, 1e6 * start + 1e3 * queue[i]
            if row["mode"] == "paced":
                waits = about | {"name": "queue", "cat": "queue", "id": i}
                events += [waits | {"ph": "b", "ts": due}, waits | {"ph": "e", "ts": at}]
            done = due + 1e3 * row["total_ms"][i]
            whole = about | {"ph": "X", "cat": row["mode"]}
            args = {"index": i, "steps": row["steps_done"][i], "due_us": due}
            events.append(
                whole | {"name": "picture", "ts": at, "dur": max(0.0, done - at), "args": args}
            )
            for stage, values in stages.items():
                events.append(whole | {"name": stage, "ts": at, "dur": 1e3 * values[i]})
                at += 1e3 * values[i]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
