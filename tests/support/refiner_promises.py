"""Tests that every Refiner passes, on the CPU and on a GPU.

A test module imports those that it wants and defines the fixture ``make_refiner``, which gives a
function with the arguments of ``refinements.make``.
"""

from itertools import product

import numpy as np
import pytest
from cases import case
from refinements import (
    SMALL,
    STOPS,
    THREE,
    assert_same_result,
    assert_same_state,
    case_name,
    draw,
    exact_stop,
    joined,
)

import runtime.core.silhouette

# --- determinism -------------------------------------------------------------------------------


def test_same_bits_again(make_refiner):
    for options, kind in THREE:
        with case(case_name(options), kind):
            image, guide = draw(kind, 24, 32)
            refiner = make_refiner(image, options)
            first = refiner.run(image, guide, steps=6)
            assert_same_result(refiner.run(image, guide, steps=6), first)
            assert_same_result(make_refiner(image, options).run(image, guide, steps=6), first)
            other = make_refiner(image, options | {"seed": 1}).run(image, guide, steps=6)
            assert (other.scores != first.scores).any()


# --- when it stops -----------------------------------------------------------------------------


def test_no_steps_give_the_prior(make_refiner):
    image, guide = draw("soft", 9, 11)
    guide[0, :, 0] = 0  # counts as 1e-4
    result = make_refiner(image, {}).run(image, guide, steps=0)
    prior = np.maximum(guide / guide.sum(-1, keepdims=True), 1e-4)
    np.testing.assert_allclose(
        result.scores, prior / prior.sum(-1, keepdims=True), rtol=1e-6, atol=1e-9
    )
    np.testing.assert_array_equal(result.labels, guide.argmax(-1))
    assert result.stats["steps"] == 0 and result.stats["stop_reason"] == "steps"
    assert result.stats["losses"]["total"] == result.stats["clusters_per_step"] == []


def test_all_steps_are_taken(make_refiner):
    image, _ = draw("none", 24, 32)
    stats = make_refiner(image, SMALL | {"steps": 7}).run(image).stats
    assert stats["steps"] == len(stats["clusters_per_step"]) == 7
    assert stats["stop_reason"] == "steps" and stats["label_floor"] == 0
    assert list(stats["losses"]) == ["total", "similarity", "spatial", "guide"]
    image, guide = draw("soft", 9, 11)
    assert list(make_refiner(image, {}).run(image, guide).stats["losses"]) == [
        "total",
        "pair",
        "guide",
    ]


def test_min_labels(make_refiner):
    for min_labels in (6, 7, 8):
        with case(min_labels):
            image, _ = draw("none", 24, 32)
            stats = (
                make_refiner(image, SMALL | {"min_labels": min_labels}).run(image, steps=100).stats
            )
            *before, last = stats["clusters_per_step"]
            assert stats["stop_reason"] == "min_labels" and stats["steps"] == len(before) + 1 < 100
            assert all(count > min_labels for count in before) and last <= min_labels


def test_early_stop_needs_three_calm_looks(make_refiner):
    image, _ = draw("none", 24, 32)
    still = SMALL | {"lr": 0.0}
    stats = make_refiner(image, still | {"early_stop": 0.995}).run(image, steps=100).stats
    assert (stats["stop_reason"], stats["steps"]) == ("converged", 31)
    assert make_refiner(image, still).run(image, steps=40).stats["stop_reason"] == "steps"
    assert (
        make_refiner(image, still | {"early_stop": 1.0}).run(image, steps=30).stats["steps"] == 30
    )


def test_stops_where_the_reference_stops(make_refiner, monkeypatch):
    for number, (options, floor) in enumerate(STOPS):
        with case(case_name(options), floor):
            image, guide, start, labels, counts, stop = exact_stop(number)
            monkeypatch.setattr(runtime.core.silhouette, "best_cluster_count", lambda _, n=floor: n)
            refiner = make_refiner(image, options | {"silhouette": floor > 0})
            assert_same_state(refiner.state_dict(), start)
            result = refiner.run(image, guide, steps=150)
            assert result.stats["stop_reason"] == stop != "steps"
            assert result.stats["clusters_per_step"] == counts
            assert (result.labels == labels).mean() >= 0.99


