"""The folder of a run: its files and their forms, and how a run is read without torch.

run.json                the settings, which say how the run is repeated or resumed
checkpoint.safetensors  the module, the optimiser and the step, of the last checkpoint
best.safetensors        the same of the checkpoint that --select chose, unless a kill came in
                        between: then the chosen one is the last one, which resuming copies
log.csv, curves.png     the losses
names.json              the names of the clusters
lock                    is locked while a process trains in the folder
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from export.train import boosting, refine, segunify
from export.train.boosting import BoostingConfig
from export.train.config import LoopConfig
from export.train.log import last_step
from export.train.refine import RefineTraining
from export.train.segunify import SegUnifyConfig
from export.train.views import ViewRule
from runtime.bundle.read import read_file
from runtime.checks import is_count, is_number, shown_value
from runtime.engines.named_files import missing, shell_word
from runtime.errors import BundleError, InputError, SdkError
from runtime.files import file_error, replace_file, shown, stat_of
from runtime.prior.preprocess import MAX_SIDE
from runtime.prior.reading import MOST_LABELS
from runtime.tensors import load_tensors

SCHEMA = "dg-run/1"
ENTRY = "run.json"
CHECKPOINT = "checkpoint.safetensors"
BEST = "best.safetensors"
LOG_FILE = "log.csv"
CURVES = "curves.png"
NAMES = "names.json"
LOCK = "lock"
MOST_BYTES = 2**31 - 1  # of a checkpoint
_MODULE = "module."  # begins the names of the method's tensors in a checkpoint
_FIX = "copy the run again, or train again with another -o"
# The settings of each method, and the words of --select that it has.
_METHODS: dict[str, tuple[type, tuple[str, ...]]] = {
    "segunify": (SegUnifyConfig, segunify.SELECTS),
    "boosting": (BoostingConfig, boosting.SELECTS),
    "refine": (RefineTraining, refine.SELECTS),
}


class Checkpoint(NamedTuple):
    """What a checkpoint contains.

    Parameters
    ----------
    tensors : by name: "module." and the name in the method's state_dict, and "optimiser." and a
        name of :mod:`export.train.checkpoint`.
    state : "step": updates that were made; "optimiser": the numbers of the optimiser that are no
        tensors; "broken": {picture: why it cannot be read}; "losses": {term: mean since the last
        row of log.csv}; "seconds" of training; "log": the sums for the next row of log.csv; "best":
        {"step", "value"} of the checkpoint that --select chose, or None.
    """

    tensors: dict[str, np.ndarray]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """The number of updates that were made."""
        return self.state["step"]

    def module(self) -> dict[str, np.ndarray]:
        """The arrays of the method's state_dict, by its own names."""
        tensors = self.tensors.items()
        return {k.removeprefix(_MODULE): v for k, v in tensors if k.startswith(_MODULE)}


@dataclass(frozen=True)
class Run:
    """A run that has a checkpoint.

    Parameters
    ----------
    folder : of the run.
    entry : the parsed run.json.
    checkpoint : the one that --select chose: the last one, or the best one so far.
    done : steps that were made, at most ``entry["loop"]["steps"]``; fewer if the run is not
        finished.
    """

    folder: Path
    entry: dict[str, Any]
    checkpoint: Checkpoint
    done: int

    def head(self) -> tuple[dict[str, np.ndarray], int]:
        """The method's state_dict as arrays, and the step of their checkpoint."""
        return self.checkpoint.module(), self.checkpoint.step


def open_run(folder: Path) -> Run:
    """Read a run and the checkpoint that it chose.

    Parameters
    ----------
    folder : that python -m export train has written.

    Raises
    ------
    InputError : there is no such folder, it is no run, or it has no checkpoint to choose yet.
    BundleError : a file is missing, damaged or of another form.

    Example
    -------
    >>> arrays, step = open_run(Path("runs/city")).head()
    """
    entry = read_entry(folder)
    last = None if stat_of(folder / CHECKPOINT) is None else read_checkpoint(folder)
    selects = entry["loop"]["select"] != "last"
    if last is None:
        check_first_checkpoint(folder, entry)
    if last is None or (selects and last.state["best"] is None):
        done, steps = 0 if last is None else last.step, entry["loop"]["steps"]
        raise InputError(
            f"{shown(folder)} has no checkpoint to choose yet: {done} of {steps} steps were made",
            fix=resume_command(entry["method"], folder),
        )
    if not selects or last.state["best"]["step"] == last.step:
        return Run(folder, entry, last, last.step)
    best, chosen = read_checkpoint(folder, BEST), last.state["best"]["step"]
    if best.step != chosen:
        raise BundleError(
            f"{folder.name}/{BEST} is of step {best.step}, and step {chosen} was chosen", fix=_FIX
        )
    return Run(folder, entry, best, last.step)


