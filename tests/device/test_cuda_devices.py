"""Which GPU can run the CUDA module, and what is said where none can."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from cases import case

ROOT = Path(__file__).resolve().parents[2]

# Who may use the module

ALL = ["7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "12.0", "12.0+ptx"]


def gpu(capability, index=0, name="Some GPU"):
    from runtime.device.driver import CudaDevice

    return CudaDevice(index, name, capability, 2**33, 2**32)


def test_which_gpu_can_run_what():
    from runtime.device.driver import no_code_for

    for capability, compiled, runs in [
        *[(c, ALL, True) for c in ("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "12.0")],
        ("10.3", ALL, True),  # machine code of the same major version, an older minor one
        ("12.1", ALL, True),
        ("13.0", ALL, True),  # by PTX
        ("7.0", ALL, False),
        ("11.0", ALL, False),  # 10.0 is another major version, and the PTX is newer
        ("8.6", ["8.7", "8.7+ptx"], False),
        ("8.9", ["8.7"], True),
        ("9.0", ["8.7"], False),
        ("9.0", ["8.7", "8.7+ptx"], True),
        ("10.0", ["9.0", "9.0+ptx"], True),  # as numbers, not as text
        ("9.0", ["10.0", "10.0+ptx"], False),
        ("9.0", [], False),
    ]:
        with case(capability, *compiled):
            assert bool(no_code_for(gpu(capability), compiled)) != runs


def test_a_gpu_without_code_is_told_why():
    from runtime.device.driver import no_code_for

    assert no_code_for(gpu("7.0", 1, "Tesla V100"), ALL) == (
        "cuda:1 (Tesla V100) has compute capability 7.0; this build has code for "
        "7.5, 8.0, 8.6, 8.7, 8.9, 9.0, 10.0, 12.0 and newer"
    )
    assert no_code_for(gpu("7.0"), ["8.7"]).endswith("has code for 8.7")


@pytest.fixture
def machine(monkeypatch):
    """A machine with the module and the GPUs that the test puts into the list."""
    from runtime.device import choose

    gpus, module = (
        [],
        types.SimpleNamespace(architectures=lambda: ALL, runtime_version=lambda: 13000),
    )
    monkeypatch.setattr(choose, "cuda_module", lambda: module)
    monkeypatch.setattr(choose, "cuda_problem", lambda: None)
    monkeypatch.setattr(choose, "cuda_devices", lambda: gpus)
    choose._cuda.cache_clear()
    yield types.SimpleNamespace(gpus=gpus, module=module, module_of=choose.module_of)
    choose._cuda.cache_clear()


def devices():
    import runtime

    return runtime.devices()


def test_a_gpu_that_can_run_the_module(machine):
    from runtime.device import choose

    machine.gpus.append(gpu("8.7"))
    for name in ["cuda", "cuda:0", "0"]:
        choose._cuda.cache_clear()
        with case(name):
            assert devices() == ["cpu", "cuda"] and machine.module_of(name) is machine.module


def test_one_gpu_of_two_can_run_the_module(machine):
    from runtime.errors import DeviceError

    machine.gpus += [gpu("7.0"), gpu("8.9", 1)]
    assert devices() == ["cpu", "cuda"] and machine.module_of("cuda:1") is machine.module
    fix = r"for 7.5, .*\n  fix: SEG_CUDA_ARCHS=70 pip install -e \..*nvcc on PATH"
    with pytest.raises(DeviceError, match=fix):
        machine.module_of("cuda")
    machine.gpus.pop()
    assert devices() == ["cpu"]


def test_a_gpu_that_is_not_there(machine):
    from runtime.errors import DeviceError

    machine.gpus += [gpu("8.6", 0, "RTX 3060"), gpu("8.7", 1, "Orin")]
    here = r"no cuda:2; this machine has cuda:0 \(RTX 3060\), cuda:1 \(Orin\)\n  fix: use one of "
    with pytest.raises(DeviceError, match=here):
        machine.module_of("cuda:2")


def test_a_gpu_that_cannot_be_described(machine, monkeypatch):
    from runtime.device import choose
    from runtime.errors import DeviceError

    def fail():
        raise DeviceError("the CUDA driver fails: cuDeviceGetName returns 4", fix="nvidia-smi")

    monkeypatch.setattr(choose, "cuda_devices", fail)
    assert devices() == ["cpu"]
    with pytest.raises(DeviceError, match="cuDeviceGetName returns 4"):
        machine.module_of("cuda")


def test_no_driver(machine, monkeypatch):
    from runtime.device import choose
    from runtime.errors import MissingBackend

    problem = MissingBackend("no CUDA driver: libcuda.so.1", fix="install NVIDIA's driver")
    monkeypatch.setattr(choose, "cuda_problem", lambda: problem)
    assert devices() == ["cpu"]
    for name in ("cuda", "cuda:7"):
        with pytest.raises(MissingBackend, match=r"no CUDA driver.*\n  fix: install NVIDIA's"):
            machine.module_of(name)


def test_a_driver_older_than_the_build(machine, monkeypatch):
    from runtime.device import driver
    from runtime.errors import DeviceError

    machine.gpus.append(gpu("9.0"))
    for version, able in (("12.9", False), ("13.0", True), ("14.1", True)):
        monkeypatch.setattr(driver, "cuda_driver_version", lambda version=version: version)
        assert devices() == ["cpu", "cuda"][: 1 + able]
    monkeypatch.setattr(driver, "cuda_driver_version", lambda: "12.9")
    with pytest.raises(DeviceError, match=r"too old: it runs CUDA 12\.9, this build needs 13\.0"):
        machine.module_of("cuda")


def test_an_answer_is_asked_for_once_and_a_refusal_again(machine, monkeypatch):
    from runtime.device import choose
    from runtime.errors import DeviceError

    with pytest.raises(DeviceError, match="no cuda:0"):
        machine.module_of("cuda")
    machine.gpus.append(gpu("9.0"))
    assert machine.module_of("cuda") is machine.module
    monkeypatch.delattr(choose, "cuda_devices")
    assert machine.module_of("cuda") is machine.module


def test_a_module_that_is_not_built(monkeypatch):
    from runtime.device import choose
    from runtime.errors import MissingBackend

    """Without a GPU the driver is what is missing first; a build there needs SEG_CUDA=1."""
    monkeypatch.setitem(sys.modules, "runtime._cuda", None)
    missing = MissingBackend("no CUDA driver: libcuda.so.1", fix="install NVIDIA's driver")
    monkeypatch.setattr(choose, "cuda_problem", lambda: missing)
    assert devices() == ["cpu"]
    choose._cuda.cache_clear()
    with pytest.raises(MissingBackend, match="no CUDA driver"):
        choose.module_of("cuda")
    built = r"CUDA module is not built .*\n  fix: "
    with pytest.raises(MissingBackend, match=built + r"SEG_CUDA=1 pip install .*nvcc on PATH"):
        choose.cuda_module()
    monkeypatch.setattr(choose, "cuda_problem", lambda: None)
    for call in (choose.cuda_module, lambda: choose.module_of("cuda")):
        with pytest.raises(MissingBackend, match=built + r"pip install .*nvcc on PATH"):
            call()


def test_other_names_are_no_devices():
    from runtime.device.choose import module_of
    from runtime.errors import InputError

    with pytest.raises(InputError, match="device is 'tpu'; wanted 'cpu', 'cuda', or"):
        module_of("tpu")
    assert module_of("cpu").isas()


# The module, as it is built here

ASK = """
import json, sys
import runtime
assert "runtime._cuda" not in sys.modules
devices = runtime.devices()
from runtime import _cuda
maps = open("/proc/self/maps").read()
print(json.dumps([devices, _cuda.architectures(), _cuda.runtime_version(), "libcuda" in maps]))
"""


def test_the_module_can_be_imported_without_a_driver(tmp_path):
    if importlib.util.find_spec("runtime._cuda") is None:
        pytest.skip("runtime._cuda is not built")
    (tmp_path / "libcuda.so.1").write_bytes(b"")  # hides a real one
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(tmp_path)}
    command = [sys.executable, "-c", ASK]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    devices, architectures, version, mapped = json.loads(done.stdout)
    assert devices == ["cpu"] and version >= 11040
    assert not mapped  # the CUDA runtime is inside; the driver is not there
    assert architectures and all(re.fullmatch(r"\d+\.\d(\+ptx)?", a) for a in architectures)
    assert [a for a in architectures if a.endswith("+ptx")] == [f"{architectures[-2]}+ptx"]
