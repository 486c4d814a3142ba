"""Batches of features: which views a step has, and what happens to broken pictures.

The backbone is a tiny random convolution.
"""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import case

from export.backbones.base import Backbone
from export.train import features as features_module
from export.train.feature_cache import FeatureCache
from export.train.features import FeatureBatches, split
from export.train.views import ViewRule, view_pixels
from runtime.errors import DeviceError, InputError
from runtime.opencv import cv2
from runtime.pictures.load import load_image

CHANNELS, SIZE, STRIDE = 5, 32, 16
RULE, FIVE = ViewRule(size=SIZE), ViewRule(size=SIZE, crops="five")
MANY = 10**9
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="signals and processes of Linux")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Only processes of this machine are reached: torch passes tensors to workers by a socket."""
    connect = socket.socket.connect

    def local(self, address):
        assert self.family == socket.AF_UNIX, "tried to reach the network"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)


class Network(torch.nn.Module):
    """A convolution that records the number of views of each call."""

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, CHANNELS, STRIDE, STRIDE)
        self.calls = []

    def forward(self, images):
        self.calls.append(len(images))
        return self.convolution(images)


@pytest.fixture
def backbone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Network().eval().requires_grad_(False)
    return Backbone(
        name="tiny", module=module, channels=CHANNELS, stride=STRIDE, mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.25, 0.3), source="tiny", features="last", sha256="0" * 64,
    )  # fmt: skip


def write_picture(path, seed, alpha=False):
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (36 + seed % 3, 40, 3 + alpha), np.uint8)
    assert cv2.imwrite(str(path), pixels)


@pytest.fixture
def files(tmp_path):
    """Seven pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    paths = [folder / f"{i}.png" for i in range(7)]
    for i, path in enumerate(paths):
        write_picture(path, i)
    return paths


def batches(files, backbone, first=0, last=6, *, rule=RULE, batch=4, **options):
    options = {"seed": 3, "device": "cpu"} | options
    return FeatureBatches(files, rule, backbone, batch=batch, **options).batches(first, last)


def expected(path, backbone, rule=RULE, crop=0):
    """The features of one view, from the definition."""
    pixels = view_pixels(load_image(path)[0], rule, crop) / 255
    image = (pixels - np.array(backbone.mean)) / np.array(backbone.std)
    with torch.no_grad():
        return backbone.module(torch.from_numpy(image.transpose(2, 0, 1)[None]).float())[0]


def views_of(batch, files, backbone, rule=RULE):
    """The number of the view that each row of a batch is."""
    all_views = [expected(f, backbone, rule, c) for f in files for c in range(rule.count)]
    distances = (batch[:, None] - torch.stack(all_views)[None]).abs().amax((2, 3, 4))
    assert (distances.min(1).values < 1e-4).all()
    return distances.argmin(1).tolist()


def equal(one, other):
    one, other = list(one), list(other)
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_every_epoch_has_every_view_once(files, backbone):
    for rule, count in ((RULE, 7), (FIVE, 35)):
        with case(rule.crops):
            steps = batches(files, backbone, 0, 3 * count, rule=rule, batch=2)
            rows = views_of(torch.cat([*steps]), files, backbone, rule)
            epochs = [rows[i : i + count] for i in range(0, 6 * count, count)]
            assert all(sorted(epoch) == [*range(count)] for epoch in epochs)
            assert len({tuple(epoch) for epoch in epochs}) == 6  # each in another order


def test_a_batch_has_the_form_that_the_loop_expects(files, backbone):
    batch = next(batches(files, backbone))
    assert batch.shape == (4, CHANNELS, 2, 2) and batch.dtype == torch.float32
    assert batch.is_contiguous() and not batch.requires_grad and not batch.is_inference()


def test_the_order_depends_on_the_seed_alone(files, backbone):
    one = [*batches(files, backbone)]
    torch.manual_seed(99)
    np.random.seed(99)
    assert equal(one, batches(files, backbone))
    assert not equal(one, batches(files, backbone, seed=4))


