"""One graph of an export: its bytes, its model, and the one session that runs it."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np

from runtime.engines.onnx import OnnxEngine
from runtime.engines.onnx_errors import is_about_sizes
from runtime.engines.port import Port
from runtime.errors import BundleError, InputError, VerificationFailed

if TYPE_CHECKING:
    from onnx import ModelProto


_OTHER_SIZE = (
    "choose another size with --imgsz (many networks want multiples of 32), or export the network "
    "again"
)


class SizeFailed(VerificationFailed):
    """A network fails on an input of this size, or its output does not fit the input."""


class _Session:
    """An open session, and the number of Frozen that use it."""

    def __init__(self, data: bytes, name: str) -> None:
        self.engine, self.users = OnnxEngine(data, name=name), 0
        _SESSIONS[data] = self


_SESSIONS: WeakValueDictionary[bytes, _Session] = WeakValueDictionary()  # by the graph's bytes


class Frozen:
    """A finished ONNX graph, which is parsed, serialised and opened at most once.

    The ONNX Runtime session is opened at its first use and serves all later ones, also those of
    other Frozen with the same bytes, as long as one of them is open. Use a Frozen as a context
    manager, or call :meth:`close`, so that the session is closed.

    Parameters
    ----------
    name : of the graph, for messages.
    model : the graph, which must not be changed afterwards.
    data : the serialised graph. At least one of ``model`` and ``data`` is needed.

    Raises
    ------
    BundleError : the graph has 2 GiB or more. The first use of the session also raises what
        :class:`runtime.engines.onnx.OnnxEngine` raises.

    Example
    -------
    >>> with Frozen("prior", data=Path("prior.onnx").read_bytes()) as graph:
    ...     graph.inputs[0].shape
    (1, 3, 360, 480)
    """

    def __init__(
        self, name: str, model: ModelProto | None = None, data: bytes | None = None
    ) -> None:
        assert model is not None or data is not None
        self.name, self._model = name, model
        self.data: bytes = serialised(model, name) if data is None else data  # type: ignore[arg-type]
        self.closed = False

    @cached_property
    def model(self) -> ModelProto:
        """The parsed graph; it must not be changed."""
        import onnx

        return self._model if self._model is not None else onnx.load_from_string(self.data)

    @cached_property
    def engine(self) -> OnnxEngine:
        """The graph on ONNX Runtime's CPU provider."""
        assert not self.closed, f"{self.name} is used after it was closed"
        self._session = _SESSIONS.get(self.data) or _Session(self.data, self.name)
        self._session.users += 1
        return self._session.engine

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """The outputs for ``arrays``, as :meth:`OnnxEngine.__call__` returns them.

        Raises
        ------
        SizeFailed : the graph fails on them.
        """
        engine = self.engine
        try:
            return engine(*arrays)
        except InputError as error:
            fix = error.fix or "export the network again"
            cause = error.__cause__
            if is_about_sizes(cause if isinstance(cause, Exception) else error):
                is_free = any(
                    not isinstance(n, int) for port in self.inputs for n in port.shape[2:]
                )
                fix = _OTHER_SIZE if is_free else "export the network again"
            raise SizeFailed(error.message, fix=fix) from error

    @property
    def inputs(self) -> list[Port]:
        """Name, shape and type of each input, as ONNX Runtime reports them."""
        return self.engine.inputs

    @property
    def outputs(self) -> list[Port]:
        """Name, shape and type of each output, as ONNX Runtime reports them."""
        return self.engine.outputs

    @property
    def opset(self) -> int:
        """The version of the standard operators."""
        return next(o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx"))

    def close(self) -> None:
        """Close the session, if one was opened and no other Frozen uses it."""
        if "engine" in self.__dict__ and not self.closed:
            self._session.users -= 1
            if self._session.users == 0:
                del _SESSIONS[self.data]
                self.engine.close()
        self.closed = True

    def __enter__(self) -> Frozen:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serialised(model: ModelProto, name: str) -> bytes:
    """The bytes of a model that contains all of its weights.

    Raises
    ------
    BundleError : the model has 2 GiB or more, which is more than an ONNX file can hold.
    """
    from google.protobuf.message import EncodeError

    try:
        return model.SerializeToString(deterministic=True)
    except (EncodeError, ValueError) as error:
        raise BundleError(
            f"{name} has 2 GiB or more with its weights; ONNX files hold less",
            fix="export a smaller network",
        ) from error
