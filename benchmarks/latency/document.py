"""Documents, the results of `benchmarks latency`: their rows, tables, CSV and trace.

In memory a document contains every sample of every stage. Its file contains the total time of every
sample, and medians and percentiles of the stages (:func:`stored`). A second file beside it contains
the samples of the stages (:func:`raw`).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks import table

SCHEMA = "dg-latency/2"
MODES = ("back-to-back", "paced", "stream")
MOST_ROWS = 100  # the largest number of rows, and of percentiles
# Fields of a row. KEY: its configuration. RAW: by sample, not in the file. MEASURED: rounded there.
KEY = ("mode", "rate", "refine", "steps", "threads", "device", "backend", "precision")
RAW = ("start_s", "stages_ms", "steps_done", "cpu_mhz", "device_ms")
MEASURED = ("load_ms", "first_ms", "total_ms", "summary", "stage_p50_ms", "stage_percentiles_ms")
PARTS = ("memory", "power", "peers")  # tables beside the rows
OUTLIER = ("index", "start_s", "ms", "cpu_mhz")  # the document's values of each outlier
# Names of times: the rest of the total that no stage contains; a time that is no stage; and the end
# of the name of a stage whose time is from the GPU's clock.
REST, PER_STEP, ON_DEVICE = "unaccounted", "refine per step", ", device time"
LATENCY = "Latency, end-to-end wall time"
STAGES = "Stages, median ms (the medians of the stages need not add up to the median of the total)"
DASH = "-"  # the cell of a percentile that has too few samples


@dataclass
class Row:
    """The measurements of one configuration. A list has one entry for each sample. Names that end
    in ``_ms`` are milliseconds, in ``_s`` seconds."""

    mode: str
    steps: int  # that the user asked for
    threads: int
    refine: str = "none"  # the objective, the scale of its working size, and changed settings
    backend: str = ""
    precision: str = "fp32"
    device: str = "cpu"
    rate: float | None = None
    load_ms: float = 0.0  # to open the model
    first_ms: float = 0.0  # the first call
    quality: dict[str, Any] = field(default_factory=lambda: {"what": "not measured"})
    total_ms: list[float] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)  # since the row's measurement began
    stages_ms: dict[str, list[float]] = field(default_factory=dict)
    steps_done: list[int] = field(default_factory=list)
    cpu_mhz: list[float | None] = field(default_factory=list)
    device_ms: dict[str, list[float]] = field(default_factory=dict)  # stages, on the GPU's clock
    cold: int = 0  # stream: number of frames that started cold
    late: int = 0  # paced: number of pictures that ended after the next one was due
    unserved: int = 0  # paced: number of pictures that were due, but had not begun at the end
    partial: bool = False  # whether an error or an interrupt ended the measurement early

    def name(self) -> str:
        """The row's name: its mode, rate, steps and threads."""
        rate = f" {self.rate:g}/s" if self.rate else ""
        return (
            f"{self.mode}{rate}, {counted(self.steps, 'step')}, {counted(self.threads, 'thread')}"
        )

    def add(self, due: float, begin: float, end: float, result: Any, clock: float | None) -> None:
        """Append a sample.

        Parameters
        ----------
        due, begin, end : when the picture was due, when its call began and ended; in seconds since
            the row's measurement began.
        result : the segmenter's result, with its timings and stats.
        clock : the processor's clock in MHz, None where it is not known.
        """
        stages = {k: v for k, v in result.timings.items() if k not in ("unaccounted", "total")}
        if self.mode == "paced":
            stages = {"queue": 1e3 * (begin - due)} | stages
        total = round(1e3 * (end - due), 3)  # to a microsecond
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
        """Remove the last sample if an interrupt has left it incomplete."""
        columns: list[list[Any]] = [self.total_ms, self.start_s, self.steps_done, self.cpu_mhz]
        columns += [*self.stages_ms.values(), *self.device_ms.values()]
        n = min(map(len, columns))
        for column in columns:
            del column[n:]


def shown(text: str) -> str:
    """The text with a "?" for each byte of a file name that is not valid text."""
    return text.encode(errors="replace").decode()


