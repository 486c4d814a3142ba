"""The committed results: small, one line for each list of numbers, and read by today's reader."""

import json
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="the latency reader needs SciPy")

from benchmarks import table
from benchmarks.latency import document as documents
from benchmarks.latency import reading

FOLDER = Path(__file__).parents[2] / "benchmarks" / "results"
RESULTS = sorted(FOLDER.glob("*.json"))
MOST = 60_000  # bytes


def test_there_are_results():
    assert len(RESULTS) >= 12 and any(path.name.startswith("latency") for path in RESULTS)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_result_is_small_and_can_be_read(path):
    assert path.stat().st_size < MOST
    text = path.read_text()
    found = json.loads(text)
    assert text == table.as_json(found)
    assert {"commit", "date", "cpu"} <= set(found["environment"])
    if "schema" in found:
        document = reading.load(path)
        assert found["schema"] == documents.SCHEMA and document["rows"]
        assert not any(name in row for row in found["rows"] for name in documents.RAW)
        for row, kept in zip(document["rows"], found["rows"], strict=True):
            assert row["summary"]["n"] == kept["summary"]["n"] == len(kept["total_ms"])
            assert row["name"] == kept["name"]
        return
    tables = found.get("tables") or [
        {"rows": found[k]} for k in found if k in ("rows", "quality", "latency")
    ]
    assert tables and all(each["rows"] for each in tables)
    for each in tables:
        assert table.as_markdown(each["rows"]).count("\n") == len(each["rows"]) + 1
