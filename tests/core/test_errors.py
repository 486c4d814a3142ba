"""Errors that are pickled and copied: a pool of processes returns them as they were raised."""

import copy
import pickle

import pytest
from cases import case

import runtime.checks  # its subclass UnknownGuide is tested as well
from runtime.errors import BundleError, SdkError


def all_errors(kind=SdkError):
    return [kind, *(found for child in kind.__subclasses__() for found in all_errors(child))]


def parts(error):
    return type(error), error.message, error.fix, str(error), error.args, error.exit_code


def test_every_error_is_the_same_after_pickling_and_copying():
    kinds = all_errors()
    assert runtime.checks.UnknownGuide in kinds and BundleError in kinds and len(kinds) >= 8
    for kind in kinds:
        for error in (kind("a is b; wanted c", fix="use c"), kind("a is b"), kind("", fix="")):
            copies = [copy.copy(error), copy.deepcopy(error)]
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
                # Each process on the way of an error pickles it once more.
                once = pickle.loads(pickle.dumps(error, protocol))
                copies += [once, pickle.loads(pickle.dumps(once, protocol))]
            for found in copies:
                with case(kind.__name__, str(error)):
                    assert parts(found) == parts(error)


def test_attributes_that_a_user_adds_are_kept():
    error = BundleError("a is b")
    error.picture = "a.png"
    assert pickle.loads(pickle.dumps(error)).picture == "a.png"
    with pytest.raises(BundleError) as caught:
        raise pickle.loads(pickle.dumps(error))
    assert str(caught.value).count("fix:") == 1
