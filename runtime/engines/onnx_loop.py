"""Steps of a refinement on ONNX Runtime. The state is stored on the device, in a ring of three
buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from runtime.device.driver import parse_device
from runtime.engines.onnx_errors import reason
from runtime.engines.onnx_runtime import Runner, import_onnxruntime, outlive_fork
from runtime.engines.port import numpy_dtype
from runtime.errors import DeviceError, InputError, SdkError

RING = 3  # sets of state buffers: for the current state and for the states of the two steps before


class OnnxLoop:
    """Runs of a step graph whose outputs are inputs of the next run. Not safe for two threads at a
    time.

    Parameters
    ----------
    session : the onnxruntime.InferenceSession of the step.
    feed : input name -> array, uploaded once. Each name must be an input of the step.
    state : input name -> (output name, first array). Output and input have the same shape.
    device : "cpu", or "cuda", "cuda:1": that of the session.
    runner : runs the session for its engine, too: the first run of both has a deadline.

    Raises
    ------
    InputError : an input is missing, unknown, or of another shape or type.
    """

    def __init__(
        self,
        session: Any,
        feed: Mapping[str, np.ndarray],
        state: Mapping[str, tuple[str, np.ndarray]],
        device: str,
        runner: Runner,
    ) -> None:
        self._session, self._runner = session, runner
        self._array = import_onnxruntime(f"run {runner.name}").OrtValue.ortvalue_from_numpy
        outlive_fork(self)
        self._device = parse_device(device)
        self._ports = {port.name: port for port in session.get_inputs()}
        given, wanted = {*feed, *state}, set(self._ports)
        if given != wanted:
            raise InputError(
                f"the loop got the inputs {_names(given)}; the step has {_names(wanted)}"
            )
        self._output_of = {name: output for name, (output, _) in state.items()}
        first = {name: self._value(name, array) for name, (_, array) in state.items()}
        others = [
            {name: self._value(name, array) for name, (_, array) in state.items()}
            for _ in range(RING - 1)
        ]
        self._ring = [first, *others]
        self._now = self._back = 0
        self._bindings = [session.io_binding() for _ in range(RING)]
        returned = [o.name for o in session.get_outputs()]
        self._returned = [name for name in returned if name not in self._output_of.values()]
        self._feed: dict[str, Any] = {}  # holds the bound arrays, so that they are not freed
        self._bind(feed)
        for i, binding in enumerate(self._bindings):
            for name, value in self._ring[i].items():
                binding.bind_ortvalue_input(name, value)
            for name in self._returned:
                binding.bind_output(name, "cpu")
            for name, value in self._ring[(i + 1) % RING].items():
                binding.bind_ortvalue_output(self._output_of[name], value)

    def step(self, **changed: np.ndarray) -> dict[str, np.ndarray]:
        """Run the step once.

        Parameters
        ----------
        changed : new arrays for some inputs of the feed; later steps use them, too.

        Returns
        -------
        The outputs that are no state, by name.

        Raises
        ------
        InputError : a name that the feed does not have, or an array of a wrong type or shape.
            Also in a process that was forked from the one that loaded the step.
        DeviceError : ONNX Runtime failed: sizes that do not fit together, or too little memory; or
            the first run did not end in time.
        """
        unknown = changed.keys() - self._feed.keys()
        if unknown:
            raise InputError(f"step got {_names(unknown)}; the feed has {_names(self._feed)}")
        self._bind(changed)
        binding = self._bindings[self._now]
        try:
            self._runner(lambda *options: self._run(binding, *options))
        except SdkError:
            raise
        except RuntimeError as error:
            raise DeviceError(f"the step failed: {reason(error)}") from error
        self._now = (self._now + 1) % RING
        self._back = min(self._back + 1, RING - 1)
        values = binding.get_outputs()[: len(self._returned)]
        # They are copied because the third step from now writes to the same memory.
        return {n: v.numpy().copy() for n, v in zip(self._returned, values, strict=True)}

    def _run(self, binding: Any, *options: Any) -> None:
        """Run the session, and wait for its outputs."""
        self._session.run_with_iobinding(binding, *options)
        binding.synchronize_outputs()

    def undo(self, n: int = 1) -> None:
        """Return to the state before the last ``n`` steps.

        Parameters
        ----------
        n : 0, 1 or 2, and no more than the steps that were made.

        Raises
        ------
        InputError : another number.
        """
        if not 0 <= n <= self._back:
            raise InputError(f"undo of {n} steps; wanted 0 to {self._back}, which are kept")
        self._now = (self._now - n) % RING
        self._back -= n

    def state(self) -> dict[str, np.ndarray]:
        """Copies of the current state, by input name."""
        return {name: value.numpy().copy() for name, value in self._ring[self._now].items()}

    def _bind(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Upload inputs of the feed, and use them in all later steps."""
        for name, array in arrays.items():
            self._feed[name] = self._value(name, array)
            for binding in self._bindings:
                binding.bind_ortvalue_input(name, self._feed[name])

    def _value(self, name: str, array: np.ndarray) -> Any:
        """An input as an OrtValue on the device. InputError for a wrong type or shape."""
        port = self._ports[name]
        dtype = numpy_dtype(port.type)
        array = np.asarray(array)
        fits = len(port.shape) == array.ndim and all(
            wanted == got
            for wanted, got in zip(port.shape, array.shape, strict=False)
            if isinstance(wanted, int)
        )
        if array.dtype != dtype or not fits:
            raise InputError(
                f"input {name} is {array.shape} {array.dtype}; "
                f"wanted {tuple(port.shape)} {port.type}"
            )
        return self._array(np.array(array, order="C"), *self._device)


def _names(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"
