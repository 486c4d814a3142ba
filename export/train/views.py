"""Views: the square parts of pictures that a head is trained on."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import InputError

CROPS = ("centre", "five")


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
