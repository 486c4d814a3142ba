"""Stand-ins for tensorrt, tensorrt_rtx, pycuda.driver and the driver's graph calls.

Device memory is a table of byte arrays, a plan is JSON that names a Python function. What goes into
the stream happens as late as it may: when somebody asks whether it is done. Behaviour is that of
the real packages' documentation; ``Fake`` says what shall go wrong.
"""

import ctypes
import itertools
import json
import sys
import types
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

import numpy as np

DataType = Enum("DataType", "FLOAT HALF BF16 INT32 INT64")
TensorIOMode = Enum("TensorIOMode", "INPUT OUTPUT")
NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64"}


OWN_STREAM = 77


class CudaError(Exception):
    pass


class CudaMemoryError(CudaError):
    pass


@dataclass
class Fake:
    """The state of the pretended GPU, and its faults.

    ``refuse``: names of calls that answer False or None, and "Builder" and "Runtime", which raise
    the TypeError of pybind11 for a null pointer. ``memory``: bytes that can be allocated.
    ``functions``: what plans compute, by name: a dict of arrays to a dict of arrays.
    """

    functions: dict = field(default_factory=dict)
    version: str = "10.3.0"
    capabilities: list = field(default_factory=lambda: [(8, 7)])
    refuse: set = field(default_factory=set)
    says: str = ""  # TensorRT's log line when it refuses
    hang: bool = False
    memory: int = 2**20
    codes: dict = field(default_factory=dict)  # of the driver's graph calls, 0 when left out
    raises: Exception | None = None  # by the next copy to the device
    no_driver: bool = False
    driver: str = "580.65"  # kernels compiled for one driver are refused by another
    calls: Counter = field(default_factory=Counter)
    blocks: dict = field(default_factory=dict)  # address -> bytearray
    contexts: int = 0  # pushed and not popped
    stream: list = field(default_factory=list)  # what has not happened yet
    captured: list | None = None
    graphs: dict = field(default_factory=dict)
    counter: itertools.count = field(default_factory=lambda: itertools.count(4096))

    def enqueue(self, stream, work):
        """The stream of PyCUDA is late; work on the CUDA module's is done at once."""
        if stream == OWN_STREAM:
            self.stream.append(work)
        else:
            work()

    def call(self, name):
        assert self.contexts > 0, f"{name} without a current CUDA context"
        self.calls[name] += 1
        return name not in self.refuse


def plan(function, inputs, outputs, profile=None, prefix=b""):
    """The bytes of a plan. Ports are name -> (shape, type name); -1 is a free dimension."""
    facts = {"function": function, "inputs": inputs, "outputs": outputs, "profile": profile or {}}
    return prefix + json.dumps(facts).encode()


def install(monkeypatch, **options):
    """Put the stand-ins in the place of the real modules, and return their state."""
    fake = Fake(**options)
    trt = module_tensorrt(fake, "tensorrt")
    rtx = module_tensorrt(fake, "tensorrt_rtx")
    rtx.CudaGraphStrategy = types.SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
    rtx.ICudaEngine, rtx.IRuntimeConfig, rtx.IRuntimeCache = Engine, RuntimeConfig, RuntimeCache
    cuda = module_pycuda(fake)
    pycuda = types.ModuleType("pycuda")
    pycuda.driver = cuda
    for name, module in {
        "tensorrt": trt,
        "tensorrt_rtx": rtx,
        "pycuda": pycuda,
        "pycuda.driver": cuda,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)

    def load(name):
        if fake.no_driver:
            raise OSError(f"{name}: cannot open shared object file")
        assert name == "libcuda.so.1"
        return Driver(fake)

    monkeypatch.setattr("ctypes.CDLL", load)
    return fake


def module_tensorrt(fake, name):
    trt = types.ModuleType(name)
    trt.__version__ = fake.version
    trt.TensorIOMode = TensorIOMode

    class ILogger:
        ERROR, INTERNAL_ERROR, WARNING, INFO = "E", "F", "W", "I"

        def __init__(self):
            pass

    class Started:
        """What the library makes; a null pointer becomes a TypeError, never None."""

        def __init__(self, log):
            self.log = log
            if type(self).__name__ in fake.refuse:
                log.log(ILogger.WARNING, fake.says)
                raise TypeError("pybind11::init(): factory function returned nullptr")

    class Builder(Started):
        pass

    class Runtime(Started):
        engine_host_code_allowed = False

        def deserialize_cuda_engine(self, data):
            assert self.engine_host_code_allowed is False
            self.log.log(ILogger.INFO, "Loaded engine size: 0 MiB")
            if not fake.call("deserialize"):
                self.log.log(ILogger.ERROR, fake.says)
                return None
            return Engine(fake, json.loads(data), self.log)

    trt.ILogger, trt.Builder, trt.Runtime = ILogger, Builder, Runtime
    return trt


