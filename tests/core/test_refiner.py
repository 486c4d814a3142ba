"""The refinement: a step against the reference, ten against PyTorch, and every promise of run."""

import functools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import permutations

import numpy as np
import pytest
from conftest import assert_as_exact_as_float32, relative_error, scene, wide

import runtime
import runtime.silhouette
from runtime import RefineOptions, _core, network, ops, reference
from runtime.errors import InputError

SMALL = {"objective": "dynaseg", "channels": 8, "min_labels": 0}  # a quick cluster objective
GUIDE = {"objective": "dynaguide", "channels": 7}
SEG = {"objective": "dynaseg", "channels": 7}
CASES = [  # options, kind of guide
    ({}, "soft"),
    ({"blocks": 3, "channels": 17}, "soft"),
    ({"offsets": (1, 3, 40), "lam": 1.0, "sigma": 0.3, "balance": 0.0}, "unknown"),
    (GUIDE, "hard"),
    (GUIDE | {"blocks": 3}, "partial"),
    (GUIDE | {"skip": "shared"}, "hard"),
    (GUIDE | {"skip": "shared", "blocks": 3}, "partial"),
    (GUIDE | {"skip": "none"}, "hard"),
    (GUIDE | {"mapping": "index_modulo"}, "partial"),
    (GUIDE | {"mapping": "index_modulo", "final_bn": "running", "skip": "shared"}, "hard"),
    (GUIDE | {"final_bn": "running"}, "hard"),
    (GUIDE | {"final_bn": "none"}, "partial"),
    (GUIDE | {"soft_guide": True}, "soft"),
    (GUIDE | {"soft_guide": True, "mapping": "index_modulo"}, "soft"),
    (GUIDE | {"soft_guide": True, "channels": 3}, "unknown"),  # fewer clusters than classes
    (GUIDE | {"channels": 3}, "partial"),
    (GUIDE | {"channels": 3, "mapping": "index_modulo"}, "partial"),
    (GUIDE, "none"),
    (GUIDE | {"continuity": "l1"}, "hard"),
    (GUIDE | {"diagonals": False}, "hard"),
    (GUIDE | {"weighting": "scf"}, "hard"),
    (GUIDE | {"weighting": "fixed", "mu": 3.0, "channels": 33}, "partial"),
    (SEG, "none"),
    (SEG | {"blocks": 3, "channels": 16}, "none"),
    (SEG | {"weighting": "fixed", "mu": 0.5}, "none"),
    (SEG | {"weighting": "scf"}, "none"),
    (SEG | {"beta": 2.0, "diagonals": True}, "none"),
    (SEG | {"continuity": "huber", "skip": "own", "final_bn": "none"}, "none"),
]


def case_name(value):
    return "-".join(map(str, value.values())) or "residual" if isinstance(value, dict) else value


each_case = pytest.mark.parametrize("options, kind", CASES, ids=case_name)


def draw(kind, height=13, width=17, seed=3):
    """Return image and guide, as reference.run takes them."""
    image, soft, hard = scene(height, width, seed=seed)
    unknown = np.random.default_rng(seed).random((height, width)) < 0.3
    if kind == "unknown":
        soft[unknown] = 0
    hard = np.where(unknown, -1, hard).astype(np.int32) if kind == "partial" else hard
    return image, {"none": None, "hard": hard, "partial": hard}.get(kind, soft)


def make(image, options, **more):
    """Make a Refiner for the picture; five guide classes for residual."""
    classes = 5 if options.get("objective", "residual") == "residual" else None
    return runtime.Refiner(*image.shape[:2], classes=classes, **options, **more)


def joined(state, prefix=""):
    """Return the parameters (or, with prefix "momentum.", their momenta) as one vector."""
    others = ("momentum.", "running_", "num_batches_")
    names = sorted(k for k in state if not any(word in k for word in others))
    return np.concatenate([np.ravel(state[prefix + k]) for k in names]).astype(np.float64)


def buffers(state):
    return np.concatenate([v for k, v in state.items() if "running" in k])


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def assert_same_result(a, b):
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_array_equal(a.scores, b.scores)
    times = {"device_ms": None}  # what may differ
    assert a.stats | times == b.stats | times