def counted(n: int, what: str) -> str:
    """A number with its noun: "1 step" or "2 steps" from ``what`` "step"."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def summarise(row: Row, percentiles: list[float]) -> dict[str, Any]:
    """The row as a dictionary, with its name and its statistics. An incomplete last sample is
    removed from the row.

    Parameters
    ----------
    percentiles : in per cent, from 1 to 99.99.
    """
    row.cut()
    stages = {k: float(np.median(v)) for k, v in row.stages_ms.items() if v}
    ran = np.array(row.steps_done)
    if "refine" in row.stages_ms and ran.size and ran.min() > 0:
        stages[PER_STEP] = float(np.median(row.stages_ms["refine"] / ran))
    stages |= {f"{k}{ON_DEVICE}": float(np.median(v)) for k, v in row.device_ms.items() if v}
    spread = {k: _percentiles(v, percentiles) for k, v in row.stages_ms.items() if v}
    spread |= {f"{k}{ON_DEVICE}": _percentiles(v, percentiles) for k, v in row.device_ms.items()}
    known = {i: (row.start_s[i], row.cpu_mhz[i]) for i in range(len(row.total_ms))}
    summed_up = {"stage_p50_ms": stages, "stage_percentiles_ms": spread}
    return vars(row) | summarise_totals(row, percentiles, known) | summed_up


def summarise_totals(
    row: Row, percentiles: list[float], known: Mapping[int, tuple[float | None, float | None]]
) -> dict[str, Any]:
    """The row's name, and the statistics of its total times.

    Parameters
    ----------
    percentiles : in per cent, from 1 to 99.99.
    known : the index of a sample -> its start in seconds and the processor's clock in MHz, each or
        None. Samples may be missing.
    """
    from benchmarks.latency import samples

    found = samples.summary(np.array(row.total_ms, np.float64), percentiles)
    if row.unserved:
        found["unstable"].append(
            f"{row.unserved} pictures were due but never begun: {row.rate:g}/s is too fast"
        )
    if row.cold and row.steps:
        found["unstable"].append(f"{row.cold} of its frames started cold, with more steps")
    listed = []
    for i in found.get("outliers", []):
        start, clock = known.get(i, (None, None))
        listed.append({"index": i, "start_s": start, "ms": row.total_ms[i], "cpu_mhz": clock})
    return {"name": row.name(), "summary": found | {"outliers": listed}}


def _percentiles(times: list[float], percentiles: list[float]) -> dict[str, float]:
    from benchmarks.latency import samples

    found = np.array(times, np.float64)
    return {f"p{p:g}": samples.percentile(found, p / 100) for p in percentiles}


def stages(rows: list[dict[str, Any]]) -> list[str]:
    """The names of the stages of all rows, in the order of their first appearance, but
    "unaccounted" last."""
    names = dict.fromkeys(k for r in rows for k in r["stage_p50_ms"] if is_stage(k))
    return sorted(names, key=lambda name: name == REST)


def is_stage(name: str) -> bool:
    """Whether the time of this name is a part of the total; "refine per step" and times on the
    GPU's clock are not."""
    return name != PER_STEP and not name.endswith(ON_DEVICE)


def stored(document: dict[str, Any]) -> dict[str, Any]:
    """The document for its file: of all samples it contains only the rows' total times."""
    rows = []
    for row in document["rows"]:
        kept = {k: v for k, v in row.items() if k not in RAW}
        listed = row["summary"]["outliers"]
        columns = {k: [o[k] for o in listed] for k in OUTLIER}
        kept["summary"] = row["summary"] | {"outliers": columns}
        rows.append(kept | {k: _rounded(kept[k]) for k in MEASURED})
    lone = [{k: v for k, v in peer.items() if k != "samples"} for peer in document["peers"]]
    return document | {"rows": rows, "peers": lone}


def raw(document: dict[str, Any]) -> dict[str, Any]:
    """All samples of a document's rows and peers, for the file beside the document's file."""
    names = ("name", "total_ms", *RAW)
    rows = [{k: row[k] for k in names} for row in document["rows"]]
    return {"rows": rows, "peers": [peer.get("samples") for peer in document["peers"]]}


