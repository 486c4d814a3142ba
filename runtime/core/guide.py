"""The guide as a checked value: it is checked where it enters, and never again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.checks import check_guide
from runtime.errors import InputError


@dataclass(frozen=True)
class Guide:
    """A guide that has passed :func:`runtime.checks.check_guide`. A function that takes a Guide
    relies on what is written here and checks nothing but the size.

    Attributes
    ----------
    array : (h, w, C) float32 probabilities, C-contiguous: the values of a pixel sum to 1, to less
        where the guide was resized and knows only a part of the pixel, and to 0 where the guide
        knows nothing. Or (h, w) int32 labels, -1 = unknown. The array lies on the host, or on a GPU
        as an array of the CUDA module.
    """

    array: Any

    @classmethod
    def checked(cls, guide: Any, height: int, width: int, *, gpu: bool = False) -> Guide:
        """``guide`` itself if it is a Guide, else the Guide of a checked array.

        Parameters
        ----------
        guide : a Guide, or an array of the kinds that :func:`runtime.refine` takes.
        height, width : the size that the guide must have.
        gpu : whether arrays on a GPU are allowed; their values are not checked.

        Raises
        ------
        InputError : another size or dtype, NaN, negative values, or a guide that knows nothing.
        """
        if not isinstance(guide, Guide):
            return cls(check_guide(guide, height, width, gpu=gpu))
        if guide.array.shape[:2] != (height, width):
            shape = tuple(guide.array.shape)
            raise InputError(f"guide has shape {shape}; wanted the picture's {height} x {width}")
        return guide
