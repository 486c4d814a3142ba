"""FeatureBatches: the features that a head is trained on, step by step."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import signal
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from export.backbones.base import Backbone
from export.train.feature_cache import FeatureCache
from export.train.views import VERSION, ViewRule, view_pixels
from runtime.checks import check_count
from runtime.engines.named_files import utf8_text
from runtime.errors import DeviceError, InputError, first_line
from runtime.files import file_error, stat_of
from runtime.opencv import cv2
from runtime.pictures.load import load_image
from runtime.tools.inspect import picture_words

LOG = logging.getLogger("dg.train")
MOST_BROKEN = 20  # one of this many files may be broken, which is 5 %
_NAMED = 10  # broken files that are named; the others are counted


def split(files: Sequence[Path], share: float, seed: int) -> tuple[list[Path], list[Path]]:
    """Split pictures into those that are trained on and those that are held out.

    Parameters
    ----------
    files : at least two.
    share : of the files to hold out, in [0, 1]; it is rounded to whole files, at least one on each
        side.
    seed : the same files, share and seed give the same split.

    Returns
    -------
    The files to train on and the files that are held out, each in the order of ``files``.

    Raises
    ------
    InputError : there are fewer than two files, or the share is out of range.

    Example
    -------
    >>> train, held = split(files, 0.1, seed=0)
    """
    if not 0 <= share <= 1:
        raise InputError(f"the share of held-out pictures is {share!r}; wanted 0 to 1")
    if len(files) < 2:
        raise InputError(
            f"{len(files)} picture cannot be split into pictures to train on and held-out ones",
            fix="add pictures, or select the last step",
        )
    count = min(max(1, round(share * len(files))), len(files) - 1)
    order = np.random.default_rng([1, seed]).permutation(len(files))
    held = set(order[:count].tolist())
    parts: tuple[list[Path], list[Path]] = ([], [])
    for index, file in enumerate(files):
        parts[index in held].append(file)
    return parts


class FeatureBatches:
    """The features of the views of pictures, in batches.

    View number ``i * rule.count + crop`` is crop ``crop`` of picture ``i``. The steps take the
    views in the order of an endless row of permutations of all views, each made from the seed and
    its number alone. So the views of a step depend only on the seed, the step, the list of files
    and which of these are broken, and a run can be resumed at any step. A batch that reaches into
    the next permutation, or that is larger than the number of views, can contain a view twice.

    A broken picture is replaced by the next picture of the list that can be read, and is not read
    again, even if it is repaired. The first ten are logged to "dg.train", each one once.

    On the CPU the features of each view are computed alone, so that their bits do not depend on
    which other views are in the cache. On another device the views of a batch that are not in the
    cache are computed together. torch's global random numbers are neither used nor changed.

    Parameters
    ----------
    files : the pictures.
    rule : which views each picture has.
    backbone : computes the features; its module is moved to the device.
    batch : views of a step.
    seed : of the order, at least 0.
    device : of torch, such as "cpu" or "cuda".
    workers : processes that read and decode pictures ahead of time; with 0 this process does.
    cache : where features are stored; None computes them each time.
    broken : indices of pictures that are known to be broken, from a run that is resumed.

    Attributes
    ----------
    broken : the reason for each broken file that was found up to the last step that was returned.
    broken_indices : the indices of these files, in rising order.
    most_broken : so many files may be broken: 5 %.
    alone : whether the features of each view are computed alone, as on the CPU.

    Raises
    ------
    InputError : there are no files, a number is out of range, or the size of the views is not a
        multiple of the backbone's stride.

    Example
    -------
    >>> data = FeatureBatches(files, ViewRule(), backbone, batch=32, seed=0, device="cpu")
    >>> for features in data.batches(0, 1000): train(features)  # (32, C, h, w) float32
    """

    def __init__(
        self,
        files: Sequence[Path],
        rule: ViewRule,
        backbone: Backbone,
        *,
        batch: int,
        seed: int,
        device: str,
        workers: int = 0,
        cache: FeatureCache | None = None,
        broken: Sequence[int] = (),
    ) -> None:
        if not files:
            raise InputError("there are no pictures to train on", fix="--data FOLDER")
        if rule.size % backbone.stride:
            near = max(1, round(rule.size / backbone.stride)) * backbone.stride
            raise InputError(
                f"imgsz is {rule.size}; wanted a multiple of {backbone.stride}, the stride of "
                f"{backbone.name}",
                fix=f"--imgsz {near}",
            )
        self.files, self.rule, self.backbone = list(files), rule, backbone
        self.batch = check_count("batch", batch, 1, 2**20)
        self.seed = check_count("seed", seed, 0, 2**63 - 1)
        self.workers = check_count("workers", workers, 0, 1024)
        self.device, self.cache = torch.device(device), cache
        self.alone = self.device.type == "cpu"
        self.most_broken = len(self.files) // MOST_BROKEN
        self._found = 0  # broken files that this object found
        self._broken = dict.fromkeys(sorted(broken), "it was broken before this run was resumed")
        self._warnings: dict[str, dict[str, None]] = {}  # names in the order of reading
        self._logged: set[str] = set()
        self._digests: dict[Path, tuple[int, int, str]] = {}
        backbone.module.to(self.device)
        self._mean, self._std = (
            torch.tensor(v, dtype=torch.float32, device=self.device).reshape(1, 3, 1, 1)
            for v in (backbone.mean, backbone.std)
        )

    @property
    def views(self) -> int:
        """The number of views of all pictures."""
        return len(self.files) * self.rule.count

    @property
    def spread(self) -> np.ndarray:
        """The numbers of all views, (views,) int64, in an order in which neighbours are of
        different pictures if there are several: the first view of each picture, the second one of
        each, and so on."""
        return np.arange(self.views).reshape(-1, self.rule.count).T.ravel()

    @property
    def broken(self) -> dict[Path, str]:
        """The reason for each broken file."""
        return {self.files[i]: self._broken[i] for i in self.broken_indices}

    @property
    def broken_indices(self) -> list[int]:
        """The indices of the broken files, in rising order."""
        return sorted(self._broken)

    def batches(self, first: int, last: int) -> Iterator[Tensor]:
        """Yield the features of the steps ``first`` to ``last - 1``: (batch, C, h, w) float32 on
        the device.

        Raises
        ------
        InputError : more than 5 % of the files are broken; the message lists them.
        DeviceError : a process that reads pictures was ended, for example because the memory is
            full.
        """
        most = self.most_broken
        self._check_broken(most)
        reads = self._reads(first, last, most)
        epoch = -(-self.views // self.batch)
        try:
            for step in range(first, last):
                if step == first + epoch:
                    self._log_warnings()
                read = _next(reads)
                if isinstance(read, DeviceError):
                    raise read
                self._note(read, most)
                self._check_broken(most)
                yield self._features(read)
        finally:
            del reads  # ends the workers now, although an error's traceback refers to this frame
            self._log_warnings()

    def of(self, views: Sequence[int], *, most_broken: int | None = None) -> Tensor:
        """Return the features of the views with these numbers: (N, C, h, w) float32 on the device.

        This process reads the pictures.

        Parameters
        ----------
        views : their numbers.
        most_broken : so many files may be broken; None: all but one, for a few held-out pictures.

        Raises
        ------
        InputError : more files are broken; the message lists them.

        Example
        -------
        >>> features = data.of([0, 1, 2])  # of the first three pictures, if each has one view
        """
        most = len(self.files) - 1 if most_broken is None else most_broken
        read = self._reader(most).read(views)
        self._note(read, most)
        self._log_warnings()
        self._check_broken(most)
        return self._features(read)

    def _reader(self, most: int) -> _Reader:
        return _Reader(
            self.files, self.rule, self.seed, self.batch, set(self._broken), most,
            self.cache, self._maker(), self._shape(), self._digests,
        )  # fmt: skip

    def _shape(self) -> tuple[int, int, int]:
        side = self.rule.size // self.backbone.stride
        return self.backbone.channels, side, side

    def _maker(self) -> list[Any]:
        """All that can change the features of a given file and crop, their last bits included."""
        computed = [torch.__version__, self.device.type]
        if self.device.type == "cpu":
            computed += [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
        elif self.device.type == "cuda":
            computed += [torch.cuda.get_device_name(self.device)]
        rule = [self.rule.size, self.rule.crops]
        return [VERSION, cv2.__version__, rule, self.backbone.key, computed]

    def _reads(self, first: int, last: int, most: int) -> Iterator[_Read | DeviceError]:
        """Start to read the steps."""
        before = signal.getsignal(signal.SIGCHLD)
        reads = iter(
            DataLoader(
                self._reader(most),
                batch_size=None,
                sampler=range(first, last),
                num_workers=self.workers,
                collate_fn=_unchanged,
                worker_init_fn=_start_worker,
                generator=torch.Generator(),
            )
        )
        # torch sets a handler that raises a RuntimeError wherever this process is when a worker
        # ends. Without it, the error is raised where the next batch is read.
        if self.workers and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)
        return reads

    def _note(self, read: _Read, most: int) -> None:
        """Record and log the broken pictures of a step; record its warnings."""
        found = [index for index in read.broken if index not in self._broken]
        self._broken |= {index: read.broken[index] for index in found}
        replaced = "; the next picture is used instead" if len(self._broken) <= most else ""
        for index in found:
            self._found += 1
            if self._found <= _NAMED:
                LOG.warning("%s%s.", read.broken[index], replaced)
            elif self._found == _NAMED + 1:
                LOG.warning("More pictures are broken; only the first %d are named.", _NAMED)
        for text, names in read.warnings.items():
            self._warnings.setdefault(text, {}).update(dict.fromkeys(names))

    def _log_warnings(self) -> None:
        for text, names in self._warnings.items():
            if text not in self._logged:
                LOG.warning("%s: %s", picture_words([*names]), text)
        self._logged.update(self._warnings)
        self._warnings.clear()

    def _check_broken(self, most: int) -> None:
        if len(self._broken) <= most:
            return
        names = [utf8_text(self.files[i].name) for i in self.broken_indices]
        more = ", ..." if len(names) > _NAMED else ""
        raise InputError(
            f"{len(names)} of {len(self.files)} pictures cannot be read; wanted at most {most}: "
            f"{', '.join(names[:_NAMED])}{more}",
            fix="remove these files, or copy them again",
        )

    def _features(self, read: _Read) -> Tensor:
        """Return the features of the views that were read, and store those that are new."""
        out = torch.empty((len(read.keys), *self._shape()), device=self.device)
        missing = set(read.missing)
        stored = [row for row in range(len(read.keys)) if row not in missing]
        out[stored] = read.known.to(self.device)
        size = 1 if self.alone else max(1, len(read.missing))
        for start in range(0, len(read.missing), size):
            rows = read.missing[start : start + size]
            out[rows] = self._computed(read.pixels[start : start + size])
            if self.cache is not None:
                for row in rows:
                    if read.keys[row]:
                        self.cache.put(read.keys[row], out[row].cpu())
        return out

    @torch.no_grad()
    def _computed(self, pixels: Tensor) -> Tensor:
        """Return the features of (N, size, size, 3) uint8 pixels, in float32 also where the caller
        uses a lower precision."""
        colours = pixels.to(self.device).permute(0, 3, 1, 2).to(torch.float32) / 255
        with torch.autocast(self.device.type, enabled=False):
            return self.backbone.module((colours - self._mean) / self._std)


class _Read(NamedTuple):
    """The views of a step as they were read.

    Parameters
    ----------
    keys : of each view's features in the cache; "" for those that are not stored.
    missing : which views are not in the cache.
    pixels : (missing, size, size, 3) uint8 of these.
    known : (others, C, h, w) float32, the features of the others.
    broken : the reason for each file that was found to be broken, by its index.
    warnings : the names of the pictures for each warning.
    """

    keys: list[str]
    missing: list[int]
    pixels: Tensor
    known: Tensor
    broken: dict[int, str]
    warnings: dict[str, list[str]]


class _Reader(Dataset):
    """Reads the views of steps, in this process or in workers. Item ``s`` is step ``s``."""

    def __init__(
        self,
        files: list[Path],
        rule: ViewRule,
        seed: int,
        batch: int,
        broken: set[int],
        most: int,
        cache: FeatureCache | None,
        maker: list[Any],
        shape: tuple[int, int, int],
        digests: dict[Path, tuple[int, int, str]],
    ) -> None:
        self.files, self.rule, self.seed, self.batch = files, rule, seed, batch
        self.broken, self.most = broken, most
        self.cache, self.maker, self.shape, self.digests = cache, maker, shape, digests

    def __getitem__(self, step: int) -> _Read | DeviceError:
        count = len(self.files) * self.rule.count
        places = [divmod(i, count) for i in range(step * self.batch, (step + 1) * self.batch)]
        read = self.read([int(_order(self.seed, epoch, count)[i]) for epoch, i in places])
        if get_worker_info() is not None:
            try:
                read.pixels.share_memory_()
                read.known.share_memory_()
            except RuntimeError as error:
                return DeviceError(
                    f"pictures cannot be passed in shared memory: {first_line(error)}",
                    fix="--workers 0; or give a container more of it: docker run --shm-size 2g",
                )
        return read

    def read(self, views: Sequence[int]) -> _Read:
        """Read views. If more than ``self.most`` files are broken, the views after that are left
        out."""
        keys: list[str] = []
        missing: list[int] = []
        pixels: list[Tensor] = []
        known: list[Tensor] = []
        broken: dict[int, str] = {}
        warnings: dict[str, list[str]] = {}
        for row, view in enumerate(views):
            found = self._readable(*divmod(int(view), self.rule.count), broken, warnings)
            if found is None:
                break
            key, features, picture = found
            keys.append(key)
            if picture is None:
                known.append(features)
            else:
                missing.append(row)
                pixels.append(picture)
        size = self.rule.size
        return _Read(
            keys,
            missing,
            torch.from_numpy(np.stack(pixels)) if pixels else torch.empty((0, size, size, 3)),
            torch.stack(known) if known else torch.empty((0, *self.shape)),
            broken,
            warnings,
        )

    def _readable(
        self, index: int, crop: int, broken: dict[int, str], warnings: dict[str, list[str]]
    ) -> tuple[str, Tensor | None, np.ndarray | None] | None:
        """Return the view of this picture, or of the next one that can be read; None if too many
        files are broken. Broken files are added to ``broken``."""
        for offset in range(len(self.files)):
            at = (index + offset) % len(self.files)
            if at in self.broken:
                continue
            try:
                return self._view(self.files[at], crop, warnings)
            except InputError as error:
                self.broken.add(at)
                broken[at] = error.message
                if len(self.broken) > self.most:
                    break
        return None

    def _view(
        self, path: Path, crop: int, warnings: dict[str, list[str]]
    ) -> tuple[str, Tensor | None, np.ndarray | None]:
        """Return the key of a view, its features if the cache has them, else its pixels.

        Raises
        ------
        InputError : the picture cannot be read.
        """
        digest = key = ""
        if self.cache is not None and (digest := self._digest(path)):
            key = hashlib.sha256(json.dumps([digest, crop, self.maker]).encode()).hexdigest()
            features = self.cache.get(key, self.shape)
            if features is not None:
                return key, features, None
        picture, texts = load_image(path)
        for text in texts:
            warnings.setdefault(text, []).append(utf8_text(path.name))
        if key and self._digest(path) != digest:
            key = ""  # the file was changed after its digest was computed
        return key, None, view_pixels(picture, self.rule, crop)

    def _digest(self, path: Path) -> str:
        """Return the SHA-256 of a file, which is computed again if its time or size has changed.
        It is "" for a path that is no regular file, such as a pipe, whose bytes can be read once.

        Raises
        ------
        InputError : the file cannot be read.
        """
        found = stat_of(path)
        if found is None or not stat.S_ISREG(found.st_mode):
            return ""
        time, size, digest = self.digests.get(path, (0, -1, ""))
        if (time, size) != (found.st_mtime_ns, found.st_size):
            state = hashlib.sha256()
            try:
                with path.open("rb") as file:
                    while part := file.read(2**20):
                        state.update(part)
            except OSError as error:
                raise file_error("read", path, error) from error
            digest = state.hexdigest()
            self.digests[path] = found.st_mtime_ns, found.st_size, digest
        return digest


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The permutation of the views in an epoch."""
    return np.random.default_rng([0, seed, epoch]).permutation(count)


def _next(reads: Iterator[_Read | DeviceError]) -> _Read | DeviceError:
    """Return the next step, or the error of a worker that ended. The error is not raised here,
    because its traceback would refer to the other workers and keep them."""
    try:
        return next(reads)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
    return DeviceError(
        "a process that reads pictures was ended from outside, or its memory is full",
        fix="use fewer processes: --workers 0; in a container, give it more shared memory",
    )


def _start_worker(_: int) -> None:
    """Prepare a process that reads pictures. The signals that end a program are for the process
    that started it, which ends it too. It must not use the threads of OpenCV, which do not exist
    after a fork."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)


def _unchanged(read: Any) -> Any:
    return read
