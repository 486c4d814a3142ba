"""Fixtures that all tests share.

This file and the modules of tests/support that it imports need NumPy, pytest and runtime only:
tests/rules/aarch64.sh runs tests where nothing else is installed.
"""

import os
import signal

import numpy as np
import pytest
from cuda_module import cuda, cuda_path, cudart  # noqa: F401  (fixtures)
from exactness import (  # noqa: F401 (imported from here by tests that are about to move)
    EPS32,
    assert_as_exact_as_float32,
    relative_error,
    wide,
)
from scenes import scene  # noqa: F401
from skips import StrictSkips

import runtime

# A runner that is a background job ignores Ctrl-C, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    if os.environ.get("SEG_STRICT_SKIPS", "0") not in ("", "0"):
        config.pluginmanager.register(StrictSkips())


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(params=runtime.isas())
def isa(request):
    """Name each instruction set that this machine runs."""
    return request.param
