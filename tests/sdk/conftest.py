"""Fixtures of the tests of the SDK."""

import pytest
from dg_commands import picture_file


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty current folder with one picture, good.png."""
    monkeypatch.chdir(tmp_path)
    picture_file(tmp_path / "good.png")
    return tmp_path
