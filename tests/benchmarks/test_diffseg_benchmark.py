"""The benchmark of DiffSeg, on a small latent grid."""

import json

import pytest

pytest.importorskip("torch", reason="needs PyTorch")

import torch

from benchmarks.__main__ import main
from benchmarks.speed import diffseg
from runtime.errors import VerificationFailed


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_measurement(tmp_path, capsys):
    out = tmp_path / "diffseg.json"
    words = f"diffseg --grid 8x16 --heads 2 --repeats 2 --threads 1 -o {out}"
    assert main(words.split()) == 0
    written = json.loads(out.read_text())
    assert written["grid"] == [8, 16] and written["heads"] == 2
    rows = {row["stage"]: row for row in written["rows"]}
    assert list(rows)[:3] == ["attention without maps", "attention and its sums", "aggregation"]
    assert all(len(row["seconds"]) == 2 for row in rows.values())
    assert rows["the whole merging"]["segments"] > 1
    assert "| distances of the anchors |" in capsys.readouterr().out


def test_the_layers_are_those_of_stable_diffusion_1():
    found = [
        (*query.shape, layer[2])
        for query, layer in zip(diffseg.made_layers(64, 64, 8), diffseg.LAYERS, strict=True)
    ]
    wanted = [(8, 4096, 40, 5), (8, 1024, 80, 5), (8, 256, 160, 5), (8, 64, 160, 1)]
    assert found == wanted


def test_a_wrong_aggregate_is_no_measurement(monkeypatch):
    from export.guides.attention import AttentionSum

    own = AttentionSum.aggregate
    monkeypatch.setattr(AttentionSum, "aggregate", lambda self: own(self) * 1.01)
    with pytest.raises(VerificationFailed, match="rows of the aggregate sum to 1 up to 0"):
        diffseg.measure(8, 8, 1, 1)


def test_options_are_checked(capsys):
    for words, code, message in (
        (["--grid", "64"], 2, "grid is '64'; wanted two numbers"),
        (["--grid", "60x64"], 2, "grid is 60x64; wanted multiples of 8"),
        (["--grid", "0x64"], 2, "grid is 0; wanted 8 to 256"),
        (["--heads", "0"], 1, "heads is 0"),
        (["--repeats", "0"], 1, "repeats is 0"),
        (["--threads", "0"], 1, "threads is 0"),
    ):
        try:
            assert main(["diffseg", *words]) == code, words
        except SystemExit as end:
            assert end.code == code, words
        assert message in capsys.readouterr().err, words
