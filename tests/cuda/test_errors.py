"""Errors of the CUDA runtime: the message names cause and fix, and nothing crashes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import case

import runtime
from runtime.device import faults
from runtime.device.driver import CudaDevice
from runtime.device.faults import CUDA_FAULTS, cuda_error, cuda_lost
from runtime.errors import DeviceError

ROOT = Path(__file__).resolve().parents[2]
PLANES = np.ones((6, 7, 3), np.float32)
GIB = 2**30
TABLE = {  # code: what is said, and the fix
    2: ("GPU 0 is out of memory: 1.5 of 12.0 GiB are free", "a smaller scale or max_pixels, or "),
    34: ("GPU 0 fails", "stubs folder"),
    35: ("the driver is too old: it runs CUDA 12.6, this build needs 13.0", "update NVIDIA's dr"),
    100: ("the CUDA driver finds no GPU", "list the GPUs with nvidia-smi"),
    101: ("there is no GPU 0", "numbers begin at 0"),
    209: ("cuda:0 (RTX 3060) has compute capability 8.6; this build", "SEG_CUDA_ARCHS=86 pip "),
    214: ("GPU 0 is broken: its memory has an error that ECC cannot correct", "restart"),
    220: ("GPU 0 is broken: its NVLink", "nvidia-smi -q"),
    222: ("cuda:0 (RTX 3060) has compute capability 8.6; this build", "SEG_CUDA_ARCHS=86 pip "),
    226: ("GPU 0 is broken: its memory has an error", "restart the process"),
    400: ("GPU 0 fails", "run nvidia-smi and read its error"),
    802: ("GPU 0 fails", "systemctl start nvidia-fabricmanager"),
    803: ("GPU 0 fails", "restart the machine"),
    804: ("GPU 0 fails", "cuda-compat"),
    999: ("GPU 0 fails", "/dev/nvidia"),
} | {
    code: ("this process has lost its context on GPU 0 and cannot use the GPU any more", "report")
    for code in (700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911)
}


@pytest.fixture
def driver(monkeypatch):
    """A driver of CUDA 12.6 with one RTX 3060."""
    gpu = CudaDevice(0, "RTX 3060", "8.6", 12 * GIB, 3 * GIB // 2)
    monkeypatch.setattr(faults, "cuda_devices", lambda: [gpu])
    monkeypatch.setattr(faults, "cuda_driver_version", lambda: "12.6")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


class Planes:
    """An array of the module with Numba's interface only."""

    def __init__(self, array):
        self.__cuda_array_interface__ = array.__cuda_array_interface__


def test_each_code_names_cause_and_fix(cuda, cudart, driver):
    for code, (what, fix) in sorted(TABLE.items()):
        with case(code):
            there = cuda.to_device(PLANES)
            cudart.plant(code, sticky=code in CUDA_FAULTS)
            with pytest.raises(DeviceError) as error:
                runtime.guided_filter(PLANES, there, device="cuda")
            said, told = str(error.value).split("\n  fix: ")
            assert said.startswith(what) and said.endswith(")"), said
            assert (
                "(cudaGetDevice(&current): cudaError" in said
            )  # the call, and the runtime's own words
            assert fix in told and told == error.value.fix
            if code in CUDA_FAULTS:
                with pytest.raises(DeviceError, match="lost by an earlier error: cudaGetDevice"):
                    there.numpy()
            else:
                np.testing.assert_array_equal(there.numpy(), PLANES)  # the next call succeeds
        cudart.recover()


def test_the_table_has_every_fault():
    assert CUDA_FAULTS <= set(TABLE)


def test_every_call_in_turn_may_fail(cuda, cudart, driver):
    """The error is a DeviceError that names the call, and later results are right."""
    wanted = cuda.guided_filter(PLANES, PLANES, 2, 1e-3, 1)
    there = cuda.to_device(PLANES)
    named, spared = set(), 0
    while True:
        cudart.plant(400, spared=spared)
        try:
            out = cuda.guided_filter(PLANES, Planes(there), 2, 1e-3, 1, device=0, stream=5)
            out.__dlpack__(max_version=(1, 0), copy=True, stream=6)
            np.testing.assert_array_equal(out.numpy(), wanted)
        except DeviceError as error:
            assert "(cuda" in str(error) or "(shim::later" in str(error)
            named.add(str(error).partition("(")[2].partition("(")[0])
        if cudart.planted() == 400:  # all calls succeeded
            break
        spared += 1
    assert spared > 30 and named >= {
        *("cudaGetDevice", "cudaMemcpyAsync", "cudaStreamSynchronize", "cudaEventRecord"),
        *("cudaEventCreateWithFlags", "cudaEventQuery", "cudaStreamWaitEvent", "shim::later"),
        "cudaPointerGetAttributes",
    }


