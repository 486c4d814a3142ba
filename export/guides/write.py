"""Guides that are computed beforehand: a folder of masks from a prior and a folder of pictures."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np

from export.lock import open_lock, take_lock
from export.train.guide_source import GuideSource
from runtime.checks import check_count, check_guide
from runtime.engines.named_files import read_regular, shell_word
from runtime.errors import BundleError, InputError, SdkError
from runtime.files import file_error, shown, stat_of, to_path, write_atomic
from runtime.opencv import cv2
from runtime.pictures.decode import decode
from runtime.pictures.files import SUFFIXES
from runtime.prior.guide_list import GUIDES, UNKNOWN, GuideList
from runtime.prior.masks import SOFT, TENSOR, files_below
from runtime.tools.inspect import picture_words

_ELSEWHERE = ("source", "names")  # what the entry of a model says and that of guides.json does not
_LOCK = ".lock"
_LONGEST = 40  # letters of a value in the message about guides that differ
_ANOTHER = "choose another folder: -o MASKS"
_Outcome = tuple[dict[str, str] | SdkError | None, list[str]]  # what _write_one returns


@dataclass
class Written:
    """What :func:`write_guides` has done.

    Attributes
    ----------
    pictures : the number of pictures in the folder.
    skipped : of these, how many had a guide already.
    broken : the error of each picture that has no guide, by its path relative to the folder.
    warnings : the pictures of each warning.
    notes : warnings of the network's outputs, and how unclear ones were understood, each once; and
        of guides of pictures that the folder no longer contains.
    """

    pictures: int
    skipped: int = 0
    broken: dict[str, SdkError] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class GuideModel(Protocol):
    """What guides are computed with: a :class:`export.train.guide_source.GuideSource`, or a model
    that the user names after ``--model``. A GuideSource is called by several threads at a time,
    another model by one."""

    @property
    def name(self) -> str:
        """A short name for messages."""

    @property
    def output(self) -> str:
        """What :meth:`own_guide` is computed from: "logits", "probabilities" or "labels"."""

    @property
    def names(self) -> list[str] | None:
        """The names of the classes; None if labels have no meaning that all pictures share."""

    def own_guide(self, picture: np.ndarray, /) -> np.ndarray:
        """Return the guide of a picture, (H, W, 3) uint8 RGB: (h, w, C) float32 that sums to 1, or
        to 0 where it is unknown; or (h, w) int32 labels, -1 = unknown. The aspect ratio is that of
        the picture, or of the network's input. An InputError or BundleError is an error of this
        picture alone."""

    def entry(self) -> dict[str, Any]:
        """Return what guides.json stores of the model, as JSON: all that decides the values of its
        guides, such as "kind", "sha256", "classes", "output" and "options". "source" and "names"
        are left out if they are among it."""


def write_guides(
    source: GuideModel,
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
    lists them. A picture that it lists already is skipped if the files of the picture and the guide
    have not changed since.

    Parameters
    ----------
    source : the model; :func:`export.guides.network.open_source` opens a network.
    data : the folder of pictures. Its folders and links to folders are searched, too; hidden files
        are left out.
    out : the folder of masks, which is created if its parent exists.
    workers : threads that read pictures and write masks, 1 to 256. With a GuideSource they also
        compute guides at the same time; another model computes one guide after another.
    every : seconds after which guides.json is written again, at the end of a picture. What it does
        not list after a crash is computed again.
    progress : called as progress(done, pictures) after each picture, guides.json included.

    Raises
    ------
    InputError : there are no pictures; two of them would have the same guide file; ``out`` is in
        ``data``, contains something else, or guides of another model, other options or other
        pictures; another process writes it; a file cannot be written; or ``soft`` for a model that
        returns labels.
    MissingBackend, DeviceError : the network cannot run.

    Example
    -------
    >>> write_guides(open_source("prior.onnx"), Path("photos"), Path("masks")).broken
    {}
    """
    data, out = to_path(data), to_path(out)
    workers = check_count("workers", workers, 1, 256)
    if soft and source.output == "labels":
        raise InputError(
            f"{source.name} returns labels, and soft guides are probabilities",
            fix="leave --soft out",
        )
    suffix = SOFT if soft else ".png"
    files = _guide_files(data, out, suffix)
    _make_folder(out)
    with _alone(out):
        guides = _listed_guides(source, data, out, soft, files)
        return _write(source, data, out, guides, files, workers, every, progress)


