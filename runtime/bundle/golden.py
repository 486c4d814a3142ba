"""Golden vectors: the outputs of a bundle at its export. Each new device compares its own with
them.

One file contains ``picture`` (H, W, 3) uint8; ``input`` (1, 3, h, w) float32 (networks only);
``guide``, the prior's output; ``labels`` (h, w) int32 after the number of steps in the manifest;
and ``losses`` (steps,) float32, the loss before each step. The losses are compared, too, because
the labels may be equal even if the steps change nothing, or trained weights are not used. So there
is at least one step, also if the bundle refines with none.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle.read import Bundle
from runtime.checks import check_guide
from runtime.core.config import RefineConfig
from runtime.core.parameters import objective_of
from runtime.core.refiner import Make, Refinement, refine_with
from runtime.core.resize import working_picture
from runtime.errors import BundleError, InputError
from runtime.files import cache_folder, replace_file, shown
from runtime.prior.network import NetworkPrior, as_probabilities

LOG = logging.getLogger("dg.bundle")
MIN_AGREEMENT = 0.99  # share of equal labels
INPUT_TOLERANCE = 0.05  # in normalised colours: versions of OpenCV differ by one grey level
LOSS_TOLERANCE = 0.02  # relative; two CPU backends differed by 3e-4
_EXPORT = "export the bundle again"


def step_count(config: RefineConfig) -> int:
    """The number of refinement steps of golden vectors: that of ``config``, at least 1, and at most
    the objective's ``golden_steps``."""
    return min(max(config.steps or 0, 1), objective_of(config).golden_steps)


def make(
    picture: np.ndarray,
    guide: np.ndarray,
    config: RefineConfig,
    refiner: Make,
    *,
    low: np.ndarray,
    warm: bool = False,
    network_input: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], int]:
    """The golden arrays of a picture, which the docstring of this module lists.

    Parameters
    ----------
    picture : (H, W, 3) uint8 RGB.
    guide : the prior's output for it, (h', w', C) float32 probabilities or (h', w') int32 labels.
    config : the refinement, which runs :func:`step_count` steps.
    refiner : the argument ``make`` of :func:`runtime.core.refiner.refine_with`.
    low : (h, w, 3) float32 RGB in [0, 1], the picture at working size.
    warm : start from the weights that the refiner has, not from the seed's.
    network_input : (1, 3, h', w') float32, the input of a network prior; None for other priors.

    Returns
    -------
    The arrays by name, and the number of steps.

    Raises
    ------
    InputError : a guide or picture that the refinement does not take. Also what the refiner raises.
    """
    steps = step_count(config)
    labels, losses = _refined(low, guide, config, refiner, steps, warm)
    arrays = {"picture": picture, "guide": guide, "labels": labels, "losses": losses}
    if network_input is not None:
        arrays["input"] = network_input
    return arrays, steps


