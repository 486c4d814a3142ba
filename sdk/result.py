"""The result of a segmentation: its arrays, and methods that draw, save and export them."""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from runtime.errors import InputError
from runtime.files import to_path, write_atomic
from runtime.opencv import cv2
from sdk.image import encode_image


@dataclass(frozen=True)
class Segment:
    """One connected region of one label.

    Parameters
    ----------
    id : the region's number in ``Result.regions``, from 1.
    label : the region's label in ``Result.labels``.
    name : the name of this label, or None.
    area : number of pixels.
    bbox : (x, y, width, height) in pixels; (x, y) is the upper left pixel.
    confidence : mean of ``Result.confidence`` over the region, in [0, 1].

    Examples
    --------
    >>> [(s.name, s.area) for s in Segmenter()("street.jpg").segments]
    """

    id: int
    label: int
    name: str | None
    area: int
    bbox: tuple[int, int, int, int]
    confidence: float


@dataclass(frozen=True)
class FrameInfo:
    """The position of a result in its stream.

    Parameters
    ----------
    index : the frame's number in the source, from 0; dropped and unreadable frames count too.
    time : when the frame was read, in seconds since the first frame.
    dropped : number of frames dropped since the stream began.
    start : "cold" if the refinement began with the initial weights, "trained" if it began with the
        trained weights of a bundle, "warm" if it began with the weights of the frame before.
    events : what happened since the frame before, one sentence each: a cut, a new class, an
        unreadable frame.

    Examples
    --------
    >>> for result in Segmenter().stream("clip.mp4"): print(result.frame.index, result.frame.start)
    """

    index: int
    time: float
    dropped: int
    start: str
    events: list[str]


