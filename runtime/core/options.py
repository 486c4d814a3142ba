"""The options of a refinement: a frozen record that checks its values. Names are the papers'."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from runtime.checks import as_number, as_numbers, is_count, is_number, shown_value
from runtime.errors import InputError

# The values of options that are left out, by objective.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "residual": {"steps": 10, "channels": 32, "lr": 0.05, "skip": "none", "final_bn": "none",
                 "weighting": "fixed", "continuity": "l1", "diagonals": False, "min_labels": 0},
    "dynaguide": {"steps": 1000, "channels": 100, "lr": 0.1, "skip": "own", "final_bn": "image",
                  "weighting": "fsf", "continuity": "huber", "diagonals": True, "min_labels": 0},
    "dynaseg": {"steps": 1000, "channels": 100, "lr": 0.1, "skip": "none", "final_bn": "image",
                "weighting": "fsf", "continuity": "l1", "diagonals": False, "min_labels": 3},
}  # fmt: skip
CHOICES = {  # the values of the options that are words
    "objective": tuple(_DEFAULTS),
    "skip": ("none", "shared", "own"),
    "weighting": ("fixed", "fsf", "scf"),
    "continuity": ("l1", "huber"),
    "mapping": ("overlap", "index_modulo"),
    "final_bn": ("none", "image", "running"),
}
# Options that an objective does not use: these keep their defaults.
_RESIDUAL_ONLY = ("lam", "sigma", "offsets", "balance")
_CLUSTER_ONLY = ("skip", "weighting", "mu", "beta", "continuity", "diagonals", "mapping",
                 "final_bn", "soft_guide")  # fmt: skip
_UNUSED = {"residual": _CLUSTER_ONLY, "dynaguide": _RESIDUAL_ONLY, "dynaseg": _RESIDUAL_ONLY}


@dataclass(frozen=True, kw_only=True)
class RefineOptions:
    """Options of one refinement. None stands for the objective's own default.

    Parameters
    ----------
    objective : "residual" (ours, docs/algorithm.md), "dynaguide" (Guermazi et al., IVC 2025) or
        "dynaseg" (Guermazi et al., IVC 2024; as published it has no guide).
    steps : most SGD steps: 10 for residual, 1000 for the others. 0 returns the map of the untrained
        network, which for residual is the guide. At most 1,000,000.
    channels : width of the network, and for dynaguide and dynaseg the number of clusters: 32 for
        residual, 100 for the others. 1 to 1024.
    blocks : convolution blocks, 2 or 3.
    lr : learning rate of SGD: 0.05 for residual, 0.1 for the others. 0 to 10.
    momentum : of SGD, 0 to 0.9999.
    seed : of the initial weights, 0 to 2^63 - 1.
    skip : the convolution of a connection from the picture to the last layer: "own", 3x3 (as
        DynaGuide publishes it), "shared" with conv1 (its public code), or "none".
    weighting : weight of the continuity loss: "fixed" is mu, "fsf" is K' / beta, "scf" is mu / K',
        where K' is the number of labels in the current map. DynaSeg calls its FSF constant mu,
        DynaGuide beta.
    mu, beta : see ``weighting``. None for mu is 50 with "scf", else 1. mu is 0 to 10^6, beta 10^-6
        to 10^6.
    continuity : "l1" or "huber" (threshold 1): the function of the differences between neighbours
        in the response map that the continuity loss adds up.
    diagonals : the continuity loss uses the two diagonal directions as well.
    mapping : of the guide's classes to clusters: "overlap" (one to one with the largest shared
        area, computed in each of the first 10 steps, then frozen) or "index_modulo" (as the public
        code: the i-th class to the (i mod K')-th cluster, computed in each step).
    final_bn : the batch norm after the last layer: "image" (statistics of this picture), "running"
        (as "image", but running statistics for the final map, as model.eval() does) or "none".
    soft_guide : dynaguide uses the guide's probabilities instead of their arg max.
    min_labels : stop after a step whose map had at most this many labels, 0 to 1024; 0 = never.
    silhouette : stop when K' falls to the number of clusters (3 to 26) with the best silhouette of
        the picture's colours, and return the last map with at least that many labels.
    early_stop : stop if at least this share of the labels is equal to the labels of 10 steps before
        and the loss has changed by less than 1 %, at three checks in a row; 0 = never, 0.995 is
        sensible. 0 to 1.
    lam : weight of residual's pair loss, 0 to 10^6.
    sigma : contrast scale of residual's pair loss, for colours in [0, 1]; 10^-4 to 10^4.
    offsets : distances between the pixels of a pair in residual's pair loss, in pixels: 1 to 16
        numbers, each 1 to 1024.
    balance : exponent of residual's class weights, 0 to 1; 0 gives all classes the same weight.

    Raises
    ------
    InputError : an option out of range, or one that the objective does not use.

    Example
    -------
    >>> RefineOptions(objective="dynaguide", steps=50)
    """

    objective: str = "residual"
    steps: int | None = None
    channels: int | None = None
    blocks: int = 2
    lr: float | None = None
    momentum: float = 0.9
    seed: int = 0
    skip: str | None = None
    weighting: str | None = None
    mu: float | None = None
    beta: float = 15.0
    continuity: str | None = None
    diagonals: bool | None = None
    mapping: str = "overlap"
    final_bn: str | None = None
    soft_guide: bool = False
    min_labels: int | None = None
    silhouette: bool = False
    early_stop: float = 0.0
    lam: float = 4.0
    sigma: float = 0.08
    offsets: tuple[int, ...] = (1, 2)
    balance: float = 0.25

    def __post_init__(self) -> None:
        _check_choice("objective", self.objective)
        for name, value in _DEFAULTS[self.objective].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.mu is None:
            object.__setattr__(self, "mu", 50.0 if self.weighting == "scf" else 1.0)
        object.__setattr__(self, "offsets", as_numbers(self.offsets))
        if not isinstance(self.offsets, tuple):
            raise InputError(
                f"offsets is {shown_value(self.offsets)}; wanted distances such as (1, 2)"
            )
        for name in ("diagonals", "soft_guide", "silhouette"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                given = shown_value(getattr(self, name))
                raise InputError(f"{name} is {given}; wanted True or False")
            object.__setattr__(self, name, bool(getattr(self, name)))
        for name in CHOICES:
            _check_choice(name, getattr(self, name))
        self._check("steps", 0, 1_000_000, int)
        self._check("channels", 1, 1024, int)
        self._check("blocks", 2, 3, int)
        self._check("seed", 0, 2**63 - 1, int)
        self._check("min_labels", 0, 1024, int)
        self._check("lr", 0, 10)
        self._check("momentum", 0, 0.9999)
        self._check("mu", 0, 1e6)
        self._check("beta", 1e-6, 1e6)
        self._check("early_stop", 0, 1)
        self._check("lam", 0, 1e6)
        self._check("sigma", 1e-4, 1e4)
        self._check("balance", 0, 1)
        if not 1 <= len(self.offsets) <= 16:
            raise InputError(
                f"offsets has {len(self.offsets)} distances; wanted 1 to 16, such as (1, 2)"
            )
        for distance in self.offsets:
            _check_number("offsets", distance, 1, 1024, int)
        unused = _UNUSED[self.objective]
        default = {f.name: f.default for f in fields(self)} | _DEFAULTS[self.objective]
        default["mu"] = 50.0 if self.weighting == "scf" else 1.0
        foreign = [name for name in unused if getattr(self, name) != default[name]]
        if foreign:
            raise InputError(
                f"objective {self.objective!r} does not use {', '.join(foreign)}",
                fix="leave it out, or choose another objective",
            )

    def _check(self, name: str, low: float, high: float, kind: type = float) -> None:
        """Check an option as :func:`_check_number` does, and store it as a number of Python."""
        object.__setattr__(self, name, _check_number(name, getattr(self, name), low, high, kind))


def _check_choice(name: str, value: object) -> None:
    if not isinstance(value, str) or value not in CHOICES[name]:
        wanted = ", ".join(repr(c) for c in CHOICES[name])
        raise InputError(f"{name} is {shown_value(value)}; wanted one of {wanted}")


def _check_number(name: str, value: Any, low: float, high: float, kind: type) -> int | float | None:
    """Return a number in [low, high] as a number of Python; with ``kind`` int a whole number."""
    if not (is_count if kind is int else is_number)(value, low, high):
        what = "a whole number" if kind is int else "a number"
        raise InputError(f"{name} is {shown_value(value)}; wanted {what} from {low:g} to {high:g}")
    return as_number(value)
