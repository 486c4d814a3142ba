"""The machine of a measurement: its libraries, clocks, temperatures and power.

``root`` is the folder below which files are read: tests use a folder with the files of another
machine. A value that the machine does not state is None or absent; it is never a guess.
"""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path("/")
LIBRARIES = ("onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13", "pycuda", "torch")
SAMPLING = 0.05  # seconds between readings of a power sensor


def read(path: Path) -> str | None:
    """Return the stripped text of a small file; None if it is empty or cannot be read."""
    try:
        return path.read_text(errors="replace").strip() or None
    except OSError:
        return None


def number(path: Path) -> int | None:
    """Return the integer in a file, or None."""
    text = read(path)
    return int(text) if text and re.fullmatch(r"-?\d+", text) else None


def cpu_mhz(root: Path = ROOT) -> list[float]:
    """Return the current clock of each processor in MHz; an empty list if no file contains it.

    On most virtual machines /proc/cpuinfo contains a constant.
    """
    policies = sorted(root.glob("sys/devices/system/cpu/cpufreq/policy*/scaling_cur_freq"))
    clocks = [n / 1e3 for n in map(number, policies) if n is not None]
    if clocks:
        return clocks
    found = re.findall(r"^cpu MHz\s*: ([\d.]+)", read(root / "proc/cpuinfo") or "", re.MULTILINE)
    return [float(n) for n in found]


def temperatures(root: Path = ROOT) -> dict[str, float]:
    """Return the temperature of each thermal zone in degrees Celsius, by its name."""
    out = {}
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*")):
        value = number(zone / "temp")
        if value is not None and -40_000 < value < 200_000:
            out[read(zone / "type") or zone.name] = value / 1e3
    return out


def rails(root: Path = ROOT) -> dict[str, float]:
    """Return the power of each rail of a Jetson in watts, by its label.

    A rail is a labelled channel of an INA3221 sensor; its power is its voltage times its current.
    """
    out = {}
    for sensor in sorted(root.glob("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*")):
        for label in sorted(sensor.glob("in*_label")):
            channel = label.name.removeprefix("in").removesuffix("_label")
            milliamps = number(sensor / f"curr{channel}_input")
            millivolts = number(sensor / f"in{channel}_input")
            name = read(label)
            if name and milliamps is not None and millivolts is not None:
                out[name] = milliamps * millivolts / 1e6
    return out


def board_watts(root: Path = ROOT) -> float | None:
    """Return the power of the whole Jetson in watts: VDD_IN, or else the sum of the rails.

    Returns
    -------
    None if the machine has no INA3221 sensor.
    """
    found = rails(root)
    if not found:
        return None
    return found["VDD_IN"] if "VDD_IN" in found else sum(found.values())


def package_joules(root: Path = ROOT) -> dict[str, tuple[int, int]]:
    """Return the RAPL energy counter of each processor package, by its name.

    Returns
    -------
    (the counter, the value after which it starts again from 0), both in microjoules.
    """
    out = {}
    for zone in sorted(root.glob("sys/class/powercap/intel-rapl:*")):
        name, energy = read(zone / "name"), number(zone / "energy_uj")
        if name and name.startswith("package") and energy is not None:
            out[name] = (energy, number(zone / "max_energy_range_uj") or 2**62)
    return out


def gpus() -> list[dict[str, Any]]:
    """Describe the GPUs through NVML: name, driver, clocks (MHz), temperature (degrees Celsius),
    power and its limit (W), reasons of throttling, and used memory (MiB).

    Returns
    -------
    A dict for each GPU; a value that NVML does not return is None. The list is empty without
    nvidia-ml-py, without a driver, and on a Jetson, whose NVML has few of these functions.
    """
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []

    def ask(function: str, *args: Any) -> Any:
        try:
            answer = getattr(pynvml, function)(*args)
        except pynvml.NVMLError:
            return None
        return answer.decode() if isinstance(answer, bytes) else answer

    out = []
    try:
        for index in range(ask("nvmlDeviceGetCount") or 0):
            gpu = ask("nvmlDeviceGetHandleByIndex", index)
            if gpu is None:
                continue
            bits = ask("nvmlDeviceGetCurrentClocksThrottleReasons", gpu)
            draw, limit = (
                ask(f"nvmlDeviceGet{what}", gpu) for what in ("PowerUsage", "EnforcedPowerLimit")
            )
            memory = ask("nvmlDeviceGetMemoryInfo", gpu)
            out.append(
                {
                    "name": ask("nvmlDeviceGetName", gpu),
                    "driver": ask("nvmlSystemGetDriverVersion"),
                    "sm_mhz": ask("nvmlDeviceGetClockInfo", gpu, pynvml.NVML_CLOCK_SM),
                    "memory_mhz": ask("nvmlDeviceGetClockInfo", gpu, pynvml.NVML_CLOCK_MEM),
                    "celsius": ask("nvmlDeviceGetTemperature", gpu, pynvml.NVML_TEMPERATURE_GPU),
                    "watts": None if draw is None else draw / 1e3,
                    "limit_watts": None if limit is None else limit / 1e3,
                    "throttle": None if bits is None else throttle_reasons(bits),
                    "used_mib": None if memory is None else round(memory.used / 2**20),
                }
            )
    finally:
        pynvml.nvmlShutdown()
    return out


