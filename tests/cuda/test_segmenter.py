"""Segmenter(device="cuda"), with the kernels on the host."""

import sys
import threading
import types

import numpy as np
import pytest
from scenes import scene

import runtime
from runtime.device import choose
from runtime.errors import DeviceError, InputError, MissingBackend
from sdk import FilterConfig, RefineConfig, Segmenter


@pytest.fixture
def picture():
    return np.ascontiguousarray((scene(36, 52, seed=3)[0] * 255).round().astype(np.uint8))


CASES = [
    {},
    {"refine": None},
    {"filter": None},
    {"refine": RefineConfig(steps=3, scale=1.0), "filter": FilterConfig(radius=2)},
    {"refine": RefineConfig.preset("dynaguide", channels=8, steps=3)},
    {"refine": RefineConfig.preset("dynaseg_scf", channels=8, steps=3)},
]


@pytest.mark.parametrize("options", CASES, ids=range(len(CASES)))
def test_the_labels_are_those_of_the_cpu(cuda, picture, options):
    here, there = Segmenter(**options), Segmenter(device="cuda", **options)
    wanted, found = here(picture), there(picture)
    assert found.device == "cuda" and "cuda:0 fp32" in found.backend
    assert (found.labels == wanted.labels).mean() >= 0.999
    np.testing.assert_allclose(found.confidence, wanted.confidence, atol=1e-4)
    assert found.stats["stop_reason"] == wanted.stats["stop_reason"]
    again = there(picture)
    np.testing.assert_array_equal(again.labels, found.labels)


def test_a_second_picture_takes_no_memory(cuda, cudart, picture):
    """The refiner is kept, with its recorded steps."""
    segmenter = Segmenter(device="cuda", refine=RefineConfig(steps=2))
    first = segmenter(picture)
    before = cudart.allocations_left()
    again = segmenter(picture)
    assert cudart.allocations_left() == before
    np.testing.assert_array_equal(again.labels, first.labels)
    device = again.stats["device_ms"]
    assert set(device) == {"preprocess", "refine", "filter"}
    assert all(0 < device[stage] <= again.timings[stage] for stage in device)


def test_streams_start_warm(cuda, picture):
    frames = [picture, np.roll(picture, 1, 1), np.roll(picture, 2, 1)]
    wanted = [r.labels for r in Segmenter().stream(frames)]
    found = list(Segmenter(device="cuda").stream(frames))
    for a, b in zip(found, wanted, strict=True):
        assert (a.labels == b).mean() >= 0.99
    assert [r.frame.start for r in found] == ["cold", "warm", "warm"]


def test_clones_work_side_by_side(cuda, picture):
    segmenter = Segmenter(device="cuda", refine=RefineConfig(steps=4))
    pictures = [picture, np.ascontiguousarray(picture[::-1])]
    wanted = [segmenter(p).labels for p in pictures]
    found = [[], []]

    def work(i):
        clone = segmenter.clone()
        for _ in range(3):
            found[i].append(clone(pictures[i]).labels)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(2):
        for labels in found[i]:
            np.testing.assert_array_equal(labels, wanted[i])


@pytest.mark.parametrize("built", [False, True])
def test_without_refinement_the_gpu_is_still_asked_for(monkeypatch, picture, built):
    """Without the CUDA module only a network runs on a GPU; other priors are an error."""
    problem = MissingBackend("no CUDA driver: libcuda.so.1", fix="install NVIDIA's driver")
    monkeypatch.setattr(choose, "cuda_problem", lambda: problem)
    module = types.SimpleNamespace(architectures=lambda: ["9.0"], runtime_version=lambda: 13000)
    monkeypatch.setitem(sys.modules, "runtime._cuda", module if built else None)
    monkeypatch.setattr(runtime, "_cuda", module, raising=False)
    choose._cuda.cache_clear()
    for prior in ("kmeans", lambda image: np.zeros(image.shape[:2], int)):
        for precision in ("fp32", "fp16"):
            with pytest.raises(MissingBackend, match="no CUDA driver"):
                Segmenter(prior, device="cuda", refine=None, precision=precision)
    with pytest.raises(InputError, match="precision 'fp16' is an option of the native refinement"):
        Segmenter(device="cuda", refine_backend="onnx", precision="fp16")


def test_the_next_picture_works_after_out_of_memory(cuda, cudart, picture):
    segmenter = Segmenter(device="cuda", refine=RefineConfig(steps=2))
    wanted = segmenter(picture).labels
    cudart.allow_allocations(0)
    larger = np.tile(picture, (2, 1, 1))
    with pytest.raises(DeviceError, match=r"out of memory.*\n  fix: use a smaller scale"):
        segmenter(larger)
    cudart.allow_allocations(10**6)
    np.testing.assert_array_equal(segmenter(picture).labels, wanted)
    assert segmenter(larger).labels.shape == (72, 52)
