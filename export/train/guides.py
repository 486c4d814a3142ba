"""GuideBatches: the pictures and guides that a refinement network is trained on, step by step."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from export.train.feature_cache import FeatureCache
from export.train.guide_source import GuideSource
from export.train.labels import LabelSet, read_ids
from export.train.reader import Reads
from runtime.checks import UnknownGuide
from runtime.core.classes import frequent_classes, restricted
from runtime.core.config import RefineConfig
from runtime.core.resize import resize
from runtime.errors import InputError
from runtime.files import shown
from runtime.opencv import cv2
from runtime.pictures.load import load_image

_VERSION = 1  # of the guides in the cache
_MOST_READ = 32  # pictures whose size is read before the first step
_LEAST_SHARE = 0.6  # of each side, that a crop has
_GAMMA = 0.3  # largest natural logarithm of the exponent
_CONTRAST = 0.25  # largest natural logarithm of the factor
_BRIGHTNESS = 0.1  # largest summand


class Guided(NamedTuple):
    """A picture and its guide at working size, (h, w).

    Parameters
    ----------
    image : (3, h, w) float32 RGB in [0, 1].
    guide : (K, h, w) float32, the probabilities of the frequent classes, as ``runtime.refine`` uses
        them: each pixel sums to 1, or is all zero where the guide is unknown.
    classes : (K,) int64, the number of each of these classes among all C of the prior, rising.
    labels : (h, w) int64, the number of the true class among all C, whether or not the class is
        frequent in the guide; -1 where it is not known. None if the picture has no labels.
    """

    image: Tensor
    guide: Tensor
    classes: Tensor
    labels: Tensor | None = None


@dataclass(frozen=True)
class PictureLabels:
    """Where the labels of pictures are, and which class of the prior an id in them stands for.

    Parameters
    ----------
    files : the file with the labels of each picture that has labels.
    of_id : the number of the prior's class of each id. Pixels of other ids have no labels.
    """

    files: dict[Path, Path]
    of_id: dict[int, int]

    @classmethod
    def find(
        cls, pictures: Sequence[Path], folder: Path, of_id: Mapping[int, int]
    ) -> PictureLabels:
        """Find the labels of pictures, of which all but one may have none.

        Parameters
        ----------
        pictures : files.
        folder : with STEM.png (one channel of ids) or STEM.npy for the picture STEM.jpg; see
            :mod:`export.train.labels`.
        of_id : as for the class.

        Raises
        ------
        InputError : no picture has labels, or two pictures or two files of labels have one stem.

        Example
        -------
        >>> labels = PictureLabels.find(files, Path("masks"), {7: 0, 8: 1})
        """
        stems = {path.stem for path in folder.glob("*")}
        labelled = [file for file in pictures if file.stem in stems]
        return cls(dict(LabelSet.find(labelled or pictures, folder).pairs), dict(of_id))

    def of(self, file: Path, own: tuple[int, int], size: tuple[int, int]) -> np.ndarray | None:
        """The labels of a picture, or None if it has none.

        Parameters
        ----------
        file : the picture's.
        own : (H, W) of the picture.
        size : (h, w) of the result.

        Returns
        -------
        (h, w) int64, the class of the pixel that contains the centre of each pixel of the result;
        -1 where it is not known.

        Raises
        ------
        InputError : the file cannot be read, or has another size than the picture.
        """
        path = self.files.get(file)
        if path is None:
            return None
        ids = read_ids(path)
        if ids.shape != own:
            raise InputError(
                f"{shown(path)} has {ids.shape[0]} x {ids.shape[1]} pixels, and {shown(file)} "
                f"{own[0]} x {own[1]}",
                fix="resize the labels to the picture's size, to the nearest pixel",
            )
        rows, columns = (
            ((np.arange(n) + 0.5) * (whole / n)).astype(np.int64)
            for n, whole in zip(size, own, strict=True)
        )
        nearest, out = ids[rows[:, None], columns], np.full(size, -1, np.int64)
        for number, of_prior in self.of_id.items():
            out[nearest == number] = of_prior
        return out


class GuideBatches:
    """Pictures with the guides of a frozen network, in batches, at each picture's working size.

    The pictures of a step, and what replaces broken ones, are those of
    :class:`export.train.reader.Reads`. The network runs in this process, on the CPU, one picture
    after the other. Its guides are stored in the cache as float32, and so have the same bits
    whether they are computed or read. They are those of ``sdk.Segmenter``. A picture whose content,
    network or working size changes gets another entry.

    Parameters
    ----------
    files : the pictures.
    source : computes the guides.
    config : its ``working_size`` is that of each picture.
    batch : pictures of a step.
    seed : of the order and of the augmentation, at least 0.
    workers : processes that read pictures ahead of time; with 0 this process does.
    cache : where guides are stored; None computes them each time.
    broken : indices of pictures that are known to be broken, from a run that is resumed.
    augment : "light": :func:`light` changes each picture of :meth:`batches`; or "none".
    labels : of the pictures; None: they have none.
    device : of torch, of the tensors.

    Attributes
    ----------
    reads : the Reads, which has ``files``, ``batch``, ``broken_indices`` and ``most_broken``.
    views : the number of pictures.
    broken : the reason for each broken file that was found up to the last step.

    Raises
    ------
    InputError : there are no files, or a value is out of range.

    Example
    -------
    >>> data = GuideBatches(files, source, RefineConfig(), batch=1, seed=0)
    >>> for (guided,) in data.batches(0, 100): train(guided.image, guided.guide)
    """

    def __init__(
        self,
        files: Sequence[Path],
        source: GuideSource,
        config: RefineConfig,
        *,
        batch: int,
        seed: int,
        workers: int = 0,
        cache: FeatureCache | None = None,
        broken: Sequence[int] = (),
        augment: str = "none",
        labels: PictureLabels | None = None,
        device: str = "cpu",
    ) -> None:
        self.source, self.cache, self.augment = source, cache, augment
        self.device = torch.device(device)
        item = _Item(config, source.classes, _maker(source), cache, labels)
        self.reads: Reads[_Read] = Reads(
            files, item, batch=batch, seed=seed, workers=workers, broken=broken
        )

    @property
    def views(self) -> int:
        """The number of pictures."""
        return self.reads.views

    @property
    def broken(self) -> dict[Path, str]:
        """The reason for each broken file that was found up to the last step."""
        return self.reads.broken

    def batches(self, first: int, last: int) -> Generator[list[Guided], None, None]:
        """Yield the pictures of the steps ``first`` to ``last - 1``.

        Raises
        ------
        InputError : more than 5 % of the files are broken, or the guide of a picture is unknown
            everywhere.
        BundleError, DeviceError : the network fails, or a process that reads pictures was ended.
        """
        for reads in self.reads.batches(first, last):
            yield [self._guided(read, self.augment) for read in reads]

    def of(self, pictures: Sequence[int], *, most_broken: int | None = None) -> list[Guided]:
        """Return the pictures with these numbers, without augmentation.

        Parameters
        ----------
        pictures : their numbers. A broken picture is replaced by the next one.
        most_broken : so many files may be broken; None: all but one, for a few held-out pictures.

        Raises
        ------
        InputError, BundleError, DeviceError : as for :meth:`batches`.

        Example
        -------
        >>> first, second = data.of([0, 1])
        """
        reads = self.reads.of(pictures, most_broken=most_broken)
        return [self._guided(read, "none") for read in reads]

    def _guided(self, read: _Read, augment: str) -> Guided:
        try:
            guide = read.known
            if guide is None:
                assert read.picture is not None
                guide = self.source.guide(read.picture, *read.low.shape[:2])
                if self.cache is not None:
                    self.cache.put(read.key, torch.from_numpy(guide))
            image, labels = read.low.astype(np.float32) / 255, read.labels
            if augment == "light":
                image, guide, labels = light(image, guide, labels, np.random.default_rng(read.seed))
            classes = frequent_classes(guide)
        except UnknownGuide as error:
            raise InputError(
                f"{shown(read.file)}: {error.message}", fix="leave this picture out of --data"
            ) from error
        return Guided(
            self._tensor(image.transpose(2, 0, 1)),
            self._tensor(restricted(guide, classes).transpose(2, 0, 1)),
            self._tensor(classes.astype(np.int64)),
            None if labels is None else self._tensor(labels),
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def input_sizes(files: Sequence[Path], source: GuideSource) -> list[list[int]]:
    """The sizes that pictures have as the input of a prior.

    Parameters
    ----------
    files : of the pictures. At most 32 of them are read, in equal distances. Broken ones are left
        out: the training reports them.
    source : with the prior.

    Returns
    -------
    [height, width] in pixels of each size, the most common one first.

    Example
    -------
    >>> input_sizes(files, source)  # of pictures of 360 x 480 pixels, for a long side of 512
    [[384, 512]]
    """
    found: Counter[tuple[int, int]] = Counter()
    for file in files[:: -(-len(files) // _MOST_READ)]:
        with suppress(InputError):
            found[source.prior.preprocess.size(*load_image(file)[0].shape[:2])] += 1
    return [[*size] for size, _ in found.most_common()]


def light(
    image: np.ndarray,
    guide: np.ndarray,
    labels: np.ndarray | None,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Cut a part out of a picture, its guide and its labels, and change the light of the picture.

    The part has the picture's aspect ratio. Its sides are 0.6 to 1 of the picture's, and its place
    is uniform. The new colours are (colour^g - 1/2) c + 1/2 + b, cut off at 0 and 1, with
    exp(-0.3) <= g <= exp(0.3), exp(-0.25) <= c <= exp(0.25) (both uniform in the logarithm) and
    -0.1 <= b <= 0.1. The network's input is normalised by each picture's own mean and deviation, so
    that c and b change it only where colours are cut off; c changes the weights of the pair loss.

    A part is a picture of its own: the coordinates of the network's input are -1 to 1 in it, as in
    every picture at run time. With the coordinates of the whole picture, their mean and deviation,
    which the batch norms use, would be such as no picture has at run time; and the weights would
    not learn that things can be at other places. The guide is the part of the whole picture's
    guide, which the prior would not return exactly for the part alone.

    Parameters
    ----------
    image : (h, w, 3) float32 RGB in [0, 1].
    guide : (h, w, C) float32.
    labels : (h, w) int64 or None.
    rng : makes the random numbers.

    Returns
    -------
    The part of the image with other colours, of the guide, and of the labels. If the guide is
    unknown in the whole part, the whole picture is the part.

    Example
    -------
    >>> image, guide, labels = light(image, guide, None, np.random.default_rng([0, 1, 2]))
    """
    share = rng.uniform(_LEAST_SHARE, 1)
    height, width = (max(1, round(n * share)) for n in image.shape[:2])
    top = int(rng.integers(image.shape[0] - height + 1))
    left = int(rng.integers(image.shape[1] - width + 1))
    gamma = math.exp(rng.uniform(-_GAMMA, _GAMMA))
    contrast = math.exp(rng.uniform(-_CONTRAST, _CONTRAST))
    brightness = rng.uniform(-_BRIGHTNESS, _BRIGHTNESS)
    part = slice(top, top + height), slice(left, left + width)
    if guide[part].any():
        image, guide = image[part], guide[part]
        labels = None if labels is None else labels[part]
    colours = (image**gamma - 0.5) * contrast + (0.5 + brightness)
    return colours.clip(0, 1), guide, labels


