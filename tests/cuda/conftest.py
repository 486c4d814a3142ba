"""Fixtures of the tests of the CUDA module."""

import pytest
from cuda_build import load_setup
from foreign_arrays import Interface, Producer


@pytest.fixture(params=[Interface, Producer])
def wrap(request):
    """Make a foreign array on the GPU of a NumPy array."""
    return request.param


@pytest.fixture(scope="module")
def project():
    return load_setup()
