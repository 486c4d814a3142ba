"""The refinement loop over the exported step: beside the native one, and every promise of run."""

import functools

import numpy as np
import pytest
from cases import case
from refinements import (
    GUIDE,
    PICTURES,
    SEG,
    SIZE,
    SMALL,
    STOPS,
    TEN_STEPS,
    TEN_STEPS_BESIDE_NATIVE,
    UNSTEADY,
    assert_mapping_freezes_after_ten_steps,
    assert_same_state,
    assert_share,
    case_name,
    draw,
    joined,
    make,
)
from refiner_promises import test_warm_run_goes_on_where_the_last_one_stopped  # noqa: F401
from scenes import scene

import runtime
import runtime.core.silhouette
from runtime import RefineOptions
from runtime.core import parameters
from runtime.engines.graph_refiner import GraphRefiner
from runtime.engines.onnx import OnnxEngine
from runtime.engines.onnx_loop import OnnxLoop
from runtime.errors import DeviceError, InputError

pytest.importorskip("onnx", reason="needs onnx, which writes the graphs")

from export.refine_step import build_map, build_step


@functools.lru_cache
def engines(options, **sizes):
    """Step and map engine; made once for the same options, whatever the host's part of them."""
    graphs = build_step(options, **sizes), build_map(options, **sizes)
    return [OnnxEngine(g.SerializeToString(), threads=1) for g in graphs]


def graph(image, options, count=5, **sizes):
    """Make a GraphRefiner for the picture: ``count`` classes for residual, ``sizes`` fixed."""
    o = RefineOptions(**options)
    height, width = image.shape[:2]
    count = count if o.objective == "residual" else None
    return GraphRefiner(*engines(o, **sizes), o, height=height, width=width, classes=count)


def assert_close(ours, native, rtol=2e-2):
    """Same course: the two round differently, so that a few pixels may differ."""
    assert ours.stats["stop_reason"] == native.stats["stop_reason"]
    for name in ("steps", "clusters", "label_floor"):
        assert ours.stats[name] == native.stats[name]
    counts = ours.stats["clusters_per_step"]
    if counts or "similarity" in native.stats["losses"]:  # residual's graph need not count labels
        assert counts == native.stats["clusters_per_step"]
    assert ours.stats["losses"].keys() == native.stats["losses"].keys()
    for name, values in ours.stats["losses"].items():
        np.testing.assert_allclose(values, native.stats["losses"][name], rtol=rtol, atol=1e-5)
    assert (ours.labels == native.labels).mean() >= 0.99
    np.testing.assert_array_equal(ours.classes, native.classes)
    assert ours.scores.shape == native.scores.shape and ours.scores.dtype == np.float32
    assert ours.labels.dtype == np.int32 and ours.scores.flags["C_CONTIGUOUS"]


# --- beside the native loop --------------------------------------------------------------------


def stays_beside_native(options, kind, seed):
    image, guide = draw(kind, *SIZE, seed=seed)
    ours, native = graph(image, options), make(image, options, threads=1)
    result, expected = (r.run(image, guide, steps=10) for r in (ours, native))
    objective = ours.options.objective
    states = ours.state_dict(), native.state_dict()
    assert states[0].keys() == states[1].keys()
    assert states[0]["bn1.num_batches_tracked"] == 10
    try:
        assert_close(result, expected, rtol=2e-2 if objective == "dynaseg" else 1e-3)
        if objective == "residual":  # hardly any kinks: much closer
            np.testing.assert_allclose(result.scores, expected.scores, atol=2e-5)
            np.testing.assert_allclose(*map(joined, states), atol=1e-5)
    except AssertionError:
        return False
    return True


def test_ten_steps_beside_native():
    for number in range(len(TEN_STEPS)):
        with case(case_name(TEN_STEPS[number][0])):
            fulfilled = [stays_beside_native(*TEN_STEPS[number], seed) for seed in PICTURES]
            assert_share(fulfilled, TEN_STEPS_BESIDE_NATIVE[number])


def test_odd_sizes():
    for shape in [(1, 1), (1, 7), (7, 1), (13, 17), (31, 37)]:
        for options, kind in [({}, "soft"), (GUIDE, "hard"), (SEG, "none")]:
            with case(shape, case_name(options)):
                image, guide = draw(kind, *shape)
                native = make(image, options).run(image, guide, steps=2)
                assert_close(graph(image, options).run(image, guide, steps=2), native)


