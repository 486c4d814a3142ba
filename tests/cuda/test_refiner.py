"""The refinement of runtime._cuda, whose kernels run on the host here: the tests of the CPU."""

import threading
from itertools import product

import numpy as np
import pytest
from cases import case
from exactness import relative_error
from refinements import (
    CASES,
    assert_same_result,
    assert_step_matches,
    case_name,
    draw,
    joined,
    make,
)
from refiner_promises import (  # noqa: F401
    test_all_steps_are_taken,
    test_diverged_keeps_the_last_finite_map,
    test_early_stop_needs_three_calm_looks,
    test_error_in_progress_ends_the_run_after_that_step,
    test_min_labels,
    test_no_steps_give_the_prior,
    test_progress_is_told_each_step,
    test_same_bits_again,
    test_silhouette_keeps_the_last_map_with_enough_labels,
    test_state_goes_to_another_refiner,
    test_stops_where_the_reference_stops,
    test_warm_run_goes_on_where_the_last_one_stopped,
)


@pytest.fixture(autouse=True)
def make_refiner(cuda):
    """The tests of refiner_promises.py run on the CUDA module here."""

    def on_device(image, options, **more):
        return make(image, options, device="cuda", **more)

    return on_device


def test_step(make_refiner):
    for options, kind in CASES:
        with case(case_name(options), kind):
            image, guide = draw(kind)
            assert_step_matches(make_refiner(image, options), image, guide)


ODD = [CASES[0], CASES[3], CASES[5], CASES[12]]
SHAPES = [(1, 1), (1, 2), (1, 17), (19, 1), (2, 2), (3, 61), (17, 33)]


def test_step_on_odd_pictures(make_refiner):
    for (options, kind), shape in product(ODD, SHAPES):
        with case(case_name(options), kind, shape):
            image, guide = draw(kind, *shape)
            assert_step_matches(make_refiner(image, options), image, guide, times=3)


# --- tensor cores ------------------------------------------------------------------------------

TENSOR = [  # one block of 32 channels, several, one of 112, and what none of them fills
    ({}, "soft"),
    ({"channels": 33, "blocks": 3}, "soft"),
    ({"objective": "dynaguide", "channels": 100}, "hard"),
    ({"objective": "dynaguide", "channels": 7, "skip": "shared"}, "partial"),
]


def test_tensor_cores_that_round_nothing_do_the_same(cudart):
    for options, kind in TENSOR:
        with case(case_name(options), kind):
            cudart.round_nothing(True)
            image, guide = draw(kind, 13, 37)
            plain, tensor = (
                make(image, options, device="cuda", precision=p) for p in ("fp32", "fp16")
            )
            a, b = (r.run(image, guide, steps=1) for r in (plain, tensor))
            np.testing.assert_allclose(b.scores, a.scores, rtol=0, atol=2e-6)
            before = joined(make(image, options).state_dict())
            wanted, found = (joined(r.state_dict()) - before for r in (plain, tensor))
            assert relative_error(found, wanted) <= 2e-5


def test_half_precision_keeps_the_labels_of_ten_steps():
    image, guide = draw("soft", 36, 48)
    plain, tensor = (make(image, {}, device="cuda", precision=p) for p in ("fp32", "fp16"))
    a, b = (r.run(image, guide, steps=10) for r in (plain, tensor))
    assert (a.scores != b.scores).any()
    assert (a.labels == b.labels).mean() >= 0.99
    np.testing.assert_allclose(
        b.stats["losses"]["total"], a.stats["losses"]["total"], rtol=2e-3, atol=0
    )


def test_half_precision_with_a_guide_that_knows_one_pixel():
    """A slope is a mean over that pixel alone, far larger than one over all pixels."""
    image, guide = draw("hard", 128, 160)
    sparse = np.full_like(guide, -1)
    sparse[0, 0] = max(guide[0, 0], 0)
    options = {"objective": "dynaguide", "channels": 8}
    plain, tensor = (
        make(image, options, device="cuda", precision=p).run(image, sparse, steps=2)
        for p in ("fp32", "fp16")
    )
    assert tensor.stats["stop_reason"] == plain.stats["stop_reason"] == "steps"
    wanted, found = (r.stats["losses"]["total"] for r in (plain, tensor))
    np.testing.assert_allclose(found, wanted, rtol=2e-2)


def test_half_precision_on_black_pictures():
    """A norm of a flat channel multiplies slopes by 316; slopes beyond a half's range are cut."""
    for objective in ("residual", "dynaguide", "dynaseg"):
        with case(objective):
            image, guide = draw("soft" if objective == "residual" else "hard", 32, 48)
            options = {"objective": objective, "channels": 12}
            refiner = make(image * 0, options, device="cuda", precision="fp16")
            result = refiner.run(image * 0, None if objective == "dynaseg" else guide, steps=6)
            assert result.stats["stop_reason"] == "steps"
            assert np.isfinite(result.scores).all()


# --- guides, arrays, errors --------------------------------------------------------------------


def test_guides_may_change_between_runs():
    """The recorded step is recorded again where the guide's kind or its classes change."""
    options = {"objective": "dynaguide", "channels": 6, "soft_guide": True}
    image, soft = draw("soft", 12, 20)
    hard = soft.argmax(-1).astype(np.int32)
    guides = [soft, hard, None, hard, np.minimum(hard, 2), soft, soft[..., ::-1].copy()]
    one = make(image, options, device="cuda")
    for guide in guides:
        fresh = make(image, options, device="cuda").run(image, guide, steps=3)
        assert_same_result(one.run(image, guide, steps=3), fresh)


