"""Sensors and clocks, from files laid out as a Jetson, a PC and a virtual machine have them."""

import sys
import time
import types

import pytest

from benchmarks import machine


def lay(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


ORIN_NX = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/"


@pytest.fixture
def orin(tmp_path):
    """Jetson Orin NX: three rails, and the sum channels that have no current of their own."""
    files = {
        "in1_label": "VDD_IN\n", "in1_input": "5072\n", "curr1_input": "1248\n",
        "in2_label": "VDD_CPU_GPU_CV\n", "in2_input": "5064\n", "curr2_input": "336\n",
        "in3_label": "VDD_SOC\n", "in3_input": "5064\n", "curr3_input": "288\n",
        "in7_label": "sum of shunt voltages\n", "in7_input": "1\n",
    }  # fmt: skip
    return lay(tmp_path, {ORIN_NX + k: v for k, v in files.items()})


def test_rails_of_a_jetson(orin):
    found = machine.rails(orin)
    assert found == {
        "VDD_IN": pytest.approx(6.329856),
        "VDD_CPU_GPU_CV": pytest.approx(1.701504),
        "VDD_SOC": pytest.approx(1.458432),
    }
    assert machine.board_watts(orin) == found["VDD_IN"]  # the whole, not the sum of whole and parts
    (orin / ORIN_NX / "in1_label").unlink()
    assert machine.board_watts(orin) == pytest.approx(1.701504 + 1.458432)
    assert machine.board_watts(orin / "nothing") is None


def test_clocks_and_temperatures(tmp_path):
    lay(tmp_path, {
        "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "729600\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "schedutil\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": "729600\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "1984000\n",
        "sys/devices/system/cpu/cpufreq/policy4/scaling_cur_freq": "1984000\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "48281\n",
        "sys/class/thermal/thermal_zone1/type": "cv0-thermal\n",
        "sys/class/thermal/thermal_zone1/temp": "-256000\n",  # switched off
        "sys/class/thermal/thermal_zone2/type": "gpu-thermal\n",
        "proc/loadavg": "1.25 0.80 0.60 2/345 6789\n",
    })  # fmt: skip
    state = machine.state(tmp_path)
    assert state["cpu_mhz"] == [729.6, 1984.0] and state["load_average"] == 1.25
    assert state["celsius"] == {"cpu-thermal": 48.281}
    found = machine.description(tmp_path)
    assert found["governors"] == ["schedutil"] and found["cpu_mhz_limits"] == [[729.6, 1984.0], []]


def test_a_virtual_machine_has_its_clock_in_cpuinfo(tmp_path):
    lay(
        tmp_path, {"proc/cpuinfo": "processor\t: 0\ncpu MHz\t\t: 2595.124\n\ncpu MHz\t\t: 2600.0\n"}
    )
    assert machine.cpu_mhz(tmp_path) == [2595.124, 2600.0]
    assert machine.cpu_mhz(tmp_path / "nothing") == []
    empty = machine.state(tmp_path / "nothing")
    assert empty["load_average"] is None and empty["celsius"] == {}


RAPL = "sys/class/powercap/intel-rapl:0/"


def test_rapl_counts_through_its_end(tmp_path):
    lay(tmp_path, {
        RAPL + "name": "package-0\n", RAPL + "energy_uj": "262143000000\n",
        RAPL + "max_energy_range_uj": "262143328850\n",
        "sys/class/powercap/intel-rapl:1/name": "psys\n",
        "sys/class/powercap/intel-rapl:1/energy_uj": "5\n",
    })  # fmt: skip
    with machine.PowerMeter(tmp_path) as meter:
        (tmp_path / RAPL / "energy_uj").write_text("1671150\n")
    assert "RAPL" in meter.source and meter.joules == pytest.approx(2.0)


def test_a_sensor_is_integrated_over_time(orin, monkeypatch):
    meter, read = machine.PowerMeter(orin), []
    monkeypatch.setattr(
        meter, "watts", lambda: read.append(time.monotonic()) or machine.rails(orin)["VDD_IN"]
    )
    with meter:
        deadline = time.monotonic() + 60
        while len(read) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "INA3221" in meter.source and len(read) >= 5
    # From its start to its last reading: no less than from the first to the last but one.
    least, most = read[-2] - read[0], meter.seconds
    assert least <= meter.joules / machine.rails(orin)["VDD_IN"] <= most


def test_without_a_sensor_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "gpus", list)
    with machine.PowerMeter(tmp_path) as meter:
        pass
    assert meter.source is None and meter.joules == 0


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """nvidia-ml-py as it answers for one GPU whose clocks are throttled."""
    module = types.ModuleType("pynvml")
    module.NVMLError = NVMLError
    module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM, module.NVML_TEMPERATURE_GPU = 1, 2, 0
    for name, value in {
        "nvmlInit": None, "nvmlShutdown": None, "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": "handle", "nvmlDeviceGetName": b"NVIDIA H100 80GB HBM3",
        "nvmlSystemGetDriverVersion": "580.65.06", "nvmlDeviceGetTemperature": 61,
        "nvmlDeviceGetCurrentClocksThrottleReasons": 0x24, "nvmlDeviceGetPowerUsage": 350_500,
        "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(used=512 * 2**20),
    }.items():  # fmt: skip
        setattr(module, name, lambda *_, value=value: value)
    module.nvmlDeviceGetClockInfo = lambda _, kind: {1: 1980, 2: 2619}[kind]

    def unsupported(*_):
        raise NVMLError

    module.nvmlDeviceGetEnforcedPowerLimit = unsupported
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_a_gpu_through_nvml(nvml):
    (gpu,) = machine.gpus()
    assert gpu == {
        "name": "NVIDIA H100 80GB HBM3", "driver": "580.65.06", "sm_mhz": 1980, "memory_mhz": 2619,
        "celsius": 61, "watts": 350.5, "limit_watts": None, "used_mib": 512,
        "throttle": ["software power cap", "software thermal slowdown"],
    }  # fmt: skip
    assert "NVML" in machine.power_source(machine.Path("/nothing"))


def test_no_nvml_and_no_driver(nvml, monkeypatch):
    def fails():
        raise NVMLError

    nvml.nvmlInit = fails
    assert machine.gpus() == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert machine.gpus() == []


def test_versions_of_what_is_installed(monkeypatch):
    import numpy

    monkeypatch.setattr(machine, "LIBRARIES", ("numpy", "no-such-library"))
    assert machine.versions() == {"numpy": numpy.__version__}


def test_throttle_reasons_in_words():
    assert machine.throttle_reasons(0) == []
    assert machine.throttle_reasons(0x8 | 0x1000) == ["hardware slowdown", "unknown 0x1000"]