def test_each_kind_of_guide():
    for kind in ["hard", "partial", "none", "soft"]:
        for mapping in ["overlap", "index_modulo"]:
            for soft_guide in [False, True]:
                with case(kind, mapping, soft_guide):
                    image, guide = draw(kind)
                    options = GUIDE | {"mapping": mapping, "soft_guide": soft_guide}
                    native = make(image, options).run(image, guide, steps=3)
                    assert_close(graph(image, options).run(image, guide, steps=3), native)


def test_more_classes_than_clusters():
    image, guide = draw("soft")
    options = GUIDE | {"channels": 3, "soft_guide": True}
    native = make(image, options).run(image, guide, steps=3)
    assert_close(graph(image, options).run(image, guide, steps=3), native)


def test_overlap_mapping_freezes_after_ten_steps():
    for number in range(len(UNSTEADY)):
        with case(number):
            assert_mapping_freezes_after_ten_steps(graph, number)


# --- engines with more classes than the picture has --------------------------------------------


def test_residual_engine_with_more_classes():
    for classes in [5, 6, 14]:
        with case(classes):
            image, guide = draw("soft", 24, 32)
            free, wide = graph(image, {}), graph(image, {}, classes=classes, height=24, width=32)
            expected, result = (r.run(image, guide) for r in (free, wide))
            np.testing.assert_allclose(result.scores, expected.scores, atol=1e-5)
            assert (
                result.scores.shape == (24, 32, 5)
                and wide.state_dict().keys() == free.state_dict().keys()
            )
            for name, value in free.state_dict().items():
                np.testing.assert_allclose(wide.state_dict()[name], value, atol=1e-5, err_msg=name)
            again = [r.run(image, guide, steps=3, warm=True) for r in (free, wide)]
            np.testing.assert_allclose(again[1].scores, again[0].scores, atol=1e-5)


def test_dynaguide_engine_with_more_classes():
    for mapping in ["overlap", "index_modulo"]:
        with case(mapping):
            image, guide = draw("partial", 24, 32)
            options = GUIDE | {"mapping": mapping}
            expected = graph(image, options).run(image, guide, steps=3)
            result = graph(image, options, classes=9, height=24, width=32).run(
                image, guide, steps=3
            )
            np.testing.assert_allclose(result.scores, expected.scores, atol=1e-4)
            np.testing.assert_array_equal(result.labels, expected.labels)
            nothing = graph(image, options, classes=9).run(image, None, steps=2)
            assert_close(nothing, make(image, options).run(image, None, steps=2))


# --- when it stops -----------------------------------------------------------------------------


def test_no_steps_give_the_prior():
    image, guide = draw("soft", 9, 11)
    result = graph(image, {}).run(image, guide, steps=0)
    np.testing.assert_allclose(result.scores, guide, rtol=1e-4, atol=1e-6)
    assert result.stats["steps"] == 0 and result.stats["stop_reason"] == "steps"
    assert result.stats["losses"]["total"] == result.stats["clusters_per_step"] == []


def test_stops_where_the_native_loop_stops(monkeypatch):
    for options, floor in STOPS:
        with case(case_name(options), floor), monkeypatch.context() as patch:
            image, guide = draw("none" if "objective" in options else "soft", 24, 32)
            patch.setattr(runtime.core.silhouette, "best_cluster_count", lambda image, n=floor: n)
            options = options | {"silhouette": floor > 0}
            native, ours = make(image, options), graph(image, options)
            expected, result = (r.run(image, guide, steps=150) for r in (native, ours))
            assert result.stats["stop_reason"] != "steps"
            assert result.stats["clusters_per_step"] == expected.stats["clusters_per_step"]
            assert_close(result, expected)
            batches = "bn1.num_batches_tracked"
            assert ours.state_dict()[batches] == native.state_dict()[batches]


def test_silhouette_keeps_the_last_map_with_enough_labels(monkeypatch):
    for final_bn in ["image", "running"]:
        for more, floor in [
            ({}, 6),
            ({}, 7),
            ({"channels": 16, "lr": 0.2, "seed": 1}, 12),  # falls past the floor within one step
            ({"channels": 16, "lr": 0.5, "seed": 1}, 9),
        ]:
            with case(more, floor, final_bn), monkeypatch.context() as patch:
                image, _ = draw("none", 24, 32)
                patch.setattr(
                    runtime.core.silhouette, "best_cluster_count", lambda image, n=floor: n
                )
                options = SMALL | more | {"final_bn": final_bn}
                chosen = graph(image, options | {"silhouette": True})
                result = chosen.run(image, steps=100)
                assert (
                    result.stats["label_floor"] == floor
                    and result.stats["stop_reason"] == "silhouette"
                )
                batches = int(chosen.state_dict()["bn1.num_batches_tracked"])
                plain = graph(image, options)
                np.testing.assert_array_equal(result.labels, plain.run(image, steps=batches).labels)
                assert_same_state(chosen.state_dict(), plain.state_dict())
                if final_bn == "image":
                    assert result.stats["clusters"] >= floor


