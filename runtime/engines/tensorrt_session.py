"""Buffers and launches of a TensorRT engine for one combination of input shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.device import transfer
from runtime.device.transfer import Buffer
from runtime.engines.cuda_graph import CudaGraph, NoGraph
from runtime.engines.port import Port, Shape
from runtime.engines.tensorrt import REBUILD
from runtime.engines.tensorrt_stream import EngineStream
from runtime.errors import DeviceError, InputError


@dataclass
class Session:
    """Buffers for one set of input shapes, and one execution context for each set of addresses.

    Attributes
    ----------
    gpu : the engine's stream, GPU and log.
    inputs, outputs : the engine's ports.
    state : for each input that a run writes for the next run: the name of the output. Such a pair
        shares three buffers; context i reads buffer i and writes the next one, after the last the
        first. Each other tensor has one buffer.
    contexts : TensorRT's execution contexts: three with a state, else one.
    device, host : the buffers on the GPU and the page-locked array on the host, by tensor name.
    graphs : the CUDA graph of each context that has run; None for a context that runs without one.
    user : the loop that uses the buffers.
    """

    gpu: EngineStream
    inputs: list[Port]
    outputs: list[Port]
    state: dict[str, str]
    contexts: list[Any] = field(default_factory=list)
    device: dict[str, list[Any]] = field(default_factory=dict)
    host: dict[str, np.ndarray] = field(default_factory=dict)
    graphs: dict[int, CudaGraph | None] = field(default_factory=dict)
    user: object = None

    def allocate(self, port: Port, shape: Shape) -> None:
        """Allocate the buffers of a port with this shape. An output of the state uses the buffers
        of its input, which must be allocated before.

        Raises
        ------
        DeviceError : the shape is not fixed, or the GPU has too little memory.
        InputError : an output of the state differs from its input in shape or type.
        """
        if min(shape, default=1) < 0:
            raise DeviceError(
                f"{port.name!r} of {self.gpu.name} has no fixed shape: {shape}",
                fix="export the bundle again, for a fixed size",
            )
        cuda = self.gpu.cuda
        dtype = np.dtype(port.numpy)
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
        """Set the addresses of all buffers in the contexts.

        Raises
        ------
        DeviceError : TensorRT refuses an address.
        """
        for i, context in enumerate(self.contexts):
            for name, buffers in self.device.items():
                if not context.set_tensor_address(name, int(buffers[i % len(buffers)])):
                    raise DeviceError(
                        f"{self.gpu.name} refuses a buffer for {name!r}: {self.gpu.log.summary()}",
                        fix=REBUILD,
                    )

    def upload(self, name: str, array: np.ndarray) -> None:
        """Put a copy into the stream: from an array of the right shape and type to the first buffer
        of input ``name``, through page-locked memory."""
        self.host[name][...] = array
        self.gpu.cuda.memcpy_htod_async(self.device[name][0], self.host[name], self.gpu.stream)

    def download(self, names: Sequence[str], buffer: int = 0) -> dict[str, np.ndarray]:
        """Copy tensors to the host, after all work of the stream.

        Parameters
        ----------
        names : of the tensors.
        buffer : the number of the buffer, for tensors that have three.

        Returns
        -------
        Arrays by name, which belong to the caller.
        """
        for name in names:
            self.gpu.cuda.memcpy_dtoh_async(
                self.host[name], self.device[name][buffer], self.gpu.stream
            )
        self.gpu.wait()
        return {name: self.host[name].copy() for name in names}

    def buffer(self, port: Port) -> Buffer:
        """The first buffer of a port as an array on the GPU, for other code that uses the GPU. Its
        method ``numpy`` raises InputError after the buffer was freed."""

        def numpy() -> np.ndarray:
            transfer.wait_for_stream(self.gpu.device)
            with self.gpu.active():
                if port.name not in self.host:
                    raise InputError(
                        f"the buffer of {port.name!r} was freed: pictures of other shapes ran",
                        fix="copy the output with numpy() before the next run",
                    )
                found = self.download([port.name])
            self.gpu.note(found)
            return found[port.name]

        shape, address = self.host[port.name].shape, int(self.device[port.name][0])
        return Buffer(address, shape, port.numpy, numpy)

    def run(self, i: int, stream: int | None = None) -> None:
        """Put a run of context ``i`` into a stream. The first run is a plain one; later runs use a
        CUDA graph if the driver can capture it.

        Parameters
        ----------
        i : the number of the context.
        stream : address of the CUDA stream; the engine's own when None.

        Raises
        ------
        DeviceError : TensorRT or the driver refused the run. The engine cannot be used any more.
        """
        gpu = self.gpu
        stream = gpu.stream.handle if stream is None else stream
        if i in self.graphs and self.graphs[i] is None and gpu.graph in ("not yet", "captured"):
            try:
                self.graphs[i] = CudaGraph(
                    lambda: self._enqueue(i, gpu.stream.handle), gpu.stream.handle
                )
                gpu.graph = "captured"
            except NoGraph as reason:
                gpu.graph = f"plain: {reason}"
        graph = self.graphs.setdefault(i, None)
        if graph is not None:
            code = graph.launch(stream)
            if code:
                raise gpu.dies(f"the CUDA graph was refused with code {code}")
        elif not self._enqueue(i, stream):
            raise gpu.dies(f"the run was refused: {gpu.log.summary()}")

    def _enqueue(self, i: int, stream: int) -> bool:
        """Put a plain run of context ``i`` into a stream; False if TensorRT refuses it."""
        return bool(self.contexts[i].execute_async_v3(stream))

    def free(self) -> None:
        """Free all graphs, contexts and buffers, and end the loop that uses them."""
        for graph in self.graphs.values():
            if graph is not None:
                graph.free()
        self.user = None
        for buffers in self.device.values():
            buffers.clear()
        for container in (self.graphs, self.contexts, self.device, self.host):
            container.clear()


def in_dtype(port: Port, value: Any, owner: str) -> np.ndarray:
    """Convert an array to the port's dtype, in C order.

    Parameters
    ----------
    port : an input.
    value : an array, or nested lists of numbers.
    owner : the name of the engine, for the message.

    Raises
    ------
    InputError : the conversion would change the kind of number, for example from float to integer.
    """
    array, dtype = np.asarray(value), np.dtype(port.numpy)
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise InputError(f"input {port.name!r} of {owner} is {array.dtype}; wanted {dtype}")
    return np.asarray(array, dtype, order="C")
