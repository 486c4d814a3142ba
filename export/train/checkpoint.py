"""Checkpoints: what resumes a run, in one safetensors file that is replaced whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.train.run import CHECKPOINT, Checkpoint
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

    arrays = {f"module.{k}": _array(v) for k, v in module.state_dict().items()}
    found = optimiser.state_dict()
    values: dict[str, dict[str, Any]] = {}
    for index, entries in found["state"].items():
        for name, value in entries.items():
            if hasattr(value, "detach"):
                arrays[f"optimiser.{index}.{name}"] = _array(value)
            else:
                values.setdefault(str(index), {})[name] = value
    wrong = [k for k, v in arrays.items() if v.dtype.kind == "f" and not np.isfinite(v).all()]
    if wrong:
        raise SdkError(
            f"{wrong[0]} has NaN or infinite values after step {state['step']}; the last "
            "checkpoint is kept",
            fix="train again with a smaller --lr",
        )
    rest = {"values": values, "param_groups": found["param_groups"]}
    text = json.dumps(state | {"optimiser": rest}, allow_nan=False)
    return save(arrays, metadata={"state": text})


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
    BundleError : the checkpoint is of another method or optimiser.
    """
    import torch

    tensors: dict[int, dict[str, Any]] = {}
    try:
        for key, array in checkpoint.tensors.items():
            kind, _, name = key.partition(".")
            if kind == "optimiser":
                index, _, own = name.partition(".")
                tensors.setdefault(int(index), {})[own] = torch.from_numpy(array.copy())
        rest = checkpoint.state["optimiser"]
        for index, values in rest["values"].items():
            tensors.setdefault(int(index), {}).update(values)
        groups = [
            _as_in(saved, own)
            for saved, own in zip(rest["param_groups"], optimiser.param_groups, strict=True)
        ]
        _check_shapes(tensors, optimiser)
        module.load_state_dict({k: torch.from_numpy(v) for k, v in checkpoint.module().items()})
        optimiser.load_state_dict({"state": tensors, "param_groups": groups})
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BundleError(
            f"the checkpoint in {shown(folder)} does not fit the method: {first_line(error)[:300]}",
            fix="copy the run again, install the versions in its run.json, or train again with "
            "another -o",
        ) from error


def _as_in(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The saved settings of a group of parameters, with tuples where the settings ``own`` of the
    optimiser have tuples, which JSON does not have. ValueError if they are of another kind of
    optimiser, or of another version of torch."""
    out = {k: tuple(v) if isinstance(own.get(k), tuple) else v for k, v in saved.items()}
    kinds, wanted = ({k: type(v) for k, v in g.items() if k != "params"} for g in (out, own))
    if kinds != wanted:
        raise ValueError("the settings of the optimiser are of another kind")
    return out


def _check_shapes(state: dict[int, dict[str, Any]], optimiser: Optimizer) -> None:
    """ValueError unless each tensor of an optimiser's state is a number or has the shape of its
    parameter. torch does not check this."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for index, entries in state.items():
        for name, value in entries.items():
            shape = getattr(value, "shape", ())
            if shape not in ((), parameters[index].shape):
                raise ValueError(f"optimiser.{index}.{name} has the shape {tuple(shape)}")
