"""Time the peers of a case in turns, and compute the statistics of the samples."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.speed.gpu import comparison
from benchmarks.speed.gpu.comparison import Case, Peer
from benchmarks.speed.gpu.device import FAST, Gpu, set_precision

MOST, LEAST = 25, 6  # most and fewest turns of a case
SECONDS = 8.0  # after this time and LEAST turns a case ends
WARM = 1  # turns before the measured ones


def turn(gpu: Gpu, peer: Peer, precision: str) -> tuple[float, float]:
    """Time one run of a peer; returns milliseconds by the device's clock and by the wall clock. If
    the peer has a burst, the device's time is the mean of a burst."""
    set_precision(gpu.torch, precision)
    peer.before()
    if peer.burst > 1:

        def burst() -> None:
            for _ in range(peer.burst):
                peer.run()

        return gpu.time(burst, ahead=True)[0] / peer.burst, gpu.time(peer.run)[1]
    device, wall = gpu.time(peer.run, peer.after)
    return peer.clock() if peer.clock else device, wall


def measure(case: Case) -> list[dict[str, Any]]:
    """Time the peers of a case in turns; returns a row for each peer."""
    times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in case.peers}
    end = float("inf")
    for n in range(WARM + MOST):
        if n == WARM:
            end = time.monotonic() + SECONDS
        if n >= WARM + LEAST and time.monotonic() >= end:
            break
        for (who, precision), peer in case.peers.items():
            sample = turn(case.gpu, peer, precision)
            if n >= WARM:
                times[who, precision].append(sample)
    return rows(case, times)


def rows(
    case: Case, times: dict[tuple[str, str], list[tuple[float, float]]]
) -> list[dict[str, Any]]:
    """Make the rows of a case.

    Parameters
    ----------
    case : the case, with its peers.
    times : (device, wall) milliseconds of each run, by the peer's name and precision.

    Returns
    -------
    A row for each peer: median times, rates or ratios, memory, statistics and all samples.
    """
    from benchmarks.latency import samples  # needs SciPy

    medians = {
        key: samples.percentile(np.array([device for device, _ in pairs]), 0.5)
        for key, pairs in times.items()
    }
    copy = 2 * comparison.COPY / medians["copy", ""] / 1e6  # GB/s
    out = []
    for (who, precision), pairs in times.items():
        device, wall = (np.array(column) for column in zip(*pairs, strict=True))
        ms = medians[who, precision]
        row: dict[str, Any] = {"case": case.name, "who": who, "precision": precision}
        row |= {"device ms": ms, "wall ms": samples.percentile(wall, 0.5)}
        if who == "copy":
            row["GB/s"] = copy
        elif who == "matmul":
            row["TFLOP/s"] = 2 * comparison.MATRIX**3 / ms / 1e9
        else:
            row["ms/step"] = ms / case.steps
            if case.bytes:
                row["of copy"] = case.bytes / ms / 1e6 / copy
            if case.operations:
                most = 2 * comparison.MATRIX**3 / medians["matmul", precision]
                row["of matmul"] = case.operations / ms / most
            own = medians.get(("ours", "fp16" if precision in FAST else precision))
            if own is not None:
                row["x ours"] = ms / own
            row["MiB"] = case.memory[who, precision]
        row["statistics"] = {
            "device": samples.summary(device, [50, 90]),
            "wall": samples.summary(wall, [50, 90]),
        }
        row["samples"] = {"device ms": device.tolist(), "wall ms": wall.tolist()}
        out.append(row)
    return out
