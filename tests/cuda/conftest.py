"""Fixtures of the tests of the CUDA module."""

import pytest
from cuda_build import load_setup


@pytest.fixture(scope="module")
def project():
    return load_setup()