def test_messages_without_information_of_the_driver(cuda, monkeypatch):
    def fail():
        raise DeviceError("the CUDA driver fails")

    monkeypatch.setattr(faults, "cuda_driver_version", lambda: None)
    for devices in (lambda: [], fail):
        monkeypatch.setattr(faults, "cuda_devices", devices)
        assert str(cuda_error(2, "call", 0)).startswith("GPU 0 is out of memory (call)\n")
        error = cuda_error(209, "call", 0)
        assert "GPU 0 and its driver cannot run the code of this build: 7.5, 9.0, 9.0+ptx" in str(
            error
        )
        assert "SEG_CUDA_ARCHS=<its compute capability>" in error.fix
    error = cuda_error(35, "call", 0)
    assert str(error) == "there is no CUDA driver (call)\n  fix: install NVIDIA's driver"


def test_a_lost_gpu_is_not_used_again(cuda, cudart, driver):
    there = cuda.to_device(PLANES)
    others = [cuda.as_array(there).reshape(6, 21), there.__dlpack__(), cuda.to_device(PLANES)]
    cudart.plant(719)
    with pytest.raises(DeviceError, match="has lost its context on GPU 0"):
        there.numpy()
    cudart.plant(400)  # what the next call would answer
    said = r"was lost by an earlier error: cuda\w+\(.*cudaErrorOther.*\n  fix: restart the process"
    for call in (
        there.numpy,
        there.__dlpack__,
        lambda: cuda.to_device(PLANES),
        lambda: cuda.as_array(there),
        lambda: cuda.bilinear_coefficients(there),
        lambda: cuda.joint_upsample(there, there, 1),
        lambda: runtime.guided_filter(PLANES, PLANES, device="cuda"),
        lambda: runtime.joint_upsample(np.zeros((6, 7, 3), np.uint8), PLANES, device="cuda:1"),
    ):
        with pytest.raises(DeviceError, match=said):
            call()
    assert (there.shape, others[0].shape) == ((6, 7, 3), (6, 21))  # what needs no GPU
    others.clear()
    assert cudart.planted() == 400  # CUDA was not called


def test_faults_of_earlier_work_are_reported(cuda, cudart, driver):
    """A kernel's fault is reported by a later call; kept memory is released without an error."""
    values = cuda.to_device(PLANES)
    cudart.keep_busy(values.__cuda_array_interface__["stream"])
    out = cuda.shrink(values, 2, 2, 1)
    cudart.plant(700, sticky=True)
    with pytest.raises(DeviceError, match="has lost its context on GPU 0 and cannot use the GPU"):
        out.numpy()
    del out, values
    with pytest.raises(DeviceError, match="earlier error"):
        cuda.to_device(PLANES)


def test_the_message_of_a_lost_gpu():
    error = cuda_lost("cudaFree(p): cudaErrorIllegalAddress, an illegal memory access")
    assert str(error) == (
        "the GPU was lost by an earlier error: cudaFree(p): cudaErrorIllegalAddress, an illegal "
        "memory access; this process cannot use it any more\n  fix: restart the process"
    )


LOST_AT_THE_END = """
import sys
sys.path.insert(0, {support!r})
from cuda_module import loaded
from pathlib import Path
import numpy as np
import runtime
module, cudart = loaded(Path({path!r}))
runtime._cuda = sys.modules["runtime._cuda"] = module
there = module.to_device(np.ones((5, 6, 3), np.float32))
capsule = there.__dlpack__()
out = module.shrink(there, 2, 2, 1)
if {lost}:
    cudart.plant(719, sticky=True)
    try:
        out.numpy()
    except runtime.errors.DeviceError as error:
        print(error)
print("end")
"""


@pytest.mark.parametrize("lost", [False, True])
def test_python_ends_without_an_error(cuda_path, lost):
    """Arrays are alive, an export was not imported, and work is not finished."""
    support = str(ROOT / "tests/support")
    code = LOST_AT_THE_END.format(support=support, path=str(cuda_path), lost=lost)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    assert done.stdout.endswith("end\n") and ("has lost its context" in done.stdout) == lost
