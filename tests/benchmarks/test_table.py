"""Markdown tables and JSON files of results."""

import json
import lzma
import os

import pytest
from cases import case
from permissions import obeyed

pytest.importorskip("scipy", reason="the profiler needs SciPy")
pytest.importorskip("matplotlib", reason="the profiler's page needs matplotlib")

from benchmarks import table
from runtime.errors import InputError


def test_tables_fit_a_terminal():
    rows = [{"row": f"configuration {i}", "p50": f"{i}.0 [1, 2]", "late": ""} for i in range(7)]
    assert table.fitted(rows, 0) == table.fitted(rows, 200) == table.as_markdown(rows)
    narrow = table.fitted(rows, 38)
    assert max(map(len, narrow.splitlines())) <= 38 and "late" not in narrow
    assert all(f"configuration {i}" in narrow and f"{i}.0 [1, 2]" in narrow for i in range(7))
    assert table.fitted(rows[:1], 5).count("\n") == 2  # it cannot be narrower


def test_a_list_of_numbers_is_one_line_of_json():
    document = {
        "times": [1.5] * 100,
        "rows": [{"who": "ours", "ms": 1.0}, {"who": "theirs", "seconds": [1, 2], "none": []}],
        "odd": [None, True, float("nan"), "ä"],
        "empty": {},
        "long": {f"a stage of a long name, {i}": i for i in range(9)},
    }
    text = table.as_json(document)
    lines = text.splitlines()
    assert sum("1.5,1.5" in line for line in lines) == 1 and max(map(len, lines)) > 400
    assert '  {"who": "ours", "ms": 1.0},' in lines and '   "seconds": [1,2],' in lines
    assert str(json.loads(text)) == str(document)
    assert table.as_json([]) == "[]\n" and table.as_json({"a": ()}) == '{\n "a": []\n}\n'


def test_samples_are_packed_beside_the_result(tmp_path):
    path = tmp_path / "new" / "speed.json"
    table.write_json(path, {"rows": []}, [{"seconds": [1.0]}])
    raw = table.raw_path(path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["speed.json", "speed.raw.json.xz"]
    assert json.loads(lzma.decompress(raw.read_bytes())) == [{"seconds": [1.0]}]


def test_places_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (
        ("", "is a folder, wanted a file name"),
        ("file/a.json", r"file/a.json cannot be written: Not a directory"),
        ("loop", "loop cannot be written: Too many levels of symbolic links"),
        ("x" * 300, "cannot be written: File name too long"),
        ("a\0b", "cannot be written: embedded null byte"),
    ):
        with case(name), pytest.raises(InputError, match=message):
            table.check_out(tmp_path / name)
    with pytest.raises(InputError, match="file/more is no folder to write to: Not a directory"):
        table.write_json(tmp_path / "file" / "more" / "a.json", {})
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(InputError, match=r"a.json cannot be written"):
        table.check_out(table.Path("a.json"))


def test_a_link_into_a_locked_folder_is_refused_before_the_work(tmp_path):
    (tmp_path / "locked").mkdir(0o500)
    (tmp_path / "link").symlink_to("locked/new.json")
    with obeyed(), pytest.raises(InputError, match=r"Permission denied|not writable"):
        table.check_out(tmp_path / "link")


def test_places_that_can_be_written(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "more").mkdir()
    (tmp_path / "link").symlink_to("more/new.json")
    (tmp_path / "old.json").write_bytes(b"old")
    for name in ("new/folder/a.json", "old.json", "link", "pipe", os.fsdecode(b"caf\xe9.json")):
        with case(ascii(name)):
            table.check_out(tmp_path / name)
    table.check_out(None)
    with monkeypatch.context() as patch:  # as for /dev/stdout, whose folder cannot be written
        patch.setattr(table.Path, "mkdir", lambda path: path.rmdir())
        table.check_out(tmp_path / "pipe")
    assert (tmp_path / "old.json").read_bytes() == b"old"
    assert {p.name for p in tmp_path.iterdir()} == {"pipe", "more", "link", "old.json"}
