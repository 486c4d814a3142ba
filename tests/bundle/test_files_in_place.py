"""What may lie in the place of a bundle's file: other paths, links, pipes, folders."""

import copy
import os
import resource
import shutil

import pytest
from cases import case
from hostile_bundles import at, attempt, seal_bytes
from permissions import obeyed
from unusable_paths import NOT_UTF8, bad_paths, locked, removed_folder

from runtime.bundle import read
from runtime.bundle.manifest import MANIFEST, file_entry
from runtime.bundle.open import open_graph
from runtime.bundle.read import Bundle
from runtime.bundle.write import write_bundle
from runtime.errors import BundleError, InputError

onnx = pytest.importorskip("onnx", reason="the graphs are made with onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")
pytest.importorskip("safetensors", reason="needs safetensors: pip install safetensors")
from bundles import lay, read_all, tiny_engine  # noqa: E402 (after importorskip)

ENTRIES = ("graphs.prior", "graphs.refine_step", "graphs.refine_map", "init", "engines.0",
           "golden.0", "licence")  # fmt: skip

# Paths

PATHS = ["../outside/secret.bin", "/etc/hostname", "a\\b", "..\\outside\\secret.bin", ".", "..", "",
         "/", "./prior.onnx", "engines/../prior.onnx", "engines//x", "engines/", "a/b/c", "\0",
         "x\0.onnx", "x" * 101, "x" * 100_000, "é.onnx", "\u202eonnx.x", "-x", " x", "x ", "x\n",
         ".hidden", "C:\\x", "C:/x", "file:///etc/hostname", "~/x", "$HOME/x", "%2e%2e/x", MANIFEST,
         "MANIFEST.JSON/../manifest.json", None, 5, ["x"], {"file": "x"}]  # fmt: skip


def test_36_paths_each(pristine, place):
    for where in ENTRIES:
        with case(where):
            original, files = pristine["network"]
            data = (place.parent / "outside/secret.bin").read_bytes()
            for path in PATHS:
                manifest = copy.deepcopy(original)
                at(manifest, where).update(
                    file_entry("x", data) | {"file": path}
                )  # only the path is wrong
                lay(place, files | {MANIFEST: seal_bytes(manifest)})
                assert attempt(place, f"{where} {str(path)[:60]!r}") is None


def test_a_path_of_100_characters_in_a_folder_is_fine(pristine, place):
    manifest, files = copy.deepcopy(pristine["kmeans"])
    del files[MANIFEST]
    long = f"{'d' * 100}/{'f' * 100}"
    files[long] = files.pop("init.safetensors")
    manifest["init"]["file"] = long
    write_bundle(place, manifest, files)
    assert long in attempt(place, "long")[1]


# What a file can be


def _hide(target):
    """Move the true file out of the bundle, so that following a link would work."""
    true = target.parents[2 if target.parent.suffix != ".bundle" else 1] / "outside/true"
    shutil.move(target, true)
    return true


def _grow(target):
    with target.open("ab") as file:
        file.write(b"x")


KINDS = {
    "missing": lambda t: t.unlink(),
    "link": lambda t: t.symlink_to(_hide(t)),
    "hard link of another size": lambda t: (_hide(t), os.link(t.parent / "../pad", t)),
    "dangling": lambda t: (t.unlink(), t.symlink_to("nowhere")),
    "loop": lambda t: (t.unlink(), t.symlink_to(t.name)),
    "passwd": lambda t: (t.unlink(), t.symlink_to("/etc/passwd")),
    "self": lambda t: (t.unlink(), t.symlink_to("/proc/self/mem")),
    "fifo": lambda t: (t.unlink(), os.mkfifo(t)),
    "folder": lambda t: (t.unlink(), t.mkdir()),
    "empty": lambda t: t.write_bytes(b""),
    "longer": _grow,
    "sparse": lambda t: os.truncate(t, 2**40),
    "device": lambda t: (t.unlink(), os.mknod(t, 0o20666, os.makedev(1, 5))),  # /dev/zero
}


def test_things_in_place_of_each_file(pristine, place):
    _, files = pristine["network"]
    not_made = {}
    for kind in KINDS:
        for file in files:
            lay(place, files)
            (place / "pad").write_bytes(b"pad")
            (place.parent / "pad").write_bytes(b"pad")
            try:
                KINDS[kind](place / file)
            except OSError as error:
                not_made[kind] = error
                break
            with case(kind, file):
                assert attempt(place, f"{kind} {file}") is None
            (place.parent / "outside/true").unlink(missing_ok=True)
    for kind, error in not_made.items():  # the others were tested
        pytest.skip(f"this user cannot make a {kind} here: {error}")


def test_things_in_place_of_a_folder(pristine, place):
    for kind in ["link", "dangling", "loop", "fifo", "file", "missing"]:
        for inner in ["engines", "golden"]:
            with case(kind, inner):
                lay(place, pristine["network"][1])
                true = place.parent / "outside/true"
                shutil.rmtree(true, ignore_errors=True)  # of the case before
                shutil.move(place / inner, true)
                target = {"link": true, "dangling": "nowhere", "loop": inner}.get(kind)
                if target:
                    (place / inner).symlink_to(target)
                elif kind == "fifo":
                    os.mkfifo(place / inner)
                elif kind == "file":
                    (place / inner).write_bytes(b"x")
                assert attempt(place, f"{kind} {inner}") is None
                with pytest.raises(
                    BundleError, match=f"x.bundle/{inner}/.* (is missing|cannot be read: )"
                ):
                    read_all(place)


