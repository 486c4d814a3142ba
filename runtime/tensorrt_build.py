"""ONNX to engine, with TensorRT on the device or with TensorRT for RTX anywhere.

TensorRT for RTX has built every kind of network here without a GPU. Building with TensorRT itself
needs its GPU and has not been run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, NamedTuple

from runtime.checks import check_count
from runtime.device.driver import CudaDevice, cuda_absence, cuda_devices
from runtime.engine import Port
from runtime.errors import (
    BundleError,
    DeviceError,
    InputError,
    MissingBackend,
    VerificationFailed,
)

REBUILD = "python -m runtime build BUNDLE"
INSTALL = {
    "tensorrt": "pip install 'dynaguide-edge[trt]'; on a Jetson it comes with JetPack: apt-get "
    "install python3-libnvinfer, and a venv made with --system-site-packages",
    "tensorrt_rtx": "pip install 'dynaguide-edge[rtx]'",
}
AUTO_WORKSPACE = 2**31  # most that is taken unasked; else a quarter of the free memory
_LOG = logging.getLogger("dg.tensorrt")

Shape = tuple[int, ...]
Shapes = Mapping[str, tuple[Shape, Shape, Shape]]
Progress = Callable[[str, float], object]

# TensorRT's names of types, as ONNX Runtime spells them, and of the ones that layers compute in.
DTYPES = {
    "FLOAT": "tensor(float)",
    "HALF": "tensor(float16)",
    "BF16": "tensor(bfloat16)",
    "INT8": "tensor(int8)",
    "INT32": "tensor(int32)",
    "INT64": "tensor(int64)",
    "UINT8": "tensor(uint8)",
    "BOOL": "tensor(bool)",
}
_PRECISIONS = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "int8", "FP8": "fp8"}
_MATRIX = {"CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM"}
_PLUMBING = set(
    "CAST CONCATENATION CONSTANT FILL GATHER IDENTITY SHAPE SHUFFLE SLICE SQUEEZE UNSQUEEZE".split()
)
_OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|insufficient (memory|workspace)|MemoryAllocation|within workspace limit"
    r"|amount of GPU memory",
    re.IGNORECASE,
)


class PlanHeader(NamedTuple):
    """What a plan says of itself: its size in bytes, and the version that built it."""

    size: int
    version: str


@dataclass(frozen=True)
class Built:
    """A plan, as it goes to a file, and how it came about.

    ``receipt`` is JSON-able: ``source`` ("network" or "engine"); ``layers``, the number of layers
    per precision; ``matrix``, the same for convolutions and matrix products alone, by what they
    read; ``quantize``, the number of quantise and dequantise layers; ``other``, the layers that
    only move data or compute on integers.
    """

    plan: bytes
    inputs: list[Port]
    outputs: list[Port]
    receipt: dict[str, Any]
    seconds: float
    version: str
    compute_capabilities: tuple[str, ...]
    workspace: int | None
    timing_cache: bytes | None


def load_tensorrt(runtime: str) -> Any:
    """The module ``tensorrt`` or ``tensorrt_rtx``, of a version that this package knows.

    Raises
    ------
    InputError : another name.
    MissingBackend : not installed, without its libraries, or of another version.
    """
    if runtime not in INSTALL:
        raise InputError(f"runtime is {runtime!r}; wanted 'tensorrt' or 'tensorrt_rtx'")
    trt: Any
    try:
        if runtime == "tensorrt":
            import tensorrt

            trt = tensorrt
        else:
            import tensorrt_rtx

            trt = tensorrt_rtx
    except (ImportError, OSError) as error:  # OSError: the library beside the module
        raise MissingBackend(f"{runtime} is needed, but {error}", fix=INSTALL[runtime]) from error
    version = str(getattr(trt, "__version__", "of an unknown version"))
    number = [int(part) for part in re.findall(r"\d+", version)[:2]]
    if not hasattr(trt, "Builder") or (runtime == "tensorrt" and not [10, 3] <= number < [12]):
        raise MissingBackend(
            f"{runtime} {version} is installed; wanted TensorRT 10.3 or later, below 12",
            fix=INSTALL[runtime],
        )
    return trt


def supported_compute_capabilities() -> list[str]:
    """What the installed TensorRT for RTX can build for, e.g. ["7.5", "8.0", ...]."""
    names = dir(load_tensorrt("tensorrt_rtx").ComputeCapability)
    numbers = sorted(int(name[2:]) for name in names if re.fullmatch(r"SM\d+", name))
    return [f"{number // 10}.{number % 10}" for number in numbers]


def build_engine(
    onnx: bytes,
    *,
    runtime: str,
    shapes: Shapes | None = None,
    compute_capabilities: Sequence[str] = (),
    workspace: int | None = None,
    level: int | None = None,
    timing_cache: bytes | None = None,
    tf32: bool = False,
    device: int = 0,
    progress: Progress | None = None,
) -> Built:
    """Build an engine from a strongly typed network: layers run in the types that ``onnx`` says.

    Parameters
    ----------
    onnx : a serialised model without external data.
    runtime : "tensorrt", which builds for the GPU it runs on, or "tensorrt_rtx".
    shapes : (least, usual, largest) shape for each input that has free dimensions. Where the three
        are one, the engine is made for that shape alone.
    compute_capabilities : for "tensorrt_rtx", the GPUs to build for, e.g. ("8.6", "8.9"); left out,
        the one of ``device``.
    workspace : most scratch memory of a layer, in bytes. None: a quarter of the free memory, at
        most 2 GiB; without a GPU, the builder's own default. Never more than what is free.
    level : the builder's effort, 0 to 5; None: its default.
    timing_cache : of an earlier build of "tensorrt" on the same kind of device, or b"".
    tf32 : let FP32 products round their inputs to 10 bits of mantissa.
    device : the GPU to build on.
    progress : called with a phase's name and the fraction done, in [0, 1]. An exception that it
        raises, and Ctrl-C, stop the build at its next step.

    Raises
    ------
    InputError : an option, a shape or a GPU that cannot be used.
    MissingBackend : no TensorRT, or no GPU where one is needed.
    BundleError : a model that TensorRT cannot read or build.
    DeviceError : too little memory.
    """
    trt = load_tensorrt(runtime)
    if workspace is not None:
        workspace = check_count("workspace (bytes)", workspace, 2**20, 2**50)
    if level is not None:
        level = check_count("level", level, 0, 5)
    if timing_cache is not None and runtime == "tensorrt_rtx":
        raise InputError(
            "a timing cache was given, but TensorRT for RTX times nothing while it builds and has "
            "none to keep",
            fix="leave --timing-cache out for this target",
        )
    found = cuda_devices()
    gpu = found[device] if device < len(found) else None
    if found and gpu is None:
        raise InputError(f"device is {device}; wanted 0 to {len(found) - 1}")
    targets = _targets(runtime, tuple(dict.fromkeys(compute_capabilities)), gpu)

    def build() -> Built:
        with _current(device if gpu else 0):
            return _build(trt, monitor, log, onnx, shapes or {}, runtime, targets, workspace,
                          level, timing_cache, tf32, device if gpu else None)  # fmt: skip

    log, monitor = bridge_log(trt), _monitor(trt)
    log.clear()
    # The builder has a thread of its own, so that Ctrl-C is seen at once and the callback runs
    # in the caller's thread, where what it raises has somewhere to go.
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(build)
        future.add_done_callback(lambda _: monitor.events.put(None))
        try:
            for phase, fraction in iter(monitor.events.get, None):
                if progress is not None:
                    progress(phase, fraction)
        finally:
            monitor.cancelled = True
        return future.result()


def _targets(runtime: str, asked: tuple[str, ...], gpu: CudaDevice | None) -> tuple[str, ...]:
    """The compute capabilities to build for."""
    if runtime == "tensorrt":
        if gpu is None:
            raise MissingBackend(
                f"TensorRT times kernels while it builds, on the GPU that will run them: "
                f"{cuda_absence()}",
                fix=f"on the device: {REBUILD}",
            )
        if asked not in ((), (gpu.compute_capability,)):
            raise InputError(
                f"compute capability {', '.join(asked)} was asked for; TensorRT builds for the GPU "
                f"it runs on, {gpu.name} with {gpu.compute_capability}",
                fix=f"on a device with {', '.join(asked)}: {REBUILD}",
            )
        return (gpu.compute_capability,)
    if not asked and gpu is None:
        raise InputError(
            f"no compute capability was given, and there is no GPU to ask: {cuda_absence()}",
            fix="name the GPUs to build for: --compute-capability 8.6,8.9,12.0",
        )
    if not asked and gpu is not None:
        asked = (gpu.compute_capability,)
    known = supported_compute_capabilities()
    strange = [target for target in asked if target not in known]
    if strange:
        raise InputError(
            f"TensorRT for RTX cannot build for compute capability {', '.join(strange)}; it knows "
            f"{', '.join(known)}",
            fix=f"Orin (8.7), Thor and Hopper (9.0) need TensorRT on the device: {REBUILD}",
        )
    return asked


def _build(
    trt: Any,
    monitor: Any,
    log: Any,
    onnx: bytes,
    shapes: Shapes,
    runtime: str,
    targets: tuple[str, ...],
    workspace: int | None,
    level: int | None,
    timing_cache: bytes | None,
    tf32: bool,
    device: int | None,
) -> Built:
    """``build_engine`` after its checks; ``device`` is None without a GPU."""
    start = time.perf_counter()
    builder = trt.Builder(log)
    if builder is None:
        raise DeviceError(f"{runtime} makes no builder: {log.summary()}")
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(onnx):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise BundleError(
            f"{runtime} {trt.__version__} cannot read the model: "
            + ("; then ".join(map(_parser_error, errors)) or log.summary()),
            fix="check it with: python -m onnx.checker; export it with opset 18",
        )
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    profile = _set_shapes(network, shapes, builder.create_optimization_profile)
    if profile is not None and config.add_optimization_profile(profile) < 0:
        raise InputError(f"{runtime} refuses the shapes {dict(shapes)}: {log.summary()}")
    if not tf32 and hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)
    if level is not None:
        config.builder_optimization_level = level
    cache = None
    if runtime == "tensorrt_rtx":
        config.num_compute_capabilities = len(targets)
        for i, target in enumerate(targets):
            name = "SM" + target.replace(".", "")
            if not config.set_compute_capability(getattr(trt.ComputeCapability, name), i):
                raise InputError(f"{runtime} refuses compute capability {target}: {log.summary()}")
    else:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the receipt needs it
        cache = config.create_timing_cache(timing_cache or b"")
        if cache is None or not config.set_timing_cache(cache, False):
            raise InputError(
                f"the timing cache was not made by TensorRT {trt.__version__} on this kind of "
                f"device: {log.summary()}",
                fix="leave --timing-cache out, or name a new file",
            )
    inputs = [_port(network.get_input(i)) for i in range(network.num_inputs)]
    outputs = [_port(network.get_output(i)) for i in range(network.num_outputs)]
    receipt = network_receipt(network)
    # Last, because what is free changes: other builds, other programs.
    free = None if device is None else cuda_devices()[device].free_bytes
    if free is not None:
        if workspace is not None and workspace > free:
            _LOG.warning("workspace of %s bytes cut to the %s that are free", workspace, free)
        workspace = min(workspace or min(free // 4, AUTO_WORKSPACE), free)
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise _failure(runtime, log, workspace, free)
    plan = bytes(serialized)
    if runtime == "tensorrt":
        receipt |= _engine_receipt(trt, log, plan, shapes)
    return Built(
        plan=plan,
        inputs=inputs,
        outputs=outputs,
        receipt=receipt,
        seconds=time.perf_counter() - start,
        version=str(trt.__version__),
        compute_capabilities=targets,
        workspace=workspace,
        timing_cache=None if cache is None else bytes(config.get_timing_cache().serialize()),
    )


def _set_shapes(network: Any, shapes: Shapes, new_profile: Callable[[], Any]) -> Any:
    """Fix the shapes that are fixed; a profile for the others, None if there are none."""
    inputs = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
    unknown = [name for name in shapes if name not in inputs]
    if unknown:
        raise InputError(f"shapes name the input {unknown[0]!r}; the model has {', '.join(inputs)}")
    profile = None
    for name, tensor in inputs.items():
        dims = tuple(tensor.shape)
        if name not in shapes:
            if min(dims, default=1) < 0:
                raise InputError(
                    f"input {name!r} has free dimensions, {_dims(dims)}, and no shape was given",
                    fix="give --imgsz HxW, or --min-shape, --opt-shape and --max-shape",
                )
            continue
        three = tuple(tuple(map(int, shape)) for shape in shapes[name])
        if len(three) != 3 or any(len(shape) != len(dims) for shape in three):
            raise InputError(
                f"shapes of input {name!r} are {three}; wanted a least, a usual and a largest one "
                f"for {_dims(dims)}"
            )
        for low, usual, high, dim in zip(*three, dims, strict=True):
            if not 1 <= low <= usual <= high or (dim >= 0 and not low == high == dim):
                raise InputError(
                    f"shapes of input {name!r} are {three[0]} to {three[2]}, usually {three[1]}; "
                    f"wanted least <= usual <= largest, and {_dims(dims)}"
                )
        if three[0] == three[2]:
            tensor.shape = three[0]
        else:
            profile = profile or new_profile()
            profile.set_shape(name, *three)
    return profile


def _dims(dims: Shape) -> str:
    return f"({', '.join('any' if dim < 0 else str(dim) for dim in dims)})"


def _port(tensor: Any) -> Port:
    shape = tuple(
        dim if dim >= 0 else tensor.get_dimension_name(i) or None
        for i, dim in enumerate(tensor.shape)
    )
    return Port(tensor.name, shape, DTYPES.get(tensor.dtype.name, tensor.dtype.name))


def _parser_error(error: Any) -> str:
    node = " ".join(filter(None, (error.node_operator(), error.node_name())))
    return f"{error.desc()}" + (f" (at {node})" if node else "")


def _failure(runtime: str, log: Any, workspace: int | None, free: int | None) -> Exception:
    """What the log of a failed build means."""
    text = "\n".join(log.lines)
    if "FP32 GEMM is not supported" in text:
        return InputError(
            f"Turing (compute capability 7.5) has no FP32 matrix products in TensorRT for RTX: "
            f"{log.summary()}",
            fix="Turing needs --half; or leave 7.5 out of --compute-capability",
        )
    if _OUT_OF_MEMORY.search(text):
        limit = "the builder's default" if workspace is None else f"{workspace / 2**20:.0f} MiB"
        memory = "no GPU here" if free is None else f"{free / 2**20:.0f} MiB free"
        return DeviceError(
            f"the build ran out of memory (workspace {limit}, {memory}): {log.summary()}",
            fix="a larger --workspace, a smaller --imgsz, or close what else uses the GPU",
        )
    return BundleError(
        f"{runtime} cannot build the model: {log.summary()}",
        fix="see every line with logging.getLogger('dg.tensorrt').setLevel('DEBUG')",
    )


@functools.cache
def bridge_log(trt: Any) -> Any:
    """The TensorRT logger that writes to Python's logger "dg.tensorrt" and keeps the last lines.

    There is one for the process: TensorRT ignores a second one while anything uses the first.
    Errors and warnings keep their level; information and chatter become DEBUG. ``lines`` holds the
    last 50 errors and warnings since ``clear()``; ``summary()`` is the first error (the cause) and
    what came of it.
    """

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: deque[str] = deque(maxlen=50)
            self.errors: list[str] = []

        def clear(self) -> None:
            self.lines.clear()
            self.errors.clear()

        def log(self, severity: Any, message: str) -> None:
            level = logging.DEBUG
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                level = logging.ERROR
                self.errors = [*self.errors[:3], message]
            elif severity == trt.ILogger.WARNING:
                level = logging.WARNING
            if level > logging.DEBUG:
                self.lines.append(message)
            _LOG.log(level, "%s", message)

        def summary(self) -> str:
            said = self.errors or self.lines
            return "; then ".join(line[:400] for line in said) or "it does not say why"

    return Log()


def _monitor(trt: Any) -> Any:
    """A progress monitor: puts (phase, fraction of the whole) into ``events``; can be cancelled."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.events: SimpleQueue[tuple[str, float] | None] = SimpleQueue()
            self.cancelled = False
            self.running: list[list[Any]] = []  # name, steps, done; the outermost first
            self.last = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.running.append([name, max(steps, 1), 0])
            self.tell(name)

        def phase_finish(self, name: str) -> None:
            self.running = [phase for phase in self.running if phase[0] != name]
            if not self.running:
                self.tell(name)

        def step_complete(self, name: str, step: int) -> bool:
            for phase in self.running:
                if phase[0] == name:
                    phase[2] = min(step + 1, phase[1])
            self.tell(name)
            return not self.cancelled

        def tell(self, name: str) -> None:
            fraction = 0.0 if self.running else 1.0
            for _, steps, done in reversed(self.running):
                fraction = min(1.0, (done + fraction) / steps)
            if fraction >= self.last + 0.01 or not self.running:
                self.last = fraction
                self.events.put((name, fraction))

    return Monitor()


