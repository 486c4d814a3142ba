"""The benchmark of the cache of features, with small views of a few made pictures."""

import json

import pytest

pytest.importorskip("torch", reason="needs PyTorch")

import torch
from tiny_features import seven_pictures, tiny_backbone

from benchmarks.__main__ import main
from benchmarks.speed import feature_cache
from export.backbones import load


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_measurement(tmp_path, monkeypatch, capsys, threads):
    monkeypatch.setattr(load, "load_backbone", lambda source: tiny_backbone())
    seven_pictures(tmp_path)
    out = tmp_path / "cache.json"
    words = f"--data {tmp_path / 'pictures'} --size 32 --batch 8 --repeats 1 --threads 1 -o {out}"
    assert main(["cache", *words.split()]) == 0
    written = json.loads(out.read_text())
    rows = {row["cache"]: row for row in written["cache"]}
    assert [*rows] == ["none", "filled", "full, first epoch", "full, later"]
    # 35 views are four whole batches of 8
    assert [len(row["seconds"]) for row in rows.values()] == [4, 4, 4, 8]
    assert written["bytes_per_view"] > 4 * 5 * 2 * 2
    assert f"{written['bytes_per_view']} bytes per view" in capsys.readouterr().out


def test_multiply_accumulates_are_counted():
    """A convolution of 3 to 5 channels, 16x16 taps, at 2x2 places."""
    assert feature_cache.multiply_accumulates(tiny_backbone().module, 32) == 4 * 5 * 3 * 16 * 16


def test_options_are_checked(tmp_path, monkeypatch, capsys, threads):
    seven_pictures(tmp_path)
    data = ["--data", str(tmp_path / "pictures"), "--size", "32"]
    for words, message in (
        ([*data, "--batch", "36"], "batch is 36; wanted 1 to 35, the number of views"),
        ([*data, "--repeats", "0"], "repeats is 0"),
        (["--data", str(tmp_path / "none")], "does not exist"),
    ):
        assert main(["cache", *words]) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setattr(feature_cache, "data_root", lambda: None)
    assert main(["cache"]) == 1
    assert "no pictures are named" in capsys.readouterr().err
