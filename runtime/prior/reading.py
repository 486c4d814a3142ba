"""How the outputs of a network are read, whoever exported the network: which of its outputs is the
segmentation, in which order its axes are, and whether its values are logits, probabilities or
labels. Shapes and values decide; what they leave open is an error that names the setting."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.errors import BundleError, InputError

KINDS = ("logits", "probabilities", "labels")
MOST_LABELS = 4096
TOLERANCE = 1e-3  # of the sum of a pixel's probabilities
_WORDS = {
    "logit": "logits",
    "logits": "logits",
    "score": "logits",
    "scores": "logits",
    "probability": "probabilities",
    "probabilities": "probabilities",
    "prob": "probabilities",
    "probs": "probabilities",
    "softmax": "probabilities",
    "sigmoid": "probabilities",
    "label": "labels",
    "labels": "labels",
    "argmax": "labels",
}
_SAY_KIND = (
    "say what the network returns: python -m export --output logits (or probabilities, labels), "
    "or metadata 'output' of the .onnx file"
)
# What a user is told when values decided, by kind and whether there are several channels.
KIND_NOTES = {
    ("probabilities", True): "the output is in [0, 1] and sums to 1 in every pixel, so it is taken "
    "as probabilities; metadata 'output' would say otherwise",
    ("probabilities", False): "the output has one channel in [0, 1], so it is taken as the "
    "probability of the foreground",
    ("logits", False): "the output has one channel, so it is taken as the logit of the foreground",
    ("labels", False): "the output has one channel of whole numbers, so they are taken as labels",
}
_SAY_OUTPUT = (
    "python -m export --output-name NAME, or metadata 'output_name' of the file, takes another one"
)
# Words in the names of outputs that are no segmentation.
_OTHER = re.compile(
    "aux|edge|bound|contour|depth|offset|center|centre|flow|normal|feat|embed|conf|certain|image|recon"
)


def kind_named(text: str, where: str) -> str:
    """Return the kind of output that a text of metadata names: "logits", "probabilities" or
    "labels".

    Parameters
    ----------
    text : the first word that names a kind decides, in upper or lower case: "softmax", "sigmoid"
        and "argmax" are understood, and words that name no kind are ignored.
    where : what the message calls the text.

    Raises
    ------
    BundleError : no word of the text names a kind.
    """
    words = re.findall("[a-z]+", text.lower().replace("-max", "max").replace("arg max", "argmax"))
    for word in words:
        if word in _WORDS:
            return _WORDS[word]
    raise BundleError(f"{where} is {text[:80]!r}; wanted one of {', '.join(KINDS)}", fix=_SAY_KIND)


def fits(size: Sequence[int], picture: Sequence[int]) -> bool:
    """Whether an output of ``size`` (h, w) can be a map of a ``picture`` (H, W): one factor scales
    both sides, up to one pixel of rounding, or exactly if the output is larger.

    An output of one pixel is a result for the whole picture, unless the picture is no larger than
    64 x 64.
    """
    if tuple(size) == (1, 1):
        return max(picture) <= 64
    if size[0] > picture[0] or size[1] > picture[1]:
        return size[0] * picture[1] == size[1] * picture[0]
    low, high = (
        [(side + rounding) / whole for side, whole in zip(size, picture, strict=True)]
        for rounding in (-1, 1)
    )
    return min(size) > 0 and max(low) <= min(high)


@dataclass(frozen=True)
class Form:
    """Which output is read, and the order of its axes.

    Parameters
    ----------
    output : the number of the output in the network's order.
    channels : the number of classes of scores, or 1: labels, or the foreground's score.
    last : the channels are the last axis, as TensorFlow writes them.
    size : (h, w) of the output for the picture that decided.
    note : a sentence for the user if other outputs were left out, else "".
    """

    output: int
    channels: int
    last: bool = False
    size: tuple[int, int] = (0, 0)
    note: str = ""

    @property
    def plain(self) -> bool:
        """Whether the output is (1, C, h, w) scores of two and more classes."""
        return self.channels > 1 and not self.last

    def planes(self, out: np.ndarray, name: str = "the network") -> np.ndarray:
        """Return the output as (C, h, w), without other changes.

        Raises
        ------
        BundleError : the output has another number of channels than the one that decided.
        """
        core = _core(out.shape)
        if len(core) == 2:
            core = (1, *core)
        if len(core) != 3 or core[2 if self.last else 0] != self.channels:
            raise BundleError(
                f"{name} returned {tuple(out.shape)}; wanted {self.channels} channels, as before"
            )
        out = out.reshape(core)
        return out.transpose(2, 0, 1) if self.last else out


def find_form(
    outputs: Sequence[tuple[str, Sequence[int], str]],
    picture: Sequence[int],
    *,
    name: str = "the network",
    names: Sequence[str] | None = None,
    kind: str | None = None,
    chosen: str | None = None,
) -> Form:
    """Find the output that is the segmentation, and the order of its axes.

    Scores are (1, C, h, w) or (1, h, w, C). Labels, and scores of the foreground alone, are the
    same with one channel or without the channel axis. Of several such outputs the one with as many
    channels as there are names is taken, then one whose name has no word as "aux" or "edge", then
    scores of several classes, then integers, then the largest, then the first.

    Parameters
    ----------
    outputs : name, shape and dtype (as NumPy writes it, "float32") of each output.
    picture : (H, W) of the network's input.
    name : what messages call the network.
    names : the names of the classes.
    kind : "logits", "probabilities", "labels", or None if it is not known. Labels are never several
        channels, and the others never integers.
    chosen : the name of the output to take, or None.

    Raises
    ------
    BundleError : no output has the aspect ratio of the picture, or is called ``chosen``; several
        outputs have different numbers of channels, and nothing tells which one is the segmentation;
        or the network finds objects (it also returns a list of boxes or queries), so that its
        channels are no classes.
    """
    came = ", ".join(f"{output} {tuple(shape)} {dtype}" for output, shape, dtype in outputs)
    if chosen is not None and all(output != chosen for output, _, _ in outputs):
        raise BundleError(f"{name} has no output {chosen!r}, only {came}", fix=_SAY_OUTPUT)
    forms: list[tuple[tuple[Any, ...], Form]] = []
    lists = []
    for number, (output, shape, dtype) in enumerate(outputs):
        if chosen not in (None, output):
            continue
        form = _form_of(shape, dtype, picture, number, len(names or ()))
        whole = not dtype.startswith("float")
        # Where there is no choice, the values say later that they are not of this kind.
        if form is not None and len(outputs) > 1 and chosen is None:
            if (form.channels > 1) if kind == "labels" else (whole and kind is not None):
                continue
        if form is not None:
            rank = (
                bool(names) and form.channels == len(names or ()),
                _OTHER.search(output.lower()) is None,
                form.channels > 1,
                whole,
                form.size[0] * form.size[1],
                -number,
            )
            forms.append((rank, form))
        elif form is None and not whole and len(shape) == 3 and min(shape[1:]) > 1:
            lists.append(f"{output} {tuple(shape)}")
    if not forms:
        one = any(_core(shape)[-2:] == (1, 1) for _, shape, _ in outputs)
        reason = "; one score for the whole picture is a classification" if one else ""
        raise BundleError(
            f"{name} returned {came} for an input of {picture[0]} x {picture[1]} pixels; wanted "
            "(1, C, h, w) scores, which are floats, or (1, h, w) labels, with the input's aspect "
            f"ratio{'' if kind is None else f', that are {kind}'}{reason}",
            fix="export the network with its segmentation as an output",
        )
    if lists and chosen is None:
        raise BundleError(
            f"{name} returned {came}; a list of boxes or queries beside masks belongs to a network "
            "that finds objects, whose mask channels are no classes",
            fix=f"export a semantic segmentation; or, if one output is one: {_SAY_OUTPUT}",
        )
    rank, best = max(forms, key=lambda pair: pair[0])
    # One channel of floats beside others, as their certainty, is no rival.
    equal = [pair for pair in forms if pair[0][:2] == rank[:2] and (pair[0][2] or pair[0][3])]
    if len({form.channels for _, form in equal}) > 1 and not rank[0]:
        raise BundleError(
            f"{name} returned {came}; several of these could be the segmentation",
            fix=f"name the classes (--names, metadata 'classes'); or {_SAY_OUTPUT}",
        )
    if len(outputs) == 1 or chosen is not None:
        return best
    taken, shape, _ = outputs[best.output]
    others = [f"{o} {tuple(s)}" for n, (o, s, _) in enumerate(outputs) if n != best.output]
    note = (
        f"output {taken} {tuple(shape)} is taken as the segmentation; the network also returns "
        f"{', '.join(others)}. {_SAY_OUTPUT}"
    )
    return Form(best.output, best.channels, best.last, best.size, note)


def described(
    names: Sequence[str], outputs: Sequence[Any]
) -> list[tuple[str, tuple[int, ...], str]]:
    """Describe outputs for :func:`find_form`. What is no array, as a sequence, has no shape."""
    return [
        (name, tuple(out.shape), np.dtype(out.dtype).name)
        if hasattr(out, "shape") and hasattr(out, "dtype")
        else (name, (), type(out).__name__)
        for name, out in zip(names, outputs, strict=True)
    ]


def core_axes(shape: Sequence[int]) -> tuple[int, ...]:
    """The numbers of the axes that are no batch: all but the first if it has length 1, and at most
    three if the others have length 1."""
    axes = tuple(range(len(shape)))
    if len(axes) > 2 and shape[0] == 1:
        axes = axes[1:]
    while len(axes) > 3 and 1 in (shape[axes[0]], shape[axes[-1]]):
        axes = axes[1:] if shape[axes[0]] == 1 else axes[:-1]
    return axes


def _core(shape: Sequence[int]) -> tuple[int, ...]:
    """The lengths of the axes that :func:`core_axes` returns."""
    return tuple(shape[axis] for axis in core_axes(shape))


def _form_of(
    shape: Sequence[int], dtype: str, picture: Sequence[int], number: int, names: int
) -> Form | None:
    """The form of one output, or None if it is no segmentation. ``names`` is the number of the
    names of classes, or 0."""
    core = _core(shape)
    if (
        len(core) not in (2, 3)
        or 0 in core
        or not dtype.startswith(("float", "int", "uint", "bool"))
    ):
        return None
    found = [Form(number, core[0] if len(core) == 3 else 1, False, (core[-2], core[-1]))]
    if len(core) == 3:
        found.append(Form(number, core[2], True, (core[0], core[1])))
    found = [form for form in found if fits(form.size, picture)]
    if not dtype.startswith("float"):  # scores are floats, so that these are labels
        found = [form for form in found if form.channels == 1]
    exact = [form for form in found if form.size == tuple(picture)]
    named = [form for form in found if form.channels == names]
    for forms in (named, exact, found):
        if forms:
            return forms[0]
    return None


def find_kind(arrays: Sequence[np.ndarray], *, name: str = "the network") -> str | None:
    """Decide from values what they are: "logits", "probabilities" or "labels".

    Whole numbers are labels. Values in [0, 1] are probabilities if those of each pixel sum to 1,
    or if they are the only channel, the foreground's. Other values are logits.

    Parameters
    ----------
    arrays : (C, h, w) for each picture, all with the same C.
    name : what the message calls the network.

    Returns
    -------
    The kind; or None for one channel of zeros and ones, which are both labels and probabilities.

    Raises
    ------
    BundleError : several channels in [0, 1] that do not sum to 1, as the sigmoids of a network
        whose classes do not exclude each other; or values that are not finite.
    """
    if arrays[0].dtype.kind != "f":
        _refuse_scaled_mask(arrays, name)
        return "labels"
    if not all(np.isfinite(array).all() for array in arrays):
        raise BundleError(f"{name} returned NaN or infinite scores for this picture")
    low, high = min(a.min() for a in arrays), max(a.max() for a in arrays)
    if len(arrays[0]) == 1:
        _refuse_scaled_mask(arrays, name)
        if -1 <= low and high < MOST_LABELS and all((a == np.rint(a)).all() for a in arrays):
            return "labels" if low < 0 or high > 1 else None
        return "probabilities" if 0 <= low and high <= 1 else "logits"
    if low < 0 or high > 1 + TOLERANCE:
        return "logits"
    if all(np.abs(a.sum(0, dtype=np.float64) - 1).max() <= TOLERANCE for a in arrays):
        return "probabilities"
    raise BundleError(
        f"{name} returned values from {low:.3g} to {high:.3g}, whose sum over the classes is not "
        "1: they are sigmoids of classes that overlap, or logits of an untrained network",
        fix=_SAY_KIND,
    )


def check_sums(guide: np.ndarray, what: str) -> None:
    """Check that values can be probabilities of classes that exclude each other. One sum for all
    pixels is a scale; a sum below 1 says that a part of the pixel is unknown.

    Parameters
    ----------
    guide : (h, w, C) float.
    what : the start of the message, such as "the prior returned".

    Raises
    ------
    InputError : the sums of the pixels over the classes are above 1 and different.

    Example
    -------
    >>> check_sums(np.full((4, 6, 2), 0.5), "the prior returned")
    """
    total = guide.sum(-1, dtype=np.float64)
    most, least = float(total.max()), float(total.min(where=total > 0, initial=np.inf))
    if guide.min() >= 0 and most > 1 + TOLERANCE and most - least > TOLERANCE * most:
        raise InputError(
            f"{what} {guide.shape} values whose sum over the classes is from {least:.4g} to "
            f"{most:.4g}; wanted probabilities, whose sum is 1",
            fix="divide them by their sum, or apply a soft-max to scores",
        )


def _refuse_scaled_mask(arrays: Sequence[np.ndarray], name: str) -> None:
    """BundleError for one channel that seems to be a mask or a probability times 255: the values 0
    and 255, or more different values than a picture shows classes."""
    if max(a.max() for a in arrays) > 255 or min(a.min() for a in arrays) < 0:
        return
    found = np.unique(np.concatenate([np.unique(a) for a in arrays]))
    if found[-1] > 100 and (found[-2:].tolist() == [0, 255] or len(found) > 48):
        raise BundleError(
            f"{name} returned one channel of {len(found)} different values from {found[0]:.3g} to "
            f"{found[-1]:.3g}, which seems to be a mask or a probability times 255",
            fix="divide the output by 255 in the network; or, if it is right, " + _SAY_KIND,
        )


def contradicts(planes: np.ndarray, kind: str) -> bool:
    """Whether values (C, h, w) cannot be of the ``kind`` that earlier values seemed to have. Then
    they are logits."""
    if planes.dtype.kind != "f" or kind == "logits":
        return False
    if kind == "labels":
        return bool((planes != np.rint(planes)).any())
    return bool(planes.min() < 0 or planes.max() > 1 + TOLERANCE)


def standard(planes: np.ndarray, kind: str | None, *, name: str = "the network") -> np.ndarray:
    """Convert an output to the form that bundles have.

    Parameters
    ----------
    planes : (C, h, w), the result of :meth:`Form.planes`.
    kind : the result of :func:`find_kind`.
    name : what messages call the network.

    Returns
    -------
    (C, h, w) float32 logits or probabilities of two and more classes: one channel becomes
    background and foreground. Or (h, w) int32 labels.

    Raises
    ------
    BundleError : the values are not what ``kind`` says, or are not finite.
    """
    if planes.dtype.kind != "f":
        if kind not in (None, "labels"):
            raise BundleError(
                f"{name} returned {planes.dtype} values, but is said to return {kind}",
                fix=_SAY_KIND,
            )
        low, high = int(planes.min()), int(planes.max())
        if low < -1 or high >= MOST_LABELS:
            raise BundleError(
                f"{name} returned labels from {low} to {high}; wanted -1 to {MOST_LABELS - 1}",
                fix="number the classes 0, 1, ... and use -1 for unknown",
            )
        return planes[0].astype(np.int32)
    if not np.isfinite(planes).all():
        raise BundleError(f"{name} returned NaN or infinite scores for this picture")
    if kind == "labels":
        low, high = planes.min(), planes.max()
        if len(planes) != 1 or (planes != np.rint(planes)).any() or low < -1 or high >= MOST_LABELS:
            raise BundleError(
                f"{name} returned values from {low:.3g} to {high:.3g} in {len(planes)} channels, "
                f"but is said to return labels; wanted whole numbers from -1 to {MOST_LABELS - 1}",
                fix=_SAY_KIND,
            )
        return planes[0].astype(np.int32)
    scores = planes.astype(np.float32)
    if kind == "logits":
        # The soft-max of (0, z) is (1 - sigmoid(z), sigmoid(z)).
        return scores if len(scores) > 1 else np.concatenate([np.zeros_like(scores), scores])
    if scores.min() < 0 or (scores.sum(0).min() <= 0 and len(scores) > 1):
        raise BundleError(
            f"{name} calls its output probabilities, but values are negative, or all zero",
            fix=_SAY_KIND,
        )
    if len(scores) > 1:
        return scores
    if scores.max() > 1:
        raise BundleError(
            f"{name} calls its output probabilities, but returned values up to {scores.max():.3g}",
            fix=_SAY_KIND,
        )
    return np.concatenate([1 - scores, scores])
