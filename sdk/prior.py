"""Priors, which make the first, coarse segmentation. A prior is called with the picture and returns
a guide: probabilities (h, w, C), or labels (h, w) with -1 = unknown."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtime.bundle.read import Bundle
from runtime.core.guide import Guide
from runtime.errors import InputError
from runtime.prior.kmeans import KMeansPrior
from runtime.prior.network import NetworkPrior, check_imgsz


class Prior(Protocol):
    """The interface that the pipeline needs of a prior.

    Attributes
    ----------
    names : of the classes, or None.
    backend : what computes it, in words, for the result.
    gpu : the number of the GPU whose uploaded pictures it takes, or None: it takes pictures on the
        host.
    engine : the engine of its network, which notes warnings about its outputs; None without one.
    """

    names: list[str] | None
    backend: str
    gpu: int | None
    engine: Any

    def __call__(self, picture: Any, low: Any) -> np.ndarray | Guide:
        """The guide of one picture.

        ``picture`` is (H, W, 3) uint8 RGB, ``low`` the same at working size, (h, w, 3) float32 in
        [0, 1]; both lie on the GPU ``gpu`` if that is a number and the pipeline runs there, else on
        the host. The result is a guide of any size on the host, or a Guide at working size.
        """


class CallablePrior:
    """The user's function, (H, W, 3) uint8 RGB -> guide; its ``names`` attribute names classes."""

    backend = "python"
    gpu: int | None = None
    engine: Any = None

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
            found = self.function(picture)
            if found is None:
                raise InputError("the prior returned None", fix="return the guide, an array")
            guide = np.asarray(found)
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


def open_bundle(prior: Any) -> Bundle | None:
    """The bundle that ``prior`` is or names; None if it is neither a Bundle nor a folder's name.

    Raises
    ------
    BundleError : the folder is no bundle, or a damaged one.
    """
    if isinstance(prior, Bundle):
        return prior
    if isinstance(prior, (str, os.PathLike)) and str(prior) and Path(prior).is_dir():
        return Bundle.open(prior)
    return None


def make_prior(
    prior: Any,
    *,
    imgsz: int | tuple[int, int] | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> Prior:
    """The prior that ``prior`` is or names: "kmeans", an .onnx file, or a callable.

    Raises
    ------
    InputError : ``prior`` is none of these, or ``imgsz`` does not fit.
    BundleError : the .onnx file cannot be used.
    """
    if imgsz is not None:
        check_imgsz(imgsz)
        if not (isinstance(prior, (str, os.PathLike)) and Path(prior).suffix.lower() == ".onnx"):
            raise InputError("imgsz is for .onnx priors only", fix="leave it out")
    if isinstance(prior, str) and prior == "kmeans":
        return KMeansPrior()
    if isinstance(prior, (str, os.PathLike)):
        path = Path(prior)
        if path.suffix.lower() == ".onnx":
            return NetworkPrior.from_onnx(path, imgsz=imgsz, threads=threads, device=device)
        missing = "" if path.exists() else ", which does not exist"
        raise InputError(
            f"prior is {str(prior)!r}{missing}; wanted 'kmeans', a bundle folder, an .onnx file or "
            "a callable",
            fix=f"check the name; the current folder is {Path.cwd()}",
        )
    if isinstance(prior, (KMeansPrior, NetworkPrior, CallablePrior)):
        return prior
    if callable(prior):
        return CallablePrior(prior)
    raise InputError(
        f"prior is a {type(prior).__name__}; wanted 'kmeans', an .onnx file, a callable"
    )


def _stretch(size: tuple[int, ...], height: int, width: int) -> float:
    """The ratio, at least 1, of the aspect of ``size`` to that of the picture; 1 is equal."""
    ratio = (size[0] * width) / (size[1] * height)
    return max(ratio, 1 / ratio)
