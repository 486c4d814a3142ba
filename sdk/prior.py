"""Priors: what gives a first, coarse segmentation. A prior is called with the picture and returns a
guide: probabilities (h, w, C), or labels (h, w) with -1 = unknown."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from runtime import OnnxEngine, load_engine
from runtime.checks import check_count, check_positive
from runtime.errors import BundleError, InputError
from runtime.resize import resize

KMEANS_SAMPLES = 20_000
MAX_SIDE = 2**15  # of a network's input


class Prior(Protocol):
    """What Segmenter needs: names (by class, or None) and backend are for the result."""

    names: list[str] | None
    backend: str

    def __call__(self, picture: np.ndarray, low: np.ndarray) -> np.ndarray:
        """Guide of any size for the (H, W, 3) uint8 RGB ``picture``; ``low`` is the same at working
        size, (h, w, 3) float32 in [0, 1]."""


class KMeansPrior:
    """K-means on CIE Lab colours, softened; no model, deterministic.

    Distances to the cluster centres become probabilities, exp(-d / temperature) normalised.

    Parameters
    ----------
    clusters : 1 to 256.
    temperature : in Lab units (L from 0 to 100).
    """

    names: list[str] | None = None
    backend = "opencv-kmeans"

    def __init__(self, clusters: int = 5, temperature: float = 12.0) -> None:
        self.clusters = check_count("clusters", clusters, 1, 256)
        self.temperature = check_positive("temperature", temperature)

    def __call__(self, picture: np.ndarray, low: np.ndarray) -> np.ndarray:
        """(h, w, clusters) float32; fewer clusters when the picture has fewer colours."""
        lab = cv2.cvtColor(low, cv2.COLOR_RGB2Lab).reshape(-1, 3)
        picked = np.linspace(0, len(lab) - 1, min(KMEANS_SAMPLES, len(lab))).astype(int)
        samples = lab[picked]
        distinct = len(np.unique(samples, axis=0))
        cv2.setRNGSeed(0)
        criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 30, 0.1)
        count, no_labels = min(self.clusters, distinct), np.zeros(0, np.int32)
        _, _, found = cv2.kmeans(samples, count, no_labels, criteria, 3, cv2.KMEANS_PP_CENTERS)
        centres = np.asarray(found)
        centres = centres[np.argsort(centres[:, 0], kind="stable")]  # dark to light
        square = np.maximum(((lab[:, None] - centres[None]) ** 2).sum(-1), 0)
        score = -np.sqrt(square) / self.temperature
        score = np.exp(score - score.max(1, keepdims=True))
        return (score / score.sum(1, keepdims=True)).reshape(*low.shape[:2], -1)


class OnnxPrior:
    """An ONNX segmentation network whose metadata_props say how to feed it.

    The input is (1, 3, h, w) float32, the output (1, C, h', w') scores before or after soft-max, or
    (1, h', w') integer labels. Metadata, JSON where not plain: ``mean`` and ``std`` (three numbers,
    for values in [0, 1]; required), ``classes`` (list of names), ``input_size`` ({"width",
    "height"}: its long side is what the picture is resized to), ``size_multiple``,
    ``minimum_size``, ``input_layout`` (contains RGB or BGR), ``output`` (starts with
    "probabilities" when the soft-max is in the graph).

    Parameters
    ----------
    path : .onnx file.
    imgsz : input size instead of the metadata's: (height, width), or the long side.

    Raises
    ------
    BundleError : no ONNX, or inputs, outputs or metadata that do not fit.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        imgsz: int | tuple[int, int] | None = None,
        threads: int | None = None,
    ) -> None:
        self.engine: OnnxEngine = load_engine(path, threads=threads)
        self.backend = "onnxruntime-cpu"
        self.name = Path(path).name
        self.imgsz = imgsz
        self._check_ports()
        meta = self.engine.metadata
        self.names: list[str] | None = self._names()
        self.mean = self._triple("mean")
        self.std = self._triple("std")
        self.long_side = self._long_side()
        self.multiple = self._side("size_multiple", 1)
        self.minimum = self._side("minimum_size", 1)
        fixed = self._fixed_size()
        if imgsz is not None and fixed is not None and imgsz not in (fixed, max(fixed)):
            raise InputError(f"imgsz is {imgsz}, but {self.name} has a fixed input of {fixed}")
        if isinstance(imgsz, tuple) and fixed is None:
            if any(n % self.multiple or n < self.minimum for n in imgsz):
                raise InputError(
                    f"imgsz is {imgsz}; {self.name} wants multiples of {self.multiple}, "
                    f"at least {self.minimum}"
                )
        self.bgr = "BGR" in meta.get("input_layout", "RGB")
        self.has_softmax = meta.get("output", "").startswith("probabilities")

    def __call__(self, picture: np.ndarray, low: np.ndarray) -> np.ndarray:
        """(h', w', C) float32 probabilities, or (h', w') int32 labels."""
        size = self.input_size(*picture.shape[:2])
        x = resize(picture, *size).astype(np.float32) / 255
        if self.bgr:
            x = x[..., ::-1]
        x = (x - self.mean) / self.std
        (out, *_) = self.engine(np.ascontiguousarray(x.transpose(2, 0, 1)[None]))
        labels = out.dtype.kind in "iu" and out.ndim >= 2
        if labels and out.size == math.prod(out.shape[-2:]):
            return out.reshape(out.shape[-2:]).astype(np.int32)
        if out.dtype.kind != "f" or out.ndim != 4 or out.shape[0] != 1:
            raise BundleError(
                f"{self.name} gave {out.shape}; wanted (1, C, h, w) scores or (1, h, w) labels"
            )
        if not np.isfinite(out).all():
            raise BundleError(f"{self.name} gave NaN or infinite scores for this picture")
        if self.names is not None and len(self.names) != out.shape[1]:
            raise BundleError(
                f"{self.name} gave {out.shape[1]} classes, but names {len(self.names)}"
            )
        scores = out[0].astype(np.float32)
        if not self.has_softmax:
            scores = np.exp(scores - scores.max(0))
        elif scores.min() < 0 or scores.sum(0).min() <= 0:
            raise BundleError(f"{self.name} calls its output probabilities, but they are none")
        return np.ascontiguousarray((scores / scores.sum(0)).transpose(1, 2, 0))

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """The network's input size for a picture: its aspect, rounded to the size multiple."""
        fixed = self._fixed_size()
        if fixed is not None:
            return fixed
        if isinstance(self.imgsz, tuple):
            return self.imgsz
        long_side = self.imgsz or self.long_side
        scale = long_side / max(height, width)
        least = math.ceil(self.minimum / self.multiple) * self.multiple
        rounded = [max(least, round(n * scale / self.multiple) * self.multiple)
                   for n in (height, width)]  # fmt: skip
        return rounded[0], rounded[1]

    def _fixed_size(self) -> tuple[int, int] | None:
        height, width = self.engine.inputs[0].shape[2:]
        if isinstance(height, int) and isinstance(width, int):
            return height, width
        return None

    def _names(self) -> list[str] | None:
        names = self._json("classes", None)
        texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if names is not None and not texts:
            raise BundleError(
                f"{self.name}: metadata 'classes' is {names!r}; wanted a list of names"
            )
        return names

    def _long_side(self) -> int:
        size = self._json("input_size", {"width": 512, "height": 512})
        if not isinstance(size, dict) or not size or set(size) - {"width", "height"}:
            size = {"?": None}
        if not _are_sides([*size.values()]):
            raise BundleError(
                f"{self.name}: metadata 'input_size' is {self.engine.metadata['input_size']}; "
                f'wanted {{"width": W, "height": H}}, 1 to {MAX_SIDE}'
            )
        return max(size.values())

    def _side(self, key: str, default: int) -> int:
        value = self._json(key, default)
        if not _are_sides([value]):
            raise BundleError(
                f"{self.name}: metadata {key!r} is {value!r}; wanted a number, 1 to {MAX_SIDE}"
            )
        return value

    def _check_ports(self) -> None:
        inputs = self.engine.inputs
        came = ", ".join(f"{p.name} {p.shape} {p.dtype}" for p in inputs)
        shape = inputs[0].shape if inputs else ()
        fits = len(inputs) == 1 and len(shape) == 4 and inputs[0].dtype == "tensor(float)"
        if not fits or any(
            isinstance(n, int) and n != wanted for n, wanted in zip(shape[:2], (1, 3), strict=True)
        ):
            raise BundleError(f"{self.name} wants inputs {came}; wanted one (1, 3, h, w) float32")

    def _json(self, key: str, default: Any) -> Any:
        text = self.engine.metadata.get(key)
        if text is None:
            return default
        try:
            return json.loads(text)
        except ValueError as error:
            raise BundleError(f"{self.name}: metadata {key!r} is no JSON: {text!r}") from error

    def _triple(self, key: str) -> np.ndarray:
        value = self._json(key, None)
        if value is None:
            raise BundleError(
                f"{self.name} does not say how to normalise pictures: metadata {key!r} is missing",
                fix="add it with onnx.helper.set_model_props(model, {'mean': '[0.485, ...]', ...})",
            )
        try:
            array = np.asarray(value, np.float32)
        except (TypeError, ValueError):
            array = np.zeros(0, np.float32)
        if (
            array.shape != (3,)
            or not np.isfinite(array).all()
            or (key == "std" and array.min() <= 0)
        ):
            raise BundleError(f"{self.name}: metadata {key!r} is {value}; wanted three numbers")
        if np.abs(array).max() > 10:
            raise BundleError(
                f"{self.name}: metadata {key!r} is {value}; wanted numbers for values in [0, 1]",
                fix="divide them by 255",
            )
        return array


