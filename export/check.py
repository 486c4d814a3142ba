"""Checks before a bundle is written: every graph is compared with its PyTorch or NumPy original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from export.frozen import Frozen
from export.half import as_rounded_float32, fp16_overflow
from export.models import PriorModel
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
from runtime.prior.preprocess import Preprocess

# Limits for each precision in the comparison with FP32; those of "fp32" are for the comparison with
# the original: the least mean share of equal labels, and the largest difference of a score, divided
# by the largest score.
AGREEMENT = {"fp32": 0.999, "fp16": 0.995, "int8": 0.95, "int8+fp16": 0.95}
RELATIVE = {"fp32": 1e-3, "fp16": 5e-2, "int8": 0.5, "int8+fp16": 0.5}
SCORES = 1e-4  # largest difference of a soft-max score
REFINED = 0.99  # least share of equal labels after the golden number of steps
SMALL = 72 * 96  # most pixels of the comparison with the reference in float64, which is slow
MIDDLE = 160 * 240  # most pixels of the comparison with the native core


class PriorCheck(NamedTuple):
    """What :func:`check_prior` measured, and what it computed for the first picture.

    Parameters
    ----------
    report : "pictures" is the number of pictures. "frozen" compares the frozen network with the
        original. Below FP32, the precision's name ("fp16", "int8" or "int8+fp16") compares the
        final network with the frozen one. Each comparison contains ``agreement`` (mean share of
        equal labels over the pictures), ``worst`` (least share), ``max_abs`` (largest difference
        of a score) and ``largest`` (largest magnitude of a score).
    input : (1, 3, h, w) float32, the first picture as the input of the network.
    output : the output of the final graph for ``input``.
    """

    report: dict[str, Any]
    input: np.ndarray
    output: np.ndarray


def check_prior(
    model: PriorModel,
    frozen: Frozen,
    final: Frozen,
    precision: str,
    preprocess: Preprocess,
    pictures: Sequence[np.ndarray],
    min_agreement: float | None = None,
) -> PriorCheck:
    """Compare the frozen network with its original, and the lower precision with FP32.

    Parameters
    ----------
    model : the network before freezing.
    frozen, final : the network in FP32, and in ``precision`` (the same graph for "fp32").
    precision : "fp32", "fp16", "int8" or "int8+fp16".
    preprocess : from a picture to the input of the network.
    pictures : (H, W, 3) uint8 RGB each.
    min_agreement : least share of equal labels of ``final``, above 0, at most 1; the precision's
        own when None.

    Raises
    ------
    VerificationFailed : the outputs differ too much, have different shapes or are not finite, or
        tensors of the network overflow in FP16.
    """
    feeds = [preprocess(picture) for picture in pictures]
    exact = [frozen(feed)[0] for feed in feeds]
    report: dict[str, Any] = {"pictures": len(feeds)}
    report["frozen"] = _compare(
        _original_answers(model, frozen, feeds, exact), exact, "fp32", model.name, None
    )
    if precision == "fp32":
        if min_agreement is not None:
            _refuse_low(report["frozen"], min_agreement, model.name, "fp32")
        return PriorCheck(report, feeds[0], exact[0])
    if "fp16" in precision:
        overflow = fp16_overflow(final.data, feeds)
        if overflow:
            first = overflow[0]
            raise VerificationFailed(
                f"{model.name} overflows in FP16: {first.tensor} of {first.node} reaches "
                f"{first.largest:.3g} on these pictures; FP16 ends at 65504 "
                f"({len(overflow)} tensors in all)",
                fix="export without --half",
            )
        # ONNX Runtime's CPU provider leaves out FP16's rounding. This graph contains it.
        with Frozen(final.name, data=as_rounded_float32(final.data)) as rounded:
            lower = [rounded(feed)[0] for feed in feeds]
        output = final(feeds[0])[0]
    else:
        lower = [final(feed)[0] for feed in feeds]
        output = lower[0]
    report[precision] = _compare(exact, lower, precision, model.name, min_agreement)
    return PriorCheck(report, feeds[0], output)


def _original_answers(
    model: PriorModel, frozen: Frozen, feeds: Sequence[np.ndarray], exact: list[np.ndarray]
) -> list[np.ndarray]:
    """The outputs of the network before freezing. ``exact`` are the outputs of the frozen one."""
    if model.onnx == frozen.data:  # as for a file that an export wrote
        return exact
    if model.onnx is not None:
        with Frozen(model.name, data=model.onnx) as original:
            return [original(feed)[0] for feed in feeds]
    import torch

    with torch.no_grad():
        return [model.module(torch.from_numpy(f)).numpy() for f in feeds]  # type: ignore[misc]


def _compare(
    wanted: Sequence[np.ndarray],
    found: Sequence[np.ndarray],
    precision: str,
    name: str,
    min_agreement: float | None,
) -> dict[str, float]:
    """The comparison of two networks' outputs, as :class:`PriorCheck` describes it.

    VerificationFailed if the outputs differ more than ``precision`` allows, have different shapes
    or are not finite. ``min_agreement`` replaces the precision's limit of the agreement.
    """
    shares, furthest, largest = [], 0.0, 0.0
    for one, two in zip(wanted, found, strict=True):
        if one.shape != two.shape:
            raise VerificationFailed(
                f"{name} in {precision} returns {two.shape}; wanted {one.shape}",
                fix="report this network",
            )
        if not all(np.isfinite(x.astype(np.float64)).all() for x in (one, two)):
            raise VerificationFailed(
                f"{name} in {precision} returns NaN or infinite scores", fix="export it in FP32"
            )
        scores = one.dtype.kind == "f" and one.ndim == 4
        labels = [x.argmax(1) if scores else x for x in (one, two)]
        shares.append(float((labels[0] == labels[1]).mean()))
        difference = np.abs(one.astype(np.float64) - two.astype(np.float64))
        furthest = max(furthest, float(difference.max()) if scores else 0.0)
        largest = max(largest, float(np.abs(one).max()))
    report = {
        "agreement": float(np.mean(shares)),
        "worst": min(shares),
        "max_abs": furthest,
        "largest": largest,
    }
    _refuse_low(report, min_agreement or AGREEMENT[precision], name, precision)
    if furthest > RELATIVE[precision] * max(largest, 1e-3):
        raise VerificationFailed(
            f"{name} in {precision} differs by {furthest:.3g} where scores reach {largest:.3g}; "
            f"wanted at most {RELATIVE[precision]:g} of that",
            fix="export it in FP32" if precision != "fp32" else "report this network",
        )
    return report


def _refuse_low(report: dict[str, float], least: float, name: str, precision: str) -> None:
    """VerificationFailed if the mean share of equal labels is below ``least``."""
    if report["agreement"] < least:
        raise VerificationFailed(
            f"{name} in {precision}: {report['agreement']:.2%} of the labels agree with the "
            f"original (worst picture {report['worst']:.2%}); wanted {least:.2%}",
            fix="report this network"
            if precision == "fp32"
            else "leave --half or --int8 out, give --data more pictures, or lower --min-agreement",
        )


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
