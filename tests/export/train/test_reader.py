"""Reads: which random numbers, arrays and errors pass between the steps and what reads pictures.

The order, broken pictures and workers are tested with FeatureBatches, which holds a Reads.
"""

import sys

import numpy as np
import pytest
from cases import case
from tiny_features import children, many_files, seven_pictures, spoil

from export.train.reader import Reads
from runtime.errors import DeviceError, InputError
from runtime.pictures.load import load_image

SEED = 3
WORKERS = (0, 2) if sys.platform == "linux" else (0,)  # the processes are forked


@pytest.fixture
def files(tmp_path):
    return seven_pictures(tmp_path)


def arguments(file, index, crop, key):
    """Read the picture; return the arguments."""
    load_image(file)
    return (file.name, index, crop, key), []


def reads(files, item, *, batch=4, **options):
    return Reads(files, item, batch=batch, seed=SEED, **options)


def test_what_reads_a_picture_is_called_with_its_place_and_its_key(files):
    order = np.random.default_rng([0, SEED, 0]).permutation(21)
    for workers in WORKERS:
        with case(workers):
            steps = [*reads(files, arguments, views=3, workers=workers).batches(0, 5)]
            for step, items in enumerate(steps):
                for place, (name, index, crop, key) in enumerate(items):
                    assert (index, crop) == divmod(order[4 * step + place], 3)
                    assert name == f"{index}.png" and key == (SEED, step, place)
    found = reads(files, arguments, views=3).of([5, 0])
    assert found == [("1.png", 1, 2, (SEED, 0, 0)), ("0.png", 0, 0, (SEED, 0, 1))]


def test_a_replaced_picture_keeps_the_crop_and_the_key(files):
    paths = many_files(files, 20)
    spoil(paths[4])
    found = reads(paths, arguments, views=3).of([13], most_broken=1)
    assert found == [("5.png", 5, 1, (SEED, 0, 0))]


def draws(file, index, crop, key):
    """Arrays of each kind: of odd sizes, empty, of no dimension, not contiguous; and no array."""
    rng = np.random.default_rng(key)
    big = rng.random((5, 7))
    return {
        "odd": rng.integers(0, 256, 3, np.uint8),
        "float": rng.random(3, np.float32),
        "empty": np.zeros((0, 4)),
        "number": np.array(rng.random()),
        "columns": big[:, ::2],
        "transposed": big.T,
        "text": f"{file.name} {index}",
    }, []


def same(one, other):
    for first, second in zip(one, other, strict=True):
        for ours, theirs in zip(first, second, strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                np.testing.assert_array_equal(value, theirs[name], strict=True, err_msg=name)
    return True


def test_random_numbers_do_not_depend_on_workers_or_on_where_a_run_starts(files):
    whole = [*reads(files, draws).batches(0, 6)]
    assert len({item["float"].tobytes() for items in whole for item in items}) == 24
    for workers in WORKERS:
        for first in (0, 3):
            with case(workers, first):
                found = [*reads(files, draws, workers=workers).batches(first, 6)]
                assert same(found, whole[first:])
                found[0][0]["float"][:] = 0  # the arrays are the caller's own


def fails(file, index, crop, key):
    """The place of the second step cannot be used, although the picture can be read."""
    if key[1] == 1:
        raise DeviceError("the prior failed", fix="check it")
    return index, []


def test_an_error_that_is_not_of_the_picture_ends_the_iteration(files):
    before = [*children()] if sys.platform == "linux" else []
    for workers in WORKERS:
        with case(workers):
            data = reads(files, fails, workers=workers)
            steps = data.batches(0, 6)
            next(steps)
            with pytest.raises(DeviceError, match=r"^the prior failed") as raised:
                next(steps)
            assert raised.value.fix == "check it" and data.broken == {}
            if before:
                assert [*children()] == before


def is_wrong(file, index, crop, key):
    """The second step has a mistake of the program, which torch raises again in this process."""
    if key[1] == 1:
        raise KeyError("a mistake")
    return index, []


@pytest.mark.skipif(len(WORKERS) == 1, reason="the processes are forked on Linux")
def test_a_mistake_in_a_worker_ends_all_workers(files):
    """Although the error, whose traceback refers to them, is still there."""
    before = [*children()]
    steps = reads(files, is_wrong, workers=2).batches(0, 6)
    next(steps)
    with pytest.raises(KeyError, match="a mistake") as raised:
        next(steps)
    assert [*children()] == before and raised.value.__traceback__ is not None


def test_arguments_out_of_range_are_refused(files):
    with pytest.raises(InputError, match="there are no pictures to train on"):
        reads([], arguments)
    for name in ("views", "batch"):
        with pytest.raises(InputError, match=f"{name} is 0"):
            reads(files, arguments, **{name: 0})
