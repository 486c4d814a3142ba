"""Guides that are computed beforehand: a folder of masks from a prior and a folder of pictures."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePath

import numpy as np

from export.models.stated import Stated
from export.train.guide_source import GuideSource, open_guide_source
from runtime.checks import check_count
from runtime.engines.named_files import read_regular, shell_word
from runtime.errors import BundleError, InputError, SdkError
from runtime.files import file_error, shown, stat_of, write_atomic
from runtime.opencv import cv2
from runtime.pictures.decode import decode
from runtime.pictures.files import SUFFIXES
from runtime.prior.guide_list import GUIDES, UNKNOWN, GuideList
from runtime.prior.masks import SOFT, TENSOR

_MODEL = (
    "kind",
    "sha256",
    "classes",
    "output",
    "preprocess",
    "stated",
)  # what decides a guide's values
_Worked = tuple[str | SdkError | None, list[str]]  # what _work returns


@dataclass
class Written:
    """What :func:`write_guides` has done.

    Attributes
    ----------
    pictures : the number of pictures in the folder.
    skipped : of these, how many had a guide already.
    broken : the error of each picture that has no guide, by its path relative to the folder.
    warnings : the pictures of each warning.
    notes : warnings of the network's outputs, each once, also of what they were taken for.
    """

    pictures: int
    skipped: int = 0
    broken: dict[str, SdkError] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def open_source(model: str, stated: Stated | None = None) -> GuideSource:
    """Open the prior that ``--model`` of ``python -m export guides`` names.

    Parameters
    ----------
    model : an .onnx file; a bundle of a network; a SegFormer checkpoint folder; or a run of the
        trainer with a head. The last two are frozen to ONNX as ``python -m export`` does, at their
        own input size.
    stated : facts about an .onnx file that its metadata lacks, or that replace it.

    Raises
    ------
    InputError : no such model, k-means, or a run of refine, whose guides are those of its prior.
    BundleError : files that are damaged or do not fit.
    MissingBackend, DeviceError : a package that the model needs is not installed, or fails.

    Example
    -------
    >>> open_source("prior.onnx").classes
    19
    """
    folder = Path(model)
    is_run = stat_of(folder / "run.json") is not None
    if stat_of(folder / "manifest.json") is not None or not (
        is_run or stat_of(folder / "config.json") is not None
    ):
        return open_guide_source(model, stated)

    from export.models.load import load_model
    from export.to_onnx import freeze

    words = (model,) if is_run else ("segformer", folder)
    prior = load_model(*words, stated=stated)
    if prior.refinement is not None:
        raise InputError(
            f"{shown(model)} is a run of refine, whose guides are those of its prior",
            fix="--model with the prior that the run was trained on",
        )
    with tempfile.TemporaryDirectory(prefix="dg-") as place:
        path = Path(place) / "prior.onnx"
        write_atomic(path, freeze(prior))
        return replace(open_guide_source(str(path)), source=os.path.abspath(model))


def write_guides(
    source: GuideSource,
    data: Path,
    out: Path,
    *,
    soft: bool = False,
    workers: int = 1,
    every: float = 2.0,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write the guide of each picture of a folder, at the size of the network's output.

    The guide of sub/a.jpg is sub/a.png: the label of each pixel, uint16, and 65535 where it is
    unknown; or with ``soft`` sub/a.safetensors: "probabilities", (h, w, C) float16. guides.json
    lists them. A picture that it lists already, with the same sha256, is skipped.

    Parameters
    ----------
    source : the prior; :func:`open_source` opens it.
    data : the folder of pictures. Its folders are searched, too; hidden files are left out.
    out : the folder of masks, which is created if its parent exists.
    workers : threads that read pictures and compute guides, 1 to 256.
    every : seconds after which guides.json is written again. What it does not list after a crash is
        computed again.
    progress : called as progress(done, pictures) after each picture, guides.json included.

    Raises
    ------
    InputError : there are no pictures; two of them would have the same guide file; ``out`` is in
        ``data``, contains something else, or guides of another model, other options or other
        pictures; a file cannot be written; or ``soft`` for a network that returns labels.
    MissingBackend, DeviceError : the network cannot run.

    Example
    -------
    >>> write_guides(open_source("prior.onnx"), Path("photos"), Path("masks")).broken
    {}
    """
    workers = check_count("workers", workers, 1, 256)
    if soft and source.output == "labels":
        raise InputError(
            f"{source.name} returns labels, and soft guides are probabilities",
            fix="leave --soft out",
        )
    suffix = SOFT if soft else ".png"
    files = _guide_files(data, out, suffix)
    guides = _begun(source, data, out, soft, files)
    done, written = Written(len(files)), time.monotonic()
    save = partial(write_atomic, out / GUIDES)
    save(guides.to_json())
    jobs: dict[Future[_Worked], str] = {}

    def record(job: Future[_Worked]) -> None:
        name, (found, warnings) = jobs.pop(job), job.result()
        for text in warnings:
            done.warnings.setdefault(text, []).append(name)
        if isinstance(found, SdkError):
            done.broken[name] = found
            guides.pictures.pop(name, None)
        elif found is None:
            done.skipped += 1
        else:
            guides.pictures[name] = {"file": files[name], "sha256": found}

    pool = ThreadPoolExecutor(workers)
    try:
        for name, file in files.items():
            old = guides.pictures.get(name)
            jobs[pool.submit(_work, source, data / name, out / file, old)] = name
        for count, job in enumerate(as_completed([*jobs]), 1):
            record(job)
            if time.monotonic() - written >= every:
                save(guides.to_json())
                written = time.monotonic()
            if progress:
                progress(count, len(files))
    finally:  # what was finished before an error or Ctrl-C is listed, too
        pool.shutdown(cancel_futures=True)
        for job in [*jobs]:
            if not job.cancelled() and job.exception() is None:
                record(job)
        save(guides.to_json())
    noted = source.prior.engine.warnings
    done.notes = [*dict.fromkeys(f"{note.output}: {note.message}" for note in noted)]
    return done


