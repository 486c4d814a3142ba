"""Name the cases of a loop inside one test."""

import contextlib

import numpy as np
import pytest


def text(part):
    """Return a part of a name: the numbers of a tuple are joined with "x"."""
    return "x".join(map(str, part)) if isinstance(part, tuple) else str(part)


@contextlib.contextmanager
def case(*parts):
    """Put the name of a case before the message of a failure in its block.

    ``parts`` are tuples, as a shape is, and other values: ``case((13, 7, 3), "relu")`` is the case
    "13x7x3, relu". A failure is an AssertionError, or a pytest.raises whose block raised nothing.
    The context manager returns a new random generator with a fixed seed, so that a case draws the
    same numbers whichever cases ran before it.
    """
    try:
        yield np.random.default_rng(0)
    except (AssertionError, pytest.fail.Exception) as error:
        raise AssertionError(f"{', '.join(map(text, parts))}: {error}") from error
