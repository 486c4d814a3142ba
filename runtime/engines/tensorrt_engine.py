"""Run a TensorRT or TensorRT for RTX engine: named tensors, every answer checked.

This has not been run on a device. It is written from the packages' own interface files and
documentation (TensorRT 10.3, 10.13 and 11.4, TensorRT for RTX 1.7, PyCUDA 2026.1), and its tests
run on stand-ins for them.
"""

from __future__ import annotations

import ctypes
import functools
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.device import transfer
from runtime.device.transfer import Buffer
from runtime.engines.plan import read_header
from runtime.engines.port import OutputWarning, Port
from runtime.engines.tensorrt import DTYPES, REBUILD, bridge_log, load_pycuda, load_tensorrt
from runtime.errors import BundleError, DeviceError, EngineMismatch, InputError, SdkError

MOST_SESSIONS = 4  # sets of buffers that are kept, one for each combination of input shapes
ONE_CLASS = "one class covers the whole picture"
_POLL = 50e-6  # seconds between two looks at a busy stream
_HUNG: list[Any] = []  # what a hung GPU may still use: to free it would hang, too
_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}

Shape = tuple[int, ...]


class TensorRTEngine:
    """A plan on a GPU; use as a context manager or call ``close``. For one thread at a time.

    Parameters
    ----------
    plan : the raw plan. It is native code: load only what was checked against its hash. Code for
        the host inside it stays forbidden (``engine_host_code_allowed`` is False).
    runtime : "tensorrt" or "tensorrt_rtx".
    name : for messages.
    device : the GPU's number.
    version, compute_capabilities : what the plan was built with and for, from its manifest.
    timeout_s : a run that takes longer counts as hung; but for :meth:`on_gpu`, whose end is waited
        for elsewhere.

    Attributes
    ----------
    inputs, outputs : ports; dimensions that are free are None.
    warnings : the last 64 ``OutputWarning``: NaN or infinite values, one class everywhere.
    graph : how runs are launched: "not yet" (the first run of each shape is a plain one),
        "captured", "by the runtime", or "plain: " and why no CUDA graph is used.

    Raises
    ------
    MissingBackend : no TensorRT, PyCUDA or driver.
    EngineMismatch : built for another version or device.
    BundleError : no plan, or a damaged one.
    DeviceError : the device refuses.
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
        self.warnings: deque[OutputWarning] = deque(maxlen=64)
        self.graph = "not yet"
        self.timeout_s = timeout_s
        self._dead = ""
        self._hung = self._in_line = False
        self._sessions: dict[Any, _Session] = {}
        self._runtime: Any = None
        self._engine: Any = None
        self._stream: Any = None
        self._trt = load_tensorrt(runtime)
        header = read_header(plan)
        self._check_version(runtime, version or (header.version if header else ""))
        self._cuda = load_pycuda()
        self._check_device(tuple(compute_capabilities))
        self._log = bridge_log(self._trt)
        self._primary: Any = _primary_context(self._cuda, device)
        with self._active():
            self._open(plan)

    def _check_version(self, runtime: str, built: str) -> None:
        here = str(self._trt.__version__)
        # As many numbers as both have: a wheel may call itself 10.3.0, its plan 10.3.0.26.
        pairs = zip(re.findall(r"\d+", built), re.findall(r"\d+", here), strict=False)
        if any(int(a) != int(b) for a, b in pairs):
            raise EngineMismatch(
                f"{self.name} was built with {runtime} {built}; this process has loaded {here}",
                fix=REBUILD,
            )

    def _check_device(self, wanted: tuple[str, ...]) -> None:
        gpus = [self._cuda.Device(i) for i in range(self._cuda.Device.count())]
        if not 0 <= self.device < len(gpus):
            raise InputError(f"device is {self.device}; wanted 0 to {len(gpus) - 1}")
        has = [".".join(map(str, gpu.compute_capability())) for gpu in gpus]
        if wanted and has[self.device] not in wanted:
            fits = [f"cuda:{i}" for i, capability in enumerate(has) if capability in wanted]
            raise EngineMismatch(
                f"{self.name} was built for compute capability {', '.join(wanted)}; GPU "
                f"{self.device} ({gpus[self.device].name()}) has {has[self.device]}",
                fix=f"device {fits[0]!r}, or: {REBUILD}" if fits else REBUILD,
            )

    def _open(self, plan: bytes) -> None:
        trt = self._trt
        self._log.clear()
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self._refused_plan(self._log.summary())
        self._stream = self._cuda.Stream()
        for i in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(i)
            shape = tuple(d if d >= 0 else None for d in self._engine.get_tensor_shape(name))
            kind = self._engine.get_tensor_dtype(name).name
            port = Port(name, shape, DTYPES.get(kind, kind))
            if port.dtype not in _NUMPY:
                raise BundleError(f"{name} of {self.name} is {kind}, which NumPy has not")
            is_input = self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self.inputs if is_input else self.outputs).append(port)

    def _refused_plan(self, why: str) -> SdkError:
        """What TensorRT's words mean when it gives no engine."""
        here = f"TensorRT {self._trt.__version__}"
        if re.search("out ?of ?memory", why, re.IGNORECASE):
            return DeviceError(f"{self.name} does not fit{self._free()}: {why}")
        if re.search("version|compute|device|platform", why, re.IGNORECASE):
            return EngineMismatch(
                f"{self.name} was built for another version or device; {here} says: {why}",
                fix=REBUILD,
            )
        return BundleError(f"{self.name} is no engine that {here} can load: {why}", fix=REBUILD)

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Outputs for ``arrays``, one per input, in the engine's order."""
        if len(arrays) != len(self.inputs):
            wanted = ", ".join(f"{p.name} {p.shape}" for p in self.inputs)
            raise InputError(f"{self.name} got {len(arrays)} arrays; wanted {wanted}")
        if self._in_line:  # buffers may be in use on that stream
            transfer.wait(self.device)
            self._in_line = False
        with self._active():
            pairs = zip(self.inputs, arrays, strict=True)
            feed = {port.name: self._checked(port, array) for port, array in pairs}
            session = self._session({name: array.shape for name, array in feed.items()}, {})
            for name, array in feed.items():
                session.upload(name, array)
            session.run(0)
            outputs = session.download([port.name for port in self.outputs])
        self._guard(outputs)
        return list(outputs.values())

    @property
    def gpu(self) -> int:
        """The GPU on which it takes arrays that lie there."""
        return self.device

    def gpu_input(self, shape: Shape) -> Buffer:
        """Where the one input of this shape has to lie."""
        (port,) = self.inputs
        with self._active():
            self._check_shape(port, shape)
            return self._session({port.name: shape}, {}).buffer(port)

    def on_gpu(self, array: Any) -> list[Buffer]:
        """Outputs for what was written to ``gpu_input``, in line with the CUDA module's own stream:
        left there, complete when that has come to them, and overwritten by the next run."""
        (port,) = self.inputs
        with self._active():
            session = self._session({port.name: tuple(array.shape)}, {})
            if array.__cuda_array_interface__["data"][0] != int(session.device[port.name][0]):
                raise InputError(f"the array is not where {self.name} takes {port.name!r} from")
            self._in_line = True
            session.run(0, transfer.own_stream(self.device))
            return [session.buffer(output) for output in self.outputs]

    def one_class(self) -> None:
        """Note that the first output has one class everywhere: of a run on the GPU, others see."""
        self.warnings.append(OutputWarning(self.outputs[0].name, ONE_CLASS))

    def loop(
        self, feed: Mapping[str, np.ndarray], state: Mapping[str, tuple[str, np.ndarray]]
    ) -> TensorRTLoop:
        """Run again and again on the device, with a state that never leaves it.

        Parameters
        ----------
        feed : the inputs that stay, by name.
        state : for each input that the previous run writes: its output's name, and the first value.

        Returns
        -------
        A loop. It shares buffers with earlier loops of the same shapes, and ends them.
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
        with self._active():
            arrays = {name: self._checked(ports[name], value) for name, value in values.items()}
            shapes = {name: array.shape for name, array in arrays.items()}
            session = self._session(shapes, {name: out for name, (out, _) in state.items()})
            for name, array in arrays.items():
                session.upload(name, array)
        return TensorRTLoop(self, session)

    def close(self) -> None:
        """Free everything on the device. What was loaded cannot be used any more."""
        primary, self._primary = self._primary, None
        if primary is None:
            return
        if self._hung:
            _HUNG.append((self._sessions, self._stream, self._engine, self._runtime))
            return
        primary.push()
        try:
            for session in self._sessions.values():
                session.free()
            self._sessions = {}
            self._stream = None  # one by one: what was made from something goes before it
            self._engine = None
            self._runtime = None
        finally:
            self._cuda.Context.pop()

    def __enter__(self) -> TensorRTEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _active(self) -> Iterator[None]:
        """The GPU's context for this thread, and PyCUDA's errors as ours."""
        if self._primary is None:
            raise DeviceError(f"{self.name} is closed", fix="load it again")
        if self._dead:
            raise DeviceError(
                f"{self.name} cannot be used any more: {self._dead}",
                fix="load it again, in a new process if the GPU failed",
            )
        self._primary.push()
        try:
            yield
        except self._cuda.MemoryError as error:
            raise DeviceError(
                f"{self.name} does not fit{self._free()}: {error}",
                fix="smaller pictures, or close what else uses the GPU",
            ) from error
        except self._cuda.Error as error:
            raise self._dies(f"the GPU fails: {error}") from error
        finally:
            self._cuda.Context.pop()

    def _dies(self, why: str) -> DeviceError:
        """From now on each call says why; nothing that this engine still gave could be trusted."""
        self._dead = why
        return DeviceError(f"{self.name}: {why}", fix="load it again, in a new process")

    def _free(self) -> str:
        free, total = self._cuda.mem_get_info()
        return f" GPU {self.device} ({free >> 20} of {total >> 20} MiB free)"

    def _checked(self, port: Port, value: Any) -> np.ndarray:
        """``value`` in the port's dtype and of a shape that the engine takes."""
        array, dtype = np.asarray(value), np.dtype(_NUMPY[port.dtype])
        if not np.can_cast(array.dtype, dtype, "same_kind"):
            raise InputError(f"input {port.name!r} of {self.name} is {array.dtype}; wanted {dtype}")
        self._check_shape(port, array.shape)
        return np.asarray(array, dtype, order="C")

    def _check_shape(self, port: Port, shape: Shape) -> None:
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

    def _session(self, shapes: dict[str, Shape], state: dict[str, str]) -> _Session:
        key = (tuple(shapes.items()), tuple(state.items()))
        session = self._sessions.pop(key, None) or self._new_session(shapes, state)
        self._sessions[key] = session  # the last one used comes last
        if len(self._sessions) > MOST_SESSIONS:
            self._sessions.pop(next(iter(self._sessions))).free()
        return session

    def _new_session(self, shapes: dict[str, Shape], state: dict[str, str]) -> _Session:
        """Contexts for these shapes, one for each set of a state's three buffers, and buffers."""
        session = _Session(self, state)
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
        except (SdkError, self._cuda.Error):
            session.free()
            raise
        return session

    def _new_context(self) -> Any:
        self._log.clear()
        if hasattr(self._trt, "CudaGraphStrategy"):  # TensorRT for RTX captures by itself
            config = self._engine.create_runtime_config()
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
            self.graph = "by the runtime"
        else:
            context = self._engine.create_execution_context()
        if context is None:
            raise DeviceError(
                f"{self.name} gives no execution context{self._free()}: {self._log.summary()}",
                fix="close what else uses the GPU, or build again with a smaller --workspace",
            )
        return context

    def _wait(self) -> None:
        """Until the stream has run dry; never for ever."""
        end = time.monotonic() + self.timeout_s
        while not self._stream.is_done():
            if time.monotonic() > end:
                self._hung = True
                raise self._dies(f"the GPU has not answered for {self.timeout_s:g} s")
            time.sleep(_POLL)

    def _guard(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Append to ``warnings`` what no error will tell."""
        for name, array in outputs.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                count = int((~np.isfinite(array)).sum())
                message = f"{count} of {array.size} values are NaN or infinite"
                self.warnings.append(OutputWarning(name, message))
            elif _one_class(array):
                self.warnings.append(OutputWarning(name, ONE_CLASS))


class TensorRTLoop:
    """A state that runs write and read on the device; made by ``TensorRTEngine.loop``.

    There are three sets of its buffers: the one that is read, and those of the two steps before.
    """

    def __init__(self, engine: TensorRTEngine, session: _Session) -> None:
        self._engine, self._session = engine, session
        self._at = 0  # the set that holds the state
        self._past = 0  # how many steps can be undone
        session.user = self

    def step(self, **changed: np.ndarray) -> dict[str, np.ndarray]:
        """Run once.

        Parameters
        ----------
        changed : new values for inputs of the feed, of the same shapes.

        Returns
        -------
        The outputs that are no state.
        """
        engine, session = self._engine, self._mine()
        ports = {port.name: port for port in engine.inputs if port.name not in session.state}
        for name, value in changed.items():
            if name not in ports or np.shape(value) != session.host[name].shape:
                raise InputError(
                    f"{name!r} of shape {np.shape(value)} cannot be changed in this loop; wanted "
                    + ", ".join(f"{port} {session.host[port].shape}" for port in ports)
                )
        names = [p.name for p in engine.outputs if p.name not in session.state.values()]
        with engine._active():
            for name, value in changed.items():
                session.upload(name, engine._checked(ports[name], value))
            session.run(self._at)
            outputs = session.download(names)
        self._at = (self._at + 1) % 3
        self._past = min(self._past + 1, 2)
        engine._guard(outputs)
        return outputs

    def undo(self, n: int = 1) -> None:
        """Go back to the state of ``n`` steps ago, at most 2."""
        if not 0 <= n <= self._past:
            raise InputError(f"n is {n}; {self._past} steps can be undone")
        self._at = (self._at - n) % 3
        self._past -= n

    def state(self) -> dict[str, np.ndarray]:
        """Copies of the state, by input name."""
        session = self._mine()
        with self._engine._active():
            return session.download(list(session.state), self._at)

    def _mine(self) -> _Session:
        if self._session.user is not self:
            raise DeviceError(
                "this loop has ended: a later one, or close, took its buffers",
                fix="keep what you need with state() before you start another",
            )
        return self._session


@dataclass
class _Session:
    """Buffers for one set of input shapes, and one execution context for each set of addresses.

    ``state`` maps an input to the output that becomes it. Such an input has three buffers, and
    context i reads buffer i and writes buffer i + 1; all other tensors have one.
    """

    engine: TensorRTEngine
    state: dict[str, str]
    contexts: list[Any] = field(default_factory=list)
    device: dict[str, list[Any]] = field(default_factory=dict)
    host: dict[str, np.ndarray] = field(default_factory=dict)  # page-locked
    graphs: dict[int, _CudaGraph | None] = field(default_factory=dict)
    user: object = None

    def allocate(self, port: Port, shape: Shape) -> None:
        if min(shape, default=1) < 0:
            raise DeviceError(f"{port.name!r} of {self.engine.name} has no fixed shape: {shape}")
        cuda = self.engine._cuda
        dtype = np.dtype(_NUMPY[port.dtype])
        for name, output in self.state.items():
            if output == port.name:
                source = self.host[name]
                if (source.shape, source.dtype) != (shape, dtype):
                    raise InputError(
                        f"output {output!r} {shape} {dtype} cannot become input {name!r} "
                        f"{source.shape} {source.dtype}"
                    )
                first, second, third = self.device[name]
                self.device[output] = [second, third, first]
                return
        self.host[port.name] = host = cuda.pagelocked_empty(shape, dtype)
        count = 3 if port.name in self.state else 1
        buffers = self.device.setdefault(port.name, [])
        for _ in range(count):
            buffers.append(cuda.mem_alloc(max(host.nbytes, 1)))

    def bind(self) -> None:
        for i, context in enumerate(self.contexts):
            for name, buffers in self.device.items():
                if not context.set_tensor_address(name, int(buffers[i % len(buffers)])):
                    raise DeviceError(
                        f"{self.engine.name} refuses a buffer for {name!r}: "
                        f"{self.engine._log.summary()}",
                        fix=REBUILD,
                    )

    def upload(self, name: str, array: np.ndarray) -> None:
        """Into the first buffer of ``name``, by way of page-locked memory."""
        self.host[name][...] = array
        self.engine._cuda.memcpy_htod_async(
            self.device[name][0], self.host[name], self.engine._stream
        )

    def download(self, names: Sequence[str], buffer: int = 0) -> dict[str, np.ndarray]:
        """Copies, when everything before has run."""
        for name in names:
            self.engine._cuda.memcpy_dtoh_async(
                self.host[name], self.device[name][buffer], self.engine._stream
            )
        self.engine._wait()
        return {name: self.host[name].copy() for name in names}

    def buffer(self, port: Port) -> Buffer:
        """The first buffer of a port, for others on this GPU."""

        def numpy() -> np.ndarray:
            transfer.wait(self.engine.device)
            with self.engine._active():
                if port.name not in self.host:
                    raise InputError(f"the buffer of {port.name!r} was given up: other shapes ran")
                found = self.download([port.name])
            self.engine._guard(found)
            return found[port.name]

        shape, address = self.host[port.name].shape, int(self.device[port.name][0])
        return Buffer(address, shape, _NUMPY[port.dtype], numpy)

    def run(self, i: int, stream: int | None = None) -> None:
        """Enqueue context ``i``: plainly for the first time, then as a CUDA graph if it can be; to
        the engine's own stream, or ``stream``."""
        engine = self.engine
        stream = engine._stream.handle if stream is None else stream
        if i in self.graphs and self.graphs[i] is None and engine.graph in ("not yet", "captured"):
            try:
                self.graphs[i] = _CudaGraph(
                    lambda: self._enqueue(i, engine._stream.handle), engine._stream.handle
                )
                engine.graph = "captured"
            except _NoGraph as reason:
                engine.graph = f"plain: {reason}"
        graph = self.graphs.setdefault(i, None)
        if graph is not None:
            code = graph.launch(stream)
            if code:
                raise engine._dies(f"the CUDA graph was refused with code {code}")
        elif not self._enqueue(i, stream):
            raise engine._dies(f"the run was refused: {engine._log.summary()}")

    def _enqueue(self, i: int, stream: int) -> bool:
        return bool(self.contexts[i].execute_async_v3(stream))

    def free(self) -> None:
        for graph in self.graphs.values():
            if graph is not None:
                graph.free()
        self.user = None
        for buffers in self.device.values():
            buffers.clear()
        for container in (self.graphs, self.contexts, self.device, self.host):
            container.clear()


class _NoGraph(Exception):
    """The driver captures no graph; the message says why."""


class _CudaGraph:
    """What ``enqueue`` puts into a stream, captured to be launched at once.

    PyCUDA has no such calls, so these go to the driver that it has loaded (cuda.h).
    """

    def __init__(self, enqueue: Callable[[], bool], stream: int) -> None:
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise _NoGraph(str(error)) from error
        captured = ctypes.c_void_p(stream)
        self._graph, self._launchable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", captured, 1)  # 1: of this thread alone
        try:
            accepted = enqueue()
        finally:
            self._call("cuStreamEndCapture", captured, ctypes.byref(self._graph))
        if not accepted:
            self.free()
            raise _NoGraph("the run cannot be captured")
        try:
            self._call(
                "cuGraphInstantiateWithFlags",
                ctypes.byref(self._launchable),
                self._graph,
                ctypes.c_ulonglong(0),
            )
        except _NoGraph:
            self.free()
            raise

    def launch(self, stream: int) -> int:
        """The driver's answer: 0 if it took the graph."""
        return int(self._driver.cuGraphLaunch(self._launchable, ctypes.c_void_p(stream)))

    def free(self) -> None:
        for handle, name in (
            (self._launchable, "cuGraphExecDestroy"),
            (self._graph, "cuGraphDestroy"),
        ):
            if handle.value:
                getattr(self._driver, name)(handle)
                handle.value = None

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            code = getattr(self._driver, name)(*arguments)
        except AttributeError as error:
            raise _NoGraph(str(error)) from error
        if code:
            raise _NoGraph(f"{name} gives {code}")


def _one_class(array: np.ndarray) -> bool:
    """Whether labels (N, H, W), or the largest of scores (N, K, H, W), are the same everywhere."""
    scores = array.ndim == 4 and array.shape[1] > 1 and array.dtype.kind == "f"
    if not scores and (array.ndim != 3 or array.dtype.kind not in "iu"):
        return False
    for part in (array[..., ::8, ::8], array):  # the first is enough for most pictures
        labels = part.argmax(1) if scores else part
        if labels.size < 2 or (labels != labels.flat[0]).any():
            return False
    return True


@functools.cache
def _primary_context(cuda: Any, device: int) -> Any:
    """The GPU's primary context, kept while the process lives: PyCUDA leaves a released one current
    in its thread, and everything after would fail."""
    return cuda.Device(device).retain_primary_context()
