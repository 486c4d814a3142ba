"""The GPU, the CUDA stream and the log that all work of one TensorRT engine shares."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from runtime.engines.output_warnings import OutputWarning, output_warnings
from runtime.errors import DeviceError

_POLL = 50e-6  # seconds between two checks of a busy stream


class EngineStream:
    """The GPU context, stream and log that an engine, its sessions and its loops share. The object
    records whether the GPU still works.

    Parameters
    ----------
    name : of the engine, for messages.
    device : the GPU's number.
    cuda : PyCUDA's driver module.
    log : TensorRT's logger.
    timeout_s : a run that takes more seconds counts as hung.

    Attributes
    ----------
    stream : PyCUDA's stream; None until the engine is loaded and after it is closed.
    graph : how runs are launched; see ``TensorRTEngine``.
    warnings : the last 64 warnings about outputs.
    hung : whether a run has exceeded ``timeout_s``.
    """

    def __init__(self, name: str, device: int, cuda: Any, log: Any, timeout_s: float) -> None:
        self.name, self.device, self.cuda, self.log = name, device, cuda, log
        self.timeout_s = timeout_s
        self.stream: Any = None
        self.graph = "not yet"
        self.warnings: deque[OutputWarning] = deque(maxlen=64)
        self.hung = False
        self._dead = ""
        self._primary: Any = _primary_context(cuda, device)

    @property
    def closed(self) -> bool:
        """Whether the engine was closed."""
        return self._primary is None

    @property
    def failed(self) -> bool:
        """Whether the GPU has failed."""
        return bool(self._dead)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the GPU's context the current one of this thread for a block. PyCUDA's errors in the
        block become DeviceErrors.

        Raises
        ------
        DeviceError : the engine is closed or cannot be used any more, the GPU fails, or it has too
            little memory.
        """
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
        except self.cuda.MemoryError as error:
            raise DeviceError(
                f"{self.name} does not fit{self.free_memory()}: {error}",
                fix="smaller pictures, or close what else uses the GPU",
            ) from error
        except self.cuda.Error as error:
            raise self.dies(f"the GPU fails: {error}") from error
        finally:
            self.cuda.Context.pop()

    def dies(self, why: str) -> DeviceError:
        """The error to raise when the GPU fails for the reason ``why``. After this call ``active``
        always raises an error, because later results of this engine may be wrong."""
        self._dead = why
        return DeviceError(f"{self.name}: {why}", fix="load it again, in a new process")

    def free_memory(self) -> str:
        """The GPU's number and its free memory as the end of a message: " GPU 0 (10 of 100 MiB
        free)"."""
        free, total = self.cuda.mem_get_info()
        return f" GPU {self.device} ({free >> 20} of {total >> 20} MiB free)"

    def wait(self) -> None:
        """Wait until all work in the stream is done.

        Raises
        ------
        DeviceError : the work takes longer than ``timeout_s``.
        """
        end = time.monotonic() + self.timeout_s
        while not self.stream.is_done():
            if time.monotonic() > end:
                self.hung = True
                raise self.dies(f"the GPU has not answered for {self.timeout_s:g} s")
            time.sleep(_POLL)

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Make the GPU's context the current one of this thread for the block that frees the
        engine. This works also after a failure of the GPU. The engine counts as closed from the
        start of the block."""
        primary, self._primary = self._primary, None
        primary.push()
        try:
            yield
        finally:
            self.cuda.Context.pop()

    def abandon(self) -> None:
        """Mark the engine as closed without freeing anything."""
        self._primary = None

    def note(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Append a warning for each output that is most likely wrong.

        Parameters
        ----------
        outputs : arrays by name.
        """
        self.warnings.extend(output_warnings(outputs))


@functools.cache
def _primary_context(cuda: Any, device: int) -> Any:
    """The GPU's primary context. It is never released, because PyCUDA would leave the released
    context as the current one of its thread, where every later call fails."""
    return cuda.Device(device).retain_primary_context()
