"""Reads: the pictures of the steps, in their order, read by this process or by workers."""

from __future__ import annotations

import functools
import logging
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from runtime.checks import check_count
from runtime.engines.named_files import utf8_text
from runtime.errors import DeviceError, InputError, SdkError, first_line
from runtime.opencv import cv2
from runtime.tools.inspect import picture_words

T = TypeVar("T")
# The file, its index, the number of the crop, and the numbers that seed random numbers; returns
# what is read, and the warnings of the picture.
Item = Callable[[Path, int, int, tuple[int, int, int]], tuple[T, Sequence[str]]]
LOG = logging.getLogger("dg.train")
MOST_BROKEN = 20  # one of this many files may be broken, which is 5 %
_NAMED = 10  # broken files that are named; the others are counted
_ALIGNED = 64  # bytes


class Reads(Generic[T]):
    """What is read of the views of pictures, in batches.

    View number ``i * views + crop`` is crop ``crop`` of picture ``i``. The steps take the views in
    the order of an endless row of permutations of all views, each made from the seed and its number
    alone. So the views of a step depend only on the seed, the step, the list of files and which of
    these are broken, and a run can be resumed at any step. A batch that reaches into the next
    permutation, or that is larger than the number of views, can contain a view twice.

    A broken picture is replaced by the same crop of the next picture of the list that can be read,
    and is not read again, even if it is repaired. The first ten are logged to "dg.train", each one
    once. The warnings of pictures are logged once each, with the names of the pictures.

    Parameters
    ----------
    files : the pictures.
    item : called as ``item(file, index, crop, key)`` where pictures are read: in this process or in
        a worker. It returns what is read, and the warnings of the picture, as
        :func:`runtime.pictures.load.load_image` returns them. ``index`` is that of the file;
        ``crop`` is 0 to ``views - 1``; ``key`` is (seed, step, place in the batch). All its random
        numbers are made from the key, as by ``np.random.default_rng(key)``. It raises an InputError
        for a picture that is broken; another SdkError ends the iteration. A worker passes NumPy's
        arrays in shared memory, and everything else as pickle does.
    views : of each picture.
    batch : views of a step.
    seed : of the order, at least 0.
    workers : processes that read pictures ahead of time; with 0 this process does.
    broken : indices of pictures that are known to be broken, from a run that is resumed.

    Attributes
    ----------
    broken : the reason for each broken file that was found up to the last step that was returned.
    broken_indices : the indices of these files, in rising order.
    most_broken : so many files may be broken: 5 %.
    views : the number of views of all pictures.

    Raises
    ------
    InputError : there are no files, or a number is out of range.

    Example
    -------
    >>> def item(file, index, crop, key): return load_image(file)
    >>> for pictures in Reads(files, item, batch=8, seed=0).batches(0, 1000): train(pictures)
    """

    def __init__(
        self,
        files: Sequence[Path],
        item: Item[T],
        *,
        views: int = 1,
        batch: int,
        seed: int,
        workers: int = 0,
        broken: Sequence[int] = (),
    ) -> None:
        if not files:
            raise InputError("there are no pictures to train on", fix="--data FOLDER")
        self.files, self.item = list(files), item
        self.crops = check_count("views", views, 1, 2**20)
        self.batch = check_count("batch", batch, 1, 2**20)
        self.seed = check_count("seed", seed, 0, 2**63 - 1)
        self.workers = check_count("workers", workers, 0, 1024)
        self.views = len(self.files) * self.crops
        self.most_broken = len(self.files) // MOST_BROKEN
        self._found = 0  # broken files that this object found
        self._broken = dict.fromkeys(sorted(broken), "it was broken before this run was resumed")
        self._warnings: dict[str, dict[str, None]] = {}  # names in the order of reading
        self._logged: set[str] = set()

    @property
    def spread(self) -> np.ndarray:
        """The numbers of all views, (views,) int64, in an order in which neighbours are of
        different pictures if there are several: the first view of each picture, the second one of
        each, and so on."""
        return np.arange(self.views).reshape(-1, self.crops).T.ravel()

    @property
    def broken(self) -> dict[Path, str]:
        """The reason for each broken file."""
        return {self.files[i]: self._broken[i] for i in self.broken_indices}

    @property
    def broken_indices(self) -> list[int]:
        """The indices of the broken files, in rising order."""
        return sorted(self._broken)

    def batches(self, first: int, last: int) -> Generator[list[T], None, None]:
        """Yield what is read for the steps ``first`` to ``last - 1``, ``batch`` items each.

        Raises
        ------
        InputError : more than 5 % of the files are broken; the message lists them.
        DeviceError : a process that reads pictures was ended, for example because the memory is
            full.
        SdkError : an error of ``item`` that is no InputError.
        """
        most = self.most_broken
        self._check_broken(most)
        steps = self._steps(first, last)
        epoch = -(-self.views // self.batch)
        try:
            for step in range(first, last):
                if step == first + epoch:
                    self._log_warnings()
                with ExitStack() as failed:
                    failed.push(_clear_frames)
                    read = _next(steps)
                if isinstance(read, SdkError):
                    raise read
                self._note(read, most)
                self._check_broken(most)
                yield read.items
        finally:
            del steps  # ends the workers now, although an error's traceback refers to this frame
            self._log_warnings()

    def of(self, views: Sequence[int], *, most_broken: int | None = None) -> list[T]:
        """Return what is read of the views with these numbers. This process reads the pictures.
        The key of each view is (seed, 0, its place in ``views``).

        Parameters
        ----------
        views : their numbers.
        most_broken : so many files may be broken; None: all but one, for a few held-out pictures.

        Raises
        ------
        InputError : more files are broken; the message lists them.

        Example
        -------
        >>> first = reads.of([0, 1, 2])  # of the first three pictures, if each has one view
        """
        most = len(self.files) - 1 if most_broken is None else most_broken
        read = self._reader(most).read(views, 0)
        self._note(read, most)
        self._log_warnings()
        self._check_broken(most)
        return read.items

    def _reader(self, most: int) -> _Reader:
        return _Reader(
            self.files, self.item, self.crops, self.batch, self.seed, set(self._broken), most
        )

    def _steps(self, first: int, last: int) -> Iterator[Any]:
        """Start to read the steps."""
        before = signal.getsignal(signal.SIGCHLD)
        steps = iter(
            DataLoader(
                self._reader(self.most_broken),
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
        return steps

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
        first = self._broken[self.broken_indices[0]]
        raise InputError(
            f"{len(names)} of {len(self.files)} pictures cannot be used; wanted at most {most}: "
            f"{', '.join(names[:_NAMED])}{more}; the first one: {first}",
            fix="copy these files again, or remove them and train again",
        )


class _Read(NamedTuple):
    """A step as it was read.

    Parameters
    ----------
    items : what ``item`` has returned for each view.
    broken : the reason for each file that was found to be broken, by its index.
    warnings : the names of the pictures for each warning.
    """

    items: list[Any]
    broken: dict[int, str]
    warnings: dict[str, list[str]]


class _Packed(NamedTuple):
    """A step on its way from a worker: the pickled object, and its arrays one after the other in
    shared memory, of ``sizes`` bytes each."""

    pickled: bytes
    sizes: list[int]
    memory: Tensor


class _Reader(Dataset):
    """Reads the views of steps, in this process or in workers. Item ``s`` is step ``s``."""

    def __init__(
        self,
        files: list[Path],
        item: Item[Any],
        crops: int,
        batch: int,
        seed: int,
        broken: set[int],
        most: int,
    ) -> None:
        self.files, self.item, self.crops = files, item, crops
        self.batch, self.seed = batch, seed
        self.broken, self.most = broken, most

    def __getitem__(self, step: int) -> _Read | _Packed | SdkError:
        count = len(self.files) * self.crops
        places = [divmod(i, count) for i in range(step * self.batch, (step + 1) * self.batch)]
        views = [int(_order(self.seed, epoch, count)[i]) for epoch, i in places]
        if get_worker_info() is None:
            return self.read(views, step)
        try:
            return _pack(self.read(views, step))
        except SdkError as error:  # torch would make a text of it
            return error

    def read(self, views: Sequence[int], step: int) -> _Read:
        """Read views. If more than ``self.most`` files are broken, the views after that are left
        out."""
        read = _Read([], {}, {})
        for place, view in enumerate(views):
            found = self._readable(*divmod(int(view), self.crops), (self.seed, step, place), read)
            if not found:
                break
        return read

    def _readable(self, index: int, crop: int, key: tuple[int, int, int], read: _Read) -> bool:
        """Add the view of this picture, or of the next one that can be read, to ``read``; False if
        too many files are broken."""
        for offset in range(len(self.files)):
            at = (index + offset) % len(self.files)
            if at in self.broken:
                continue
            try:
                value, texts = self.item(self.files[at], at, crop, key)
            except InputError as error:
                self.broken.add(at)
                read.broken[at] = error.message
                if len(self.broken) > self.most:
                    return False
                continue
            read.items.append(value)
            for text in texts:
                read.warnings.setdefault(text, []).append(utf8_text(self.files[at].name))
            return True
        return False


def _pack(read: _Read) -> _Packed:
    """Copy the arrays of a step into one part of shared memory.

    Raises
    ------
    DeviceError : there is too little of it.
    """
    buffers: list[memoryview] = []
    pickled = pickle.dumps(read, 5, buffer_callback=lambda buffer: buffers.append(buffer.raw()))
    sizes = [buffer.nbytes for buffer in buffers]
    try:
        memory = torch.empty(sum(map(_room, sizes)), dtype=torch.uint8).share_memory_()
    except RuntimeError as error:
        raise DeviceError(
            f"pictures cannot be passed in shared memory: {first_line(error)}",
            fix="--workers 0; or give a container more of it: docker run --shm-size 2g",
        ) from error
    for part, buffer in zip(_parts(memory, sizes), buffers, strict=True):
        part[:] = buffer
    return _Packed(pickled, sizes, memory)


def _room(size: int) -> int:
    """Bytes that an array takes, so that the next one is aligned."""
    return -(-size // _ALIGNED) * _ALIGNED


def _parts(memory: Tensor, sizes: list[int]) -> Iterator[memoryview]:
    """Yield the part of the memory of each array."""
    data, start = memory.numpy().data, 0
    for size in sizes:
        yield data[start : start + size]
        start += _room(size)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The permutation of the views in an epoch."""
    return np.random.default_rng([0, seed, epoch]).permutation(count)


def _next(steps: Iterator[Any]) -> _Read | SdkError:
    """Return the next step, or the error of a worker or of one that ended. The error is not raised
    here, because its traceback would refer to the other workers and keep them."""
    try:
        step = next(steps)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        return DeviceError(
            "a process that reads pictures was ended from outside, or its memory is full",
            fix="use fewer processes: --workers 0; in a container, give it more shared memory",
        )
    if isinstance(step, _Packed):
        return pickle.loads(step.pickled, buffers=_parts(step.memory, step.sizes))
    return step


def _clear_frames(_: object, error: BaseException | None, trace: TracebackType | None) -> None:
    """Let the frames of an error refer to nothing: torch's refer to the workers, which would keep
    this process from ending."""
    traceback.clear_frames(trace)


def _start_worker(_: int) -> None:
    """Prepare a process that reads pictures. The signals that end a program are for the process
    that started it, which ends it too. It must not use the threads of OpenCV, which do not exist
    after a fork."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)


def _unchanged(read: Any) -> Any:
    return read
