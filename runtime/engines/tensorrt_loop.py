"""Steps of a refinement on a TensorRT engine. The state is stored on the device."""

from __future__ import annotations

import numpy as np

from runtime.engines.tensorrt_session import Session, in_dtype
from runtime.errors import DeviceError, InputError


class TensorRTLoop:
    """Runs that read a state on the device and write the next state. ``TensorRTEngine.loop`` makes
    this object.

    There are three sets of buffers for the state: one for the current state, and two for the states
    of the two steps before it.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._at = 0  # the set of buffers with the current state
        self._past = 0  # how many steps can be undone
        session.user = self

    def step(self, **changed: np.ndarray) -> dict[str, np.ndarray]:
        """Run the engine once.

        Parameters
        ----------
        changed : new values for inputs of the feed, of the same shapes; later steps use them, too.

        Returns
        -------
        The outputs that are no state, by name.

        Raises
        ------
        InputError : a name that the feed does not have, or another shape or kind of number.
        DeviceError : the loop has ended, or the GPU failed.
        """
        session = self._mine()
        ports = {port.name: port for port in session.inputs if port.name not in session.state}
        for name, value in changed.items():
            if name not in ports or np.shape(value) != session.host[name].shape:
                raise InputError(
                    f"{name!r} of shape {np.shape(value)} cannot be changed in this loop; wanted "
                    + ", ".join(f"{port} {session.host[port].shape}" for port in ports)
                )
        names = [p.name for p in session.outputs if p.name not in session.state.values()]
        with session.gpu.active():
            for name, value in changed.items():
                session.upload(name, in_dtype(ports[name], value, session.gpu.name))
            session.run(self._at)
            outputs = session.download(names)
        self._at = (self._at + 1) % 3
        self._past = min(self._past + 1, 2)
        session.gpu.note(outputs)
        return outputs

    def undo(self, n: int = 1) -> None:
        """Return to the state of ``n`` steps ago.

        Parameters
        ----------
        n : 0, 1 or 2, and no more than the steps that were made.

        Raises
        ------
        InputError : another number.
        """
        if not 0 <= n <= self._past:
            raise InputError(
                f"n is {n}; {self._past} steps can be undone", fix=f"use 0 to {self._past}"
            )
        self._at = (self._at - n) % 3
        self._past -= n

    def state(self) -> dict[str, np.ndarray]:
        """Copies of the state, by input name.

        Raises
        ------
        DeviceError : the loop has ended, or the GPU failed.
        """
        session = self._mine()
        with session.gpu.active():
            return session.download(list(session.state), self._at)

    def _mine(self) -> Session:
        """The session. DeviceError if this loop has ended."""
        if self._session.user is not self:
            raise DeviceError(
                "this loop has ended: a later loop uses its buffers, or the engine was closed",
                fix="call state() before another loop starts, and store its result",
            )
        return self._session