def test_silhouette_keeps_the_last_map_with_enough_labels(make_refiner, monkeypatch):
    for floor, seed in product((6, 7), range(4)):
        with case(floor, seed):
            image, _ = draw("none", 24, 32)
            monkeypatch.setattr(runtime.core.silhouette, "best_cluster_count", lambda _, n=floor: n)
            chosen = make_refiner(image, SMALL | {"silhouette": True, "seed": seed})
            result = chosen.run(image, steps=100)
            assert result.stats["label_floor"] == floor
            plain = make_refiner(image, SMALL | {"seed": seed})
            for steps in range(result.stats["steps"], -1, -1):
                last = plain.run(image, steps=steps)
                if last.stats["clusters"] >= floor:
                    break
            assert result.stats["clusters"] == last.stats["clusters"] >= floor
            np.testing.assert_array_equal(result.labels, last.labels)
            assert_same_state(chosen.state_dict(), plain.state_dict())


def test_diverged_keeps_the_last_finite_map(make_refiner):
    image, guide = draw("soft", 24, 32)
    wild = make_refiner(image, {"lr": 10.0, "momentum": 0.9999})
    result = wild.run(image, guide, steps=300)
    total = result.stats["losses"]["total"]
    assert result.stats["stop_reason"] == "diverged"
    assert len(total) == result.stats["steps"] + 1
    assert np.isfinite(total[:-1]).all() and not np.isfinite(total[-1])
    np.testing.assert_allclose(result.scores.sum(-1), 1, rtol=1e-5)
    calm = make_refiner(image, {"lr": 10.0, "momentum": 0.9999})
    last = calm.run(image, guide, steps=result.stats["steps"] - 1)
    np.testing.assert_array_equal(result.scores, last.scores)
    assert_same_state(wild.state_dict(), calm.state_dict())


# --- progress ----------------------------------------------------------------------------------


def test_progress_is_told_each_step(make_refiner):
    image, guide = draw("soft", 9, 11)
    seen = []
    make_refiner(image, {}).run(image, guide, steps=4, progress=lambda *now: seen.append(now))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_error_in_progress_ends_the_run_after_that_step(make_refiner):
    class Stop(Exception):
        pass

    def progress(done, steps):
        if done == 3:
            raise Stop

    image, guide = draw("soft", 9, 11)
    stopped, other = make_refiner(image, {}), make_refiner(image, {})
    with pytest.raises(Stop):
        stopped.run(image, guide, progress=progress)
    other.run(image, guide, steps=3)
    assert_same_state(stopped.state_dict(), other.state_dict())


# --- state -------------------------------------------------------------------------------------


def test_warm_run_goes_on_where_the_last_one_stopped(make_refiner):
    for options, kind in THREE:
        with case(case_name(options), kind):
            image, guide = draw(kind, 24, 32)
            cold, warm = make_refiner(image, options), make_refiner(image, options)
            expected = cold.run(image, guide, steps=10)
            warm.run(image, guide, steps=5)
            result = warm.run(image, guide, steps=5, warm=True)
            np.testing.assert_array_equal(result.scores, expected.scores)
            assert result.stats["losses"]["total"] == expected.stats["losses"]["total"][5:]
            assert_same_state(warm.state_dict(), cold.state_dict())
            assert_same_result(warm.run(image, guide, steps=10), expected)  # cold again


def test_state_goes_to_another_refiner(make_refiner):
    for options, kind in THREE:
        with case(case_name(options), kind):
            image, guide = draw(kind, 24, 32)
            first, second = make_refiner(image, options), make_refiner(image, options | {"seed": 9})
            first.run(image, guide, steps=3)
            second.load_state_dict(first.state_dict())
            assert_same_state(second.state_dict(), first.state_dict())
            assert_same_result(*(r.run(image, guide, steps=3, warm=True) for r in (first, second)))
            plain = {k: v for k, v in first.state_dict().items() if not k.startswith("momentum.")}
            second.load_state_dict(plain)  # as PyTorch saves it
            assert not joined(second.state_dict(), "momentum.").any()