# --- one step against the reference ------------------------------------------------------------


def assert_step_matches(image, guide, options, target, times=2):
    refiner = make(image, options, target=target)
    start = refiner.state_dict()
    result = refiner.run(image, guide, steps=1)
    state = refiner.state_dict()
    losses = [sum(v) for v in result.stats["losses"].values()]
    used = slice(None) if len(losses) == 4 else [0, 2, 3]  # residual has no similarity

    def step(image, guide):
        scores, _, rows, counts, _, after = reference.run(
            refiner.options, start, image, guide, steps=1
        )
        momenta = joined(after, "momentum.")
        return scores, momenta, joined(after), buffers(after), rows[0, used], counts

    arrays = result.scores, joined(state, "momentum."), joined(state), buffers(state)
    counts = np.array(result.stats["clusters_per_step"])
    assert_as_exact_as_float32((*arrays, np.array(losses), counts), step, image, guide, times=times)
    np.testing.assert_array_equal(result.labels, result.scores.argmax(-1))
    assert state["bn1.num_batches_tracked"] == 1


@each_case
def test_step(target, options, kind):
    assert_step_matches(*draw(kind), options, target)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 17), (19, 1), (2, 2), (3, 61)])
@pytest.mark.parametrize(
    "options, kind", [({}, "soft"), (GUIDE, "hard"), (SEG, "none")], ids=case_name
)
def test_step_on_thin_pictures(target, shape, options, kind):
    # A norm over so few pixels magnifies rounding; how much, is luck.
    assert_step_matches(*draw(kind, *shape), options, target, times=4)


@pytest.mark.parametrize("channels, lr, seed", [(9, 1.0, 10), (7, 2.0, 8)])
def test_overlap_mapping_freezes_after_ten_steps(monkeypatch, target, channels, lr, seed):
    image, guide = draw("hard", 24, 32)
    refiner = make(image, GUIDE | {"channels": channels, "lr": lr, "seed": seed}, target=target)
    start = refiner.state_dict()
    ours = refiner.run(image, guide, steps=12).stats["losses"]["guide"]
    close = {}
    for steps in (9, 10, 11):  # the run is wild, so that the mapping still changes
        monkeypatch.setattr(reference, "MAPPING_STEPS", steps)
        rows = reference.run(refiner.options, start, wide(image), guide, steps=12)[2]
        close[steps] = np.allclose(ours, rows[:, 3], rtol=1e-4)
    assert close == {9: False, 10: True, 11: False}


def test_assignment_costs_least(rng):
    for rows, columns in ((1, 1), (1, 5), (3, 3), (2, 6), (4, 6)):
        for cost in (
            rng.random((rows, columns)),
            rng.integers(0, 3, (rows, columns)).astype(float),
        ):
            chosen = _core.assign(cost)
            assert len(set(chosen)) == rows
            costs = [cost[range(rows), list(p)].sum() for p in permutations(range(columns), rows)]
            assert cost[range(rows), chosen].sum() == pytest.approx(min(costs))
            np.testing.assert_array_equal(chosen, reference.assign(cost))
    cost = rng.random((20, 100))
    np.testing.assert_array_equal(_core.assign(cost), reference.assign(cost))


# --- against PyTorch ---------------------------------------------------------------------------


def twin(options, state, image, guide):
    pytest.importorskip("torch", reason="needs PyTorch, the oracle")
    pytest.importorskip("scipy", reason="needs SciPy, the oracle's assignment")
    from benchmarks.torch_twin import Twin

    return Twin(options, state, image, guide)


@each_case
def test_reference_gradients_are_those_of_torch(options, kind):
    image, guide = draw(kind)
    refiner = make(image, options)
    o, start = refiner.options, refiner.state_dict()
    other = twin(o, start, image, guide)
    losses, clusters = other.step()

    state = {k: wide(v) for k, v in start.items()}
    fixed = reference.prepare(o, wide(image), guide)
    r, cache = reference.forward(o, state, fixed["x"], fixed["prior"], False)
    labels, table = r.argmax(-1), None if other.table is None else other.table.numpy()
    dr, values = reference.losses(o, r, labels, guide, table, fixed)
    ours = reference.backward(o, state, cache, dr)
    theirs = {k: p.grad.numpy() for k, p in other.net.named_parameters()}
    assert ours.keys() == theirs.keys() and clusters == len(np.unique(labels))
    np.testing.assert_allclose(values, losses, rtol=1e-12, atol=1e-12)
    assert relative_error(joined(ours), joined(theirs)) <= 1e-9