@dataclass(frozen=True, eq=False)
class Result:
    """A segmented picture.

    Parameters
    ----------
    image : (H, W, 3) uint8 RGB.
    labels : (H, W) int32, the label of each pixel.
    names : the name of each label, or None.
    confidence : (H, W) float32 in [0, 1], the largest upsampled score of the pixel, or the largest
        probability of the dense CRF.
    regions : (H, W) int32, the number of each pixel's connected region. Numbers begin at 1 and
        follow the row-major order of the regions' first pixels.
    stats : "objective" and "start" (None without refinement; see :class:`FrameInfo` for the words),
        "steps", "stop_reason", "filter" ("guided_filter", "dense_crf", or None for bilinear
        upsampling), "clusters" (number of labels in ``labels``) and "working_size"
        ([height, width]); with refinement also "losses" and the rest of ``stats`` of
        :class:`runtime.Refinement`. On a GPU also "device_ms": the milliseconds of the stages
        preprocess, prior (if it is a network on the GPU), refine (the steps) and filter (if it is
        not the dense CRF), by the GPU's clock.
    timings : milliseconds of each stage by the wall clock, "unaccounted" (the rest) and "total".
    device : the device that computed the result, as "cpu" or "cuda:0".
    backend : what executed the prior, the refinement and the dense CRF.
    warnings : one sentence each.
    frame : the position in a stream; None for a single picture.

    Raises
    ------
    InputError : an array has another shape or dtype or no pixels, or a region's number is below 1.

    Examples
    --------
    >>> Segmenter()("street.jpg").save("overlay.png")
    """

    image: np.ndarray
    labels: np.ndarray
    names: list[str] | None
    confidence: np.ndarray
    regions: np.ndarray
    stats: dict[str, Any]
    timings: dict[str, float]
    device: str
    backend: str
    warnings: list[str] = field(default_factory=list)
    frame: FrameInfo | None = None

    def __post_init__(self) -> None:
        size = np.shape(self.image)[:2]
        for name, shape, dtype in (
            ("image", (*size, 3), "uint8"),
            ("labels", size, "int32"),
            ("confidence", size, "float32"),
            ("regions", size, "int32"),
        ):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray):
                raise InputError(
                    f"{name} is a {type(array).__name__}, wanted a {dtype} array",
                    fix=f"np.asarray({name}, np.{dtype})",
                )
            if array.shape != shape or array.dtype != dtype:
                raise InputError(
                    f"{name} is {array.shape} {array.dtype}, wanted {shape} {dtype}",
                    fix=f"convert it with {name}.astype(np.{dtype}), and check its shape",
                )
        if self.image.size == 0:
            raise InputError(
                f"image is {self.image.shape}, wanted at least one pixel",
                fix="check the crop or the camera",
            )
        if self.regions.min() < 1:
            raise InputError(
                f"regions starts at {self.regions.min()}, wanted ids from 1",
                fix="regions, _ = runtime.connected_regions(labels)",
            )

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The connected regions, the largest first; regions of equal area are ordered by id.

        Examples
        --------
        >>> largest = result.segments[0]
        """
        begins = np.ones(self.regions.shape, bool)  # every row begins a new run of equal ids
        np.not_equal(self.regions[:, 1:], self.regions[:, :-1], out=begins[:, 1:])
        start, length, order, first = _runs(self.regions.ravel(), begins.ravel())
        sums = np.add.reduceat(self.confidence.ravel(), start, dtype=np.float64)[order]
        start, length = start[order], length[order]
        y, x = np.divmod(start, self.regions.shape[1])
        left, right = np.minimum.reduceat(x, first), np.maximum.reduceat(x + length, first)
        top, bottom = y[first], np.maximum.reduceat(y, first) + 1
        ids, labels = (array.ravel()[start[first]] for array in (self.regions, self.labels))
        area, sums = (np.add.reduceat(array, first) for array in (length, sums))
        columns = (ids, labels, area, left, top, right - left, bottom - top, sums / area)
        largest = np.argsort(-area, kind="stable")
        table = zip(*(column[largest].tolist() for column in columns), strict=True)
        return tuple(
            Segment(id, label, self._name(label), area, (x, y, w, h), confidence)
            for id, label, area, x, y, w, h, confidence in table
        )

    def overlay(self, *, alpha: float = 0.5, boundaries: bool = True) -> np.ndarray:
        """Draw the labels over the picture.

        Parameters
        ----------
        alpha : weight of the label colours in [0, 1]; a label has the same colour in every picture.
        boundaries : draw a white line of one pixel between different labels.

        Returns
        -------
        (H, W, 3) uint8 RGB.

        Raises
        ------
        InputError : ``alpha`` is out of range.

        Examples
        --------
        >>> picture = result.overlay(alpha=0.7)
        """
        if not 0 <= alpha <= 1:
            raise InputError(
                f"alpha is {alpha}, wanted a number in [0, 1]", fix="use 0.5, the default"
            )
        drawn = cv2.applyColorMap(self.labels.astype(np.uint8), _PALETTE)  # label modulo 256
        cv2.addWeighted(self.image, 1 - alpha, drawn, alpha, 0, dst=drawn)
        if boundaries:
            drawn[:, :-1][self.labels[:, :-1] != self.labels[:, 1:]] = 255
            drawn[:-1][self.labels[:-1] != self.labels[1:]] = 255
        return drawn

    def save(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write the overlay to a picture file, whole or not at all.

        If ``path`` is a link, its target is written. Into a FIFO or a character device the bytes of
        the file are written.

        Parameters
        ----------
        path : the file; its suffix chooses the file type.
        options : arguments of :meth:`overlay`.

        Raises
        ------
        InputError : the suffix is unknown, ``alpha`` is out of range, ``path`` is no name, or the
            file cannot be written.

        Examples
        --------
        >>> result.save("overlay.png", boundaries=False)
        """
        write_atomic(path, encode_image(self.overlay(**options), to_path(path).suffix))

    def save_labels(self, path: str | os.PathLike[str]) -> None:
        """Write the labels to a file, whole or not at all.

        Links, FIFOs and devices are treated as in :meth:`save`.

        Parameters
        ----------
        path : a .npy file (int32), or a .png file (grey, 8 bits per pixel, or 16 bits if a label is
            above 255).

        Raises
        ------
        InputError : the suffix is another one, a label does not fit into a .png file, ``path`` is
            no name, or the file cannot be written.

        Examples
        --------
        >>> result.save_labels("labels.png")
        """
        suffix = to_path(path).suffix.lower()
        if suffix == ".npy":
            file = io.BytesIO()
            np.save(file, self.labels)
            return write_atomic(path, file.getvalue())
        if suffix != ".png":
            raise InputError(f"suffix is {suffix!r}, wanted .png or .npy", fix="use .png")
        low, high = self.labels.min(), self.labels.max()
        if low < 0 or high > 65535:
            raise InputError(
                f"labels span {low}..{high}, wanted 0..65535 for .png", fix="save them as .npy"
            )
        write_atomic(path, encode_image(self.labels.astype("u1" if high < 256 else "u2"), suffix))

    def to_json(self, indent: int | None = None) -> str:
        """Return everything except the arrays as strict JSON; NaN and infinity become null.

        Parameters
        ----------
        indent : spaces per level; None puts everything on one line.

        Raises
        ------
        InputError : ``stats`` contains a value that JSON cannot hold.

        Examples
        --------
        >>> Path("result.json").write_text(result.to_json(indent=1))
        """
        height, width = self.labels.shape
        fields = ("names", "stats", "timings", "device", "backend", "warnings")
        document = {
            "size": {"height": height, "width": width},
            "segments": [vars(segment) for segment in self.segments],
            **{name: getattr(self, name) for name in fields},
        }
        if self.frame is not None:
            document["frame"] = vars(self.frame)
        return json.dumps(_plain(document), indent=indent, allow_nan=False)

    def to_coco(self, image_id: int = 1, file_name: str = "") -> dict[str, Any]:
        """Return the regions as a COCO document with uncompressed RLE, which pycocotools reads.

        Parameters
        ----------
        image_id, file_name : the number and the file of the picture in the document.

        Returns
        -------
        A dict with "images", "annotations" (one per region; "category_id" is the label) and
        "categories".

        Examples
        --------
        >>> Path("coco.json").write_text(json.dumps(result.to_coco(1, "street.jpg")))
        """
        height, width = self.regions.shape
        flat = self.regions.ravel(order="F")
        begins = np.ones(flat.size, bool)
        np.not_equal(flat[1:], flat[:-1], out=begins[1:])
        start, length, order, first = _runs(flat, begins)
        start, length = start[order], length[order]
        end = start + length
        # The gap before a run begins at the end of the region's previous run, or at pixel 0.
        gap = start.copy()
        gap[1:] -= end[:-1]
        gap[first] = start[first]
        counts = np.stack([gap, length], axis=1).ravel()
        last = np.append(first[1:], len(start))
        rest = flat.size - end[last - 1]
        spans = zip(*(a.tolist() for a in (flat[start[first]], first, last, rest)), strict=True)
        rle = {id: counts[2 * a : 2 * b].tolist() + [c] * (c > 0) for id, a, b, c in spans}
        annotations = [
            {
                "id": segment.id,
                "image_id": image_id,
                "category_id": segment.label,
                "segmentation": {"size": [height, width], "counts": rle[segment.id]},
                "area": segment.area,
                "bbox": list(segment.bbox),
                "iscrowd": 0,
                "score": segment.confidence,
            }
            for segment in self.segments
        ]
        labels = {*range(len(self.names or ())), *(segment.label for segment in self.segments)}
        return {
            "images": [{"id": image_id, "file_name": file_name, "height": height, "width": width}],
            "annotations": annotations,
            "categories": [
                {"id": label, "name": self._name(label) or f"label {label}"}
                for label in sorted(labels)
            ],
        }

    def _name(self, label: int) -> str | None:
        return self.names[label] if self.names and 0 <= label < len(self.names) else None


