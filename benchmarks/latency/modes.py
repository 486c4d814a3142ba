"""The modes of a latency run: back to back, paced, and as a stream.

Each mode calls ``seg`` with the ``pictures`` in turn for ``seconds``, and appends a sample to
``row`` for each call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.latency.document import Row
from sdk.timing import Clock

WARM_STEPS = 2  # for each frame of a stream, the default of Segmenter.stream
WARM_UP, WARM_CALLS = 0.5, 3  # the fewest seconds and calls of a warm-up
CLOCK_EVERY = 0.1  # seconds between readings of the processor's clock


class Clocks:
    """Returns the clock of the fastest processor in MHz; None if it is not known. The clock is read
    at most once in CLOCK_EVERY seconds."""

    def __init__(self) -> None:
        self.at = -1.0
        self.last: float | None = None

    def __call__(self) -> float | None:
        now = time.perf_counter()
        if now - self.at > CLOCK_EVERY:
            self.at, self.last = now, max(machine.cpu_mhz(), default=None)
        return self.last


Progress = Callable[[float], None]  # called with the seconds since the row's measurement began


def back_to_back(
    row: Row, seg: Any, pictures: list[np.ndarray], seconds: float, report: Progress
) -> None:
    """Begin each call as soon as the call before it has returned."""
    clocks, origin = Clocks(), time.perf_counter()
    while (now := time.perf_counter() - origin) < seconds:
        report(now)
        picture = pictures[len(row.total_ms) % len(pictures)]
        begin = time.perf_counter()
        result = seg(picture)
        end = time.perf_counter()
        row.add(begin - origin, begin - origin, end - origin, result, clocks())


def paced(row: Row, seg: Any, pictures: list[np.ndarray], seconds: float, report: Progress) -> None:
    """A picture is due every 1 / rate seconds, and waits until the call before it has returned.
    After ``seconds``, pictures that still wait are counted as unserved."""
    assert row.rate is not None
    clocks, origin = Clocks(), time.perf_counter()
    count = max(1, int(seconds * row.rate))
    for i in range(count):
        due = i / row.rate
        now = time.perf_counter() - origin
        if now > max(seconds, due):
            row.unserved = count - i
            break
        report(now)
        if now < due:
            time.sleep(due - now)
        begin = time.perf_counter() - origin
        result = seg(pictures[i % len(pictures)])
        end = time.perf_counter() - origin
        row.late += end > due + 1 / row.rate
        row.add(due, begin, end, result, clocks())


def stream(
    row: Row, seg: Any, pictures: list[np.ndarray], seconds: float, report: Progress
) -> None:
    """Segment the pictures as frames of a stream: each refinement starts from the weights of the
    frame before. The first frame, which starts cold, is no sample."""

    def frames() -> Iterator[np.ndarray]:
        shown = 0
        while True:
            yield pictures[shown % len(pictures)]
            shown += 1

    results = seg.stream(frames(), drop="none", warm_steps=row.steps)
    try:
        next(results)
        clocks, origin = Clocks(), time.perf_counter()
        while (begin := time.perf_counter() - origin) < seconds:
            report(begin)
            begin = time.perf_counter() - origin
            result = next(results)
            end = time.perf_counter() - origin
            row.add(begin, begin, end, result, clocks())
    finally:
        results.close()


RUN = {"back-to-back": back_to_back, "paced": paced, "stream": stream}


def warm_up(seg: Any, pictures: list[np.ndarray]) -> None:
    """Call ``seg`` at least WARM_CALLS times and for at least WARM_UP seconds, so that caches and
    memory pools are filled and clock frequencies have risen."""
    start, calls = time.perf_counter(), 0
    while calls < WARM_CALLS or time.perf_counter() - start < WARM_UP:
        seg(pictures[calls % len(pictures)])
        calls += 1


def overhead_ms() -> float:
    """Measure the milliseconds that the pipeline's clock takes to record one stage."""
    clock, laps = Clock(), 20_000
    start = time.perf_counter()
    for _ in range(laps):
        clock.lap("stage")
    return 1e3 * (time.perf_counter() - start) / laps