def _rounded(value: Any) -> Any:
    """Round milliseconds to microseconds."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return round(value, 3) if isinstance(value, float) else value


def tables(document: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """The tables of a document by title. A table is a list of rows, a row maps columns to cells."""
    rows = document["rows"]
    out = {LATENCY: [_latency_line(r) for r in rows], STAGES: []}
    names = dict.fromkeys(k for r in rows for k in r["stage_p50_ms"])
    order = [*stages(rows), *(k for k in (PER_STEP, *names) if k in names and not is_stage(k))]
    several = len({_ran(r) for r in rows}) > 1
    for r in rows:
        line = {"row": r["name"]} | ({"ran": _ran(r)} if several else {})
        for k in dict.fromkeys(order):
            line[k] = f"{r['stage_p50_ms'][k]:.2f}" if k in r["stage_p50_ms"] else ""
        out[STAGES].append(line)
    for part in PARTS:
        lines = [{k: _shown(v) for k, v in p.items() if k != "samples"} for p in document[part]]
        out[part.capitalize()] = lines
    return {title: lines for title, lines in out.items() if lines}


def below(document: dict[str, Any]) -> dict[str, str]:
    """The lines to print below tables, by the tables' titles. Some tables have no such line."""
    rows, out = document["rows"], {}
    if any(r["summary"]["percentiles"] for r in rows):
        found = [p for r in rows for p in r["summary"]["percentiles"].items()]
        needs = {name: p["need"] for name, p in found if p["value"] is None}
        out[LATENCY] = " ".join(["In brackets: the 95 % interval.", too_few(needs)]).strip()
    ran = {_ran(r) for r in rows}
    if len(ran) == 1:
        out[STAGES] = f"All rows ran with {ran.pop()}."
    return out


def too_few(needs: dict[str, int]) -> str:
    """The line that explains the dashes of a table; "" if ``needs`` is empty.

    Parameters
    ----------
    needs : how many independent samples each percentile with a dash needs: {"p99": 299}.
    """
    if not needs:
        return ""
    ordered = sorted(needs.items(), key=lambda item: item[1])
    listed = ", ".join(f"{name} needs {n}" for name, n in ordered)
    return f"A dash: the row has too few independent samples for this percentile; {listed}."


def _ran(row: dict[str, Any]) -> str:
    """The backend, the device and the precision of a row."""
    return f"{row['backend']} on {row['device']}, {row['precision']}"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _latency_line(row: dict[str, Any]) -> dict[str, str]:
    s, n = row["summary"], row["summary"]["n"]
    line = {"row": row["name"], "n": str(n)}
    for p, v in s["percentiles"].items():
        if v["value"] is None:
            line[f"{p} ms"] = DASH
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
    """The lines after the tables: where and how the rows were measured, and what is unusual."""
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
                f"{where}: neighbouring samples correlate ({s['lag1']:.2f}), so that {s['n']} "
                f"samples count as {s['independent']}; the intervals are computed for that number"
            )
        if s["period"]:
            out.append(f"{where}: the latency repeats itself every {s['period']} samples")
        if listed := s["outliers"]:
            clocks = len({o["cpu_mhz"] for o in listed}) > 1
            shown = ", ".join(
                f"#{o['index']}"
                + ("" if o["start_s"] is None else f" at {o['start_s']:.1f} s")
                + f" {o['ms']:.1f} ms"
                + (f" ({o['cpu_mhz']:.0f} MHz)" if clocks and o["cpu_mhz"] else "")
                for o in listed[:5]
            )
            more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
            out.append(f"{where}: outliers {shown}{more}")
    if (o := document.get("overhead")) is not None:
        out.append(
            f"profiler: recording a stage takes {1e3 * o['ms_a_stage']:.2f} us, {o['share']:.2%} "
            f"of the shortest stage ({o['of']})"
        )
    return out


def as_text(document: dict[str, Any], columns: int = 0) -> str:
    """Tables and notes for people, in Markdown.

    Parameters
    ----------
    columns : the width of the terminal in characters; 0 for tables of any width.
    """
    parts, said = [], below(document)
    for title, lines in tables(document).items():
        parts += [f"{title}:", table.fitted(lines, columns)]
        parts += [said[title]] if title in said else []
    return "\n\n".join([*parts, "\n".join(f"- {n}" for n in notes(document))])


def as_csv(document: dict[str, Any]) -> str:
    """The rows as CSV, one line for each."""
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
    """The samples in Chrome's trace format, in microseconds. The waiting times of paced pictures
    may overlap, so they are asynchronous events."""
    events: list[dict[str, Any]] = []
    for pid, row in enumerate(document["rows"], 1):
        about = {"pid": pid, "tid": 1}
        events.append(about | {"ph": "M", "name": "process_name", "args": {"name": row["name"]}})
        times = dict(row["stages_ms"])
        queue = times.pop("queue", [0.0] * len(row["total_ms"]))
        times.pop(REST, None)  # this time has no place of its own between the stages
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
            for stage, values in times.items():
                events.append(whole | {"name": stage, "ts": at, "dur": 1e3 * values[i]})
                at += 1e3 * values[i]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
