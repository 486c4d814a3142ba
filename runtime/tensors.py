"""Reads safetensors files."""

from __future__ import annotations

import numpy as np

from runtime.errors import BundleError, MissingBackend


def load_tensors(data: bytes, name: str) -> dict[str, np.ndarray]:
    """The arrays in the bytes of a safetensors file, by name.

    Parameters
    ----------
    data : the bytes.
    name : of the file, for messages.

    Raises
    ------
    BundleError : the bytes are no safetensors file.
    MissingBackend : safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load
    except ImportError as error:
        raise MissingBackend(
            f"safetensors is needed to read {name}, but {error}", fix="pip install safetensors"
        ) from error
    try:
        arrays = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise BundleError(f"{name} is no safetensors file: {error}") from error
    return {key: np.array(value) for key, value in arrays.items()}
