"""Views: the square parts of pictures that a head is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtime.core.resize import resize
from runtime.errors import InputError

CROPS = ("centre", "five")
VERSION = 1  # of the views: it is raised when view_pixels returns other pixels than before


@dataclass(frozen=True, kw_only=True)
class ViewRule:
    """Which parts of a picture are trained on.

    Parameters
    ----------
    size : side of a view in pixels.
    crops : "centre": one view, the largest square in the middle of the picture; "five": five views,
        the four corners and the middle, each half as high and half as wide as the picture, and
        of each the largest square in its middle (SmooSeg's five-crop).

    Raises
    ------
    InputError : values out of range.

    Example
    -------
    >>> ViewRule(crops="five").count
    5
    """

    size: int = 224
    crops: str = "centre"

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or not 16 <= self.size <= 4096:
            raise InputError(f"imgsz is {self.size!r}; wanted 16 to 4096 pixels", fix="--imgsz 224")
        if self.crops not in CROPS:
            raise InputError(
                f"crops is {self.crops!r}; wanted one of {', '.join(CROPS)}", fix="--crops centre"
            )

    @property
    def count(self) -> int:
        """The number of views of one picture."""
        return 5 if self.crops == "five" else 1


def view_pixels(picture: np.ndarray, rule: ViewRule, index: int) -> np.ndarray:
    """Cut one view out of a picture and resize it.

    Half of an odd side is rounded down, but is at least one pixel. The middle is moved up and left
    by half a pixel where a side that is left over is odd. The resizing is that of the runtime
    (:func:`runtime.core.resize.resize`): pixels are averaged if the view is not larger than its
    part of the picture, else interpolated.

    Parameters
    ----------
    picture : (H, W, 3) uint8 RGB, of any size.
    rule : which views the picture has.
    index : of the view, from 0 to ``rule.count - 1``. The order of the five crops is: above left,
        above right, below left, below right, middle.

    Returns
    -------
    (size, size, 3) uint8, a C-contiguous copy.

    Example
    -------
    >>> view_pixels(np.zeros((480, 640, 3), np.uint8), ViewRule(crops="five"), 4).shape
    (224, 224, 3)
    """
    height, width = picture.shape[:2]
    if rule.crops == "five":
        high, wide = max(1, height // 2), max(1, width // 2)
        top, left = [
            (0, 0),
            (0, width - wide),
            (height - high, 0),
            (height - high, width - wide),
            ((height - high) // 2, (width - wide) // 2),
        ][index]
        picture = picture[top : top + high, left : left + wide]
        height, width = high, wide
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = picture[top : top + side, left : left + side]
    return np.array(resize(square, rule.size, rule.size), order="C")
