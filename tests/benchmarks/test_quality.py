"""The command quality: its rows, what it compares, and a run on made pictures."""

import json

import numpy as np
import pytest

import runtime
from benchmarks import __main__ as command
from benchmarks import table
from benchmarks.quality import datasets, run
from runtime.core.resize import resize
from sdk import RefineConfig

TRUTH = np.repeat(np.repeat([[0, 2]], 24, 1), 32, 0)  # (32, 48), class 1 is nowhere
COLOURS = np.uint8([[200, 60, 40], [0, 0, 0], [40, 90, 200]])


@pytest.fixture
def scene(rng):
    """A picture of two colours, and probabilities that are wrong at 30 % of its pixels."""
    wrong = np.where(rng.random(TRUTH.shape) < 0.3, 2 - TRUTH, TRUTH)
    guide = np.full((*TRUTH.shape, 3), 1e-6, np.float32)
    np.put_along_axis(guide, wrong[..., None], 0.7, 2)
    np.put_along_axis(guide, (2 - wrong)[..., None], 0.3, 2)
    return COLOURS[TRUTH], guide


def test_the_crf_corrects_the_prior(scene):
    labels = run.crf(*scene)
    assert labels.dtype == np.int32 and (labels == TRUTH).all()
    assert (run.baseline(*scene) == TRUTH).mean() < 0.75


@pytest.mark.parametrize("name", ["residual + dense CRF", "residual + guided filter + dense CRF"])
def test_the_crf_after_a_refinement_has_the_classes_of_the_prior(scene, name):
    labels = run.fast_methods(["a", "b", "c"])[name][1](*scene)
    assert labels.shape == TRUTH.shape and (labels == TRUTH).all()


def test_what_the_crf_reads(scene, monkeypatch):
    """The probabilities of the prior, and of the filter after a refinement; and no other setting
    than the published ones."""
    read = []

    def dense_crf(image, planes, **options):
        assert options == {"threads": 1} and image is scene[0]
        read.append(planes)
        return planes

    monkeypatch.setattr(runtime, "dense_crf", dense_crf)
    config = RefineConfig(scale=1.0)
    run.crf(scene[0], scene[1][::2, ::2].copy())
    run.refined_filtered_crf(config)(*scene)
    np.testing.assert_array_equal(read[0], resize(scene[1][::2, ::2].copy(), *TRUTH.shape))
    image = scene[0].astype(np.float32) / 255
    refined = runtime.refine(image, scene[1], **config.options()).scores
    smooth = runtime.guided_filter(image, refined, radius=4, eps=3e-4)
    np.testing.assert_array_equal(read[1], smooth.clip(0))


def test_rows_are_compared_with_three_baselines():
    scores = {
        "prior": [0.5, 0.6, np.nan],
        "prior + guided filter": [0.6, 0.6, np.nan],
        "prior + dense CRF": [0.7, 0.58, np.nan],
        "residual": [0.4, 0.9, np.nan],
    }
    rows = [run.Row(name, 0, {"acc": values}, seconds=[2, 1, 9]) for name, values in scores.items()]
    lines = {line["row"]: line for line in run.summary(rows, "acc")}
    assert list(lines["prior"])[2:] == [
        "acc", "seconds", "vs prior", "worst", "vs prior+gf", "vs prior+crf"
    ]  # fmt: skip
    assert lines["prior"] | {
        "acc": 0.55, "seconds": 2.0, "vs prior": "", "worst": "", "vs prior+crf": "1-1 -0.0900"
    } == lines["prior"]  # fmt: skip
    crf, residual = lines["prior + dense CRF"], lines["residual"]
    assert crf["worst"] == "-2.0" and crf["vs prior"] == "1-1 +0.0900" and not crf["vs prior+crf"]
    assert residual["worst"] == "-10.0" and residual["vs prior+crf"] == "1-1 +0.0100"
    assert residual["vs prior+gf"] == "1-1 +0.0500"


def test_both_kinds_of_tables_have_the_crf(monkeypatch, tmp_path, capsys):
    class Made:
        def image(self):
            return COLOURS[TRUTH]

        def annotators(self):
            return [TRUTH + 1]

    monkeypatch.setattr(datasets, "bsds", lambda count: [Made()] * count)
    monkeypatch.setattr(run, "slow_methods", lambda names: {})
    words = ["quality", "--sets", "bsds", "--pictures", "2", "--slow", "1", "-o", str(tmp_path)]
    assert command.main(words) == 0
    text = (tmp_path / "quality.json").read_text()
    document = json.loads(text)
    assert text == table.as_json(document)
    fast, slow = ([row["row"] for row in each["rows"]] for each in document["tables"])
    assert slow == list(run.BASELINES) and "prior + dense CRF" in slow
    assert {*slow, "residual + dense CRF", "residual + guided filter + dense CRF"} < {*fast}
    assert all(row["cover"] == 1 for row in document["tables"][0]["rows"])
    assert [len(v) for v in document["tables"][0]["by_picture"].values()] == [2] * len(fast)
    assert "| vs prior+crf" in capsys.readouterr().out