class Engine:
    def __init__(self, fake, facts, log):
        self.fake, self.facts, self.log = fake, facts, log
        self.ports = {**facts["inputs"], **facts["outputs"]}
        self.num_io_tensors = len(self.ports)

    def get_tensor_name(self, i):
        return list(self.ports)[i]

    def get_tensor_shape(self, name):
        return tuple(self.ports[name][0])

    def get_tensor_dtype(self, name):
        return DataType[self.ports[name][1]]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self.facts["inputs"] else TensorIOMode.OUTPUT

    def get_tensor_profile_shape(self, name, index):
        assert index == 0
        return self.facts["profile"][name]

    def create_runtime_config(self):
        self.fake.call("create_runtime_config")
        return RuntimeConfig(self.fake)

    def create_execution_context(self, runtime_config=None):
        if not self.fake.call("create_execution_context"):
            self.log.log("E", self.fake.says)
            return None
        if runtime_config is not None:
            kernels = runtime_config.kernels()
            if self.facts["function"] not in kernels:
                self.fake.call("compile")
            kernels.add(self.facts["function"])
        return Context(self, runtime_config)


class RuntimeConfig:
    """IRuntimeConfig of TensorRT for RTX."""

    def __init__(self, fake):
        self.fake, self.cache, self.cuda_graph_strategy = fake, None, None

    def create_runtime_cache(self):
        return RuntimeCache(self.fake) if self.fake.call("create_runtime_cache") else None

    def get_runtime_cache(self):
        return self.cache

    def set_runtime_cache(self, cache=None):
        self.cache = cache
        return self.fake.call("set_runtime_cache")

    def kernels(self):
        return set() if self.cache is None else self.cache.compiled


class RuntimeCache:
    """IRuntimeCache of TensorRT for RTX. It asserts that no damaged bytes are given to it."""

    def __init__(self, fake):
        self.fake, self.compiled = fake, set()

    def serialize(self):
        if not self.fake.call("serialize"):
            return None
        return memoryview(json.dumps([self.fake.driver, sorted(self.compiled)]).encode())

    def deserialize(self, blob):
        assert self.fake.call("read_runtime_cache")
        driver, compiled = json.loads(bytes(blob))
        if driver != self.fake.driver:
            return False
        self.compiled = set(compiled)
        return True

    def reset(self):
        self.compiled = set()
        return True


class Context:
    def __init__(self, engine, config):
        self.engine, self.fake, self.config = engine, engine.fake, config
        self.shapes, self.addresses = {}, {}

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return self.fake.call("set_input_shape")

    def get_tensor_shape(self, name):
        """A free dimension of an output is that of the first input, counted from the end."""
        shape = self.engine.ports[name][0]
        if name in self.shapes:
            return self.shapes[name]
        if "output_shape" in self.fake.refuse:
            return tuple(shape)
        first = self.shapes[next(iter(self.engine.facts["inputs"]))]
        return tuple(
            d if d >= 0 else first[i - len(shape) + len(first)] for i, d in enumerate(shape)
        )

    def set_tensor_address(self, name, address):
        assert type(address) is int and address in self.fake.blocks
        self.addresses[name] = address
        return self.fake.call("set_tensor_address")

    def execute_async_v3(self, stream):
        assert set(self.addresses) == set(self.engine.ports)
        if not self.fake.call("execute_async_v3"):
            return False
        if self.fake.captured is not None:
            self.fake.captured.append((dict(self.addresses), self.compute))
        else:
            self.fake.enqueue(stream, partial(self.compute, dict(self.addresses)))
        return True

    def view(self, name, addresses):
        shape, dtype = self.get_tensor_shape(name), NUMPY[self.engine.ports[name][1]]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        block = np.frombuffer(self.fake.blocks[addresses[name]], np.uint8)[:size]
        return block.view(dtype).reshape(shape)

    def compute(self, addresses):
        facts = self.engine.facts
        inputs = {name: self.view(name, addresses).copy() for name in facts["inputs"]}
        for name, value in self.fake.functions[facts["function"]](inputs).items():
            self.view(name, addresses)[...] = value


