"""The commands where the operating system refuses: one sentence with the path, exit code 1, and a
batch that continues."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cv2
import pytest
from cases import case
from dg_commands import PICTURE, files, picture_file, strict
from permissions import obeyed

import runtime.__main__
from runtime.errors import InputError, MissingBackend
from sdk import Result, Segmenter, StreamState
from sdk.__main__ import main
from sdk.video_writer import Video

PLAIN = ["--refine", "none"]  # the shortest run


def clip(path, frames=3):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 20, (64, 48))
    for _ in range(frames):
        writer.write(PICTURE)
    writer.release()


def refused(capsys, name, *words, code=1):
    """Check that a command ends with one error that contains ``name``, and no traceback."""
    command = runtime.__main__.main if words[0] in ("inspect", "check", "build") else main
    found = command([str(word) for word in words])
    out, err = capsys.readouterr()
    assert found == code and out == "", (found, out, err)
    assert err.startswith("error: ") and err.count("error: ") == 1 and name in err, err
    assert len(err.splitlines()) == 2 and "\n  fix: " in err, err
    return err


def doors(path):
    """The commands that read or write ``path``, each with the option that names it."""
    for command in (["predict", path], ["demo", path], ["stream", path]):
        yield [*command, *PLAIN]
    for command in ("inspect", "check", "build"):
        yield [command, path]
    for option in ("--prior", "-o"):
        yield ["predict", "good.png", *PLAIN, option, path]
    for option in ("--state", "--labels"):
        yield ["stream", "clip.avi", *PLAIN, option, path]
    yield ["stream", "clip.avi", *PLAIN, "--save", f"{path}.avi"]


@pytest.fixture
def place(work):
    """The folder of good.png, with a video too."""
    clip(work / "clip.avi")
    return work


def test_every_door_refuses_in_one_sentence(place, capsys):
    (place / "locked").mkdir()
    (place / "locked").chmod(0)
    (place / "loop").symlink_to("pool")
    (place / "pool").symlink_to("loop")
    (place / "unreadable").touch(0)
    before = files(place)
    for path, name in [
        ("locked/x", "locked/x"),
        ("loop/x", "loop"),
        ("x" * 300, "x" * 100),
        ("x/" * 2500, "x/x/x"),
        ("good.png/x", "good.png"),
        ("good.png/x/y", "good.png"),
    ]:
        for words in doors(path):
            # A missing folder is created for -o and --labels, and a bundle has an exit code.
            with case(path[:20], *words[:1], *words[-2:-1]), obeyed():
                refused(capsys, name, *words)
                assert files(place) == before
    for words in (["predict", "unreadable"], ["predict", "good.png", "--prior", "unreadable"]):
        with case(*words), obeyed():
            refused(capsys, "unreadable", *words)
    with obeyed():
        refused(capsys, "locked", "stream", "locked")
        refused(capsys, "locked", "predict", "good.png", "-o", "locked")
        result = Segmenter(refine=None)(PICTURE)
        for save in (result.save, result.save_labels):
            for path in ("locked/x.png", "loop/x.png", f"{'x' * 300}.png", "good.png/x.png"):
                with pytest.raises(
                    InputError, match=r"(?s)(locked|loop|x|good).* cannot|is a file"
                ):
                    save(path)
    (place / "locked").chmod(0o700)


def test_the_working_folder_was_removed(place, capsys, monkeypatch):
    gone = place / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for words in doors("x"):
        with case(*words[:1], *words[-2:-1]):
            command = runtime.__main__.main if words[0] in ("inspect", "check", "build") else main
            words = [str(place / w) if w in ("good.png", "clip.avi") else w for w in words]
            assert command(words) in (1, 5)
            out, err = capsys.readouterr()
            assert out == "" and err.count("error: ") == 1 and "Traceback" not in err
    assert main(["predict", str(place / "good.png"), "-o", str(place / "out"), *PLAIN]) == 0


def test_an_output_folder_that_is_something_else(place, capsys):
    (place / "loop").symlink_to("loop")
    (place / "dangling").symlink_to("none")
    os.mkfifo("fifo")
    for name, message in [
        ("loop", "loop cannot be created: Too many levels of symbolic links\n  fix: remove the"),
        ("dangling", "written: dangling is a link whose target does not exist\n"),
        ("dangling/x", "written: dangling is a link whose target does not exist\n"),
        ("fifo", "written: fifo is not a folder\n"),
        ("good.png", "written: good.png is not a folder\n"),
    ]:
        for words in (["predict", "good.png", "-o"], ["stream", "clip.avi", "--labels"]):
            with case(*words[:1], name):
                assert message in refused(capsys, name, *words, name, *PLAIN)
    assert "in Python, the content" in refused(capsys, "xxx", "predict", "x" * 304, *PLAIN)


def test_an_output_is_no_url(place, capsys):
    url = "http://me:secret@h/x.mp4"
    streams = [["stream", "clip.avi", option] for option in ("--save", "--labels", "--state")]
    for words in (["predict", "good.png", "-o"], ["demo", "-o"], *streams):
        with case(*words), pytest.raises(SystemExit) as end:
            main([*words, url])
        err = capsys.readouterr().err
        assert end.value.code == 2 and "it is a URL; wanted a path: outputs are files" in err
        assert "secret" not in err and not (place / "http:").exists()


@contextmanager
def limited(kind, value):
    """Lower a limit of this process for a block."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def test_a_batch_continues_after_a_picture_that_fails(place, capsys, monkeypatch):
    """Whatever fails, reading or writing: the others are written, and the exit code is 1."""
    long = "n" * 246  # of this the picture is written, and the overlay has too long a name
    picture_file(place / f"{long}.png")
    picture_file(place / "last.png")
    picture_file(place / "closed.png")
    (place / "closed.png").chmod(0)
    (place / "loop.png").symlink_to("loop.png")
    picture_file(place / "memory.png")
    picture_file(place / "thread.png")
    segment = Segmenter.__call__

    def failing(seg, source, **options):
        if source == "memory.png":
            raise MemoryError
        if source == "thread.png":
            raise RuntimeError("can't start new thread")
        if source == "system.png":
            raise OSError(errno.EIO, "Input/output error")
        return segment(seg, source, **options)

    monkeypatch.setattr(Segmenter, "__call__", failing)
    pictures = ["closed.png", "missing.png", f"{long}.png", "loop.png", "memory.png", "thread.png"]
    pictures += ["system.png", "http://me:secret@host/a.png?key=secret", "good.png", "last.png"]
    sentences = [
        "closed.png cannot be read: Permission denied",
        "missing.png does not exist",
        f"out/{long[:100]}",
        "loop.png cannot be read: Too many levels of symbolic links",
        "memory.png: out of memory",
        "thread.png: the system starts no more threads",
        "system.png cannot be used: Input/output error",
        "http://host/a.png?key=*** is a URL, wanted a path: URLs are not read",
    ]
    with obeyed():
        assert main(["predict", *pictures, *PLAIN, "--json", "--coco"]) == 1
    out, err = capsys.readouterr()
    documents = strict(out)
    shown = [*pictures[:7], "http://host/a.png?key=***", *pictures[8:]]
    assert [d["picture"] for d in documents] == shown
    for document, sentence in zip(documents, sentences, strict=False):
        with case(sentence):
            assert document["error"].startswith(sentence) and "\n  fix: " in document["error"]
            assert f"error: {document['error']}\n" in err
    assert "secret" not in out + err and err.count("error: ") == len(sentences)
    assert "File name too long\n  fix: choose a shorter name" in documents[2]["error"]
    names = [f"{name}_{what}.png" for name in ("good", "last") for what in ("labels", "overlay")]
    assert files(place / "out") == sorted(["annotations.json", *names])
    images = json.loads((place / "out/annotations.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["good.png", "last.png"]


def test_a_missing_library_ends_a_batch_at_once(place, capsys, monkeypatch):
    picture_file(place / "last.png")

    def missing(*_, **__):
        raise MissingBackend("a library is not installed", fix="pip install it")

    monkeypatch.setattr(Segmenter, "__call__", missing)
    refused(capsys, "a library is not", "predict", "good.png", "last.png", *PLAIN, code=4)


def test_a_mistake_in_the_program_is_not_hidden(place, monkeypatch):
    def wrong(*_, **__):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(Segmenter, "__call__", wrong)
    with pytest.raises(RuntimeError, match="a mistake"):
        main(["predict", "good.png"])


def test_limits_of_the_process_are_one_sentence(place, capsys):
    picture_file(place / "last.png")
    assert main(["predict", "good.png", "last.png", *PLAIN]) == 0  # all libraries are loaded
    before = {name: (place / "out" / name).read_bytes() for name in files(place / "out")}
    capsys.readouterr()
    with limited(resource.RLIMIT_FSIZE, 100):
        assert main(["predict", "good.png", "last.png", "--coco", *PLAIN]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("error: ") == 2
    for name in ("good", "last"):
        assert f"out/{name}_overlay.png cannot be written: File too large\n  fix: raise" in err
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    with limited(resource.RLIMIT_NOFILE, lowest):
        code = main(["predict", "good.png", *PLAIN])
        reading = runtime.__main__.main(["inspect", "out"])
    out, err = capsys.readouterr()
    assert code == 1 and reading in (1, 5) and out == "" and err.count("error: ") == 2
    assert "folder out cannot be created or written: Too many open files" in err
    assert {name: (place / "out" / name).read_bytes() for name in files(place / "out")} == before


def test_annotations_that_cannot_be_written_do_not_lose_the_document(place, capsys):
    (place / "out/annotations.json").mkdir(parents=True)
    assert main(["predict", "good.png", "--coco", "--json", *PLAIN]) == 1
    out, err = capsys.readouterr()
    assert [d["picture"] for d in strict(out)] == ["good.png"]
    assert err.startswith("error: out/annotations.json is a folder, wanted a file name")
    assert files(place / "out") == ["good_labels.png", "good_overlay.png"]


def test_runs_into_one_folder_do_not_fail_each_other(work, capsys):
    """A fixed name of the trial file was removed by one run while another one renamed it."""
    words = ["predict", "none.png", "-o", "a/b"]
    with ThreadPoolExecutor(4) as pool:
        assert {*pool.map(lambda _: main(words), range(200))} == {1}
    assert capsys.readouterr().err.count("none.png does not exist") == 200
    assert files(work) == ["good.png"]


def test_outputs_are_written_through_links_and_their_permissions_are_kept(place):
    out = place / "out"
    out.mkdir()
    (out / "good_overlay.png").symlink_to("../real.png")
    (out / "good_labels.png").touch(0o600)
    assert main(["predict", "good.png", *PLAIN]) == 0
    assert os.readlink(out / "good_overlay.png") == "../real.png"
    assert cv2.imread(str(place / "real.png")).shape == (48, 64, 3)
    assert (out / "good_labels.png").stat().st_mode & 0o777 == 0o600


def test_a_result_is_written_into_a_fifo(place):
    result = Segmenter(refine=None)(PICTURE)
    result.save("file.png")
    os.mkfifo("fifo.png")
    reader = subprocess.Popen(["cat", "fifo.png"], stdout=subprocess.PIPE)
    try:
        while True:
            try:
                result.save("fifo.png")
                break
            except InputError as error:  # cat has not opened it yet
                assert "start the program that reads from it first" in error.fix
                assert reader.poll() is None
        assert reader.communicate(timeout=60)[0] == Path("file.png").read_bytes()
    finally:
        reader.kill()
        reader.communicate()
    assert Path("fifo.png").is_fifo()
    os.symlink("/dev/null", "null.npy")
    result.save_labels("null.npy")
    assert os.path.islink("null.npy") and Path("/dev/null").is_char_device()


def test_streams_refuse_outputs_that_are_no_files(place, capsys):
    os.mkfifo("fifo.avi")
    for option in ("--state", "--save"):
        with case(option):
            refused(capsys, "fifo.avi is a FIFO", "stream", "clip.avi", *PLAIN, option, "fifo.avi")
    assert Path("fifo.avi").is_fifo()


def test_a_stream_finishes_all_outputs_after_one_that_fails(place, capsys, monkeypatch):
    close = Video.close

    def full(video):
        close(video)
        raise InputError("a.avi could not be written whole")

    monkeypatch.setattr(Video, "close", full)
    words = ["stream", "clip.avi", "--save", "a.avi", "--state", "s", "--warm-steps", "1"]
    assert main([*words, "--cold-steps", "1"]) == 1
    err = capsys.readouterr().err
    assert "3 frames, 0 dropped" in err and "error: a.avi could not be written whole" in err
    assert StreamState.load("s").frames == 3

    def no_state(*_):
        raise InputError("s cannot be written")

    def no_labels(*_):
        raise InputError("x.png cannot be written")

    monkeypatch.setattr(StreamState, "save", no_state)
    monkeypatch.setattr(Result, "save_labels", no_labels)
    assert main([*words, "--labels", "labels"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: a.avi could not be written whole",
        "error: s cannot be written",
        "error: x.png cannot be written",
    ]


def test_a_stream_without_a_frame_leaves_no_state(place, capsys):
    (place / "bad").mkdir()
    (place / "bad/a.png").write_bytes(b"no picture")
    assert main(["stream", "bad", *PLAIN, "--state", "s"]) == 1
    assert "no readable frame" in capsys.readouterr().err and not (place / "s").exists()


def test_a_stream_gets_its_source_as_text(place, monkeypatch):
    """Which number is a camera and which a folder is decided in one place, for Python too."""
    found = []

    def stream(self, source, **_):
        found.append(source)
        raise InputError("seen")

    monkeypatch.setattr(Segmenter, "stream", stream)
    names = ["0", "2024", "²", "٢", "a b", "#1", "-", "!"]
    for name in names:
        assert main(["stream", name]) == 1
    assert found == names


# Printing


NAMES = ["日本.png", "caf\udce9.png", "a\nb #!.png", "é.png"]
POSIX = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def program(setting, module, *words, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    environment = {**os.environ, **setting}
    return subprocess.run(
        [sys.executable, "-m", module, *words], env=environment, timeout=600, **options
    )


def test_every_name_is_printed_on_every_terminal(work):
    """The names in JSON are the names of the files, by os.fsencode."""
    for name in NAMES:
        picture_file(work / "good.png")
        (work / "good.png").rename(work / name)
    words = ["predict", *NAMES, "-o", "out_ü", *PLAIN]
    for setting in [
        {"PYTHONIOENCODING": "ascii:strict"},
        {"PYTHONIOENCODING": "latin-1:strict"},
        {"PYTHONIOENCODING": "utf-8:strict"},
        POSIX,
    ]:
        with case(*setting.values()):
            run = program(setting, "sdk", *words)
            assert (run.returncode, run.stderr) == (0, b"")
            lines = run.stdout.splitlines()
            assert len(lines) == len(NAMES) and lines[2].startswith(b"a\\nb #!.png: ")
    run = program({"PYTHONIOENCODING": "utf-8:strict"}, "sdk", *words, "--json")
    assert (run.returncode, run.stderr) == (0, b"") and run.stdout.isascii()
    for document, name in zip(strict(run.stdout), NAMES, strict=True):
        assert os.fsencode(document["picture"]) == os.fsencode(name)
        assert (work / document["labels"]).is_file()


def test_a_full_disk_behind_the_streams_is_one_line(work):
    predict = ["predict", "good.png", "none.png", *PLAIN]
    for out, err, unbuffered, words in [
        ("/dev/full", "err", "", predict),
        ("/dev/full", "err", "1", predict),
        ("/dev/full", "/dev/full", "", ["predict", "good.png", *PLAIN]),
        ("stdout", "/dev/full", "", predict),
        ("/dev/full", "err", "", ["--help"]),
    ]:
        with case(out, err, unbuffered, *words), open(out, "wb") as stdout, open(err, "wb") as log:
            run = program(
                {"PYTHONUNBUFFERED": unbuffered}, "sdk", *words, stdout=stdout, stderr=log
            )
            assert run.returncode == 1
            if err == "err":
                said = Path("err").read_text()
                assert "cannot be" in said and "the disk is full" in said
                assert "Traceback" not in said and "Exception ignored" not in said


def test_a_batch_continues_where_messages_cannot_be_printed(place):
    names = [f"{i}.png" for i in range(4)]
    for name in names:
        picture_file(place / name)
    predict = ["predict", "none.png", *names, *PLAIN]
    stream = ["stream", "clip.avi", *PLAIN, "--labels", "out"]
    predicted = sorted(f"{i}_{what}.png" for i in range(4) for what in ("labels", "overlay"))
    streamed = [f"{i:06d}.png" for i in range(3)]
    for out, err, unbuffered, words, wanted in [
        ("stdout", "/dev/full", "", predict, predicted),
        ("/dev/full", "err", "", predict, predicted),
        ("/dev/full", "/dev/full", "1", predict, predicted),
        ("stdout", "/dev/full", "", stream, streamed),
    ]:
        with case(out, err, *words), open(out, "wb") as stdout, open(err, "wb") as log:
            shutil.rmtree("out", ignore_errors=True)
            run = program(
                {"PYTHONUNBUFFERED": unbuffered}, "sdk", *words, stdout=stdout, stderr=log
            )
            assert run.returncode == 1 and files(place / "out") == wanted
            if out == "stdout" and words is predict:
                assert len(Path(out).read_text().splitlines()) == 4
            if err == "err":
                assert "error: stdout cannot be written: No space left" in Path(err).read_text()


def test_a_file_whose_name_begins_with_a_dash(work, capsys):
    picture_file(work / "-x.png")
    with pytest.raises(SystemExit):
        main(["predict", "-x.png"])
    assert "fix: write ./-x.png for the file of this name" in capsys.readouterr().err
    assert main(["predict", "./-x.png", *PLAIN]) == 0
    assert main(["predict", *PLAIN, "--", "-x.png"]) == 0
    assert files(work / "out") == ["-x_labels.png", "-x_overlay.png"]


def test_hidden_pictures_that_are_named_are_read(work):
    for name in ("._x.png", ".x.png", ". x #!.png"):
        picture_file(work / name)
    assert main(["predict", "._x.png", ".x.png", ". x #!.png", *PLAIN]) == 0
    assert len(files(work / "out")) == 6


def test_a_password_in_a_misplaced_url_is_not_shown(work, capsys):
    url = "rtsp://me:secret@cam/1"
    for words in (["stream", "a.avi", url], ["stream", f"--sav={url}"], [url], ["demo", url]):
        for option in ([], ["--json"]):
            with case(*words, *option):
                try:
                    assert main([*words, *option]) == 1
                except SystemExit as end:
                    assert end.code == 2
                out, err = capsys.readouterr()
                assert "secret" not in out + err and (out or err)


def test_numbers_of_another_script_are_no_sizes(work, capsys):
    for text in ("²", "1²x3"):
        with pytest.raises(SystemExit):
            main(["predict", "good.png", "--imgsz", text])
        assert "is no size" in capsys.readouterr().err