@contextmanager
def _current(device: int) -> Iterator[None]:
    """Make ``device`` this thread's GPU. Device 0 is every thread's already."""
    if device == 0:
        yield
        return
    cuda = load_pycuda()
    context = cuda.Device(device).retain_primary_context()
    context.push()
    try:
        yield
    finally:
        cuda.Context.pop()


def load_pycuda() -> Any:
    """The module pycuda.driver, initialised.

    Raises
    ------
    MissingBackend : not installed, or no driver.
    """
    try:
        import pycuda.driver as cuda
    except ImportError as error:  # also without the driver's library
        raise MissingBackend(
            f"PyCUDA is needed to run engines, but {error}",
            fix="pip install pycuda; for a missing libcuda install NVIDIA's driver",
        ) from error
    try:
        cuda.init()
    except cuda.Error as error:
        raise MissingBackend(
            f"PyCUDA does not start: {error}", fix="python -m runtime doctor"
        ) from error
    return cuda


def network_receipt(network: Any) -> dict[str, Any]:
    """How many layers of a parsed network compute in which precision; see ``Built``."""
    layers: Counter[str] = Counter()
    matrix: Counter[str] = Counter()
    quantize = other = 0
    made_by: dict[str, str] = {}  # tensor -> kind of its layer
    for layer in map(network.get_layer, range(network.num_layers)):
        kind, output = layer.type.name, layer.get_output(0)
        precision = None if output is None else _PRECISIONS.get(output.dtype.name)
        if output is not None:
            made_by[output.name] = kind
        if kind in ("QUANTIZE", "DEQUANTIZE"):
            quantize += 1
        elif precision is None or kind in _PLUMBING:
            other += 1
        else:
            if kind in _MATRIX:
                read = layer.get_input(0)
                int8 = made_by.get(read.name) == "DEQUANTIZE"
                precision = "int8" if int8 else _PRECISIONS.get(read.dtype.name, precision)
                matrix[precision] += 1
            layers[precision] += 1
    return {
        "source": "network",
        "layers": dict(layers),
        "matrix": dict(matrix),
        "quantize": quantize,
        "other": other,
    }