def module_pycuda(fake):
    cuda = types.ModuleType("pycuda.driver")
    cuda.Error, cuda.MemoryError = CudaError, CudaMemoryError

    def init():
        if fake.no_driver:
            raise CudaError("cuInit failed: no CUDA-capable device is detected")

    class Device:
        def __init__(self, index):
            self.index = index

        @staticmethod
        def count():
            return len(fake.capabilities)

        def compute_capability(self):
            return fake.capabilities[self.index]

        def name(self):
            return f"Pretended GPU {self.index}"

        def retain_primary_context(self):
            return Context_

    class Context_:
        @staticmethod
        def push():
            fake.contexts += 1

        @staticmethod
        def pop():
            assert fake.contexts > 0
            fake.contexts -= 1

    class Stream:
        handle = OWN_STREAM

        def is_done(self):
            fake.call("is_done")
            while fake.stream and not fake.hang:
                fake.stream.pop(0)()
            return not fake.hang

    class Allocation:
        def __init__(self, size):
            used = sum(map(len, fake.blocks.values()))
            if used + size > fake.memory:
                raise CudaMemoryError("cuMemAlloc failed: out of memory")
            fake.call("mem_alloc")
            block = bytearray(size)
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(block))
            fake.blocks[self.address] = block

        def __int__(self):
            return self.address

        def __del__(self):
            if hasattr(self, "address"):
                del fake.blocks[self.address]

    def memcpy_htod_async(to, host, stream):
        fake.call("htod")
        assert isinstance(stream, Stream) and host.flags.c_contiguous
        if fake.raises is not None:
            raise fake.raises

        def copy(address=int(to)):
            fake.blocks[address][: host.nbytes] = host.tobytes()

        fake.stream.append(copy)

    def memcpy_dtoh_async(host, source, stream):
        fake.call("dtoh")
        assert isinstance(stream, Stream)

        def copy(address=int(source)):
            block = np.frombuffer(fake.blocks[address], np.uint8)[: host.nbytes]
            host[...] = block.view(host.dtype).reshape(host.shape)

        fake.stream.append(copy)

    cuda.init, cuda.Device, cuda.Context, cuda.Stream = init, Device, Context_, Stream
    cuda.mem_alloc, cuda.pagelocked_empty = Allocation, np.empty
    cuda.memcpy_htod_async, cuda.memcpy_dtoh_async = memcpy_htod_async, memcpy_dtoh_async
    cuda.mem_get_info = lambda: (fake.memory, 2 * fake.memory)
    return cuda


class Driver:
    """libcuda.so.1, as ctypes calls it."""

    def __init__(self, fake):
        self.fake = fake

    def __getattr__(self, name):
        if name not in GRAPH_CALLS or self.fake.codes.get(name) == "absent":
            raise AttributeError(f"undefined symbol: {name}")

        def function(*arguments):
            self.fake.call(name)
            return self.fake.codes.get(name) or GRAPH_CALLS[name](self.fake, *arguments) or 0

        return function


def begin(fake, stream, mode):
    assert stream.value == OWN_STREAM and mode == 1 and fake.captured is None
    fake.captured = []


def end(fake, stream, graph):
    graph._obj.value = next(fake.counter)
    fake.graphs[graph._obj.value], fake.captured = fake.captured, None


def instantiate(fake, launchable, graph, flags):
    assert flags.value == 0
    launchable._obj.value = next(fake.counter)
    fake.graphs[launchable._obj.value] = fake.graphs[graph.value]


def launch(fake, launchable, stream):
    for to, compute in fake.graphs[launchable.value]:
        fake.enqueue(stream.value, partial(compute, to))


def destroy(fake, handle):
    assert isinstance(handle, ctypes.c_void_p)
    del fake.graphs[handle.value]


GRAPH_CALLS = {
    "cuStreamBeginCapture_v2": begin,
    "cuStreamEndCapture": end,
    "cuGraphInstantiateWithFlags": instantiate,
    "cuGraphLaunch": launch,
    "cuGraphExecDestroy": destroy,
    "cuGraphDestroy": destroy,
}