@each_case
def test_reference_mapping_is_that_of_torch(options, kind):
    image, guide = draw(kind)
    refiner = make(image, options)
    o, start = refiner.options, refiner.state_dict()
    other = twin(o, start, image, guide)
    other.step()
    if other.table is None:
        return
    fixed = reference.prepare(o, wide(image), guide)
    r, _ = reference.forward(o, {k: wide(v) for k, v in start.items()}, fixed["x"], None, False)
    labels, theirs, count = r.argmax(-1), other.table.numpy(), len(other.table)
    if o.mapping == "index_modulo":
        ours = reference.modulo_mapping(guide, labels, count)
        np.testing.assert_array_equal(ours, theirs)
        return
    ours = reference.overlap_mapping(guide, labels, count, refiner.classes)
    soft = guide if guide.ndim == 3 else np.eye(count + 1)[guide][..., :count]
    area = np.einsum("hwc,hwk->ck", soft, np.eye(refiner.classes)[labels])
    classes = np.arange(count)
    assert area[classes, ours].sum() == pytest.approx(area[classes, theirs].sum())  # may tie


TEN_STEPS = [
    ({}, "soft"),
    ({"blocks": 3}, "unknown"),
    ({"objective": "dynaguide"}, "hard"),
    ({"objective": "dynaguide", "channels": 32, "blocks": 3, "soft_guide": True}, "soft"),
    ({"objective": "dynaguide", "channels": 32, "skip": "shared", "final_bn": "running",
      "mapping": "index_modulo"}, "partial"),
    ({"objective": "dynaseg"}, "none"),
    ({"objective": "dynaseg", "channels": 32, "weighting": "scf"}, "none"),
]  # fmt: skip


TEN_SEEDS = [7, 7, 10, 10, 10, 24, 10]


@functools.lru_cache
def ten_torch_steps(case):
    options, kind = TEN_STEPS[case]
    image, guide = draw(kind, 64, 96, seed=TEN_SEEDS[case])
    refiner = make(image, options)
    other = twin(refiner.options, refiner.state_dict(), image, guide)
    losses, clusters = zip(*(other.step() for _ in range(10)), strict=True)
    return np.transpose(losses), list(clusters), other.labels()


# The loop is chaotic: where a ReLU, an arg max or the sign of an L1 difference lies within float32
# rounding of its kink, any float32 program leaves the exact path, PyTorch's too (by 0.6 % of the
# loss after ten steps). On these pictures that does not happen.
@pytest.mark.parametrize("case", range(len(TEN_STEPS)), ids=lambda i: case_name(TEN_STEPS[i][0]))
def test_ten_steps_beside_torch(target, case):
    options, kind = TEN_STEPS[case]
    image, guide = draw(kind, 64, 96, seed=TEN_SEEDS[case])
    losses, clusters, labels = ten_torch_steps(case)
    result = make(image, options, target=target).run(image, guide, steps=10)
    assert result.stats["clusters_per_step"] == clusters
    used = losses if len(result.stats["losses"]) == 4 else losses[[0, 2, 3]]
    np.testing.assert_allclose(list(result.stats["losses"].values()), used, rtol=1e-4, atol=1e-7)
    assert (result.labels == labels).mean() >= 0.999


# The gate: one step is exact to 5e-5 of the update. One kink on the wrong side costs 1e-5 to 2e-4,
# in PyTorch's float32 as well. Among two million activations some always lie close, so the picture
# (seed 6) is one where they fall right; of dynaseg, the signs of a few L1 differences remain.
GATE = 5e-5
GATE_GUIDES = {"residual": "soft", "dynaguide": "hard", "dynaseg": "none"}


@functools.lru_cache
def torch_update(objective, blocks):
    image, guide = draw(GATE_GUIDES[objective], 120, 160, seed=6)
    refiner = make(image, {"objective": objective, "blocks": blocks})
    other = twin(refiner.options, refiner.state_dict(), image, guide)
    before = joined(other.state())
    other.step()
    return joined(other.state()) - before


