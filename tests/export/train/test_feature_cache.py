"""The cache of features: what it returns, what it removes, and what damages it."""

import errno
import multiprocessing
import os
import sys

import numpy as np
import pytest
import torch
from cases import case
from safetensors.numpy import save
from unusable_paths import locked

from export.train import feature_cache
from export.train.feature_cache import FeatureCache, default_folder
from runtime.errors import InputError

SHAPE = (2, 3, 4)
MANY = 10**9


def key(number):
    return f"{number:02x}" * 32


def features(number, shape=SHAPE):
    return torch.full(shape, float(number)) + torch.arange(np.prod(shape)).reshape(shape)


def path_of(cache, number):
    return cache.folder / key(number)[:2] / f"{key(number)}.safetensors"


def stored(cache, count=20):
    """Which of the first entries the cache returns, each unchanged."""
    found = {i: cache.get(key(i), SHAPE) for i in range(count)}
    assert all(f is None or torch.equal(f, features(i)) for i, f in found.items())
    return [i for i, f in found.items() if f is not None]


def used_before(cache, number, seconds):
    """Make an entry look as if it was last used some seconds before the cache was opened."""
    time = path_of(cache, number).stat().st_mtime - 3600 - seconds
    os.utime(path_of(cache, number), (time, time))


def test_what_is_stored_is_returned(tmp_path):
    cache = FeatureCache(tmp_path / "a/b", MANY)
    assert stored(cache) == []
    for i in range(3):
        cache.put(key(i), features(i))
    assert stored(cache) == [0, 1, 2]
    assert stored(FeatureCache(tmp_path / "a/b", MANY)) == [0, 1, 2]
    assert cache.get(key(0), SHAPE).dtype == torch.float32
    names = sorted(p.relative_to(cache.folder).as_posix() for p in cache.folder.rglob("*.*"))
    assert names == [f"{i:02x}/{key(i)}.safetensors" for i in range(3)]  # and no temporary file


def test_all_bits_are_kept(tmp_path):
    odd = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-45, 3.4e38])
    cache = FeatureCache(tmp_path, MANY)
    cache.put(key(1), odd)
    cache.put(key(2), torch.stack([odd, odd], 1)[:, 0])  # not contiguous
    for i in (1, 2):
        assert cache.get(key(i), (6,)).numpy().tobytes() == odd.numpy().tobytes()


def damages():
    """Names, and functions that change the file of an entry."""
    size = len(save({"features": features(1).numpy(), "check": np.zeros(1, np.uint32)}))
    for length in (0, 1, 7, 8, 9, 60, size - 97, size - 96, size - 1):
        yield f"cut to {length}", lambda path, n=length: os.truncate(path, n)
    for place in range(0, size, 11):

        def flip(path, place=place):
            data = bytearray(path.read_bytes())
            data[place] ^= 4
            path.write_bytes(data)

        yield f"bit of byte {place}", flip
    yield "more bytes", lambda path: path.write_bytes(path.read_bytes() + b"x")
    yield "large", lambda path: os.truncate(path, 2**40)
    yield "text", lambda path: path.write_text("features")
    yield "long header", lambda path: path.write_bytes(b"\xff" * 8 + b"{}")
    values = features(1).numpy()
    check = np.array([0], np.uint32)
    for name, parts in {
        "other type": {"features": values.astype(np.float64), "check": check},
        "other numbers": {"features": values.view(np.int32), "check": check},
        "other shape": {"features": values.reshape(4, 3, 2), "check": check},
        "no check": {"features": values},
        "wrong check": {"features": values, "check": check},
        "long check": {"features": values, "check": np.zeros(2, np.uint32)},
        "more tensors": {"features": values, "check": check, "more": check},
        "no tensors": {},
    }.items():
        data = save(parts)
        yield name, lambda path, data=data: path.write_bytes(data)


def test_damaged_entries_are_missing_and_are_replaced(tmp_path, caplog):
    cache = FeatureCache(tmp_path, MANY)
    for name, damage in damages():
        with case(name):
            cache.put(key(1), features(1))
            assert stored(cache) == [1]
            damage(path_of(cache, 1))
            assert stored(cache) == []
    cache.put(key(1), features(1))
    assert stored(cache) == [1] and not caplog.records