def test_a_run_can_start_at_any_step(files, backbone):
    whole = [*batches(files, backbone, 0, 12, rule=FIVE)]
    for first in range(12):
        assert equal(whole[first:], batches(files, backbone, first, 12, rule=FIVE)), first
    data = FeatureBatches(files, FIVE, backbone, batch=4, seed=3, device="cpu")
    assert equal(whole, [*data.batches(0, 5), *data.batches(5, 12)])
    assert [*data.batches(5, 5)] == []


@linux_only
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


@linux_only
def test_the_global_random_numbers_are_unchanged(files, backbone, tmp_path):
    for workers in (0, 2):
        state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
        [*batches(files, backbone, workers=workers)]
        assert torch.equal(state, torch.get_rng_state())
        assert numpy_state == np.random.get_state()[1].tolist()


def test_on_the_cpu_each_view_is_computed_alone(files, backbone):
    [*batches(files, backbone)]
    assert backbone.module.calls == [1] * 24


def test_on_other_devices_the_missing_views_are_computed_together(files, backbone, tmp_path):
    """The CPU takes the place of another device."""
    plain = [*batches(files, backbone)]
    cache = FeatureCache(tmp_path / "cache", MANY)
    data = FeatureBatches(files, RULE, backbone, batch=4, seed=3, device="cpu", cache=cache)
    data.alone = False
    views = views_of(plain[0], files, backbone)
    data.of(views[1:3])
    backbone.module.calls.clear()
    got = [*data.batches(0, 6)]
    assert backbone.module.calls == [2, 3]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, plain, strict=True))


def test_features_are_float32_inside_autocast(files, backbone):
    plain = [*batches(files, backbone)]
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(plain, batches(files, backbone))


def test_features_can_be_trained_on(files, backbone):
    batch = next(batches(files, backbone))
    weight = torch.ones(CHANNELS, requires_grad=True)
    (batch * weight[:, None, None]).sum().backward()
    assert torch.allclose(weight.grad, batch.sum((0, 2, 3)))


def test_a_batch_larger_than_the_number_of_views(files, backbone):
    for batch in batches(files[:3], backbone, batch=8):
        counts = np.bincount(views_of(batch, files[:3], backbone), minlength=3)
        assert counts.sum() == 8 and counts.min() >= 2
    only = [*batches(files[:1], backbone, batch=3)]
    assert all(views_of(batch, files, backbone) == [0, 0, 0] for batch in only)


def test_chosen_views_are_returned_in_order(files, backbone, tmp_path):
    for cache in (None, FeatureCache(tmp_path / "cache", MANY)):
        data = FeatureBatches(files, FIVE, backbone, batch=1, seed=0, device="cpu", cache=cache)
        assert data.views == 35
        for views in ([3, 0, 34, 3, 17], [3, 0, 1, 17]):
            assert views_of(data.of(views), files, backbone, FIVE) == views
        assert data.of([]).shape == (0, CHANNELS, 2, 2)


# Broken pictures


def spoil(path):
    path.write_bytes(path.read_bytes()[:60])


def many_files(files, count):
    """So many links to the seven pictures that some may be broken; a spoilt link is a copy."""
    folder = files[0].parent.parent / "many"
    folder.mkdir()
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        shutil.copy(files[i % 7], path)
    return paths


def with_rows(paths, broken, order, backbone):
    """The features of views with the broken pictures replaced by the next ones."""
    for number in order:
        while number in broken:
            number = (number + 1) % len(paths)
        yield expected(paths[number], backbone)


