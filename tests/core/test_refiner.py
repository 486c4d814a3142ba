"""The Refiner: threads, interruption, memory, its state and its arguments."""

import multiprocessing
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from cases import case
from counting_allocator import counting_allocator, preloaded
from refinements import (
    GUIDE,
    assert_same_result,
    assert_same_state,
    draw,
    each_objective,
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

import runtime
from runtime.core import classes
from runtime.errors import InputError


@pytest.fixture
def make_refiner():
    """The tests of refiner_promises.py run on the CPU here."""
    return make


# --- threads -----------------------------------------------------------------------------------


@each_objective
def test_same_bits_on_any_number_of_threads(isa, options, kind):
    image, guide = draw(kind, 37, 53)
    results = []
    for threads in (1, 2, 5):
        refiner = make(image, options, threads=threads, isa=isa)
        results.append((refiner.run(image, guide, steps=6), refiner.state_dict()))
    for result, state in results[1:]:
        assert_same_result(result, results[0][0])
        assert_same_state(state, results[0][1])


def test_several_refiners_at_a_time():
    image, guide = draw("soft", 37, 53)
    alone = make(image, {}, threads=2).run(image, guide, steps=20)
    results = {}

    def work(i):
        results[i] = make(image, {}, threads=2).run(image, guide, steps=20)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i in range(4):
        assert_same_result(results[i], alone)


def refine_in_child(queue):
    image, guide = draw("soft", 37, 53)
    queue.put(make(image, {}, threads=2).run(image, guide, steps=3).scores)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
def test_works_in_a_forked_child():
    image, guide = draw("soft", 37, 53)
    here = make(image, {}, threads=2).run(image, guide, steps=3).scores
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=refine_in_child, args=(queue,))
    child.start()
    there = queue.get(timeout=60)
    child.join(60)
    np.testing.assert_array_equal(here, there)


# --- interruption, memory ----------------------------------------------------------------------


def child(code):
    return [sys.executable, "-c", code]


def test_ctrl_c_ends_a_long_run():
    code = """
import numpy, signal, runtime
signal.signal(signal.SIGINT, signal.default_int_handler)
image = numpy.random.default_rng(0).random((96, 128, 3), "f")
refiner = runtime.Refiner(96, 128, objective="dynaseg", channels=16, min_labels=0)
refiner.run(image, steps=1)
print("started", flush=True)
try:
    refiner.run(image, steps=10**6)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    with subprocess.Popen(child(code), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "started\n"
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60)[0] == "interrupted\n"
        finally:
            process.kill()


@pytest.mark.parametrize("objective", ["residual", "dynaguide"])
def test_memory_does_not_grow(objective):
    code = f"""
