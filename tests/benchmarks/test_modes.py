"""The modes of the profiler: back to back, and paced, where pictures wait."""

import json

import numpy as np
import pytest
from latency_parts import PICTURE, Fake, quiet, row

pytest.importorskip("scipy", reason="the profiler needs SciPy")
pytest.importorskip("matplotlib", reason="the profiler's page needs matplotlib")

from benchmarks.latency import document as documents
from benchmarks.latency import modes


def test_a_late_picture_is_counted_and_its_wait_too():
    made = row("paced", rate=20)
    modes.paced(made, Fake({10: 0.12}), [PICTURE], 1.0, quiet)
    times = made.total_ms
    assert len(times) == 20 and made.unserved == 0
    assert times[10] >= 120
    assert times[11] >= times[10] - 50 + 4.9 and times[12] >= times[11] - 50 + 4.9  # both waited
    assert made.late == sum(t > 50 for t in times) >= 2
    assert made.stages_ms["queue"][11] >= 69 > 50 > np.median(times)
    np.testing.assert_allclose(made.start_s, np.arange(20) / 20)  # when they were due
    np.testing.assert_allclose(np.sum(list(made.stages_ms.values()), 0), times)


def test_a_rate_that_is_too_high_is_said(clock):
    made = row("paced", rate=100)
    modes.paced(made, Fake(dict.fromkeys(range(1000), 0.05)), [PICTURE], 0.5, quiet)
    assert 9 <= len(made.total_ms) <= 11 and made.unserved == 50 - len(made.total_ms)
    found = documents.summarise(made, [50.0])
    assert any("100/s is too fast" in r for r in found["summary"]["unstable"])


def test_back_to_back_leaves_nothing_out(clock):
    made, fake = row(), Fake({7: 0.1})
    modes.back_to_back(made, fake, [PICTURE], 0.5, quiet)
    assert len(made.total_ms) == fake.calls and made.total_ms[7] > 100
    found = documents.summarise(made, [50.0, 99.0])
    assert 7 in [o["index"] for o in found["summary"]["outliers"]]
    assert found["summary"]["max"] == max(made.total_ms)
    assert found["stage_p50_ms"]["refine per step"] == pytest.approx(
        np.median(made.stages_ms["refine"]) / 4
    )
    assert found["summary"]["percentiles"]["p99"]["value"] is None
    json.dumps(found)
