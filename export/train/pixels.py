"""PixelBatches: augmented pictures and the place of a zoomed part in each, step by step.

The augmentation is that of Boosting (Sari, Locatello, Favaro, arXiv 2404.03392): a random square,
mirrored in half of the cases, with jittered colours in 80 % and without colour in 20 % of them.

The published square is 320 of 335 pixels of the resized picture's shorter side. Here the square is
320/335 of the picture's shorter side, and is resized once. So its side and its place are whole
pixels of the picture itself, and a long picture is never resized as a whole.

Colours are changed in float32 in [0, 1]. Brightness, contrast and saturation move the picture x
away from another picture y, or towards it: f x + (1 - f) y, cut off at 0 and 1 (Haeberli and
Voorhies, Image Processing by Interpolation and Extrapolation, 1994). y is black for brightness;
for contrast, one grey, which is the mean grey of the picture; for saturation, the grey of each
pixel. Grey is .299 R + .587 G + .114 B (Rec. ITU-R BT.601). The hue is the angle of the colour in
HSV (Smith, Color Gamut Transform Pairs, 1978), and is turned. With jitter (.4, .4, .2, .1), the
factor f is uniform in [1 - .4, 1 + .4], twice, and in [1 - .2, 1 + .2]; the angle is uniform in -.1
to .1 of a full turn; and the four steps are in a random order.

This module imports torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from export.train.reader import Reads
from export.train.views import ViewRule, view_pixels
from runtime.core.resize import resize
from runtime.errors import InputError
from runtime.opencv import cv2
from runtime.pictures.load import load_image

CROP = 320 / 335  # the side of the square, relative to the shorter side of the picture
FLIP, JITTER, GREY = 0.5, 0.8, 0.2  # probabilities
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1


class PixelBatch(NamedTuple):
    """Pictures of one step.

    Parameters
    ----------
    pixels : (N, 3, size, size) float32 RGB in [0, 1], multiples of 1/255, on the device.
    offsets : (N, 2) int64 on the CPU, the top row and the left column of the part of half the
        height and width that is zoomed, 0 to size / 2.
    """

    pixels: Tensor
    offsets: Tensor


class PixelBatches:
    """Pictures of one size in batches, for methods that compute features of changed pictures.

    The order of the pictures, and what replaces broken ones, is that of
    :class:`export.train.reader.Reads`. All random numbers of a picture depend only on the seed, the
    step and the place in the batch, so that the same pictures are made by any number of workers and
    after a run is resumed.

    Parameters
    ----------
    files : the pictures.
    size : side of the squares in pixels, an even number from 16 to 4096.
    batch : pictures of a step.
    seed : of the order and the augmentation, at least 0.
    device : of torch, such as "cpu" or "cuda".
    workers : processes that read pictures ahead of time; with 0 this process does.
    broken : indices of pictures that are known to be broken, from a run that is resumed.
    augment : False: the largest square in the middle, unchanged, and the part in its middle.

    Raises
    ------
    InputError : there are no files, or a number is out of range.

    Example
    -------
    >>> data = PixelBatches(files, 320, batch=8, seed=0, device="cpu")
    >>> for pixels, offsets in data.batches(0, 1000): train(pixels, offsets)
    """

    def __init__(
        self,
        files: Sequence[Path],
        size: int,
        *,
        batch: int,
        seed: int,
        device: str,
        workers: int = 0,
        broken: Sequence[int] = (),
        augment: bool = True,
    ) -> None:
        ViewRule(size=size)
        if size % 2:
            raise InputError(
                f"imgsz is {size}; wanted an even number, because half of the side is zoomed",
                fix=f"--imgsz {size + 1}",
            )
        self.files, self.batch, self.device = list(files), batch, torch.device(device)
        item = functools.partial(read_square, size=size, augment=augment)
        self._reads = Reads(files, item, batch=batch, seed=seed, workers=workers, broken=broken)

    @property
    def views(self) -> int:
        """The number of pictures."""
        return self._reads.views

    @property
    def spread(self) -> np.ndarray:
        """The numbers of all pictures, (views,) int64."""
        return self._reads.spread

    @property
    def broken(self) -> dict[Path, str]:
        """The reason for each broken file."""
        return self._reads.broken

    @property
    def broken_indices(self) -> list[int]:
        """The indices of the broken files, in rising order."""
        return self._reads.broken_indices

    @property
    def most_broken(self) -> int:
        """So many files may be broken: 5 %."""
        return self._reads.most_broken

    def batches(self, first: int, last: int) -> Generator[PixelBatch, None, None]:
        """Yield the pictures of the steps ``first`` to ``last - 1``.

        Raises
        ------
        InputError : more than 5 % of the files are broken; the message lists them.
        DeviceError : a process that reads pictures was ended.
        """
        for squares in self._reads.batches(first, last):
            yield self._stacked(squares)

    def of(self, views: Sequence[int], *, most_broken: int | None = None) -> PixelBatch:
        """Return the pictures with these numbers; this process reads them.

        Parameters
        ----------
        views : their numbers.
        most_broken : so many files may be broken; None: all but one, for a few held-out pictures.

        Raises
        ------
        InputError : more files are broken; the message lists them.
        """
        return self._stacked(self._reads.of(views, most_broken=most_broken))

    def _stacked(self, squares: Sequence[Square]) -> PixelBatch:
        pixels = torch.from_numpy(np.stack([square.pixels for square in squares]))
        colours = pixels.to(self.device).permute(0, 3, 1, 2).to(torch.float32) / 255
        return PixelBatch(colours.contiguous(), torch.tensor([square.offset for square in squares]))


class Square(NamedTuple):
    """One picture as it was read.

    Parameters
    ----------
    pixels : (size, size, 3) uint8 RGB.
    offset : the top row and the left column of the part that is zoomed.
    """

    pixels: np.ndarray
    offset: tuple[int, int]


def read_square(
    file: Path, index: int, crop: int, key: tuple[int, int, int], *, size: int, augment: bool
) -> tuple[Square, list[str]]:
    """Read a picture and make a square of it.

    Parameters
    ----------
    file : the picture.
    index, crop : are not used; :class:`export.train.reader.Reads` passes them.
    key : the seed of the random numbers.
    size, augment : as for :class:`PixelBatches`.

    Returns
    -------
    The square, and the warnings of the picture.

    Raises
    ------
    InputError : the picture cannot be read.

    Example
    -------
    >>> key = (0, 1, 2)
    >>> square, warnings = read_square(Path("a.jpg"), 0, 0, key, size=320, augment=True)
    >>> square.pixels.shape
    (320, 320, 3)
    """
    picture, warnings = load_image(file)
    if not augment:
        middle = view_pixels(picture, ViewRule(size=size), 0)
        return Square(middle, (size // 4, size // 4)), warnings
    draw = np.random.default_rng(key)
    pixels = augmented(picture, size, draw)
    top, left = draw.integers(0, size // 2, 2, endpoint=True).tolist()
    return Square(pixels, (top, left)), warnings


def augmented(picture: np.ndarray, size: int, draw: np.random.Generator) -> np.ndarray:
    """Cut a random square out of a picture, resize it, and change its colours at random; the head
    of this file says how.

    The resizing is that of the runtime (:func:`runtime.core.resize.resize`): pixels are averaged if
    the square does not grow, else interpolated.

    Parameters
    ----------
    picture : (H, W, 3) uint8 RGB, of any size.
    size : side of the result in pixels.
    draw : random numbers.

    Returns
    -------
    (size, size, 3) uint8 RGB, a C-contiguous copy.

    Example
    -------
    >>> augmented(np.zeros((480, 640, 3), np.uint8), 320, np.random.default_rng(0)).shape
    (320, 320, 3)
    """
    sides = picture.shape[:2]
    side = max(1, round(min(sides) * CROP))
    top, left = (int(draw.integers(0, end - side, endpoint=True)) for end in sides)
    square = np.array(resize(picture[top : top + side, left : left + side], size, size), order="C")
    if draw.random() < FLIP:
        square = np.ascontiguousarray(square[:, ::-1])
    jitters, greys = draw.random() < JITTER, draw.random() < GREY
    if not jitters and not greys:
        return square
    colours = square.astype(np.float32) / 255
    if jitters:
        for change, value in _jitter(draw):
            colours = change(colours, value)
    if greys:
        colours[:] = _grey(colours)
    return np.rint(colours * 255).astype(np.uint8)


def _jitter(draw: np.random.Generator) -> list[tuple[Callable[..., np.ndarray], float]]:
    """The four changes of the colours in a random order, each with its random value."""
    changes = [
        (brightness, draw.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS)),
        (contrast, draw.uniform(1 - CONTRAST, 1 + CONTRAST)),
        (saturation, draw.uniform(1 - SATURATION, 1 + SATURATION)),
        (turned_hue, draw.uniform(-HUE, HUE)),
    ]
    return [changes[place] for place in draw.permutation(len(changes))]


def brightness(colours: np.ndarray, factor: float) -> np.ndarray:
    """Multiply colours (H, W, 3) float32 in [0, 1] by ``factor``, at least 0; more than 1 is 1."""
    return _blend(colours, np.float32(0), factor)


def contrast(colours: np.ndarray, factor: float) -> np.ndarray:
    """Move colours (H, W, 3) float32 in [0, 1] away from the mean grey of the picture, to
    ``factor`` times their distance, within [0, 1].

    Example
    -------
    >>> contrast(np.float32([[[0.25] * 3, [0.75] * 3]]), 0.5)[0, :, 0]
    array([0.375, 0.625], dtype=float32)
    """
    return _blend(colours, np.float32(_grey(colours).mean(dtype=np.float64)), factor)


def saturation(colours: np.ndarray, factor: float) -> np.ndarray:
    """Move colours (H, W, 3) float32 in [0, 1] away from the grey of each pixel, to ``factor``
    times their distance, within [0, 1].

    Example
    -------
    >>> saturation(np.float32([[[0.25, 0.5, 0.75]]]), 0)
    array([[[0.45375, 0.45375, 0.45375]]], dtype=float32)
    """
    return _blend(colours, _grey(colours), factor)


def turned_hue(colours: np.ndarray, turn: float) -> np.ndarray:
    """Turn the hue of colours (H, W, 3) float32 in [0, 1]; ``turn`` is a part of a full circle, in
    [-1, 1]. Saturation and value of HSV are unchanged, so grey pixels are unchanged too.

    Example
    -------
    >>> turned_hue(np.float32([[[1, 0, 0]]]), 1 / 3).round(6)  # red becomes green
    array([[[0., 1., 0.]]], dtype=float32)
    """
    hsv = cv2.cvtColor(colours, cv2.COLOR_RGB2HSV)
    hue = hsv[..., 0]  # in [0, 360)
    hue += np.float32(360 * turn)
    hue[hue < 0] += 360
    hue[hue >= 360] -= 360
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _grey(colours: np.ndarray) -> np.ndarray:
    """The grey of each pixel, (H, W, 1) float32."""
    return cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY)[..., None]


def _blend(colours: np.ndarray, other: np.ndarray | np.float32, factor: float) -> np.ndarray:
    """factor x + (1 - factor) y, in [0, 1], float32."""
    blend = np.float32(factor) * colours
    blend += np.float32(1 - factor) * other
    return np.clip(blend, 0, 1, out=blend)
