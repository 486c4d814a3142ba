"""CUDA graphs by functions of the CUDA driver (cuda.h), which PyCUDA does not have."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any


class NoGraph(Exception):
    """The driver cannot capture a graph; the message says why."""


class CudaGraph:
    """The work that ``enqueue`` puts into a stream, captured so that one call launches all of it.

    Parameters
    ----------
    enqueue : puts the work into the stream; returns False if that fails.
    stream : the address of the CUDA stream.

    Raises
    ------
    NoGraph : the driver is not found, refuses a call, or cannot capture the work.
    """

    def __init__(self, enqueue: Callable[[], bool], stream: int) -> None:
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise NoGraph(str(error)) from error
        captured = ctypes.c_void_p(stream)
        self._graph, self._launchable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", captured, 1)  # 1: THREAD_LOCAL
        try:
            accepted = enqueue()
        finally:
            self._call("cuStreamEndCapture", captured, ctypes.byref(self._graph))
        if not accepted:
            self.free()
            raise NoGraph("the run cannot be captured")
        try:
            self._call(
                "cuGraphInstantiateWithFlags",
                ctypes.byref(self._launchable),
                self._graph,
                ctypes.c_ulonglong(0),
            )
        except NoGraph:
            self.free()
            raise

    def launch(self, stream: int) -> int:
        """Launch the work in ``stream``, the address of a CUDA stream. Returns the driver's code,
        which is 0 when the driver accepted the graph."""
        return int(self._driver.cuGraphLaunch(self._launchable, ctypes.c_void_p(stream)))

    def free(self) -> None:
        """Release the graph. A second call does nothing."""
        for handle, name in (
            (self._launchable, "cuGraphExecDestroy"),
            (self._graph, "cuGraphDestroy"),
        ):
            if handle.value:
                getattr(self._driver, name)(handle)
                handle.value = None

    def _call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver. NoGraph if the driver does not have it or returns an
        error."""
        try:
            code = getattr(self._driver, name)(*arguments)
        except AttributeError as error:
            raise NoGraph(str(error)) from error
        if code:
            raise NoGraph(f"{name} gives {code}")
