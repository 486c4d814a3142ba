"""Fixtures: the files of a short run of the profiler, and a clock that tests control."""

import time

import pytest


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """A folder with all exports of a short run."""
    from latency_parts import PICTURE

    from benchmarks import __main__ as command
    from sdk.image import encode_image

    folder = tmp_path_factory.mktemp("latency")
    (folder / "picture.png").write_bytes(encode_image(PICTURE, ".png"))
    argv = ["latency", "--picture", str(folder / "picture.png"), "--refine", "0,2", "--rate", "20"]
    argv += ["--duration", "0.7", "--threads", "1", "--percentile", "50,90", "-o", str(folder)]
    assert command.main(argv) == 0
    return folder


@pytest.fixture
def clock(monkeypatch):
    """A played clock: sleeping advances it at once, and reading it by a microsecond."""
    now = [0.0]

    def look():
        now[0] += 1e-6
        return now[0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", look)
    monkeypatch.setattr(time, "sleep", sleep)