@linux_only
def test_a_broken_picture_is_replaced_by_the_next_one(files, backbone, caplog, tmp_path):
    paths = many_files(files, 40)
    order = [
        view
        for epoch in range(2)
        for view in np.random.default_rng([0, 3, epoch]).permutation(40).tolist()
    ]
    for workers, broken in ((0, [0, 39]), (0, [38, 39]), (2, [17, 18]), (2, [0, 20])):
        with case(workers, tuple(broken)):
            caplog.clear()
            copies = tmp_path / f"{workers} {broken}"
            shutil.copytree(paths[0].parent, copies)
            now = [copies / path.name for path in paths]
            for i in broken:
                spoil(now[i])
            cache = FeatureCache(tmp_path / "cache", MANY)
            for _ in range(2):  # with a cold and a warm cache
                data = FeatureBatches(
                    now, RULE, backbone, batch=4, seed=3, device="cpu", workers=workers, cache=cache
                )
                rows = torch.cat([*data.batches(0, 20)])
                wanted = with_rows(paths, broken, order, backbone)
                assert torch.allclose(rows, torch.stack([*wanted]), atol=1e-5)
                assert data.broken_indices == broken
                assert [*data.broken] == [now[i] for i in broken]
            lines = [r.getMessage() for r in caplog.records]
            for i in broken:  # once in each run
                named = [line for line in lines if line.startswith(str(now[i]))]
                assert len(named) == 2 and named[0].endswith("; the next picture is used instead.")
                assert data.broken[now[i]] in named[0]
            assert len(lines) == 4


def test_pictures_that_were_broken_before_are_not_read(files, backbone, caplog):
    paths = many_files(files, 40)
    whole = batches(paths, backbone, 0, 20)
    known = batches(paths, backbone, 0, 20, broken=[3, 4])
    changed = [not torch.equal(a, b) for a, b in zip(whole, known, strict=True)]
    assert 2 <= sum(changed) <= 4 and not caplog.records
    spoil(paths[3])
    spoil(paths[4])
    assert equal(batches(paths, backbone, 0, 20, broken=[3, 4]), batches(paths, backbone, 0, 20))


def test_five_percent_may_be_broken_and_no_more(files, backbone, caplog):
    paths = many_files(files, 40)
    spoil(paths[5])
    spoil(paths[30])
    data = FeatureBatches(paths, RULE, backbone, batch=8, seed=0, device="cpu")
    assert len([*data.batches(0, 5)]) == 5 and len(data.broken) == 2
    spoil(paths[7])
    with pytest.raises(InputError) as raised:
        [*data.batches(5, 10)]
    assert raised.value.message == (
        "3 of 40 pictures cannot be read; wanted at most 2: 5.png, 7.png, 30.png"
    )
    assert raised.value.fix == "remove these files, or copy them again"
    with pytest.raises(InputError, match="3 of 40 pictures"):
        next(data.batches(10, 11))


@linux_only
def test_pictures_that_are_all_broken(files, backbone, caplog):
    paths = many_files(files, 300)
    for path in paths:
        spoil(path)
    for workers in (0, 2):
        with case(workers):
            with pytest.raises(InputError) as raised:
                [*batches(paths, backbone, 0, 3, workers=workers)]
            message = raised.value.message
            assert message.startswith("16 of 300 pictures cannot be read; wanted at most 15: ")
            assert message.count(".png") == 10 and message.endswith(", ...")
    for path in paths[:2]:  # of a few pictures none may be broken
        path.unlink()
    with pytest.raises(InputError, match="1 of 2 pictures cannot be read; wanted at most 0: "):
        [*batches(paths[:2], backbone, 0, 3)]


def test_of_few_held_out_pictures_all_but_one_may_be_broken(files, backbone):
    spoil(files[0])
    spoil(files[2])
    data = FeatureBatches(files[:3], RULE, backbone, batch=1, seed=0, device="cpu")
    assert views_of(data.of([0, 1, 2]), files[1:2], backbone) == [0, 0, 0]
    assert data.broken_indices == [0, 2]
    spoil(files[1])
    with pytest.raises(InputError, match="3 of 3 pictures cannot be read; wanted at most 2"):
        FeatureBatches(files[:3], RULE, backbone, batch=1, seed=0, device="cpu").of([0])


def test_a_picture_that_becomes_broken_is_replaced(files, backbone, tmp_path, caplog):
    for cache in (None, FeatureCache(tmp_path / "cache", MANY)):
        with case(cache is not None):
            caplog.clear()
            paths = many_files(files, 20)
            data = FeatureBatches(
                paths, RULE, backbone, batch=20, seed=0, device="cpu", cache=cache
            )
            steps = data.batches(0, 4)
            assert sorted(views_of(next(steps), paths[:7], backbone)) == sorted(
                i % 7 for i in range(20)
            )
            spoil(paths[6])
            rows = sorted(views_of(next(steps), files, backbone))
            assert rows.count(6) == 1 and rows.count(0) == 4  # 13 still has the seventh picture
            assert data.broken_indices == [6] and len(caplog.records) == 1
            shutil.copy(files[6], paths[6])  # it is repaired, but not read again
            assert sorted(views_of(next(steps), files, backbone)) == rows
            shutil.rmtree(paths[0].parent)


