"""The command line of the methods beside SegUnify: what they share with it, what they have not, and
that a run that is interrupted and resumed equals, bit for bit, one that is not.

The backbone and the prior are tiny networks without trained weights.
"""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from training import draw_pictures, log_rows, train

from export.train.boosting import Boosting
from export.train.refine import Refine
from export.train.run import BEST, ENTRY, read_checkpoint, read_entry

pytest.importorskip("onnxruntime", reason="the prior's guides are computed by ONNX Runtime")
pytest.importorskip("onnx", reason="the prior is made with onnx")

from one_layer_networks import nearest_colour, save

METHODS = {"boosting": Boosting, "refine": Refine}
PARTS = {"boosting": {"backbone", "views"}, "refine": {"prior"}}
SELECT = ("--select", "energy", "--holdout", "0.25", "--every", "2", "--log-every", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("methods")


@pytest.fixture(scope="module")
def data(folder):
    return draw_pictures(folder / "pictures", 12)


@pytest.fixture(scope="module")
def words(folder, data):
    """{method: the words of a short training}."""
    prior = save(folder / "prior.onnx", *nearest_colour())
    common = ("--data", data, "--threads", "1", "--no-cache", "-q", *SELECT)
    return {
        "boosting": (*common, "--features", "keys", "--imgsz", "32", "--batch", "2"),
        "refine": (*common, "--model", prior, "--channels", "8", "--augment", "light"),
    }


def start(words, method, out, *more):
    """Train without an error; returns the folder of the run."""
    ended = train(method, *words[method], "-o", out, *more)
    assert ended.code == 0, ended.err
    return out


@pytest.fixture(scope="module")
def whole(words, folder):
    """{method: a run of 4 steps without an interruption}."""
    return {m: start(words, m, folder / f"{m} whole", "--steps", "4") for m in METHODS}


def same(run, other):
    for file in ("checkpoint.safetensors", BEST):
        ours, wanted = read_checkpoint(run, file), read_checkpoint(other, file)
        assert ours.tensors.keys() == wanted.tensors.keys()
        for key, array in wanted.tensors.items():
            np.testing.assert_array_equal(ours.tensors[key], array, strict=True, err_msg=key)
        for key in ("step", "losses", "log", "best", "broken", "optimiser"):
            assert ours.state[key] == wanted.state[key], key
    assert log_rows(run) == log_rows(other)
    return True


@pytest.mark.parametrize("method", METHODS)
def test_a_signal_in_each_step_changes_no_bit(words, whole, tmp_path, monkeypatch, method):
    run, kind = tmp_path / "run", METHODS[method]
    before_update = kind.before_update

    def interrupt(self):
        os.kill(os.getpid(), signal.SIGINT)
        before_update(self)

    monkeypatch.setattr(kind, "before_update", interrupt)
    for step in range(1, 5):
        more = ("--resume",) if step > 1 else ()
        ended = train(method, *words[method], "-o", run, "--steps", "4", *more)
        assert ended.code == (130 if step < 4 else 0), ended.err
        assert read_checkpoint(run).step == step
    assert same(run, whole[method])


@pytest.mark.parametrize("method", METHODS)
def test_other_processes_change_no_bit(words, whole, tmp_path, method):
    run = start(words, method, tmp_path / "run", "--steps", "4", "--workers", "1")
    assert same(run, whole[method])


@pytest.mark.parametrize("method", METHODS)
def test_run_json_has_the_frozen_network_of_the_method(whole, words, method):
    entry = read_entry(whole[method])
    assert PARTS[method] == entry.keys() & {"backbone", "views", "prior"}
    assert entry["method"] == method and entry["loop"]["labels"] is None
    assert not entry["options"].keys() & {"backbone", "features", "imgsz", "crops"}


def test_a_run_of_boosting_with_crops_as_older_versions_wrote_it(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole["boosting"], run)
    entry = json.loads((run / ENTRY).read_text())
    assert entry["views"] == {"size": 32}
    entry["views"]["crops"] = "centre"
    (run / ENTRY).write_text(json.dumps(entry))
    assert train("boosting", "-o", run, "--resume", "--steps", "5", "-q").code == 0
    assert read_checkpoint(run).step == 5
    assert json.loads((run / ENTRY).read_text())["views"] == {"size": 32}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_done_next(words, tmp_path, method):
    run = tmp_path / "run"
    text = start_text(words, method, run)
    assert "train name" not in text
    assert f"next     python -m export --model {run} -o NAME.bundle" in text
    assert "selected step " in text and ": energy " in text
    ended = train("name", run, "--labels", "no", "--classes", "no")
    assert ended.refused(
        1, f"is a run of {method}; only runs of segunify", "--model", "NAME.bundle"
    )


def start_text(words, method, run):
    return train(method, *words[method], "-o", run, "--steps", "2").out


def test_epochs_are_passes_over_all_views_to_train_on(words, tmp_path):
    """12 pictures, of which 3 are held out."""
    for method, more, steps in (
        ("boosting", ("--epochs", "1", "--batch", "6"), 2),
        ("refine", ("--epochs", "1"), 9),
    ):
        run = start(words, method, tmp_path / f"{method} {steps}", *more)
        assert read_entry(run)["loop"]["steps"] == steps, (method, more)
    assert read_checkpoint(run).step == 9
    again = train("refine", *words["refine"], "-o", run, "--resume", "--epochs", "1")
    assert again.code == 0 and "nothing was trained" in again.out
    again = train("refine", "-o", run, "--resume", "--epochs", "2", "-q")
    assert again.code == 0 and read_checkpoint(run).step == 18
    assert train("refine", "-o", run, "--resume", "--steps", "9").refused(1, "started with 18")
    assert train("refine", "-o", run, "--resume", "--epochs", "1").refused(1, "steps is 9")
    for text, fix in (("0", "--epochs 1"), ("-1", "--epochs 1")):
        ended = train("refine", *words["refine"], "-o", tmp_path / "no", "--epochs", text)
        assert ended.refused(1, f"epochs is {text}; wanted at least 1", fix)
    ended = train("refine", *words["refine"], "-o", run, "--epochs", "4", "--steps", "4")
    assert ended.refused(2, "not allowed with argument")


def test_epochs_count_the_views_of_a_picture(data, tmp_path):
    words = ("--imgsz", "32", "--clusters", "3", "--dim", "4", "--intra-shift", "0.3", "-q")
    words += ("--inter-shift", "0.5", "--threads", "1", "--no-cache", "--data", data)
    run = tmp_path / "run"
    more = ("-o", run, "--crops", "five", "--epochs", "1", "--batch", "16")
    assert train("segunify", *words, *more).code == 0
    assert read_entry(run)["loop"]["steps"] == 4  # of 60 views


def test_the_defaults_are_those_of_the_method():
    for method, parts in (
        ("segunify", ("updates (3000)", "views in a step (32)", "learning rate (0.0001)")),
        ("boosting", ("updates (", "views in a step (8)", "learning rate (0.0001)")),
        ("refine", ("instead of --steps (4)", "views in a step (1)", "learning rate (0.05)")),
    ):
        text = " ".join(train(method, "--help").out.split())
        for part in parts:
            assert part in text, (method, part)


def test_a_method_has_no_options_of_others(words, tmp_path):
    for method, more in (
        ("boosting", ("--crops", "five")),
        ("boosting", ("--labels", "x")),
        ("boosting", ("--select", "cold")),
        ("refine", ("--backbone", "x")),
        ("refine", ("--imgsz", "32")),
        ("refine", ("--select", "labels")),
        ("segunify", ("--model", "x")),
        ("segunify", ("--select", "cold")),
    ):
        assert train(method, "-o", tmp_path / "no", *more).code == 2, (method, more)


def change(run, part, **fields):
    """A copy of run.json with other fields of one part."""
    entry = json.loads((run / "run.json").read_text())
    return entry | {part: entry[part] | fields}


HOSTILE = [
    ("refine", "prior", {"sha256": "x"}, "prior: sha256 is 'x'; wanted 64 hexadecimal digits"),
    ("refine", "prior", {"stated": {"more": "x"}}, "prior: stated is"),
    ("refine", "prior", {"stated": {"mean": "x"}}, "prior: stated is"),
    ("refine", "prior", {"classes": 1}, "prior: classes is 1; wanted 2 to 4096"),
    ("refine", "prior", {"classes": 65536}, "prior: classes is 65536; wanted 2 to 4096"),
    ("refine", "prior", {"sizes": [[7, 9]]}, "prior: sizes: no picture has 7 x 9 pixels"),
    ("refine", "prior", {"sizes": []}, "prior: sizes is []; wanted a list of [height, width]"),
    ("refine", "prior", {"sizes": [[48]]}, "prior: sizes is [[48]]; wanted"),
    ("refine", "prior", {"sizes": [[48, 0]]}, "prior: sizes is [[48, 0]]; wanted"),
    ("refine", "prior", {"more": 1}, "prior: missing or unknown fields: more"),
    ("refine", "settings", {"scale": -1}, "scale"),
    ("refine", "settings", {"more": 1}, "settings: missing or unknown fields: more"),
    ("refine", "loop", {"select": "labels"}, "select labels needs"),
    ("boosting", "settings", {"threshold_rule": 2}, "threshold_rule is 2; wanted one of"),
    ("boosting", "settings", {"threshold": 2}, "threshold is 2; wanted"),
    ("boosting", "backbone", {"stride": 0}, "backbone: stride is 0"),
]


@pytest.mark.parametrize(("method", "part", "fields", "text"), HOSTILE)
def test_a_hostile_run_json(whole, tmp_path, method, part, fields, text):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps(change(whole[method], part, **fields)))
    assert train(method, "-o", run, "--resume").refused(5, text)


def test_a_prior_at_a_new_place(words, tmp_path, folder):
    run = start(words, "refine", tmp_path / "run", "--steps", "2")
    moved = tmp_path / "moved.onnx"
    moved.write_bytes((folder / "prior.onnx").read_bytes())
    more = ("refine", "-o", run, "--resume", "--steps", "3", "-q")
    assert train(*more, "--model", moved).code == 0
    assert read_entry(run)["prior"]["source"] == str(moved)
    more = (*more[:-2], "4", "-q")
    assert train(*more, "--model", "kmeans").refused(1, "k-means has no classes")
    ended = train(*more, "--label-weight", "3")
    assert ended.refused(1, "label-weight is 3.0, not None", "leave out --label-weight")
    weight, bias = nearest_colour()
    save(moved, -weight, bias)
    ended = train(*more)
    assert ended.refused(1, "changed since the run was started: sha256")
