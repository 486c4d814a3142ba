"""Writing bundles: killed writers, two at once, full disks, what is left alone."""

import copy
import errno
import fcntl
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import time

import pytest
from cases import case
from permissions import obeyed
from unusable_paths import bad_paths, locked, removed_folder

from runtime.bundle import write
from runtime.bundle.manifest import MANIFEST, file_entry
from runtime.bundle.read import Bundle
from runtime.bundle.write import add_engine, check_replaceable, write_bundle
from runtime.errors import BundleError, InputError

pytest.importorskip("onnx", reason="the graphs are made with onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")
pytest.importorskip("safetensors", reason="needs safetensors: pip install safetensors")

from bundles import listing, read_all, tiny_engine, tiny_parts


@pytest.fixture(scope="module")
def parts():
    return tiny_parts()


@pytest.fixture
def place(tmp_path):
    """Where a bundle goes, beside things that must stay as they are."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret.bin").write_bytes(b"keep me")
    return tmp_path / "x.bundle"


@pytest.fixture
def unsynced(monkeypatch):
    """Files are not synchronised with the disk, which takes most of the time. A process that is
    killed, unlike a machine, loses nothing of what it has written."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def version(parts, number, size=0):
    """The same bundle with another name, and a licence of another size."""
    manifest, files = copy.deepcopy(parts)
    manifest["name"] = f"v{number}"
    files["LICENSE.model"] = b"%d" % number + bytes(size)
    manifest["licence"].update(file_entry("LICENSE.model", files["LICENSE.model"]))
    return manifest, files


def beside(place):
    return sorted(set(os.listdir(place.parent)) - {place.name, "outside"})


