"""The guided filter in PyTorch: the peer of both benchmarks, on the CPU and on a GPU."""

from __future__ import annotations

from typing import Any


class TorchFilter:
    """The guided filter in PyTorch: means by ``avg_pool2d``, an axis after the other, over windows
    that the border cuts; the 3x3 systems by cofactors. Maps are (1, channels, h, w)."""

    def __init__(self, torch: Any, radius: int, eps: float) -> None:
        self.torch, self.radius, self.eps = torch, radius, eps

    def box(self, x: Any) -> Any:
        """Means over windows."""
        pool, r = self.torch.nn.functional.avg_pool2d, self.radius
        x = pool(x, (2 * r + 1, 1), 1, (r, 0), count_include_pad=False)
        return pool(x, (1, 2 * r + 1), 1, (0, r), count_include_pad=False)

    def coefficients(self, guide: Any, values: Any) -> list[Any]:
        """Those of red, green, blue and 1."""
        red, green, blue = guide.split(1, 1)
        mr, mg, mb = self.box(guide).split(1, 1)
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

    def apply(self, coefficients: list[Any], guide: Any) -> Any:
        """Coefficients, lifted where the guide is larger, on the guide."""
        if coefficients[0].shape[2:] != guide.shape[2:]:
            many = self.torch.cat(coefficients, 1)
            coefficients = enlarged(self.torch, many, guide.shape[2:]).chunk(4, 1)
        ar, ag, ab, offset = coefficients
        red, green, blue = guide.split(1, 1)
        return ar * red + ag * green + ab * blue + offset

    def filter(self, guide: Any, values: Any) -> Any:
        """The guided filter; with smaller values, joint upsampling."""
        low, (height, width) = guide, values.shape[2:]
        if guide.shape[2] != height:
            ratio = guide.shape[2] // height, guide.shape[3] // width
            low = self.torch.nn.functional.avg_pool2d(guide, ratio)
        return self.apply(self.coefficients(low, values), guide)


def enlarged(torch: Any, x: Any, size: tuple[int, int]) -> Any:
    """Bilinearly, to (height, width)."""
    return torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
