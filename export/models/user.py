"""A prior of the user's own, named as module:function."""

from __future__ import annotations

import inspect
import pkgutil

from export.models.base import PriorModel
from runtime.errors import InputError


def users_own(text: str, imgsz: tuple[int, int] | None) -> PriorModel:
    """The prior that a function of the user's own makes.

    Parameters
    ----------
    text : "module:function".
    imgsz : (height, width) in pixels, which the function is called with; or None.

    Raises
    ------
    InputError : no such function, one that does not take the size, or one that returns no
        PriorModel.

    Example
    -------
    >>> users_own("networks:tiny", (360, 480)).name  # networks.py has a function tiny(imgsz)
    'tiny'
    """
    try:
        function = pkgutil.resolve_name(text)
    except AttributeError as error:
        raise InputError(
            f"model is {text!r}: {error}", fix="name a function that the module defines"
        ) from error
    except (ImportError, ValueError) as error:
        raise InputError(
            f"model is {text!r}, which cannot be imported: {error}",
            fix="run from the folder of the module, or add that folder to PYTHONPATH",
        ) from error
    if not callable(function):
        raise InputError(
            f"model {text!r} is a {type(function).__name__}; wanted a function",
            fix="def NAME(imgsz): ... return PriorModel(...)",
        )
    try:
        inspect.signature(function).bind(imgsz)
    except TypeError as error:
        raise InputError(
            f"{text} cannot be called with the input size: {error}",
            fix="def NAME(imgsz): imgsz is (height, width) or None",
        ) from error
    model = function(imgsz)
    if not isinstance(model, PriorModel):
        raise InputError(
            f"{text} returned a {type(model).__name__}; wanted an export.models.PriorModel",
            fix="return PriorModel(name=..., module=..., preprocess=...)",
        )
    return model
