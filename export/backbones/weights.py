"""Weights in a file: plain tensors by name. No code in a file is run."""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from runtime.engines.named_files import other_content, read_regular
from runtime.errors import BundleError, first_line
from runtime.files import shown

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

PICKLED = (".pth", ".pt", ".bin")
SUFFIXES = (*PICKLED, ".safetensors")


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read a state dict that torch.save or safetensors wrote.

    Parameters
    ----------
    path : a file ending in .safetensors, or in anything else for torch.load(weights_only=True).

    Returns
    -------
    The tensors by name, on the CPU, and the sha256 of the file in hexadecimal. A dict that contains
    them under "state_dict" is read as these alone.

    Raises
    ------
    InputError : no such file, or no regular one.
    BundleError : the file is broken, unsafe, or contains something else.
    """
    data = read_regular(path, "a file of weights")
    if other := other_content(data):
        raise BundleError(f"{shown(path)} is {other[0]}", fix=other[1])
    state = _parse(path, data)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise _no_state_dict(path, f"a {type(state).__name__}" if state else "nothing")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise _no_state_dict(path, f"a {type(value).__name__} as {str(key)[:80]!r}")
    return state, hashlib.sha256(data).hexdigest()


def _parse(path: Path, data: bytes) -> Any:
    """What the file contains."""
    try:
        if path.suffix.lower() == ".safetensors":
            return load_safetensors(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's authors, that they want a report
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BundleError(
            f"{shown(path)} is no file of plain weights: loading it could run code in it",
            fix="where you trust it, save the state dict alone: torch.save(model.state_dict(), "
            "'NEW.pth'); otherwise download the file again",
        ) from error
    except (
        OSError,
        ValueError,
        LookupError,
        ArithmeticError,
        AttributeError,
        TypeError,
        RuntimeError,
        EOFError,
        SafetensorError,
    ) as error:
        raise BundleError(
            f"the weights in {shown(path)} cannot be read: {first_line(error)}",
            fix="copy the file again",
        ) from error


def _no_state_dict(path: Path, what: str) -> BundleError:
    return BundleError(
        f"{shown(path)} contains {what}; wanted a state dict, which has tensors alone",
        fix="save it as torch.save(model.state_dict(), 'NEW.pth')",
    )


def load_strictly(network: Module, state: dict[str, Tensor], where: str) -> None:
    """Copy the tensors into the network, which has exactly these names and shapes, and make it a
    frozen one: float32, in eval mode and without gradients.

    Parameters
    ----------
    where : names the weights in messages, such as "the weights in resnet18.pth".

    Raises
    ------
    BundleError : tensors are missing, unexpected, of another shape, or contain NaN or infinity.
    """
    own, wrong = network.state_dict(), []
    for what, keys in (
        ("missing", own.keys() - state.keys()),
        ("unexpected", state.keys() - own.keys()),
        ("of another shape", {k for k in own.keys() & state if own[k].shape != state[k].shape}),
        ("not finite", {k for k, v in state.items() if not bool(torch.isfinite(v).all())}),
    ):
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            wrong.append(f"{what}: {', '.join(sorted(keys)[:5])}{more}")
    if wrong:
        raise BundleError(
            f"{where} are not those of this network; {'; '.join(wrong)}",
            fix="choose the file of this network, or copy it again",
        )
    network.load_state_dict(state)
    network.float().eval().requires_grad_(False)
