"""Run a TensorRT or TensorRT for RTX engine. Every return value of TensorRT is checked.

The code follows the interface files and documentation of TensorRT 10.3, 10.13 and 11.4, of
TensorRT for RTX 1.7 and of PyCUDA 2026.1. Its tests run on stand-ins for these packages; the README
says what has been run on a device.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.device import transfer
from runtime.device.transfer import Buffer
from runtime.engines.output_warnings import ONE_CLASS, OutputWarning
from runtime.engines.plan import read_header
from runtime.engines.port import Port, Shape, dtype_of_tensorrt
from runtime.engines.rtx_cache import RuntimeCache
from runtime.engines.tensorrt import REBUILD, bridge_log, load_pycuda, load_tensorrt, make
from runtime.engines.tensorrt_loop import TensorRTLoop
from runtime.engines.tensorrt_session import Session, in_dtype
from runtime.engines.tensorrt_stream import EngineStream
from runtime.errors import BundleError, DeviceError, EngineMismatch, InputError, SdkError

MOST_SESSIONS = 4  # most sessions of an engine: one for each combination of input shapes and state
_HUNG: list[Any] = []  # objects that stay alive: freeing memory that a hung GPU uses would block


class TensorRTEngine:
    """A plan that is loaded on a GPU. Use it as a context manager, or call ``close``. Only one
    thread at a time may use it.

    Parameters
    ----------
    plan : the bytes of the plan. It is native code: load only a plan that was checked against its
        hash. TensorRT refuses code for the host in it (``engine_host_code_allowed`` is False).
    runtime : "tensorrt" or "tensorrt_rtx".
    name : for messages.
    device : the GPU's number.
    version, compute_capabilities : the version that built the plan, and the GPUs that it is for,
        from the manifest. Without them, the header of the plan says the version, if it is known,
        and the GPU is not checked.
    timeout_s : a run that takes more seconds counts as hung. :meth:`on_gpu` does not wait for the
        run, so it does not check this.

    Attributes
    ----------
    inputs, outputs : a ``Port`` for each input or output; free dimensions are None.

    Raises
    ------
    MissingBackend : no TensorRT, PyCUDA or driver.
    EngineMismatch : the plan was built for another version or device.
    BundleError : the bytes are no plan or are damaged, or a port has a type that NumPy does not
        have.
    InputError : a GPU that this machine does not have.
    DeviceError : TensorRT cannot start, or the GPU fails or has too little memory.
    """

    def __init__(
        self,
        plan: bytes,
        *,
        runtime: str,
        name: str = "",
        device: int = 0,
        version: str = "",
        compute_capabilities: Sequence[str] = (),
        timeout_s: float = 30.0,
    ) -> None:
        self.name = name or "the engine"
        self.backend = runtime
        self.device = device
        self.inputs: list[Port] = []
        self.outputs: list[Port] = []
        self.metadata: dict[str, str] = {}
        self._in_line = False  # whether the CUDA module's stream has runs since the last wait
        self._sessions: dict[Any, Session] = {}
        self._runtime: Any = None
        self._engine: Any = None
        self._config: Any = None  # of TensorRT for RTX, as is the cache
        self._cache: RuntimeCache | None = None
        self._compiled: set[Any] = set()  # the keys of the sessions whose kernels are in the cache
        self._trt = load_tensorrt(runtime)
        header = read_header(plan)
        self._check_version(runtime, version or (header.version if header else ""))
        cuda, self._log = load_pycuda(), bridge_log(self._trt)
        self._check_device(cuda, tuple(compute_capabilities))
        self._gpu = EngineStream(self.name, device, cuda, self._log, timeout_s)
        with self._gpu.active():
            self._open(plan)

    def _check_version(self, runtime: str, built: str) -> None:
        """EngineMismatch if the plan was built by another version, as far as ``built`` says it."""
        here = str(self._trt.__version__)
        # Compare as many numbers as both have: a wheel may say 10.3.0 and its plan 10.3.0.26.
        pairs = zip(re.findall(r"\d+", built), re.findall(r"\d+", here), strict=False)
        if any(int(a) != int(b) for a, b in pairs):
            raise EngineMismatch(
                f"{self.name} was built with {runtime} {built}; this process has loaded {here}",
                fix=REBUILD,
            )

    @property
    def graph(self) -> str:
        """How runs are launched: "not yet" (the first run of each shape is a plain one), "captured"
        (as a CUDA graph), "by the runtime", or "plain: " and the reason why no CUDA graph is used.
        """
        return self._gpu.graph

    @property
    def warnings(self) -> deque[OutputWarning]:
        """The last 64 warnings about outputs: NaN or infinite values, or one class everywhere."""
        return self._gpu.warnings

    def _check_device(self, cuda: Any, wanted: tuple[str, ...]) -> None:
        """InputError if the machine does not have the GPU; EngineMismatch if the plan is for
        others."""
        gpus = [cuda.Device(i) for i in range(cuda.Device.count())]
        if not 0 <= self.device < len(gpus):
            raise InputError(
                f"device is {self.device}; wanted 0 to {len(gpus) - 1}", fix="see: nvidia-smi -L"
            )
        has = [".".join(map(str, gpu.compute_capability())) for gpu in gpus]
        if wanted and has[self.device] not in wanted:
            fits = [f"cuda:{i}" for i, capability in enumerate(has) if capability in wanted]
            raise EngineMismatch(
                f"{self.name} was built for compute capability {', '.join(wanted)}; GPU "
                f"{self.device} ({gpus[self.device].name()}) has {has[self.device]}",
                fix=f"device {fits[0]!r}, or: {REBUILD}" if fits else REBUILD,
            )

    def _open(self, plan: bytes) -> None:
        """Load the plan, make the stream, and list the ports."""
        trt = self._trt
        self._log.clear()
        self._runtime = make(trt, "Runtime")
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self._refused_plan(self._log.summary())
        if hasattr(trt, "CudaGraphStrategy"):  # TensorRT for RTX compiles and captures by itself
            self._configure(plan)
        self._gpu.stream = self._gpu.cuda.Stream()
        for i in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(i)
            shape = tuple(d if d >= 0 else None for d in self._engine.get_tensor_shape(name))
            kind = self._engine.get_tensor_dtype(name).name
            port = Port(name, shape, dtype_of_tensorrt(kind))
            if port.numpy is None:
                raise BundleError(
                    f"{name} of {self.name} is {kind}, a type that NumPy does not have",
                    fix="export the network with inputs and outputs in FP32",
                )
            is_input = self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self.inputs if is_input else self.outputs).append(port)

    def _configure(self, plan: bytes) -> None:
        """Make the configuration that all execution contexts share, with its runtime cache."""
        self._config = self._engine.create_runtime_config()
        self._config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._gpu.graph = "by the runtime"
        gpu = self._gpu.cuda.Device(self.device)
        self._cache = RuntimeCache(
            self._config,
            plan,
            version=str(self._trt.__version__),
            gpu=f"{gpu.name()} {gpu.compute_capability()}",
            name=self.name,
        )

    def _refused_plan(self, why: str) -> SdkError:
        """The error for a plan that TensorRT does not load; ``why`` is what its log says."""
        here = f"TensorRT {self._trt.__version__}"
        if re.search("out ?of ?memory", why, re.IGNORECASE):
            return DeviceError(
                f"{self.name} does not fit{self._gpu.free_memory()}: {why}",
                fix="close what else uses the GPU, or build again with a smaller --workspace",
            )
        if re.search("version|compute|device|platform", why, re.IGNORECASE):
            return EngineMismatch(
                f"{self.name} was built for another version or device; {here} says: {why}",
                fix=REBUILD,
            )
        return BundleError(f"{self.name} is no engine that {here} can load: {why}", fix=REBUILD)

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Run the engine and return its outputs in the engine's order.

        ``arrays`` has one array for each input, in the engine's order.

        Raises
        ------
        InputError : too many or too few arrays, another shape, or a type that cannot be converted.
        DeviceError : the engine is closed, the GPU fails, hangs or has too little memory.
        """
        if len(arrays) != len(self.inputs):
            wanted = ", ".join(f"{p.name} {p.shape}" for p in self.inputs)
            raise InputError(
                f"{self.name} got {len(arrays)} arrays; wanted {wanted}",
                fix="pass one array for each input, in this order",
            )
        if self._in_line:  # the CUDA module's stream may still use the buffers
            transfer.wait_for_stream(self.device)
            self._in_line = False
        with self._gpu.active():
            pairs = zip(self.inputs, arrays, strict=True)
            feed = {port.name: self._checked(port, array) for port, array in pairs}
            session = self._session({name: array.shape for name, array in feed.items()}, {})
            for name, array in feed.items():
                session.upload(name, array)
            session.run(0)
            outputs = session.download([port.name for port in self.outputs])
        self._gpu.note(outputs)
        return list(outputs.values())

    @property
    def gpu(self) -> int:
        """The number of the GPU whose arrays :meth:`on_gpu` takes."""
        return self.device

    def gpu_input(self, shape: Shape) -> Buffer:
        """The memory on the GPU that the only input must be written to before :meth:`on_gpu`.

        Parameters
        ----------
        shape : the shape of the input.

        Raises
        ------
        InputError : the engine does not take this shape.
        DeviceError : the engine is closed, or the GPU has too little memory.
        """
        (port,) = self.inputs
        with self._gpu.active():
            self._check_shape(port, shape)
            return self._session({port.name: shape}, {}).buffer(port)

    def on_gpu(self, array: Any) -> list[Buffer]:
        """Run on an array that was written to the memory of :meth:`gpu_input`.

        The run is put into the CUDA module's own stream. The outputs stay on the GPU, are complete
        when the earlier work of that stream is done, and are overwritten by the next run.

        Parameters
        ----------
        array : the memory of :meth:`gpu_input`, as an array with ``__cuda_array_interface__``.

        Returns
        -------
        A buffer on the GPU for each output.

        Raises
        ------
        InputError : the array lies in other memory.
        DeviceError : the engine is closed, or the GPU fails.
        """
        (port,) = self.inputs
        with self._gpu.active():
            session = self._session({port.name: tuple(array.shape)}, {})
            if array.__cuda_array_interface__["data"][0] != int(session.device[port.name][0]):
                raise InputError(
                    f"the array is not where {self.name} takes {port.name!r} from",
                    fix="write the input to the memory that gpu_input returns",
                )
            self._in_line = True
            session.run(0, transfer.own_stream(self.device))
            return [session.buffer(output) for output in self.outputs]

    def one_class(self) -> None:
        """Add the warning that the first output has one class everywhere. The caller of
        :meth:`on_gpu` must check this, because these outputs are not copied to the host."""
        self.warnings.append(OutputWarning(self.outputs[0].name, ONE_CLASS))

    def loop(
        self, feed: Mapping[str, np.ndarray], state: Mapping[str, tuple[str, np.ndarray]]
    ) -> TensorRTLoop:
        """Return a loop in which outputs of one run become inputs of the next run, on the GPU.

        Parameters
        ----------
        feed : the inputs that stay the same from run to run, by name.
        state : input name -> (name of the output that becomes this input, array for the first run).

        Returns
        -------
        The loop. It uses the buffers of earlier loops of the same shapes, which end.

        Raises
        ------
        InputError : an input is missing or named twice, an output is unknown, or a shape or type
            does not fit.
        DeviceError : the engine is closed, or the GPU fails or has too little memory.
        """
        values = {**feed, **{name: first for name, (_, first) in state.items()}}
        outputs = {output for output, _ in state.values()}
        ports = {port.name: port for port in self.inputs}
        unknown = outputs - {port.name for port in self.outputs}
        if set(values) != set(ports) or set(feed) & set(state) or unknown:
            raise InputError(
                f"feed {sorted(feed)} and state {sorted(state)} -> {sorted(outputs)} do not fit "
                f"{self.name}; wanted each of {sorted(ports)} once and outputs among "
                f"{sorted(port.name for port in self.outputs)}"
            )
        with self._gpu.active():
            arrays = {name: self._checked(ports[name], value) for name, value in values.items()}
            shapes = {name: array.shape for name, array in arrays.items()}
            session = self._session(shapes, {name: out for name, (out, _) in state.items()})
            for name, array in arrays.items():
                session.upload(name, array)
        return TensorRTLoop(session)

    def close(self) -> None:
        """Free everything on the device. The engine and its loops cannot be used any more. A second
        call does nothing."""
        if self._gpu.closed:
            return
        if self._gpu.hung:
            self._gpu.abandon()
            _HUNG.append((self._sessions, self._gpu, self._cache, self._config, self._engine))
            _HUNG.append(self._runtime)
            return
        with self._gpu.closing():
            if self._cache is not None and not self._gpu.failed:
                self._cache.save()  # also the kernels that were compiled during the runs
            for session in self._sessions.values():
                session.free()
            self._sessions = {}
            self._gpu.stream = None  # an object is freed before the object that made it
            self._cache = None
            self._config = None
            self._engine = None
            self._runtime = None

    def __enter__(self) -> TensorRTEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _checked(self, port: Port, value: Any) -> np.ndarray:
        """``value`` in the port's dtype. InputError if the engine does not take its type or
        shape."""
        array = in_dtype(port, value, self.name)
        self._check_shape(port, array.shape)
        return array

    def _check_shape(self, port: Port, shape: Shape) -> None:
        """InputError if the engine does not take this shape."""
        low: Any = port.shape
        high = low
        if None in port.shape:
            low, _, high = map(tuple, self._engine.get_tensor_profile_shape(port.name, 0))
        pairs = zip(low, shape, high, strict=False)
        if len(shape) != len(port.shape) or any(not a <= n <= b for a, n, b in pairs):
            wanted = f"{low}" if low == high else f"{low} to {high}"
            raise InputError(
                f"input {port.name!r} of {self.name} has shape {shape}; it takes {wanted}",
                fix="resize the picture, or export again with --imgsz, or with --dynamic, "
                "--min-shape and --max-shape",
            )

    def _session(self, shapes: dict[str, Shape], state: dict[str, str]) -> Session:
        """The session for these input shapes and this state. If there are more than MOST_SESSIONS,
        the least recently used session is freed."""
        key = (tuple(shapes.items()), tuple(state.items()))
        session = self._sessions.pop(key, None) or self._new_session(shapes, state)
        if self._cache is not None and key not in self._compiled:
            self._compiled.add(key)
            self._cache.save()
        self._sessions[key] = session  # at the end: the first session is the least recently used
        if len(self._sessions) > MOST_SESSIONS:
            self._sessions.pop(next(iter(self._sessions))).free()
        return session

    def _new_session(self, shapes: dict[str, Shape], state: dict[str, str]) -> Session:
        """A session with its buffers and contexts: three contexts with a state, else one."""
        session = Session(self._gpu, self.inputs, self.outputs, state)
        try:
            for _ in range(3 if state else 1):
                context = self._new_context()
                for name, shape in shapes.items():
                    if not context.set_input_shape(name, shape):
                        raise DeviceError(
                            f"{self.name} refuses shape {shape} for {name!r}: "
                            f"{self._log.summary()}",
                            fix=REBUILD,
                        )
                session.contexts.append(context)
            for port in (*self.inputs, *self.outputs):
                session.allocate(port, tuple(session.contexts[0].get_tensor_shape(port.name)))
            session.bind()
        except (SdkError, self._gpu.cuda.Error):
            session.free()
            raise
        return session

    def _new_context(self) -> Any:
        """An execution context. DeviceError if TensorRT makes none."""
        self._log.clear()
        arguments = () if self._config is None else (self._config,)
        context = self._engine.create_execution_context(*arguments)
        if context is None:
            raise DeviceError(
                f"{self.name} makes no execution context{self._gpu.free_memory()}: "
                f"{self._log.summary()}",
                fix="close what else uses the GPU, or build again with a smaller --workspace",
            )
        return context
