"""The settings of a user: frozen records that check their values when they are made. Their numbers
may be NumPy's; they are stored as Python's, so that equal settings compare equal and fit JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from runtime.checks import as_number, check_count, check_positive, is_number, shown_value
from runtime.core.options import RefineOptions
from runtime.errors import InputError

# The fields in which each named setting differs from the default RefineConfig.
PRESETS: dict[str, dict[str, Any]] = {
    "residual": {},
    "fast": {"scale": 0.25},
    "dynaguide": {"objective": "dynaguide"},
    # The behaviour of DynaGuide's public code: three blocks, conv1 also as the skip connection, the
    # mapping by index, and running statistics for the final map, as model.eval() uses them.
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
    """How a picture is refined: all fields of :class:`runtime.RefineOptions`, and the size.

    Parameters
    ----------
    scale : height and width of the working size, relative to the picture's, in (0, 1]. Above the
        default, 0.5, quality did not improve; 0.25 ("fast") computes a quarter of the pixels of 0.5
        and loses little quality.
    max_pixels : the working size has at most this many pixels, whatever ``scale`` is; 1 to 2^28.
        This bounds memory and time for large pictures.

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
            raise InputError(
                f"scale is {shown_value(self.scale)}; wanted a number above 0, at most 1"
            )
        check_count("max_pixels", self.max_pixels, 1, 2**28)
        for name in ("scale", "max_pixels"):
            object.__setattr__(self, name, as_number(getattr(self, name)))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> RefineConfig:
        """Return a named setting, with other values for the fields in ``changes``.

        Parameters
        ----------
        name : "residual", "fast", "dynaguide", "dynaguide_code", "dynaseg_fsf" or "dynaseg_scf".

        Raises
        ------
        InputError : an unknown name, a value out of range, or an option that the objective does not
            use.

        Example
        -------
        >>> RefineConfig.preset("dynaguide", steps=50)
        """
        if name not in PRESETS:
            raise InputError(f"refine is {name!r}; wanted one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    def changes(self) -> dict[str, list[Any]]:
        """Return the fields that differ from the objective's defaults: name -> [value, default]."""
        default = asdict(RefineConfig(objective=self.objective))
        return {k: [v, default[k]] for k, v in asdict(self).items() if v != default[k]}

    def options(self) -> dict[str, Any]:
        """Return the fields that :func:`runtime.refine` takes as keywords: all but the size."""
        own = {f.name for f in fields(RefineOptions)}
        return {name: value for name, value in asdict(self).items() if name in own}

    def working_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width, at least 1, at which a picture of this size is refined."""
        return _size_within(height, width, self.scale, self.max_pixels)


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """The guided filter that upsamples the scores to the picture's size.

    Parameters
    ----------
    radius : of the filter's window, in pixels of the picture. It is scaled to the working size,
        where it is at least one pixel. 1 to 2^15.
    eps : the filter does not follow edges with a smaller contrast (variance of colours in [0, 1]).
        At least 10^-9.

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
            raise InputError(f"eps is {shown_value(self.eps)}; wanted at least 1e-9")
        for name in ("radius", "eps"):
            object.__setattr__(self, name, as_number(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class CrfConfig:
    """The dense CRF that computes labels at the picture's size, instead of the guided filter:
    :func:`runtime.dense_crf`, whose options these are, and the size at which it runs. It runs on
    the CPU, also if everything else runs on a GPU.

    Parameters
    ----------
    steps : of mean field, 0 to 1000.
    bilateral_weight, bilateral_sxy, bilateral_srgb : the kernel of distance, in pixels of the
        picture, and colour, from 0 to 255. A weight of 0 switches the kernel off; at most 10^6.
    gaussian_weight, gaussian_sxy : the kernel of distance alone.
    floor : the smallest probability; smaller ones are raised to it. At least 1e-30, at most 0.5.
    max_pixels : a picture of more pixels is shrunk to the largest size of its proportions that has
        at most this many; 1 to 2^28. Distances (``bilateral_sxy``, ``gaussian_sxy``) are scaled
        alike, and the resulting probabilities are interpolated bilinearly to the picture's size.
        This bounds memory and time for large pictures.

    Raises
    ------
    InputError : a value out of range.

    Example
    -------
    >>> CrfConfig(steps=5, bilateral_srgb=5.0)
    """

    steps: int = 10
    bilateral_weight: float = 4.0
    bilateral_sxy: float = 67.0
    bilateral_srgb: float = 3.0
    gaussian_weight: float = 3.0
    gaussian_sxy: float = 1.0
    floor: float = 1e-5
    max_pixels: int = 2**21

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 0, 1000)
        for name in ("bilateral_sxy", "bilateral_srgb", "gaussian_sxy"):
            check_positive(name, getattr(self, name))
        for name, low, high, wanted in (
            ("bilateral_weight", 0, 1e6, "0 to 1000000"),
            ("gaussian_weight", 0, 1e6, "0 to 1000000"),
            ("floor", 1e-30, 0.5, "1e-30 to 0.5"),
        ):
            value = getattr(self, name)
            if not is_number(value, low, high):
                raise InputError(f"{name} is {shown_value(value)}; wanted a number from {wanted}")
        check_count("max_pixels", self.max_pixels, 1, 2**28)
        for field in fields(self):
            object.__setattr__(self, field.name, as_number(getattr(self, field.name)))

    def options(self) -> dict[str, Any]:
        """Return the fields that :func:`runtime.dense_crf` takes as keywords: all but the size."""
        return {name: value for name, value in asdict(self).items() if name != "max_pixels"}

    def working_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width, at least 1, at which the CRF of a picture of this size
        runs."""
        return _size_within(height, width, 1.0, self.max_pixels)


def _size_within(height: int, width: int, scale: float, max_pixels: int) -> tuple[int, int]:
    """Return a size times ``scale``, or smaller if it would have more than ``max_pixels``."""
    pixels = height * width
    scale = min(scale, (max_pixels / pixels) ** 0.5)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    if size[0] * size[1] <= max_pixels:
        return size
    # One side is a single pixel, or rounding exceeded the limit: the longer side is cut.
    if height >= width:
        return max(1, max_pixels // size[1]), size[1]
    return size[0], max(1, max_pixels // size[0])
