"""A run of train refine as a bundle: the prior of the run, and the trained refinement network."""

import json
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
from cases import case
from exporting import export
from one_layer_networks import NAMES, nearest_colour, save
from safetensors.numpy import load_file

import runtime
from benchmarks.__main__ import main as benchmarks_main
from export.models.base import PriorModel
from export.models.load import load_model
from export.options import ExportOptions, refinement_of
from export.train.guide_source import open_guide_source
from export.train.run import open_run
from runtime.__main__ import main as runtime_main
from runtime.bundle.manifest import parse_manifest, seal
from runtime.bundle.open import open_prior
from runtime.bundle.read import Bundle
from runtime.core.config import RefineConfig
from runtime.core.parameters import initial_state
from runtime.core.resize import working_picture
from runtime.errors import BundleError, InputError
from runtime.prior.network import as_probabilities
from sdk.__main__ import main as dg
from sdk.image import encode_image


def train(prior, photos, out, *words):
    """Train for three steps by the command line."""
    common = ("--data", photos, "--steps", 3, "--no-cache", "-q")
    ended = export("train", "refine", "--model", prior, *common, *words, "-o", out)
    assert ended.code == 0, ended.err
    return out


@pytest.fixture(scope="module")
def prior(work):
    """A network of free size, whose input is a square of 72 pixels if nothing else is said."""
    (work / "small").mkdir()
    meta = {"classes": NAMES, "licence": "MIT", "input_size": {"width": 72, "height": 72}}
    return save(work / "small" / "colours.onnx", *nearest_colour(), **meta)


@pytest.fixture(scope="module")
def run(prior, photos, work):
    """A run on an .onnx file."""
    return train(prior, photos, work / "camera", "--scale", 0.25, "--seed", 5)


@pytest.fixture(scope="module")
def of_bundle(plain, photos, work):
    """A run on a bundle."""
    return train(plain[1], photos, work / "camera2")


@pytest.fixture(scope="module")
def out(run, photos, work):
    """The bundle of the run on an .onnx file."""
    words = ("--model", run, "--pictures", photos)
    ended = export(*words, "-o", work / "camera.bundle")
    assert ended.code == 0, ended.err
    assert "the bundle refines in 0 steps  ok\n" in ended.out
    return work / "camera.bundle"


def test_the_prior_of_a_run(run, prior):
    model, state = load_model(str(run)), open_run(run).head()[0]
    assert (model.name, model.output, model.fixed_size) == ("camera", "logits", (48, 72))
    assert model.names == NAMES and model.trained
    assert model.licence == "MIT; refinement: trained by the user" and model.training is None
    assert model.refine == RefineConfig(scale=0.25, steps=0)
    assert model.initial.keys() == state.keys()
    assert all(np.array_equal(model.initial[k], state[k]) for k in state)
    assert any(model.initial["conv3.bias"])  # the training has changed it
    entry = json.loads((run / "run.json").read_text())
    assert model.refinement == {
        "method": "refine",
        "step": 3,
        "steps": 3,
        "select": "last",
        "labels_used": [],
        "settings": entry["settings"],
        "prior": {k: entry["prior"][k] for k in ("kind", "name", "sha256", "classes")},
        "pictures": 4,
        "seed": 5,
    }
    assert model.refinement["prior"]["name"] == "colours.onnx"


