"""The environment of a measurement: machine, versions, date and commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from runtime.device.choose import default_threads


def describe() -> dict[str, Any]:
    """Return machine, versions, date and commit: the "environment" of a result.

    The key "target" contains the CPU's instruction set in use (isa); results that are committed
    already have this key.
    """
    from runtime.opencv import cv2

    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
        else:  # On ARM /proc/cpuinfo has no model name, but the device tree may have the board's.
            board = Path("/proc/device-tree/model")
            cpu = board.read_text().strip("\0\n") if board.exists() else cpu
    except OSError:
        pass  # not Linux
    return {
        "cpu": cpu,
        "threads": default_threads(),
        "target": runtime.isa(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
    }


def commit() -> str:
    """Return git's description of the source tree, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