@pytest.mark.parametrize("objective", GATE_GUIDES)
@pytest.mark.parametrize("blocks", [2, 3])
def test_gate(target, objective, blocks):
    image, guide = draw(GATE_GUIDES[objective], 120, 160, seed=6)
    refiner = make(image, {"objective": objective, "blocks": blocks}, target=target)
    before = joined(refiner.state_dict())
    refiner.run(image, guide, steps=1)
    update = joined(refiner.state_dict()) - before
    assert relative_error(update, torch_update(objective, blocks)) <= GATE


# --- determinism -------------------------------------------------------------------------------

THREE = [({}, "soft"), (SMALL | {"objective": "dynaguide"}, "hard"), (SMALL, "none")]
each_objective = pytest.mark.parametrize(
    "options, kind", THREE, ids=["residual", "dynaguide", "dynaseg"]
)


@each_objective
def test_same_bits_on_any_number_of_threads(target, options, kind):
    image, guide = draw(kind, 37, 53)
    results = []
    for threads in (1, 2, 5):
        refiner = make(image, options, threads=threads, target=target)
        results.append((refiner.run(image, guide, steps=6), refiner.state_dict()))
    for result, state in results[1:]:
        assert_same_result(result, results[0][0])
        assert_same_state(state, results[0][1])


@each_objective
def test_same_bits_again(options, kind):
    image, guide = draw(kind, 24, 32)
    refiner = make(image, options)
    first = refiner.run(image, guide, steps=6)
    assert_same_result(refiner.run(image, guide, steps=6), first)
    assert_same_result(make(image, options).run(image, guide, steps=6), first)
    other = make(image, options | {"seed": 1}).run(image, guide, steps=6)
    assert (other.scores != first.scores).any()


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


# --- when it stops -----------------------------------------------------------------------------


def test_no_steps_give_the_prior():
    image, guide = draw("soft", 9, 11)
    guide[0, :, 0] = 0  # counts as 1e-4
    result = make(image, {}).run(image, guide, steps=0)
    prior = np.maximum(guide / guide.sum(-1, keepdims=True), 1e-4)
    np.testing.assert_allclose(
        result.scores, prior / prior.sum(-1, keepdims=True), rtol=1e-6, atol=1e-9
    )
    np.testing.assert_array_equal(result.labels, guide.argmax(-1))
    assert result.stats["steps"] == 0 and result.stats["stop_reason"] == "steps"
    assert result.stats["losses"]["total"] == result.stats["clusters_per_step"] == []


def test_all_steps_are_taken():
    image, _ = draw("none", 24, 32)
    stats = make(image, SMALL | {"steps": 7}).run(image).stats
    assert stats["steps"] == len(stats["clusters_per_step"]) == 7
    assert stats["stop_reason"] == "steps" and stats["label_floor"] == 0
    assert list(stats["losses"]) == ["total", "similarity", "spatial", "guide"]
    image, guide = draw("soft", 9, 11)
    assert list(make(image, {}).run(image, guide).stats["losses"]) == ["total", "pair", "guide"]


@pytest.mark.parametrize("min_labels", [6, 7, 8])
def test_min_labels(min_labels):
    image, _ = draw("none", 24, 32)
    stats = make(image, SMALL | {"min_labels": min_labels}).run(image, steps=100).stats
    *before, last = stats["clusters_per_step"]
    assert stats["stop_reason"] == "min_labels" and stats["steps"] == len(before) + 1 < 100
    assert all(count > min_labels for count in before) and last <= min_labels


def test_early_stop_needs_three_calm_looks():
    image, _ = draw("none", 24, 32)
    still = SMALL | {"lr": 0.0}
    stats = make(image, still | {"early_stop": 0.995}).run(image, steps=100).stats
    assert (stats["stop_reason"], stats["steps"]) == ("converged", 31)
    assert make(image, still).run(image, steps=100).stats["stop_reason"] == "steps"
    assert make(image, still | {"early_stop": 1.0}).run(image, steps=30).stats["steps"] == 30