import numpy, resource, runtime
rng = numpy.random.default_rng(0)
image, guide = rng.random((64, 96, 3), "f"), rng.random((64, 96, 5), "f")
options = dict(objective="{objective}", channels=16)
refiner = runtime.Refiner(64, 96, classes=5, **options)
refiner.run(image, guide, steps=12)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
refiner.run(image, guide, steps=200)
print(refiner.arena_bytes // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(child(code), capture_output=True, text=True, timeout=600, check=True)
    arena, growth = map(int, done.stdout.split())  # KiB
    assert growth < 256 < 64 * 96 * 16 * 4 / 1024 < arena


@pytest.mark.skipif(sys.platform != "linux", reason="counts glibc's allocations and Linux's faults")
@pytest.mark.parametrize("objective", ["residual", "dynaguide", "dynaseg"])
def test_steps_allocate_nothing_and_meet_no_page_faults(tmp_path, objective):
    library = counting_allocator(tmp_path)
    code = f"""
import ctypes, numpy, resource, runtime
counter = ctypes.c_long.in_dll(ctypes.CDLL({str(library)!r}), "allocations")
rng = numpy.random.default_rng(0)
image, guide = rng.random((48, 80, 3), "f"), rng.random((48, 80, 5), "f")
guide = None if "{objective}" == "dynaseg" else guide
refiner = runtime.Refiner(48, 80, classes=5, objective="{objective}", min_labels=0, threads=2)
seen = numpy.zeros((20, 4), int)
def look(done, steps):
    seen[done - 1, 0] = counter.value
    seen[done - 1, 1] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seen[done - 1, 3] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seen[done - 1, 2] = counter.value
refiner.run(image, guide, steps=3)
refiner.run(image, guide, steps=20, progress=look)
between = seen[1:, :2] - seen[:-1, 2:]
print(counter.value, *between[3:].sum(0))
"""
    counted, allocations, faults = map(int, preloaded(library, code).split())
    assert counted > 1000  # Python's own: the counter counts
    assert allocations == 0 and faults == 0


# --- state -------------------------------------------------------------------------------------


def test_state_that_does_not_fit_is_refused():
    refiner = runtime.Refiner(9, 11, classes=5)
    state = refiner.state_dict()
    for name, value, message in (
        (
            "conv1.weight",
            None,
            r"state has no 'conv1.weight'; wanted conv1.weight, conv1.bias, bn1",
        ),
        ("bn1.running_var", None, "state has no 'bn1.running_var'"),
        ("skip.weight", np.zeros(3), "state has 'skip.weight', which this network does not have"),
        ("conv3.bias", np.zeros(4), r"state 'conv3.bias' is \(4,\); wanted \(5,\)"),
        ("momentum.bn1.bias", np.zeros(3), r"state 'momentum.bn1.bias' is \(3,\); wanted \(32,\)"),
        ("conv3.bias", np.full(5, np.nan), "state 'conv3.bias' has NaN or infinite values"),
        ("bn1.running_mean", np.full(32, np.inf), "state 'bn1.running_mean' has NaN or infinite"),
    ):
        broken = {k: v for k, v in (state | {name: value}).items() if v is not None}
        with pytest.raises(InputError, match=message):
            refiner.load_state_dict(broken)
    assert_same_state(refiner.state_dict(), state)


# --- refine and the arguments ------------------------------------------------------------------


def test_refine_is_a_cold_refiner():
    image, guide = draw("hard", 24, 32)
    options = GUIDE | {"steps": 4}
    assert_same_result(
        runtime.refine(image, guide, **options), make(image, options).run(image, guide)
    )


def test_refine_drops_classes_that_are_hardly_there():
    image, soft = draw("soft", 24, 32)
    guide = np.zeros((24, 32, 9), np.float32)
    guide[..., [1, 3, 4, 6, 8]] = soft * 0.9999
    guide[..., 0] = 0.0001
    result = runtime.refine(image, guide)
    np.testing.assert_array_equal(result.classes, [1, 3, 4, 6, 8])
    assert result.scores.shape == (24, 32, 5) and result.labels.max() < 5
    expected = make(image, {}).run(image, soft)
    np.testing.assert_allclose(result.scores, expected.scores, atol=1e-4)


def test_refine_of_one_class_has_nothing_to_do():
    image, _ = draw("none", 9, 11)
    result = runtime.refine(image, np.full((9, 11), 3))
    assert result.stats["stop_reason"] == "one class" and result.stats["steps"] == 0
    assert (result.scores == 1).all() and not result.labels.any() and result.classes == [3]


def test_hard_guide_is_the_soft_one_of_ones():
    image, hard = draw("partial", 24, 32)
    soft = np.eye(5, dtype=np.float32)[hard] * (hard >= 0)[..., None]
    assert_same_result(*(make(image, {}).run(image, g) for g in (hard, soft)))
    known = draw("hard", 24, 32)[1]
    ones = np.eye(5, dtype=np.float32)[known]
    assert_same_result(*(make(image, GUIDE).run(image, g, steps=3) for g in (known, ones)))


def test_majority_classes():
    labels = np.array([[0, 0, 0, 1, 1, 3, 4, 4]])
    guide = np.array([[2, 2, 1, 0, 0, -1, -1, 1]])
    np.testing.assert_array_equal(classes.majority_classes(labels, guide, 5), [2, 0, -1, -1, 1])
    soft = np.eye(4)[guide] * (guide >= 0)[..., None]
    np.testing.assert_array_equal(classes.majority_classes(labels, soft, 5), [2, 0, -1, -1, 1])
    np.testing.assert_array_equal(classes.majority_classes(labels, None, 5), [-1] * 5)


IMAGE, SOFT = np.zeros((9, 11, 3), np.float32), np.ones((9, 11, 5), np.float32)
BAD_CALLS = [
    (lambda: runtime.Refiner(9, 11), "classes is missing; residual needs the number"),
    (lambda: runtime.Refiner(0, 11, classes=5), "height is 0; wanted 1 to"),
    (lambda: runtime.Refiner(9, 1.5, classes=5), "width is 1.5; wanted a whole number"),
    (lambda: runtime.Refiner(9, 11, classes=5000), "classes is 5000; wanted 1 to 4096"),
    (lambda: runtime.Refiner(9, 11, classes=0, objective="dynaguide"), "classes is 0; wanted 1 to"),
    (lambda: runtime.Refiner(9, 11, classes=5, threads=0), "threads is 0; wanted 1 to 1024"),
    (lambda: make(IMAGE, {}).run(IMAGE[1:], SOFT), "image is 8 x 11 pixels;.* for 9 x 11"),
    (lambda: make(IMAGE, {}).run(IMAGE, SOFT, steps=-1), "steps is -1; wanted 0 to 1000000"),
    (lambda: make(IMAGE, {}).run(IMAGE), "guide is None; the residual objective corrects"),
    (lambda: make(IMAGE, {}).run(IMAGE, SOFT[..., 1:]), "guide has 4 classes; wanted 5"),
    (lambda: make(IMAGE, {}).run(IMAGE, np.full((9, 11), 5)), "label 5; wanted less than 5"),
    (lambda: runtime.refine(IMAGE), "guide is None; the residual objective corrects a guide"),
]


def test_refuses():
    for call, message in BAD_CALLS:
        with case(message), pytest.raises(InputError, match=message):
            call()
