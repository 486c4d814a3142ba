"""ONNX files and weights that the operating system refuses, and names that are not UTF-8."""

import os
import resource
import shutil
import subprocess

import numpy as np
import pytest
from cases import case
from onnx_files import BESIDE, external, in_initializer, info, model_of, write
from permissions import obeyed
from unusable_paths import NOT_UTF8, bad_paths, locked, removed_folder

from runtime import OnnxEngine, load_engine
from runtime.engines.named_files import missing, shell_word, utf8_text
from runtime.engines.onnx_file import names_in_utf8
from runtime.errors import InputError

onnx = pytest.importorskip("onnx", reason="the networks are made with onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
from onnx import helper  # noqa: E402 (after importorskip)


def double():
    """y = x + x, for two numbers."""
    return model_of([helper.make_node("Add", ["x", "x"], ["y"])], [info("x")])


def test_paths_that_the_operating_system_refuses(tmp_path):
    for bad in bad_paths(tmp_path, ".onnx"):
        with case(bad.kind), obeyed():
            with pytest.raises(InputError, match=rf"{bad.reason}\n  fix: ") as caught:
                load_engine(bad.path)
            assert bad.path[:150] in caught.value.message


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    (tmp_path / "folder.onnx").mkdir()
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "device.onnx").symlink_to("/dev/zero")
    for name, kind in [("folder", "a folder"), ("pipe", "a pipe"), ("device", ".* a device")]:
        with (
            case(name),
            pytest.raises(InputError, match=f"{name}.onnx is {kind}.*, wanted an .onn"),
        ):
            load_engine(tmp_path / f"{name}.onnx")


def test_locked_files(folder):
    path = write(folder, in_initializer("data/deep.bin"))
    for file in (path, folder / "data/deep.bin", folder / "data"):
        with case(file.name), locked(file):
            with pytest.raises(InputError, match=r"cannot be read: Permission denied\n  fix: "):
                load_engine(path)
    with load_engine(path) as engine:
        assert np.array_equal(engine()[0], BESIDE)


def test_a_locale_without_utf8(tmp_path, monkeypatch):
    """ONNX Runtime opens the UTF-8 of a text, which is another file where names are in Latin-1."""
    monkeypatch.setattr(os, "fsencode", lambda name: name.encode("latin-1"))
    for name, same in [("a.onnx", True), ("é.onnx", False)]:
        with case(name), names_in_utf8(tmp_path / name, {}) as found:
            assert (found == str(tmp_path / name)) == same and found.isascii()


def test_a_removed_working_folder(tmp_path):
    path = write(tmp_path, double())
    with removed_folder(tmp_path / "gone"):
        with pytest.raises(InputError, match=r"x.onnx does not exist\n.*folder is \(removed\)"):
            load_engine("x.onnx")
        with load_engine(path) as engine:
            assert np.array_equal(engine(BESIDE)[0], 2 * BESIDE)


def test_too_many_open_files(tmp_path):
    path = write(tmp_path, in_initializer("w.bin"))
    (tmp_path / "w.bin").write_bytes(BESIDE.tobytes())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    load_engine(path).close()  # imports what it needs
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(InputError, match=r"m\.onnx cannot be read: Too many open files"):
            load_engine(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_names_that_are_not_utf8(tmp_path):
    """ONNX Runtime takes no such path, so it gets a link; weights beside the model are found."""
    place = tmp_path / NOT_UTF8
    for location in (None, "w.bin", "./w.bin", "sub/w.bin"):
        for name in ("m.onnx", f"{NOT_UTF8}.onnx"):
            with case(location, name.isascii()):
                shutil.rmtree(place, ignore_errors=True)
                (place / "sub").mkdir(parents=True)
                path = write(place, in_initializer(location) if location else double(), name)
                if location:
                    (place / location).write_bytes(BESIDE.tobytes())
                with load_engine(path) as engine:
                    assert engine.name == name
                    out = engine() if location else engine(BESIDE)
                    assert np.array_equal(out[0], BESIDE if location else 2 * BESIDE)


def test_one_file_of_weights_by_two_paths(tmp_path):
    add = helper.make_node("Add", ["w", "v"], ["y"])
    model = model_of([add], initializers=[external("w.bin"), external("./w.bin", "v")])
    path = write(tmp_path, model, f"{NOT_UTF8}.onnx")
    (tmp_path / "w.bin").write_bytes(BESIDE.tobytes())
    with load_engine(path) as engine:
        assert np.array_equal(engine()[0], 2 * BESIDE)


def test_a_name_that_is_not_utf8_in_a_message(tmp_path):
    path = write(tmp_path, b"not a network", f"{NOT_UTF8}.onnx")
    with pytest.raises(Exception, match=r"is no ONNX file|cannot be loaded") as caught:
        load_engine(path)
    assert utf8_text(caught.value.message).count("caf\\udce9.onnx") == 1


def test_the_temporary_links_cannot_be_made(tmp_path, monkeypatch):
    path = write(tmp_path, double(), f"{NOT_UTF8}.onnx")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "symlink", full)
    with pytest.raises(InputError, match="cannot be linked: No space left on device"):
        load_engine(path)


def test_an_address_is_no_path():
    for path in ("http://host/m.onnx", "https://host/a/m.onnx", "s3://bucket/m.onnx"):
        with case(path), pytest.raises(InputError, match="nothing is downloaded\n  fix: download"):
            load_engine(path)
    assert "does not exist" in missing("C/x").message


def threads_end(work):
    """Call ``work`` in a child that can start no more threads; return what it wrote."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if os.geteuid() == 0:  # the limit does not bind root
                os.setgroups([])
                os.setuid(65534)
            work(lambda: resource.setrlimit(resource.RLIMIT_NPROC, (1, 1)))
        except Exception as error:
            os.write(send, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(pid, 0)
    return text


def test_no_more_threads():
    data = double().SerializeToString()
    with OnnxEngine(data) as engine:  # imports what it needs
        engine(BESIDE)

    def load(limit):
        limit()
        OnnxEngine(data, threads=4)

    def run(limit):
        engine = OnnxEngine(data, threads=1)
        limit()
        engine(BESIDE)

    for work in (load, run):
        with case(work.__name__):
            text = threads_end(work)
            assert text.startswith("DeviceError: no more threads can be started (")
            assert "fix: close other processes, or raise the limits: ulimit -u" in text


def test_words_for_a_shell():
    for word in ["a", "a b", "it's", "", "#!%$x", NOT_UTF8, f"{NOT_UTF8}'\\\n$(x)", "日本"]:
        with case(utf8_text(word)):
            shown = shell_word(word)
            command = ["bash", "-c", b"printf %s " + shown.encode()]  # encode: it is UTF-8
            assert subprocess.run(command, capture_output=True).stdout == os.fsencode(word)
