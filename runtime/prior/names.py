"""The names of a network's classes, in every spelling in which files and programs store them."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from runtime.checks import shown_value
from runtime.errors import InputError, first_line

_LONGEST = 2**20  # letters of a text, or bytes of a file, that contains names
_LONGEST_NAME = 200  # letters of a name that stands alone
# What a manifest does not store: control characters but tabs and line breaks, and half a pair of
# surrogates, which UTF-8 does not have.
_NO_LETTER = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
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
        names that are no texts or contain control characters.

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
                f"{where} has the class numbers {shown_value([*found])}; wanted each number from 0 "
                f"to {max(len(found) - 1, 0)} once",
                fix=_FIX,
            )
        names = [numbered[k] for k in range(len(numbered))]
    elif isinstance(found, Iterable) and not isinstance(found, (str, bytes, Set)):
        names = list(found)
    else:
        raise InputError(f"{where} is {shown_value(value)}; wanted {wanted}", fix=_FIX)
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"{where} is {shown_value(value)}; wanted {wanted}", fix=_FIX)
    names = [str(name) for name in names]  # NumPy's texts become Python's
    for number, name in enumerate(names):
        if _NO_LETTER.search(name):
            raise InputError(
                f"{where}: name {number} of {len(names)} is {name[:80]!a}, which contains "
                "control characters or broken letters",
                fix="write the name without them, in UTF-8",
            )
    return names


def names_in(text: str, where: str) -> list[str]:
    """Return the names of all classes in a text of a user: of metadata, an option or a file.

    Parameters
    ----------
    text : what :func:`class_names` reads; or a name in each line; or one line with commas between
        the names. One name is that of the foreground.
    where : what the message calls the text.

    Raises
    ------
    InputError : the text is broken JSON or contains something else, or a name is empty; also what
        :func:`class_names` raises.

    Example
    -------
    >>> names_in("road, sky", "names")
    ['road', 'sky']
    """
    plain = text.strip()
    try:
        found = _parsed(text, where)
    except InputError:
        if len(text) > _LONGEST or not plain or plain[0] in "[{(\"'":
            raise
        lines = plain.splitlines()
        found = [name.strip() for name in (lines if len(lines) > 1 else plain.split(","))]
        if not all(found):
            raise InputError(
                f"{where}: name {found.index('')} of {len(found)} is empty",
                fix="write a name for each class, in the order of the class numbers",
            ) from None
    return class_names(text if isinstance(found, str) else found, where)


def names_in_option(text: str) -> list[str]:
    """Return the names of all classes that the option --names contains, or the file that it names.

    Parameters
    ----------
    text : a file whose text :func:`names_in` reads; or such a text itself, with commas between the
        names or as JSON. One word that has no suffix and no slash is the name of the foreground.

    Raises
    ------
    InputError : the file cannot be read, or there are no names; also what :func:`names_in` raises.

    Example
    -------
    >>> names_in_option("road,sky")
    ['road', 'sky']
    """
    path = Path(text)
    if text.lstrip().startswith(("[", "{", "(")):
        return _nonempty(names_in(text, "names"), "names")
    if not os.path.isfile(text):  # False also for a text that is too long for a path
        is_word = text.isprintable() and len(text) <= _LONGEST_NAME
        if "," in text or (is_word and not path.suffix and not {"/", os.sep} & {*text}):
            return _nonempty(names_in(text, "names"), "names")
    try:
        with path.open("rb") as file:
            data = file.read(_LONGEST + 1)
        content = data.decode("utf-8-sig").rstrip()
    except (OSError, ValueError) as error:
        raise InputError(
            f"names is {text!r}, which is no list with commas and cannot be read as a file: "
            f"{first_line(error)}",
            fix="--names road,sky,tree or --names FILE with a name in each line",
        ) from error
    if len(data) > _LONGEST:
        raise InputError(f"{path} has more than {_LONGEST} bytes; wanted names of classes")
    return _nonempty(names_in(content, str(path)) if content else [], str(path))


def _nonempty(names: list[str], where: str) -> list[str]:
    """Return the names. InputError if there are none, or one of them is empty."""
    if not names:
        raise InputError(
            f"{where} contains no names of classes", fix="write a name for each class in a line"
        )
    if not all(names):
        raise InputError(
            f"{where}: name {names.index('')} of {len(names)} is empty",
            fix="write a name for each class, in the order of the class numbers",
        )
    return names


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
