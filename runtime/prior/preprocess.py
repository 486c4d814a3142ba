"""From a picture to a network's input tensor, by the rule that the manifest contains.

The export's checks, the golden vectors and the SDK all call :class:`Preprocess`, which uses OpenCV.
Another program can compute the same numbers from the manifest alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from runtime.checks import as_number, as_numbers, is_count
from runtime.core.resize import resize
from runtime.errors import BundleError, InputError

MAX_SIDE = 2**15  # the longest side of a network's input
MAX_PIXELS = 2**26  # the most pixels of a network's input
_LONGEST = 1000  # letters of a text of numbers
_EXPORT = "export the bundle again"
_FORMS = {  # an example of the text of each metadata key
    "mean": "[0.485, 0.456, 0.406]",
    "std": "[0.229, 0.224, 0.225]",
    "input_size": '{"width": 512, "height": 256}',
    "size_multiple": "32",
    "minimum_size": "32",
    "input_layout": "NCHW RGB",
}


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Resize a picture, order its colours, scale to [0, 1], normalise, and return (1, 3, h, w).

    Parameters
    ----------
    mean, std : of the colours with which the network was trained, for values in [0, 1], in the
        order of ``color``: x = (value / 255 - mean) / std.
    color : "rgb" or "bgr", the order of the input's planes.
    resize : "stretch" to (height, width), whatever the picture's aspect ratio is; or "long_side",
        which keeps the ratio: the long side becomes ``long_side``, then both sides are rounded to a
        multiple of ``multiple`` and are at least ``minimum``.
    interpolation : "area": 8-bit pixels are averaged (cv2.INTER_AREA) if no side grows, else
        interpolated bilinearly between pixel centres (cv2.INTER_LINEAR).
    height, width : of the input in pixels, for "stretch".
    long_side, multiple, minimum : in pixels, for "long_side".

    Raises
    ------
    InputError : a value of another kind or out of range.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    color: str = "rgb"
    resize: str = "stretch"
    interpolation: str = "area"
    height: int | None = None
    width: int | None = None
    long_side: int = 512
    multiple: int = 1
    minimum: int = 1

    def __post_init__(self) -> None:
        for name, allowed in (
            ("color", ("rgb", "bgr")),
            ("resize", ("stretch", "long_side")),
            ("interpolation", ("area",)),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}; wanted one of {allowed}")
        for name in ("mean", "std"):
            object.__setattr__(self, name, _triple(name, getattr(self, name)))
        for name in ("height", "width", "long_side", "multiple", "minimum"):
            object.__setattr__(self, name, as_numbers(getattr(self, name)))
        sides: list[Any] = [self.long_side, self.multiple, self.minimum]
        own = [self.height, self.width]
        if self.resize == "stretch" or own != [None, None]:
            sides += own
        if not are_sides(sides):
            raise InputError(
                f"height, width, long_side, multiple, minimum are {self.height}, {self.width}, "
                f"{self.long_side}, {self.multiple}, {self.minimum}; wanted 1 to {MAX_SIDE}"
            )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the input's (h, w) for a picture of (height, width) pixels.

        Raises
        ------
        InputError : the input would have more than MAX_PIXELS pixels.
        """
        if self.height and self.width and self.resize == "stretch":
            h, w = self.height, self.width
        else:
            scale = self.long_side / max(height, width)
            least = math.ceil(self.minimum / self.multiple) * self.multiple
            h, w = (
                max(least, round(n * scale / self.multiple) * self.multiple)
                for n in (height, width)
            )
        if h * w > MAX_PIXELS:
            raise InputError(
                f"the network's input would have {h} x {w} pixels; at most {MAX_PIXELS}",
                fix="choose a smaller imgsz",
            )
        return h, w

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """Convert (H, W, 3) uint8 RGB to the input, (1, 3, h, w) float32, C-contiguous."""
        x = resize(picture, *self.size(*picture.shape[:2])).astype(np.float32) / 255
        if self.color == "bgr":
            x = x[..., ::-1]
        x = (x - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(x.transpose(2, 0, 1)[None])

    def to_manifest(self) -> dict[str, Any]:
        """Return the manifest's entry ``preprocess``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {
            "mean": list(self.mean),
            "std": list(self.std),
            "layout": "NCHW float32",
            "order": "resize, 1/255, normalise",
        }

    @classmethod
    def from_manifest(cls, entry: Mapping[str, Any]) -> Preprocess:
        """Make a Preprocess from the result of :meth:`to_manifest`.

        Raises
        ------
        BundleError : the entry lacks a key, or has an unknown key or value.
        """
        wanted = {f.name for f in fields(cls)} | {"layout", "order"}
        if not isinstance(entry, Mapping) or set(entry) != wanted:
            raise BundleError(
                f"manifest: preprocess has {str(sorted(entry) if entry else entry)[:300]}; "
                f"wanted {', '.join(sorted(wanted))}",
                fix=_EXPORT,
            )
        try:
            own = cls(**{k: v for k, v in entry.items() if k not in ("layout", "order")})
        except InputError as error:
            raise BundleError(f"manifest: preprocess: {_line(error)}", fix=_EXPORT) from error
        if own.to_manifest() != dict(entry):
            raise BundleError(
                "manifest: preprocess names an order or layout that this version does not know",
                fix=f"{_EXPORT}, or update the SDK",
            )
        return own

    @classmethod
    def from_metadata(
        cls,
        metadata: Mapping[str, str],
        name: str,
        fixed: tuple[int, int] | None = None,
    ) -> Preprocess:
        """Make a Preprocess from the metadata_props of an ONNX file.

        :func:`numbers_in` reads ``mean`` and ``std``, which are required. Optional are, as JSON,
        ``input_size`` ({"width", "height"}; its longer side becomes ``long_side``, by default 512),
        ``size_multiple`` and ``minimum_size`` (by default 1), and ``input_layout`` (a text that
        contains BGR if the planes have this order).

        Parameters
        ----------
        name : the name of the file in messages.
        fixed : the input's (height, width) if the file fixes it, else None.

        Raises
        ------
        BundleError : a key is missing or has a wrong value, or ``fixed`` is out of range.
        """
        size = read_json(metadata, name, "input_size", {"width": 512, "height": 512})
        sides: list[Any] = [*size.values()] if isinstance(size, dict) else [None]
        known = isinstance(size, dict) and set(size) <= {"width", "height"}
        if not known or not sides or not are_sides(sides):
            raise BundleError(
                f"{name}: metadata 'input_size' is {_shown(metadata['input_size'])}; "
                f'wanted {{"width": W, "height": H}}, 1 to {MAX_SIDE}',
                fix=_set("input_size"),
            )
        numbers = {}
        for key in ("size_multiple", "minimum_size"):
            numbers[key] = read_json(metadata, name, key, 1)
            if not are_sides([numbers[key]]):
                raise BundleError(
                    f"{name}: metadata {key!r} is {_shown(metadata[key])}; wanted a number, "
                    f"1 to {MAX_SIDE}",
                    fix=_set(key),
                )
        triples = {}
        for key in ("mean", "std"):
            text = metadata.get(key)
            if text is None:
                raise BundleError(
                    f"{name} does not say how to normalise pictures: metadata {key!r} is missing",
                    fix=f"freeze it with python -m export --model {name} --mean R,G,B --std R,G,B; "
                    f"or add it, e.g. model.metadata_props.add(key='{key}', value='{_FORMS[key]}')",
                )
            values = numbers_in(text)
            try:
                triples[key] = _triple(key, values)
            except InputError as error:
                wanted = error.message.rpartition("; ")[2]
                raise BundleError(
                    f"{name}: metadata {key!r} is {_shown(text)}; {wanted}",
                    fix=_set(key) if values is None else error.fix,
                ) from error
        if fixed and not are_sides([*fixed]):
            raise BundleError(
                f"{name} has a fixed input of {fixed[0]} x {fixed[1]}; wanted 1 to {MAX_SIDE}",
                fix="export it with another size"
                if min(fixed) > 0
                else f"0 stands for a free size; python -m export --model {name} sets a size",
            )
        return cls(
            mean=triples["mean"],
            std=triples["std"],
            color=_color(metadata.get("input_layout", ""), name),
            resize="stretch" if fixed else "long_side",
            height=fixed[0] if fixed else None,
            width=fixed[1] if fixed else None,
            long_side=max(sides),
            multiple=numbers["size_multiple"],
            minimum=numbers["minimum_size"],
        )


def numbers_in(text: str) -> tuple[float, ...] | None:
    """Return the numbers in a text, or None if a word of the text is no number.

    Parameters
    ----------
    text : numbers with commas or spaces between them, in brackets or without, for example
        "[0.5, 0.5, 0.5]", "(0.5, 0.5, 0.5)", "0.5,0.5,0.5" or "0.5 0.5 0.5".

    Example
    -------
    >>> numbers_in("0.485,0.456,0.406")
    (0.485, 0.456, 0.406)
    """
    inner = text.strip() if len(text) <= _LONGEST else ""
    if inner[:1] + inner[-1:] in ("[]", "()"):
        inner = inner[1:-1]
    if not inner.isascii() or "_" in inner:  # float accepts digits of other scripts, and 1_0
        return None
    try:
        return tuple(map(float, re.split(r"[\s,]+", inner.strip(", \t\r\n"))))
    except ValueError:
        return None


def _color(layout: str, name: str) -> str:
    """Return "rgb" or "bgr", the order of the planes that the metadata ``input_layout`` names."""
    words = re.findall("[a-z]+", layout.lower())
    orders = {word for word in words if sorted(word) == ["b", "g", "r"]}
    if "nhwc" in words or len(orders) > 1 or not orders <= {"rgb", "bgr"}:
        raise BundleError(
            f"{name}: metadata 'input_layout' is {layout[:80]!r}; wanted 'NCHW RGB' or 'NCHW BGR'",
            fix=_set("input_layout"),
        )
    return orders.pop() if orders else "rgb"


def read_json(metadata: Mapping[str, str], name: str, key: str, default: Any) -> Any:
    """Return the JSON value of a metadata key, or ``default`` if the key is missing.

    Raises
    ------
    BundleError : the value is no JSON; the message calls the file ``name``.
    """
    text = metadata.get(key)
    if text is None:
        return default
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{name}: metadata {key!r} is no JSON: {text[:80]!r}", fix=_set(key)
        ) from error


def _shown(text: str) -> str:
    """Return the beginning of a file's text, in quotes if it has line breaks or control
    characters."""
    return text[:80] if text[:80].isprintable() else repr(text[:80])


def _set(key: str) -> str:
    """Return the fix for a wrong value of a metadata key: an example, and how it is set."""
    return (
        f"for entry in model.metadata_props: if entry.key == {key!r}, set entry.value = "
        f"{_FORMS[key]!r}, for example; docs/refine.md lists the keys"
    )


def _line(error: InputError) -> str:
    """Return the message without the fix. It is cut after 300 characters, because it contains
    values of the file, which may be long."""
    return error.message[:300]


def are_sides(values: list[Any]) -> bool:
    """Whether all values are whole numbers from 1 to MAX_SIDE."""
    return all(is_count(n, 1, MAX_SIDE) for n in values)


def _triple(name: str, value: Any) -> tuple[float, float, float]:
    """Check ``mean`` or ``std``, a list, a tuple or an array of three numbers, and return it as a
    tuple."""
    value = as_numbers(value)
    given = value if isinstance(value, tuple) else ()
    if len(given) != 3 or any(as_number(n) is None for n in given):
        raise InputError(f"{name} is {value}; wanted three numbers", fix="one for each colour")
    numbers = [float(n) if abs(n) < 1e9 else math.inf for n in given]  # NaN becomes inf
    if math.inf in numbers or (name == "std" and min(numbers) <= 0):
        wanted = "finite numbers" if math.inf in numbers else "numbers above 0"
        raise InputError(
            f"{name} is {value}; wanted {wanted}",
            fix="take the numbers of the training code; without any, mean is 0 and std is 1",
        )
    if max(abs(n) for n in numbers) > 10:
        raise InputError(
            f"{name} is {value}; wanted numbers for values in [0, 1]", fix="divide them by 255"
        )
    return numbers[0], numbers[1], numbers[2]
