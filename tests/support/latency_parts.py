"""A picture, a segmenter that takes a known time, and a row: of the profiler's tests."""

import time
import types

import numpy as np

from benchmarks.latency import document as documents

PICTURE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


class Fake:
    """A segmenter that takes 5 ms, or what ``slow`` says for a picture's number."""

    def __init__(self, slow=()):
        self.calls, self.slow = 0, dict(slow)

    def __call__(self, picture):
        begin = time.perf_counter()
        time.sleep(self.slow.get(self.calls, 0.005))
        self.calls += 1
        spent = 1e3 * (time.perf_counter() - begin)
        timings = {"prior": 1.0, "refine": spent - 1, "unaccounted": 0.0, "total": spent}
        return types.SimpleNamespace(timings=timings, stats={"steps": 4})


def row(mode="back-to-back", **more):
    return documents.Row(mode, 4, 1, **more)


def quiet(_):
    pass