class CallablePrior:
    """The user's function, (H, W, 3) uint8 RGB -> guide; its ``names`` attribute names classes."""

    backend = "python"

    def __init__(self, function: Callable[[np.ndarray], np.ndarray]) -> None:
        self.function = function
        names = getattr(function, "names", None)
        if names is not None:
            try:
                names = None if isinstance(names, str) else [str(name) for name in names]
            except TypeError:
                names = None
            if names is None:
                raise InputError(
                    "the prior's names are no list of names", fix="e.g. ['road', 'sky']"
                )
        self.names: list[str] | None = names

    def __call__(self, picture: np.ndarray, low: np.ndarray) -> np.ndarray:
        try:
            guide = np.asarray(self.function(picture))
        except ValueError as error:
            if "inhomogeneous" not in str(error):
                raise
            raise InputError("the prior gave rows of different lengths; wanted an array") from error
        height, width = picture.shape[:2]
        if guide.ndim == 3 and guide.size and _stretch(guide.shape[:2], height, width) > 2:
            if _stretch(guide.shape[1:], height, width) < 1.2:
                raise InputError(
                    f"the prior gave {guide.shape}, which looks like (C, h, w); wanted (h, w, C)",
                    fix="guide.transpose(1, 2, 0)",
                )
        return guide


