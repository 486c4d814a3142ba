"""Measure memory and energy, each in a run of its own, apart from latency."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.speed.harness import last_error
from runtime.errors import InputError

IDLE = 3.0  # seconds for which the idle power is measured
MEMORY = """
import json, pickle, sys
from benchmarks.speed.workloads import memory
from benchmarks.machine import gpus
options, picture = pickle.load(sys.stdin.buffer)
from sdk import Segmenter
from runtime.engines.onnx_runtime import import_onnxruntime
import_onnxruntime("measure memory")
def used():
    return [g["used_mib"] for g in gpus()]
base, device = memory("VmRSS"), used()
segmenter = Segmenter(**options)
loaded, device_loaded = memory("VmRSS"), used()
for _ in range(3):
    segmenter(picture)
out = {"loaded MiB": round(loaded - base, 1), "peak MiB": round(memory("VmHWM") - base, 1)}
for i, (a, b, c) in enumerate(zip(device, device_loaded, used())):
    out |= {f"GPU {i}, loaded MiB": b - a, f"GPU {i}, run MiB": c - a}
print(json.dumps(out))
"""


def memory_run(options: dict[str, Any], picture: np.ndarray) -> dict[str, Any]:
    """Measure the memory of a new process in MiB: after loading and at its peak, minus its memory
    after the imports; and how much the used memory of each GPU grows. Values of 0 are left out.

    Parameters
    ----------
    options : the arguments of ``Segmenter``.
    picture : (H, W, 3) uint8 RGB.

    Raises
    ------
    InputError : the process fails.
    """
    sent = pickle.dumps((options, picture))
    done = subprocess.run([sys.executable, "-c", MEMORY], input=sent, capture_output=True)
    if done.returncode:
        why = last_error(done.stderr.decode(errors="replace"))
        raise InputError(f"the memory run failed: {why}", fix="leave --memory out")
    return {k: v for k, v in json.loads(done.stdout).items() if v}


def power_run(seg: Any, pictures: list[np.ndarray], seconds: float) -> dict[str, Any] | None:
    """Measure the joules for each picture, without those of the idle machine; None if the machine
    has no sensor.

    Parameters
    ----------
    pictures : (H, W, 3) uint8 RGB, shown in turn.
    seconds : how long the busy power is measured.
    """
    source = machine.power_source()
    if source is None:
        return None
    time.sleep(1)
    with machine.PowerMeter() as idle:
        time.sleep(IDLE)
    count, start = 0, time.perf_counter()
    with machine.PowerMeter() as busy:
        while time.perf_counter() - start < seconds:
            seg(pictures[count % len(pictures)])
            count += 1
    idle_watts = idle.joules / idle.seconds
    return {
        "sensor": source,
        "idle W": idle_watts,
        "W": busy.joules / busy.seconds,
        "J a picture, idle subtracted": (busy.joules - idle_watts * busy.seconds) / count,
        "pictures": count,
        "s": busy.seconds,
        "readings/s": 1 / machine.SAMPLING,
    }