def test_a_bundle_from_a_run_to_a_picture(run, out, photo, photos, tmp_path, capsys):
    bundle = Bundle.open(out)
    state = load_file(out / "init.safetensors")
    assert all(np.array_equal(state[k], v) for k, v in open_run(run).head()[0].items())
    for path in out.rglob("*"):  # no path of this machine
        assert path.is_dir() or str(photos.parent).encode() not in path.read_bytes(), path
    assert runtime_main(["check", str(out)]) == runtime_main(["inspect", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "refinement refine on colours.onnx, 4 pictures, step 3 of 3 (the last), seed 5; labels "
        "used for nothing licence"
    ) in said
    assert (
        "refine residual; steps 0: the trained weights are used as they are; "
        "scale 0.25 (default 0.5)"
    ) in said
    assert "weights trained beforehand, used without a step" in said

    words = ["predict", str(photos / "1.png"), "--prior", str(out), "-o", str(tmp_path)]
    assert dg([*words, "--json"]) == 0
    (document,) = json.loads(capsys.readouterr().out)
    stats = document["stats"]
    assert (stats["start"], stats["steps"], stats["working_size"]) == ("trained", 0, [24, 36])

    h, w = bundle.refine().working_size(*photo.shape[:2])
    low = working_picture(photo, h, w)
    guide = as_probabilities(open_prior(bundle)[0](photo, low), h, w)
    wanted = runtime.refine(low, guide, initial=state, steps=0)
    other = runtime.refine(low, guide, steps=0)
    assert np.abs(wanted.scores - other.scores).max() > 1e-3  # the weights change something


def test_a_run_on_a_bundle(of_bundle, plain, photos, tmp_path):
    prior = Bundle.open(plain[1])
    model = load_model(str(of_bundle))
    assert (model.fixed_size, model.names) == ((48, 72), prior.names)
    assert model.licence.startswith("MIT; ") and model.trained
    words = ("--model", of_bundle, "--steps", 2, "--half", "--pictures", photos, "-q")
    ended = export(*words, "-o", tmp_path / "b")
    assert ended.code == 0, ended.err
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest["refine"]["steps"] == 2 and manifest["golden"][0]["steps"] == 2
    assert manifest["graphs"]["prior"]["precision"] == "fp16"
    assert manifest["model"]["refinement"]["prior"]["kind"] == "bundle"
    assert manifest["classes"] == prior.names
    with pytest.raises(InputError, match=r"imgsz is \(64, 64\), but .* has a fixed input"):
        load_model(str(of_bundle), imgsz=(64, 64))


def test_a_prior_that_was_trained_keeps_its_training(of_bundle, plain, tmp_path):
    """The training of the prior and that of the refinement are two entries of the manifest."""
    from runtime.bundle.write import write_bundle

    prior, files = Bundle.open(plain[1]), {}
    for path in plain[1].rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            files[path.relative_to(plain[1]).as_posix()] = path.read_bytes()
    training = {
        "method": "boosting",
        "step": 1,
        "steps": 1,
        "select": "last",
        "labels_used": [],
        "settings": {},
        "backbone": {
            "name": "colours",
            "source": "colours.pth",
            "features": "tokens",
            "sha256": "ab" * 32,
            "channels": 4,
            "stride": 8,
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "padding": "none",
            "licence": "MIT",
            "trained": True,
        },
        "views": {"size": 64, "crops": "centre"},
        "pictures": 4,
        "seed": 0,
        "flip": False,
        "mask": "fine",
    }
    model = {"name": "red", "trained": False, "training": training}
    write_bundle(tmp_path / "red.bundle", {**prior.manifest, "model": model}, files)
    found = load_model(str(of_bundle), tmp_path / "red.bundle")
    assert found.training == training and not found.trained and found.refinement is not None


def test_the_guides_of_the_bundle_are_those_of_the_training(run, out, prior, photo):
    """For pictures of the camera's size, without any option."""
    source, (found, _) = open_guide_source(str(prior)), open_prior(Bundle.open(out))
    guide = as_probabilities(found(photo, None), 24, 36)
    np.testing.assert_allclose(guide, source.guide(photo, 24, 36), rtol=0, atol=1e-6)
    assert load_model(str(prior)).fixed_size == (72, 72)  # which returns other guides
    assert load_model(str(run), imgsz=(64, 64)).fixed_size == (64, 64)


def test_a_run_on_pictures_of_several_sizes(prior, photos, tmp_path):
    mixed = shutil.copytree(photos, tmp_path / "mixed")
    upright = cv2.rotate(cv2.imread(str(mixed / "0.png")), cv2.ROTATE_90_CLOCKWISE)
    assert cv2.imwrite(str(mixed / "0.png"), upright)
    own = train(prior, mixed, tmp_path / "run")
    assert json.loads((own / "run.json").read_text())["prior"]["sizes"] == [[48, 72], [72, 48]]
    model = load_model(str(own))
    assert model.fixed_size == (48, 72)
    (warning,) = model.warnings
    assert "had 2 input sizes (48x72, 72x48); without --dynamic the bundle has 48x72" in warning
    assert "fix: --dynamic keeps all of them; or choose one: --imgsz" in warning
    assert load_model(str(own), imgsz=(48, 72)).warnings == ()


def test_a_prior_that_was_moved(run, prior, tmp_path):
    copy = shutil.copytree(run, tmp_path / "camera")
    entry = json.loads((copy / "run.json").read_text())
    entry["prior"]["source"] = "/gone/colours.onnx"
    (copy / "run.json").write_text(json.dumps(entry))
    with pytest.raises(
        InputError, match=r"/gone/colours.onnx of the run does not exist\n.*--weigh"
    ):
        load_model(str(copy))
    moved = shutil.copy(prior, tmp_path / "moved.onnx")
    assert load_model(str(copy), moved).initial.keys() == load_model(str(run)).initial.keys()
    entry["prior"]["sha256"] = "ab" * 32
    (copy / "run.json").write_text(json.dumps(entry))
    with pytest.raises(InputError, match=r"moved.onnx changed since the run was started: sha256"):
        load_model(str(copy), moved)


def test_options_that_contradict_the_run(run, of_bundle, tmp_path):
    (tmp_path / "s.safetensors").write_bytes(b"")
    for words, text in (
        (("--scale", 0.5), "scale is 0.5, and the refinement network of camera was trained with"),
        (("--refine", "residual"), "scale is 0.5, and the refinement"),
        (("--refine", "dynaguide"), "objective is dynaguide, and the refinement"),
        (("--lr", 0.1), "lr is 0.1, and the refinement"),
        (("--seed", 5), "seed is 5, and the refinement"),
        (("--init", tmp_path / "s.safetensors"), "init names weights, and camera has its own"),
        (("--flip",), "flip is for runs of segunify or boosting; "),
        (("--mask", "coarse"), "mask is for runs of boosting; "),
        (("--names", "a,b"), "--names: the run"),
    ):
        with case(words):
            ended = export("--model", run, *words, "-o", tmp_path / "b")
            ended.refused(1, text, "fix: ")
            assert "train name" not in ended.err  # a run of refine has no clusters
    ended = export("--model", "kmeans", "--init", run, "-o", tmp_path / "b")
    ended.refused(1, "camera, a run of the trainer; wanted a file", f"fix: --model {run} exports")
    assert not (tmp_path / "b").exists()
    model = load_model(str(run))
    for asked in (None, model.refine, replace(model.refine, steps=7)):
        wanted = asked or model.refine
        assert refinement_of(ExportOptions(refine=asked), model) == wanted
    assert refinement_of(ExportOptions(), PriorModel(name="kmeans")) == RefineConfig()


def test_an_input_size_that_no_guide_of_the_training_had(run):
    assert not load_model(str(run), imgsz=(48, 72)).warnings
    (warning,) = load_model(str(run), imgsz=(64, 72)).warnings
    assert "imgsz is 64x72, and the guides of the training were computed at 48x72" in warning
    assert "fix: leave --imgsz out" in warning


def test_settings_of_another_network_than_the_checkpoint(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "camera")
    entry = json.loads((copy / "run.json").read_text())
    entry["settings"]["blocks"] = 3
    (copy / "run.json").write_text(json.dumps(entry))
    with pytest.raises(BundleError, match=r"the checkpoint of .*camera does not fit the settings"):
        load_model(str(copy))


def test_trained_weights_of_a_bundle_are_not_continued_silently(out, photos, plain, tmp_path):
    common = ("--data", photos, "--steps", 1, "--no-cache", "-q", "--seed", 4)
    ended = export("train", "refine", "--model", out, *common, "-o", tmp_path / "a")
    text = "the training starts from the weights of --seed 4, not from the trained refinement"
    assert ended.code == 0 and f"WARNING: {text} weights in camera.bundle\n" in ended.err
    ended = export("train", "refine", "--model", plain[1], *common, "-o", tmp_path / "b")
    assert ended.code == 0 and "WARNING" not in ended.err


def test_a_large_decay_is_named_beside_the_learning_rate(prior, photos, tmp_path):
    words = ("--model", prior, "--data", photos, "--steps", 60, "--every", 60, "--no-cache", "-q")
    ended = export("train", "refine", *words, "--decay", 1000, "--scale", 0.1, "-o", tmp_path / "a")
    ended.refused(
        1, "the loss is not finite in step ", "train again with a smaller --lr or --decay"
    )


def test_an_unfinished_run_is_frozen_with_a_warning(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "camera")
    entry = json.loads((copy / "run.json").read_text())
    entry["loop"]["steps"] = 9
    (copy / "run.json").write_text(json.dumps(entry))
    (warning,) = load_model(str(copy)).warnings
    assert "has reached step 3 of 9\n  fix: python -m export train refine -o" in warning


def test_the_form_of_the_refinement_in_manifests(out):
    good = json.loads((out / "manifest.json").read_text())
    refinement = good["model"]["refinement"]

    def parsed(model, **changes):
        changed = good | {"model": good["model"] | model} | changes
        return parse_manifest(json.dumps(seal(changed)).encode(), "m")

    assert parsed({})["model"]["refinement"] == refinement
    assert parsed({"refinement": refinement | {"select": "cold", "labels_used": ["training"]}})
    prior = refinement["prior"]
    for changes in (
        {"method": "boosting"},
        {"select": "labels"},
        {"labels_used": ["selection"]},
        {"steps": 0},
        {"pictures": 0},
        {"settings": []},
        {"prior": prior | {"name": "/home/somebody/colours.onnx"}},
        {"prior": prior | {"source": "colours.onnx"}},
        {"prior": prior | {"classes": 0}},
        {"backbone": {}},
    ):
        with case(changes), pytest.raises(BundleError, match=r"m: manifest\.model\.refinement"):
            parsed({"refinement": refinement | changes})
    graphs = {k: v for k, v in good["graphs"].items() if k != "cnn"}
    with pytest.raises(BundleError, match="the graph cnn is missing"):
        parsed({}, graphs=graphs)


def test_trained_weights_that_do_not_fit_a_prior():
    config = RefineConfig(steps=0)
    state = initial_state(config, 3)
    fields = {"name": "p", "refine": config, "initial": state}
    assert PriorModel(**fields).initial is state
    for changes, text in (
        ({"refine": None}, "wanted refine and initial"),
        ({"initial": None}, "wanted refine and initial"),
        ({"refine": None, "initial": None, "refinement": {}}, "wanted refine and initial"),
        ({"refine": RefineConfig(blocks=3)}, "state has no 'conv2.1.weight'"),
        ({"initial": {}}, "state has no 'conv1.weight'"),
        ({"names": ["a", "b"]}, "initial has weights for 3 classes, and names has 2"),
    ):
        with case(changes), pytest.raises(InputError, match=text):
            PriorModel(**fields | changes)


def test_the_profiler_runs_the_trained_map_without_a_step(out, photos, tmp_path, capsys):
    for package in ("scipy", "matplotlib"):
        pytest.importorskip(package, reason=f"the profiler needs {package}")
    words = ["latency", out, "--picture", photos / "0.png", "--refine", "0", "--duration", "0.3"]
    words += ["--threads", "1", "--mode", "back-to-back", "-o", tmp_path]
    assert benchmarks_main([*map(str, words)]) == 0
    (row,) = json.loads((tmp_path / "latency.json").read_text())["rows"]
    assert row["refine"] == "residual at scale 0.25"


def test_a_run_with_labels_says_so(colours, photos, tmp_path):
    (tmp_path / "labels").mkdir()
    for file in photos.iterdir():
        picture = np.zeros((96, 144), np.uint8)
        (tmp_path / "labels" / file.name).write_bytes(encode_image(picture, ".png"))
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    words = ("--labels", tmp_path / "labels", "--classes", tmp_path / "classes.txt")
    run = train(colours, photos, tmp_path / "run", *words)
    assert load_model(str(run)).refinement["labels_used"] == ["training"]