def make_prior(
    prior: Any, *, imgsz: int | tuple[int, int] | None = None, threads: int | None = None
) -> Prior:
    """The prior that ``prior`` names: "kmeans", an .onnx file, or a callable."""
    if imgsz is not None:
        sides = list(imgsz) if isinstance(imgsz, tuple) else [imgsz]
        if (isinstance(imgsz, tuple) and len(sides) != 2) or not _are_sides(sides):
            raise InputError(f"imgsz is {imgsz!r}; wanted (height, width) or the long side")
        if not (isinstance(prior, (str, os.PathLike)) and Path(prior).suffix.lower() == ".onnx"):
            raise InputError("imgsz is for .onnx priors only", fix="leave it out")
    if isinstance(prior, str) and prior == "kmeans":
        return KMeansPrior()
    if isinstance(prior, (str, os.PathLike)):
        path = Path(prior)
        if path.suffix.lower() == ".onnx":
            return OnnxPrior(path, imgsz=imgsz, threads=threads)
        if path.is_dir():
            raise BundleError(f"{path} is a folder; this version reads .onnx files, not bundles")
        raise InputError(
            f"prior is {str(prior)!r}; wanted 'kmeans', an .onnx file or a callable",
            fix="use Segmenter('kmeans')",
        )
    if isinstance(prior, (KMeansPrior, OnnxPrior, CallablePrior)):
        return prior
    if callable(prior):
        return CallablePrior(prior)
    raise InputError(
        f"prior is a {type(prior).__name__}; wanted 'kmeans', an .onnx file, a callable"
    )


def _stretch(size: tuple[int, ...], height: int, width: int) -> float:
    """How far the aspect of ``size`` is from that of the picture; 1 is equal."""
    ratio = (size[0] * width) / (size[1] * height)
    return max(ratio, 1 / ratio)


def _are_sides(values: list[Any]) -> bool:
    """Whether all are whole numbers that a side in pixels can have."""
    return all(
        isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= MAX_SIDE for n in values
    )


def as_probabilities(guide: np.ndarray, height: int, width: int) -> np.ndarray:
    """A guide at (height, width): probabilities are averaged or interpolated; labels become the
    share of each class (unknown pixels leave zeros)."""
    if guide.ndim == 3:
        return resize(np.ascontiguousarray(guide, np.float32), height, width)
    if guide.shape == (height, width):
        return np.ascontiguousarray(guide, np.int32)
    out = np.zeros((height, width, int(guide.max()) + 1), np.float32)
    for k in np.unique(guide[guide >= 0]):  # one at a time: guides may have the picture's size
        out[..., k] = resize((guide == k).astype(np.float32)[..., None], height, width)[..., 0]
    return out
