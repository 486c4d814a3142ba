"""Streams of bundles with trained weights: what a frame starts from, and which states are refused.

The networks are tiny, and their "trained" weights are random: the graph cnn in the manifest says
that weights were trained.
"""

from dataclasses import replace

import numpy as np
import pytest
from bundles import CONFIG, picture, tensors, tiny_parts
from cases import case
from clips import clip, followed

import runtime
from runtime.bundle.manifest import file_entry, seal
from runtime.bundle.write import write_bundle
from runtime.core.parameters import initial_state
from runtime.errors import InputError
from sdk import RefineConfig, Segmenter, StreamState


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Bundles of one prior: with initial weights, and with the trained weights "a" and "b"."""
    folder = tmp_path_factory.mktemp("bundles")
    for number, name in enumerate(("cold", "a", "b")):
        manifest, files = tiny_parts(with_network=True)
        if name != "cold":
            rng = np.random.default_rng(number)
            state = initial_state(CONFIG, 3)
            state["conv3.bias"] = rng.normal(0, 0.3, 3).astype(np.float32)
            files["init.safetensors"] = tensors(state)
            manifest["init"] = file_entry("init.safetensors", files["init.safetensors"])
            files["cnn.onnx"] = files["refine_map.onnx"]
            manifest["graphs"]["cnn"] = manifest["graphs"]["refine_map"] | {"file": "cnn.onnx"}
        write_bundle(folder / name, seal(manifest), files)
    return folder


def opened(path, **options):
    return Segmenter(path, self_test="never", **options)


def moved(path, tmp_path):
    """A state after two frames of the bundle, saved and loaded."""
    state = StreamState()
    list(opened(path).stream([picture()] * 2, state=state))
    state.save(tmp_path / "state")
    return StreamState.load(tmp_path / "state")


def test_a_state_belongs_to_the_weights_that_it_started_from(bundles, tmp_path):
    words = {
        "cold": "initial weights",
        **{n: "trained weights with sha256 [0-9a-f]{12}" for n in "ab"},
    }
    for saved in words:
        for name in words:
            state = moved(bundles / saved, tmp_path)
            assert (state.trained is None) == (saved == "cold")
            with case(saved, name):
                if saved == name:
                    (result,) = opened(bundles / name).stream([picture()], state=state)
                    assert result.frame.start == "warm"
                    continue
                wrong = (
                    f"the state continues {words[saved]}; wanted one that continues the "
                    f"{words[name]} that this .*\n  fix: use the bundle with which the state was"
                )
                with pytest.raises(InputError, match=wrong):
                    list(opened(bundles / name).stream([picture()], state=state))
                state.reset()
                (result,) = opened(bundles / name).stream([picture()], state=state)
                assert result.frame.start == ("cold" if name == "cold" else "trained")


def test_old_states_are_of_initial_weights(bundles, tmp_path):
    """Older versions saved no identity of the weights."""
    from safetensors.numpy import load_file, save_file

    moved(bundles / "cold", tmp_path)
    assert "trained" not in load_file(tmp_path / "state")  # older versions can read it, too
    moved(bundles / "a", tmp_path)
    arrays = load_file(tmp_path / "state")
    del arrays["trained"]
    save_file(arrays, tmp_path / "old")
    with pytest.raises(InputError, match="the state continues initial weights; wanted one"):
        list(opened(bundles / "a").stream([picture()], state=StreamState.load(tmp_path / "old")))


def test_a_stream_without_refinement_keeps_the_weights_of_a_state(bundles, tmp_path):
    state = moved(bundles / "a", tmp_path)
    before = state.trained
    large = picture().repeat(2, 0).repeat(2, 1)  # its working size is that of the bundle
    (result,) = opened(bundles / "a", refine=None).stream([large], state=state)
    assert result.frame.start == "warm" and state.trained == before is not None
    (result,) = opened(bundles / "a").stream([picture()], state=state)
    assert result.frame.start == "warm"


def test_what_the_first_frame_of_each_kind_starts_from(bundles):
    """After another size, a cut and a divergence, a stream starts as at its first frame."""
    small = picture(16, 32)
    for name, start, words in (
        ("cold", "cold", "cold start"),
        ("a", "trained", "start from the trained weights"),
    ):
        with case(name):
            seg = opened(bundles / name)
            assert seg.info()["start"] == start
            state = StreamState()
            first, later, resized = seg.stream([picture(), picture(), small], state=state)
            assert (state.trained is None) == (start == "cold")
            assert [r.frame.start for r in (first, later, resized)] == [start, "warm", start]
            size = f"size: 24x32 became 16x32 (working size); {words}"
            assert resized.frame.events == [size]
            cut = other_place()
            first, second = seg.stream([picture(), cut])
            assert second.frame.start == start
            (event,) = second.frame.events
            assert event.startswith("cut: colours moved by ") and event.endswith(f"; {words}")
    for name in ("cold", "a"):
        alone = opened(bundles / name, refine=None)
        assert alone.info()["start"] is None
        frames = alone.stream([picture(), picture(), small, other_place()])
        assert [r.frame.start for r in frames] == ["cold", "warm", "cold", "cold"]
    assert Segmenter("kmeans", refine=None).info()["start"] is None
    assert Segmenter("kmeans").info()["start"] == "cold"


def other_place():
    """A darker picture in which the prior's classes have other places."""
    return (picture()[:, ::-1] // 3)[:, np.roll(np.arange(32), 11)].copy()


def test_a_divergence_is_an_event(bundles, monkeypatch):
    run = runtime.Refiner.run

    def diverged(self, *arguments, **options):
        result = run(self, *arguments, **options)
        return replace(result, stats=result.stats | {"stop_reason": "diverged"})

    monkeypatch.setattr(runtime.Refiner, "run", diverged)
    for name, start, words in (
        ("cold", "cold", "cold start"),
        ("a", "trained", "start from the trained weights"),
    ):
        results = list(opened(bundles / name).stream([picture()] * 2))
        event = f"diverged: this frame is the prior's; the next frame: {words}"
        assert [r.frame.events for r in results] == [[event]] * 2
        assert [r.frame.start for r in results] == [start] * 2
    clusters = RefineConfig.preset("dynaseg_fsf", channels=4)
    results = followed(clip(2)[0], "kmeans", refine=clusters, cold_steps=1)
    assert [r.frame.events for r in results] == [["diverged; the next frame: cold start"]] * 2


def test_other_settings_than_those_of_the_training_are_an_event_once(bundles):
    note = (
        "settings: The refinement starts from the weights of a, which were trained with other "
        "settings: scale is 0.5, not 1.0. Leave these settings out; the number of steps may differ."
    )
    other = replace(CONFIG, scale=0.5, steps=1)
    results = list(opened(bundles / "a", refine=other).stream([picture()] * 2))
    assert [r.frame.events for r in results] == [[note], []]
    assert not any(r.warnings for r in results)
    for name, config in (("cold", other), ("a", replace(CONFIG, steps=1))):
        results = opened(bundles / name, refine=config).stream([picture()])
        assert not next(results).frame.events