def test_an_entry_under_another_name_is_missing(tmp_path):
    cache = FeatureCache(tmp_path, MANY)
    cache.put(key(1), features(1))
    path_of(cache, 2).parent.mkdir()
    os.rename(path_of(cache, 1), path_of(cache, 2))
    assert stored(cache) == []


def test_an_entry_of_another_shape_is_missing(tmp_path):
    cache = FeatureCache(tmp_path, MANY)
    cache.put(key(1), features(1))
    for shape in ((2, 3, 5), (24,), (2, 3, 4, 1), (1,)):
        assert cache.get(key(1), shape) is None


def test_what_is_no_file_is_missing(tmp_path):
    for number, make in enumerate((os.mkdir, os.mkfifo, lambda path: os.symlink("nothing", path))):
        with case(number):
            cache = FeatureCache(tmp_path / str(number), MANY)
            path_of(cache, 1).parent.mkdir()
            make(path_of(cache, 1))
            assert cache.get(key(1), SHAPE) is None
            cache.put(key(1), features(1))  # raises nothing


def test_the_entries_that_were_not_used_for_longest_are_removed(tmp_path):
    first = FeatureCache(tmp_path, MANY)
    for i in range(6):
        first.put(key(i), features(i))
    size = path_of(first, 0).stat().st_size
    for i, seconds in enumerate((10, 60, 20, 50, 30, 40)):
        used_before(first, i, seconds)
    cache = FeatureCache(tmp_path, 6 * size)
    assert cache.get(key(1), SHAPE) is not None  # it was the oldest, and is now used
    cache.put(key(6), features(6))
    cache.put(key(7), features(7))
    assert sorted(p.name[:2] for p in tmp_path.rglob("*.safetensors")) == [
        "00", "01", "02", "04", "06", "07",
    ]  # fmt: skip


def test_entries_that_were_used_since_the_start_are_kept(tmp_path, caplog):
    cache = FeatureCache(tmp_path, MANY)
    cache.put(key(0), features(0))
    used_before(cache, 0, 0)
    size = path_of(cache, 0).stat().st_size
    cache = FeatureCache(tmp_path, 3 * size + size // 2)
    for i in range(1, 10):
        cache.put(key(i), features(i))
    assert stored(cache) == [1, 2, 3]  # 0 was not used and is removed; 4 did not fit any more
    assert len(caplog.records) == 1
    assert "stores no further features: its limit of" in caplog.text


def test_a_limit_that_nothing_fits_in(tmp_path, caplog):
    cache = FeatureCache(tmp_path, 0)
    for i in range(3):
        cache.put(key(i), features(i))
    assert stored(cache) == [] and len(caplog.records) == 1


def test_room_is_made_for_many_entries_at_once(tmp_path, monkeypatch):
    """The folder is not read again for each entry of a full cache."""
    first = FeatureCache(tmp_path, MANY)
    for i in range(100):
        first.put(key(i), features(i))
        used_before(first, i, 100 - i)
    cache = FeatureCache(tmp_path, 100 * path_of(first, 0).stat().st_size)
    opened = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: opened.append(path) or scan(path))
    for i in range(100, 112):
        cache.put(key(i), features(i))
    assert 1 <= opened.count(tmp_path) <= 4 and path_of(cache, 111).exists()
    left = len([*tmp_path.rglob("*.safetensors")])
    assert 90 <= left <= 100


def test_entries_of_other_processes_are_counted(tmp_path):
    """Two caches in one folder exceed the limit by at most two sixteenths of it."""
    size = len(save({"features": features(1).numpy(), "check": np.zeros(1, np.uint32)}))
    caches = [FeatureCache(tmp_path, 32 * size) for _ in range(2)]
    for i in range(100):
        caches[i % 2].put(key(i), features(i))
    assert 30 <= len([*tmp_path.rglob("*.safetensors")]) <= 36


def test_files_of_the_user_are_neither_counted_nor_removed(tmp_path):
    mine = ["notes.txt", f"{key(3)}.safetensors", "00/model.safetensors", "03/a.png"]
    mine += [f"more/{key(1)}.safetensors", f"0x/{key(2)}.safetensors", f"00/{key(0)}.pt"]
    for name in mine:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 10**6)
        os.utime(path, (0, 0))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / f"{key(7)}.safetensors").write_bytes(b"x" * 10**6)
    os.utime(outside / f"{key(7)}.safetensors", (0, 0))
    (tmp_path / "07").symlink_to(outside)
    cache = FeatureCache(tmp_path, 1000)
    for i in range(20, 30):
        cache.put(key(i), features(i))
    assert stored(cache, 30)[:2] == [20, 21]
    assert all((tmp_path / name).exists() for name in mine)
    assert (outside / f"{key(7)}.safetensors").exists()


