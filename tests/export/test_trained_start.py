"""A bundle whose refinement starts from trained weights, with no step and with some."""

import json
from dataclasses import replace

import numpy as np
import pytest
from drawn_pictures import COLOURS
from exporting import RTX, export, needs_rtx
from safetensors.numpy import load_file, save_file

import runtime
from runtime.__main__ import main as runtime_main
from runtime.bundle import golden
from runtime.bundle.open import open_prior, open_refinement
from runtime.bundle.read import Bundle
from runtime.core.config import RefineConfig
from runtime.core.guide import Guide
from runtime.core.resize import working_picture
from runtime.errors import BundleError, InputError
from runtime.prior.network import as_probabilities
from sdk import Segmenter
from sdk.__main__ import main as dg
from sdk.timing import Clock

has_rtx = not needs_rtx.args[0]  # the condition of the mark


@pytest.fixture(scope="module")
def state(plain, photo, work):
    """Weights that were trained on a guide with less sure classes than the bundle's prior."""
    h, w = RefineConfig().working_size(*photo.shape[:2])
    refiner, low = runtime.Refiner(h, w, classes=4), working_picture(photo, h, w)
    guide = as_probabilities(open_prior(Bundle.open(plain[1]))[0](photo, low), h, w)
    refiner.run(low, 0.6 * guide + 0.4 * np.roll(guide, 1, 2), steps=20)
    found = {k: v for k, v in refiner.state_dict().items() if not k.startswith("momentum.")}
    save_file(found, work / "trained.safetensors")
    return work / "trained.safetensors"


@pytest.fixture(scope="module")
def bundles(plain, state, work):
    """The bundle for each number of steps."""
    made = {steps: work / f"trained{steps}.bundle" for steps in (0, 2)}
    for steps, path in made.items():
        words = ("--engines", "refine", *RTX[:3], "8.9") if has_rtx and not steps else ()
        ended = export(*plain[0], *words, "--init", state, "--steps", steps, "-o", path)
        assert ended.code == 0, ended.err
        assert f"the bundle refines in {steps} steps  ok\n" in ended.out
    return made


@pytest.mark.parametrize("steps", [0, 2])
def test_one_picture(bundles, state, photo, steps):
    bundle = Bundle.open(bundles[steps])
    h, w = bundle.refine().working_size(*photo.shape[:2])
    low = working_picture(photo, h, w)
    guide = Guide(as_probabilities(open_prior(bundle)[0](photo, low), h, w))
    wanted = runtime.refine(low, guide.array, initial=load_file(state), **bundle.refine().options())
    for backend in ("native", "onnx"):
        seg = Segmenter(bundles[steps], refine_backend=backend, self_test="always")
        assert seg.info()["start"] == "trained" and seg.info()["self_test"]["labels"] == 1
        run = seg.pipeline
        scored = run.scores(run.prepare(photo, Clock()), guide, None)
        assert np.abs(scored.scores - wanted.scores).max() < 1e-4, backend
        stats = seg(photo).stats
        assert (stats["start"], stats["steps"], stats["stop_reason"]) == ("trained", steps, "steps")
    # other settings of the same network start there, too; another network does not
    assert Segmenter(bundles[0], refine="fast")(photo).stats["start"] == "trained"
    other = Segmenter(bundles[0], refine=RefineConfig(blocks=3, steps=1))(photo)
    assert (other.stats["start"], other.stats["steps"]) == ("cold", 1)
    alone = Segmenter(bundles[0], refine=None)
    assert alone.info()["start"] is None and alone(photo).stats["start"] is None


def test_a_seed_without_effect(bundles):
    with pytest.raises(
        InputError, match=r"seed is 3, .* trained beforehand\n  fix: leave seed out"
    ):
        Segmenter(bundles[0], refine=RefineConfig(seed=3))
    Segmenter(bundles[0], refine=RefineConfig(seed=3, blocks=3))  # another network


