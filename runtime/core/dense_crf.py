"""The dense CRF: checks the arguments, then calls the core."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from runtime import _core
from runtime.checks import (
    as_number,
    check_bytes,
    check_count,
    check_finite,
    check_host,
    check_out,
    check_planes,
    check_positive,
    is_number,
    shown_value,
)
from runtime.device.choose import isa, thread_count
from runtime.errors import InputError


def dense_crf(
    image: np.ndarray,
    probabilities: np.ndarray,
    *,
    steps: int = 10,
    bilateral_weight: float = 4.0,
    bilateral_sxy: float = 67.0,
    bilateral_srgb: float = 3.0,
    gaussian_weight: float = 3.0,
    gaussian_sxy: float = 1.0,
    floor: float = 1e-5,
    compatibility: np.ndarray | None = None,
    out: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Make neighbouring pixels, and distant ones of a similar colour, prefer the same class.

    This is mean field in a fully connected CRF (Krähenbühl, Koltun, NeurIPS 2011). With the unary
    energy U = -log(probabilities), Q starts as softmax(-U), and each step computes

        Q = softmax(-U - compatibility * sum over both kernels of weight * N K N Q)

    where K are the values of a Gaussian for each pair of pixels, and N = diag(K 1)^(-1/2)
    normalises it. K Q is computed on a permutohedral lattice (Adams, Baek, Davis, 2010), so the
    time grows linearly with the pixels. docs/crf.md says how exact this is.

    Parameters
    ----------
    image : (H, W, 3) uint8 RGB.
    probabilities : (H, W, K) float32, at least 0, the classes in the last axis.
    steps : of mean field, 0 to 1000; 0 returns the probabilities, with ``floor`` and normalised.
    bilateral_weight, bilateral_sxy, bilateral_srgb : the kernel of distance and colour:
        weight * exp(-|distance|^2 / (2 sxy^2) - |difference of colours|^2 / (2 srgb^2)), distances
        in pixels, colours from 0 to 255. A weight of 0 switches the kernel off. The defaults, and
        those below, are the values that STEGO and SmooSeg use.
    gaussian_weight, gaussian_sxy : the kernel of distance alone.
    floor : the smallest probability; smaller ones are raised to it. At least 1e-30, at most 0.5.
    compatibility : (K, K), from -10^6 to 10^6; entry [k, j] is the penalty of class k beside class
        j, which the weights multiply. A negative penalty is a reward, and the matrix need not be
        symmetric. None: Potts' model, which is 1, and 0 for equal classes.
    out : an array for the result, float32, C-contiguous; it may be ``probabilities``.
    threads : most threads; all processors when None. They do not change the result.

    Returns
    -------
    (H, W, K) float32, the distribution of each pixel; ``out`` if that is not None (of a memory
    map, a plain array of the same memory).

    Raises
    ------
    InputError : another shape or dtype, NaN, a negative probability, an option out of range, or
        an ``out`` that cannot be used.
    DeviceError : SEG_ISA is wrong.

    Example
    -------
    >>> smooth = runtime.dense_crf(picture, probabilities, bilateral_srgb=5.0)
    >>> labels = smooth.argmax(-1)
    """
    image = np.ascontiguousarray(check_bytes("image", image))
    if np.ndim(probabilities) == 2:
        raise InputError(
            f"probabilities has shape {np.shape(probabilities)}; wanted (H, W, K)",
            fix="of labels, make probabilities: np.eye(K)[labels] * 0.9 + 0.1 / K; of one class, "
            "np.stack([1 - p, p], -1)",
        )
    if image.shape[0] * image.shape[1] > 2**28:
        raise InputError(f"image is {image.shape[:2]}; wanted at most 2^28 pixels")
    probabilities = check_planes("probabilities", probabilities)
    if probabilities.shape[:2] != image.shape[:2]:
        raise InputError(
            f"probabilities are {probabilities.shape[:2]}; wanted the size of the image, "
            f"{image.shape[:2]}"
        )
    if probabilities.max() > 1e30:
        raise InputError(
            f"probabilities has values up to {probabilities.max():g}; wanted at most 1"
        )
    if probabilities.min() < 0:
        raise InputError(
            f"probabilities has {int((probabilities < 0).sum())} negative values; wanted "
            "probabilities, at least 0",
            fix="take the soft-max of scores first",
        )
    steps = check_count("steps", steps, 0, 1000)
    sizes = [
        check_positive(name, value)
        for name, value in (
            ("bilateral_sxy", bilateral_sxy),
            ("bilateral_srgb", bilateral_srgb),
            ("gaussian_sxy", gaussian_sxy),
        )
    ]
    weights = [
        check_weight("bilateral_weight", bilateral_weight),
        check_weight("gaussian_weight", gaussian_weight),
    ]
    if not is_number(floor, 1e-30, 0.5):
        raise InputError(f"floor is {shown_value(floor)}; wanted 1e-30 to 0.5")
    classes = probabilities.shape[2]
    if compatibility is not None:
        compatibility = check_host("compatibility", compatibility)
        if compatibility.shape != (classes, classes) or compatibility.dtype.kind not in "fiub":
            raise InputError(
                f"compatibility is {compatibility.shape} {compatibility.dtype}; "
                f"wanted {(classes, classes)} numbers"
            )
        compatibility = np.ascontiguousarray(compatibility, np.float32)
        check_finite("compatibility", compatibility)
        if np.abs(compatibility).max() > 1e6:
            raise InputError(
                f"compatibility has values up to {np.abs(compatibility).max():g}; wanted numbers "
                "from -1000000 to 1000000"
            )
    if out is not None:
        out = check_out(out, probabilities.shape, image=image)
    threads = thread_count(threads)
    isa()  # raises if SEG_ISA is wrong
    sxy, srgb, gaussian = sizes
    if min(sizes) < 1e-30:  # zero in float32
        raise too_small("bilateral_sxy, bilateral_srgb or gaussian_sxy", sizes)
    options = (
        *(steps, weights[0], sxy, srgb, weights[1], gaussian),
        *(float(floor), compatibility, threads),
    )
    try:
        made: np.ndarray = _core.dense_crf(image, probabilities, *options, out=out)
    except OverflowError as error:
        raise too_small(str(error), sizes) from error
    return made


def too_small(names: str, sizes: list[float]) -> InputError:
    """Return the error that one of the options ``names`` is too small for a lattice."""
    return InputError(
        f"{names} is too small for a picture of this size: {', '.join(f'{n:g}' for n in sizes)}",
        fix="use at least 1",
    )


def check_weight(name: str, value: Any) -> float:
    """Return ``value``, the weight of a kernel, as a float.

    Raises
    ------
    InputError : ``value`` is no finite number of at least 0.
    """
    number = as_number(value)
    if number is None or not 0 <= number <= 1e6 or not math.isfinite(number):
        raise InputError(f"{name} is {shown_value(value)}; wanted a number from 0 to 1000000")
    return float(number)
