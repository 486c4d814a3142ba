"""What the header of a picture file states, and the limits of its numbers."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import InputError

MAX_PIXELS = 2**28  # 16384 x 16384; a damaged or malicious file may state a larger size
MAX_SIDE = 1_000_000  # pixels; libpng's limit, and OpenCV's is 2**20
FREE_PIXELS = 2**22  # up to this size a picture is decoded however few bytes the file has
AGAIN = "fetch or save the picture again"
MAP = "map the values to 0..255 and pass the array"


@dataclass(frozen=True)
class Header:
    """What the header of a picture file states.

    Attributes
    ----------
    kind : "JPEG", "PNG", "BMP", "TIFF", "WebP", "AVIF", "JPEG 2000", "GIF", "PNM", "PAM" or
        "Sun raster".
    height, width : pixels as stored, before the orientation is applied.
    bits : per stored channel, 1 to 16; of an index, where the picture has a palette.
    channels : stored per pixel, an alpha channel included; 1 where the picture has a palette.
    alpha : the picture has an alpha channel, or a colour that is transparent.
    orientation : 1 to 8 as in EXIF; 1 is upright.
    maximum : the largest value of a channel, where PNM or PAM state less than 2**bits - 1 and
        OpenCV does not scale by it; else 0.
    """

    kind: str
    height: int
    width: int
    bits: int
    channels: int
    alpha: bool = False
    orientation: int = 1
    maximum: int = 0


@dataclass(frozen=True)
class File:
    """A picture file that is checked: its bytes, its name in messages, and its format."""

    data: bytes
    name: str
    kind: str

    def uint(self, start: int, size: int, order: str = "big") -> int:
        """Read an unsigned number of ``size`` bytes; ``order`` is "big" or "little".

        Raises
        ------
        InputError : the file ends before the number.
        """
        self.wants(start + size)
        return int.from_bytes(
            self.data[start : start + size], "big" if order == "big" else "little"
        )

    def wants(self, size: int) -> None:
        """Check that the file has at least ``size`` bytes.

        Raises
        ------
        InputError : it has fewer.
        """
        if len(self.data) < size:
            raise InputError(
                f"{self.name} is a truncated {self.kind}: {len(self.data)} bytes, wanted at least "
                f"{size}",
                fix=AGAIN,
            )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Check a size that the file states anywhere, and return (height, width).

        Raises
        ------
        InputError : a side is 0 or larger than MAX_SIDE, or the size has more than MAX_PIXELS
            pixels.
        """
        if height < 1 or width < 1:
            raise self.damaged(f"it states a size of {width} x {height} pixels")
        check_size(height, width, self.name)
        return height, width

    def holds(self, pixels: int, most: float) -> None:
        """Check that the file has the data of ``pixels`` pixels.

        Parameters
        ----------
        most : the most pixels that one byte of this format can decode to. A picture of up to
            FREE_PIXELS pixels is not checked.

        Raises
        ------
        InputError : the file has fewer than ``pixels / most`` bytes.
        """
        if pixels > FREE_PIXELS:
            self.wants(int(pixels / most))

    def damaged(self, why: str) -> InputError:
        """Return the error about a damaged file, to be raised; ``why`` is a main clause."""
        return InputError(f"{self.name} is a damaged {self.kind}: {why}", fix=AGAIN)

    def unsuited(self, values: str) -> InputError:
        """Return the error about values of another type, such as "float32", to be raised."""
        return InputError(
            f"{self.name} holds {values} values, wanted 8 or 16 bits per channel", fix=MAP
        )


def check_size(height: int, width: int, name: str) -> None:
    """Refuse a picture of more than MAX_PIXELS pixels, or with a side above MAX_SIDE; the message
    calls it ``name``.

    Raises
    ------
    InputError : it has more.
    """
    if height * width > MAX_PIXELS:
        raise InputError(
            f"{name} has {width} x {height} pixels, wanted at most {MAX_PIXELS}",
            fix="scale it down or cut it into tiles",
        )
    if max(height, width) > MAX_SIDE:
        raise InputError(
            f"{name} has {width} x {height} pixels, wanted at most {MAX_SIDE} on each side",
            fix="scale it down or cut it into tiles",
        )
