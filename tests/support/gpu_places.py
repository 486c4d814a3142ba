"""Where the tests of tests/cuda/test_gpu.py run: on a GPU if there is one, else on the host."""

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
    large = (180, 240)
    runs, slack = 200, 2**23  # of streams that are not done yet

    @functools.cached_property
    def torch(self):
        """Loaded by the tests that need it: it is slow under compute-sanitizer."""
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
        """Our array as PyTorch's."""
        return self.torch.from_dlpack(array)

    def used(self):
        """Bytes of the GPU that somebody has."""
        self.torch.cuda.synchronize()
        free, total = self.torch.cuda.mem_get_info()
        return total - free

    @contextlib.contextmanager
    def too_small(self):
        """The size of a Refiner that no GPU has the memory for."""
        yield 2**14, 2**14


class OnHost:
    """Arrays of NumPy that play the GPU's, on the module that runs on the host."""

    name = "host"
    sizes = ((1, 1), (1, 7), (5, 7))
    upsamplings = (((1, 1), (3, 2)), ((3, 5), (7, 11)))
    large = (12, 16)
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
    """All of them on a GPU, the first where there is none."""
    return cases[:1] if ABSENCE else cases
