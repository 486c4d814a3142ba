"""ONNX networks on ONNX Runtime: load, check, run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np

from runtime.checks import check_positive
from runtime.device import transfer
from runtime.device.choose import default_threads
from runtime.device.driver import cuda_absence, cuda_devices, parse_device
from runtime.device.transfer import Buffer
from runtime.engines.onnx_errors import (
    SEE_GPU,
    device_error,
    is_about_input,
    is_about_sizes,
    is_about_types,
    load_problem,
    ort_errors,
    reason,
)
from runtime.engines.onnx_file import check_file, check_self_contained, names_in_utf8
from runtime.engines.onnx_runtime import (
    Runner,
    default_deadline,
    import_onnxruntime,
    outlive_fork,
)
from runtime.engines.output_warnings import OutputWarning
from runtime.engines.port import Port, numpy_dtype
from runtime.errors import (
    BundleError,
    DeviceError,
    InputError,
    MissingBackend,
    SdkError,
)
from runtime.files import file_error, shown

# Arrays for inputs of these types are converted. Arrays for inputs of other types must have the
# type already.
_CONVERTED = ("tensor(float)", "tensor(float16)", "tensor(uint8)")

_OTHER_TYPE = "export the network with float32 outputs: put a Cast to float32 behind each of them"
_MULTIPLE = (
    "the network may need sizes that are multiples of a number, often 32: use imgsz=(HEIGHT, "
    "WIDTH) with multiples of 32, or add the number to its metadata as 'size_multiple'"
)


class OnnxEngine:
    """An ONNX network on ONNX Runtime. Use it as a context manager, or call ``close``.

    INT8 networks are computed as their graph says: QuantizeLinear and DequantizeLinear round the
    values, and the layers compute in floating point with the rounded values. By default ONNX
    Runtime replaces a layer and the QuantizeLinear and DequantizeLinear around it with one integer
    kernel. The 16-bit sums of these kernels saturate on x86 processors without VNNI, which changes
    labels. So this class switches the replacement off. Without it, INT8 is not faster than FP32 on
    a CPU, and INT8 weights take as much memory as FP32 weights. Other networks are not affected.

    Parameters
    ----------
    source : an .onnx file, whose external data must lie in the folder of the file (links in the
        cache of a model hub are followed); or the bytes of a model without external data.
    name : the name of the network in messages. The default is the file's name, or "the model" for
        bytes.
    threads : at most this many threads compute one operator. The default is the number of
        processors that this process may use.
    device : "cpu"; or "cuda", "cuda:1", for ONNX Runtime's CUDA provider. Operators that this
        provider lacks run on the CPU. If the provider cannot be used, the engine raises an error.
    spin : let the threads wait for the next run in a busy loop. A run that follows another one at
        once is a tenth faster. Work between two runs is slower, because the waiting threads occupy
        the processors.
    deadline_s : seconds after which the first run of the network is ended, because networks can
        loop endlessly; None for no limit. "default" is the value of the environment variable
        SEG_DEADLINE_S, where 0 is no limit, or 60 without it. Later runs have no deadline. The
        first run on a slow device, and with CUDA the search for the fastest kernels, take longer
        than later runs.

    Attributes
    ----------
    inputs, outputs : a ``Port`` for each input or output, in the file's order.
    metadata : the file's metadata_props.
    backend : "onnxruntime-cpu" or "onnxruntime-cuda".
    gpu : the number of the GPU whose arrays :meth:`on_gpu` takes; None on a CPU, and if the CUDA
        module cannot be used. Call :meth:`on_gpu` only if this is a number.
    runner : the ``Runner`` of the network. Until the first run, its ``deadline_s`` can be changed.
    warnings : the list of ``OutputWarning`` of this engine. A caller that has reported the warnings
        clears the list.

    Raises
    ------
    BundleError : the source is not an ONNX model, is damaged, or is newer than ONNX Runtime; or
        external data is missing, or lies outside the file's folder.
    InputError : the file or the GPU does not exist, or ``deadline_s`` is no number above 0, or
        SEG_DEADLINE_S is no number of 0 or more.
    MissingBackend : ONNX Runtime is not installed, or cannot use CUDA here.
    DeviceError : the device has too little memory, or fails.

    Example
    -------
    >>> with runtime.OnnxEngine("prior.onnx") as engine:
    ...     (scores,) = engine(x)  # x: (1, 3, h, w) float32
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | bytes,
        *,
        name: str = "",
        threads: int | None = None,
        device: str = "cpu",
        spin: bool = False,
        deadline_s: float | Literal["default"] | None = "default",
    ) -> None:
        if deadline_s == "default":
            deadline_s = default_deadline()
        elif deadline_s is not None:
            deadline_s = check_positive("deadline_s", deadline_s)
        model: bytes | tuple[Path, dict[str, Path]]
        if isinstance(source, bytes):
            self.name = name or "the model"
            check_self_contained(source, self.name)
            where, model = self.name, source
        else:
            path = Path(source)
            self.name = name or path.name
            where, model = shown(path), check_file(path)
        onnxruntime = import_onnxruntime(f"run {self.name}")
        kind, index = parse_device(device)
        self.device, self._kind, self._index = device, kind, index
        self.warnings: list[OutputWarning] = []
        # All runs on the CUDA module's stream use the same library handles in ONNX Runtime. So the
        # lock ``turn`` lets only one thread run at a time. A run ends when the stream has done all
        # its work, so the next thread finds the handles unused.
        self.gpu: int | None = None
        turn: AbstractContextManager[Any] = nullcontext()
        providers: list[Any] = ["CPUExecutionProvider"]
        if kind == "cuda":
            self._check_cuda(onnxruntime.get_available_providers(), index)
            ours = self._shared_stream()
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": index} | ours))
            if ours:
                self.gpu, turn = index, threading.Lock()
        self.runner = Runner(self.name, deadline_s, turn)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or default_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.log_severity_level = 4  # errors are raised as exceptions
        try:
            self._session = _session(model, options, providers=providers, enable_fallback=0)
            outlive_fork(self._session)
            self.inputs = [Port(i.name, tuple(i.shape), i.type) for i in self._session.get_inputs()]
            outputs = self._session.get_outputs()
            self.outputs = [Port(o.name, tuple(o.shape), o.type) for o in outputs]
            self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        except SdkError:
            raise
        except ort_errors() as error:
            problem, fix = load_problem(error, onnxruntime.__version__, where)
            raise self._device_error(error) or BundleError(
                f"{where} cannot be loaded: {problem}", fix=fix
            ) from error
        used = self._session.get_providers()[0]
        self.backend = "onnxruntime-" + used.removesuffix("ExecutionProvider").lower()
        if used != ("CUDAExecutionProvider" if kind == "cuda" else "CPUExecutionProvider"):
            raise MissingBackend(
                f"device {device!r} was asked for, but ONNX Runtime took {used}",
                fix="see: python -m runtime doctor",
            )

    def _check_cuda(self, available: list[str], index: int) -> None:
        """Raise MissingBackend or InputError, with the reason, if ONNX Runtime cannot use GPU
        ``index``. ``available`` are the names of ONNX Runtime's providers."""
        absence = cuda_absence()
        if "CUDAExecutionProvider" not in available:
            absence = f"this ONNX Runtime has no CUDA provider, only {', '.join(available)}"
        if absence:
            raise MissingBackend(
                f"device {self.device!r} cannot run {self.name}: {absence}",
                fix="use device='cpu', or see: python -m runtime doctor",
            )
        if index >= (count := len(cuda_devices())):
            raise InputError(
                f"device is {self.device!r}; this machine has {count} GPUs",
                fix=f"use 'cuda:0' to 'cuda:{count - 1}'" if count else "use device='cpu'",
            )

    def _shared_stream(self) -> dict[str, str]:
        """Return the option that makes the CUDA provider work in the CUDA module's own stream. If
        the CUDA module cannot be used, add a warning and return no option.

        A stream does its work in order. So the host need not wait for the network's input before it
        starts the network, and the module's events measure the network's time as well.
        """
        try:
            return {"user_compute_stream": str(transfer.own_stream(self._index))}
        except (MissingBackend, DeviceError) as error:
            self.warnings.append(
                OutputWarning(
                    self.name,
                    "the network's input and scores are copied through the host, because the CUDA "
                    f"module cannot be used: {error.message}",
                )
            )
            return {}

    def gpu_input(self, shape: tuple[int, ...]) -> None:
        """Return None: the input of :meth:`on_gpu` may lie anywhere in the GPU's memory.

        A TensorRT engine has the same method, and returns the memory that the input must be written
        to. ``shape`` is the shape of the input; this engine does not use it.
        """

    def on_gpu(self, array: Any) -> list[Buffer]:
        """Run the network on an array that lies on this engine's GPU.

        The network runs in the CUDA module's own stream, after the work that was queued there. The
        outputs stay on the GPU. They are complete when the method returns.

        Parameters
        ----------
        array : the network's only input: a float32 array on GPU ``gpu`` that has the attribute
            ``__cuda_array_interface__``.

        Returns
        -------
        A buffer on the GPU for each output.

        Raises
        ------
        InputError : the network does not take this shape, the engine is closed, or this process is
            a fork of the one that loaded the engine.
        DeviceError : the device has too little memory, or fails; or the first run, this one or an
            earlier one, did not end in time.
        """
        face, (port,) = array.__cuda_array_interface__, self.inputs
        place = ("cuda", self._index)

        session = self._session  # another thread may close the engine

        def run(*options: Any) -> Any:
            binding = session.io_binding()
            binding.bind_input(port.name, *place, np.float32, face["shape"], face["data"][0])
            for output in self.outputs:
                binding.bind_output(output.name, *place)
            session.run_with_iobinding(binding, *options)
            return binding.get_outputs()

        return [
            Buffer(v.data_ptr(), v.shape(), numpy_dtype(v.data_type()) or np.void, v.numpy)
            for v in self._run(str(face["shape"]), run)
        ]

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Run the network and return its outputs in the file's order.

        ``arrays`` has one array for each input, in the file's order. An array for a float32,
        float16 or uint8 input is converted to this type. Any other array must have the type of its
        input already.

        Raises
        ------
        InputError : the number of arrays, or the shape or type of an array, does not fit the
            network; the engine is closed; or this process is a fork of the one that loaded the
            engine.
        DeviceError : the device has too little memory, or fails; or the first run, this one or an
            earlier one, did not end in time.
        """
        if len(arrays) != len(self.inputs):
            wanted = ", ".join(f"{p.name} {p.shape}" for p in self.inputs)
            raise InputError(
                f"{self.name} got {len(arrays)} arrays; wanted {wanted}",
                fix="pass one array for each input, in this order",
            )
        feed: dict[str, Any] = {}
        for port, array in zip(self.inputs, arrays, strict=True):
            feed[port.name] = np.asarray(array, port.numpy if port.dtype in _CONVERTED else None)
        shapes = ", ".join(str(np.shape(a)) for a in arrays)
        session = self._session  # another thread may close the engine
        return self._run(shapes, lambda *options: session.run(None, feed, *options))

    def _run(self, shapes: str, run: Callable[..., Any]) -> Any:
        """Let the runner call ``run``, and return the result. Replace an error of ONNX Runtime with
        an error of this package, whose message contains ``shapes``, the shapes of the inputs."""
        try:
            return self.runner(run)
        except SdkError:
            raise
        except ort_errors() as error:
            message = f"{self.name} fails on {shapes}: {reason(error)}"
            failure = self._device_error(error)
            if failure is None and self._kind == "cuda" and not is_about_input(error):
                failure = DeviceError(message, fix=SEE_GPU)
            fix = _OTHER_TYPE if is_about_types(error) else ""
            if "Expected: 0" in str(error):
                fix = (
                    f"the file has a dimension of 0; python -m export --model {self.name} mends it"
                )
            elif is_about_sizes(error) and "size_multiple" not in self.metadata:
                fix = _MULTIPLE
            raise failure or InputError(message, fix=fix) from error

    def _device_error(self, error: Exception) -> DeviceError | None:
        """Return the DeviceError for an error of ONNX Runtime; None for another error."""
        return device_error(error, self.name, self._kind, self._index)

    def loop(self, feed: dict[str, np.ndarray], state: dict[str, tuple[str, np.ndarray]]) -> Any:
        """Return a loop in which outputs of one run become inputs of the next run.

        Parameters
        ----------
        feed : input name -> array, for the inputs that stay the same from run to run.
        state : input name -> (name of the output that becomes this input, array for the first run).

        Returns
        -------
        An :class:`runtime.engines.onnx_loop.OnnxLoop`.

        Raises
        ------
        InputError : the name of an input is missing or unknown, an array has the wrong shape or
            type, the engine is closed, or this process is a fork of the one that loaded the engine.
        DeviceError : the first run did not end in time.
        """
        from runtime.engines.onnx_loop import OnnxLoop

        self.runner.check_usable()
        return OnnxLoop(self._session, feed, state, self.device, self.runner)

    def close(self) -> None:
        """Free the network. A first run in another thread ends after the operator that it computes,
        and raises an InputError. A second call does nothing."""
        self.runner.close()
        self._session = None

    def __enter__(self) -> OnnxEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_engine(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    device: str = "cpu",
    deadline_s: float | Literal["default"] | None = "default",
) -> OnnxEngine:
    """Load an .onnx file and return the :class:`OnnxEngine` that runs it.

    This function cannot load a TensorRT engine. Such an engine lies in a bundle, and the bundle's
    manifest says how to run it.

    Parameters
    ----------
    path : an .onnx file.
    threads, device, deadline_s : as for :class:`OnnxEngine`.

    Raises
    ------
    InputError : the suffix of the file is not .onnx. All errors of :class:`OnnxEngine` are raised
        as well.

    Example
    -------
    >>> engine = runtime.load_engine("prior.onnx", threads=2)
    """
    suffix = Path(path).suffix.lower()
    if suffix != ".onnx":
        raise InputError(
            f"{shown(path)} has suffix {suffix[:80]!r}; wanted an .onnx file",
            fix="for TensorRT engines open their bundle: Segmenter(BUNDLE, backend='trt')",
        )
    return OnnxEngine(path, threads=threads, device=device, deadline_s=deadline_s)


def _session(model: bytes | tuple[Path, dict[str, Path]], options: Any, **more: Any) -> Any:
    """Make an onnxruntime.InferenceSession.

    Parameters
    ----------
    model : the bytes of a model, or what :func:`check_file` returned.
    options : the onnxruntime.SessionOptions.
    more : further arguments of the InferenceSession.
    """
    new = import_onnxruntime("run a network").InferenceSession
    if isinstance(model, bytes):
        return new(model, options, **more)
    with names_in_utf8(*model) as name:
        memory = _pass_linked(model[1], Path(name).parent.resolve(), options)
        session = new(name, options, **more)
        del memory  # the session has a copy
    return session


def _pass_linked(files: dict[str, Path], folder: Path, options: Any) -> list[np.ndarray]:
    """Pass weights that are found through links to ONNX Runtime, as mapped memory.

    ONNX Runtime from 1.24 on refuses some links that :func:`check_file` follows. Versions to 1.23
    have no function for it, and follow the links of hub caches.

    Parameters
    ----------
    files : from :func:`check_file`.
    folder : the folder of the model, with links resolved.
    options : the onnxruntime.SessionOptions.

    Returns
    -------
    The memory, which must be kept until the session is made.
    """
    linked = {  # ONNX Runtime refuses both "a.bin" and "./a.bin", which are one file
        os.path.normpath(name): file for name, file in files.items() if file != folder / name
    }
    add = getattr(options, "add_external_initializers_from_files_in_memory", None)
    if not linked or add is None:
        return []
    try:
        memory = [
            np.memmap(file, np.uint8, "r") if file.stat().st_size else np.zeros(0, np.uint8)
            for file in linked.values()
        ]
    except OSError as error:
        raise file_error("read", folder, error) from error
    add(list(linked), memory, [m.size for m in memory])
    return memory
