"""The settings of a user: frozen records that check their values when they are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from runtime.checks import check_count, check_positive
from runtime.core.options import RefineOptions
from runtime.errors import InputError

# Named settings, as (options, working scale).
PRESETS: dict[str, dict[str, Any]] = {
    "residual": {},
    "fast": {"scale": 0.25},
    "dynaguide": {"objective": "dynaguide"},
    # The public code's behaviour, quirks included: three blocks, conv1 twice, modulo mapping,
    # model.eval() statistics for the final map.
    "dynaguide_code": {
        "objective": "dynaguide",
        "blocks": 3,
        "skip": "shared",
        "mapping": "index_modulo",
        "final_bn": "running",
        "seed": 42,
    },
    "dynaseg_fsf": {"objective": "dynaseg", "weighting": "fsf", "beta": 15.0},
    "dynaseg_scf": {"objective": "dynaseg", "weighting": "scf", "mu": 50.0},
}


@dataclass(frozen=True, kw_only=True)
class RefineConfig(RefineOptions):
    """How a picture is refined: :class:`runtime.RefineOptions`, and at what size.

    Parameters
    ----------
    scale : working size over picture size, in (0, 1]. Half the picture is the default: nothing was
        gained above it; a quarter ("fast") costs a quarter of that and loses little.
    max_pixels : the working size is reduced further to have at most this many pixels, which bounds
        memory and time for large pictures.

    The options of :class:`runtime.RefineOptions` are fields as well.

    Raises
    ------
    InputError : a value out of range, or an option that the objective does not use.

    Example
    -------
    >>> RefineConfig(steps=20, lam=6.0)
    """

    scale: float = 0.5
    max_pixels: int = 2**18

    def __post_init__(self) -> None:
        super().__post_init__()
        if check_positive("scale", self.scale) > 1:
            raise InputError(f"scale is {self.scale}; wanted a number above 0, at most 1")
        check_count("max_pixels", self.max_pixels, 1, 2**28)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> RefineConfig:
        """A named setting with ``changes``: residual, fast, dynaguide, dynaguide_code, dynaseg_fsf
        or dynaseg_scf.

        Raises
        ------
        InputError : an unknown name, or a change out of range.

        Example
        -------
        >>> RefineConfig.preset("dynaguide", steps=50)
        """
        if name not in PRESETS:
            raise InputError(f"refine is {name!r}; wanted one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    def changes(self) -> dict[str, list[Any]]:
        """Settings that are not their objective's own: name -> [value, default]."""
        default = asdict(RefineConfig(objective=self.objective))
        return {k: [v, default[k]] for k, v in asdict(self).items() if v != default[k]}

    def options(self) -> dict[str, Any]:
        """The part that :func:`runtime.refine` takes."""
        own = {f.name for f in fields(RefineOptions)}
        return {name: value for name, value in asdict(self).items() if name in own}

    def working_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the picture that is refined, each at least 1."""
        pixels = height * width
        scale = min(self.scale, (self.max_pixels / pixels) ** 0.5)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        if size[0] * size[1] <= self.max_pixels:
            return size
        # One side is a single pixel, or rounding exceeded the limit: the longer side is cut.
        if height >= width:
            return max(1, self.max_pixels // size[1]), size[1]
        return size[0], max(1, self.max_pixels // size[0])


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """The guided filter that upsamples the scores to the picture's size.

    Parameters
    ----------
    radius : in pixels of the picture; the filter works at the working size with a radius of at
        least one pixel there.
    eps : contrast (variance of colours in [0, 1]) below which edges are not followed.

    Raises
    ------
    InputError : a value out of range.

    Example
    -------
    >>> FilterConfig(radius=6, eps=1e-3)
    """

    radius: int = 4
    eps: float = 3e-4

    def __post_init__(self) -> None:
        check_count("radius", self.radius, 1, 2**15)
        if check_positive("eps", self.eps) < 1e-9:
            raise InputError(f"eps is {self.eps}; wanted at least 1e-9")
