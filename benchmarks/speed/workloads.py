"""The cases of the speed benchmarks. A benchmark and the processes of its peers both use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.core.parameters import OBJECTIVES

Inputs = tuple[np.ndarray, np.ndarray, np.ndarray]
CLASSES = 14
MATRIX = 1536  # side of the square matrices of "matmul"
COPY = 2**28  # bytes that "copy" reads; it writes as many
STEPS = {"dynaguide": 2, "residual": 10}  # steps of one run


class Case(NamedTuple):
    """A refinement of a synthetic picture: its working size, the steps of one run, and options."""

    height: int
    width: int
    steps: int
    options: dict[str, Any]


def find_case(name: str) -> Case:
    """Return the case of a name such as "residual 180x240": an objective and a working size.

    Raises
    ------
    ValueError : ``name`` is not the name of a case.
    """
    objective, _, size = name.partition(" ")
    height, width = map(int, size.split("x"))
    if objective not in STEPS or height < 1 or width < 1:
        raise ValueError(name)
    return Case(height, width, STEPS[objective], {"objective": objective})


def picture(height: int, width: int) -> Inputs:
    """Make a synthetic picture of CLASSES one-coloured regions with noise.

    Returns
    -------
    The picture (h, w, 3) float32 in [0, 1], its labels (h, w) int32, and probabilities of the
    classes (h, w, CLASSES) float32.
    """
    rng = np.random.default_rng(0)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    centres = rng.random((CLASSES, 2)) * (height, width)
    distance = np.stack([(ys - y) ** 2 + (xs - x) ** 2 for y, x in centres], -1)
    labels = distance.argmin(-1).astype(np.int32)
    colours = rng.random((CLASSES, 3)).astype(np.float32)
    noise = rng.normal(0, 0.05, (height, width, 3)).astype(np.float32)
    soft = 0.7 * np.eye(CLASSES, dtype=np.float32)[labels] + np.float32(0.3 / CLASSES)
    return np.clip(colours[labels] + noise, 0, 1), labels, soft


def refiner(case: Case, **more: Any) -> Any:
    """Make a runtime.Refiner for a case; ``more`` are further arguments of runtime.Refiner."""
    import runtime

    objective = OBJECTIVES[case.options["objective"]]
    count = CLASSES if objective.channels_follow_classes else None
    return runtime.Refiner(case.height, case.width, classes=count, **case.options, **more)


def memory(field: str) -> float:
    """Return a memory size of this process in MiB, from /proc/self/status; nan without that file.

    Parameters
    ----------
    field : "VmRSS" (memory now) or "VmHWM" (peak memory).
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