STREAMS = [
    ({}, "soft"),
    ({"blocks": 3}, "soft"),
    ({"objective": "dynaguide", "channels": 8, "blocks": 3}, "hard"),
    ({"objective": "dynaguide", "channels": 8, "blocks": 3, "skip": "shared"}, "hard"),
    ({"objective": "dynaseg", "channels": 8}, "hard"),
]


def test_streams_of_a_step_wait_for_each_other(cudart):
    """The result has the same bits whichever of the two streams of a recorded step runs first, and
    the same bits as steps that were not recorded."""
    for options, kind in STREAMS:
        with case(case_name(options), kind):
            image, guide = draw(kind, 19, 45)
            guide = None if options.get("objective") == "dynaseg" else guide
            cudart.forbid_capture(900)
            wanted = make(image, options, device="cuda").run(image, guide, steps=4)
            cudart.forbid_capture(0)
            for first in (True, False):
                cudart.favour_the_first_stream(first)
                found = make(image, options, device="cuda").run(image, guide, steps=4)
                assert_same_result(found, wanted)


def test_more_steps_than_before():
    image, guide = draw("soft", 9, 11)
    one = make(image, {}, device="cuda")
    for steps in (1, 30, 5):
        fresh = make(image, {}, device="cuda").run(image, guide, steps=steps)
        assert_same_result(one.run(image, guide, steps=steps), fresh)


def test_two_threads(cuda):
    pictures = [draw("soft", 16, 24, seed=s) for s in (1, 2)]
    alone = [make(i, {}, device="cuda").run(i, g, steps=5) for i, g in pictures]
    found = [None, None]

    def work(n):
        image, guide = pictures[n]
        refiner = make(image, {}, device="cuda")
        for _ in range(3):
            found[n] = refiner.run(image, guide, steps=5)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(found, alone, strict=True):
        assert_same_result(a, b)


def test_the_next_run_works_after_out_of_memory(cudart):
    """Whichever allocation fails, the error names it, and the next run gives the right result."""
    for after in range(12):
        with case(after):
            from runtime.errors import DeviceError

            image, guide = draw("hard", 16, 24)
            options = {"objective": "dynaguide", "channels": 6}
            wanted = make(image, options, device="cuda").run(image, guide, steps=2)
            cudart.allow_allocations(after)
            try:
                found = make(image, options, device="cuda").run(image, guide, steps=2)
            except DeviceError as error:
                assert "out of memory" in str(error)
                assert cudart.allocations_left() == 0
            else:
                assert_same_result(found, wanted)
            cudart.allow_allocations(10**6)
            assert_same_result(
                make(image, options, device="cuda").run(image, guide, steps=2), wanted
            )


@pytest.mark.parametrize("when", ["made", "run", "read"])
def test_every_call_on_a_lost_gpu_fails(cudart, when):
    from runtime.errors import DeviceError

    image, guide = draw("soft", 9, 11)
    refiner = make(image, {}, device="cuda")
    acts = {
        "made": lambda: make(image, {}, device="cuda"),
        "run": lambda: refiner.run(image, guide, steps=2),
        "read": refiner.state_dict,
    }
    cudart.plant(700, sticky=True)
    with pytest.raises(DeviceError, match="restart the process"):
        acts[when]()
    cudart.plant(0)
    for act in acts.values():
        with pytest.raises(DeviceError, match="lost by an earlier error"):
            act()


def test_a_step_that_cannot_be_recorded_is_run(cudart):
    """A recording fails when another thread waits for the device; other errors are raised."""
    for code in (0, 900, 906, 1):
        with case(code):
            from runtime.errors import DeviceError

            image, guide = draw("soft", 9, 11)
            wanted = make(image, {}, device="cuda").run(image, guide, steps=5)
            refiner = make(image, {}, device="cuda")
            cudart.forbid_capture(code)
            if code == 1:
                with pytest.raises(DeviceError):
                    refiner.run(image, guide, steps=5)
            else:
                assert_same_result(refiner.run(image, guide, steps=5), wanted)
            cudart.forbid_capture(0)
            assert_same_result(refiner.run(image, guide, steps=5), wanted)


def test_code_for_older_gpus_has_no_tensor_cores(cudart):
    image, _ = draw("soft", 9, 11)
    cudart.compile_for(70)
    with pytest.raises(ValueError, match="no code for tensor cores"):
        make(image, {}, device="cuda", precision="fp16")
    make(image, {}, device="cuda")


def test_a_deadline_in_the_last_step_changes_nothing(monkeypatch):
    import time

    now = [100.0]  # a clock on which each step takes 0.3 s
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def tick(done, steps):
        now[0] += 0.3

    image, guide = draw("soft", 9, 11)
    refiner = make(image, {}, device="cuda")
    result = refiner.run(image, guide, steps=1, deadline=100.05, progress=tick)
    assert result.stats["stop_reason"] == "steps"
    slow = refiner.run(image, guide, steps=5, deadline=now[0] + 0.2, progress=tick)
    assert (slow.stats["stop_reason"], slow.stats["steps"]) == ("budget", 1)
