"""FeatureBatches: the features that a head is trained on, step by step."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from export.backbones.base import Backbone
from export.train.feature_cache import FeatureCache
from export.train.reader import Reads
from export.train.views import VERSION, ViewRule, view_pixels
from runtime.errors import InputError
from runtime.files import file_error, stat_of
from runtime.opencv import cv2
from runtime.pictures.load import load_image


class FeatureBatches:
    """The features of the views of pictures, in batches.

    View number ``i * rule.count + crop`` is crop ``crop`` of picture ``i``. The order of the views,
    and what is done with broken pictures, are those of :class:`export.train.reader.Reads`.

    On the CPU the features of each view are computed alone, so that their bits do not depend on
    which other views are in the cache. On another device the views of a batch that are not in the
    cache are computed together. torch's global random numbers are neither used nor changed.

    Parameters
    ----------
    files : the pictures.
    rule : which views each picture has.
    backbone : computes the features; its module is moved to the device.
    batch, seed, workers, broken : as for :class:`export.train.reader.Reads`.
    device : of torch, such as "cpu" or "cuda".
    cache : where features are stored; None computes them each time.

    Attributes
    ----------
    broken, broken_indices, most_broken, views, spread : as of :class:`export.train.reader.Reads`.
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
        side = rule.size // backbone.stride
        self._shape = (backbone.channels, side, side)
        self._reader = _Reader(rule, cache, self._shape)
        self._reads: Reads[_View] = Reads(
            files, self._reader, views=rule.count, batch=batch, seed=seed, workers=workers,
            broken=broken,
        )  # fmt: skip
        if rule.size % backbone.stride:
            near = max(1, round(rule.size / backbone.stride)) * backbone.stride
            raise InputError(
                f"imgsz is {rule.size}; wanted a multiple of {backbone.stride}, the stride of "
                f"{backbone.name}",
                fix=f"--imgsz {near}",
            )
        self.files, self.rule, self.backbone = self._reads.files, rule, backbone
        self.batch, self.seed, self.workers = batch, seed, workers
        self.device, self.cache = torch.device(device), cache
        self.alone = self.device.type == "cpu"
        self.views, self.most_broken = self._reads.views, self._reads.most_broken
        backbone.module.to(self.device)
        self._mean, self._std = (
            torch.tensor(v, dtype=torch.float32, device=self.device).reshape(1, 3, 1, 1)
            for v in (backbone.mean, backbone.std)
        )

    @property
    def spread(self) -> np.ndarray:
        """The numbers of all views, of which neighbours are of different pictures."""
        return self._reads.spread

    @property
    def broken(self) -> dict[Path, str]:
        """The reason for each broken file."""
        return self._reads.broken

    @property
    def broken_indices(self) -> list[int]:
        """The indices of the broken files, in rising order."""
        return self._reads.broken_indices

    def batches(self, first: int, last: int) -> Generator[Tensor, None, None]:
        """Yield the features of the steps ``first`` to ``last - 1``: (batch, C, h, w) float32 on
        the device.

        Raises
        ------
        InputError : more than 5 % of the files are broken; the message lists them.
        DeviceError : a process that reads pictures was ended, for example because the memory is
            full.
        """
        self._reader.maker = self._maker()
        with closing(self._reads.batches(first, last)) as steps:
            for views in steps:
                yield self._features(views)

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
        self._reader.maker = self._maker()
        return self._features(self._reads.of(views, most_broken=most_broken))

    def _maker(self) -> list[Any]:
        """All that can change the features of a given file and crop, their last bits included."""
        computed: list[str | int] = [torch.__version__, self.device.type]
        if self.device.type == "cpu":
            computed += [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
        elif self.device.type == "cuda":
            computed += [torch.cuda.get_device_name(self.device)]
        rule = [self.rule.size, self.rule.crops]
        return [VERSION, cv2.__version__, rule, self.backbone.key, computed]

    def _features(self, views: list[_View]) -> Tensor:
        """Return the features of the views that were read, and store those that are new."""
        out = torch.empty((len(views), *self._shape), device=self.device)
        missing: list[int] = []
        pixels: list[np.ndarray] = []
        for row, view in enumerate(views):
            if view.pixels is not None:
                missing.append(row)
                pixels.append(view.pixels)
            else:
                assert view.features is not None
                out[row] = torch.from_numpy(view.features).to(self.device)
        size = 1 if self.alone else max(1, len(missing))
        for start in range(0, len(missing), size):
            rows = missing[start : start + size]
            out[rows] = self._computed(np.stack(pixels[start : start + size]))
            if self.cache is not None:
                for row in rows:
                    if views[row].key:
                        self.cache.put(views[row].key, out[row].cpu())
        return out

    @torch.no_grad()
    def _computed(self, pixels: np.ndarray) -> Tensor:
        """Return the features of (N, size, size, 3) uint8 pixels, in float32 also where the caller
        uses a lower precision."""
        moved = torch.from_numpy(pixels).to(self.device)
        colours = moved.permute(0, 3, 1, 2).to(torch.float32) / 255
        with torch.autocast(self.device.type, enabled=False):
            return self.backbone.module((colours - self._mean) / self._std)


class _View(NamedTuple):
    """A view as it was read.

    Parameters
    ----------
    key : of its features in the cache; "" if they are not stored.
    features : (C, h, w) float32 if the cache has them.
    pixels : (size, size, 3) uint8 if it has not.
    """

    key: str
    features: np.ndarray | None
    pixels: np.ndarray | None


class _Reader:
    """Reads a view: its features if the cache has them, else its pixels.

    Attributes
    ----------
    maker : what the features depend on besides the file and the crop.
    """

    def __init__(
        self, rule: ViewRule, cache: FeatureCache | None, shape: tuple[int, int, int]
    ) -> None:
        self.rule, self.cache, self.shape = rule, cache, shape
        self.maker: list[Any] = []
        self.digests: dict[Path, tuple[int, int, str]] = {}

    def __call__(
        self, path: Path, _index: int, crop: int, _key: tuple[int, int, int]
    ) -> tuple[_View, list[str]]:
        """Return the view, and the warnings of the picture.

        Raises
        ------
        InputError : the picture cannot be read.
        """
        digest = key = ""
        if self.cache is not None and (digest := self._digest(path)):
            key = hashlib.sha256(json.dumps([digest, crop, self.maker]).encode()).hexdigest()
            features = self.cache.get(key, self.shape)
            if features is not None:
                return _View(key, features.numpy(), None), []
        picture, texts = load_image(path)
        if key and self._digest(path) != digest:
            key = ""  # the file was changed after its digest was computed
        return _View(key, None, view_pixels(picture, self.rule, crop)), texts

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
