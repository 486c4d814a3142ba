"""Time of a refinement step: the core on each instruction set, beside eager PyTorch.

    python -m benchmarks step [--threads 2] [--repeats 7] [-o results.json]

The two run turn by turn in one process, after their losses have been compared. The twin in
tests/torch_twin.py is the peer; without PyTorch its column is left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from benchmarks import report
from runtime.backend import default_threads
from runtime.errors import VerificationFailed

CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {  # height, width, steps, options
    "dynaguide 160x240": (160, 240, 3, {"objective": "dynaguide"}),
    "residual 180x240": (180, 240, 10, {}),
}
CLASSES = 14


def macs_per_pixel(refiner: runtime.Refiner) -> int:
    """Multiply-accumulates of one forward pass, convolutions only."""
    state = refiner.state_dict()
    return sum(v.size for k, v in state.items() if v.ndim == 4 and not k.startswith("momentum."))


def picture(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A synthetic picture of smooth blobs with noise, its labels, and soft scores."""
    rng = np.random.default_rng(0)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    centres = rng.random((CLASSES, 2)) * (height, width)
    distance = np.stack([(ys - y) ** 2 + (xs - x) ** 2 for y, x in centres], -1)
    labels = distance.argmin(-1).astype(np.int32)
    colours = rng.random((CLASSES, 3)).astype(np.float32)
    noise = rng.normal(0, 0.05, (height, width, 3)).astype(np.float32)
    soft = 0.7 * np.eye(CLASSES, dtype=np.float32)[labels] + np.float32(0.3 / CLASSES)
    return np.clip(colours[labels] + noise, 0, 1), labels, soft


def load_twin() -> Any:
    """The PyTorch twin, or None where PyTorch or the tests are missing."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    try:
        from torch_twin import Twin
    except ImportError:
        return None
    finally:
        sys.path.pop(0)
    return Twin


def measure(name: str, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of one case: each target, and PyTorch if it is there."""
    height, width, steps, options = CASES[name]
    image, labels, soft = picture(height, width)
    residual = options.get("objective", "residual") == "residual"
    guide = soft if residual else labels
    runs: dict[str, Callable[[], Any]] = {}
    losses: dict[str, float] = {}
    for target in runtime.targets():
        refiner = runtime.Refiner(
            height,
            width,
            classes=CLASSES if residual else None,
            threads=threads,
            target=target,
            **options,
        )
        losses[target] = refiner.run(image, guide, steps=1).stats["losses"]["total"][0]
        # A run ends with one more forward pass; it is part of what users wait for.
        runs[target] = lambda r=refiner: r.run(image, guide, steps=steps)
    operations = 6 * macs_per_pixel(refiner) * height * width * steps
    twin_class = load_twin()
    if twin_class is not None:
        import torch

        torch.set_num_threads(threads)
        twin = twin_class(refiner.options, refiner._initial, image, guide, torch.float32)
        losses["torch eager"] = twin.step()[0][0]

        def torch_run() -> None:
            for _ in range(steps):
                twin.step()
            twin.labels()

        runs["torch eager"] = torch_run
    reference = losses[runtime.targets()[0]]
    for who, loss in losses.items():
        if abs(loss - reference) > 1e-4 * abs(reference):
            raise VerificationFailed(f"{name}: first loss of {who} is {loss}, not {reference}")
    seconds: dict[str, list[float]] = {who: [] for who in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for who, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[who].append(time.perf_counter() - start)
    rows = []
    peer = float(np.median(seconds["torch eager"])) if "torch eager" in seconds else None
    for who, samples in seconds.items():
        median = float(np.median(samples))
        rows.append(
            {
                "case": name,
                "who": who,
                "threads": threads,
                "steps": steps,
                "ms/step": round(1e3 * median / steps, 1),
                "min": round(1e3 * min(samples) / steps, 1),
                "max": round(1e3 * max(samples) / steps, 1),
                "GFLOP/s": round(operations / median / 1e9, 1),
                "x torch eager": round(peer / median, 2) if peer else "no torch",
            }
        )
    return rows


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks step", description=__doc__)
    parser.add_argument("--threads", type=int, default=default_threads(), help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="(%(default)s)")
    parser.add_argument("-o", "--out", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    rows = [row for name in CASES for row in measure(name, args.threads, args.repeats)]
    print(report.table(rows))
    if args.out:
        report.write_json(args.out, {"environment": report.environment(), "rows": rows})
    return 0
