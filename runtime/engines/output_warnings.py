"""Warnings about an engine and its outputs where nothing failed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

ONE_CLASS = "one class covers the whole picture"


@dataclass(frozen=True)
class OutputWarning:
    """A warning that an output is most likely wrong, or that an engine is slower than usual.

    Parameters
    ----------
    output : the name of the output, or of the engine.
    message : the reason.
    """

    output: str
    message: str


def output_warnings(outputs: Mapping[str, np.ndarray]) -> Iterator[OutputWarning]:
    """Warn of outputs that contain NaN or infinite values, or one class everywhere.

    Parameters
    ----------
    outputs : arrays by name: labels (N, H, W) of integers, scores (N, K, H, W) of floats, or
        others, which are only checked for NaN and infinite values.

    Returns
    -------
    At most one warning for each output.
    """
    for name, array in outputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            yield OutputWarning(name, f"{count} of {array.size} values are NaN or infinite")
        elif _one_class(array):
            yield OutputWarning(name, ONE_CLASS)


def _one_class(array: np.ndarray) -> bool:
    """Whether labels (N, H, W), or the arg max of scores (N, K, H, W), are the same everywhere."""
    scores = array.ndim == 4 and array.shape[1] > 1 and array.dtype.kind == "f"
    if not scores and (array.ndim != 3 or array.dtype.kind not in "iu"):
        return False
    for part in (array[..., ::8, ::8], array):  # every eighth pixel is enough for most pictures
        labels = part.argmax(1) if scores else part
        if labels.size < 2 or (labels != labels.flat[0]).any():
            return False
    return True
