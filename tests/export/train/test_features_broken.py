"""Batches of features of pictures that are broken or change, and the warnings of pictures."""

import logging
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from cases import case
from tiny_features import (
    MANY,
    RULE,
    batches,
    equal,
    expected,
    many_files,
    seven_pictures,
    spoil,
    tiny_backbone,
    views_of,
    write_picture,
)

from export.train import features as features_module
from export.train.feature_cache import FeatureCache
from export.train.features import FeatureBatches
from runtime.errors import InputError
from runtime.pictures.load import load_image

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the processes are forked")


@pytest.fixture
def backbone():
    return tiny_backbone()


@pytest.fixture
def files(tmp_path):
    return seven_pictures(tmp_path)


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
    assert raised.value.message.startswith(
        "3 of 40 pictures cannot be used; wanted at most 2: 5.png, 7.png, 30.png; the first one: "
    )
    assert f"{paths[5]} is a truncated PNG" in raised.value.message
    assert raised.value.fix == "copy these files again, or remove them and train again"
    with pytest.raises(InputError, match="3 of 40 pictures"):
        next(data.batches(10, 11))


def test_of_20_pictures_one_may_be_broken_and_of_19_none(files, backbone, caplog):
    paths = many_files(files, 20)
    spoil(paths[5])
    assert len([*batches(paths, backbone, 0, 5)]) == 5
    with pytest.raises(InputError, match="1 of 19 pictures cannot be used; wanted at most 0: 5"):
        [*batches(paths[:19], backbone, 0, 5)]


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
            assert message.startswith("16 of 300 pictures cannot be used; wanted at most 15: ")
            assert message.count(".png") == 11 and ", ...; the first one: " in message
    for path in paths[:2]:  # of a few pictures none may be broken
        path.unlink()
    with pytest.raises(InputError, match="1 of 2 pictures cannot be used; wanted at most 0: "):
        [*batches(paths[:2], backbone, 0, 3)]


def test_of_few_held_out_pictures_all_but_one_may_be_broken(files, backbone):
    spoil(files[0])
    spoil(files[2])
    data = FeatureBatches(files[:3], RULE, backbone, batch=1, seed=0, device="cpu")
    assert views_of(data.of([0, 1, 2]), files[1:2], backbone) == [0, 0, 0]
    assert data.broken_indices == [0, 2]
    spoil(files[1])
    with pytest.raises(InputError, match="3 of 3 pictures cannot be used; wanted at most 2"):
        FeatureBatches(files[:3], RULE, backbone, batch=1, seed=0, device="cpu").of([0])


def test_of_views_of_pictures_to_train_on_five_percent_may_be_broken(files, backbone, caplog):
    """That the next picture is used is said only where it is."""
    paths = many_files(files, 20)
    spoil(paths[2])
    data = FeatureBatches(paths, RULE, backbone, batch=1, seed=0, device="cpu")
    assert len(data.of([1, 2, 3], most_broken=data.most_broken)) == 3
    assert caplog.messages[0].endswith("; the next picture is used instead.")
    spoil(paths[3])
    with pytest.raises(InputError, match="2 of 20 pictures cannot be used; wanted at most 1: "):
        data.of([1, 2, 3], most_broken=data.most_broken)
    assert len(caplog.messages) == 2 and "the next picture" not in caplog.messages[1]


def test_at_most_ten_broken_pictures_are_named(files, backbone, caplog):
    paths = many_files(files, 260)
    for path in paths[:13]:
        spoil(path)
    [*batches(paths, backbone, 0, 26, batch=10)]
    named = [line for line in caplog.messages if line.endswith("the next picture is used instead.")]
    assert len(named) == 10
    assert caplog.messages[10:] == ["More pictures are broken; only the first 10 are named."]


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


def test_a_picture_whose_time_or_size_alone_changes_is_read_again(backbone, tmp_path):
    """Pictures without compression that have as many rows are equally large."""
    cache, path = FeatureCache(tmp_path / "cache", MANY), tmp_path / "a.bmp"
    data = FeatureBatches([path], RULE, backbone, batch=1, seed=0, device="cpu", cache=cache)
    for seed, time in ((0, 10), (3, 20), (1, 20)):
        write_picture(path, seed)
        os.utime(path, (time, time))
        assert torch.allclose(data.of([0])[0], expected(path, backbone), atol=1e-5), seed


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
