"""The state of a stream between frames, and the measures that compare two frames."""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from runtime.core import parameters
from runtime.core.classes import classes_of
from runtime.errors import BundleError, InputError
from runtime.files import file_error, shown, stat_of, to_path, write_atomic
from runtime.prior.reading import MOST_LABELS
from runtime.tensors import load_tensors

MOST_STEPS = 10**6  # the limit for the steps of a frame
MOST_FRAMES = 2**53  # the limit for the number of frames of a state
MOST_BYTES = 2**30  # the limit for a file with a state
_ARRAYS = ("classes", "seen", "labels", "guide", "colours")
# The tensors of the last layer; they have a row for each channel.
HEAD = ("conv3.weight", "conv3.bias", "momentum.conv3.weight", "momentum.conv3.bias")


@dataclass(eq=False)
class StreamState:
    """The state of a stream between frames. :meth:`Segmenter.stream` starts from a state and
    updates it when a frame is complete, so that an interrupted frame changes nothing. A state can
    be saved. Maps are at working size (h, w).

    Parameters
    ----------
    frames : frames segmented so far.
    owed : cold steps that did not fit the budget so far.
    doubt : frames in a row in which a sure prior was contradicted.
    names : the class names of the prior, or None; another stream with this state needs a prior with
        the same names.
    trained : sha256 of the file with the trained weights that ``weights`` continue, 64 hexadecimal
        digits; None if they continue initial weights. Another stream with this state needs a bundle
        with the same trained weights, or none with trained weights.
    weights : the network's state_dict with its momenta; None if the next frame starts from the
        initial or trained weights.
    classes : (K,) int32, the prior's classes that have a channel; for objectives whose channels
        have no fixed meaning, the channels.
    seen : (K,) int64, the number of the last frame in which the prior had this class.
    labels : (h, w) int32, the last refined labels.
    guide : (h, w) int32, the prior's last labels, -1 = unknown.
    colours : (512,) float32, the last picture's histogram of 8 x 8 x 8 colours.

    Example
    -------
    >>> state = StreamState()
    >>> for result in seg.stream("cam.mp4", state=state): ...
    >>> state.save("cam.safetensors")
    """

    frames: int = 0
    owed: int = 0
    doubt: int = 0
    names: list[str] | None = None
    trained: str | None = None
    weights: parameters.State | None = None
    classes: np.ndarray | None = None
    seen: np.ndarray | None = None
    labels: np.ndarray | None = None
    guide: np.ndarray | None = None
    colours: np.ndarray | None = None

    def reset(self) -> None:
        """Set all fields to their defaults: the next frame starts from the initial weights, or from
        the trained weights of a bundle.

        Example
        -------
        >>> state.reset()
        """
        for f in fields(self):
            setattr(self, f.name, f.default)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all.

        Raises
        ------
        InputError : the file cannot be written.

        Example
        -------
        >>> state.save("cam.safetensors")
        """
        from safetensors.numpy import save

        arrays = {f"weights.{k}": v for k, v in (self.weights or {}).items()}
        arrays |= {k: v for k in _ARRAYS if (v := getattr(self, k)) is not None}
        arrays["counts"] = np.array([self.frames, self.owed, self.doubt], np.int64)
        arrays["names"] = np.frombuffer(json.dumps(self.names).encode(), np.uint8)
        if self.trained is not None:  # a state of initial weights has the form of older versions
            arrays["trained"] = np.frombuffer(self.trained.encode(), np.uint8)
        write_atomic(path, save({k: np.asarray(v, order="C") for k, v in arrays.items()}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StreamState:
        """Read a file of :meth:`save`.

        Raises
        ------
        InputError : the file does not exist, is no regular file, or cannot be read.
        BundleError : the file contains no stream's state.

        Example
        -------
        >>> state = StreamState.load("cam.safetensors")
        """
        path = to_path(path)
        fix = "start without it, save it again"
        wrong = BundleError(f"{shown(path)} is no stream's state", fix=fix)
        found = stat_of(path)
        if found is not None and not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise InputError(  # reading a pipe would wait
                f"{shown(path)} is no regular file; wanted a stream's state", fix=fix
            )
        if found is not None and found.st_size > MOST_BYTES:
            raise wrong
        try:
            arrays = load_tensors(path.read_bytes(), shown(path))
        except (OSError, ValueError) as error:
            if not isinstance(error, BundleError):
                raise file_error("read", path, error) from error
            raise wrong from error
        prefix, state = "weights.", cls()
        weights = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        state.weights = weights or None
        for name in _ARRAYS:
            setattr(state, name, arrays.get(name))
        try:
            counts = arrays["counts"]
            state.frames, state.owed, state.doubt = (int(n) for n in counts)
            state.names = json.loads(arrays["names"].tobytes())
            if "trained" in arrays:
                state.trained = arrays["trained"].tobytes().decode("ascii")
        except (KeyError, ValueError, TypeError, RecursionError):
            raise wrong from None
        rest = {k for k in arrays if not k.startswith(prefix)} - {
            *_ARRAYS,
            "counts",
            "names",
            "trained",
        }
        if rest or counts.dtype != np.int64 or not state._holds_together():
            raise wrong
        return state

    def _holds_together(self) -> bool:
        """Whether all fields have the types, shapes and ranges of the class's docstring."""
        arrays = [getattr(self, name) for name in _ARRAYS]
        names = self.names
        if names is not None and not (
            isinstance(names, list) and all(isinstance(n, str) for n in names)
        ):
            return False
        if self.trained is not None and not re.fullmatch("[0-9a-f]{64}", self.trained):
            return False
        counts, most = (self.frames, self.owed, self.doubt), (MOST_FRAMES, MOST_STEPS, MOST_FRAMES)
        if any(not 0 <= n <= limit for n, limit in zip(counts, most, strict=True)):
            return False
        if all(a is None for a in arrays):
            return self.weights is None
        if any(a is None for a in arrays):
            return False
        classes, seen, labels, guide, colours = arrays
        types = [(classes, "i4"), (seen, "i8"), (labels, "i4"), (guide, "i4"), (colours, "f4")]
        if any(a.dtype != t for a, t in types) or classes.ndim != 1 or labels.ndim != 2:
            return False
        if not (classes.size and labels.size and seen.shape == classes.shape):
            return False
        if guide.shape != labels.shape or colours.shape != (512,):
            return False
        ranges = [
            (classes, 0, MOST_LABELS - 1),
            (labels, -1, MOST_LABELS - 1),
            (guide, -1, MOST_LABELS - 1),
            (seen, 0, self.frames),
            (colours, 0, 1),
        ]
        if not all(low <= a.min() and a.max() <= high for a, low, high in ranges):
            return False  # NaN is in no range
        weights = self.weights or {}
        rows = {weights[name].shape[:1] if name in weights else () for name in HEAD}
        finite = all(np.isfinite(a).all() for a in weights.values())
        fits = not weights or rows == {(len(classes),)}
        return fits and finite and len(np.unique(classes)) == len(classes)


