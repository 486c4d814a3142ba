"""Files that are written whole or not at all, and the one rule for the cache folder."""

import io
import os
import select
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from bundles import tiny_bundle
from cases import case
from permissions import obeyed

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
    (tmp_path / "a.bin").touch()
    for below in ("a.bin/b", "a.bin/b/c"):
        with pytest.raises(
            InputError, match=r"a.bin(/b does not exist| is a file, wanted a folder)"
        ):
            files.check_place(tmp_path / below)
    with pytest.raises(InputError, match=r"\n  fix: mkdir -p '.*a b #!'$"):
        files.check_place(tmp_path / "a b #!/a.bin")


def test_a_folder_that_is_not_writable_is_found_before_the_work(tmp_path):
    """The state of a stream is written at its end, perhaps after a day."""
    (tmp_path / "a.bin").touch()
    tmp_path.chmod(0o500)
    try:
        with obeyed():
            for path in (tmp_path / "a.bin", tmp_path / "b.bin"):
                with pytest.raises(InputError, match=f"{path} cannot be written: folder .* is not"):
                    files.check_place(path)
                with pytest.raises(InputError, match="check the permissions of"):
                    files.write_atomic(path, b"new")
            tmp_path.chmod(0)
            with pytest.raises(InputError, match=r"a.bin cannot be written: Permission denied"):
                files.write_atomic(tmp_path / "a.bin", b"new")
    finally:
        tmp_path.chmod(0o700)
    assert names(tmp_path) == ["a.bin"] and (tmp_path / "a.bin").read_bytes() == b""


def test_a_new_file_has_the_usual_permissions_and_an_older_one_keeps_its_own(tmp_path):
    path, before = tmp_path / "a.bin", os.umask(0o026)
    try:
        files.write_atomic(path, b"new")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        for mode in (0o600, 0o664, 0o444, 0o777):
            with case(oct(mode)):
                path.chmod(mode)
                files.write_atomic(path, b"newer")
                assert stat.S_IMODE(path.stat().st_mode) == mode
                part = files.temporary_name(path)
                part.write_bytes(b"newest")
                files.put_in_place(part, path)
                assert stat.S_IMODE(path.stat().st_mode) == mode
                assert path.read_bytes() == b"newest" and names(tmp_path) == ["a.bin"]
    finally:
        os.umask(before)


def test_a_private_file_is_private_before_its_content_is_written(tmp_path, monkeypatch):
    path, modes, chmod = tmp_path / "a.bin", [], os.chmod
    path.touch(0o600)

    def noted(name, mode):
        modes.append((oct(mode), Path(name).stat().st_size))
        chmod(name, mode)

    monkeypatch.setattr(os, "chmod", noted)
    files.write_atomic(path, b"secret")
    assert modes == [("0o600", 0)]


def test_a_link_remains_and_its_target_is_written(tmp_path):
    """The temporary file is beside the target: a rename cannot cross file systems."""
    (tmp_path / "out").mkdir()
    (tmp_path / "real").mkdir()
    link, target = tmp_path / "out/a.bin", tmp_path / "real/b.bin"
    (tmp_path / "real/c.bin").symlink_to("b.bin")
    for text in (str(target), "../real/b.bin", "../real/c.bin"):
        for content in (None, b"old"):
            with case(text, content):
                target.unlink(missing_ok=True)
                link.symlink_to(text)
                if content is not None:
                    target.write_bytes(content)
                files.write_atomic(link, b"new")
                assert target.read_bytes() == b"new"
                part = files.temporary_name(link)
                assert part.parent.samefile(target.parent) and part.suffix == ".bin"
                part.write_bytes(b"newer")
                files.put_in_place(part, link)
                assert target.read_bytes() == b"newer" and os.readlink(link) == text
                link.unlink()
    assert names(tmp_path / "out") == [] and names(tmp_path / "real") == ["b.bin", "c.bin"]
    link.symlink_to("none/b.bin")
    with pytest.raises(InputError, match=r"folder .*out/none does not exist\n  fix: mkdir -p"):
        files.write_atomic(link, b"new")


def test_links_that_name_each_other_are_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for path in (tmp_path / "a", tmp_path / "a/c.bin"):
        with pytest.raises(InputError, match=r"Too many levels .*\n  fix: remove the links that"):
            files.write_atomic(path, b"")
    with pytest.raises(OSError, match="Too many levels"):
        files.replace_file(tmp_path / "a", b"")
    assert names(tmp_path) == ["a", "b"]


