"""Time by stage."""

from __future__ import annotations

import time
from typing import Any


class Clock:
    """Time by stage, in milliseconds: the wall's, and a GPU's own."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}
        self.device_ms: dict[str, float] = {}

    def device(self, stage: str, begin: Any, end: Any) -> None:
        """``begin`` and ``end`` mark the stage on a GPU's stream; they are None on the CPU."""
        if begin is not None:
            self.device_ms[stage] = begin.until(end)

    def lap(self, stage: str) -> None:
        """The stage is over."""
        now = time.perf_counter()
        self.laps[stage] = (now - self.last) * 1e3
        self.last = now

    def timings(self) -> dict[str, float]:
        total = (time.perf_counter() - self.start) * 1e3
        return self.laps | {"unaccounted": total - sum(self.laps.values()), "total": total}