def _write(
    source: GuideModel,
    data: Path,
    out: Path,
    guides: GuideList,
    files: dict[str, str],
    workers: int,
    every: float,
    progress: Callable[[int, int], None] | None,
) -> Written:
    """Write the guides that ``guides`` does not list; the other arguments are those of
    :func:`write_guides`, and ``files`` is what :func:`_guide_files` returns."""
    done, written = Written(len(files)), time.monotonic()
    save = partial(write_atomic, out / GUIDES)
    save(guides.to_json())
    jobs: dict[Future[_Outcome], str] = {}

    def record(job: Future[_Outcome]) -> None:
        name, (found, warnings) = jobs.pop(job), job.result()
        for text in warnings:
            done.warnings.setdefault(text, []).append(name)
        if isinstance(found, SdkError):
            done.broken[name] = found
            guides.pictures.pop(name, None)
        elif found is None:
            done.skipped += 1
        else:
            guides.pictures[name] = found

    alone = nullcontext() if isinstance(source, GuideSource) else threading.Lock()
    pool = ThreadPoolExecutor(workers)
    try:
        for name, file in files.items():
            old = guides.pictures.get(name)
            jobs[pool.submit(_write_one, source, alone, data / name, out, file, old)] = name
        for count, job in enumerate(as_completed([*jobs]), 1):
            record(job)
            if time.monotonic() - written >= every:
                save(guides.to_json())
                written = time.monotonic()
            if progress:
                progress(count, len(files))
    finally:  # what was finished before an error or Ctrl-C is listed, too
        try:
            pool.shutdown(cancel_futures=True)
        finally:  # a second Ctrl-C ends the waiting
            for job in [*jobs]:
                if job.done() and not job.cancelled() and job.exception() is None:
                    record(job)
            save(guides.to_json())
    if gone := [name for name in guides.pictures if name not in files]:
        words = picture_words(gone, f"that {shown(data)} does not contain")
        done.notes.append(f"{shown(out)} contains guides of {words}")
    if isinstance(source, GuideSource):
        noted = source.prior.engine.warnings
        done.notes += dict.fromkeys(f"{note.output}: {note.message}" for note in noted)
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
    for name in files_below(data, SUFFIXES):
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


