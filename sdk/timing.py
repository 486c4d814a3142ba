"""The time of each stage of a segmentation."""

from __future__ import annotations

import time
from typing import Any


class Clock:
    """Measures the stages of one call in milliseconds, by the wall clock and by a GPU's own clock.

    ``laps`` maps a stage to its wall time, ``device_ms`` to its time on the GPU.
    """

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}
        self.device_ms: dict[str, float] = {}

    def device(self, stage: str, begin: Any, end: Any) -> None:
        """Store the time of a stage on the GPU.

        Parameters
        ----------
        begin, end : results of :func:`runtime.device.transfer.record_event` before and after the
            stage; None on the CPU, where nothing is stored.
        """
        if begin is not None:
            self.device_ms[stage] = begin.until(end)

    def lap(self, stage: str) -> None:
        """End a stage: store the wall time since the last stage ended."""
        now = time.perf_counter()
        self.laps[stage] = (now - self.last) * 1e3
        self.last = now

    def timings(self) -> dict[str, float]:
        """Return the wall time of each stage, "unaccounted" (the rest) and "total", in ms."""
        total = (time.perf_counter() - self.start) * 1e3
        return self.laps | {"unaccounted": total - sum(self.laps.values()), "total": total}
