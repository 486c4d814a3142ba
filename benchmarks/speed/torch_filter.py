"""The guided filter in PyTorch: a peer of the benchmarks ops (CPU) and gpu."""

from __future__ import annotations

from typing import Any


class TorchFilter:
    """The guided filter with a colour guidance image, in PyTorch.

    Means over windows are computed with ``avg_pool2d``, first along y, then along x; at the border
    of the picture a window is smaller. The 3x3 systems are solved with cofactors. All maps are
    (1, channels, h, w).

    Parameters
    ----------
    torch : the module torch.
    radius : of the windows, in pixels.
    eps : regularisation.
    """

    def __init__(self, torch: Any, radius: int, eps: float) -> None:
        self.torch, self.radius, self.eps = torch, radius, eps

    def box(self, x: Any) -> Any:
        """Return the mean over the window around each pixel."""
        pool, r = self.torch.nn.functional.avg_pool2d, self.radius
        x = pool(x, (2 * r + 1, 1), 1, (r, 0), count_include_pad=False)
        return pool(x, (1, 2 * r + 1), 1, (0, r), count_include_pad=False)

    def coefficients(self, guidance: Any, values: Any) -> list[Any]:
        """Return the filter's linear coefficients of red, green and blue, and its offset."""
        red, green, blue = guidance.split(1, 1)
        mr, mg, mb = self.box(guidance).split(1, 1)
        mean = self.box(values)
        pairs = [red * red, red * green, red * blue, green * green, green * blue, blue * blue]
        rr, rg, rb, gg, gb, bb = self.box(self.torch.cat(pairs, 1)).split(1, 1)
        rr, gg, bb = rr - mr * mr + self.eps, gg - mg * mg + self.eps, bb - mb * mb + self.eps
        rg, rb, gb = rg - mr * mg, rb - mr * mb, gb - mg * mb
        vr, vg, vb = (
            self.box(c * values) - m * mean for c, m in ((red, mr), (green, mg), (blue, mb))
        )
        irr, irg, irb = gg * bb - gb * gb, gb * rb - rg * bb, rg * gb - gg * rb
        igg, igb, ibb = rr * bb - rb * rb, rb * rg - rr * gb, rr * gg - rg * rg
        scale = 1 / (rr * irr + rg * irg + rb * irb)
        ar = (irr * vr + irg * vg + irb * vb) * scale
        ag = (irg * vr + igg * vg + igb * vb) * scale
        ab = (irb * vr + igb * vg + ibb * vb) * scale
        return [self.box(x) for x in (ar, ag, ab, mean - ar * mr - ag * mg - ab * mb)]

    def apply(self, coefficients: list[Any], guidance: Any) -> Any:
        """Apply coefficients to a guidance image; smaller coefficients are enlarged first."""
        if coefficients[0].shape[2:] != guidance.shape[2:]:
            many = self.torch.cat(coefficients, 1)
            coefficients = enlarged(self.torch, many, guidance.shape[2:]).chunk(4, 1)
        ar, ag, ab, offset = coefficients
        red, green, blue = guidance.split(1, 1)
        return ar * red + ag * green + ab * blue + offset

    def filter(self, guidance: Any, values: Any) -> Any:
        """Filter ``values``; with a ``guidance`` larger by whole factors: joint upsampling."""
        low, (height, width) = guidance, values.shape[2:]
        if guidance.shape[2] != height:
            ratio = guidance.shape[2] // height, guidance.shape[3] // width
            low = self.torch.nn.functional.avg_pool2d(guidance, ratio)
        return self.apply(self.coefficients(low, values), guidance)


def enlarged(torch: Any, x: Any, size: tuple[int, int]) -> Any:
    """Resize ``x`` (1, channels, h, w) bilinearly to ``size``, (height, width)."""
    return torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