STOPS = [  # options, silhouette's floor
    ({"early_stop": 0.995}, 0),
    ({"early_stop": 0.995, "lr": 0.002}, 0),
    ({"early_stop": 1.0, "lr": 0.002}, 0),
    (SMALL | {"min_labels": 6}, 0),
    (SMALL, 6),
    (SMALL, 7),
    (SMALL | {"seed": 4}, 7),
    (SMALL | {"seed": 3}, 6),
    (SMALL | {"min_labels": 7}, 6),
    (SMALL | {"min_labels": 6}, 7),
]


@pytest.mark.parametrize("options, floor", STOPS)
def test_stops_where_the_reference_stops(monkeypatch, options, floor):
    image, guide = draw("none" if "objective" in options else "soft", 24, 32)
    monkeypatch.setattr(runtime.silhouette, "best_cluster_count", lambda image: floor)
    refiner = make(image, options | {"silhouette": floor > 0})
    start = refiner.state_dict()
    result = refiner.run(image, guide, steps=150)
    _, labels, _, counts, stop, _ = reference.run(
        refiner.options, start, wide(image), guide, label_floor=floor, steps=150
    )
    assert result.stats["stop_reason"] == stop != "steps"
    assert result.stats["clusters_per_step"] == counts.tolist()
    assert (result.labels == labels).mean() >= 0.99


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("floor", [6, 7])
def test_silhouette_keeps_the_last_map_with_enough_labels(monkeypatch, seed, floor):
    image, _ = draw("none", 24, 32)
    monkeypatch.setattr(runtime.silhouette, "best_cluster_count", lambda image: floor)
    chosen = make(image, SMALL | {"silhouette": True, "seed": seed})
    result = chosen.run(image, steps=100)
    assert result.stats["label_floor"] == floor
    plain = make(image, SMALL | {"seed": seed})
    for steps in range(result.stats["steps"], -1, -1):
        last = plain.run(image, steps=steps)
        if last.stats["clusters"] >= floor:
            break
    assert result.stats["clusters"] == last.stats["clusters"] >= floor
    np.testing.assert_array_equal(result.labels, last.labels)
    assert_same_state(chosen.state_dict(), plain.state_dict())


def test_diverged_keeps_the_last_finite_map():
    image, guide = draw("soft", 24, 32)
    wild = make(image, {"lr": 10.0, "momentum": 0.9999})
    result = wild.run(image, guide, steps=300)
    total = result.stats["losses"]["total"]
    assert result.stats["stop_reason"] == "diverged"
    assert len(total) == result.stats["steps"] + 1
    assert np.isfinite(total[:-1]).all() and not np.isfinite(total[-1])
    np.testing.assert_allclose(result.scores.sum(-1), 1, rtol=1e-5)
    calm = make(image, {"lr": 10.0, "momentum": 0.9999})
    last = calm.run(image, guide, steps=result.stats["steps"] - 1)
    np.testing.assert_array_equal(result.scores, last.scores)
    assert_same_state(wild.state_dict(), calm.state_dict())


# --- progress, interruption, memory ------------------------------------------------------------


def test_progress_is_told_each_step():
    image, guide = draw("soft", 9, 11)
    seen = []
    make(image, {}).run(image, guide, steps=4, progress=lambda *now: seen.append(now))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_error_in_progress_ends_the_run_after_that_step():
    class Stop(Exception):
        pass

    def progress(done, steps):
        if done == 3:
            raise Stop

    image, guide = draw("soft", 9, 11)
    stopped, other = make(image, {}), make(image, {})
    with pytest.raises(Stop):
        stopped.run(image, guide, progress=progress)
    other.run(image, guide, steps=3)
    assert_same_state(stopped.state_dict(), other.state_dict())


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
            assert process.communicate(timeout=2)[0] == "interrupted\n"
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
    done = subprocess.run(child(code), capture_output=True, text=True, timeout=120, check=True)
    arena, growth = map(int, done.stdout.split())  # KiB
    assert growth < 256 < 64 * 96 * 16 * 4 / 1024 < arena


