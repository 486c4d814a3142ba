"""The counters of a row, and the document, CSV, tables and trace that are made of rows."""

import csv
import json
import types
from itertools import pairwise

import pytest
from latency_parts import PICTURE, Fake, row

pytest.importorskip("scipy", reason="the profiler needs SciPy")
pytest.importorskip("matplotlib", reason="the profiler's page needs matplotlib")

from benchmarks.latency import document as documents


def test_csv_markdown_and_trace(measured):
    rows = list(csv.DictReader((measured / "latency.csv").open()))
    document = json.loads((measured / "latency.json").read_text())
    assert [r["mode"] for r in rows] == [r["mode"] for r in document["rows"]]
    assert {r["clock"] for r in rows} == {"end-to-end wall"}
    told = [r["summary"]["percentiles"]["p50"]["value"] for r in document["rows"]]
    assert [float(r["p50_ms"]) if r["p50_ms"] else None for r in rows] == told
    assert any(told)  # on a slow machine, some rows have too few samples
    text = (measured / "latency.md").read_text()
    assert "end-to-end wall time" in text and "| p90 ms" in text
    trace = json.loads((measured / "trace.json").read_text())["traceEvents"]
    for pid in range(1, 7):  # complete events of a thread are nested
        ends = [(e["ts"], e["ts"] + e["dur"]) for e in trace
                if e["pid"] == pid and e["name"] == "picture"]  # fmt: skip
        assert all(b[0] >= a[1] - 1 for a, b in pairwise(ends))
    waits = [e for e in trace if e["name"] == "queue"]
    assert len(waits) == 2 * sum(r["summary"]["n"] for r in document["rows"] if r["rate"])
    whole = [e for e in trace if e["name"] == "picture" and e["pid"] == 1]
    first = document["rows"][0]
    assert len(whole) == first["summary"]["n"]
    assert whole[3]["dur"] == pytest.approx(1e3 * first["total_ms"][3])
    parts = [e for e in trace if e["pid"] == 1 and e["ph"] == "X" and e["name"] != "picture"]
    ends = {e["ts"]: e["ts"] + e["dur"] for e in whole}
    for part in parts:  # each lies within its picture, in microseconds
        begin = max(t for t in ends if t <= part["ts"])
        assert part["ts"] + part["dur"] <= ends[begin] + 1


def test_an_interrupt_within_a_sample_costs_that_sample():
    result = Fake()(PICTURE)
    for column in ("stages_ms", "total_ms", "start_s", "steps_done", "cpu_mhz"):
        made = row()
        for i in range(30):
            made.add(i, i, i + 0.01 + 0.001 * (i % 3), result, 1000.0)
        columns = made.stages_ms["refine"] if column == "stages_ms" else getattr(made, column)
        columns.append(5.0)
        found = documents.summarise(made, [50.0])
        assert found["summary"]["n"] == 30, column
        assert {len(c) for c in made.stages_ms.values()} == {30}, column
        made.start_s.pop()
        assert documents.summarise(made, [50.0])["summary"]["n"] == 29, column


def test_frames_that_start_cold_are_said():
    made = row("stream")
    result = Fake()(PICTURE)
    for i in range(30):
        result.frame = types.SimpleNamespace(start="cold" if i == 7 else "warm")
        made.add(i, i, i + 0.01, result, None)
    assert made.cold == 1
    reasons = documents.summarise(made, [50.0])["summary"]["unstable"]
    assert "1 of its frames started cold, with more steps" in reasons
    made.steps = 0  # without a refinement, no frame has more steps
    assert not documents.summarise(made, [50.0])["summary"]["unstable"]


def test_the_device_clock_has_a_column_of_its_own():
    """Device times are reported only where the native refinement runs on a GPU."""

    def result(**stats):
        return types.SimpleNamespace(
            timings={"refine": 5.0, "total": 7.0}, stats={"steps": 2} | stats
        )

    there, here = row(), row()
    for i in range(4):
        there.add(i, i, i + 0.007, result(device_ms={"refine": 1.0 + i}), None)
        here.add(i, i, i + 0.007, result(), None)
    assert documents.summarise(there, [50])["stage_p50_ms"]["refine, device time"] == 2.5
    assert "refine, device time" not in documents.summarise(here, [50])["stage_p50_ms"]
    assert there.device_ms == {"refine": [1.0, 2.0, 3.0, 4.0]} and not here.device_ms
