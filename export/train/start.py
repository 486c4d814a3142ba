"""From the options of the command line to all that the loop needs. Everything is checked here."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import runtime
from export.backbones.load import check_torch
from export.train.config import LoopConfig
from export.train.log import check_matplotlib
from export.train.loop import device_errors, seed_torch
from export.train.method import Batches, Method, Parts, Start
from export.train.run import SCHEMA, Checkpoint, files_sha256
from export.train.select import split
from runtime.device.choose import default_threads
from runtime.errors import DeviceError, InputError, MissingBackend
from runtime.files import shown, stat_of
from runtime.pictures.files import picture_files

if TYPE_CHECKING:
    from export.train.feature_cache import FeatureCache

HELD_OUT = 0.1  # share of the pictures that --select uses
LOG = logging.getLogger("dg.train")


class Prepared(NamedTuple):
    """What the loop needs.

    Parameters
    ----------
    method, batches, score, held : as in :class:`export.train.method.Parts`.
    config : the settings of the loop, with the number of threads that torch uses.
    entry : for run.json.
    """

    method: Method
    batches: Batches
    config: LoopConfig
    entry: dict[str, Any]
    score: Callable[[], float] | None
    held: Batches | None


def loop_config(args: argparse.Namespace, selects: tuple[str, ...]) -> LoopConfig:
    """The settings of the loop that the command line names.

    Parameters
    ----------
    args : with the options of the loop.
    selects : the words of --select that the method has. Without "labels" among them, --labels and
        --classes are options of the method.

    Raises
    ------
    InputError : values out of range, or that do not fit together.
    """
    names = set(LoopConfig.__dataclass_fields__)
    if "labels" not in selects:
        names -= {"labels", "classes"}
    if args.threads is None:
        names.remove("threads")  # torch, which is imported later, has the default
    named = {name: getattr(args, name) for name in names}
    if args.holdout is None:
        named["holdout"] = 0.0 if args.select == "last" else HELD_OUT
    return LoopConfig(**named)


def steps_of(epochs: int, files: int, views: int, args: argparse.Namespace) -> int:
    """The number of steps that pass over all views to train on ``epochs`` times, rounded up.

    Parameters
    ----------
    epochs : at least 1.
    files : pictures of --data.
    views : of a picture.
    args : with batch, select and holdout.

    Raises
    ------
    InputError : there are no epochs, or a batch below 1.

    Example
    -------
    >>> steps_of(4, 46, 1, args)  # 184 with --batch 1
    """
    for name, value in (("epochs", epochs), ("batch", args.batch)):
        if value < 1:
            raise InputError(f"{name} is {value}; wanted at least 1", fix=f"--{name} 1")
    trained: Sequence[int] = range(files)
    if args.select != "last":
        trained, _ = split(trained, HELD_OUT if args.holdout is None else args.holdout, args.seed)
    return -(-epochs * len(trained) * views // args.batch)


def listed_files(args: argparse.Namespace, entry: Mapping[str, Any] | None) -> list[Path]:
    """The picture files of --data; ``entry`` is run.json of a run that is resumed.

    Raises
    ------
    InputError : no --data, no pictures, a picture that is listed twice, or other pictures than when
        the run was started.
    """
    if args.data is None:
        raise InputError("data is not set; wanted a folder of pictures", fix="--data FOLDER")
    gone = [path for path in args.data if stat_of(path) is None]
    if entry is not None and gone:
        raise InputError(
            f"the pictures {', '.join(map(shown, gone))} of the run do not exist",
            fix="restore them, or name their new place: --data FOLDER",
        )
    files = picture_files([*map(Path, args.data)])
    _check_once(files, args.data)
    if entry is not None and entry["files_sha256"] != files_sha256(files):
        raise InputError(
            f"the pictures in {', '.join(map(shown, args.data))} changed since the run was "
            f"started: it had {entry['files']} files, now there are {len(files)}, or their names "
            "or sizes differ",
            fix="restore the pictures, or train again with another -o",
        )
    return files


def _check_once(files: list[Path], data: tuple[str, ...]) -> None:
    """InputError if two of the files are one picture."""
    folders = {folder: os.path.realpath(folder) for folder in {file.parent for file in files}}
    seen: set[str] = set()
    for file in files:  # realpath of each file would take 12 s for 118,000 files
        link = file.is_symlink()
        path = os.path.realpath(file) if link else os.path.join(folders[file.parent], file.name)
        if path in seen:
            raise InputError(
                f"the picture {shown(file)} is listed twice in {', '.join(map(shown, data))}",
                fix="name each picture once in --data; a link counts as its target",
            )
        seen.add(path)


def prepare(
    module: Any,
    args: argparse.Namespace,
    config: LoopConfig,
    files: list[Path],
    *,
    command: str,
    options: Mapping[str, Any],
    entry: dict[str, Any] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Prepared:
    """Make the method, the batches and the entry for run.json.

    Parameters
    ----------
    module : of the method, with ``check(args)``, which needs no torch, and
        ``prepare(start: Start) -> Parts``, such as :mod:`export.train.segunify`. torch's random
        numbers are seeded before ``prepare`` is called, for the initial weights.
    args : the options of the command line.
    config : of :func:`loop_config`.
    files : of :func:`listed_files`.
    command, options : of the command line, for run.json.
    entry, checkpoint : of a run that is resumed.

    Raises
    ------
    InputError : a value that cannot be used.
    BundleError : weights of the frozen network that are damaged.
    DeviceError : the device cannot be used.
    MissingBackend : a package is not installed, or the machine has no GPU for the device.
    """
    _check_options(args)
    module.check(args)
    check_matplotlib()
    check_torch()

    import torch

    from runtime.opencv import cv2

    if args.threads is None:
        config = replace(config, threads=min(torch.get_num_threads(), default_threads()))
    torch.set_num_threads(config.threads)
    _check_device(config.device)
    if config.device != "cpu" and config.precision == "fp32":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    trained: list[Path] = files
    held: list[Path] = []
    if config.select != "last":
        trained, held = split(files, config.holdout, config.seed)
    known = frozenset(checkpoint.state["broken"] if checkpoint else ())
    with device_errors("before the first step", args.out):
        start = Start(args, config, trained, held, entry, known, _cache(args))
        seed_torch(config.seed, 0)
        parts: Parts = module.prepare(start)
    versions = {
        "dynaguide-edge": runtime.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        **parts.libraries,
    }
    made = {
        "schema": SCHEMA,
        "method": parts.method.name,
        **parts.entry,
        "options": dict(options),
        "data": list(args.data),
        "files": len(files),
        "files_sha256": files_sha256(files),
        "loop": asdict(config),
        "versions": versions,
        "command": command,
    }
    made = json.loads(json.dumps(made))  # as it is read again: with lists, not tuples
    if entry is not None:  # what says how the run was started is kept
        made |= {key: entry[key] for key in ("versions", "command")}
        if other := [f"{k} {v}" for k, v in versions.items() if entry["versions"].get(k) != v]:
            LOG.warning(
                "now the versions are %s: the last bits of the result may differ from those of a "
                "run without an interruption",
                ", ".join(other),
            )
    return Prepared(parts.method, parts.batches, config, made, parts.score, parts.held)


def _check_options(args: argparse.Namespace) -> None:
    """InputError for options that this machine cannot use. It is cheap, before torch is loaded."""
    if args.threads is not None and args.threads > (most := default_threads()):
        raise InputError(
            f"threads is {args.threads}; wanted at most {most}, the processors of this process",
            fix=f"--threads {most}",
        )
    if not 0 < args.cache_limit <= 2**20:
        raise InputError(
            f"cache-limit is {args.cache_limit:g}; wanted GiB, above 0", fix="--cache-limit 20"
        )


def _check_device(device: str) -> None:
    """MissingBackend if torch finds no GPU, DeviceError if it finds none of this number."""
    import torch

    if device == "cpu":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise MissingBackend(
            f"device is {device}, but torch finds no GPU that it can use", fix="--device cpu"
        )
    if int(device.removeprefix("cuda:")) >= count:
        raise DeviceError(f"device is {device}, but torch finds {count} GPUs", fix="--device cpu")


def _cache(args: argparse.Namespace) -> FeatureCache | None:
    """The cache that the command line names; None with --no-cache."""
    from export.train.feature_cache import FeatureCache, default_folder

    if args.no_cache:
        return None
    return FeatureCache(args.cache or default_folder(), int(args.cache_limit * 2**30))
