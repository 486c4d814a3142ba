"""The names of a network's classes, in every spelling in which files and programs store them."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping, Set
from typing import Any

from runtime.errors import InputError

_LONGEST = 2**20  # letters of a text that contains names
_FIX = 'write them as a JSON list in the order of the class numbers: ["road", "sky"]'


def class_names(value: Any, where: str) -> list[str]:
    """Return the names of all classes, in the order of the class numbers.

    Parameters
    ----------
    value : a list (or another ordered iterable) of texts; a dict whose keys are the class numbers 0
        to n - 1, as int or as digits, and whose values are texts; a dict that has such a dict
        as "id2label"; or a text that contains one of these as JSON or as a Python literal, for
        example ``{0: 'road', 1: 'sky'}``.
    where : what the message calls the value, for example "x.onnx: metadata 'names'".

    Raises
    ------
    InputError : another kind of value, a set (which has no order), class numbers with gaps, or
        names that are no texts.

    Example
    -------
    >>> class_names({"1": "sky", "0": "road"}, "names")
    ['road', 'sky']
    """
    wanted = "a list of texts, or a dict of class number and text"
    found = _parsed(value, where) if isinstance(value, str) else value
    if isinstance(found, Mapping) and "id2label" in found:  # config.json of Hugging Face
        found = found["id2label"]
    if isinstance(found, Mapping):
        numbered = {_number(key): name for key, name in found.items()}
        if len(numbered) != len(found) or set(numbered) != set(range(len(numbered))):
            raise InputError(
                f"{where} has the class numbers {str([*found])[:200]}; wanted each number from 0 "
                f"to {max(len(found) - 1, 0)} once",
                fix=_FIX,
            )
        names = [numbered[k] for k in range(len(numbered))]
    elif isinstance(found, Iterable) and not isinstance(found, (str, bytes, Set)):
        names = list(found)
    else:
        raise InputError(f"{where} is {str(value)[:200]!r}; wanted {wanted}", fix=_FIX)
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"{where} is {str(value)[:200]}; wanted {wanted}", fix=_FIX)
    return [str(name) for name in names]  # NumPy's texts become Python's


def _parsed(text: str, where: str) -> Any:
    """Return the value of a text that is JSON or a Python literal."""
    for read in (json.loads, ast.literal_eval) if len(text) <= _LONGEST else ():
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    raise InputError(
        f"{where} is {text[:80]!r}, which is neither JSON nor a Python literal", fix=_FIX
    )


def _number(key: Any) -> int:
    """Return the class number that a key of a dict contains, or -1 if it contains none."""
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 6:
        return int(key)
    return key if isinstance(key, int) and not isinstance(key, bool) else -1
