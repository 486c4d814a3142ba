"""Which GPU is here: a CUDA driver of our own making answers, found as a real one would be."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import case

from runtime.device import driver as drv
from runtime.errors import DeviceError, InputError

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30

# Two GPUs: an RTX 3060 with 12 GiB, 10 free, and an integrated Orin with 8 GiB. As the real driver
# does, it wants cuInit first, hands out contexts only if it can, and knows free memory only while
# one is current. FAKE_* in the environment make it fail; FAKE_LOG counts what is retained.
DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static int ready, retained, pushed;
static int from(const char* name) { const char* v = getenv(name); return v ? atoi(v) : 0; }
int cuInit(unsigned flags) { (void)flags; ready = !from("FAKE_INIT"); return from("FAKE_INIT"); }
int cuDriverGetVersion(int* v) { *v = 12060; return 0; }
int cuGetErrorName(int code, const char** name) {
  *name = code == 803 ? "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" : 0;
  if (code == 999) *name = "CUDA_ERROR_UNKNOWN";
  return *name ? 0 : 1;
}
int cuDeviceGetCount(int* n) { *n = getenv("FAKE_COUNT") ? from("FAKE_COUNT") : 2; return !ready; }
int cuDeviceGet(int* d, int i) { *d = 70 + i; return i < 0 || i > 1; }
int cuDeviceGetName(char* name, int n, int d) {
  snprintf(name, n, "%s", d == 70 ? "NVIDIA GeForce RTX 3060" : "Orin");
  return from("FAKE_NAME");
}
int cuDeviceTotalMem_v2(size_t* b, int d) { *b = (size_t)(d == 70 ? 12 : 8) << 30; return 0; }
int cuDeviceGetAttribute(int* v, int what, int d) {
  if (what == 75) *v = 8;
  else if (what == 76) *v = d == 70 ? 6 : 7;
  else if (what == 18) *v = d == 71;
  else return 1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** c, int d) {
  if (from("FAKE_RETAIN")) return from("FAKE_RETAIN");
  ++retained;
  *c = d == 70 ? &retained : NULL;
  return d != 70;
}
int cuCtxPushCurrent_v2(void* c) { pushed += c == &retained; return c != &retained; }
int cuMemGetInfo_v2(size_t* f, size_t* t) {
  if (!pushed) return 201;
  *f = (size_t)10 << 30; *t = (size_t)12 << 30;
  return from("FAKE_MEMORY");
}
int cuCtxPopCurrent_v2(void** c) { *c = &retained; --pushed; return 0; }
int cuDevicePrimaryCtxRelease_v2(int d) {
  (void)d;
  --retained;
  FILE* log = getenv("FAKE_LOG") ? fopen(getenv("FAKE_LOG"), "w") : NULL;
  if (log) { fprintf(log, "%d %d", retained, pushed); fclose(log); }
  return 0;
}
"""

ASK = """
import json
from dataclasses import asdict
from runtime.device import driver as device
from runtime.errors import DeviceError
try:
    devices = [asdict(d) for d in device.cuda_devices()]
except DeviceError as error:
    devices = str(error)
problem = device.cuda_problem()
kind, fix = (type(problem).__name__, problem.fix) if problem else ("", "")
print(json.dumps([device.cuda_absence(), kind, fix, device.cuda_driver_version(), devices]))
"""