def resume_command(method: str, folder: Path) -> str:
    """The command that resumes a run."""
    return f"python -m export train {method} -o {shell_word(str(folder))} --resume"


def read_entry(folder: Path) -> dict[str, Any]:
    """Read and check run.json of a run, which need not be finished.

    Raises
    ------
    InputError : there is no such folder, or it is no run.
    BundleError : run.json is damaged or has another form.
    """
    found = stat_of(folder)
    if found is None:
        raise missing(folder)
    if not stat.S_ISDIR(found.st_mode):
        raise InputError(f"{shown(folder)} is no folder; a run is one", fix="name the run's folder")
    try:
        os.lstat(folder / ENTRY)
    except FileNotFoundError as error:
        raise InputError(
            f"{shown(folder)} is no run: it has no {ENTRY}",
            fix="python -m export train METHOD --data FOLDER -o RUN makes runs; name such a folder",
        ) from error
    except OSError as error:
        raise file_error("read", folder / ENTRY, error) from error
    name = f"{folder.name}/{ENTRY}"
    with _run_errors():
        data = read_file(folder, ENTRY, None)
    entry = _parsed(data, name)
    schema = entry.get("schema")
    if schema != SCHEMA:
        raise BundleError(
            f"{name} has schema {shown_value(schema)}; this version reads {SCHEMA!r}",
            fix="train again with this version, or update the SDK",
        )
    method = str(entry.get("method"))
    if method not in _METHODS:
        raise BundleError(
            f"{name}: method is {shown_value(entry.get('method'))}; wanted one of "
            f"{', '.join(_METHODS)}",
            fix=f"{_FIX}; a newer version of the SDK may know more methods",
        )
    frozen = _FROZEN[method]
    _check_fields(entry, _ENTRY | dict.fromkeys(frozen, _OBJECT), name)
    if method == "boosting":  # older versions wrote it, without effect
        entry["views"].pop("crops", None)
    settings, selects = _METHODS[method]
    kinds: dict[str, Any] = {"loop": LoopConfig, "settings": settings}
    own = {part: dict.fromkeys(kind.__dataclass_fields__, _ANY) for part, kind in kinds.items()}
    for part, form in (own | frozen).items():
        _check_fields(entry[part], form, f"{name}: {part}")
    if "views" in frozen:
        kinds["views"] = ViewRule
    for part, kind in kinds.items():
        try:
            kind(**entry[part])
        except SdkError as error:
            raise BundleError(f"{name}: {error.message[:300]}", fix=_FIX) from error
    if entry["loop"]["select"] not in selects:
        raise BundleError(
            f"{name}: select is {entry['loop']['select']}; wanted one of {', '.join(selects)}, "
            f"those of {method}",
            fix=_FIX,
        )
    return entry


def check_first_checkpoint(folder: Path, entry: Mapping[str, Any]) -> None:
    """Check that a run without checkpoint.safetensors was interrupted before its first checkpoint,
    and has not lost the file: it has nothing that is written later.

    Parameters
    ----------
    folder : of the run.
    entry : of :func:`read_entry`.

    Raises
    ------
    InputError : a file cannot be read.
    BundleError : the checkpoint was lost, or log.csv is damaged.

    Example
    -------
    >>> check_first_checkpoint(folder, read_entry(folder))
    """
    if stat_of(folder / CHECKPOINT) is not None:
        return
    later = [file for file in (BEST, CURVES, NAMES) if os.path.lexists(folder / file)]
    # The row of the first checkpoint is written before that.
    if last_step(folder / LOG_FILE) > entry["loop"]["every"]:
        later.append(LOG_FILE)
    if later:
        raise BundleError(
            f"{folder.name}/{CHECKPOINT} is missing, but it was written: {', '.join(later)} "
            f"{'is' if len(later) == 1 else 'are'} from a later moment of the run",
            fix=_FIX,
        )