def colours_of(low: Any) -> np.ndarray:
    """Return (512,) float32: the share of each of 8 x 8 x 8 colours in a picture, which is
    (h, w, 3) float32 in [0, 1], on the host or on a GPU.

    Example
    -------
    >>> colours_of(np.zeros((4, 6, 3), np.float32))[0]
    1.0
    """
    counts = classes_of(low).colour_counts(low)
    return (counts / (low.shape[0] * low.shape[1])).astype(np.float32)


def colour_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return Hellinger's distance of two histograms whose sums are 1, in [0, 1].

    Example
    -------
    >>> colour_distance(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    1.0
    """
    return float(np.sqrt(max(0.0, 1.0 - np.sqrt(a * b).sum(dtype=np.float64))))


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Return Cohen's kappa of two label maps: 1 if they are equal, 0 if they agree no more than by
    chance. -1 (unknown) counts as a label.

    Example
    -------
    >>> agreement(np.array([[0, 0, 1, 1]]), np.array([[0, 1, 0, 1]]))
    0.0
    """
    count = int(max(a.max(), b.max())) + 2
    of_a, of_b = (np.bincount(m.ravel() + 1, minlength=count) / m.size for m in (a, b))
    chance = float(of_a @ of_b)
    return 1.0 if chance >= 1 else (float((a == b).mean()) - chance) / (1 - chance)


def check_network(weights: parameters.State, cold: parameters.State) -> None:
    """Check that a state's weights fit the network whose initial weights are ``cold``. The number
    of rows of the last layer may differ.

    Raises
    ------
    InputError : the weights are of another network.

    Example
    -------
    >>> check_network(state.weights, refiner.state_dict())
    """
    for name in {*weights, *cold}:
        came, wanted = (np.shape(w[name]) if name in w else None for w in (weights, cold))
        if name in HEAD and came and wanted:
            came, wanted = came[1:], wanted[1:]
        if came != wanted:
            raise InputError(
                f"the state is of another network: its {name!r} is {came}, wanted {wanted}",
                fix="use the options of refine with which it was saved, or state.reset()",
            )


def check_start(state: StreamState, trained: str | None) -> None:
    """Check that a state's weights continue the weights that a refinement starts from. The seed of
    initial weights is not compared.

    Parameters
    ----------
    trained : sha256 of the file with the trained weights; None: the refinement starts from initial
        weights.

    Raises
    ------
    InputError : the state's weights continue others.

    Example
    -------
    >>> check_start(StreamState(), None)
    """
    if state.weights is None or state.trained == trained:
        return
    came, wanted = (
        "initial weights" if start is None else f"trained weights with sha256 {start[:12]}"
        for start in (state.trained, trained)
    )
    raise InputError(
        f"the state continues {came}; wanted one that continues the {wanted} that this refinement "
        "starts from",
        fix="use the bundle with which the state was saved, or state.reset(), or another file",
    )


def forget(state: StreamState) -> None:
    """Reset the state so that the next frame starts anew; the frame counter, the names and the
    identity of the trained weights are kept.

    Example
    -------
    >>> forget(state)
    >>> state.weights is None
    True
    """
    frames, names, trained = state.frames, state.names, state.trained
    state.reset()
    state.frames, state.names, state.trained = frames, names, trained
