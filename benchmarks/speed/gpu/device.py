"""Measure time and memory on the GPU, and describe the GPU."""

from __future__ import annotations

import gc
import subprocess
import time
from collections.abc import Callable
from typing import Any

from runtime.device.choose import cuda_module, module_of
from runtime.errors import MissingBackend, SdkError

AHEAD = 20_000_000  # clock cycles that the GPU waits while the host queues a burst
FAST = ("tf32", "fp16")  # PyTorch's precisions that are compared with our fp16


class Gpu:
    """The GPU of the measurements. The tests replace this class by one for the host."""

    name = "cuda"

    def __init__(self) -> None:
        import torch

        self.torch, self.cuda = torch, torch.cuda
        torch.backends.cudnn.benchmark = True  # PyTorch chooses its fastest convolutions

    def stream(self) -> int | None:
        """Return PyTorch's current stream, a cudaStream_t as an integer. Our functions work on this
        stream, too."""
        return self.cuda.current_stream().cuda_stream

    def time(
        self, run: Callable[[], Any], after: Callable[[], Any] | None = None, *, ahead: bool = False
    ) -> tuple[float, float]:
        """Time one run.

        Parameters
        ----------
        run : the run.
        after : called after ``run``, before the host waits for the device.
        ahead : the device first waits for AHEAD clock cycles, so that the host can queue all of
            ``run`` before the device begins.

        Returns
        -------
        Milliseconds of ``run`` by the device's clock, and of ``run`` and ``after`` by the wall
        clock.
        """
        first, last = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.cuda.synchronize()
        if ahead:
            self.cuda._sleep(AHEAD)
        begin = time.perf_counter()
        first.record()
        run()
        last.record()
        if after is not None:
            after()
        self.cuda.synchronize()
        wall = time.perf_counter() - begin
        return first.elapsed_time(last), 1e3 * wall

    def record(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """Record a step as a CUDA graph; returns the function that replays it."""
        side = self.cuda.Stream()
        side.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(side):
            for _ in range(3):
                step()
        self.cuda.current_stream().wait_stream(side)
        graph = self.cuda.CUDAGraph()
        with self.cuda.graph(graph):
            step()
        return graph.replay

    def peak(self, make: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        """Call a function and measure the device memory that it needs.

        Returns
        -------
        The result of ``make``; and MiB: "torch" is the peak of PyTorch's own allocations, "others"
        is the memory that others than PyTorch hold more after the call than before.
        """
        self.clean()
        self.cuda.reset_peak_memory_stats()
        before, others = self.cuda.memory_allocated(), self._others()
        made = make()
        self.cuda.synchronize()
        peak = self.cuda.max_memory_allocated() - before
        mib = {"torch": peak / 2**20, "others": (self._others() - others) / 2**20}
        return made, {name: round(n, 1) for name, n in mib.items()}

    def _others(self) -> int:
        """Return the bytes of device memory that are used, but not by PyTorch's allocator."""
        free, total = self.cuda.mem_get_info()
        return total - free - self.cuda.memory_reserved()

    def clean(self) -> None:
        """Free unused memory of Python and of PyTorch."""
        gc.collect()
        self.cuda.synchronize()
        self.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        """Return the GPU's properties, and the versions of PyTorch and of the CUDA module."""
        found, module = self.cuda.get_device_properties(0), cuda_module()
        torch = self.torch
        return {
            "name": found.name,
            "compute_capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "l2_bytes": getattr(found, "L2_cache_size", None),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "module_architectures": module.architectures(),
            "module_cuda": module.runtime_version(),
        }


def set_precision(torch: Any, precision: str) -> None:
    """Allow TF32 in PyTorch's convolutions and matrix products if ``precision`` is one of FAST;
    otherwise forbid it."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision in FAST


def find_gpu() -> Gpu:
    """Check that the benchmark can run, and return the GPU.

    Raises
    ------
    MissingBackend : PyTorch, SciPy, the CUDA module or a GPU is missing.
    """
    fix = "on a machine with a GPU, nvcc and PyTorch: benchmarks/speed/gpu_check.sh FOLDER"
    try:
        import scipy  # noqa: F401  the statistics need it
        import torch
    except ImportError as error:
        why = f"PyTorch and SciPy are needed, but {error}"
        raise MissingBackend(why, fix="pip install torch scipy") from error
    try:
        module_of("cuda")
    except SdkError as error:
        raise MissingBackend(f"no GPU to measure: {error.message}", fix=error.fix or fix) from error
    if not torch.cuda.is_available():
        raise MissingBackend(
            f"PyTorch {torch.__version__} sees no GPU", fix="install PyTorch for CUDA"
        )
    return Gpu()


def nvidia_smi() -> dict[str, str]:
    """Return the driver, clocks, power and temperature of GPU 0 now; empty without nvidia-smi."""
    fields = (
        *("name", "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm"),
        *("clocks.max.mem", "power.draw", "power.limit", "temperature.gpu"),
    )
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (word.strip() for word in done.stdout.split(",")), strict=False))
