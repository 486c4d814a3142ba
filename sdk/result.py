"""What a segmentation returns: arrays, and the drawing and saving of them."""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from runtime.errors import InputError
from runtime.files import write_atomic
from sdk.image import encode_image


@dataclass(frozen=True)
class Segment:
    """One connected region of one label."""

    id: int  # 1-based, as in Result.regions
    label: int
    name: str | None
    area: int  # pixels
    bbox: tuple[int, int, int, int]  # x, y, width, height
    confidence: float  # mean, in [0, 1]


@dataclass(frozen=True)
class FrameInfo:
    """A result's place in its stream."""

    index: int  # in the source, from 0; gaps where frames were dropped or left out
    time: float  # seconds since the first frame, when it was captured
    dropped: int  # frames dropped since the stream began
    start: str  # "cold": from the initial weights, or "warm": from the frame's before
    events: list[str]  # what happened, one sentence each: a cut, a new class, a broken frame


@dataclass(frozen=True, eq=False)
class Result:
    """A segmented picture.

    Parameters
    ----------
    image : (H, W, 3) uint8 RGB.
    labels : (H, W) int32.
    names : the class names, by label, or None.
    confidence : (H, W) float32 in [0, 1].
    regions : (H, W) int32, ids of connected regions from 1, in row-major order of first pixel.
    stats : steps, stop_reason, clusters and losses per step; on a GPU device_ms: milliseconds of
        preprocess, prior (a network there), refine (the steps) and filter by its own clock.
    timings : milliseconds by stage.
    device, backend : where it was computed, and by what.
    warnings : sentences for the user.
    frame : of a stream, None for a single picture.
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
                raise InputError(f"{name} is a {type(array).__name__}, wanted a {dtype} array")
            if array.shape != shape or array.dtype != dtype:
                raise InputError(f"{name} is {array.shape} {array.dtype}, wanted {shape} {dtype}")
        if self.image.size == 0:
            raise InputError(f"image is {self.image.shape}, wanted at least one pixel")
        if self.regions.min() < 1:
            raise InputError(f"regions starts at {self.regions.min()}, wanted ids from 1")

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The connected regions, largest first, equal ones by id."""
        begins = np.ones(self.regions.shape, bool)  # a run ends with its row: it has one y
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
        """The picture under its labels.

        Parameters
        ----------
        alpha : weight of the label colours in [0, 1]; a label has the same colour in every picture.
        boundaries : draw a white line, one pixel thin, where labels meet.

        Returns
        -------
        (H, W, 3) uint8 RGB.
        """
        if not 0 <= alpha <= 1:
            raise InputError(f"alpha is {alpha}, wanted a number in [0, 1]")
        drawn = cv2.applyColorMap(self.labels.astype(np.uint8), _PALETTE)  # modulo 256
        cv2.addWeighted(self.image, 1 - alpha, drawn, alpha, 0, dst=drawn)
        if boundaries:
            drawn[:, :-1][self.labels[:, :-1] != self.labels[:, 1:]] = 255
            drawn[:-1][self.labels[:-1] != self.labels[1:]] = 255
        return drawn

    def save(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write ``overlay(**options)``; the suffix of ``path`` chooses the file type."""
        write_atomic(path, encode_image(self.overlay(**options), Path(path).suffix))

    def save_labels(self, path: str | os.PathLike[str]) -> None:
        """Write the labels as .npy (int32) or .png (grey, 16 bits if a label needs more than 8)."""
        suffix = Path(path).suffix.lower()
        if suffix == ".npy":
            file = io.BytesIO()
            np.save(file, self.labels)
            return write_atomic(path, file.getvalue())
        if suffix != ".png":
            raise InputError(f"suffix is {suffix!r}, wanted .png or .npy")
        low, high = self.labels.min(), self.labels.max()
        if low < 0 or high > 65535:
            raise InputError(
                f"labels span {low}..{high}, wanted 0..65535 for .png", fix="save them as .npy"
            )
        write_atomic(path, encode_image(self.labels.astype("u1" if high < 256 else "u2"), suffix))

    def to_json(self, indent: int | None = None) -> str:
        """All but the arrays, as strict JSON: NaN and infinity become null."""
        height, width = self.labels.shape
        kept = ("names", "stats", "timings", "device", "backend", "warnings")
        document = {
            "size": {"height": height, "width": width},
            "segments": [vars(segment) for segment in self.segments],
            **{name: getattr(self, name) for name in kept},
        }
        if self.frame is not None:
            document["frame"] = vars(self.frame)
        return json.dumps(_plain(document), indent=indent, allow_nan=False)

    def to_coco(self, image_id: int = 1, file_name: str = "") -> dict[str, Any]:
        """The regions as COCO annotations with uncompressed RLE, which pycocotools reads."""
        height, width = self.regions.shape
        flat = self.regions.ravel(order="F")
        begins = np.ones(flat.size, bool)
        np.not_equal(flat[1:], flat[:-1], out=begins[1:])
        start, length, order, first = _runs(flat, begins)
        start, length = start[order], length[order]
        end = start + length
        gap = start.copy()  # before each run: from the end of the last one, or from 0
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
    """Runs of equal ids: start and length, the order that groups them by id, each group's first."""
    start = np.flatnonzero(begins)
    length = np.diff(start, append=ids.size)
    order = np.argsort(ids[start], kind="stable")
    grouped = ids[start[order]]
    return start, length, order, np.flatnonzero(np.diff(grouped, prepend=0))


def _plain(value: Any) -> Any:
    """``value`` in the types of JSON."""
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
    raise InputError(f"{value!r} is a {type(value).__name__}, which JSON cannot hold")


def _palette() -> np.ndarray:
    """256 colours, (256, 1, 3) uint8 RGB.

    Hue and lightness follow the R2 sequence (the plane's golden ratio), so that any first n labels
    lie far apart, and apart in lightness too where hues look alike to the colour-blind.
    """
    k = np.arange(256)[:, None]
    hue, lightness = (0.31 + 0.7549 * k) % 1, 0.4 + 0.8 * ((0.75 + 0.5698 * k) % 1)
    wave = np.cos(2 * np.pi * (hue + np.array([0, 1 / 3, 2 / 3])))
    colours = lightness * (0.625 + 0.375 * wave)
    return np.round(255 * colours.clip(0, 1)).astype(np.uint8)[:, None]


_PALETTE = _palette()
