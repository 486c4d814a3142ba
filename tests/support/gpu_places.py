"""Two places where tests/cuda/test_gpu.py runs: a GPU, or the host on a machine without a GPU."""

import contextlib
import functools

import pytest
from foreign_arrays import Interface, Relabelled

import runtime
from runtime.device.driver import cuda_absence

ABSENCE = cuda_absence() or ("" if "cuda" in runtime.devices() else "runtime._cuda cannot run here")
needs_gpu = pytest.mark.skipif(bool(ABSENCE), reason=f"no GPU to test on: {ABSENCE}")
FULL = (1080, 1920)


class OnGpu:
    """Arrays of PyTorch on the GPU, on its current stream."""

    name = "gpu"
    sizes = ((1, 1), (1, 37), (33, 1), (65, 129), (270, 481), (719, 1283), FULL)
    upsamplings = (
        ((1, 1), (7, 5)),
        ((24, 31), (97, 131)),
        ((180, 240), (360, 480)),
        ((270, 480), FULL),
    )
    small, large = (13, 37), (180, 240)
    runs, slack = 200, 2**23  # the work of streams may not be finished

    @functools.cached_property
    def torch(self):
        """PyTorch, which is imported only by tests that use it: compute-sanitizer makes it slow."""
        torch = pytest.importorskip("torch", reason="needs PyTorch on the GPU")
        if not torch.cuda.is_available():
            pytest.skip("this PyTorch sees no GPU")
        return torch

    def put(self, array):
        return self.torch.from_numpy(array).cuda()

    def pointer(self, array):
        return array.data_ptr()

    def stream(self):
        return self.torch.cuda.current_stream().cuda_stream

    def take(self, array):
        """Return an array of the module as a tensor of PyTorch."""
        return self.torch.from_dlpack(array)

    def used(self):
        """Return the used bytes of the GPU's memory."""
        self.torch.cuda.synchronize()
        free, total = self.torch.cuda.mem_get_info()
        return total - free

    @contextlib.contextmanager
    def too_small(self):
        """Return the size of a Refiner that needs more memory than any GPU has."""
        yield 2**14, 2**14


class OnHost:
    """Arrays of NumPy that stand for arrays on a GPU; the module runs on the host."""

    name = "host"
    sizes = ((1, 1), (1, 7), (5, 7))
    upsamplings = (((1, 1), (3, 2)), ((3, 5), (7, 11)))
    small, large = (5, 9), (12, 16)
    runs, slack = 5, 0

    def __init__(self, cudart):
        self.cudart = cudart

    def put(self, array):
        return Interface(array)

    def pointer(self, array):
        return array.array.ctypes.data

    def stream(self):
        return None

    def take(self, array):
        torch = pytest.importorskip("torch", reason="needs PyTorch")
        return torch.from_dlpack(Relabelled(array))

    def used(self):
        return -self.cudart.allocations_left()

    @contextlib.contextmanager
    def too_small(self):
        self.cudart.allow_allocations(0)
        yield 8, 9
        self.cudart.allow_allocations(2**62)


def some(cases):
    """Return all cases on a GPU, and the first case without one."""
    return cases[:1] if ABSENCE else cases