def write_entry(folder: Path, entry: Mapping[str, Any]) -> None:
    """Write run.json into the folder of a run, whole or not at all.

    Raises
    ------
    InputError : the file cannot be written.
    """
    text = json.dumps(entry, indent=1, allow_nan=False)
    try:
        replace_file(folder / ENTRY, text.encode() + b"\n", durable=True)
    except OSError as error:
        raise file_error("written", folder / ENTRY, error) from error


def read_checkpoint(folder: Path, file: str = CHECKPOINT) -> Checkpoint:
    """Read and check a checkpoint.

    Parameters
    ----------
    folder : of the run.
    file : CHECKPOINT or BEST.

    Raises
    ------
    InputError : the file cannot be read.
    BundleError : the file is missing or damaged, or has another form, or a value that is not
        finite.

    Example
    -------
    >>> read_checkpoint(Path("runs/city")).step
    3000
    """
    path, name = folder / file, f"{folder.name}/{file}"
    found = stat_of(path)
    with _run_errors():
        if found is not None and found.st_size > MOST_BYTES:
            raise BundleError(f"{name} has {found.st_size} bytes; wanted at most {MOST_BYTES}")
        data = read_file(folder, file, found.st_size if found else 0)
        tensors = load_tensors(data, name)
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    if "state" not in metadata:
        raise BundleError(f"{name} has no state; it is no checkpoint of a run", fix=_FIX)
    state = _parsed(metadata["state"].encode("utf-8", "replace"), f"{name}: state")
    _check_fields(state, _STATE, f"{name}: state")
    for key, array in tensors.items():
        if not key.startswith((_MODULE, "optimiser.")):
            raise BundleError(f"{name} has a tensor {shown_value(key)}", fix=_FIX)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise BundleError(f"{name}: {shown_value(key)} has NaN or infinite values", fix=_FIX)
    if not any(key.startswith(_MODULE) for key in tensors):
        raise BundleError(f"{name} has no tensor of a module", fix=_FIX)
    return Checkpoint(tensors, state)