def test_files_that_a_killed_process_left_are_removed(tmp_path):
    left = tmp_path / "00" / f".{'1' * 16}.tmp.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"x" * 10**6)
    os.utime(left, (0, 0))
    cache = FeatureCache(tmp_path, 10**6)
    cache.put(key(1), features(1))
    assert stored(cache) == [1] and not left.exists()


def test_a_full_disk_ends_storing_but_not_reading(tmp_path, monkeypatch, caplog):
    cache = FeatureCache(tmp_path, MANY)
    cache.put(key(1), features(1))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(feature_cache, "replace_file", full)
    cache.put(key(2), features(2))
    cache.put(key(3), features(3))
    assert stored(cache) == [1]
    assert [r.getMessage() for r in caplog.records] == [
        f"The cache of features in {tmp_path} stores no further features: "
        "No space left on device."
    ]  # fmt: skip
    caplog.clear()
    monkeypatch.setattr(feature_cache.Path, "touch", full)
    cache = FeatureCache(tmp_path, MANY)  # the disk is full from the start
    cache.put(key(2), features(2))
    assert stored(cache) == [1] and len(caplog.records) == 1


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    inside = tmp_path / "cache"
    inside.mkdir()
    (tmp_path / "file").write_text("x")
    with locked(inside):
        for folder in (inside, inside / "a", tmp_path / "file", tmp_path / "file/a"):
            with (
                case(folder),
                pytest.raises(InputError, match=r"cannot be used: .*cannot be wri") as e,
            ):
                FeatureCache(folder, MANY)
            assert e.value.fix == "--no-cache or --cache DIR" and str(folder) in e.value.message


def test_entries_that_cannot_be_read_are_missing(tmp_path):
    cache = FeatureCache(tmp_path, MANY)
    for i in range(3):
        cache.put(key(i), features(i))
    with locked(path_of(cache, 0)), locked(path_of(cache, 1).parent):
        assert stored(cache) == [2]


def test_a_removed_folder_is_made_again(tmp_path):
    import shutil

    cache = FeatureCache(tmp_path / "cache", MANY)
    cache.put(key(0), features(0))
    shutil.rmtree(tmp_path / "cache")
    cache.put(key(1), features(1))
    assert stored(cache) == [1]


def test_the_default_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(default_folder()) == "/somewhere/dynaguide-edge/features"
    monkeypatch.setattr(feature_cache, "cache_folder", lambda: None)
    with pytest.raises(InputError, match="there is no home folder for the cache"):
        default_folder()


def use(folder, seed, limit, results):
    """Read and write entries at random; report what a reader must never get."""
    draw = np.random.default_rng(seed)
    cache = FeatureCache(folder, limit)
    wrong = hits = 0
    for i in draw.integers(0, 40, 300).tolist():
        found = cache.get(key(i), SHAPE)
        wrong += found is not None and not torch.equal(found, features(i))
        hits += found is not None
        if found is None or draw.random() < 0.1:
            cache.put(key(i), features(i))
    results.put((wrong, hits, cache.storing))


@pytest.mark.skipif(sys.platform != "linux", reason="the processes are forked")
def test_processes_share_a_folder(tmp_path):
    """With space for all entries and with space for a few."""
    context = multiprocessing.get_context("fork")
    for limit in (MANY, 10 * 300):
        with case(limit):
            results = context.Queue()
            folder = tmp_path / str(limit)
            users = [
                context.Process(target=use, args=(folder, i, limit, results)) for i in range(3)
            ]
            for user in users:
                user.start()
            found = [results.get(timeout=60) for _ in users]
            for user in users:
                user.join()
                assert user.exitcode == 0
            assert [wrong for wrong, _, _ in found] == [0, 0, 0]
            assert all(hits for _, hits, _ in found)
            assert not [*folder.rglob(".*")]
            if limit == MANY:
                assert all(storing for _, _, storing in found)
