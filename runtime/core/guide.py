"""A checked guide: the check runs once, so that no later function repeats it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.checks import check_guide
from runtime.errors import InputError


@dataclass(frozen=True)
class Guide:
    """A guide that has passed :func:`runtime.checks.check_guide`. A function that takes a Guide
    relies on this description and checks only the size.

    Attributes
    ----------
    array : (h, w, C) float32 probabilities, C-contiguous, or (h, w) int32 labels with -1 = unknown;
        on the host, or on a GPU as an array of the CUDA module. The probabilities of a pixel sum to
        1. The sum is 0 at an unknown pixel, and between 0 and 1 at a pixel that resizing made from
        known and unknown ones.
    """

    array: Any

    @classmethod
    def checked(cls, guide: Any, height: int, width: int, *, gpu: bool = False) -> Guide:
        """Return ``guide`` itself if it is a Guide, else check the array and return its Guide.

        Parameters
        ----------
        guide : a Guide, or an array of the kinds that :func:`runtime.refine` takes.
        height, width : the size that the guide must have.
        gpu : whether arrays on a GPU are allowed; their values are not checked.

        Raises
        ------
        InputError : another size. For an array also another dtype, NaN, negative values, labels out
            of -1 to 4095, or an array on a GPU without ``gpu``.
        UnknownGuide : every pixel of the array is unknown.
        """
        if not isinstance(guide, Guide):
            return cls(check_guide(guide, height, width, gpu=gpu))
        if guide.array.shape[:2] != (height, width):
            shape = tuple(guide.array.shape)
            raise InputError(f"guide has shape {shape}; wanted the picture's {height} x {width}")
        return guide
