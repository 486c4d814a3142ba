"""Names and errors of files in messages, and names that a library can open."""

import errno
import os
import tempfile
from pathlib import Path

import pytest
from cases import case

from runtime import files
from runtime.errors import InputError
from runtime.urls import without_passwords


def test_an_error_is_one_sentence_with_the_path_and_a_fix():
    for number, action, sentence, fix in [
        (errno.EACCES, "read", "a.png cannot be read: Permission denied", "check its permissions"),
        (errno.ENOENT, "read", "a.png does not exist", "check the path; the current folder is "),
        (errno.ENOENT, "written", "a.png cannot be written: No such file", "check that its folder"),
        (errno.ENAMETOOLONG, "read", "File name too long", "content of a file is passed as bytes"),
        (errno.ENAMETOOLONG, "written", "File name too long", "choose a shorter name"),
        (errno.ELOOP, "read", "Too many levels of symbolic links", "remove the links"),
        (errno.ENOSPC, "written", "No space left", "free some space"),
        (errno.EDQUOT, "written", "quota", "free some space, or ask for a larger quota"),
        (errno.EFBIG, "written", "File too large", "ulimit -f"),
        (errno.EMFILE, "read", "Too many open files", "ulimit -n"),
        (errno.EROFS, "written", "Read-only file system", "choose another folder"),
        (errno.ENOTDIR, "written", "Not a directory", "a part of it is a file"),
    ]:
        with case(os.strerror(number), action):
            found = files.file_error(action, "a.png", OSError(number, os.strerror(number)))
            assert sentence in found.message and fix in found.fix and "a.png" in found.message


def test_a_path_with_a_zero_byte_is_refused(tmp_path):
    for call in (files.stat_of, lambda path: files.write_atomic(path, b"")):
        with pytest.raises(
            InputError, match=r"a\\x00b cannot be .*: embedded null.*\n  fix: check the path$"
        ):
            call(f"{tmp_path}/a\0b")
    assert files.real_path("a\0b") == "a\0b"


def test_a_removed_folder_is_named_removed(tmp_path, monkeypatch):
    assert files.here() == os.getcwd()
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert files.here() == "(removed)" and files.real_path("a") == "a"
    with pytest.raises(InputError, match=r"(?s)a.bin cannot be written: No such.*is \(removed\)"):
        files.write_atomic("a.bin", b"")
    with pytest.raises(InputError, match="no link to it can be made: No such file"):
        with files.utf8_name("caf\udce9.avi"):
            pass


def test_a_name_is_shown_as_one_printable_line_without_passwords():
    for name, line in [
        ("a b#!.png", "a b#!.png"),
        ("日本.png", "日本.png"),
        ("caf\udce9.png", "caf\\udce9.png"),
        ("a\nb\x1b[1m.png", "a\\nb\\x1b[1m.png"),
        ("rtsp://me:secret@cam/1", "rtsp://cam/1"),
        ("RTSP://me:se/cr@et@cam/1", "RTSP://cam/1"),
        ("http://cam/1?token=secret&secret", "http://cam/1?token=***&***"),
        ("http:/me:secret@cam/1", "http:/cam/1"),  # a pathlib.Path of a URL
        ("C:/a@b.png", "C:/a@b.png"),
        ("rtsp://me:secret", "rtsp://me:***"),
        (
            "rtsp://cam/user=me_password=se_cret_channel=1",
            "rtsp://cam/user=***_password=***_channel=1",
        ),
        ("rtsp://[fe80::1]:554/live/KEY", "rtsp://[fe80::1]:554/live/KEY"),
    ]:
        with case(line):
            assert files.one_line(name) == files.shown(name) == line
    assert files.shown(Path("x" * 5000)) == "x" * 150 + "... (5000 characters)"
    for text, wanted in [
        ("no rtsp://a:b@c, but d@e", "no rtsp://c, but d@e"),
        ("no 'rtsp://a:b' or rtsp://c:9: x", "no 'rtsp://a:***' or rtsp://c:9: x"),
        ("(rtsp://c:80), rtsp://c/pass=x is", "(rtsp://c:80), rtsp://c/pass=*** is"),
    ]:
        assert without_passwords(text) == wanted


def test_the_name_of_an_existing_file_is_shown_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me:").mkdir()
    (tmp_path / "me:/a@b").touch()
    assert files.shown("me:/a@b") == "me:/a@b"


def test_a_name_that_is_no_utf8_becomes_a_link(tmp_path, monkeypatch):
    """The library reads the file through the link, or creates the file through the link."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep/real").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/real")
    folder = Path("d\udce9")
    folder.mkdir()
    for path, suffix in [
        ("caf\udce9.avi", ".avi"),
        (Path("~caf\udce9.avi"), ".avi"),
        (b"caf\xe9.avi", ".avi"),
        (folder / "v.AVI", ".AVI"),
        (tmp_path / "caf\udce9.avi", ".avi"),
        ("link/../caf\udce9.avi", ".avi"),  # in deep
        (".\udce9", ""),
        ("b.\udce9avi", ".avi"),
        (folder / ".avi", ""),
        ("x" * 200 + "\udce9", ""),
    ]:
        with case(os.fsencode(path)):
            original = Path(os.fsdecode(path))
            original.write_bytes(b"old")
            with files.utf8_name(path) as name:
                assert name.isascii() and Path(name).read_bytes() == b"old"
                assert Path(name).suffix == suffix
                original.unlink()
                with pytest.raises(FileNotFoundError):
                    Path(name).read_bytes()
                Path(name).write_bytes(b"new")
            assert not os.path.lexists(name) and not os.path.lexists(os.path.dirname(name))
            assert original.read_bytes() == b"new"
    with files.utf8_name(folder) as name:
        assert Path(name).is_dir()
    assert folder.is_dir()


def test_a_name_in_utf8_is_unchanged(tmp_path):
    for path in ("日本.avi", "~/a b.avi", tmp_path / "a.avi", b"a.avi", "missing/a.avi"):
        with files.utf8_name(path) as name:
            assert name == os.fsdecode(path)


def test_a_link_that_cannot_be_made_is_one_error(tmp_path, monkeypatch):
    path = "caf\udce9.avi"
    for folder, reason in [
        (tmp_path / "none", "No such file or directory"),
        (tmp_path / "d\udce9", r"d\\udce9.* is not UTF-8 either"),
    ]:
        with case(reason):
            monkeypatch.setattr(tempfile, "tempdir", str(folder))
            if "\udce9" in str(folder):
                folder.mkdir()
            with pytest.raises(InputError, match=f"^caf.udce9.avi is not UTF-8.*{reason}"):
                with files.utf8_name(path):
                    pass
            assert not folder.exists() or not [*folder.iterdir()]


def test_a_locale_without_utf8_makes_a_link_for_every_other_letter(tmp_path, monkeypatch):
    """OpenCV opens the UTF-8 of a text, which is another file where names are in Latin-1."""
    monkeypatch.setattr(os, "fsencode", lambda name: name.encode("latin-1"))
    for name, same in [("a.avi", True), ("é.avi", False)]:
        with case(name), files.utf8_name(tmp_path / name) as found:
            assert (found == str(tmp_path / name)) == same and found.isascii()
