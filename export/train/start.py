"""From the options of the command line to all that the loop needs. Everything is checked here."""

from __future__ import annotations

import argparse
import logging
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import runtime
from export.backbones.base import LITE0
from export.train.config import LoopConfig
from export.train.log import check_matplotlib
from export.train.loop import device_errors, seed_torch
from export.train.method import Method
from export.train.run import SCHEMA, Checkpoint, files_sha256
from export.train.views import ViewRule
from runtime.device.choose import default_threads
from runtime.errors import DeviceError, InputError
from runtime.files import shown, stat_of
from runtime.pictures.files import picture_files

if TYPE_CHECKING:
    from torch import Tensor

    from export.train.feature_cache import FeatureCache
    from export.train.features import FeatureBatches

HELD_OUT = 0.1  # share of the pictures that --select uses
LOG = logging.getLogger("dg.train")
_SAMPLE = 64  # most views that a method estimates settings from


class Prepared(NamedTuple):
    """What the loop needs.

    Parameters
    ----------
    method : its module is on the device, with the initial weights of the seed.
    batches : of the pictures that are trained on.
    config : the settings of the loop, with the number of threads that torch uses.
    entry : for run.json.
    score : what --select computes; None for the last checkpoint.
    held : the pictures that the energy is computed on; None without --select energy.
    """

    method: Method
    batches: FeatureBatches
    config: LoopConfig
    entry: dict[str, Any]
    score: Callable[[], float] | None
    held: FeatureBatches | None


def loop_config(args: argparse.Namespace) -> LoopConfig:
    """The settings of the loop that the command line names.

    Raises
    ------
    InputError : values out of range, or that do not fit together.
    """
    named = {name: getattr(args, name) for name in LoopConfig.__dataclass_fields__}
    if args.threads is None:
        del named["threads"]  # torch, which is imported later, has the default
    if args.holdout is None:
        named["holdout"] = 0.0 if args.select == "last" else HELD_OUT
    return LoopConfig(**named)


def listed_files(args: argparse.Namespace, entry: Mapping[str, Any] | None) -> list[Path]:
    """The picture files of --data; ``entry`` is run.json of a run that is resumed.

    Raises
    ------
    InputError : no --data, no pictures, a picture that is listed twice, or other pictures than when
        the run was started.
    """
    if args.data is None:
        raise InputError("data is not set; wanted a folder of pictures", fix="--data FOLDER")
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
    entry: Mapping[str, Any] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Prepared:
    """Load the backbone, and make the method, the batches and the entry for run.json.

    Parameters
    ----------
    module : of the method, with ``check``, ``make``, ``from_settings`` and ``view_defaults``, such
        as :mod:`export.train.segunify`.
    args : the options of the command line.
    config : of :func:`loop_config`.
    files : of :func:`listed_files`.
    command, options : of the command line, for run.json.
    entry, checkpoint : of a run that is resumed.

    Raises
    ------
    InputError : a value that cannot be used.
    BundleError : weights of the backbone that are damaged.
    DeviceError : the device cannot be used.
    MissingBackend : a package is not installed.
    """
    _check_options(args, entry)
    module.check(args)
    views = module.view_defaults(args)
    named = {"size": args.imgsz, "crops": args.crops}
    rule = ViewRule(**views | {name: value for name, value in named.items() if value is not None})
    check_matplotlib()

    from export.backbones.load import load_backbone

    backbone = load_backbone(args.backbone, args.features)
    loaded = backbone.entry()
    if entry is not None:
        loaded["name"] = entry["backbone"]["name"]  # of a folder, which may be moved
        names = sorted(k for k in loaded if loaded[k] != entry["backbone"][k] and k != "source")
        if names:
            raise InputError(
                f"the backbone {shown(args.backbone)} changed since the run was started: "
                f"{', '.join(names)}",
                fix="restore its files, or train again with another -o",
            )

    import torch

    from export.train.features import FeatureBatches, split
    from runtime.opencv import cv2

    if args.threads is None:
        config = replace(config, threads=min(torch.get_num_threads(), default_threads()))
    torch.set_num_threads(config.threads)
    _check_device(config.device)
    if config.device != "cpu" and config.precision == "fp32":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if config.select == "last":
        trained, held = files, []
    else:
        trained, held = split(files, config.holdout, config.seed)
    cache = _cache(args)
    known = checkpoint.state["broken"] if checkpoint else {}

    def batches_of(part: list[Path], workers: int) -> FeatureBatches:
        return FeatureBatches(
            part,
            rule,
            backbone,
            batch=config.batch,
            seed=config.seed,
            device=config.device,
            workers=workers,
            cache=cache,
            broken=[i for i, file in enumerate(part) if str(file) in known],
        )

    with device_errors("before the first step", args.out):
        batches = batches_of(trained, config.workers)
        seed_torch(config.seed, 0)
        if entry is None:
            method = module.make(args, backbone, lambda: _sample(batches))
        else:
            method = module.from_settings(entry["settings"], backbone.channels)
        method.module.to(config.device)
        score = held_batches = None
        if config.select == "energy":
            from export.train.select import energy_score

            held_batches = batches_of(held, 0)
            score = energy_score(method, held_batches)
        elif config.select == "labels":
            from export.train.select import labels_score

            paths = Path(args.labels), Path(args.classes)
            score = labels_score(method, backbone, rule.size, held, *paths)
    versions = {
        "dynaguide-edge": runtime.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }
    if backbone.library:
        name, _, version = backbone.library.partition(" ")
        versions[name] = version
    made = {
        "schema": SCHEMA,
        "method": method.name,
        "settings": method.settings(),
        "options": dict(options),
        "backbone": loaded,
        "data": list(args.data),
        "files": len(files),
        "files_sha256": files_sha256(files),
        "views": {"size": rule.size, "crops": rule.crops},
        "loop": asdict(config),
        "versions": versions,
        "command": command,
    }
    if entry is not None:  # what says how the run was started is kept
        made |= {key: entry[key] for key in ("versions", "command")}
        if other := [f"{k} {v}" for k, v in versions.items() if entry["versions"].get(k) != v]:
            LOG.warning(
                "now the versions are %s: the last bits of the result may differ from those of a "
                "run without an interruption",
                ", ".join(other),
            )
    return Prepared(method, batches, config, made, score, held_batches)


def _check_options(args: argparse.Namespace, entry: Mapping[str, Any] | None) -> None:
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
    if entry is not None and args.backbone != LITE0 and stat_of(Path(args.backbone)) is None:
        raise InputError(
            f"the backbone {shown(args.backbone)} does not exist", fix="--backbone with its place"
        )


def _check_device(device: str) -> None:
    """DeviceError if torch cannot use the device."""
    import torch

    if device == "cpu":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(device.removeprefix("cuda:")) >= count:
        found = f"torch finds {count} GPUs" if count else "torch finds no GPU that it can use"
        raise DeviceError(f"device is {device}, but {found}", fix="--device cpu")


def _cache(args: argparse.Namespace) -> FeatureCache | None:
    """The cache that the command line names; None with --no-cache."""
    from export.train.feature_cache import FeatureCache, default_folder

    if args.no_cache:
        return None
    return FeatureCache(args.cache or default_folder(), int(args.cache_limit * 2**30))


def _sample(batches: FeatureBatches) -> Tensor:
    """Features of some views, of which neighbours are of different pictures, for settings that a
    method estimates."""
    places = np.linspace(0, batches.views - 1, min(batches.views, _SAMPLE))
    views = batches.spread[places.round().astype(int)].tolist()
    return batches.of(views, most_broken=batches.most_broken)
