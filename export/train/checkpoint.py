"""Checkpoints: what resumes a run, in one safetensors file that is replaced whole."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.train.run import CHECKPOINT, Checkpoint
from runtime.checks import shown_value
from runtime.errors import BundleError, SdkError, first_line
from runtime.files import file_error, replace_file, shown

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import Optimizer


def pack(module: Module, optimiser: Optimizer, state: dict[str, Any]) -> bytes:
    """A checkpoint as the bytes of a safetensors file.

    A tensor of the optimiser is named "optimiser.", the number of its parameter, and its own name,
    such as "optimiser.0.exp_avg". No state of a random generator is stored: the loop seeds torch
    before each step with a number that depends on the seed and the step alone.

    Parameters
    ----------
    module : the state_dict is stored, as tensors "module.*".
    optimiser : its state_dict is stored, the tensors in the file, the other values in the state.
    state : the fields of :attr:`export.train.run.Checkpoint.state` but "optimiser".

    Raises
    ------
    SdkError : a value is NaN or infinite, so that no training can be continued from it.

    Example
    -------
    >>> replace_file(path, pack(method.module, optimiser, {"step": 500, ...}), durable=True)
    """
    from safetensors.numpy import save

    arrays, rest = _parts(module, optimiser)
    wrong = [k for k, v in arrays.items() if v.dtype.kind == "f" and not np.isfinite(v).all()]
    if wrong:
        raise SdkError(
            f"{wrong[0]} has NaN or infinite values after step {state['step']}",
            fix="train again with a smaller --lr",
        )
    text = json.dumps(state | {"optimiser": rest}, allow_nan=False)
    return save(arrays, metadata={"state": text})


def _parts(
    module: Module, optimiser: Optimizer
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """The tensors of a checkpoint by name, and what the optimiser has beside them."""
    arrays = {f"module.{k}": _array(v) for k, v in module.state_dict().items()}
    found = optimiser.state_dict()
    values: dict[str, dict[str, Any]] = {}
    for index, entries in found["state"].items():
        for name, value in entries.items():
            if hasattr(value, "detach"):
                arrays[f"optimiser.{index}.{name}"] = _array(value)
            else:
                values.setdefault(str(index), {})[name] = value
    return arrays, {"values": values, "param_groups": found["param_groups"]}


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def write_checkpoint(folder: Path, data: bytes, file: str = CHECKPOINT) -> None:
    """Replace a checkpoint; return after it is on the disk. The older one remains after an error.

    Parameters
    ----------
    folder : of the run.
    data : of :func:`pack`.
    file : CHECKPOINT or BEST of :mod:`export.train.run`.

    Raises
    ------
    InputError : the file cannot be written, for example because the disk is full.

    Example
    -------
    >>> write_checkpoint(folder, pack(method.module, optimiser, state))
    """
    try:
        replace_file(folder / file, data, durable=True)
    except OSError as error:
        raise file_error("written", folder / file, error) from error


def restore(checkpoint: Checkpoint, module: Module, optimiser: Optimizer, folder: Path) -> None:
    """Copy a checkpoint into a module and its optimiser, bit for bit.

    Parameters
    ----------
    checkpoint : of :func:`export.train.run.read_checkpoint`.
    module, optimiser : made with the settings of the run; the module is on its device.
    folder : of the run, for messages.

    Raises
    ------
    BundleError : the checkpoint has other tensors, shapes, types or settings than the module and
        its optimiser have after an update.

    Example
    -------
    >>> restore(read_checkpoint(folder), method.module, method.optimiser(1e-4), folder)
    """
    import torch

    try:
        rest = _check_fits(checkpoint, module, optimiser)
    except ValueError as error:
        raise BundleError(
            f"the checkpoint in {shown(folder)} does not fit the method: {first_line(error)[:300]}",
            fix="copy the run again, install the versions in its run.json, or train again with "
            "another -o",
        ) from error
    state: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in rest["values"].items()}
    for key, array in checkpoint.tensors.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = torch.from_numpy(array.copy())
    module.load_state_dict({k: torch.from_numpy(v) for k, v in checkpoint.module().items()})
    optimiser.load_state_dict({"state": state, "param_groups": rest["param_groups"]})


def _check_fits(
    checkpoint: Checkpoint, module: Module, optimiser: Optimizer
) -> dict[str, dict[str, Any]]:
    """What an optimiser of this kind has beside its tensors; ValueError unless the checkpoint has
    the same, and exactly the tensors of the module and of such an optimiser after its updates.
    torch does not check this."""
    arrays, rest = _parts(module, _updated(optimiser) if checkpoint.step else optimiser)
    found = checkpoint.tensors
    if wrong := sorted(arrays.keys() ^ found.keys()):
        raise ValueError(f"missing or unknown tensors: {', '.join(map(shown_value, wrong[:3]))}")
    for key, own in arrays.items():
        array = found[key]
        if (array.shape, array.dtype) != (own.shape, own.dtype):
            raise ValueError(
                f"{key} has the shape {array.shape} and the type {array.dtype}; wanted {own.shape} "
                f"and {own.dtype}"
            )
        if key.endswith(("exp_avg_sq", "running_var")) and (array < 0).any():
            raise ValueError(f"{key} has negative values")
        if key.startswith("optimiser.") and key.endswith(".step") and array != checkpoint.step:
            raise ValueError(f"{key} is {array}; wanted the step {checkpoint.step}")
    # As texts, in which 1 is not true, and lists are what JSON made of tuples.
    ours, theirs = (json.dumps(v, sort_keys=True) for v in (rest, checkpoint.state["optimiser"]))
    if ours != theirs:
        raise ValueError("the settings of the optimiser are others")
    return rest


def _updated(optimiser: Optimizer) -> Optimizer:
    """A copy of a new optimiser, with parameters of its own, after one update."""
    import torch

    other = copy.deepcopy(optimiser)
    for group in other.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    other.step()
    return other
