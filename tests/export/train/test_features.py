"""Batches of features: which views a step has, and which the cache returns.

The backbone is a tiny random convolution.
"""

import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import case
from tiny_features import (
    CHANNELS,
    FIVE,
    MANY,
    RULE,
    SIZE,
    batches,
    equal,
    expected,
    seven_pictures,
    tiny_backbone,
    views_of,
)

from export.train import features as features_module
from export.train.feature_cache import FeatureCache
from export.train.features import FeatureBatches
from export.train.select import split
from export.train.views import ViewRule
from runtime.errors import InputError


@pytest.fixture
def backbone():
    return tiny_backbone()


@pytest.fixture
def files(tmp_path):
    return seven_pictures(tmp_path)


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


def test_neighbours_of_the_spread_views_are_of_different_pictures(files, backbone):
    for rule in (RULE, FIVE):
        with case(rule.crops):
            data = FeatureBatches(files, rule, backbone, batch=1, seed=0, device="cpu")
            pictures = data.spread // rule.count
            assert sorted(data.spread) == [*range(7 * rule.count)]
            assert (pictures != np.roll(pictures, 1)).all()


def test_chosen_views_are_returned_in_order(files, backbone, tmp_path):
    for cache in (None, FeatureCache(tmp_path / "cache", MANY)):
        data = FeatureBatches(files, FIVE, backbone, batch=1, seed=0, device="cpu", cache=cache)
        assert data.views == 35
        for views in ([3, 0, 34, 3, 17], [3, 0, 1, 17]):
            assert views_of(data.of(views), files, backbone, FIVE) == views
        assert data.of([]).shape == (0, CHANNELS, 2, 2)


def test_the_features_of_a_pipe_are_not_stored(files, backbone, tmp_path):
    """Its bytes can be read once, so that no digest names them; two pipes are not one picture."""
    pipes = [tmp_path / "a.png", tmp_path / "b.png"]
    cache = FeatureCache(tmp_path / "cache", MANY)
    data = FeatureBatches(pipes, RULE, backbone, batch=1, seed=0, device="cpu", cache=cache)
    for number, pipe in enumerate(pipes):
        os.mkfifo(pipe)
        data_of = files[number].read_bytes()
        writer = threading.Thread(target=pipe.write_bytes, args=(data_of,), daemon=True)
        writer.start()
        found = data.of([number])[0]
        assert torch.allclose(found, expected(files[number], backbone), atol=1e-5)
        writer.join(60)
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
    monkeypatch.setattr(features_module.cv2, "__version__", "0")
    assert computed() == 1
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert computed() == 1 and computed() == 0


def test_the_key_names_the_gpu(files, backbone, monkeypatch):
    data, keys = FeatureBatches(files, RULE, backbone, batch=1, seed=0, device="cpu"), []
    for device, name in (("cpu", "A"), ("cuda", "A"), ("cuda", "B")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        data.device = torch.device(device)
        keys.append(data._maker())
    assert keys[0] != keys[1] != keys[2] != keys[0]


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