def test_diverged_keeps_the_last_finite_map():
    image, guide = draw("soft", 24, 32)
    options = {"lr": 10.0, "momentum": 0.9999}
    wild, calm = graph(image, options), graph(image, options)
    result = wild.run(image, guide, steps=300)
    total = result.stats["losses"]["total"]
    assert result.stats["stop_reason"] == "diverged"
    assert len(total) == result.stats["steps"] + 1
    assert np.isfinite(total[:-1]).all() and not np.isfinite(total[-1])
    np.testing.assert_allclose(result.scores.sum(-1), 1, rtol=1e-5)
    last = calm.run(image, guide, steps=result.stats["steps"] - 1)
    np.testing.assert_array_equal(result.scores, last.scores)
    assert_same_state(wild.state_dict(), calm.state_dict())


def test_diverged_in_the_first_step_changes_nothing():
    image, guide = draw("soft", 9, 11)
    refiner = graph(image, {})
    state = refiner.state_dict()
    state["conv3.bias"][:] = [3e38, -3e38, 0, 0, 0]
    state["conv3.weight"][:] = 3e38
    refiner.load_state_dict(state)
    result = refiner.run(image, guide, warm=True)
    assert (result.stats["stop_reason"], result.stats["steps"]) == ("diverged", 0)
    assert_same_state(refiner.state_dict(), state)


# --- progress and state ------------------------------------------------------------------------


def test_error_in_progress_ends_the_run_after_that_step():
    class Stop(Exception):
        pass

    seen = []

    def progress(*now):
        seen.append(now)
        if now[0] == 3:
            raise Stop

    image, guide = draw("soft", 9, 11)
    stopped, other = graph(image, {}), graph(image, {})
    with pytest.raises(Stop):
        stopped.run(image, guide, steps=4, progress=progress)
    assert seen == [(1, 4), (2, 4), (3, 4)]
    other.run(image, guide, steps=3)
    assert_same_state(stopped.state_dict(), other.state_dict())


@pytest.fixture
def make_refiner():
    """The test of refiner_promises.py runs on step graphs here."""
    return graph


def test_state_goes_to_the_native_refiner_and_back():
    image, guide = draw("soft", 24, 32)
    ours, native = graph(image, {}), make(image, {})
    assert_same_state(ours.state_dict(), native.state_dict())
    ours.run(image, guide, steps=3)
    native.load_state_dict(ours.state_dict())
    assert_same_state(ours.state_dict(), native.state_dict())
    results = [r.run(image, guide, steps=3, warm=True) for r in (ours, native)]
    np.testing.assert_allclose(results[0].scores, results[1].scores, atol=1e-5)
    state = ours.state_dict()
    state.pop("conv1.bias")
    with pytest.raises(InputError, match=r"state has no 'conv1\.bias'"):
        ours.load_state_dict(state)


# --- what is refused ---------------------------------------------------------------------------

IMAGE, SOFT = scene(9, 11)[:2]
FIXED = {"classes": 3, "height": 9, "width": 11}
BAD = [
    (lambda: graph(IMAGE, {}, count=None), "classes is missing; residual needs the number"),
    (lambda: graph(IMAGE[1:], GUIDE, height=9), "height is 8; the engine was built for 9"),
    (lambda: graph(IMAGE[:, 1:], GUIDE, width=11), "width is 10; the engine was built for 11"),
    (lambda: refiner_of(FIXED, 4), "classes is 4; wanted 1 to 3"),
    (lambda: refiner_of({}, 5, lr=0.5), r"lr is 0\.5; the graph was exported with 0\.05"),
    (lambda: refiner_of({}, 5, offsets=(1,)), r"offsets is \[1\]; the graph was .* \[1, 2\]"),
    (lambda: refiner_of({}, 5, min_labels=2), "the step graph does not return clusters, which"),
    (lambda: refiner_of({}, 5, early_stop=0.9), "the step graph does not return labels, which"),
    (lambda: graph(IMAGE, {}).run(IMAGE[1:], SOFT), "image is 8 x 11 pixels;.* for 9 x 11"),
    (lambda: graph(IMAGE, {}).run(IMAGE, SOFT, steps=-1), "steps is -1; wanted 0 to 1000000"),
    (lambda: graph(IMAGE, {}).run(IMAGE), "guide is None; the residual objective corrects"),
    (lambda: graph(IMAGE, {}).run(IMAGE, SOFT[..., 1:]), "guide has 4 classes; wanted 5"),
    (lambda: graph(IMAGE, SEG).run(IMAGE, SOFT), "guide was given, but the dynaseg graph takes"),
    (
        lambda: graph(IMAGE, GUIDE | {"soft_guide": True}, **FIXED).run(IMAGE, SOFT),
        "guide has 5 classes; the engine was built for 3",
    ),
]


