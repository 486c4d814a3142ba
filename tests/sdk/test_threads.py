"""Clones and submitted pictures: many threads at once give what one thread gives.

tests/rules/sanitize.sh runs this file with the thread sanitizer, too.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from runtime.errors import DeviceError, InputError
from sdk import RefineConfig, Segmenter
from sdk.segmenter import WAITING, WORKERS

PEOPLE, FRAMES = 8, 3


def pictures(number, count=FRAMES, height=60, width=80):
    """Smooth colours that drift; another scene for each number."""
    rng = np.random.default_rng(number)
    base = rng.uniform(0, 255, (5, 7, 3)).astype(np.float32)
    smooth = cv2.resize(base, (width, height), interpolation=cv2.INTER_CUBIC)
    noisy = [smooth + rng.normal(0, 9, smooth.shape) for _ in range(count)]
    return [np.clip(np.roll(p, i, 1), 0, 255).astype(np.uint8) for i, p in enumerate(noisy)]


def in_time(work):
    """What ``work`` returns; a submission that waits for ever is a failure, not a hang."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "a place is not released when its picture is done"
    return found[0]


def all_same(one, other):
    for mine, theirs in zip(one, other, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            same(a, b)


def same(a, b):
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_array_equal(a.confidence, b.confidence)
    np.testing.assert_array_equal(a.regions, b.regions)


@pytest.mark.parametrize("refine", ["residual", "dynaguide"])
def test_eight_clones_give_what_they_give_one_after_the_other(refine):
    seg = Segmenter("kmeans", refine=RefineConfig.preset(refine, channels=16, steps=3))
    alone = [[seg(p) for p in pictures(i)] for i in range(PEOPLE)]
    start = threading.Barrier(PEOPLE)

    def work(number):
        clone = seg.clone()
        start.wait()
        return [clone(p) for p in pictures(number)]

    with ThreadPoolExecutor(PEOPLE) as pool:
        together = list(pool.map(work, range(PEOPLE)))
    all_same(alone, together)


def test_eight_streams_at_once():
    seg = Segmenter("kmeans", refine=RefineConfig(channels=16))

    def work(number):
        return list(seg.clone().stream(pictures(number), warm_steps=1, cold_steps=3))

    alone = [work(i) for i in range(PEOPLE)]
    with ThreadPoolExecutor(PEOPLE) as pool:
        together = list(pool.map(work, range(PEOPLE)))
    all_same(alone, together)


def test_submitted_pictures_come_back_as_futures():
    frames = pictures(1, 10)
    with Segmenter("kmeans", refine=RefineConfig(channels=16, steps=2)) as seg:
        futures = in_time(lambda: [seg.submit(f[..., ::-1], color="bgr") for f in frames])
        for frame, future in zip(frames, futures, strict=True):
            same(future.result(), seg(frame))
    seg.close()  # twice is fine
    with seg:
        same(in_time(lambda: seg.submit(frames[0])).result(), seg(frames[0]))


def test_closing_waits_for_the_pictures_and_ends_the_threads():
    def prior(picture):
        time.sleep(0.05)
        return np.zeros(picture.shape[:2], int)

    with Segmenter(prior, refine=None) as seg:
        futures = [seg.submit(pictures(0)[0]) for _ in range(WAITING)]
    assert all(future.done() for future in futures)
    assert not [t for t in threading.enumerate() if t.name.startswith("segment")]


def test_submit_waits_when_enough_are_on_their_way():
    release, begun = threading.Event(), []

    def prior(picture):
        begun.append(1)
        release.wait(20)
        return np.zeros(picture.shape[:2], int)

    with Segmenter(prior, refine=None) as seg:
        futures = [seg.submit(pictures(0)[0]) for _ in range(WAITING)]
        one_more = threading.Thread(target=lambda: futures.append(seg.submit(pictures(0)[0])))
        one_more.start()
        one_more.join(0.3)
        deadline = time.monotonic() + 20
        while len(begun) < WORKERS and time.monotonic() < deadline:
            time.sleep(0.01)
        assert one_more.is_alive() and len(begun) == WORKERS
        release.set()
        one_more.join(20)
        assert [f.result().labels.max() for f in futures] == [0] * (WAITING + 1)


def test_an_error_of_a_submitted_picture_is_its_future_s():
    with Segmenter("kmeans", refine=None) as seg:
        futures = in_time(lambda: [seg.submit(b"no picture") for _ in range(3 * WAITING)])
        for future in futures:
            with pytest.raises(InputError, match="not a picture"):
                future.result()


def test_an_engine_that_cannot_be_shared_is_not():
    seg = Segmenter("kmeans")
    seg.pipeline.prior = type("Prior", (), {"engine": type("Engine", (), {"backend": "tensorrt"})})
    for call in (seg.clone, lambda: seg.submit(pictures(0)[0])):
        with pytest.raises(InputError, match="runs one picture at a time"):
            call()


def test_no_further_thread_is_one_sentence_and_takes_no_place(monkeypatch):
    """As under a limit of processes: Thread.start raises RuntimeError."""

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with Segmenter("kmeans", refine=None) as seg:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            for _ in range(3 * WAITING):  # a place that stays taken would make submit wait for ever
                with pytest.raises(DeviceError, match="can't start new thread") as caught:
                    seg.submit(pictures(0)[0])
                assert "ulimit -u" in caught.value.fix
        same(in_time(lambda: seg.submit(pictures(0)[0])).result(), seg(pictures(0)[0]))
    assert not [t for t in threading.enumerate() if t.name.startswith("segment")]


def test_closing_after_an_error_ends_the_threads(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    seg = Segmenter("kmeans", refine=None)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(DeviceError, match="no thread can be started"):
        seg.submit(pictures(0)[0])
    seg.close()
    seg.close()
