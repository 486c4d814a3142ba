"""Checks before a bundle is written: the refinement's graphs are compared with NumPy in float64 and
with the native core."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from export.frozen import Frozen
from runtime.core import parameters, reference
from runtime.core.config import RefineConfig
from runtime.core.constants import NEVER, SMALLEST_PRIOR
from runtime.core.guide import Guide
from runtime.core.parameters import objective_of
from runtime.core.refiner import Make, maker, refine, refine_with
from runtime.core.resize import resize
from runtime.engines.graph_refiner import GraphRefiner
from runtime.engines.onnx import OnnxEngine
from runtime.errors import VerificationFailed
from runtime.prior.kmeans import KMeansPrior

SCORES = 1e-4  # largest difference of a soft-max score
REFINED = 0.99  # least share of equal labels after the golden number of steps
SMALL = 72 * 96  # most pixels of the comparison with the reference in float64, which is slow
MIDDLE = 160 * 240  # most pixels of the comparison with the native core


def check_refinement(
    config: RefineConfig,
    step: Frozen,
    final: Frozen,
    low: np.ndarray,
    guide: np.ndarray,
    initial: parameters.State | None,
    steps: int,
) -> dict[str, float]:
    """Compare the refinement graphs with the reference in float64 and with the native core.

    Parameters
    ----------
    config : the refinement.
    step, final : the graphs of the step and of the map.
    low : (h, w, 3) float32 RGB in [0, 1], the picture at working size.
    guide : (h, w, C) float32 probabilities or (h, w) int32 labels at working size. K-means replaces
        a guide in which one class covers the picture.
    initial : weights for all classes of the guide to start from; the seed's when None.
    steps : number of steps of the comparison with the core.

    Returns
    -------
    ``update``: relative l2 error of the change that one step makes: the largest error of the
    weights', the momenta's and the running statistics'. ``scores``: largest difference of a score
    of the map after that step. ``agreement``: share of labels equal to the core's after ``steps``.

    Raises
    ------
    VerificationFailed : ``update`` or ``scores`` is too large, or ``agreement`` is too low.
    """
    low, guide = _smaller(low, guide, MIDDLE)
    if _classes(guide) < 2 and (initial is None or guide.shape[-1] > 1):
        guide = _split(low, guide)
    report = _check_step(config, step.engine, final.engine, low, guide, initial)
    short = replace(config, steps=steps)
    wanted = guide if objective_of(config).takes_guide else None
    make = _maker(GraphRefiner, step.engine, final.engine, short, initial)
    ours = refine_with(make, short, low, wanted, warm=initial is not None)
    core = refine(low, wanted, initial=initial, **short.options())
    report["agreement"] = float((ours.labels == core.labels).mean())
    if report["agreement"] < REFINED:
        raise VerificationFailed(
            f"refine_step.onnx: {report['agreement']:.2%} of the labels agree with the native core "
            f"after {steps} steps; wanted {REFINED:.0%}",
            fix="report this with the command and the picture",
        )
    return report


def _maker(
    kind: type[GraphRefiner],
    step: OnnxEngine,
    final: OnnxEngine,
    config: RefineConfig,
    initial: parameters.State | None,
) -> Make:
    """The argument ``make`` of :func:`runtime.core.refiner.refine_with` that makes refiners of
    class ``kind``."""
    return maker(
        lambda h, w, count: kind(step, final, config, height=h, width=w, classes=count),
        config,
        initial,
    )


def _smaller(low: np.ndarray, guide: np.ndarray, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture and the guide, reduced to about ``pixels`` pixels if they have more."""
    scale = min(1.0, (pixels / (low.shape[0] * low.shape[1])) ** 0.5)
    h, w = (max(2, round(n * scale)) for n in low.shape[:2])
    image = np.ascontiguousarray(resize(low, h, w))
    if guide.ndim == 3:
        return image, np.ascontiguousarray(resize(guide, h, w))
    rows, columns = (
        np.linspace(0, n - 1, m).astype(int) for n, m in zip(guide.shape, (h, w), strict=True)
    )
    return image, np.ascontiguousarray(guide[np.ix_(rows, columns)])


def _classes(guide: np.ndarray) -> int:
    """The number of classes that are the label of more than a hundredth of the pixels. Pixels with
    the label -1 do not count."""
    hard = guide.argmax(-1) if guide.ndim == 3 else guide[guide >= 0]
    return int((np.bincount(hard.ravel(), minlength=1) > 0.01 * hard.size).sum())


def _split(low: np.ndarray, guide: np.ndarray) -> np.ndarray:
    """(h, w, C) float32 probabilities by k-means, with at least two classes.

    They replace a guide in which one class covers the picture, as an untrained network may return
    it. With such a guide the refinement would change nothing, and the check would find no error.
    """
    split = KMeansPrior()(low, low)
    channels = guide.shape[2] if guide.ndim == 3 else int(guide.max()) + 1
    out = np.zeros((*low.shape[:2], max(channels, 2)), np.float32)
    for k in range(split.shape[2]):
        out[..., k % out.shape[2]] += split[..., k]
    return out