def refiner_of(sizes, classes, **options):
    """A residual GraphRefiner whose graphs were exported with the default options."""
    made = engines(RefineOptions(), **sizes)
    return GraphRefiner(*made, RefineOptions(**options), height=9, width=11, classes=classes)


@pytest.mark.parametrize("call, message", BAD)
def test_refuses(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_host_options_need_not_be_those_of_the_export():
    assert refiner_of({}, 5, steps=3, seed=4).run(IMAGE, SOFT).stats["steps"] == 3


# --- the loop on ONNX Runtime ------------------------------------------------------------------


def step_inputs(options, classes=5):
    o = RefineOptions(**options)
    clusters = classes if o.objective == "residual" else o.channels
    state = parameters.flatten(o, clusters, parameters.initial_state(o, clusters))
    feed = {"image": IMAGE.transpose(2, 0, 1)[None], "guide": SOFT.transpose(2, 0, 1)[None]}
    if o.objective == "dynaguide":
        feed["assign"] = np.arange(classes)
    names = ("parameters", "momenta", "buffers")
    return engines(o)[0], feed, dict(zip(names, state[:3], strict=True))


def loop_of(engine, feed, state):
    return engine.loop(feed, {name: (f"{name}_out", v) for name, v in state.items()})


def test_loop_gives_the_bits_of_single_runs():
    for options in [{}, GUIDE | {"early_stop": 0.9}]:
        with case(case_name(options)):
            engine, feed, state = step_inputs(options)
            loop = loop_of(engine, feed, state)
            assert isinstance(loop, OnnxLoop)
            kept = []
            for _ in range(5):
                single = dict(
                    zip(
                        [p.name for p in engine.outputs],
                        engine._session.run(None, feed | state),
                        strict=True,
                    )
                )
                state = {name: single.pop(f"{name}_out") for name in state}
                out = loop.step()
                assert out.keys() == single.keys()
                kept.append((out, {k: v.copy() for k, v in out.items()}, loop.state(), state))
            for out, copies, ours, theirs in kept:  # nothing handed out was written to later
                for name in out:
                    np.testing.assert_array_equal(out[name], copies[name])
                assert_same_state(ours, theirs)


def test_loop_goes_back_two_steps_and_takes_new_feed():
    engine, feed, state = step_inputs(GUIDE)
    loop = loop_of(engine, feed, state)
    states, losses = [loop.state()], []
    for _ in range(4):
        losses.append(loop.step()["losses"])
        states.append(loop.state())
    loop.undo(2)
    assert_same_state(loop.state(), states[2])
    np.testing.assert_array_equal(loop.step()["losses"], losses[2])
    changed = loop.step(assign=np.zeros(5, np.int64))
    assert (changed["losses"] != losses[3]).any()
    loop.undo()
    np.testing.assert_array_equal(loop.step()["losses"], changed["losses"])  # it stays
    loop.undo()
    np.testing.assert_array_equal(loop.step(assign=np.arange(5))["losses"], losses[3])
    assert_same_state(loop.state(), states[4])


def test_loop_refuses():
    engine, feed, state = step_inputs(GUIDE)
    loop = loop_of(engine, feed, state)
    with pytest.raises(InputError, match="undo of 1 steps; wanted 0 to 0"):
        loop.undo()
    for _ in range(3):
        loop.step()
    with pytest.raises(InputError, match="undo of 3 steps; wanted 0 to 2"):
        loop.undo(3)
    loop.undo(1)
    with pytest.raises(InputError, match="undo of 2 steps; wanted 0 to 1"):
        loop.undo(2)
    with pytest.raises(InputError, match="step got mask; the feed has assign, guide, image"):
        loop.step(mask=feed["guide"])
    with pytest.raises(InputError, match=r"input assign is \(5,\) float64; wanted \('classes',\)"):
        loop.step(assign=np.zeros(5))
    with pytest.raises(InputError, match=r"input image is \(3, 9, 11\) float32; wanted \(1, 3, "):
        loop.step(image=feed["image"][0])
    with pytest.raises(
        InputError, match=r"the loop got the inputs buffers, .*; the step has assig"
    ):
        loop_of(engine, {"image": feed["image"]}, state)
    with pytest.raises(DeviceError, match="the step failed: "):
        loop.step(guide=feed["guide"][..., 1:])
