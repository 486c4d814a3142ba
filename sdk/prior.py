"""The priors that the SDK accepts. A prior computes a first, coarse segmentation: it is called with
the picture and returns a guide, probabilities (h, w, C) or labels (h, w) with -1 = unknown."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtime.bundle.manifest import MANIFEST
from runtime.bundle.read import Bundle
from runtime.checks import as_numbers, check_count
from runtime.core.guide import Guide
from runtime.engines.named_files import shell_word
from runtime.errors import BundleError, InputError
from runtime.files import here, shown, stat_of
from runtime.prior.kmeans import KMeansPrior
from runtime.prior.masks import MasksPrior, is_mask_folder
from runtime.prior.names import class_names
from runtime.prior.network import NetworkPrior, check_imgsz, two_names
from runtime.prior.reading import check_sums, core_axes, find_kind, fits, standard

_WANTED = "wanted 'kmeans', a bundle folder, an .onnx file, a folder of masks or a callable"
MOST_STRETCH = 1.5  # largest factor between the aspect ratios of a picture and a callable's guide


class Prior(Protocol):
    """The interface that the pipeline needs of a prior. A MasksPrior is called with the path of the
    picture instead of ``low``.

    Attributes
    ----------
    names : the names of the classes, or None.
    backend : what executes the prior, in words, for ``Result.backend``.
    gpu : the number of the GPU on which the prior takes uploaded pictures; None: it takes pictures
        on the host.
    engine : the engine of the prior's network, whose ``warnings`` lists its unusual outputs; None
        without a network.
    """

    names: list[str] | None
    backend: str
    gpu: int | None
    engine: Any

    def __call__(self, picture: Any, low: Any, /) -> np.ndarray | Guide:
        """Return the guide of one picture.

        Parameters
        ----------
        picture : (H, W, 3) uint8 RGB.
        low : (h, w, 3) float32 RGB in [0, 1], the picture at working size. Both arrays are on the
            GPU ``gpu`` if that is a number and the pipeline runs on that GPU, else on the host.

        Returns
        -------
        An array of any size on the host, or a Guide at working size.
        """


class CallablePrior:
    """A prior that calls the user's function, (H, W, 3) uint8 RGB -> guide.

    The guide is (h, w, C) probabilities of at least two classes, or (h, w) labels. One channel in
    [0, 1] is the probability of the foreground, and one channel of other whole numbers is labels,
    whatever its dtype is. Axes of length 1 may stand before and behind the others.

    The function may have two attributes. :func:`runtime.prior.names.class_names` reads ``names``.
    ``unknown`` is a label that means unknown, such as 255 in many data sets; -1 always does.

    Raises
    ------
    InputError : ``names`` does not contain the names of the classes, or ``unknown`` is no whole
        number.

    Example
    -------
    >>> def prior(picture): return masks.pop(0)
    >>> prior.names, prior.unknown = ["road", "sky"], 255
    """

    backend = "python"
    gpu: int | None = None
    engine: Any = None
    unknown_fix = "set the attribute of the callable: prior.unknown = 255"

    def __init__(self, function: Callable[[np.ndarray], np.ndarray]) -> None:
        self.function = function
        names = getattr(function, "names", None)
        if names is not None:
            names = two_names(class_names(names, "the prior's attribute names"))
        self.names: list[str] | None = names
        unknown = getattr(function, "unknown", None)
        if unknown is not None:
            unknown = check_count("the prior's attribute unknown", unknown, -(2**31), 2**31)
        self.unknown: int | None = unknown

    def __call__(self, picture: np.ndarray, low: np.ndarray) -> np.ndarray:
        """Call the function with a copy of the picture, which it may change, and return its result
        as an array; ``low`` is not used.

        Raises
        ------
        InputError : the result is None, has rows of different lengths, looks like (C, h, w), has
            another aspect ratio than the picture, one channel of values that are neither labels nor
            in [0, 1], or several channels that sum to more than 1.
        """
        try:
            found = self.function(picture.copy())
            if found is None:
                raise InputError("the prior returned None", fix="return the guide, an array")
            guide = np.asarray(found)
        except ValueError as error:
            if "inhomogeneous" not in str(error):
                raise
            raise InputError(
                "the prior returned rows of different lengths; wanted an array"
            ) from error
        return _checked(guide, picture.shape[:2], self.unknown)


def _checked(found: np.ndarray, picture: tuple[int, ...], unknown: int | None) -> np.ndarray:
    """Return a callable's result as (h, w, C) probabilities or (h, w) labels. InputError if it is
    neither, or no map of a ``picture`` (H, W). The label ``unknown`` becomes -1."""
    guide = found
    if guide.ndim > 2:  # axes of length 1 in front or behind, as networks have them
        guide = guide.reshape([guide.shape[axis] for axis in core_axes(guide.shape)])
    if guide.ndim == 3 and guide.shape[0] == 1 and not fits(guide.shape[:2], picture):
        guide = guide[0]
    if guide.ndim not in (2, 3) or not guide.size:
        return guide  # the check of the guide says which shapes are allowed
    stretch = 1.0 if fits(guide.shape[:2], picture) else _stretch(guide.shape[:2], picture)
    # As (h, w, C) the guide's aspect ratio is far from the picture's, as (C, h, w) it is near.
    if guide.ndim == 3 and stretch > 2 and _stretch(guide.shape[1:], picture) < 1.2:
        raise InputError(
            f"the prior returned {found.shape}, which looks like (C, h, w); wanted (h, w, C)",
            fix=f"guide{'[0]' * (found.ndim - 3)}.transpose(1, 2, 0)",
        )
    if stretch > MOST_STRETCH:
        raise InputError(
            f"the prior returned {found.shape} for a picture of {picture[0]} x {picture[1]} "
            "pixels; wanted (h, w) or (h, w, C) with the picture's aspect ratio",
            fix="return a map of the whole picture",
        )
    if guide.ndim == 2 or guide.shape[2] == 1:
        guide = guide.reshape(guide.shape[:2])
        if unknown is not None and guide.dtype.kind in "fiu":
            signed = guide if guide.dtype.kind == "f" else guide.astype(np.int64)
            guide = np.where(guide == unknown, -1, signed)
        return _one_channel(guide)
    _check_scores(guide)
    return guide


def _check_scores(guide: np.ndarray) -> None:
    """InputError if (h, w, C) values of a callable are no probabilities of classes that exclude
    each other."""
    if guide.dtype.kind != "f":
        raise InputError(
            f"the prior returned {guide.shape} {guide.dtype}; wanted (h, w, C) float probabilities "
            "or (h, w) labels",
            fix="return probabilities in [0, 1]",
        )
    check_sums(guide, "the prior returned")


def _one_channel(guide: np.ndarray) -> np.ndarray:
    """Return (h, w) integer labels, or (h, w, 2) float32 probabilities of background and
    foreground, of a callable's (h, w) result. Labels are a copy: the callable may use its array
    again for the next frame of a stream."""
    if guide.dtype.kind in "iu":
        return np.array(guide)  # the check of the guide says which labels are allowed
    if guide.dtype.kind not in "fb":
        raise InputError(
            f"the prior returned {guide.shape} {guide.dtype}; wanted labels or probabilities",
            fix="return whole numbers, or floats in [0, 1]",
        )
    try:
        kind = find_kind([guide[None]], name="the prior")
        if kind != "logits":
            values = standard(guide[None], kind, name="the prior")
            return values if values.ndim == 2 else np.ascontiguousarray(values.transpose(1, 2, 0))
    except BundleError as error:
        raise InputError(error.message) from error
    raise InputError(
        f"the prior returned one channel of values from {guide.min():.3g} to {guide.max():.3g}; "
        "wanted labels, or the probability of the foreground in [0, 1]",
        fix="return 1 / (1 + np.exp(-scores))",
    )


def open_bundle(prior: Any) -> Bundle | None:
    """Return the bundle that ``prior`` is, or whose folder it names; None if it is neither, as
    a folder of masks.

    Raises
    ------
    InputError : the operating system returns an error for the path, or the folder is a run of the
        trainer.
    BundleError : the folder is no bundle, or a damaged one.
    """
    if isinstance(prior, Bundle):
        return prior
    if isinstance(prior, (str, os.PathLike)) and os.fspath(prior):
        found = stat_of(prior)
        if found is not None and stat.S_ISDIR(found.st_mode):
            folder = Path(prior)
            if is_mask_folder(folder):
                return None
            run = stat_of(folder / "run.json") is not None
            if run and stat_of(folder / MANIFEST) is None:
                raise InputError(
                    f"prior is {shown(prior)}, a run of the trainer, which is not exported yet",
                    fix=f"export it first: python -m export --model {shell_word(str(folder))}",
                )
            return Bundle.open(prior)
    return None


def make_prior(
    prior: Any,
    *,
    imgsz: Any = None,
    threads: int | None = None,
    device: str = "cpu",
) -> Prior:
    """Make a prior. Bundles are opened elsewhere; see :func:`open_bundle`.

    Parameters
    ----------
    prior : "kmeans", the path of an .onnx file or of a folder of masks, a callable, or a prior,
        which is returned itself.
    imgsz : input size of an .onnx file: (height, width), as a tuple, a list or an array of NumPy,
        or the long side; None: its metadata's.
    threads, device : for the network of an .onnx file.

    Raises
    ------
    InputError : ``prior`` is none of these, the file does not exist, or ``imgsz`` does not fit.
    BundleError : the .onnx file cannot be used.
    MissingBackend, DeviceError : ONNX Runtime is not installed, or the device cannot be used.
    """
    if imgsz is not None:
        imgsz = as_numbers(imgsz)
        check_imgsz(imgsz)
        if not (isinstance(prior, (str, os.PathLike)) and Path(prior).suffix.lower() == ".onnx"):
            raise InputError("imgsz is for .onnx priors only", fix="leave it out")
    if isinstance(prior, str) and prior == "kmeans":
        return KMeansPrior()
    if isinstance(prior, (str, os.PathLike)):
        path = Path(prior)
        if path.suffix.lower() == ".onnx":
            return NetworkPrior.from_onnx(path, imgsz=imgsz, threads=threads, device=device)
        found = stat_of(path)
        if os.fspath(prior) and found is not None and stat.S_ISDIR(found.st_mode):
            return MasksPrior(path)
        missing = "" if found is not None else ", which does not exist"
        raise InputError(
            f"prior is {shown(prior)!r}{missing}; {_WANTED}",
            fix=f"check the name; the current folder is {here()}",
        )
    if isinstance(prior, (KMeansPrior, NetworkPrior, MasksPrior, CallablePrior)):
        return prior
    if callable(prior):
        return CallablePrior(prior)
    raise InputError(f"prior is a {type(prior).__name__}; {_WANTED}")


def _stretch(size: tuple[int, ...], picture: tuple[int, ...]) -> float:
    """Return the factor, at least 1, between the aspect ratios of ``size`` and the picture."""
    ratio = (size[0] * picture[1]) / (size[1] * picture[0])
    return max(ratio, 1 / ratio)