def _check_step(
    config: RefineConfig,
    step: OnnxEngine,
    final: OnnxEngine,
    low: np.ndarray,
    guide: np.ndarray,
    initial: parameters.State | None,
) -> dict[str, float]:
    """Compare one step on a small picture with the reference in float64. Returns ``update`` and
    ``scores`` of :func:`check_refinement`, and raises VerificationFailed for them."""
    image, small = _smaller(low, guide, SMALL)
    kept: dict[str, Any] = {}

    class Recorder(GraphRefiner):
        """Runs one step, and records the guide and the states before and after it, so that the
        reference starts from the same values."""

        def run(self, image: np.ndarray, guide: Any = None, **options: Any) -> Any:
            state = self.state_dict()
            # With momenta of zero, an error in the factor of the momenta would not be found.
            for name in [k for k in state if k.startswith("momentum.")]:
                state[name] = 0.1 * state[name.removeprefix("momentum.")]
            self.load_state_dict(state)
            kept.update(guide=guide.array if isinstance(guide, Guide) else guide, before=state)
            result = super().run(image, guide, steps=1, warm=True)
            kept.update(after=self.state_dict(), scores=result.scores)
            return result

    wanted_guide = small if objective_of(config).takes_guide else None
    refine_with(_maker(Recorder, step, final, config, initial), config, image, wanted_guide)
    used = kept["guide"]
    if used is not None and used.ndim == 3 and objective_of(config).maps_clusters:
        if not config.soft_guide:
            used = np.where(used.sum(-1) > 0, used.argmax(-1), -1).astype(np.int32)
    wide = used if used is None or used.ndim == 2 else used.astype(np.float64)
    scores, _, _, _, _, after = reference.run(
        config, kept["before"], image.astype(np.float64), wide, steps=1
    )
    error, tolerance = 0.0, objective_of(config).update_tolerance
    for group in _groups(after):
        exact, before, found = (
            np.concatenate([np.asarray(state[k], np.float64).ravel() for k in group])
            for state in (after, kept["before"], kept["after"])
        )
        # Where the learning rate is tiny, the update is smaller than float32's rounding error.
        rounding = 2.0**-23 * np.linalg.norm(exact)
        change = max(np.linalg.norm(exact - before), rounding / tolerance, 1e-30)
        error = float(np.maximum(error, np.linalg.norm(found - exact) / change))  # NaN stays NaN
    report = {
        "update": error,
        "scores": float(np.abs(scores - kept["scores"]).max()),
    }
    if not report["update"] <= tolerance or not report["scores"] <= SCORES:
        raise VerificationFailed(
            f"refine_step.onnx: one step's update is {report['update']:.2g} from float64 (relative;"
            f" wanted {tolerance:g}), its scores {report['scores']:.2g} "
            f"(wanted {SCORES:g})",
            fix="report this with the command and the picture",
        )
    return report


def _groups(state: parameters.State) -> list[list[str]]:
    """The names of the weights, of the momenta and of the running statistics, one list for each.
    The groups are compared separately, because the change of one group is a hundred times as large
    as that of another."""
    groups: dict[str, list[str]] = {"weights": [], "momentum.": [], "running_": []}
    for name in state:
        if "num_batches" not in name:
            groups[next((g for g in groups if g in name), "weights")].append(name)
    return [names for names in groups.values() if names]


def check_cnn(
    config: RefineConfig, cnn: Frozen, state: parameters.State, low: np.ndarray, guide: np.ndarray
) -> dict[str, float]:
    """Compare cnn.onnx, which contains weights and running statistics, with the reference in
    float64.

    Parameters
    ----------
    config : the refinement.
    cnn : the graph.
    state : the weights in it.
    low : (h, w, 3) float32 RGB in [0, 1], the picture at working size.
    guide : (h, w, C) float32 probabilities at working size.

    Returns
    -------
    ``scores``: largest difference of a score.

    Raises
    ------
    VerificationFailed : the difference is too large, or a score is NaN.
    """
    image, small = _smaller(low, guide, SMALL)
    wide = {k: v.astype(np.float64) if v.ndim else v for k, v in state.items()}
    feeds, prior, x = [image.transpose(2, 0, 1)[None]], None, image.astype(np.float64)
    if objective_of(config).channels_follow_classes:
        feeds.append(small.transpose(2, 0, 1)[None])
        present = small.any((0, 1))
        prior = np.where(
            present, np.log(np.maximum(small.astype(np.float64), SMALLEST_PRIOR)), NEVER
        )
        x = reference.residual_input(x)
    wanted, _, _ = reference.softmax(reference.forward(config, wide, x, prior, True)[0])
    found = cnn(*(np.ascontiguousarray(f) for f in feeds))[0][0].transpose(1, 2, 0)
    furthest = float(np.abs(wanted - found).max())
    if not furthest <= SCORES:  # also for NaN
        raise VerificationFailed(
            f"cnn.onnx: scores are {furthest:.2g} from float64; wanted {SCORES:g}",
            fix="report this with the command and the picture",
        )
    return {"scores": furthest}
