"""Checks before a bundle is written: the prior is compared with its original, and its answers are
read as the SDK reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from export.frozen import Frozen, SizeFailed
from export.half import as_rounded_float32, fp16_overflow
from export.inference import precision_of
from export.models import PriorModel
from export.pictures import Pictures
from export.sizes import FreeSizes
from runtime.errors import VerificationFailed, first_line
from runtime.prior.network import NetworkPrior
from runtime.prior.preprocess import Preprocess
from runtime.prior.reading import fits

# Limits for each precision in the comparison with FP32; those of "fp32" are for the comparison with
# the original: the least mean share of equal labels, and the largest difference of a score, divided
# by the largest score.
AGREEMENT = {"fp32": 0.999, "fp16": 0.995, "int8": 0.95, "int8+fp16": 0.95}
RELATIVE = {"fp32": 1e-3, "fp16": 5e-2, "int8": 0.5, "int8+fp16": 0.5}
CERTAIN = 0.999  # least mean confidence at which one class alone is an error
MANY = 3  # least number of pictures in which one class alone is an error
_Run = Callable[[np.ndarray], np.ndarray]  # from a network's input to its output


class PriorCheck(NamedTuple):
    """What :func:`check_prior` measured, and what it computed for the first picture.

    Parameters
    ----------
    report : "pictures" is the number of pictures. "frozen" compares the frozen network with the
        original. Below FP32, the precision's name ("fp16", "int8" or "int8+fp16") compares the
        final network with the frozen one. Each comparison contains ``agreement`` (mean share of
        equal labels over the pictures), ``worst`` (least share), ``worst_picture`` (its name),
        ``max_abs`` (largest difference of a score) and ``largest`` (largest magnitude of a score).
        For a network of free size, the comparisons also contain the first picture at further input
        sizes, and "sizes" lists these as "HxW".
    one_class : the result of :func:`one_class` for the pictures.
    input : (1, 3, h, w) float32, the first picture as the input of the network.
    output : the output of the final graph for ``input``.
    """

    report: dict[str, Any]
    one_class: dict[str, Any] | None
    input: np.ndarray
    output: np.ndarray


def check_prior(
    model: PriorModel,
    frozen: Frozen,
    final: Frozen,
    precision: str,
    preprocess: Preprocess,
    pictures: Pictures,
    *,
    min_agreement: float | None = None,
    sizes: FreeSizes | None = None,
    allow_one_class: bool = False,
) -> PriorCheck:
    """Compare the frozen network with its original, and the lower precision with FP32.

    Parameters
    ----------
    model : the network before freezing.
    frozen, final : the network in the precision of its file, and in ``precision`` (the same graph
        if nothing was converted).
    precision : "fp32", "fp16", "int8" or "int8+fp16".
    preprocess : from a picture to the input of the network.
    pictures : the pictures to compare with.
    min_agreement : least share of equal labels of ``final``, above 0, at most 1; the precision's
        own when None.
    sizes : further input sizes of a network of free size; None for a fixed size.
    allow_one_class : accept a network that returns one class in every pixel of each picture.

    Raises
    ------
    VerificationFailed : a network fails on an input; the outputs differ too much, have different
        shapes or another aspect ratio than the input, or are not finite; tensors of the network
        overflow in FP16; or each picture has only one class, as :func:`refuse_one_class` says.
    BundleError : labels beyond MOST_LABELS, or the output cannot be converted to a guide, as
        :meth:`NetworkPrior.guide` says.

    Example
    -------
    >>> found = check_prior(model, frozen, frozen, "fp32", preprocess, pictures)
    >>> found.report["frozen"]["agreement"]
    1.0
    """
    feeds = [preprocess(picture) for picture in pictures.arrays]
    shapes = sizes.all if sizes is not None else []
    names = pictures.names + [f"{pictures.names[0]} at {h}x{w}" for h, w in shapes]
    report: dict[str, Any] = {"pictures": len(feeds)}
    if sizes is not None:
        report["sizes"] = [f"{h}x{w}" for h, w in shapes]

    def resized(size: tuple[int, int]) -> np.ndarray:
        """The first picture as an input of (height, width)."""
        rule = replace(preprocess, resize="stretch", height=size[0], width=size[1])
        return rule(pictures.arrays[0])

    with ExitStack() as opened:
        run = partial(_answer, frozen)
        original = _original(model, frozen, opened) or run
        compare = partial(
            _compare,
            name=model.name,
            own=precision,
            least=min_agreement,
            on=f"{pictures}{', one of them also at other sizes' if shapes else ''}",
            free_size=sizes is not None,
        )
        try:
            exact = lower = [run(feed) for feed in feeds]
            more = ((feed, run(feed)) for feed in map(resized, shapes))  # one at a time, for memory
            pairs: Iterable[tuple[np.ndarray, np.ndarray]] = (
                (out if original is run else original(feed), out)
                for feed, out in chain(zip(feeds, exact, strict=True), more)
            )
            # Folding a layer into another rounds weights of FP16 again.
            kept = "fp32" if precision_of(frozen.model) == "fp32" else "fp16"
            report["frozen"] = compare(zip(names, pairs, strict=True), kept)
            if precision != "fp32":
                lowered = partial(_answer, _lowered(final, precision, feeds, opened))
                lower = [lowered(feed) for feed in feeds]
                also = ((run(feed), lowered(feed)) for feed in map(resized, shapes))
                pairs = chain(zip(exact, lower, strict=True), also)
                report[precision] = compare(zip(names, pairs, strict=True), precision)
        except SizeFailed as error:
            if sizes is None:
                raise
            raise sizes.refusal(
                error, lambda size: (original(resized(size)), run(resized(size)))
            ) from error
        prior = NetworkPrior(
            frozen.engine, preprocess, names=model.names, output=model.output, name=model.name
        )
        found = one_class(map(prior.guide, exact)) or one_class(map(prior.guide, lower))
    refuse_one_class(found, pictures, model.name, allow_one_class)
    output = final(feeds[0])[0] if "fp16" in precision else lower[0]
    return PriorCheck(report, found, feeds[0], output)


def _original(model: PriorModel, frozen: Frozen, opened: ExitStack) -> _Run | None:
    """The network before freezing, which ``opened`` closes; None if ``frozen`` is the same graph,
    as for a file that an export wrote."""
    if model.onnx == frozen.data:
        return None
    if model.onnx is not None:
        graph = opened.enter_context(Frozen(model.name, data=model.onnx))
        return lambda feed: graph(feed)[0]
    import torch

    def run(feed: np.ndarray) -> np.ndarray:
        try:
            with torch.no_grad():
                return model.module(torch.from_numpy(feed)).numpy()  # type: ignore[misc]
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise SizeFailed(
                f"{model.name} fails on {feed.shape}: {first_line(error)}",
                fix="make it run on this size, or choose another one with --imgsz",
            ) from error

    return run


def _lowered(
    final: Frozen, precision: str, feeds: Sequence[np.ndarray], opened: ExitStack
) -> Frozen:
    """The graph that computes what ``final`` computes on a device; ``opened`` closes it.
    VerificationFailed if tensors overflow in FP16."""
    if "fp16" not in precision:
        return final
    overflow = fp16_overflow(final.data, feeds)
    if overflow:
        first = overflow[0]
        raise VerificationFailed(
            f"{final.name} overflows in FP16: {first.tensor} of {first.node} reaches "
            f"{first.largest:.3g} on these pictures; FP16 ends at 65504 "
            f"({len(overflow)} tensors in all)",
            fix="leave --half out, or export the network in FP32",
        )
    # ONNX Runtime's CPU provider leaves out FP16's rounding. This graph contains it.
    return opened.enter_context(Frozen(final.name, data=as_rounded_float32(final.data)))


def _answer(graph: Frozen, feed: np.ndarray) -> np.ndarray:
    """The output of a graph. SizeFailed unless it has the aspect ratio of ``feed``."""
    output: np.ndarray = graph(feed)[0]
    if output.ndim < 3 or not fits(output.shape[-2:], feed.shape[-2:]):
        raise SizeFailed(
            f"{graph.name} returns {output.shape} for an input of {feed.shape}; wanted "
            "(1, C, h, w) scores or (1, h, w) labels with h : w as in the input",
            fix="export the network again with its segmentation as the output, channels first",
        )
    return output


def _labels(output: np.ndarray) -> tuple[np.ndarray, bool]:
    """(1, h, w) labels of an output, and whether it contains scores."""
    scores = output.dtype.kind == "f" and output.ndim == 4
    return (output.argmax(1) if scores else output), scores


def _compare(
    cases: Iterable[tuple[str, tuple[np.ndarray, np.ndarray]]],
    precision: str,
    *,
    name: str,
    own: str,
    least: float | None,
    on: str,
    free_size: bool,
) -> dict[str, Any]:
    """The comparison of two networks' outputs, as :class:`PriorCheck` describes it.

    ``cases`` are the name of the picture, and the wanted output and the found one. ``least``
    replaces the limit of the agreement if ``precision`` is ``own``, the export's precision; in FP32
    it can only raise the limit. ``on`` says in messages which pictures they are. VerificationFailed
    if the outputs differ more than allowed, have different shapes or are not finite.
    """
    shares, furthest, largest = [], 0.0, 0.0
    instead = ", or drop --dynamic" if free_size else ""
    for picture, (one, two) in cases:
        if one.shape != two.shape:
            raise VerificationFailed(
                f"{name} in {precision} returns {two.shape} for {picture}; wanted {one.shape}",
                fix=f"report this network{instead}",
            )
        if not all(np.isfinite(x.astype(np.float64)).all() for x in (one, two)):
            raise VerificationFailed(
                f"{name} in {precision} returns NaN or infinite scores for {picture}",
                fix="check the network and its weights"
                if precision == "fp32"
                else "export it in FP32",
            )
        (labels, scores), (others, _) = _labels(one), _labels(two)
        shares.append((float((labels == others).mean()), picture))
        difference = np.abs(one.astype(np.float64) - two.astype(np.float64))
        furthest = max(furthest, float(difference.max()) if scores else 0.0)
        largest = max(largest, float(np.abs(one).max()))
    worst, where = min(shares)
    agreement = float(np.mean([share for share, _ in shares]))
    limit = AGREEMENT[precision]
    if precision == own and least is not None:
        limit = max(least, limit) if precision == "fp32" else least
    if agreement < limit:
        raise VerificationFailed(
            f"{name} in {precision}: {agreement:.2%} of the labels agree with the original on {on} "
            f"(worst {worst:.2%}, {where}); wanted {limit:.2%}",
            fix=f"{_fix(precision)}{instead}",
        )
    if furthest > RELATIVE[precision] * max(largest, 1e-3):
        raise VerificationFailed(
            f"{name} in {precision} differs by {furthest:.3g} where scores reach {largest:.3g}, on "
            f"{on}; wanted at most {RELATIVE[precision]:g} of that",
            fix=f"{'export it in FP32' if precision != 'fp32' else 'report this network'}{instead}",
        )
    return {
        "agreement": agreement,
        "worst": worst,
        "worst_picture": where,
        "max_abs": furthest,
        "largest": largest,
    }


def _fix(precision: str) -> str:
    """What a user can do whose network keeps too few labels in a precision."""
    pictures = "verify with pictures like those that it will run on (--pictures FILE...)"
    if precision == "fp32":
        return f"{pictures}, or report this network"
    option = {"fp16": "--half", "int8": "--int8"}.get(precision, "--half or --int8")
    more = ", give --data more pictures to calibrate with" if "int8" in precision else ""
    return f"leave {option} out{more}, {pictures}, or lower --min-agreement"


def one_class(guides: Iterable[np.ndarray]) -> dict[str, Any] | None:
    """What a prior returns that finds only one class in each picture.

    Parameters
    ----------
    guides : (h, w, C) float32 probabilities or (h, w) int32 labels, for each picture.

    Returns
    -------
    "classes" (the class of each picture, sorted, without repetitions) and "confidence" (the least
    mean probability of that class in a picture, 1 for labels). None if a picture has two classes.

    Examples
    --------
    >>> one_class([np.ones((4, 4, 1), np.float32)])
    {'classes': [0], 'confidence': 1.0}
    """
    classes, confidence = set(), 1.0
    for guide in guides:
        labels = guide.argmax(-1) if guide.ndim == 3 else guide
        first = int(labels.flat[0])
        if (labels != first).any():
            return None
        classes.add(first)
        if guide.ndim == 3:
            confidence = min(confidence, float(guide[..., first].mean(dtype=np.float64)))
    return {"classes": sorted(classes), "confidence": confidence}


def refuse_one_class(
    found: dict[str, Any] | None, pictures: Pictures, name: str, allowed: bool
) -> None:
    """Refuse a network that finds only one class, at confidence 1, in each of many pictures.

    Parameters
    ----------
    found : the result of :func:`one_class`.
    pictures : the pictures that were used.
    name : of the network, for messages.
    allowed : refuse nothing.

    Raises
    ------
    VerificationFailed : ``found`` has a confidence of at least CERTAIN, and there are at least
        MANY pictures.
    """
    if found is None or allowed or len(pictures.names) < MANY or found["confidence"] < CERTAIN:
        return
    classes = ", ".join(map(str, found["classes"]))
    raise VerificationFailed(
        f"{name} returns one class (number {classes}) with confidence {found['confidence']:.2f} in "
        f"every pixel of each of {pictures}",
        fix="check its output, mean and std; or name pictures with several classes (--pictures "
        "FILE...); or add --allow-one-class if this is right",
    )