_THROTTLE = {  # bits of nvmlClocksEventReasons
    0x1: "idle",
    0x2: "applications clocks setting",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks setting",
}


def throttle_reasons(bits: int) -> list[str]:
    """Return the names of the reasons in NVML's bit mask."""
    named = [name for bit, name in _THROTTLE.items() if bits & bit]
    rest = bits & ~sum(_THROTTLE)
    return named + ([f"unknown {rest:#x}"] if rest else [])


def state(root: Path = ROOT) -> dict[str, Any]:
    """Return the values that may change during a measurement. Benchmarks read them before and after
    a measurement."""
    loads = (read(root / "proc/loadavg") or "").split()
    return {
        "load_average": float(loads[0]) if loads else None,
        "cpu_mhz": cpu_mhz(root),
        "celsius": temperatures(root),
        "gpus": gpus(),
    }


def description(root: Path = ROOT) -> dict[str, Any]:
    """Return the values that do not change: library versions, governors, clock limits (MHz), names
    of power rails, and a Jetson's model, release and modes."""
    from runtime.tools import probe

    policies = sorted(root.glob("sys/devices/system/cpu/cpufreq/policy*"))
    governors = sorted({g for p in policies if (g := read(p / "scaling_governor"))})
    limits = [
        (number(p / "scaling_min_freq"), number(p / "scaling_max_freq")) for p in policies
    ]  # fmt: skip
    return {
        "versions": versions(),
        "governors": governors,
        "cpu_mhz_limits": [[n / 1e3 for n in pair if n is not None] for pair in limits],
        "jetson": probe.jetson(),
        "rails": sorted(rails(root)),
    }


def versions() -> dict[str, str]:
    """Return the versions of those LIBRARIES that are installed."""
    from runtime.tools import probe

    installed = probe.owners_of_modules().values()
    found = {k: v for distributions in installed for k, v in distributions.items()}
    return {name: found[name] for name in LIBRARIES if name in found}


def power_source(root: Path = ROOT) -> str | None:
    """Return which sensors :class:`PowerMeter` reads; None if the machine has no sensor."""
    if rails(root):
        return "the board's INA3221 sensors"
    if any(g["watts"] is not None for g in gpus()):
        return "the GPUs, through NVML"
    if package_joules(root):
        return "the processor packages, through RAPL"
    return None


class PowerMeter:
    """Measures the energy that the machine uses during the block of a with statement.

    RAPL's counters are read at both ends of the block. Other sensors are read every SAMPLING
    seconds; the power of a reading counts for the time since the reading before. At the end of the
    block ``seconds`` and ``joules`` are set; without a sensor ``joules`` is 0.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root, self.source = root, power_source(root)
        self.joules = self.seconds = 0.0
        self._counts = self.source is not None and "RAPL" in self.source
        self._before: dict[str, tuple[int, int]] = {}
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="power", daemon=True)

    def watts(self) -> float:
        """Return the power in watts that the board's or the GPUs' sensors measure now."""
        board = board_watts(self.root)
        return sum(g["watts"] or 0.0 for g in gpus()) if board is None else board

    def _sample(self) -> None:
        """Add up the energy of the readings until the block ends."""
        last = time.monotonic()
        while not self._ends.wait(SAMPLING):
            now = time.monotonic()
            self.joules += self.watts() * (now - last)
            last = now

    def __enter__(self) -> PowerMeter:
        self._start = time.monotonic()
        if self._counts:
            self._before = package_joules(self.root)
        elif self.source is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._counts:
            after = package_joules(self.root)
            for name, (count, wraps) in self._before.items():
                self.joules += (after.get(name, (count, wraps))[0] - count) % wraps / 1e6
        elif self.source is not None:
            self._ends.set()
            self._thread.join()
        self.seconds = time.monotonic() - self._start
