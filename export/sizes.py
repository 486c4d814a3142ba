"""The input sizes that a network of free size is verified at, and the sizes that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from export.frozen import SizeFailed
from runtime.errors import InputError, VerificationFailed
from runtime.prior.preprocess import Preprocess

MULTIPLES = (2, 4, 8, 16, 32, 64)  # of input sizes that networks want


@dataclass(frozen=True)
class FreeSizes:
    """The sizes that a network of free size is verified at.

    Parameters
    ----------
    preprocess : from a picture to the input, with resize "long_side".
    least, largest : (height, width) in pixels of the smallest and the largest input that the user
        named; None without them.

    Example
    -------
    >>> rule = Preprocess(
    ...     mean=(0.5,) * 3, std=(0.25,) * 3, resize="long_side", long_side=512, multiple=32
    ... )
    >>> FreeSizes(rule).all
    [(288, 512), (512, 288)]
    """

    preprocess: Preprocess
    least: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None

    @property
    def all(self) -> list[tuple[int, int]]:
        """(height, width) of each input, from small to large: a landscape and a portrait whose
        long side is the usual one, and the smallest and the largest input. All are sizes that
        ``preprocess`` can return.

        The short side of the landscape is an odd multiple of ``preprocess.multiple``, about two
        thirds of the long side, so that a network that wants larger multiples fails.
        """
        rule = self.preprocess
        short = rule.multiple * max(1, 2 * round(rule.long_side / rule.multiple / 3) - 1)
        found = {rule.size(short, rule.long_side), rule.size(rule.long_side, short)}
        for size in (self.least, self.largest):
            if size is not None:
                found.add(replace(rule, long_side=max(size)).size(*size))
        return sorted(found, key=lambda size: (size[0] * size[1], size))

    def refusal(self, error: SizeFailed, run: Callable[[tuple[int, int]], Any]) -> Exception:
        """The error for a network that fails at one of the sizes.

        Parameters
        ----------
        error : what the network raised.
        run : runs the network, and the one that it was frozen from, on an input of (height, width).

        Returns
        -------
        A VerificationFailed, whose fix names the least of MULTIPLES with which all sizes run.
        """
        multiple = next((n for n in MULTIPLES if self._run_with(n, run)), None)
        if multiple is None:
            fix = "drop --dynamic"
        else:
            fix = (
                f"say that sizes are multiples of {multiple}: size_multiple {multiple} in the "
                f"metadata of the .onnx file, or Preprocess(multiple={multiple}) of your own "
                "model; or drop --dynamic"
            )
        return VerificationFailed(
            f"--dynamic leaves the input size free, but {error.message}", fix=fix
        )

    def _run_with(self, multiple: int, run: Callable[[tuple[int, int]], Any]) -> bool:
        """Whether the network runs at all sizes that are multiples of ``multiple``."""
        if multiple <= self.preprocess.multiple or multiple % self.preprocess.multiple:
            return False
        try:
            other = replace(self, preprocess=replace(self.preprocess, multiple=multiple))
            for size in other.all:
                run(size)
        except (VerificationFailed, InputError):  # InputError: there would be too many pixels
            return False
        return True