def files_sha256(files: Sequence[Path]) -> str:
    """The sha256 of a list of picture files, in hexadecimal: their names, their order and their
    sizes in bytes. A file whose size cannot be read, such as a broken link, counts as of no
    size; whether the run can do without it is known when it is opened.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            size = os.stat(file).st_size
        except (OSError, ValueError):
            size = -1
        digest.update(os.fsencode(file.name) + f"\0{size}\n".encode())
    return digest.hexdigest()


@contextmanager
def _run_errors() -> Iterator[None]:
    """A block whose BundleErrors say how a run is repaired, not a bundle."""
    try:
        yield
    except BundleError as error:
        raise BundleError(error.message, fix=_FIX) from error


def _parsed(data: bytes, name: str) -> dict[str, Any]:
    """The JSON object in ``data``; BundleError if it is something else."""

    def refuse(text: str) -> float:
        raise ValueError(f"{text} is no JSON number")

    try:
        value = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name} cannot be read: {str(error)[:300]}", fix=_FIX) from error
    if not isinstance(value, dict):
        raise BundleError(f"{name} is a {type(value).__name__}; wanted a JSON object", fix=_FIX)
    return value


def _check_fields(
    entry: Mapping[str, Any], form: Mapping[str, tuple[str, Callable[[Any], bool]]], name: str
) -> None:
    """BundleError unless ``entry`` has exactly the fields of ``form``, each of its form."""
    if entry.keys() != form.keys():
        wrong = sorted(entry.keys() ^ form.keys())[:5]
        raise BundleError(f"{name}: missing or unknown fields: {', '.join(wrong)[:200]}", fix=_FIX)
    for key, (wanted, is_right) in form.items():
        if not is_right(entry[key]):
            came = shown_value(entry[key])
            raise BundleError(f"{name}: {key} is {came}; wanted {wanted}", fix=_FIX)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 100_000


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _is_finite(value: Any) -> bool:
    return is_number(value, -sys.float_info.max, sys.float_info.max)


def _is_option(value: Any) -> bool:
    """Whether a value is of the kinds that options of the command line have."""
    return value is None or isinstance(value, bool) or _is_text(value) or _is_finite(value)


def _is_list(value: Any, member: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(member, value))


def _is_size(value: Any) -> bool:
    return _is_list(value, lambda side: is_count(side, 1, MAX_SIDE)) and len(value) == 2


def _is_object(value: Any, member: Callable[[Any], bool] = lambda _: True) -> bool:
    return isinstance(value, dict) and all(map(member, value.values()))


def _is_stated(value: Any) -> bool:
    return _is_object(value) and all(k in _STATED and _STATED[k](v) for k, v in value.items())


def _is_sums(value: Any) -> bool:
    return (
        _is_object(value)
        and value.keys() == {"count", "sums"}
        and is_count(value["count"], 0)
        and _is_object(value["sums"], _is_finite)
    )


def _is_best(value: Any) -> bool:
    return value is None or (
        _is_object(value, _is_finite)
        and value.keys() == {"step", "value"}
        and is_count(value["step"], 0)
    )


_TEXT = ("a text", _is_text)
_TEXTS = ("an object of texts", lambda v: _is_object(v, _is_text))
_HASH = ("64 hexadecimal digits", _matches("[0-9a-f]{64}"))
_OBJECT = ("an object", _is_object)
_ANY = ("any value", lambda _: True)
_COLOUR = (
    "three numbers",
    lambda v: _is_list(v, lambda n: is_number(n, -1e3, 1e3)) and len(v) == 3,
)
_SIZES = ("a list of [height, width]", lambda v: _is_list(v, _is_size))
_ENTRY = {
    "schema": _TEXT,
    "method": _TEXT,
    "settings": _OBJECT,
    "options": ("an object of texts and numbers", lambda v: _is_object(v, _is_option)),
    "data": ("a list of texts", lambda v: _is_list(v, _is_text)),
    "files": ("a whole number above 0", lambda v: is_count(v, 1)),
    "files_sha256": _HASH,
    "loop": _OBJECT,
    "versions": _TEXTS,
    "command": _TEXT,
}
_STATED: dict[str, Callable[[Any], bool]] = {
    "mean": _COLOUR[1],
    "std": _COLOUR[1],
    "names": lambda v: _is_list(v, _is_text),
    "output": _is_text,
    "output_name": _is_text,
}
_PRIOR = {
    "kind": ("onnx or bundle", _matches("onnx|bundle")),
    "name": _TEXT,
    "source": _TEXT,
    "sha256": _HASH,
    "classes": (f"2 to {MOST_LABELS}", lambda v: is_count(v, 2, MOST_LABELS)),
    "names": ("null, or a list of texts", lambda v: v is None or _is_list(v, _is_text)),
    "output": ("a word", _is_text),
    "preprocess": _OBJECT,
    "sizes": _SIZES,
    "stated": ("an object of what --mean, --std, --names and --output say", _is_stated),
}
_BACKBONE = {
    "name": _TEXT,
    "source": _TEXT,
    "features": _TEXT,
    "sha256": _HASH,
    "channels": ("1 to 65536", lambda v: is_count(v, 1, 65536)),
    "stride": ("1 to 1024", lambda v: is_count(v, 1, 1024)),
    "mean": _COLOUR,
    "std": _COLOUR,
    "padding": _TEXT,
    "licence": _TEXT,
    "trained": ("true or false", lambda v: isinstance(v, bool)),
}
# What a run has of the frozen network that it is trained on, and of its views, by its method.
_FROZEN = {
    "segunify": {"backbone": _BACKBONE, "views": {"size": _ANY, "crops": _ANY}},
    "boosting": {"backbone": _BACKBONE, "views": {"size": _ANY}},
    "refine": {"prior": _PRIOR},
}
_STATE = {
    "step": ("a whole number", lambda v: is_count(v, 0, 10**9)),
    "optimiser": _OBJECT,
    "broken": _TEXTS,
    "losses": ("an object of numbers", lambda v: _is_object(v, _is_finite)),
    "seconds": ("a number", lambda v: _is_finite(v) and v >= 0),
    "log": ("an object of count and sums", _is_sums),
    "best": ("null, or an object of step and value", _is_best),
}
