"""From ONNX to an engine, with TensorRT on the device or with TensorRT for RTX on any machine.

TensorRT for RTX builds engines without a GPU. TensorRT itself needs the GPU for which it builds.
The README says which of them has been run.
"""

from __future__ import annotations

import gc
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

from runtime.device.driver import CudaDevice, cuda_absence, cuda_devices
from runtime.engines.plan import engine_receipt, network_receipt
from runtime.engines.port import Port, Shape, Shapes, dtype_of_tensorrt
from runtime.engines.recipe import EngineRecipe
from runtime.engines.tensorrt import (
    LOG,
    REBUILD,
    bridge_log,
    load_pycuda,
    load_tensorrt,
    make,
    rtx_targets,
)
from runtime.errors import BundleError, DeviceError, InputError, MissingBackend

AUTO_WORKSPACE = 2**31  # most bytes of scratch memory if the recipe does not set them
Progress = Callable[[str, float], object]
_OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|insufficient (memory|workspace)|MemoryAllocation|within workspace limit"
    r"|amount of GPU memory",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Built:
    """An engine that was built, and how it was built.

    Parameters
    ----------
    plan : the engine as it is written to a file.
    inputs, outputs : its ports.
    receipt : a JSON object. ``source`` is "network" or "engine"; ``layers`` the number of layers by
        precision; ``matrix`` the same for convolutions and matrix products alone, by the precision
        of their input; ``quantize`` the number of quantise and dequantise layers; ``other`` the
        number of layers that only move data or compute on integers.
    seconds : that the build took.
    version : of the library.
    compute_capabilities : of the GPUs that the engine is for.
    workspace : scratch memory of a layer in bytes; None for the builder's default.
    timing_cache : the kernels' times after the build; None for TensorRT for RTX.
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


def build_engine(
    onnx: bytes,
    recipe: EngineRecipe,
    *,
    runtime: str,
    timing_cache: bytes | None = None,
    device: int = 0,
    progress: Progress | None = None,
) -> Built:
    """Build an engine from a strongly typed network: its layers compute in the types of ``onnx``.

    Parameters
    ----------
    onnx : a serialised model without external data.
    recipe : the builder's flags.
    runtime : "tensorrt", which builds for the GPU it runs on, or "tensorrt_rtx".
    timing_cache : of an earlier build of "tensorrt" on the same kind of device; b"" or None without
        one. It must be None for "tensorrt_rtx".
    device : the number of the GPU to build on.
    progress : called as progress(phase, fraction done, 0 to 1). An exception that it raises, and
        Ctrl-C, stop the build at its next step.

    Raises
    ------
    InputError : an option, a shape, a timing cache or a GPU that cannot be used.
    MissingBackend : no TensorRT, or no GPU where one is needed.
    BundleError : a model that TensorRT cannot read or build.
    DeviceError : there is too little memory, or the GPU, its driver or the builder fails.
    """
    trt = load_tensorrt(runtime)
    if timing_cache is not None and runtime == "tensorrt_rtx":
        raise InputError(
            "a timing cache was given, but TensorRT for RTX times nothing while it builds and has "
            "none to keep",
            fix="leave --timing-cache out for this target",
        )
    try:
        found = cuda_devices()
    except DeviceError as error:  # TensorRT for RTX needs no GPU for named compute capabilities
        if runtime == "tensorrt" or not recipe.compute_capabilities:
            raise
        LOG.warning("the engine is built without a GPU: %s", error.message)
        found = []
    gpu = found[device] if device < len(found) else None
    if found and gpu is None:
        raise InputError(
            f"device is {device}; wanted 0 to {len(found) - 1}", fix="see: nvidia-smi -L"
        )
    recipe = replace(recipe, compute_capabilities=_targets(runtime, recipe, gpu))

    def build() -> Built:
        with current_gpu(device if gpu else 0):
            return _Build(trt, runtime, recipe, log, monitor, device if gpu else None).run(
                onnx, timing_cache
            )

    def finish(future: Future[Built]) -> None:
        error = future.exception()
        if error is not None:
            # The traceback of an error refers to the builder. The garbage collector would free it
            # later, possibly while the next builder holds TensorRT's lock and waits for Python.
            traceback.clear_frames(error.__traceback__)
        monitor.events.put(None)

    log, monitor = bridge_log(trt), _monitor(trt)
    log.clear()
    # Objects of TensorRT in cycles of references, such as those of an error, are freed now: while
    # the builder holds TensorRT's lock, freeing them in another thread never ends.
    gc.collect()
    # The builder runs in a thread of its own. So Ctrl-C ends this thread's wait at once, and the
    # callback runs in the caller's thread, which gets the exceptions that it raises.
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(build)
        future.add_done_callback(finish)
        try:
            for phase, fraction in iter(monitor.events.get, None):
                if progress is not None:
                    progress(phase, fraction)
        finally:
            monitor.cancelled = True
        return future.result()


def _targets(runtime: str, recipe: EngineRecipe, gpu: CudaDevice | None) -> tuple[str, ...]:
    """The compute capabilities to build for. InputError or MissingBackend if this machine cannot
    build for them."""
    asked = recipe.compute_capabilities
    if runtime == "tensorrt_rtx":
        return rtx_targets(asked, gpu)
    if gpu is None:
        raise MissingBackend(
            f"TensorRT times kernels while it builds, on the GPU that will run them: "
            f"{cuda_absence()}",
            fix=f"on the device: {REBUILD}",
        )
    if set(asked) - {gpu.compute_capability}:
        raise InputError(
            f"compute capability {', '.join(asked)} was asked for; TensorRT builds for the GPU "
            f"it runs on, {gpu.name} with {gpu.compute_capability}",
            fix=f"on a device with {', '.join(asked)}: {REBUILD}",
        )
    return (gpu.compute_capability,)


@dataclass(frozen=True)
class _Build:
    """One build, after the checks; ``device`` is None without a GPU."""

    trt: Any
    runtime: str
    recipe: EngineRecipe
    log: Any
    monitor: Any
    device: int | None

    def run(self, onnx: bytes, timing_cache: bytes | None) -> Built:
        """Build the engine."""
        start = time.perf_counter()
        trt, recipe, log = self.trt, self.recipe, self.log
        builder = make(trt, "Builder")
        network, parser = self._parsed(builder, onnx)
        config = builder.create_builder_config()
        config.progress_monitor = self.monitor
        profile = _set_shapes(network, recipe.shapes, builder.create_optimization_profile)
        if profile is not None and config.add_optimization_profile(profile) < 0:
            raise InputError(
                f"{self.runtime} refuses the shapes {dict(recipe.shapes)}: {log.summary()}"
            )
        self._set_flags(config)
        cache = self._set_cache(config, timing_cache) if self.runtime == "tensorrt" else None
        inputs = [_port(network.get_input(i)) for i in range(network.num_inputs)]
        outputs = [_port(network.get_output(i)) for i in range(network.num_outputs)]
        receipt = network_receipt(network)
        # The free memory is read last, because other builds and programs change it.
        workspace, free = self._memory()
        if workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise _failure(self.runtime, log, workspace, free, receipt)
        plan = bytes(serialized)
        del parser  # not before the build, because the parser owns the weights of the network
        if self.runtime == "tensorrt":
            receipt |= engine_receipt(trt, log, plan, recipe.shapes)
        return Built(
            plan=plan,
            inputs=inputs,
            outputs=outputs,
            receipt=receipt,
            seconds=time.perf_counter() - start,
            version=str(trt.__version__),
            compute_capabilities=recipe.compute_capabilities,
            workspace=workspace,
            timing_cache=None if cache is None else bytes(config.get_timing_cache().serialize()),
        )

    def _parsed(self, builder: Any, onnx: bytes) -> tuple[Any, Any]:
        """The network in a serialised model, and the parser, which must exist until the engine is
        built. BundleError if TensorRT cannot read the model."""
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if flag is None else 1 << int(flag))
        parser = make(self.trt, "OnnxParser", network)
        if not parser.parse(onnx):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            raise BundleError(
                f"{self.runtime} {self.trt.__version__} cannot read the model: "
                + ("; then ".join(map(_parser_error, errors)) or self.log.summary()),
                fix="check it with: check-model FILE (pip install onnx); export it with opset 18",
            )
        return network, parser

    def _set_flags(self, config: Any) -> None:
        """Set the recipe's flags and compute capabilities in the builder's configuration."""
        trt, recipe = self.trt, self.recipe
        if not recipe.tf32 and hasattr(trt.BuilderFlag, "TF32"):
            config.clear_flag(trt.BuilderFlag.TF32)
        if recipe.level is not None:
            config.builder_optimization_level = recipe.level
        if self.runtime == "tensorrt":
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the receipt needs it
            return
        config.num_compute_capabilities = len(recipe.compute_capabilities)
        for i, target in enumerate(recipe.compute_capabilities):
            name = "SM" + target.replace(".", "")
            if not config.set_compute_capability(getattr(trt.ComputeCapability, name), i):
                raise InputError(
                    f"{self.runtime} refuses compute capability {target}: {self.log.summary()}"
                )

    def _set_cache(self, config: Any, timing_cache: bytes | None) -> Any:
        """Set the builder's timing cache to one with these contents, and return it. InputError if
        TensorRT refuses them."""
        cache = config.create_timing_cache(timing_cache or b"")
        if cache is None or not config.set_timing_cache(cache, False):
            raise InputError(
                f"the timing cache was not made by TensorRT {self.trt.__version__} on this kind "
                f"of device: {self.log.summary()}",
                fix="leave --timing-cache out, or name a new file",
            )
        return cache

    def _memory(self) -> tuple[int | None, int | None]:
        """Two numbers of bytes: the workspace to set, None for the builder's default; and the GPU's
        free memory, None without a GPU."""
        workspace = self.recipe.workspace
        if self.device is None:
            return workspace, None
        free = cuda_devices()[self.device].free_bytes
        if workspace is not None and workspace > free:
            LOG.warning("workspace of %s bytes cut to the %s that are free", workspace, free)
        return min(workspace or min(free // 4, AUTO_WORKSPACE), free), free


def _set_shapes(network: Any, shapes: Shapes, new_profile: Callable[[], Any]) -> Any:
    """Set the shapes of the inputs that have one size only. Return an optimisation profile for the
    other inputs with free dimensions; None if there are none. InputError for unfit ``shapes``."""
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
                    fix="use --imgsz HxW, or --min-shape, --opt-shape and --max-shape",
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
            try:
                profile.set_shape(name, *three)
            except (RuntimeError, ValueError) as error:
                raise InputError(
                    f"TensorRT refuses the shapes {three} of input {name!r}: {error}",
                    fix="use other sizes for --min-shape, --opt-shape and --max-shape",
                ) from error
    return profile


def _dims(dims: Shape) -> str:
    """A shape for messages; -1, a free dimension, becomes "any"."""
    return f"({', '.join('any' if dim < 0 else str(dim) for dim in dims)})"


def _port(tensor: Any) -> Port:
    """The port of an input or output of TensorRT's network."""
    shape = tuple(
        dim if dim >= 0 else tensor.get_dimension_name(i) or None
        for i, dim in enumerate(tensor.shape)
    )
    return Port(tensor.name, shape, dtype_of_tensorrt(tensor.dtype.name))