def compare(
    arrays: Mapping[str, np.ndarray],
    steps: int,
    prior: Any,
    config: RefineConfig,
    refiner: Make,
    *,
    warm: bool = False,
    name: str = "the bundle",
) -> dict[str, float]:
    """Run the golden picture again and compare the outputs with the recorded ones.

    Parameters
    ----------
    arrays : the golden arrays by name.
    steps : the number of refinement steps in them.
    prior : of the bundle; called as prior(picture, picture at working size).
    config : the refinement.
    refiner : the argument ``make`` of :func:`runtime.core.refiner.refine_with`.
    warm : start from the weights that the refiner has, not from the seed's.
    name : of the bundle, for messages.

    Returns
    -------
    ``input`` (network priors only): largest absolute difference of the network's input. ``prior``
    and ``labels``: shares of equal labels. ``losses``: largest relative difference of a loss.

    Raises
    ------
    BundleError : an array is missing or has a wrong shape or type, or the outputs differ too much.
    """
    names = ("picture", "guide", "labels", "losses")
    picture, guide, labels, losses = (arrays.get(k) for k in names)
    fits = (
        picture is not None
        and guide is not None
        and labels is not None
        and losses is not None
        and picture.dtype == np.uint8
        and picture.ndim == 3
        and picture.shape[2] == 3
        and picture.size > 0
        and guide.ndim in (2, 3)
        and guide.size > 0
        and guide.dtype in (np.float32, np.int32)
        and labels.dtype == np.int32
        and labels.ndim == 2
        and 0 < labels.size <= max(config.max_pixels, picture.size)
        and losses.dtype == np.float32
        and losses.ndim == 1
        and len(losses) <= steps
        and np.isfinite(losses).all()
    )
    if not fits or picture is None or guide is None or labels is None or losses is None:
        raise BundleError(
            f"{name}: an array of the golden vectors is missing, or has a wrong shape or type",
            fix=_EXPORT,
        )
    out: dict[str, float] = {}
    try:
        low = working_picture(picture, *labels.shape)
        if isinstance(prior, NetworkPrior):
            x, wanted = prior.preprocess(picture), arrays.get("input")
            if (
                wanted is None
                or (wanted.dtype, wanted.shape) != (x.dtype, x.shape)
                or not np.isfinite(wanted).all()
            ):
                raise BundleError(
                    f"{name}: the golden input does not fit the preprocessing", fix=_EXPORT
                )
            out["input"] = float(np.abs(x - wanted).max())
        again = np.asarray(prior(picture, low))
        if again.shape != guide.shape:
            raise BundleError(f"the prior returns {again.shape}, golden is {guide.shape}")
        check_guide(guide, *guide.shape[:2])
        out["prior"] = float((_hard(again) == _hard(guide)).mean())
        refined, again_losses = _refined(low, guide, config, refiner, steps, warm)
    except (InputError, BundleError) as error:
        raise BundleError(
            f"{name}: the golden picture cannot be run: {error.message}", fix=_EXPORT
        ) from error
    out["labels"] = float((refined == labels).mean())
    both = min(len(losses), len(again_losses))  # a stop rule may end one of the runs earlier
    apart = np.abs(again_losses[:both] - losses[:both]) / np.maximum(np.abs(losses[:both]), 1e-6)
    out["losses"] = float(apart.max()) if both else float(len(losses) != len(again_losses))
    most = {"input": INPUT_TOLERANCE, "losses": LOSS_TOLERANCE}
    bad = [
        f"{key} {value:.4f}"
        for key, value in out.items()
        if not (value <= most[key] if key in most else value >= MIN_AGREEMENT)
    ]
    if bad:
        raise BundleError(
            f"{name} does not give its golden answers on this device: {', '.join(bad)} "
            f"(wanted labels equal to {MIN_AGREEMENT:.0%}, input within {INPUT_TOLERANCE}, "
            f"losses within {LOSS_TOLERANCE:.0%})",
            fix="python -m runtime check BUNDLE; if it fails again, export the bundle again",
        )
    return out


def _hard(guide: np.ndarray) -> np.ndarray:
    """The guide as labels (h, w)."""
    return guide if guide.ndim == 2 else guide.argmax(-1)


def _refined(
    low: np.ndarray, guide: np.ndarray, config: RefineConfig, refiner: Make, steps: int, warm: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Refine, and return the labels (h, w) int32, as numbers of the guide's classes if the
    objective has such labels, and the loss before each step."""
    guide = as_probabilities(guide, *low.shape[:2])
    config = replace(config, steps=steps)
    wanted = guide if objective_of(config).takes_guide else None
    result: Refinement = refine_with(refiner, config, low, wanted, warm=warm)
    labels = result.labels
    if objective_of(config).channels_follow_classes:
        labels = result.classes[labels].astype(np.int32)
    return labels, np.asarray(result.stats["losses"]["total"], np.float32)


def was_passed(bundle: Bundle, *run_by: str) -> bool:
    """Whether :func:`remember` has recorded that the bundle passed its golden test with the
    backends ``run_by`` on this machine."""
    path = _receipt(bundle, run_by)
    try:
        return path is not None and path.is_file()
    except OSError:
        return False


def remember(bundle: Bundle, result: Mapping[str, float], *run_by: str) -> None:
    """Record in the cache folder that the bundle has passed its golden test. Without a writable
    cache folder the test runs again the next time, and a warning says so.

    Parameters
    ----------
    bundle : the bundle.
    result : from :func:`compare`.
    run_by : names of the backends.
    """
    path = _receipt(bundle, run_by)
    reason = "there is no home folder for the cache"
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps({"bundle": bundle.name, **result}).encode())
            return
        except OSError as error:
            reason = f"{shown(path.parent)} cannot be written: {error.strerror}"
    LOG.warning("%s is tested again when it is loaded the next time: %s", bundle.name, reason)


def _receipt(bundle: Bundle, run_by: tuple[str, ...]) -> Path | None:
    """The file that records a passed test; None without a cache folder."""
    folder = cache_folder()
    text = "\n".join((bundle.manifest["sha256"], *run_by))
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    return None if folder is None else folder / "golden" / f"{key}.json"
