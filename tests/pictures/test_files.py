"""runtime/pictures/files.py: which files of a folder are its pictures, and their order."""

import os

import pytest
from cases import case

from runtime.errors import InputError
from runtime.pictures.files import picture_files
from runtime.pictures.load import load_image


def listed(folder, *names):
    """The names that picture_files lists of a folder with empty files of these names."""
    for name in names:
        (folder / name).write_bytes(b"")
    return [path.name for path in picture_files([folder])]


def test_numbers_are_ordered_by_value_and_capitals_like_small_letters(tmp_path):
    for i, names in enumerate(
        [
            ["9.png", "10.png", "a9.png", "a10.png", "a.png", "b2.png"],
            ["frame2.png", "Frame10.PNG", "frame11.Png"],
            ["a01.png", "a1.png", "a2.png"],
            ["A1.png", "a1.png"],
            ["1\u00b22.png", "10\u00b22.png", "\u00b2.png"],  # a superscript two is no number
            ["f\u0662.png", "f3.png", "f\u0661\u0660.png"],  # Arabic digits: 2, 10
        ]
    ):
        with case(names):
            (tmp_path / str(i)).mkdir()
            assert listed(tmp_path / str(i), *reversed(names)) == names


def test_suffixes_in_capital_letters_and_other_files(tmp_path):
    found = listed(tmp_path, "a.PNG", "b.JpG", "c.tiff", "notes.txt", "d.png.txt", "png")
    assert found == ["a.PNG", "b.JpG", "c.tiff"]


def test_hidden_files_are_left_out_and_counted(tmp_path):
    assert listed(tmp_path, "a.png", "._a.png", ".b.jpg", ".png") == ["a.png"]
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match=r"no pictures in .*; 2 hidden files were left out\n"):
        picture_files([tmp_path])
    (tmp_path / ".b.jpg").unlink()
    with pytest.raises(InputError, match=r"; 1 hidden file was left out\n.* start with a dot"):
        picture_files([tmp_path])
    (tmp_path / "._a.png").unlink()
    with pytest.raises(InputError) as caught:
        picture_files([tmp_path])
    assert "left out" not in str(caught.value)


def test_folders_pipes_and_links_whose_names_end_like_pictures(tmp_path):
    folder, inside = tmp_path / "in", tmp_path / "in" / "a.png"
    inside.mkdir(parents=True)
    (tmp_path / "real").write_bytes(b"")
    (folder / "b.png").symlink_to(inside)
    (folder / "c.png").symlink_to(tmp_path / "real")
    (folder / "d.png").symlink_to("missing")
    (folder / "e.png").symlink_to("e.png")
    os.mkfifo(folder / "f.png")
    assert listed(folder, "g.png") == ["c.png", "d.png", "e.png", "g.png"]


def test_a_broken_link_is_named(tmp_path):
    (tmp_path / "d.png").symlink_to("missing")
    with pytest.raises(InputError, match=r"d\.png is a link whose target does not exist"):
        load_image(tmp_path / "d.png")


def test_files_are_listed_whatever_their_suffix_and_in_their_own_order(tmp_path):
    listed(tmp_path, "b.dat", "a.png")
    (tmp_path / "more").mkdir()
    listed(tmp_path / "more", "c.png")
    paths = [tmp_path / "more", tmp_path / "b.dat", tmp_path / "a.png"]
    assert [p.name for p in picture_files(paths)] == ["c.png", "b.dat", "a.png"]


def test_paths_that_cannot_be_read_are_one_sentence(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (
        ("none", "none does not exist\n  fix: check the path"),
        ("pipe", "pipe is neither a file nor a folder"),
        ("loop", "loop cannot be read: Too many levels of symbolic links"),
        ("x" * 300, "cannot be read: File name too long"),
        ("a\0b", "cannot be read: embedded null byte"),
    ):
        with case(name), pytest.raises(InputError, match=message):
            picture_files([tmp_path / name])

    def locked(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(InputError, match=r"cannot be read: Permission denied\n  fix: check its"):
        picture_files([tmp_path])


def test_names_that_are_not_utf8(tmp_path):
    names = [os.fsdecode(b"caf\xe92.png"), os.fsdecode(b"caf\xe910.png")]
    assert listed(tmp_path, *names) == names