def in_child(work):
    """Run ``work`` in a child process: its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def killed_at(event, work):
    """Run ``work`` in a child that dies of SIGKILL at its n-th call to the file system: whether it
    came so far."""

    def doomed():
        left = [event]

        def hook(name, _):
            if name == "open" or name.startswith(("os.", "fcntl.", "tempfile.", "shutil.")):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()

    _, status = os.waitpid(in_child(doomed), 0)
    return os.WIFSIGNALED(status)


def found_in(place):
    """Name of the bundle there, every file checked; None without one."""
    if not place.exists():
        return None
    bundle = Bundle.open(place)
    bundle.check_files()
    return bundle.manifest["name"]


@pytest.mark.parametrize("old", [True, False])
def test_a_writer_killed_at_each_step_leaves_the_old_or_the_new_or_none(
    parts, place, unsynced, old
):
    seen = set()
    for event in range(1, 500):
        shutil.rmtree(place, ignore_errors=True)
        if old:
            write_bundle(place, *version(parts, 1))
        died = killed_at(event, lambda: write_bundle(place, *version(parts, 2)))
        found = found_in(place)
        seen.add(found)
        assert found in ({"v1", "v2", None} if old else {"v2", None}), event
        if not died:
            break
        if event % 4 == 0 or found is None:  # the next writer cleans up
            if found is None and old:  # the old one is not lost
                write._remove_abandoned(place)
                assert found_in(place) == "v1", event
            write_bundle(place, *version(parts, 3))
            assert found_in(place) == "v3" and beside(place) == []
    assert not died and found == "v2" and event > 30
    assert seen == ({"v1", "v2", None} if old else {"v2", None})


def test_a_writer_killed_at_random_moments(parts, place, unsynced):
    rng, seen = random.Random(0), set()
    write_bundle(place, *version(parts, 1))
    for i in range(40):
        wanted = version(parts, 2, rng.choice([0, 10**5, 2 * 10**6]))
        pid = in_child(lambda wanted=wanted: [write_bundle(place, *wanted) for _ in range(50)])
        time.sleep(rng.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = found_in(place)
        seen.add(found)
        assert found in ("v1", "v2", None), i
        write_bundle(place, *version(parts, 1))
        assert beside(place) == [], i
    assert "v1" in seen


def test_two_writers_and_a_reader_at_once(parts, place):
    def write(number):
        for _ in range(15):
            try:
                write_bundle(place, *version(parts, number))
            except InputError:
                pass

    pids = [in_child(lambda n=n: write(n)) for n in (1, 2)]
    reads = 0
    while pids:
        for pid in list(pids):
            if os.waitpid(pid, os.WNOHANG)[0]:
                pids.remove(pid)
        try:
            reads += read_all(place)[0]["name"] in ("v1", "v2")
        except (InputError, BundleError):
            pass  # between two renames, or one manifest with the other's files
    assert found_in(place) in ("v1", "v2") and beside(place) == [] and reads


@pytest.mark.parametrize("old", [True, False])
def test_many_writers_at_once_all_succeed(parts, place, unsynced, old):
    if old:
        write_bundle(place, *version(parts, 9))

    def write(number):
        try:
            for _ in range(15):
                assert write_bundle(place, *version(parts, number)).manifest["name"] == f"v{number}"
        except BaseException as error:
            print(repr(error))
            os._exit(7)

    pids = [in_child(lambda n=n: write(n)) for n in range(6)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 6
    assert found_in(place) in {f"v{n}" for n in range(6)} and beside(place) == []


def test_a_folder_that_others_write_all_the_time(place, monkeypatch):
    rename = os.rename

    def disturbed(old, new, **options):
        if str(new) == str(place):
            place.mkdir(exist_ok=True)
            (place / "theirs").write_text("x")
        rename(old, new, **options)

    monkeypatch.setattr(os, "rename", disturbed)
    with pytest.raises(InputError, match=r"(?s)other exports write it at this .*fix: run it again"):
        with write.replaced_folder(place) as new:
            (new / "mine").write_text("x")
    assert os.listdir(place) == ["theirs"] and beside(place) == []


def test_a_running_writers_folder_is_left_alone(parts, place):
    work = place.with_name(".x.bundle.partial-running")
    (work / "new").mkdir(parents=True)
    descriptor = os.open(work, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    write_bundle(place, *version(parts, 1))
    assert (work / "new").is_dir()
    os.close(descriptor)
    write_bundle(place, *version(parts, 2))
    assert not work.exists()
    work.symlink_to(place.parent / "outside")  # none of ours
    write_bundle(place, *version(parts, 3))
    assert work.is_symlink() and (place.parent / "outside/secret.bin").exists()


def test_a_bundle_is_replaced_and_so_is_an_empty_folder(parts, place):
    for number in (1, 2):
        bundle = write_bundle(place, *version(parts, number))
        assert found_in(place) == f"v{number}" == bundle.manifest["name"]
    shutil.rmtree(place)
    place.mkdir()
    assert write_bundle(place, *version(parts, 3)).path == place
    (place / MANIFEST).write_bytes((place / MANIFEST).read_bytes()[:500])  # damaged, but a bundle
    write_bundle(place, *version(parts, 4))
    new = place.parent / "new/folders/x [1].bundle"
    assert write_bundle(str(new), *version(parts, 5)).manifest["name"] == "v5"
    assert stat_mode(place) == stat_mode(new) != 0o700 or os.umask(os.umask(0o22)) == 0o77


def stat_mode(path):
    return path.stat().st_mode & 0o777


def test_a_link_to_a_bundle_keeps_pointing_there(parts, place):
    true = place.parent / "outside/true.bundle"
    write_bundle(true, *version(parts, 1))
    place.symlink_to(true)
    write_bundle(place, *version(parts, 2))
    assert place.is_symlink() and found_in(true) == "v2"
    shutil.rmtree(true)  # a link to nothing
    write_bundle(place, *version(parts, 3))
    assert place.is_symlink() and found_in(true) == "v3"


def test_what_is_no_bundle_is_left_alone(parts, place, monkeypatch):
    for name, text in (("photo.jpg", b"mine"), (MANIFEST, b'{"name": "my web app"}')):
        place.mkdir()
        (place / name).write_bytes(text)
        for path in (place, place / name):
            with pytest.raises(InputError, match=r"exists and is no bundle; it is left alone"):
                write_bundle(path, *parts)
            with pytest.raises(
                InputError, match=r"(?s)left alone.*fix: choose another folder with -o"
            ):
                check_replaceable(path)
        monkeypatch.chdir(place)
        for here in ("", "."):
            with pytest.raises(InputError, match="is left alone"):
                write_bundle(here, *parts)
        assert (place / name).read_bytes() == text and beside(place) == []
        shutil.rmtree(place)


def test_what_appears_while_writing_is_left_alone(parts, place, monkeypatch):
    fill = write._fill

    def slow(*arguments):
        fill(*arguments)
        place.mkdir()
        (place / "mine").write_text("keep")

    monkeypatch.setattr(write, "_fill", slow)
    with pytest.raises(InputError, match="is left alone"):
        write_bundle(place, *parts)
    assert os.listdir(place) == ["mine"] and beside(place) == []


@pytest.mark.parametrize("old", [True, False])
def test_manifest_and_files_that_do_not_fit_are_not_written(parts, place, old):
    if old:
        write_bundle(place, *version(parts, 1))
    manifest, files = version(parts, 2)
    wrong = [
        (manifest, files | {"init.safetensors": b"x"}, "init.safetensors has 1 bytes"),
        (manifest, {k: v for k, v in files.items() if k != "refine_map.onnx"}, "is missing"),
        (manifest | {"extra": 1}, files, r"has unknown \['extra'\]"),
        (manifest | {"verification": {"x": float("nan")}}, files, "manifest cannot be written"),
        (manifest | {"classes": ["\ud800"]}, files, "(?s)manifest cannot be written.*  fix: see"),
    ]
    for a, b, match in wrong:
        with pytest.raises(BundleError, match=match):
            write_bundle(place, a, b)
        assert found_in(place) == ("v1" if old else None) and beside(place) == []


@pytest.mark.parametrize("old", [True, False])
def test_a_full_disk(parts, place, old):
    if old:
        write_bundle(place, *version(parts, 1))

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            write_bundle(place, *version(parts, 2))
        except InputError as error:
            ok = "x.bundle cannot be written: File too large\n  fix: raise the" in str(error)
            os._exit(7 if ok else 8)

    _, status = os.waitpid(in_child(write), 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert found_in(place) == ("v1" if old else None) and beside(place) == []


def test_places_that_cannot_be_written(parts, place):
    """They are refused before the work of an export, too."""
    reasons = {"missing": None, "below a file": "Not a directory"}
    fixes = {"File name": "choose a shorter name", "Too many": "remove the links", "No such": ""}
    fixes |= {
        "Not a": "check the path",
        "Permission": "check its perm",
        "embedded": "check the path",
    }
    (place.parent / "kept").mkdir()
    with obeyed():
        paths = [(b.kind, b.path, b.reason) for b in bad_paths(place.parent / "kept")]
        for kind, path, reason in [
            *paths,
            ("zero byte", "a\0b", "embedded null byte"),
            ("no room for a folder", "/proc/x/y", "No such file"),
        ]:
            reason = reasons.get(kind, reason)
            with case(kind):
                if reason is None:
                    check_replaceable(path)
                    continue
                fix = next(text for start, text in fixes.items() if reason.startswith(start))
                for work in (check_replaceable, lambda path: write_bundle(path, *parts)):
                    with pytest.raises(InputError, match=rf"written: {reason}.*\n  fix: {fix}"):
                        work(path)
    assert beside(place) == ["kept"]


def test_folders_that_may_not_be_written(parts, place):
    write_bundle(place, *version(parts, 1))
    place.parent.chmod(0o500)
    try:
        with obeyed():
            for path in (place, place.parent / "new.bundle", place.parent / "a/b.bundle"):
                with pytest.raises(InputError, match="cannot be written: Permission denied"):
                    check_replaceable(path)
                with pytest.raises(InputError, match="cannot be written: Permission denied"):
                    write_bundle(path, *parts)
    finally:
        place.parent.chmod(0o700)
    with locked(place), pytest.raises(InputError, match="cannot be written: Permission denied"):
        check_replaceable(place)
    assert found_in(place) == "v1" and beside(place) == []


def test_an_unreadable_manifest_is_named(parts, place):
    write_bundle(place, *version(parts, 1))
    with locked(place / MANIFEST):
        with pytest.raises(InputError, match=r"x.bundle/manifest.json cannot be read: Permission"):
            check_replaceable(place)


def test_a_bundle_that_cannot_be_moved_is_refused_early(parts, place):
    write_bundle(place, *version(parts, 1))
    place.chmod(0o555)
    with obeyed(), pytest.raises(InputError, match=r"x.bundle cannot be written: Permission"):
        check_replaceable(place)
    assert found_in(place) == "v1" and beside(place) == []


def test_an_older_bundle_with_locked_folders_is_removed(parts, place, caplog):
    for mode in (0o555, 0):
        write_bundle(place, *version(parts, 1))
        (place / "golden/deeper").mkdir()
        (place / "golden/deeper/x").write_text("x")
        (place / "link").symlink_to(place.parent / "outside")
        (place.parent / "outside").chmod(0o555)
        (place / "golden/deeper").chmod(mode)
        (place / "golden").chmod(mode)
        with obeyed():
            write_bundle(place, *version(parts, 2))
        assert found_in(place) == "v2" and beside(place) == [] and not caplog.records
        assert stat_mode(place.parent / "outside") == 0o555  # a link is not followed


def test_what_cannot_be_removed_is_named(parts, place, caplog, monkeypatch):
    def refused(path, mode):  # as for a folder of another user
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    write_bundle(place, *version(parts, 1))
    (place / "golden").chmod(0o555)
    monkeypatch.setattr(pathlib.Path, "chmod", refused)
    with obeyed():
        write_bundle(place, *version(parts, 2))
    (left,) = beside(place)
    assert found_in(place) == "v2" and f"{left} cannot be removed" in caplog.text
    monkeypatch.undo()
    write_bundle(place, *version(parts, 3))
    assert beside(place) == []


@pytest.mark.parametrize("old", [True, False])
def test_too_many_open_files(parts, place, old):
    """With each number of files that may be open, either the bundle is written or nothing is."""
    if old:
        write_bundle(place, *version(parts, 1))

    def write(more):
        used = max(map(int, os.listdir("/proc/self/fd")))
        for number in range(3, used + 1):
            try:
                os.fstat(number)
            except OSError:
                os.dup2(0, number)  # so that all lower numbers are in use
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, used + more))
        try:
            write_bundle(place, *version(parts, 2))
        except InputError as error:
            text = str(error)
            ok = f"{place} cannot be written: Too many open files\n  fix: raise the limit" in text
            os._exit(7 if ok else 8)

    codes = []
    while 0 not in codes:
        _, status = os.waitpid(in_child(lambda: write(len(codes) + 1)), 0)
        codes.append(os.waitstatus_to_exitcode(status))
        found = found_in(place)
        if codes[-1]:
            assert codes[-1] == 7 and found == ("v1" if old else None) and beside(place) == []
        assert len(codes) < 30
    assert found == "v2" and beside(place) == [] and len(codes) > 3


def test_a_removed_working_folder(parts, place):
    with removed_folder(place.parent / "gone"):
        for work in (check_replaceable, lambda path: write_bundle(path, *parts)):
            with pytest.raises(InputError, match=r"x.bundle cannot be written: No such file"):
                work("x.bundle")
        write_bundle(place, *version(parts, 1))
    assert found_in(place) == "v1"


def test_a_pipe_in_place_of_the_manifest_is_not_read(place):
    place.mkdir()
    os.mkfifo(place / MANIFEST)
    with pytest.raises(InputError, match="is no bundle; it is left alone"):
        check_replaceable(place)


def test_each_file_is_on_the_disk_before_the_bundle_is_in_its_place(parts, place, monkeypatch):
    events, sync, rename = [], os.fsync, os.rename

    def synced(descriptor):
        sync(descriptor)
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def renamed(old, new, **options):
        rename(old, new, **options)
        events.append("in place" if str(new) == str(place) else "")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    write_bundle(place, *parts)
    before = events[: events.index("in place")]
    names = {name.partition("/new/")[2] for name in before}
    assert {*parts[1], MANIFEST} <= names
    assert any(name.endswith("/new") for name in before)  # and the names in the folder
    assert str(place.parent) in events[len(before) :]


def test_a_folder_is_replaced_or_as_it_was(place):
    """replaced_folder, for folders that are no bundles."""
    place.mkdir()
    (place / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), write.replaced_folder(place) as new:
        (new / "new").write_text("half")
        raise ZeroDivisionError
    assert os.listdir(place) == ["old"] and beside(place) == []
    with write.replaced_folder(place) as new:
        assert os.listdir(new) == [] and os.listdir(place) == ["old"]
        (new / "new").write_text("new")
    assert os.listdir(place) == ["new"] and beside(place) == []
    (place.parent / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot be written: .*\n  fix: "):
        with write.replaced_folder(place.parent / "file" / "place"):
            pytest.fail("a file has no folders in it")


# Engines


def keys(place):
    return [e["key"][0] for e in read_all(place)[0]["engines"]]


def test_engines_are_added_and_replaced(parts, place):
    bundle = write_bundle(place, *parts)
    for key, plan in (("1", b"one"), ("2", b"two"), ("1", b"another one")):
        bundle = add_engine(bundle, *tiny_engine(key * 16, plan))
        entry = bundle.manifest["engines"][-1]
        assert bundle.read(entry) == plan and entry["key"] == key * 16
    assert keys(place) == ["0", "2", "1"]
    assert len(os.listdir(place / "engines")) == 3 and len(os.listdir(place)) == 7


def test_engines_that_do_not_fit_are_not_added(parts, place):
    bundle = write_bundle(place, *parts)
    entry, plan = tiny_engine("1" * 16)
    for wrong, match in (
        ({"file": "init.safetensors"}, "lists a file twice"),
        ({"file": MANIFEST}, "lists a file twice, or itself"),
        ({"file": "../x.engine"}, r"manifest.engines\[1\].file"),
        ({"graph": "cnn"}, "unknown graph 'cnn'"),
        ({"seconds": float("nan")}, "manifest cannot be written"),
        ({"size": 1}, "is not the engine that its entry describes"),
    ):
        with pytest.raises(BundleError, match=match):
            add_engine(bundle, entry | wrong, plan)
    assert keys(place) == ["0"] and beside(place) == []


def test_engines_are_not_written_through_a_link(parts, place):
    bundle = write_bundle(place, *parts)
    (place / "engines").rename(place.parent / "outside/engines")
    (place / "engines").symlink_to(place.parent / "outside/engines")
    before = listing(place.parent, place)
    with pytest.raises(BundleError, match=r"x.bundle/engines/1+.engine lies behind a link; not wr"):
        add_engine(bundle, *tiny_engine("1" * 16))
    assert listing(place.parent, place) == before


def test_engines_added_by_two_at_once_are_all_kept(parts, place):
    bundle = write_bundle(place, *parts)
    sets = ("1357", "2468")
    pids = [
        in_child(lambda s=s: [add_engine(bundle, *tiny_engine(k * 16)) for k in s]) for s in sets
    ]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert sorted(keys(place)) == list("012345678")


@pytest.mark.parametrize("same_key", [True, False])
def test_adding_an_engine_killed_at_each_step_leaves_a_whole_bundle(
    parts, place, unsynced, same_key
):
    key, seen = "0123456789abcdef" if same_key else "1" * 16, set()
    for event in range(1, 300):
        shutil.rmtree(place, ignore_errors=True)
        bundle = write_bundle(place, *parts)
        died = killed_at(event, lambda b=bundle: add_engine(b, *tiny_engine(key, b"new plan")))
        seen.add("".join(keys(place)))
        if not died:
            break
    assert not died and event > 15
    assert seen == ({"0", ""} if same_key else {"0", "01"})
    add_engine(Bundle.open(place), *tiny_engine("2" * 16))
    assert not [p for p in place.rglob(".*")]


def test_leftovers_inside_a_bundle_are_removed(parts, place):
    bundle = write_bundle(place, *parts)
    left = place / f"engines/.{'1' * 16}.engine.partial-dead"
    left.write_bytes(b"half")
    add_engine(bundle, *tiny_engine("1" * 16))
    assert not left.exists()


def test_an_engine_on_a_full_disk(parts, place):
    bundle = write_bundle(place, *parts)

    def add():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            add_engine(bundle, *tiny_engine("1" * 16, bytes(200_000)))
        except InputError as error:
            os._exit(7 if "cannot be written: File too large" in str(error) else 8)

    _, status = os.waitpid(in_child(add), 0)
    assert os.waitstatus_to_exitcode(status) == 7 and keys(place) == ["0"]
    assert len(os.listdir(place / "engines")) == 1