def compile_library(source, path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) to make a CUDA driver with")
    command = [compiler, "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)


def ask(folder, **environment):
    """What runtime.device says in a process that finds its driver in ``folder``."""
    kept = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    environment = kept | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-c", ASK]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    compile_library(DRIVER, folder / "libcuda.so.1")
    return folder


@pytest.fixture(scope="module")
def broken_driver(tmp_path_factory):
    """A library of the driver's name that has none of its functions."""
    folder = tmp_path_factory.mktemp("broken")
    compile_library("int nothing;", folder / "libcuda.so.1")
    return folder


def test_two_gpus_are_described_and_their_contexts_given_back(driver, tmp_path):
    log = tmp_path / "log"
    absence, kind, fix, version, devices = ask(driver, FAKE_LOG=str(log))
    assert (absence, kind, fix, version) == ("", "", "", "12.6")
    rtx, orin = devices
    assert rtx == {
        "index": 0,
        "name": "NVIDIA GeForce RTX 3060",
        "compute_capability": "8.6",
        "memory_bytes": 12 * GIB,
        "free_bytes": 10 * GIB,
    }
    assert (orin["index"], orin["name"], orin["compute_capability"]) == (1, "Orin", "8.7")
    assert 0 < orin["free_bytes"] < 2**50 and orin["memory_bytes"] == 8 * GIB
    assert log.read_text() == "0 0"  # neither retained nor current any more


def test_a_gpu_that_gives_no_context_has_no_free_memory(driver):
    *_, devices = ask(driver, FAKE_RETAIN="2")
    assert devices[0]["free_bytes"] == 0 and devices[1]["free_bytes"] > 0


def test_contexts_are_given_back_when_the_driver_fails_meanwhile(driver, tmp_path):
    log = tmp_path / "log"
    *_, devices = ask(driver, FAKE_MEMORY="999", FAKE_LOG=str(log))
    assert "cuMemGetInfo_v2 returns 999 (CUDA_ERROR_UNKNOWN)\n  fix: " in devices
    assert log.read_text() == "0 0"


def test_a_gpu_that_cannot_be_described_is_an_error(driver):
    *_, devices = ask(driver, FAKE_NAME="4")
    assert devices.startswith("the CUDA driver fails: cuDeviceGetName returns 4 (unnamed)")


def test_a_driver_that_does_not_start_says_its_code(driver):
    for code, why, fix in [
        (803, "cuInit returns 803 (CUDA_ERROR_SYSTEM_DRIVER_MISMATCH)", "restart the machine"),
        (999, "cuInit returns 999 (CUDA_ERROR_UNKNOWN)", "/dev/nvidia"),
        (34, "cuInit returns 34 (unnamed)", "stubs"),
        (42, "cuInit returns 42 (unnamed)", "nvidia-smi"),
    ]:
        with case(code, why, fix):
            absence, kind, told, version, devices = ask(driver, FAKE_INIT=str(code))
            assert kind == "DeviceError" and absence == f"the CUDA driver does not start: {why}"
            assert fix in told and version == "12.6"
            assert devices == f"{absence}\n  fix: {told}"  # not an empty list


def test_a_driver_without_a_gpu(driver):
    for environment in [{"FAKE_INIT": "100"}, {"FAKE_COUNT": "0"}]:
        with case(environment):
            absence, kind, fix, _, devices = ask(driver, **environment)
            assert absence == "the CUDA driver finds no GPU" and kind == "MissingBackend"
            assert "nvidia-smi" in fix and devices == []


def test_hidden_gpus_are_said_to_be_hidden(driver):
    absence, *_ = ask(driver, FAKE_INIT="100", CUDA_VISIBLE_DEVICES="")
    assert absence == "the CUDA driver finds no GPU (CUDA_VISIBLE_DEVICES is '')"


def test_no_driver(tmp_path):
    (tmp_path / "libcuda.so.1").write_bytes(b"")  # hides a real one
    absence, kind, fix, version, devices = ask(tmp_path)
    assert absence.startswith("no CUDA driver: ") and "libcuda.so.1" in absence
    assert "\n" not in absence and kind == "MissingBackend" and "driver" in fix
    assert version is None and devices == []


def test_a_library_that_is_no_driver(broken_driver):
    absence, kind, fix, version, devices = ask(broken_driver)
    assert kind == "DeviceError"
    assert absence.startswith("libcuda.so.1 is no usable CUDA driver: ") and "cuInit" in absence
    assert fix == "install NVIDIA's driver" and version is None
    assert devices == f"{absence}\n  fix: {fix}"  # not an empty list


def test_the_driver_fails_with_a_device_error(driver, monkeypatch):
    monkeypatch.setenv("FAKE_NAME", "4")
    monkeypatch.setattr(drv, "_DRIVER", str(driver / "libcuda.so.1"))
    with pytest.raises(DeviceError, match=r"cuDeviceGetName returns 4 \(unnamed\)\n  fix: "):
        drv.cuda_devices()


def test_names_of_devices():
    for name, parsed in [
        ("cpu", ("cpu", 0)),
        ("cuda", ("cuda", 0)),
        ("cuda:0", ("cuda", 0)),
        ("cuda:12", ("cuda", 12)),
        ("0", ("cuda", 0)),
        ("3", ("cuda", 3)),
        (1, ("cuda", 1)),
    ]:
        with case(name):
            assert drv.parse_device(name) == parsed


def test_other_names_are_refused():
    wanted = r"device is .*; wanted 'cpu', 'cuda', or a GPU's number"
    names = ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:x", "cuda:1 ", "cuda:١", "-1", True, None]
    for name in names:
        with case(name), pytest.raises(InputError, match=wanted):
            drv.parse_device(name)


def test_release_of_linux_for_tegra(tmp_path, monkeypatch):
    for text, release in [
        (
            "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic, EABI: aarch64, "
            "DATE: Fri Sep 13 04:36:44 UTC 2024\n# KERNEL_VARIANT: oot\n",
            "36.4.0",
        ),
        (
            "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64\n",
            "38.2.0",
        ),
        (
            "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64, "
            "DATE: Tue Aug  1 19:57:35 UTC 2023\n",
            "35.4.1",
        ),
        ("# something else\n", None),
        ("", None),
    ]:
        with case(release):
            (tmp_path / "release").write_text(text)
            monkeypatch.setattr(drv, "_TEGRA_RELEASE", tmp_path / "release")
            assert drv.l4t() == release


def test_model_of_the_board(tmp_path, monkeypatch):
    for recorded, model in [
        (b"NVIDIA Jetson Orin Nano Developer Kit\0", "NVIDIA Jetson Orin Nano Developer Kit"),
        (b"Jetson-AGX\0", "Jetson-AGX"),
        (b"Raspberry Pi 5 Model B Rev 1.0\0", None),
        (b"\xff\xfe\0", None),
    ]:
        with case(recorded):
            (tmp_path / "model").write_bytes(recorded)
            monkeypatch.setattr(drv, "_TREE_MODEL", tmp_path / "model")
            assert drv.jetson_model() == model


def test_elsewhere_there_is_no_jetson(tmp_path, monkeypatch):
    monkeypatch.setattr(drv, "_TEGRA_RELEASE", tmp_path / "none")
    monkeypatch.setattr(drv, "_TREE_MODEL", tmp_path)  # a folder cannot be read either
    assert drv.l4t() is None and drv.jetson_model() is None


def test_available_memory_is_read_from_the_kernel(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:        7802092 kB\nMemAvailable:    5123456 kB\n")
    monkeypatch.setattr(drv, "_MEMINFO", meminfo)
    assert drv._memory_available() == 5123456 * 1024
    meminfo.write_text("MemTotal:        7802092 kB\n")
    assert drv._memory_available() == 0


def test_platform_tag_names_system_and_processor():
    system, processor = drv.platform_tag().split("-")
    assert system == sys.platform and processor == os.uname().machine