def test_a_picture_that_changes_is_read_again(files, backbone, tmp_path):
    cache = FeatureCache(tmp_path / "cache", MANY)
    data = FeatureBatches(files[:1], RULE, backbone, batch=1, seed=0, device="cpu", cache=cache)
    steps = data.batches(0, 3)
    assert views_of(next(steps), files, backbone) == [0]
    write_picture(files[0], 50)
    os.utime(files[0], (10, 10))
    new = next(steps)
    assert torch.allclose(new[0], expected(files[0], backbone), atol=1e-5)
    shutil.copy(files[1], files[0])
    assert views_of(next(steps), files[1:], backbone) == [0]


def test_a_picture_that_changes_while_it_is_read_is_not_stored(
    files, backbone, tmp_path, monkeypatch
):
    cache = FeatureCache(tmp_path / "cache", MANY)

    def changed(path):
        write_picture(path, 50)
        os.utime(path, (20, 20))
        return load_image(path)

    monkeypatch.setattr(features_module, "load_image", changed)
    batch = next(batches(files[:1], backbone, batch=1, cache=cache))
    assert torch.allclose(batch[0], expected(files[0], backbone), atol=1e-5)
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]


def test_a_file_is_read_for_its_digest_once(files, backbone, tmp_path, monkeypatch):
    """With a warm cache the pictures are not decoded, and are read once."""
    cache = FeatureCache(tmp_path / "cache", MANY)
    [*batches(files, backbone, cache=cache)]
    opened = []
    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda p, *a, **k: opened.append(p) or plain(p, *a, **k))
    monkeypatch.setattr(features_module, "load_image", None)
    [*batches(files, backbone, 0, 20, cache=cache)]
    assert sorted(p for p in opened if p.suffix == ".png") == files


def test_equal_files_share_their_features(files, backbone, tmp_path):
    cache = FeatureCache(tmp_path / "cache", MANY)
    [*batches(files[:1], backbone, 0, 1, batch=1, cache=cache)]
    backbone.module.calls.clear()
    shutil.copy(files[0], tmp_path / "copy.png")
    [*batches([tmp_path / "copy.png"], backbone, 0, 1, batch=1, cache=cache)]
    assert backbone.module.calls == []


def test_the_key_names_all_that_changes_features(files, backbone, tmp_path, monkeypatch):
    """Other views, another backbone, another version of the code or of a library, more threads."""
    from dataclasses import replace

    cache = FeatureCache(tmp_path / "cache", MANY)

    def computed(rule=RULE, other=backbone, view=0):
        backbone.module.calls.clear()
        data = FeatureBatches(files, rule, other, batch=1, seed=0, device="cpu", cache=cache)
        data.of([view])
        return len(backbone.module.calls)

    assert computed() == 1 and computed() == 0
    assert computed(view=1) == 1
    assert computed(rule=ViewRule(size=2 * SIZE)) == 1
    assert computed(rule=FIVE) == 1 and computed(rule=FIVE, view=1) == 1
    assert computed(rule=FIVE) == 0
    assert computed(other=replace(backbone, sha256="1" * 64)) == 1
    assert computed(other=replace(backbone, mean=(0.4, 0.5, 0.61))) == 1
    monkeypatch.setattr(features_module, "VERSION", -1)
    assert computed() == 1 and computed() == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert computed() == 1
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(torch, "__version__", "0")
    assert computed() == 1


# Warnings, arguments, processes