COUNTER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stddef.h>
atomic_long allocations;
void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);
void *malloc(size_t n) { ++allocations; return __libc_malloc(n); }
void *calloc(size_t n, size_t m) { ++allocations; return __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { ++allocations; return __libc_realloc(p, n); }
int posix_memalign(void **p, size_t a, size_t n) {
  ++allocations;
  return (*p = __libc_memalign(a, n)) ? 0 : 12;
}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts glibc's allocations and Linux's faults")
@pytest.mark.parametrize("objective", ["residual", "dynaguide", "dynaseg"])
def test_steps_allocate_nothing_and_meet_no_page_faults(tmp_path, objective):
    if shutil.which("cc") is None or "LD_PRELOAD" in os.environ:
        pytest.skip("no C compiler for the counting allocator, or another one is preloaded")
    (tmp_path / "count.c").write_text(COUNTER)
    library = tmp_path / "count.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", library, tmp_path / "count.c"]
    subprocess.run(command, check=True)
    code = f"""
import ctypes, numpy, resource, runtime
counter = ctypes.c_long.in_dll(ctypes.CDLL({str(library)!r}), "allocations")
rng = numpy.random.default_rng(0)
image, guide = rng.random((160, 240, 3), "f"), rng.random((160, 240, 5), "f")
guide = None if "{objective}" == "dynaseg" else guide
refiner = runtime.Refiner(160, 240, classes=5, objective="{objective}", min_labels=0, threads=2)
seen = numpy.zeros((40, 4), int)
def look(done, steps):
    seen[done - 1, 0] = counter.value
    seen[done - 1, 1] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seen[done - 1, 3] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seen[done - 1, 2] = counter.value
refiner.run(image, guide, steps=3)
refiner.run(image, guide, steps=40, progress=look)
between = seen[1:, :2] - seen[:-1, 2:]
print(counter.value, *between[3:].sum(0))
"""
    environment = os.environ | {"LD_PRELOAD": str(library)}
    done = subprocess.run(
        child(code), capture_output=True, text=True, timeout=120, check=True, env=environment
    )
    counted, allocations, faults = map(int, done.stdout.split())
    assert counted > 1000  # Python's own: the counter counts
    assert allocations == 0 and faults == 0


# --- state -------------------------------------------------------------------------------------


@each_objective
def test_warm_run_goes_on_where_the_last_one_stopped(options, kind):
    image, guide = draw(kind, 24, 32)
    cold, warm = make(image, options), make(image, options)
    expected = cold.run(image, guide, steps=10)
    warm.run(image, guide, steps=5)
    result = warm.run(image, guide, steps=5, warm=True)
    np.testing.assert_array_equal(result.scores, expected.scores)
    assert result.stats["losses"]["total"] == expected.stats["losses"]["total"][5:]
    assert_same_state(warm.state_dict(), cold.state_dict())
    assert_same_result(warm.run(image, guide, steps=10), expected)  # cold again


@each_objective
def test_state_goes_to_another_refiner(options, kind):
    image, guide = draw(kind, 24, 32)
    first, second = make(image, options), make(image, options | {"seed": 9})
    first.run(image, guide, steps=3)
    second.load_state_dict(first.state_dict())
    assert_same_state(second.state_dict(), first.state_dict())
    assert_same_result(*(r.run(image, guide, steps=3, warm=True) for r in (first, second)))
    plain = {k: v for k, v in first.state_dict().items() if not k.startswith("momentum.")}
    second.load_state_dict(plain)  # as PyTorch saves it
    assert not joined(second.state_dict(), "momentum.").any()


@each_case
def test_state_loads_in_torch(options, kind):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    from benchmarks.torch_twin import Net

    image, guide = draw(kind)
    refiner = make(image, options)
    refiner.run(image, guide, steps=2)
    o, state = refiner.options, refiner.state_dict()
    net = Net(network.inputs(o), o.channels, refiner.classes, o.blocks, o.skip, o.final_bn)
    tensors = {k: torch.as_tensor(v) for k, v in state.items() if not k.startswith("momentum.")}
    net.load_state_dict(tensors, strict=True)
    shapes = {k: tuple(p.shape) for k, p in net.named_parameters()}
    assert shapes == network.shapes(o, refiner.classes)[0]
    refiner.load_state_dict({k: v.numpy() for k, v in net.state_dict().items()})


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


