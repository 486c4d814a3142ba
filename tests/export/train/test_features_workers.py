"""The processes that read pictures: they change no bit, and end with the iteration."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from cases import case
from tiny_features import (
    FIVE,
    MANY,
    batches,
    children,
    equal,
    seven_pictures,
    tiny_backbone,
    write_picture,
)

from export.train.feature_cache import FeatureCache
from runtime.errors import DeviceError
from runtime.opencv import cv2

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and processes of Linux")


@pytest.fixture
def backbone():
    return tiny_backbone()


@pytest.fixture
def files(tmp_path):
    return seven_pictures(tmp_path)


def test_workers_and_cache_do_not_change_a_bit(files, backbone, tmp_path):
    """Without a cache, with a cold, a half filled and a warm one, in this process and in two."""
    plain = [*batches(files, backbone, rule=FIVE)]
    for workers in (0, 2):
        with case(workers):
            options = {"rule": FIVE, "workers": workers}
            assert equal(plain, batches(files, backbone, **options))
            folder = tmp_path / f"cache {workers}"
            options["cache"] = FeatureCache(folder, MANY)
            [*batches(files, backbone, 0, 3, **options)]
            stored = {*folder.rglob("*.safetensors")}
            assert len(stored) == 12
            assert equal(plain, batches(files, backbone, **options))
            assert len({*folder.rglob("*.safetensors")}) == 24
            backbone.module.calls.clear()
            options["cache"] = FeatureCache(folder, MANY)
            assert equal(plain, batches(files, backbone, **options))
            assert backbone.module.calls == []
            assert equal(plain[2:], batches(files, backbone, 2, **options))


def test_the_global_random_numbers_are_unchanged(files, backbone, tmp_path):
    for workers in (0, 2):
        state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
        [*batches(files, backbone, workers=workers)]
        assert torch.equal(state, torch.get_rng_state())
        assert numpy_state == np.random.get_state()[1].tolist()


def test_a_worker_that_is_killed_is_one_clear_error(files, backbone):
    before = {*children()}
    for count in (1, 2):
        with case(count):
            steps = batches(files, backbone, 0, 10**6, workers=2)
            next(steps)
            for child in sorted({*children()} - before)[:count]:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.2)  # no error is raised here
            with pytest.raises(
                DeviceError, match="a process that reads pictures was end"
            ) as raised:
                for _ in steps:
                    pass
            assert "--workers 0" in raised.value.fix
            assert {*children()} == before


def test_full_shared_memory_is_one_clear_error(files, backbone):
    """A limit for the size of files takes the place of a small /dev/shm."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        steps = batches(files, backbone, workers=2)
        with pytest.raises(DeviceError, match="pictures cannot be passed in shared memory: ") as e:
            next(steps)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert e.value.fix.startswith("--workers 0; ")


def test_signals_that_end_programs_do_not_end_workers(files, backbone):
    """A terminal or systemd sends them to all processes; the training process decides."""
    before = {*children()}
    plain = [*batches(files, backbone, 0, 40)]
    steps = batches(files, backbone, 0, 40, workers=2)
    got = [next(steps), next(steps)]  # one of each worker, so that both have started
    for child in {*children()} - before:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(child, number)
    assert equal(plain, [*got, *steps])


def test_workers_end_with_the_iteration(files, backbone):
    before = {*children()}
    steps = batches(files, backbone, 0, 10**6, workers=2)
    next(steps)
    assert len({*children()} - before) == 2
    steps.close()
    assert {*children()} == before


def test_workers_run_after_opencv_used_its_threads(files, backbone):
    """A forked process does not have the threads of OpenCV that its parent started."""
    cv2.resize(np.zeros((2000, 2000, 3), np.uint8), (1999, 1999))
    for path in files:
        write_picture(path, 1)
        big = cv2.resize(cv2.imread(str(path)), (900, 900))
        assert cv2.imwrite(str(path), big)
    assert len([*batches(files, backbone, workers=2)]) == 6


def test_ctrl_c_prints_no_traceback_of_workers(files, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
            import signal, sys, torch
            from pathlib import Path
            from export.backbones.base import Backbone
            from export.train.features import FeatureBatches
            from export.train.views import ViewRule
            backbone = Backbone(
                name="t", module=torch.nn.Conv2d(3, 4, 16, 16).requires_grad_(False), channels=4,
                stride=16, mean=(0, 0, 0), std=(1, 1, 1), source="t", features="t", sha256="0")
            data = FeatureBatches([Path(f) for f in sys.argv[1:]], ViewRule(size=32), backbone,
                                  batch=4, seed=0, device="cpu", workers=2)
            ended = []
            signal.signal(signal.SIGINT, lambda *_: ended.append(1))  # as the command does
            for step, _ in enumerate(data.batches(0, 10**6)):
                if step == 3:
                    print("running", flush=True)
                if ended:
                    print("interrupted")
                    break
        """)
    )
    command = [sys.executable, str(script), *map(str, files)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "running\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == ("interrupted\n", "", 0)
