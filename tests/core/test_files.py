"""Files that are written whole or not at all, and the one rule for the cache folder."""

import os
from pathlib import Path

import pytest
from bundles import tiny_bundle

from runtime import files
from runtime.bundle import golden
from runtime.errors import InputError
from runtime.tools import probe


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("value", ["caches", "./caches", "~/caches", "", None])
def test_a_relative_cache_folder_is_ignored_by_all(tmp_path, monkeypatch, value):
    """The doctor vouched for ~/.cache while passed golden tests were noted in ./caches."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    bundle = tiny_bundle(tmp_path / "x.bundle")
    before = names(tmp_path)
    golden.remember(bundle, {"prior": 1.0}, "cpu")
    assert golden.was_passed(bundle, "cpu")
    used = tmp_path / "home/.cache/dynaguide-edge"
    assert len(names(used / "golden")) == 1
    assert {*names(tmp_path)} == {*before, "home"}  # ONNX Runtime may have made home before
    assert files.cache_folder() == used and probe.cache_facts() == {
        "folder": str(used),
        "error": "",
    }


def test_an_absolute_cache_folder_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / "dynaguide-edge"


def test_without_a_home_folder_there_is_no_cache(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert files.cache_folder() is None
    assert probe.cache_facts() == {"folder": "", "error": "there is no home folder"}


def test_a_file_is_replaced_and_not_written_in_place(tmp_path):
    path, link = tmp_path / "a.bin", tmp_path / "link.bin"
    path.write_bytes(b"old")
    os.link(path, link)
    files.write_atomic(path, b"new")
    files.replace_file(tmp_path / "b.bin", b"durable", durable=True)
    assert path.read_bytes() == b"new" and link.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin", "b.bin", "link.bin"]


def test_a_durable_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """And the name is there when the call returns."""
    done, sync, rename = [], os.fsync, os.replace

    def synced(descriptor):
        done.append(("sync", os.stat(descriptor).st_ino, os.stat(descriptor).st_size))
        sync(descriptor)

    def renamed(old, new):
        done.append(("rename", old.stat().st_ino, 3))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    path = tmp_path / "a.bin"
    files.replace_file(path, b"new", durable=True)
    number = path.stat().st_ino
    assert done[:2] == [("sync", number, 3), ("rename", number, 3)]
    assert [step[:2] for step in done[2:]] == [("sync", tmp_path.stat().st_ino)]
    done.clear()
    files.write_atomic(path, b"new")
    assert [what for what, *_ in done] == ["rename"]


def test_a_new_file_replaces_none(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError):
        files.write_new(path, b"new", durable=False)
    assert path.read_bytes() == b"old"


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def fail(*paths):
        raise OSError(28, "No space left on device")

    path, part = tmp_path / "a.bin", tmp_path / "part.bin"
    path.write_bytes(b"old")
    part.write_bytes(b"new")
    monkeypatch.setattr(os, "replace", fail)
    wanted = r"a.bin cannot be written: No space left on device\n  fix: free some space"
    with pytest.raises(InputError, match=wanted):
        files.write_atomic(path, b"new")
    with pytest.raises(InputError, match=wanted):
        files.put_in_place(part, path)
    with pytest.raises(OSError, match="No space left"):
        files.replace_file(path, b"new", durable=True)
    assert names(tmp_path) == ["a.bin"] and path.read_bytes() == b"old"


def test_places_that_no_file_can_have(tmp_path):
    with pytest.raises(InputError, match="is a folder, wanted a file name"):
        files.check_place(tmp_path)
    with pytest.raises(InputError, match=r"none does not exist\n  fix: mkdir -p "):
        files.check_place(tmp_path / "none" / "a.bin")
