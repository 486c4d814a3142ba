"""The command adapt: which pictures are used, rows, tables, and a short run on made pictures."""

import json
from functools import partial
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from cases import case

pytest.importorskip("onnxruntime", reason="the prior runs on ONNX Runtime")
pytest.importorskip("torch", reason="the network is trained with PyTorch")
pytest.importorskip("onnx", reason="the prior is made with onnx")

from exporting import export
from one_layer_networks import nearest_colour, save
from trained_runs import mosaic

from benchmarks import __main__ as command
from benchmarks.quality import adapt, adapt_tables, datasets
from benchmarks.quality.adapt import Form, Scores
from runtime.core import parameters
from runtime.errors import SdkError
from sdk import RefineConfig, Segmenter

NAMES = ["sky", "road", "building", "vegetation"]  # the colours of mosaic, as Cityscapes' classes
CAMVID = np.uint8([datasets.CAMVID_CLASSES.index(n) for n in ("Sky", "Road", "Building", "Tree")])
PRIOR = "tiny.onnx"
DRIVES = {"0016E5": 6, "0006R0": 5, "0001TP": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set like CamVid and DAVIS, and a prior that knows the colours."""
    root = tmp_path_factory.mktemp("data")
    seed = 0
    for part, drives in (("train", DRIVES), ("val", {"0016E5": 2})):
        for drive, count in drives.items():
            for number in range(count):
                shot, truth = mosaic(seed := seed + 1, 64, 96)
                write(root / f"camvid/{part}/{drive}_{number:05}.png", shot[..., ::-1])
                write(root / f"camvid/{part}annot/{drive}_{number:05}.png", CAMVID[truth])
    for folder, sequences in (("davis", ("dog",)), ("davis_more", ("kite", "boat"))):
        for sequence in sequences:
            for number in range(40):
                name = f"{sequence}/{number:05}"
                write(root / folder / "frames" / f"{name}.jpg", np.zeros((4, 6, 3), np.uint8))
                write(root / folder / "masks" / f"{name}.png", np.zeros((4, 6), np.uint8))
    (root / "priors").mkdir()
    weight, bias = (part / 20 for part in nearest_colour())  # soft probabilities
    save(root / "priors" / PRIOR, weight, bias, classes=NAMES, size_multiple="32", output="logits")
    return root


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


@pytest.fixture
def small(data, monkeypatch):
    """The made data set, one case and one form."""
    monkeypatch.setenv("SEG_DATA", str(data))
    wanted = adapt.CASES["camvid s=0.5 one drive"]
    changed = adapt.Case(
        (PRIOR, (64, 96)), wanted.trained, wanted.tested, wanted.score, wanted.main
    )
    monkeypatch.setattr(adapt, "CASES", {"camvid s=0.5 one drive": changed})
    monkeypatch.setattr(adapt, "FORMS", (Form("plain", ("--epochs", "1")),))
    return changed


# Pictures


def names(pictures):
    return [picture.name for picture in pictures]


def test_drives_are_cut_into_parts_that_are_apart(small):
    assert names(adapt.drives("trained", "0016E5")) == ["0016E5_00000", "0016E5_00001",
                                                        "0016E5_00002"]  # fmt: skip
    assert names(adapt.drives("tested", "0016E5")) == ["0016E5_00004", "0016E5_00005"]
    trained, tested = (adapt.drives(part) for part in ("trained", "tested"))
    assert [len(part) for part in (trained, tested)] == [3 + 2 + 2, 2 + 2 + 1]
    assert not {*names(trained)} & {*names(tested)}
    assert small.sequences() == ["0016E5"]


def test_frames_of_the_lead_and_of_val(small, monkeypatch):
    monkeypatch.setattr(adapt, "LEAD", 3)
    assert names(adapt.lead_frames("trained")) == ["0016E5_00000", "0016E5_00002", "0016E5_00005"]
    assert {p.sequence for p in adapt.lead_frames("tested")} == {"0006R0", "0001TP"}
    assert names(datasets.camvid_val()) == ["0016E5_00000", "0016E5_00001"]
    assert datasets.camvid_val()[0].truth().max() < datasets.CAMVID_VOID


def test_frames_of_davis(small):
    trained = names(adapt.davis("trained"))
    assert len(trained) == 10 and trained[:3] == ["boat/00000", "boat/00004", "boat/00008"]
    tested = names(adapt.davis("tested"))
    assert tested[:4] == [f"boat/000{n}" for n in (30, 33, 36, 39)]
    assert tested[8:] == ["dog/00000", "dog/00009", "dog/00018", "dog/00027", "dog/00036"]


# Scores and rows


def test_the_score_of_a_frame_of_camvid(small):
    frame = adapt.drives("tested", "0016E5")[0]
    labels = np.searchsorted(np.sort(CAMVID), frame.truth())
    labels = np.argsort(CAMVID)[labels]
    assert adapt.score_camvid(labels, frame, NAMES)[:2] == (1.0, 1.0)
    labels[:32] = 9  # no class of the prior
    main, f, counts = adapt.score_camvid(labels, frame, [*NAMES, *"abcdef"])
    assert main == 0.5 and f < 1 and counts.sum() == 64 * 96


def test_the_foreground_of_davis_is_all_but_the_first_class(small, monkeypatch):
    frame = datasets.davis(40)[0]
    mask = np.zeros((4, 6), bool)
    mask[:, :2] = True
    monkeypatch.setattr(datasets.DavisFrame, "mask", lambda self: mask)
    labels = np.zeros((4, 6), np.int32)
    labels[:, :4] = 7
    main, _, counts = adapt.score_davis(labels, frame, [])
    assert main == 0.5 and counts == 0


def scores(*main):
    frames = [datasets.CamvidFrame(f"{d}_{i}", None, None) for i, d in enumerate("aab")]
    stages = {"refine": 2.0, "filter": 1.0, "postprocess": 0.5}
    counts = np.eye(12, 11, dtype=int)
    return [
        Scores(frame, score, 0.25, counts, stages)
        for frame, score in zip(frames, main, strict=True)
    ]


def test_a_row_compares_pictures_with_the_prior_and_cold_refinement():
    base = {"prior": [0.5, 0.6, 0.7], "cold": [0.6, 0.6, 0.9]}
    assert adapt.row("some", scores(0.7, 0.6, 0.8), base) == {
        "method": "some", "main": 0.7, "F": 0.25, "mIoU": 1.0, "in a": 0.65, "in b": 0.8,
        "wins prior": 2, "wins cold": 1, "worst": "b_2", "worst gain": -0.1, "ms": 3.5,
        "prior ms": None,
    }  # fmt: skip


def rows_of(method, *values, **more):
    return [{"method": method, "main": 0.5, "in a": a, "in b": b, **more} for a, b in values]


def test_gains_are_the_means_of_seeds_less_cold():
    trained = rows_of("x, 0 steps", (0.6, 0.9), (0.4, 0.7), form="x")
    cold = rows_of("cold", (0.4, 0.9))
    cases = {
        "one": {"own": ["a"], "rows": cold + trained},
        "two": {"own": ["a", "b"], "rows": rows_of("cold", (0.4, 0.6)) + trained},
        "fewer forms": {"own": ["a"], "rows": rows_of("x, 0 steps", (0, 0), form="x")},
    }
    assert adapt_tables.gains(cases) == [{
        "method": "x, 0 steps",
        "own: mean": "+0.1333", "own: worst": "+0.1000 (one, a)",
        "others: mean": "-0.1000", "others: worst": "-0.1000 (one, b)",
    }]  # fmt: skip


def test_the_packed_form_has_the_same_rows():
    rows = [{"method": "cold", "main": 0.5}, {"method": "x", "main": 0.25, "seed": 0}]
    document = {"environment": {}, "forms": {}}
    document["cases"] = {"one": {"main": "acc", "own": ["a"], "base": {}, "rows": rows}}
    small = json.loads(json.dumps(adapt_tables.packed(document)))
    assert small["tables"][0]["columns"] == ["main", "seed"]
    assert adapt_tables.unpacked(small) == document


# The labels


def test_refined_has_the_labels_of_a_bundle_with_the_same_weights(small, tmp_path):
    from safetensors.numpy import save as pack

    bench = adapt.Bench(small, tmp_path)
    bench.prepare()
    state = parameters.initial_state(RefineConfig(seed=5), len(NAMES))
    rng = np.random.default_rng(0)
    state |= {k: rng.normal(0, 0.5, state[k].shape).astype("f4") for k in state if "conv3" in k}
    weights = {k: np.asarray(v, order="C") for k, v in state.items() if "momentum" not in k}
    (tmp_path / "w.safetensors").write_bytes(pack(weights))
    prior, made = str(datasets.prior_path(PRIOR)), tmp_path / "trained.bundle"
    words = ["--model", prior, "--imgsz", "64", "96", "--init", str(tmp_path / "w.safetensors")]
    assert export(*words, "-o", str(made)).code == 0
    for steps in (0, 2):
        config = RefineConfig(steps=steps)
        seg = Segmenter(made, refine=config, threads=1)
        plain = Segmenter(bench.prior, refine=config, threads=1)
        for item, picture, guide in bench.pictures[:2]:
            labels, stages = adapt.refined(bench.pipeline, weights, config, picture, guide)
            with case(steps):
                np.testing.assert_array_equal(labels, seg(item.image()).labels)
                assert (labels != plain(item.image()).labels).any()
                assert {"refine", "filter", "postprocess"} <= {*stages}


# The command


def test_a_network_is_trained_and_scored_and_not_trained_again(
    small, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "a.json"
    words = ["adapt", "-o", str(out), "--seeds"]
    assert command.main([*words, "1"]) == 0
    table = capsys.readouterr().out
    document = adapt_tables.unpacked(json.loads(out.read_text()))
    rows = document["cases"]["camvid s=0.5 one drive"]["rows"]
    methods = ["prior", "prior + guided filter", "cold", "fast", "plain, 0 steps", "plain, 2 steps"]
    assert [row["method"] for row in rows] == methods
    assert rows[4]["seed"] == 1 and rows[4]["step"] == 3 and rows[4]["seconds"] > 0
    assert all(row["main"] > 0.5 for row in rows) and rows[0]["prior ms"] > 0
    assert "| plain, 0 steps " in table and "0001TP (not trained on)" in table
    before = out.read_bytes()
    monkeypatch.delattr(adapt.Bench, "prepare")
    assert command.main([*words, "1"]) == 0
    assert out.read_bytes() == before
    capsys.readouterr()
    assert command.main(["adapt", "--table", str(out)]) == 0
    assert capsys.readouterr().out == table


@pytest.fixture
def played(small, monkeypatch):
    """Trainings and scorings that only note what is asked of them. After ``left`` scorings, Ctrl-C
    is pressed."""
    notes = SimpleNamespace(left=99, seeds=[], steps=[])

    def run_module(what, *words):
        notes.seeds.append(words[words.index("--seed") + 1])

    def scored(self, segment):
        if not notes.left:
            raise KeyboardInterrupt
        notes.left -= 1
        if isinstance(segment, partial):  # of a trained network
            notes.steps.append(segment.args[2].steps)
        return scores(0.5, 0.6, 0.7)

    monkeypatch.setattr(adapt.Bench, "prepare", lambda self: None)
    monkeypatch.setattr(adapt.Bench, "segmenter", lambda self, **_: None)
    monkeypatch.setattr(adapt.Bench, "prior", None, raising=False)
    monkeypatch.setattr(adapt.Bench, "pipeline", None, raising=False)
    monkeypatch.setattr(adapt.Bench, "scored", scored)
    monkeypatch.setattr(adapt, "run_module", run_module)
    head = SimpleNamespace(head=lambda: ({}, 3))
    monkeypatch.setattr("export.train.run.open_run", lambda run: head)
    return notes


def test_each_training_has_its_seed_and_each_row_its_steps(played):
    cases = {}
    names = list(adapt.CASES)
    rows = [row for _, row in adapt.measure(names, ["plain"], [0, 2], cases) if "seed" in row]
    assert played.seeds == [0, 2] and played.steps == [0, 2, 10, 0, 2]
    assert [(row["seed"], row["steps"]) for row in rows] == [
        (0, 0), (0, 2), (0, 10), (2, 0), (2, 2)
    ]  # fmt: skip


def test_each_row_survives_an_interruption(played, tmp_path, capsys):
    """The first start ends before there is a row, since each row is compared with the prior and
    cold refinement. Each further start ends after one row."""
    out, found = tmp_path / "a.json", []
    methods = [*adapt.UNTRAINED, "plain, 0 steps", "plain, 2 steps", "plain, 10 steps"]
    for start, played.left in enumerate((1, 2, 1, 1, 1, 1, 1, 1)):
        code = command.main(["adapt", "-o", str(out), "--seeds", "0"])
        with case(start):
            assert code == (130 if start < 7 else 0)
            assert out.exists() == (start > 0)
            if start:
                known = adapt_tables.unpacked(json.loads(out.read_text()))["cases"]
                rows = known["camvid s=0.5 one drive"]["rows"]
                assert [row["method"] for row in rows] == methods[:start]
                assert rows[: start - 1] == found
                found = rows
    assert played.seeds == [0] * 4  # in starts 4 to 7: after the row "fast", and for each later row


def test_results_of_other_forms_are_refused(small, tmp_path, capsys, monkeypatch):
    out = tmp_path / "a.json"
    document = {"environment": {}, "forms": {"plain": "--epochs 9"}, "tables": []}
    out.write_text(json.dumps(document))
    assert command.main(["adapt", "-o", str(out)]) == 1
    assert "has results of other forms" in capsys.readouterr().err


def test_a_prior_that_cannot_be_exported_is_one_error(small, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "prior_path", lambda name: tmp_path / "nothing.onnx")
    with pytest.raises(SdkError, match=r"the export of the prior ended with 1: error: .*nothing"):
        adapt.Bench(small, tmp_path).prepare()


def test_wrong_words_are_refused(tmp_path, capsys):
    (tmp_path / "a.json").write_text('{"tables": [{}]}')
    for words, message in (
        (["--cases", "city"], "cases has 'city'; wanted some of camvid s=0.5 all drives, "),
        (["--forms", "plain,x"], "forms has 'x'; wanted some of plain, "),
        (["--seeds", "0,x"], "'0,x' is no list of different seeds"),
        (["--table", str(tmp_path / "a.json")], "is no result of this command"),
        (["--table", str(tmp_path / "b.json")], "does not exist"),
    ):
        with case(message):
            try:
                code = command.main(["adapt", *words])
            except SystemExit as end:
                code = end.code
            assert code != 0 and message in capsys.readouterr().err
