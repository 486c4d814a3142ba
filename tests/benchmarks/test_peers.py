"""Peers in the same process: they do the same work, turn by turn."""

import time
import types

import cv2
import numpy as np
import pytest
from cases import case
from latency_parts import PICTURE

pytest.importorskip("scipy", reason="the profiler needs SciPy")
pytest.importorskip("matplotlib", reason="the profiler's page needs matplotlib")

from benchmarks.speed import peers
from runtime.errors import MissingBackend
from sdk import RefineConfig


def test_peers_are_medians_that_were_measured(monkeypatch):
    """The median of four turns is the second of the sorted times, not a mean of two of them."""
    monkeypatch.setattr(peers, "PAUSE", 0.0)
    monkeypatch.setattr(peers, "TURNS", 4)
    now, spent = (
        [0.0],
        {"ours": [9, 0.001, 0.002, 0.004, 0.008], "theirs": [9, 0.01, 0.01, 0.01, 0.01]},
    )

    def spend(name):
        now[0] += spent[name].pop(0)

    monkeypatch.setattr(peers.time, "perf_counter", lambda: now[0])
    found = peers.in_turns(lambda: spend("ours"), lambda: spend("theirs"), 0.0)
    assert found["ours p50 ms"] == 2 and found["peer p50 ms"] == 10 and found["turns"] == 4
    assert found["peer / ours, median of the turns"] == "2.50"
    np.testing.assert_allclose(found["samples"]["ours_ms"], [1, 2, 4, 8])


def test_the_torch_peer_computes_the_same():
    pytest.importorskip("torch", reason="needs PyTorch")
    from sdk import Segmenter

    for preset in ("residual", "dynaguide"):
        seg = Segmenter("kmeans", refine=RefineConfig.preset(preset, steps=2), threads=1)
        found = peers.torch_eager(seg, PICTURE, 0.1)
        ratios = np.divide(found["samples"]["peer_ms"], found["samples"]["ours_ms"])
        middle = np.sort(ratios)[(len(ratios) - 1) // 2]
        with case(preset):
            assert found["turns"] >= 3 and len(ratios) == found["turns"]
            assert found["peer / ours, median of the turns"].startswith(f"{middle:.2f}")


def test_the_opencv_peer_filters_the_same_picture(monkeypatch, clock):
    from sdk import Segmenter

    with pytest.raises(MissingBackend, match="no ximgproc"):
        monkeypatch.delattr(cv2, "ximgproc", raising=False)
        peers.check("opencv-guided-filter")
    calls = []
    fake = types.SimpleNamespace(guidedFilter=lambda *a: calls.append(a) or time.sleep(0.02))
    monkeypatch.setattr(cv2, "ximgproc", fake, raising=False)
    peers.check("opencv-guided-filter")
    found = peers.opencv_guided_filter(Segmenter("kmeans", refine=None), PICTURE, 0.1)
    guide, values, radius, eps = calls[-1]
    assert guide.shape == (48, 64, 3) and guide.dtype == np.float32 and guide.max() <= 1
    assert values.shape == (48, 64) and (radius, eps) == (8, 1e-3)
    assert found["turns"] >= 3 and found["peer p50 ms"] > 15 > found["ours p50 ms"]


def test_the_times_of_both_peers_are_kept_apart(clock):
    found = peers.in_turns(lambda: time.sleep(0.002), lambda: time.sleep(0.01), 0.1)
    assert min(found["samples"]["peer_ms"]) > max(5, found["ours p50 ms"])