@linux_only
def test_warnings_are_logged_once_with_the_number_of_pictures(files, backbone, caplog):
    for i in (1, 4):
        write_picture(files[i], i, alpha=True)
    for workers in (0, 2):
        caplog.clear()
        data = FeatureBatches(files, RULE, backbone, batch=7, seed=0, device="cpu", workers=workers)
        steps = data.batches(0, 4)
        next(steps)
        assert not caplog.records
        next(steps)  # the first epoch is over
        lines = [(r.name, r.levelno, r.getMessage()) for r in caplog.records]
        [line] = lines
        assert line[:2] == ("dg.train", logging.WARNING)
        assert line[2].startswith("2 pictures: ") and "The alpha channel was dropped" in line[2]
        [*steps, *data.batches(4, 6)]
        assert len(caplog.records) == 1


def test_arguments_out_of_range_are_refused(files, backbone):
    good = {"batch": 1, "seed": 0, "device": "cpu"}
    with pytest.raises(InputError, match="there are no pictures to train on"):
        FeatureBatches([], RULE, backbone, **good)
    for name, value in (("batch", 0), ("seed", -1), ("workers", -1), ("batch", 1.5)):
        with pytest.raises(InputError, match=f"{name} is {value}"):
            FeatureBatches(files, RULE, backbone, **(good | {name: value}))
    for size, fix in ((40, 32), (42, 48), (17, 16), (4095, 4096)):
        with pytest.raises(InputError, match=f"imgsz is {size}; wanted a multiple of 16") as raised:
            FeatureBatches(files, ViewRule(size=size), backbone, **good)
        assert raised.value.fix == f"--imgsz {fix}"


def children():
    """The processes that this one started."""
    path = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children")
    return [int(word) for word in path.read_text().split()]


@linux_only
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


@linux_only
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


@linux_only
def test_workers_end_with_the_iteration(files, backbone):
    before = {*children()}
    steps = batches(files, backbone, 0, 10**6, workers=2)
    next(steps)
    assert len({*children()} - before) == 2
    steps.close()
    assert {*children()} == before


@linux_only
def test_workers_run_after_opencv_used_its_threads(files, backbone):
    """A forked process does not have the threads of OpenCV that its parent started."""
    cv2.resize(np.zeros((2000, 2000, 3), np.uint8), (1999, 1999))
    for path in files:
        write_picture(path, 1)
        big = cv2.resize(cv2.imread(str(path)), (900, 900))
        assert cv2.imwrite(str(path), big)
    assert len([*batches(files, backbone, workers=2)]) == 6


@linux_only
def test_ctrl_c_prints_no_traceback_of_workers(files, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
            import sys, torch
            from pathlib import Path
            from export.backbones.base import Backbone
            from export.train.features import FeatureBatches
            from export.train.views import ViewRule
            backbone = Backbone(
                name="t", module=torch.nn.Conv2d(3, 4, 16, 16).requires_grad_(False), channels=4,
                stride=16, mean=(0, 0, 0), std=(1, 1, 1), source="t", features="t", sha256="0")
            data = FeatureBatches([Path(f) for f in sys.argv[1:]], ViewRule(size=32), backbone,
                                  batch=4, seed=0, device="cpu", workers=2)
            try:
                for step, _ in enumerate(data.batches(0, 10**6)):
                    if step == 3:
                        print("running", flush=True)
            except KeyboardInterrupt:
                print("interrupted")
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


# Held-out pictures


def test_a_split_has_each_picture_once_and_is_the_same_again():
    files = [Path(f"{i}.png") for i in range(40)]
    for share, count in ((0.1, 4), (0.25, 10), (0, 1), (0.001, 1), (1, 39), (0.99, 39)):
        with case(share):
            train, held = split(files, share, 5)
            assert len(held) == count and sorted([*train, *held]) == sorted(files)
            assert train == [f for f in files if f in train]
            assert held == [f for f in files if f in held]
            assert (train, held) == split(files, share, 5)
    assert split(files, 0.1, 5) != split(files, 0.1, 6)
    assert [len(part) for part in split(files[:2], 0.5, 0)] == [1, 1]


def test_a_split_of_too_few_pictures_is_refused():
    with pytest.raises(InputError, match="1 picture cannot be split"):
        split([Path("a.png")], 0.1, 0)
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(
            InputError, match=r"the share of held-out pictures is .*; wanted 0 to 1"
        ):
            split([Path("a.png")] * 9, share, 0)
