"""Checkpoint folders in Hugging Face's format: the settings and the weights of a network.

``transformers`` reads them; nothing is downloaded and no code in them is run.
"""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from runtime.checks import is_number
from runtime.engines.named_files import other_file, read_regular
from runtime.errors import BundleError, InputError, MissingBackend, first_line
from runtime.files import stat_of, utf8_name

_BELOW = ("*", "snapshots/*", "*/snapshots/*")  # where a hub's cache has checkpoints


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises
    ------
    InputError : the file is missing, cannot be read, or contains something else.
    """
    if stat_of(path) is None:
        raise InputError(
            f"{path} is missing; it is part of a checkpoint in Hugging Face's format",
            fix="copy the whole folder of the checkpoint",
        )
    data = read_regular(path, "a JSON file")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}", fix="copy it again") from error
    if not isinstance(value, dict):
        raise InputError(
            f"{path} contains a {type(value).__name__}; wanted a JSON object", fix="copy it again"
        )
    return value


def read_config(folder: Path, option: str, kinds: Sequence[str], fix: str) -> dict[str, Any]:
    """The contents of config.json.

    Parameters
    ----------
    option : of the command line that names the folder, without dashes: "weights".
    kinds : the values of "model_type" that are supported.
    fix : what to do with another kind.

    Raises
    ------
    InputError : no such folder, no checkpoint in it, or one of another kind.

    Example
    -------
    >>> read_config(Path("b0"), "weights", ("segformer",), "name a SegFormer")["model_type"]
    'segformer'
    """
    found = stat_of(folder)
    if found is None or not stat.S_ISDIR(found.st_mode):
        raise InputError(
            f"{option} is {str(folder)!r}, which is no folder here; nothing is downloaded",
            fix="on a machine with internet run: hf download "
            f"{folder if len(folder.parts) == 2 else 'NAME/OF-MODEL'} --local-dir DIR; "
            f"then copy DIR here and pass --{option} DIR",
        )
    if stat_of(folder / "config.json") is None:
        below = [p for depth in _BELOW for p in folder.glob(f"{depth}/config.json")]
        if below:
            newest = max(below, key=lambda path: path.parent.stat().st_mtime).parent
            raise InputError(
                f"{folder} is no checkpoint; it contains checkpoints in folders",
                fix=f"--{option} {newest}",
            )
    config = read_object(folder / "config.json")
    if config.get("model_type") not in kinds:
        raise InputError(
            f"{folder / 'config.json'} is for {config.get('model_type')!r}; "
            f"wanted {', '.join(map(repr, kinds))}",
            fix=fix,
        )
    return config


def checkpoint_name(folder: Path) -> str:
    """A short name of a checkpoint: the name of the folder; or in a hub's cache, where
    folders are called by hashes (models--OWNER--NAME/snapshots/HASH), the name of the model.

    Example
    -------
    >>> checkpoint_name(Path("models--nvidia--segformer-b0/snapshots/4e1a2b"))
    'segformer-b0'
    """
    whole = Path(os.path.realpath(folder))
    if whole.parent.name == "snapshots" and whole.parents[1].name.startswith("models--"):
        return whole.parents[1].name.rpartition("--")[2]
    return whole.name


def import_error(error: Exception, network: str, extra: str) -> MissingBackend:
    """The error to raise if torch or transformers cannot be imported: not installed, or installed
    in versions that do not fit. ``network`` is what needs them, ``extra`` the extra of this package
    that installs them."""
    if isinstance(error, ModuleNotFoundError) and error.name in ("torch", "transformers"):
        return MissingBackend(
            f"torch and transformers are needed for {network}, but {error}",
            fix=f"pip install 'dynaguide-edge[{extra}]'",
        )
    cause: BaseException = error  # transformers hides the reason in a chain of errors
    while cause.__cause__ is not None:
        cause = cause.__cause__
    fix = "install versions that fit: pip install --upgrade torch transformers"
    if "torchvision" in f"{error} {cause}":
        fix = (
            "torchvision does not fit torch: pip install --upgrade torch torchvision, or "
            "pip uninstall torchvision, which is not needed here"
        )
    return MissingBackend(
        f"torch and transformers are installed, but cannot be imported: {first_line(cause)}",
        fix=fix,
    )


def load_network(
    kind: Any, folder: Path, fix: str, ignored: tuple[str, ...] = (), **options: Any
) -> Any:
    """The network with the weights from the folder's file. Whether it has their type or float32
    depends on the version of transformers.

    Parameters
    ----------
    kind : a class of transformers, which has from_pretrained.
    fix : what to do with weights of another network.
    ignored : how names of weights begin that the file may contain although the network has not.
    options : of the class.

    Raises
    ------
    BundleError : the file is broken or contains code, or weights are missing, unexpected, of
        another shape, NaN or infinite.

    Example
    -------
    >>> kind = transformers.SegformerForSemanticSegmentation
    >>> network = load_network(kind, Path("b0"), "copy the folder again")
    """
    import pickle
    import warnings

    import huggingface_hub.errors
    import torch
    import transformers
    from safetensors import SafetensorError

    # Newer versions check the types in config.json, and raise an error of their own.
    wrong_type = getattr(huggingface_hub.errors, "StrictDataclassError", ValueError)
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        if other := other_file(file):
            raise BundleError(f"{file} is {other[0]}", fix=other[1])
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # hides a report; the errors below contain its facts
    try:
        # redirect_stderr hides a progress bar, and catch_warnings those of torch about a pickle
        with (
            redirect_stderr(io.StringIO()),
            warnings.catch_warnings(record=True),
            utf8_name(folder) as name,
        ):
            network, info = kind.from_pretrained(
                name,
                local_files_only=True,
                weights_only=True,
                ignore_mismatched_sizes=True,  # the error below lists them by name
                output_loading_info=True,
                **options,
            )
    except pickle.UnpicklingError as error:
        raise BundleError(
            f"the weights in {folder} are no plain weights: loading them would run code in them",
            fix="save them again as safetensors where you trust them: "
            "model.save_pretrained(DIR, safe_serialization=True)",
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
        ImportError,
        SafetensorError,
        wrong_type,
    ) as error:
        reason = first_line((isinstance(error, wrong_type) and error.__cause__) or error)
        raise BundleError(
            f"the checkpoint in {folder} cannot be loaded: {reason}",
            fix="copy the folder again",
        ) from error
    finally:
        transformers.logging.set_verbosity(level)
    wrong = []
    for what in ("missing", "unexpected", "mismatched"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in info[f"{what}_keys"])
        if what == "unexpected":
            keys = [key for key in keys if not key.startswith(ignored)]
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            wrong.append(f"{what}: {', '.join(keys[:5])}{more}")
    if wrong:
        raise BundleError(
            f"the weights in {folder} are not those of the network in config.json; "
            + "; ".join(wrong),
            fix=fix,
        )
    bad = [k for k, v in network.state_dict().items() if not bool(torch.isfinite(v).all())]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise BundleError(
            f"the weights in {folder} have NaN or infinite values: {', '.join(bad[:5])}{more}",
            fix="copy the folder again",
        )
    return network


def setting_error(where: Path, key: str, value: Any, wanted: str, fix: str = "") -> InputError:
    """The error to raise for the value of a key of preprocessor_config.json."""
    return InputError(
        f"{where}: {key} is {value!r}; wanted {wanted}",
        fix=fix or "change that file if the network was trained so, or export it to ONNX yourself",
    )


def read_normalisation(
    settings: dict[str, Any], where: Path, default: dict[str, Any]
) -> dict[str, tuple[float, ...]]:
    """The "mean" and "std" of colours in [0, 1] that preprocessor_config.json states.

    Parameters
    ----------
    settings : the contents of the file ``where``.
    default : "mean" and "std" where the file states none; an empty one raises an error instead.

    Raises
    ------
    InputError : a setting is of a wrong type.

    Example
    -------
    >>> settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    >>> read_normalisation(settings, Path("preprocessor_config.json"), {})
    {'mean': (0.5, 0.5, 0.5), 'std': (0.25, 0.25, 0.25)}
    """
    flags = {}
    for key in ("do_rescale", "do_normalize"):
        flags[key] = settings.get(key, True)
        if not isinstance(flags[key], bool):
            raise setting_error(where, key, flags[key], "true or false")
    factor = settings.get("rescale_factor", 1 / 255) if flags["do_rescale"] else 1.0
    if not is_number(factor) or factor <= 0:
        raise setting_error(where, "rescale_factor", factor, "a number above 0")
    gain = 255 * factor  # Hugging Face computes (gain * v - mean) / std for v in [0, 1]
    if abs(gain - 1) < 1e-6:
        gain = 1.0
    found = {}
    for key, without in (("mean", 0.0), ("std", 1.0)):
        given: Any = (without,) * 3
        if flags["do_normalize"]:
            given = settings.get(f"image_{key}", default.get(key))
        if not isinstance(given, (list, tuple)) or len(given) != 3:
            raise setting_error(where, f"image_{key}", given, "three numbers")
        try:
            found[key] = tuple(float(n) / gain for n in given)
        except (TypeError, ValueError) as error:
            raise setting_error(where, f"image_{key}", given, "three numbers") from error
    return found