def test_golden_vectors_use_the_trained_weights(bundles):
    """Also those of a bundle that refines in no step."""
    bundle = Bundle.open(bundles[0])
    (entry,) = bundle.manifest["golden"]
    assert entry["steps"] == 1 and bundle.refine().steps == 0
    one = replace(bundle.refine(), steps=1)
    prior, arrays = open_prior(bundle)[0], bundle.tensors(entry)
    right = open_refinement(bundle).make(one)
    assert golden.compare(arrays, 1, prior, one, right, warm=True)["losses"] < 1e-5
    with pytest.raises(BundleError, match="losses"):
        golden.compare(arrays, 1, prior, one, right)  # from the seed's weights


def test_a_stream(bundles, plain, photo):
    """It starts from the trained weights, and makes the steps of the bundle."""
    dark = (photo // 8)[::-1].copy()
    for steps, first, later in ((0, 0, 0), (2, 2, 2)):
        seg = Segmenter(bundles[steps])
        frames = list(seg.stream([photo, photo, dark[:48]]))
        assert [f.frame.start for f in frames] == ["trained", "warm", "trained"]
        assert [f.stats["start"] for f in frames] == ["trained", "warm", "trained"]
        assert [f.stats["steps"] for f in frames] == [first, later, first]
        assert np.array_equal(frames[0].labels, seg(photo).labels)
        assert not frames[0].frame.events
        assert frames[2].frame.events[0].endswith("; start from the trained weights")
    assert [f.stats["steps"] for f in seg.stream([photo] * 2, warm_steps=1, cold_steps=3)] == [3, 1]
    ten = Segmenter(bundles[0], refine=RefineConfig())  # more steps than the bundle's
    assert [f.stats["steps"] for f in ten.stream([photo] * 2)] == [10, 2]
    cold = Segmenter(plain[1], refine=RefineConfig(steps=0))  # no trained weights: as before
    assert [(f.frame.start, f.stats["steps"]) for f in cold.stream([photo])] == [("cold", 10)]


def test_classes_keep_their_numbers_in_a_stream(bundles, state, work):
    """Without names the classes of a stream are renumbered; but trained weights belong to them."""
    from one_layer_networks import nearest_colour, save

    path, out = save(work / "nameless.onnx", *nearest_colour()), work / "nameless.bundle"
    words = ("--imgsz", "48x72", "--steps", 0, "-q", "-o", out)
    assert export("--model", path, "--init", state, *words).code == 0
    halves = COLOURS[np.repeat([[0] * 72 + [1] * 72], 96, 0)].astype(np.uint8)
    mirrored = halves[:, ::-1].copy()  # each class is now where the other one was
    seg = Segmenter(out)
    for frame, picture in zip(seg.stream([halves, mirrored]), [halves, mirrored], strict=True):
        alone = Segmenter(bundles[0])(picture)
        # the other prior has names, and its small regions are kept
        assert (frame.labels == alone.labels).mean() > 0.98


def test_the_command_lines(bundles, photos, tmp_path, capsys):
    folder = str(bundles[0])
    assert runtime_main(["check", folder]) == 0
    assert runtime_main(["inspect", folder]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "weights trained beforehand, used without a step (init.safetensors" in said
    words = ["predict", str(photos / "1.png"), "--prior", folder, "-o", str(tmp_path), "--json"]
    for more, steps in (([], 0), (["--steps", "3"], 3)):
        assert dg(words + more) == 0
        (document,) = json.loads(capsys.readouterr().out)
        assert (document["stats"]["start"], document["stats"]["steps"]) == ("trained", steps)
    assert dg([*words, "--seed", "3"]) == 1
    assert "seed is 3, but the refinement starts from" in capsys.readouterr().err
    assert dg(["stream", str(photos), "--prior", folder, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["stats"]["steps"] for line in lines] == [0] * 4
    assert {line["frame"]["start"] for line in lines} <= {"trained", "warm"}


@needs_rtx
def test_engines(bundles):
    engines = Bundle.open(bundles[0]).manifest["engines"]
    assert [e["graph"] for e in engines] == ["refine_step", "refine_map", "cnn"]
