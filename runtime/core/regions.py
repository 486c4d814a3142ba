"""Connected regions of a label map."""

from __future__ import annotations

import numpy as np

from runtime.checks import check_count
from runtime.device.choose import module_of
from runtime.errors import InputError


def connected_regions(labels: np.ndarray, *, min_area: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Find the 4-connected regions of equal label, and merge small ones into a neighbour.

    Parameters
    ----------
    labels : (H, W) integers.
    min_area : a region of fewer pixels is merged into the neighbour with the longest common border,
        and takes its label; the smallest region is merged first. 0 merges nothing.

    Returns
    -------
    regions (H, W) int32, numbered 1, 2, ... in the order of their first pixel; labels (H, W) int32
    after merging.

    Raises
    ------
    InputError : another shape, no pixels, no integers, integers that need more than 32 bits, or
        ``min_area`` is no whole number of at least 0.

    Example
    -------
    >>> regions, labels = runtime.connected_regions(labels, min_area=50)
    """
    array = np.asarray(labels)
    if array.ndim != 2 or array.dtype.kind not in "iu" or array.size == 0:
        raise InputError(f"labels is {array.shape} {array.dtype}; wanted (H, W) integers")
    if array.min() < -(2**31) or array.max() >= 2**31:
        raise InputError(f"labels span {array.min()} to {array.max()}; wanted 32-bit integers")
    min_area = check_count("min_area", min_area, 0, 2**62)
    regions, merged, _ = module_of("cpu").connected_regions(
        np.ascontiguousarray(array, np.int32), min_area
    )
    return regions, merged