@each_case
def test_initial_weights_follow_torch(options, kind):
    o = RefineOptions(**options)
    state = network.initial_state(o, 5)
    parameters, norms = network.shapes(o, 5)
    bound = None
    for name, shape in parameters.items():
        value, layer = state[name], name.partition(".")[0]
        assert value.shape == shape and value.dtype == np.float32
        assert not state[f"momentum.{name}"].any()
        if layer.startswith("bn"):
            assert (value == (name.endswith("weight"))).all()
        elif o.objective == "residual" and layer == "conv3":
            assert not value.any()
        else:
            bound = np.prod(shape[1:]) ** -0.5 if name.endswith("weight") else bound
            assert np.abs(value).max() <= bound
            if value.size > 150:
                assert value.std() == pytest.approx(bound / np.sqrt(3), rel=0.1)
                assert abs(value.mean()) < bound / 5
    for name in norms:
        assert (state[name] == name.endswith("var")).all()


def test_published_network_has_its_published_size():
    parameters, _ = network.shapes(RefineOptions(objective="dynaguide"), 100)
    assert sum(np.prod(shape) for shape in parameters.values()) == 106_400


def test_first_weights_of_seed_0():
    for objective, layer, first in (
        ("residual", "conv1.weight", [0.04083407, -0.06863636, -0.13685526]),
        ("residual", "conv2.0.bias", [0.03816873, 0.0130208, 0.05593195]),
        ("dynaguide", "conv1.weight", [0.05271656, -0.08860916, -0.17667939]),
        ("dynaguide", "conv3.weight", [0.08449974, -0.01899855, 0.05437833]),
        ("dynaseg", "conv3.weight", [-0.0379197, -0.00694901, -0.01941046]),
    ):
        state = network.initial_state(RefineOptions(objective=objective), 100)
        np.testing.assert_allclose(state[layer].ravel()[:3], first, rtol=1e-6)
    seeds = [
        network.initial_state(RefineOptions(seed=s), 5)["conv1.bias"] for s in (0, 1, 2**63 - 1)
    ]
    assert len({s.tobytes() for s in seeds}) == 3


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
    np.testing.assert_array_equal(ops.majority_classes(labels, guide, 5), [2, 0, -1, -1, 1])
    soft = np.eye(4)[guide] * (guide >= 0)[..., None]
    np.testing.assert_array_equal(ops.majority_classes(labels, soft, 5), [2, 0, -1, -1, 1])
    np.testing.assert_array_equal(ops.majority_classes(labels, None, 5), [-1] * 5)


IMAGE, SOFT = np.zeros((9, 11, 3), np.float32), np.ones((9, 11, 5), np.float32)
BAD_CALLS = [
    (lambda: runtime.Refiner(9, 11), "classes is missing; residual needs the number"),
    (lambda: runtime.Refiner(0, 11, classes=5), "height is 0; wanted 1 to"),
    (lambda: runtime.Refiner(9, 1.5, classes=5), "width is 1.5; wanted a whole number"),
    (lambda: runtime.Refiner(9, 11, classes=5000), "classes is 5000; wanted 1 to 4096"),
    (lambda: runtime.Refiner(9, 11, classes=5, threads=0), "threads is 0; wanted 1 to 1024"),
    (lambda: make(IMAGE, {}).run(IMAGE[1:], SOFT), "image is 8 x 11 pixels;.* for 9 x 11"),
    (lambda: make(IMAGE, {}).run(IMAGE, SOFT, steps=-1), "steps is -1; wanted 0 to 1000000"),
    (lambda: make(IMAGE, {}).run(IMAGE), "guide is None; the residual objective corrects"),
    (lambda: make(IMAGE, {}).run(IMAGE, SOFT[..., 1:]), "guide has 4 classes; wanted 5"),
    (lambda: make(IMAGE, {}).run(IMAGE, np.full((9, 11), 5)), "label 5; wanted less than 5"),
    (lambda: runtime.refine(IMAGE), "guide is None; the residual objective corrects a prior"),
]


@pytest.mark.parametrize("call, message", BAD_CALLS)
def test_refuses(call, message):
    with pytest.raises(InputError, match=message):
        call()