def _runs(ids: np.ndarray, begins: np.ndarray) -> tuple[np.ndarray, ...]:
    """Find the runs of equal ids.

    Parameters
    ----------
    ids : (n,) int32.
    begins : (n,) bool, whether a run begins at an element.

    Returns
    -------
    Start and length of each run, the order that groups the runs by id, and for each group the
    position of its first run in that order.
    """
    start = np.flatnonzero(begins)
    length = np.diff(start, append=ids.size)
    order = np.argsort(ids[start], kind="stable")
    grouped = ids[start[order]]
    return start, length, order, np.flatnonzero(np.diff(grouped, prepend=0))


def _plain(value: Any) -> Any:
    """Convert a value to the types of JSON; NaN and infinity become None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise InputError(
        f"{value!r} is a {type(value).__name__}, which JSON cannot hold",
        fix="store numbers, texts, lists, dicts and NumPy arrays in stats",
    )


def _palette() -> np.ndarray:
    """Return a colour for each label modulo 256, (256, 1, 3) uint8 RGB.

    Hue and lightness follow the R2 sequence (the golden ratio of two dimensions), so that the first
    n colours are far apart for every n. Colours whose hues look alike to colour-blind people differ
    in lightness.
    """
    k = np.arange(256)[:, None]
    hue, lightness = (0.31 + 0.7549 * k) % 1, 0.4 + 0.8 * ((0.75 + 0.5698 * k) % 1)
    wave = np.cos(2 * np.pi * (hue + np.array([0, 1 / 3, 2 / 3])))
    colours = lightness * (0.625 + 0.375 * wave)
    return np.round(255 * colours.clip(0, 1)).astype(np.uint8)[:, None]


_PALETTE = _palette()
