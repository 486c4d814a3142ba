"""The mark of tests that need the developer data set."""

import pytest

from benchmarks.quality import datasets

needs_data = pytest.mark.skipif(
    datasets.data_root() is None, reason="developer data set absent: set SEG_DATA=/path/to/data"
)