def test_a_fifo_is_written_into(tmp_path):
    path, link, got = tmp_path / "f", tmp_path / "link", []
    os.mkfifo(path)
    link.symlink_to("f")
    data = bytes(range(256)) * 4096  # more than a pipe holds
    for name, write in ((path, files.write_atomic), (link, files.replace_file)):
        with case(name.name):
            reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            os.set_blocking(reader, True)

            def read(reader=reader):
                select.select([reader], [], [], 60)  # a read before the write finds an end
                with open(reader, "rb") as file:
                    got.append(file.read())

            thread = threading.Thread(target=read)
            thread.start()
            write(name, data)
            thread.join(60)
            assert got.pop() == data and stat.S_ISFIFO(path.stat().st_mode)
    with pytest.raises(InputError, match=r"f cannot be written: .*\n  fix: start the program that"):
        files.write_atomic(path, data)  # nobody reads it
    assert names(tmp_path) == ["f", "link"] and link.is_symlink()


def test_the_folder_of_a_fifo_need_not_be_writable(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    tmp_path.chmod(0o500)
    try:
        with obeyed():
            files.check_place(tmp_path / "fifo", pipe=True)
    finally:
        tmp_path.chmod(0o700)


def test_a_device_is_written_into(tmp_path):
    for name, place in (("null", "/dev/null"), ("a", "/dev/fd/{}"), ("b", "/proc/self/fd/{}")):
        with case(place):
            file = tmp_path / "open.bin"
            descriptor = os.open(file, os.O_CREAT | os.O_RDWR | os.O_TRUNC)
            os.write(descriptor, b"before ")
            link = tmp_path / name
            link.symlink_to(place.format(descriptor))
            number = os.stat(link).st_ino
            files.write_atomic(link, b"written")
            os.write(descriptor, b" after")
            os.close(descriptor)
            text = b"before written after" if "{" in place else b"before  after"
            assert file.read_bytes() == text
            assert link.is_symlink() and names(tmp_path) == sorted(["open.bin", link.name])
            assert number == os.stat("/dev/null" if name == "null" else file).st_ino
            link.unlink()
    with pytest.raises(InputError, match="/dev/full cannot be written: No space left on device"):
        files.write_atomic("/dev/full", b"x")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_an_open_file_of_another_process_is_appended_to(tmp_path):
    with (tmp_path / "log").open("wb") as log:
        log.write(b"before ")
        log.flush()
        other = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
        try:
            files.write_atomic(f"/proc/{other.pid}/fd/1", b"written")
        finally:
            other.communicate(timeout=60)
    assert (tmp_path / "log").read_bytes() == b"before written" and names(tmp_path) == ["log"]


def test_stdout_is_a_file_name(tmp_path):
    code = "from runtime.files import write_atomic as w; w('/dev/stdout', b'a'); print('b')"
    for out in (subprocess.PIPE, (tmp_path / "out.txt").open("w+b")):
        done = subprocess.run([sys.executable, "-c", code], stdout=out, check=True, timeout=60)
        if out is not subprocess.PIPE:
            out.seek(0)
        assert (done.stdout or out.read()) == b"ab\n"
    assert names(tmp_path) == ["out.txt"]


def test_what_is_no_file_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name in ("fifo", "socket"):
            with case(name):
                place, before = tmp_path / name, os.lstat(name)
                part = tmp_path / "part"
                part.write_bytes(b"new")
                with pytest.raises(InputError, match=f"{name} cannot be written: it is not a file"):
                    files.put_in_place(part, place)
                with pytest.raises(InputError, match=f"{name} is a FIFO, a socket, a device or"):
                    files.check_place(place)
                with pytest.raises((InputError, OSError)):
                    files.replace_file(place, b"new")
                assert os.lstat(name) == before and names(tmp_path) == ["fifo", "socket"]
        with pytest.raises(InputError, match="socket is a FIFO, a socket, a device"):
            files.write_atomic("socket", b"new")


def test_two_processes_write_whole_files(tmp_path):
    """Each reader of the file finds all of one writer's bytes."""
    path = tmp_path / "a.bin"
    code = """
import sys
from runtime.files import write_atomic
for _ in range(300): write_atomic(sys.argv[1], sys.argv[2].encode() * 50_000)
"""
    path.write_bytes(b"a" * 50_000)
    writers = [subprocess.Popen([sys.executable, "-c", code, path, letter]) for letter in "ab"]
    try:
        while any(writer.poll() is None for writer in writers):
            data = path.read_bytes()
            assert len(data) == 50_000 and len(set(data)) == 1
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert [writer.returncode for writer in writers] == [0, 0] and names(tmp_path) == ["a.bin"]


def test_a_name_of_any_legal_length_is_written(tmp_path):
    """The temporary file has a name of its own, which must not be longer than the file's."""
    for path in (tmp_path / f"x.{'y' * 245}", tmp_path / ("z" * 255)):
        files.write_atomic(path, b"data")
        assert path.read_bytes() == b"data"
    assert files.temporary_name(tmp_path / "a.safetensors").suffix == ".safetensors"


def test_what_is_no_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.write_atomic(b"a.bin", b"data")
    assert (tmp_path / "a.bin").read_bytes() == b"data"
    for wrong in (None, io.BytesIO(), 3, ["a.bin"]):
        with pytest.raises(InputError, match="wanted the name of a file\n  fix: pass a text"):
            files.write_atomic(wrong, b"")