def _guide_files(data: Path, out: Path, suffix: str) -> dict[str, str]:
    """Return the file of the guide for each picture, both relative to their folders."""
    found = stat_of(data)
    if found is None or not stat.S_ISDIR(found.st_mode):
        what = "is no folder" if found else "does not exist"
        raise InputError(f"data is {shown(data)}, which {what}", fix="--data FOLDER")
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(data)):
        raise InputError(
            f"{shown(out)} is inside the folder of the pictures, {shown(data)}",
            fix="write the masks into another folder: -o MASKS",
        )
    files: dict[str, str] = {}
    pictures: dict[str, str] = {}
    for name in _pictures(data):
        file = PurePath(name).with_suffix(suffix).as_posix()
        if file in pictures:
            raise InputError(
                f"{shown(data)} contains {shown(pictures[file])} and {shown(name)}, whose guides "
                "would be one file",
                fix="rename one of them",
            )
        files[name], pictures[file] = file, name
    if not files:
        raise InputError(
            f"no pictures in {shown(data)}; wanted {', '.join(SUFFIXES)}", fix="--data FOLDER"
        )
    return files


def _pictures(data: Path) -> Iterator[str]:
    """Yield the paths of the pictures in a folder and its folders, relative to it and in order."""

    def refuse(error: OSError) -> None:
        raise file_error("read", error.filename or data, error) from error

    for place, folders, names in os.walk(data, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if PurePath(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield (PurePath(place).relative_to(data) / name).as_posix()


def _begun(
    source: GuideSource, data: Path, out: Path, soft: bool, files: dict[str, str]
) -> GuideList:
    """Return the guides that a folder contains already, of the same model and options; make the
    folder if it does not exist."""
    entry = source.entry()
    model = json.loads(json.dumps({"name": source.name} | {name: entry[name] for name in _MODEL}))
    new = GuideList(model, {"soft": soft}, source.names)
    another = "choose another folder: -o MASKS"
    try:
        out.mkdir(exist_ok=True)
        inside = [name for name in os.listdir(out) if not name.startswith(".")]
    except OSError as error:
        raise file_error("created", out, error) from error
    if GUIDES not in inside:
        if inside:
            raise InputError(
                f"{shown(out)} contains {shown(inside[0])} and no {GUIDES}", fix=another
            )
        return new
    old = GuideList.read(out)
    differs = [name for name in _MODEL if old.model.get(name) != model[name]]
    differs += [name for name in ("options", "names") if getattr(old, name) != getattr(new, name)]
    if differs:
        raise InputError(
            f"{shown(out)} contains guides of {shown(str(old.model.get('name')))} with options "
            f"{old.options}; these would be of {shown(source.name)} with options {new.options}: "
            f"{', '.join(differs)} differ",
            fix=f"{another}; or remove the old ones: rm -r {shell_word(str(out))}",
        )
    gone = [name for name in old.pictures if name not in files]
    if gone:
        raise InputError(
            f"{shown(out / GUIDES)} lists {len(gone)} pictures that {shown(data)} does not "
            f"contain, such as {shown(gone[0])}",
            fix=f"restore them, or {another}",
        )
    return old


def _work(source: GuideSource, picture: Path, file: Path, old: dict[str, str] | None) -> _Worked:
    """Write the guide of one picture. Return the picture's sha256, None if the guide exists
    already, or the error of a broken picture; and the warnings."""
    try:
        data = read_regular(picture, "a picture")
        sha256 = hashlib.sha256(data).hexdigest()
        if old and old["sha256"] == sha256 and stat_of(file) is not None:
            return None, []
        pixels, warnings = decode(data, shown(picture))
        content = _content(source, pixels, file.suffix == SOFT)
    except (InputError, BundleError) as error:
        name = shown(picture)
        if name not in error.message:
            error = InputError(f"{name}: {error.message}", fix=error.fix)
        return error, []
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise file_error("created", file.parent, error) from error
    write_atomic(file, content)
    return sha256, warnings


def _content(source: GuideSource, pixels: np.ndarray, soft: bool) -> bytes:
    """The bytes of the file with the guide of a picture."""
    guide = source.own_guide(pixels)
    if soft:
        from safetensors.numpy import save

        return save({TENSOR: guide.astype(np.float16)})
    labels = guide
    if guide.ndim == 3:
        labels = np.where(guide.max(-1) > 0, guide.argmax(-1), -1)
    stored = np.where(labels < 0, UNKNOWN, labels).astype(np.uint16)
    return cv2.imencode(".png", stored)[1].tobytes()