def test_what_each_kind_is_called(pristine, place):
    def refused(match):
        with pytest.raises(BundleError, match=match):
            read_all(place)
        lay(place, pristine["kmeans"][1])

    lay(place, pristine["kmeans"][1])
    init = place / "init.safetensors"
    KINDS["fifo"](init)
    refused(r"^x.bundle/init.safetensors is no regular file\n  fix: ")
    KINDS["longer"](init)
    refused(r"^x.bundle/init.safetensors has \d+ bytes; the manifest says \d+\n  fix: ")
    KINDS["missing"](init)
    refused(r"^x.bundle/init.safetensors is missing\n  fix: ")
    KINDS["link"](init)
    refused(r"^x.bundle/init.safetensors cannot be read: .*\(links are not followed\)\n  fix: ")
    (place / MANIFEST).unlink()
    refused(r"x.bundle is no bundle: it has no manifest.json\n  fix: ")
    os.truncate(place / MANIFEST, 2**40)
    refused(r"^x.bundle/manifest.json has 1099511627776 bytes; at most 4194304\n  fix: ")


def test_a_file_that_grows_while_it_is_read(pristine, place, monkeypatch):
    lay(place, pristine["kmeans"][1])
    stat, size = os.fstat, (place / "init.safetensors").stat().st_size

    def grow(descriptor):
        info = stat(descriptor)
        if info.st_size == size:
            _grow(place / "init.safetensors")
        return info

    monkeypatch.setattr(read.os, "fstat", grow)
    with pytest.raises(BundleError, match=r"init.safetensors has sha256"):
        read_all(place)


def test_files_of_equal_size_that_were_swapped(pristine, place):
    manifest, files = copy.deepcopy(pristine["kmeans"])
    del files[MANIFEST]
    for key, fill in (("1" * 16, b"1"), ("2" * 16, b"2")):
        entry, files[f"engines/{key}.engine"] = tiny_engine(key, fill * 100)
        manifest["engines"].append(entry)
    write_bundle(place, manifest, files)
    one, two = (place / f"engines/{key * 16}.engine" for key in "12")
    one.rename(place / "x")
    two.rename(one)
    (place / "x").rename(two)
    with pytest.raises(BundleError, match=r"engines/1111111111111111.engine has sha256"):
        read_all(place)


def test_extra_files_are_let_be(pristine, place):
    lay(place, pristine["kmeans"][1])
    (place / "notes.txt").write_text("mine")
    os.mkfifo(place / "pipe")
    assert attempt(place, "extra") is not None


def test_files_that_may_not_be_read(pristine, place):
    """The bundle is not damaged, so the error is no BundleError."""
    lay(place, pristine["kmeans"][1])
    for file in (MANIFEST, "init.safetensors", "engines", "."):
        file = next(place.glob("engines/*")).parent if file == "engines" else place / file
        with case(file.name), locked(file):
            with pytest.raises(InputError, match="cannot be read: Permission denied"):
                read_all(place)


def test_no_more_files_can_be_opened(pristine, place):
    lay(place, pristine["kmeans"][1])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(InputError, match=r"manifest.json cannot be read: Too many open files"):
            read_all(place)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_is_no_folder(pristine, place):
    for bad in bad_paths(place.parent):
        with case(bad.kind), obeyed():
            with pytest.raises(InputError, match=f"{bad.reason}\n  fix: "):
                Bundle.open(bad.path)
    for data in (b"PK\3\4 zip", b""):
        place.write_bytes(data)
        with pytest.raises(InputError, match=r"is no folder; a bundle is one\n  fix: unpack it"):
            Bundle.open(place)
    for name, match in [
        ("a\0b", "cannot be read: embedded null byte"),
        ("/dev/null", "is no folder"),
        ("https://host/x.bundle", "nothing is downloaded"),
    ]:
        with case(match), pytest.raises(InputError, match=match):
            Bundle.open(name)
    place.unlink()
    place.mkdir()
    with pytest.raises(
        BundleError, match=r"x.bundle is no bundle: it has no manifest.json\n  fix: "
    ):
        Bundle.open(place)
    with removed_folder(place.parent / "gone"):
        with pytest.raises(InputError, match=r"x.bundle does not exist\n.*folder is \(removed\)"):
            Bundle.open("x.bundle")


def test_pointers_of_git_lfs(pristine, place):
    """A repository with bundles was cloned without Git LFS."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 99\n"
    for file in (MANIFEST, "init.safetensors"):
        with case(file):
            lay(place, pristine["kmeans"][1] | {file: pointer})
            with pytest.raises(BundleError, match=f"{file} is a Git LFS .*\n  fix: git lfs"):
                read_all(place)


def test_names_that_are_not_utf8(pristine, tmp_path):
    for kind in pristine:
        with case(kind):
            folder = tmp_path / f"{kind}{NOT_UTF8}"
            write_bundle(folder, *unsealed(pristine[kind]))
            bundle = Bundle.open(folder)
            bundle.check_files()
            for name in bundle.manifest["graphs"]:
                open_graph(bundle, name, backend="onnx")


def unsealed(parts):
    manifest, files = copy.deepcopy(parts)
    del files[MANIFEST]
    return manifest, files


def test_a_folder_that_vanishes(place):
    with pytest.raises(BundleError, match=r"x.bundle/manifest.json is missing\n  fix: "):
        read.read_file(place, MANIFEST, None)