def _engine_receipt(trt: Any, log: Any, plan: bytes, shapes: Shapes) -> dict[str, Any]:
    """The same counts from a built engine, read back on its device by the engine inspector."""
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise DeviceError(f"the engine just built cannot be loaded: {log.summary()}")
    inspector = engine.create_engine_inspector()
    if any(three[0] != three[2] for three in shapes.values()):
        context = engine.create_execution_context()  # types are known for known shapes alone
        if context is None or not all(
            context.set_input_shape(name, usual) for name, (_, usual, _) in shapes.items()
        ):
            raise DeviceError(f"the engine just built takes no shapes: {log.summary()}")
        inspector.execution_context = context
    return inspector_receipt(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def inspector_receipt(text: str) -> dict[str, Any]:
    """``source``, ``layers``, ``matrix`` and ``other`` from the engine inspector's JSON."""
    layers: Counter[str] = Counter()
    matrix: Counter[str] = Counter()
    other = 0
    for layer in json.loads(text)["Layers"]:
        details = layer if isinstance(layer, dict) else {}  # a name alone tells nothing
        kind = f"{details.get('LayerType', '')} {details.get('ParameterType', '')}".lower()
        is_matrix = re.search("conv|gemm|matrix|matmul|einsum|mha", kind) is not None
        ports = details.get("Inputs" if is_matrix else "Outputs") or [{}]
        precision = _format_precision(
            ports[0].get("Format/Datatype") or ports[0].get("Datatype", "")
        )
        plumbing = re.search("reformat|noop|constant|shape|shuffle|signal|wait|cast", kind)
        if precision is None or (plumbing and not is_matrix):
            other += 1
            continue
        layers[precision] += 1
        if is_matrix:
            matrix[precision] += 1
    return {"source": "engine", "layers": dict(layers), "matrix": dict(matrix), "other": other}


def _format_precision(text: str) -> str | None:
    """ "Row major linear FP16 format" -> "fp16"; None for integers and what is unknown."""
    words = {"int8": "int8", "fp8": "fp8", "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16",
             "half": "fp16", "float16": "fp16", "fp32": "fp32", "float": "fp32",
             "float32": "fp32"}  # fmt: skip
    found = [words[word] for word in re.findall(r"\w+", text.lower()) if word in words]
    return found[0] if found else None


def check_receipt(receipt: Mapping[str, Any], asked: str) -> None:
    """Whether an engine computes in the precision that was asked for.

    Parameters
    ----------
    receipt : ``Built.receipt``.
    asked : "fp32": every layer; "fp16": at least half of the convolutions and matrix products;
        "int8": some of them, with quantise layers in the network.

    Raises
    ------
    VerificationFailed : it does not.
    """
    layers, matrix = Counter(receipt["layers"]), Counter(receipt["matrix"])
    products = sum(matrix.values())
    lower = sum(layers.values()) - layers["fp32"]
    problem = ""
    if asked not in ("fp32", "fp16", "int8"):
        raise InputError(f"asked is {asked!r}; wanted 'fp32', 'fp16' or 'int8'")
    if not layers:
        problem = "no layer's precision is known"
    elif asked == "fp32" and (lower or receipt["quantize"]):
        problem = f"{lower} layers are below FP32, {receipt['quantize']} quantise"
    elif asked == "fp16" and not layers["fp16"]:
        problem = "no layer computes in FP16"
    elif asked == "fp16" and 2 * matrix["fp16"] < products:
        problem = f"only {matrix['fp16']} of {products} convolutions and matrix products are FP16"
    elif asked == "int8" and not receipt["quantize"]:
        problem = "the model has no quantise or dequantise layer"
    elif asked == "int8" and not matrix["int8"]:
        problem = f"none of {products} convolutions and matrix products is INT8"
    if problem:
        counts = ", ".join(f"{n} {name}" for name, n in sorted(layers.items()))
        raise VerificationFailed(
            f"{asked} was asked for, but {problem} ({receipt['source']}: {counts or 'nothing'})",
            fix="precision is in the ONNX graph: export it again with or without --half or --int8",
        )


def read_header(plan: bytes) -> PlanHeader | None:
    """What the first bytes of a plan say, read without TensorRT: for messages, not for trust.

    The layout was found by looking at plans of TensorRT for RTX 1.7: "vtrt", the size at byte 16
    (u64, little endian), the version at byte 24 (four bytes).

    Returns
    -------
    None for a layout that is not known.

    Raises
    ------
    BundleError : a plan that is cut short or longer than it says, or that starts with JSON.
    """
    if plan[:4] == b"vtrt"[: max(1, len(plan))]:
        size = int.from_bytes(plan[16:24], "little")
        if len(plan) < 28 or size != len(plan):
            wanted = f"; it says {size}" if len(plan) >= 24 else ""
            raise BundleError(
                f"the plan has {len(plan)} bytes{wanted}: it was cut short or changed",
                fix=f"copy it again as binary, or build it again: {REBUILD}",
            )
        return PlanHeader(size, ".".join(map(str, plan[24:28])))
    length = int.from_bytes(plan[:4], "little")
    if plan[4:5] == b"{" and length < 2**24:
        raise BundleError(
            f"{length} bytes of JSON metadata stand before the plan, as Ultralytics writes them; "
            f"TensorRT reads raw plans alone",
            fix=f"drop the first {length + 4} bytes",
        )
    return None


def engine_key(
    onnx: bytes,
    flags: Mapping[str, Any],
    *,
    runtime: str,
    version: str,
    compute_capabilities: Sequence[str],
    gpu_name: str | None = None,
    l4t: str | None = None,
) -> str:
    """16 hexadecimal digits: the same for the same model, flags, version and device."""
    facts = [runtime, version, list(compute_capabilities), gpu_name, l4t]
    text = json.dumps([hashlib.sha256(onnx).hexdigest(), dict(flags), *facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
