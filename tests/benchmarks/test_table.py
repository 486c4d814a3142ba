"""Tables for people, JSON for programs."""

import pytest

pytest.importorskip("scipy", reason="the profiler needs SciPy")
pytest.importorskip("matplotlib", reason="the profiler's page needs matplotlib")

from benchmarks import table


def test_tables_fit_a_terminal():
    rows = [{"row": f"configuration {i}", "p50": f"{i}.0 [1, 2]", "late": ""} for i in range(7)]
    assert table.fitted(rows, 0) == table.fitted(rows, 200) == table.as_markdown(rows)
    narrow = table.fitted(rows, 38)
    assert max(map(len, narrow.splitlines())) <= 38 and "late" not in narrow
    assert all(f"configuration {i}" in narrow and f"{i}.0 [1, 2]" in narrow for i in range(7))
    assert table.fitted(rows[:1], 5).count("\n") == 2  # as narrow as it can be