class _Read(NamedTuple):
    """A picture as it was read.

    Parameters
    ----------
    file : the picture's.
    low : (h, w, 3) uint8, the picture at working size.
    picture : (H, W, 3) uint8; None if the cache has its guide.
    known : (h, w, C) float32, the guide in the cache, or None.
    key : of the guide in the cache; "" without a cache.
    labels : (h, w) int64, or None.
    seed : of its random numbers.
    """

    file: Path
    low: np.ndarray
    picture: np.ndarray | None
    known: np.ndarray | None
    key: str
    labels: np.ndarray | None
    seed: tuple[int, int, int]


@dataclass(frozen=True)
class _Item:
    """Reads a picture, in this process or in a worker."""

    config: RefineConfig
    classes: int
    maker: list[Any]
    cache: FeatureCache | None
    labels: PictureLabels | None

    def __call__(
        self, file: Path, index: int, crop: int, seed: tuple[int, int, int]
    ) -> tuple[_Read, list[str]]:
        picture, texts = load_image(file)
        own: tuple[int, int] = picture.shape[:2]
        size = self.config.working_size(*own)
        key, known = "", None
        if self.cache is not None:
            content = [hashlib.sha256(picture.data).hexdigest(), own, size, self.maker]
            key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
            found = self.cache.get(key, (*size, self.classes))
            known = None if found is None else found.numpy()
        labels = None if self.labels is None else self.labels.of(file, own, size)
        low = resize(picture, *size)
        missing = picture if known is None else None
        return _Read(file, low, missing, known, key, labels, seed), texts


def _maker(source: GuideSource) -> list[Any]:
    """All that can change the guide of a picture at a size, its last bits included."""
    return [_VERSION, cv2.__version__, torch.backends.cpu.get_cpu_capability(), source.key]