def _make_folder(out: Path) -> None:
    """Make the folder of masks; InputError if it is no folder, or contains something else."""
    found = stat_of(out, "written")
    if found is not None and not stat.S_ISDIR(found.st_mode):
        raise InputError(f"{shown(out)} is no folder", fix=_ANOTHER)
    try:
        out.mkdir(exist_ok=True)
        inside = [name for name in os.listdir(out) if not name.startswith(".")]
    except OSError as error:
        raise file_error("created", out, error) from error
    if inside and GUIDES not in inside:
        raise InputError(f"{shown(out)} contains {shown(inside[0])} and no {GUIDES}", fix=_ANOTHER)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Write a folder in this block, while no other process writes it."""
    lock = out / _LOCK
    descriptor, _ = open_lock(lock)
    try:
        if not take_lock(descriptor, lock):
            raise InputError(
                f"another process writes guides into {shown(out)}",
                fix=f"wait until it ends, or {_ANOTHER}",
            )
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()
    finally:
        os.close(descriptor)


def _listed_guides(
    source: GuideModel, data: Path, out: Path, soft: bool, files: dict[str, str]
) -> GuideList:
    """Return the guides that a folder contains already, of the same model and options."""
    entry = {name: value for name, value in source.entry().items() if name not in _ELSEWHERE}
    model = json.loads(json.dumps({"name": source.name} | entry))
    new = GuideList(model, {"soft": soft}, source.names)
    if stat_of(out / GUIDES) is None:
        return new
    old = GuideList.read(out)
    if not old.pictures:
        return new
    remove = f"{_ANOTHER}; or remove the old guides: rm -r {shell_word(str(out))}"
    differences = _differences(old, new)
    if differences:
        raise InputError(
            f"{shown(out)} contains guides of {shown(str(old.model.get('name')))}, and these would "
            f"be of {shown(source.name)}: {'; '.join(differences)}",
            fix=remove,
        )
    listed = old.pictures.items()
    if len(listed) > 1 and not any(_is_file(data / name, one["sha256"]) for name, one in listed):
        raise InputError(
            f"{shown(out)} contains the guides of {len(listed)} pictures, and none of them is in "
            f"{shown(data)}, or all have changed",
            fix=remove,
        )
    written = set(files.values())
    for name, one in [*listed]:  # a guide of another picture takes the place of an old one
        if name not in files and one["file"] in written:
            del old.pictures[name]
    return old


def _is_file(path: Path, sha256: str) -> bool:
    """Whether a file exists, can be read and has this hash."""
    try:
        return hashlib.sha256(read_regular(path, "a file")).hexdigest() == sha256
    except InputError:
        return False


def _differences(old: GuideList, new: GuideList) -> list[str]:
    """What decides the values of guides and differs in two lists, in words."""
    before, now = _facts(old), _facts(new)
    found = []
    for name in dict.fromkeys([*now, *before]):
        values = repr(now.get(name)), repr(before.get(name))
        if values[0] != values[1]:
            short = max(map(len, values)) <= _LONGEST
            found.append(f"{name} is {values[0]}, not {values[1]}" if short else f"{name} differs")
    return found


def _facts(guides: GuideList) -> dict[str, Any]:
    """What decides the values of guides, by the words that a message uses."""
    facts: dict[str, Any] = {}
    for name, value in guides.model.items():
        if isinstance(value, dict):  # the options of a model are known by their own names
            start = "" if name == "options" else f"{name} "
            facts |= {f"{start}{key}": part for key, part in value.items()}
        elif name != "name":
            facts[name] = value
    return facts | guides.options | {"names": guides.names}


def _write_one(
    source: GuideModel,
    alone: AbstractContextManager[Any],
    picture: Path,
    out: Path,
    file: str,
    old: dict[str, str] | None,
) -> _Outcome:
    """Write the guide of one picture, which is computed inside ``alone``. Return the picture's
    entry of guides.json, None if ``old`` is right already, or the error of a broken picture; and
    the warnings."""
    place = out / file
    try:
        data = read_regular(picture, "a picture")
        entry = {"sha256": hashlib.sha256(data).hexdigest(), "file": file}
        if old and old == entry | {"file_sha256": old["file_sha256"]}:
            if _is_file(place, old["file_sha256"]):
                return None, []
        pixels, warnings = decode(data, shown(picture))
        with alone:
            guide = source.own_guide(pixels)
        content = _encoded(check_guide(guide, *guide.shape[:2]), place.suffix == SOFT)
    except (InputError, BundleError) as error:
        name = shown(picture)
        if name not in error.message:
            error = InputError(f"{name}: {error.message}", fix=error.fix)
        return error, []
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise file_error("created", place.parent, error) from error
    try:
        write_atomic(place, content)
    except InputError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno != errno.ENAMETOOLONG:
            raise  # as for a full disk, where each picture would fail
        return error, []
    return entry | {"file_sha256": hashlib.sha256(content).hexdigest()}, warnings


def _encoded(guide: np.ndarray, soft: bool) -> bytes:
    """The bytes of the file with a guide."""
    if soft:
        from safetensors.numpy import save

        return save({TENSOR: guide.astype(np.float16)})
    labels = guide
    if guide.ndim == 3:
        labels = np.where(guide.max(-1) > 0, guide.argmax(-1), -1)
    stored = np.where(labels < 0, UNKNOWN, labels).astype(np.uint16)
    return cv2.imencode(".png", stored)[1].tobytes()
