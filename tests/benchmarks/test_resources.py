"""Memory and energy of a run."""

import pytest
from latency_parts import PICTURE, Fake

pytest.importorskip("scipy", reason="the profiler needs SciPy")
pytest.importorskip("matplotlib", reason="the profiler's page needs matplotlib")

from benchmarks.latency import resources


def test_memory_and_power_are_runs_of_their_own(tmp_path, monkeypatch):
    options = {"prior": "kmeans", "refine": None, "threads": 1}
    found = resources.memory_run(options, PICTURE)
    assert 0 <= found["loaded MiB"] <= found["peak MiB"] < 400
    monkeypatch.setattr(resources.machine, "power_source", lambda: None)
    assert resources.power_run(Fake(), [PICTURE], 1.0) is None


def test_energy_of_a_picture_is_what_idle_does_not_draw(monkeypatch):
    class Meter:
        seconds, drawn = 2.0, iter((10.0, 30.0))

        def __enter__(self):
            self.joules = next(Meter.drawn)
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(resources.machine, "power_source", lambda: "a sensor")
    monkeypatch.setattr(resources.machine, "PowerMeter", Meter)
    monkeypatch.setattr(resources, "IDLE", 0.0)
    found = resources.power_run(Fake(), [PICTURE], 0.2)
    assert found["idle W"] == 5 and found["W"] == 15
    assert found["J a picture, idle subtracted"] == pytest.approx(20 / found["pictures"])