def _parser_error(error: Any) -> str:
    """An error of the ONNX parser as text."""
    node = " ".join(filter(None, (error.node_operator(), error.node_name())))
    return f"{error.desc()}" + (f" (at {node})" if node else "")


def _failure(
    runtime: str, log: Any, workspace: int | None, free: int | None, receipt: Mapping[str, Any]
) -> Exception:
    """The error to raise for a failed build; the log decides which. ``workspace`` and ``free`` are
    as ``_memory`` returned them, and ``receipt`` is that of the network."""
    text = "\n".join(log.lines)
    if "FP32 GEMM is not supported" in text:
        return InputError(
            f"Turing (compute capability 7.5) has no FP32 matrix products in TensorRT for RTX: "
            f"{log.summary()}",
            fix=_turing_fix(receipt["layers"]),
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


def _turing_fix(layers: Mapping[str, int]) -> str:
    """What helps against FP32 matrix products. ``layers`` counts the network's by precision."""
    other = "leave 7.5 out of --compute-capability, and use backend='onnx' on Turing"
    if "int8" in layers:  # its products may be FP32 in spite of --half
        return f"export an FP16 network: with --half, without --int8; or {other}"
    return other if "fp16" in layers else f"export an FP16 network: with --half; or {other}"


def _monitor(trt: Any) -> Any:
    """A progress monitor for the builder. It puts (phase, fraction of the whole build) into
    ``events``, and stops the build when ``cancelled`` is True."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.events: SimpleQueue[tuple[str, float] | None] = SimpleQueue()
            self.cancelled = False
            self.running: list[list[Any]] = []  # name, steps, done; the outermost first
            self.last = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.running.append([name, max(steps, 1), 0])
            self.report(name)

        def phase_finish(self, name: str) -> None:
            self.running = [phase for phase in self.running if phase[0] != name]
            if not self.running:
                self.report(name)

        def step_complete(self, name: str, step: int) -> bool:
            for phase in self.running:
                if phase[0] == name:
                    phase[2] = min(step + 1, phase[1])
            self.report(name)
            return not self.cancelled

        def report(self, name: str) -> None:
            """Put an event, if the fraction has grown by a hundredth or the build is done."""
            fraction = 0.0 if self.running else 1.0
            for _, steps, done in reversed(self.running):
                fraction = min(1.0, (done + fraction) / steps)
            if fraction >= self.last + 0.01 or not self.running:
                self.last = fraction
                self.events.put((name, fraction))

    return Monitor()


@contextmanager
def current_gpu(device: int) -> Iterator[None]:
    """Make a GPU the current one of this thread for a block. Every thread starts with GPU 0.

    Parameters
    ----------
    device : the number of a GPU of this machine. 0 changes nothing, and needs no GPU.

    Raises
    ------
    MissingBackend : PyCUDA is needed for another GPU, and is not installed or does not start.
    """
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
