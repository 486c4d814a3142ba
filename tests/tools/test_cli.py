"""python -m runtime: usage, the doctor's exit codes, and what the command lines share."""

import abc
import importlib
import io
import json
import logging
import signal
import sys
import threading
import time
import warnings
from contextlib import suppress
from functools import partial

import pytest
from cases import case
from runtime_commands import answer, text
from tqdm import tqdm

from runtime.__main__ import main
from runtime.device.choose import module_of
from runtime.errors import EngineMismatch, InputError, MissingBackend
from runtime.tools import cli, doctor
from runtime.tools.output import print_json, say

# Usage


def test_a_usage_error_names_the_nearest_word(capsys):
    for arguments, what, fix in [
        (["inspct", "x"], "invalid choice: 'inspct'", "did you mean inspect?"),
        (["check", "x", "--devce", "cuda"], "does not know '--devce'", "did you mean --device?"),
        (["check", "x", "--devce=cuda"], "does not know '--devce'", "did you mean --device?"),
        (["build", "x", "--dry"], "does not know '--dry'", "did you mean --dry-run?"),
        (["build", "x", "--target", "rtxx"], "invalid choice: 'rtxx'", "did you mean rtx?"),
        (["inspect", "a", "b"], "does not know 'b'", "see: python -m runtime inspect --help"),
        (["inspect"], "required: BUNDLE", "see: python -m runtime inspect --help"),
        ([], "required: COMMAND", "see: python -m runtime --help"),
    ]:
        with case(*arguments):
            with pytest.raises(SystemExit) as end:
                main(arguments)
            out, err = capsys.readouterr()
            assert end.value.code == 2 and out == ""
            assert what in err and err.endswith(f"  fix: {fix}\n") and err.startswith("error: ")
            with pytest.raises(SystemExit) as end:
                main([*arguments, "--json"])
            out, err = capsys.readouterr()
            assert end.value.code == 2 and err == ""
            assert json.loads(out).keys() == {"error", "fix"}


def test_no_bundle_is_an_error_with_a_fix(capsys, tmp_path):
    for command in ["inspect", "check", "build"]:
        with case(command):
            code, out, err = text(capsys, command, tmp_path / "none")
            assert code == 1 and out == "" and "none does not exist" in err and "\n  fix: " in err
            code, document = answer(capsys, command, tmp_path)  # a folder, but no bundle
            assert code == 5 and "is no bundle" in document["error"] and document["fix"]


# doctor


def test_doctor_fails_only_for_what_is_broken(capsys, monkeypatch):
    for kind, code in [("missing", 0), ("clash", 0), ("broken", 1)]:
        with case(kind):
            found = {"problems": [{"kind": kind, "what": "it", "fix": "mend it"}]}
            monkeypatch.setattr(doctor, "report", lambda found=found: found)
            monkeypatch.setattr(doctor, "render", lambda report: "one\ntwo")
            assert text(capsys, "doctor") == (code, "one\ntwo\n", "")
            assert answer(capsys, "doctor") == (code, found)


# What the command lines share


def test_errors_become_exit_codes(capsys):
    for error, code in [
        (InputError("a", fix="b"), 1),
        (MissingBackend("a", fix="b"), 4),
        (EngineMismatch("a", fix="b"), 5),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 1),
    ]:
        with case(type(error).__name__):

            def fail(error=error):
                raise error

            assert cli.run(fail) == code
            out, err = capsys.readouterr()
            assert out == "" and err.startswith("error: ") and err.count("\n  fix: ") == 1
            assert cli.run(fail, as_json=True) == code
            out, err = capsys.readouterr()
            assert err == "" and all(json.loads(out).values())
            assert cli.run(lambda: 6) == 6
    with pytest.raises(ZeroDivisionError):  # a mistake in the program is not hidden
        cli.run(lambda: 1 // 0)


class Lost:
    """Its end loses a Ctrl-C, as the callbacks of imports do."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        len("the interpreter looks for signals here")


def test_ctrl_c_is_not_lost_where_python_drops_exceptions(capfd, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # pytest has its own
    ended = []

    def work():
        lost = Lost()
        del lost
        ended.append(False)
        time.sleep(30)
        return 0

    start = time.monotonic()
    assert cli.run(work) == 130
    assert ended == [False] and time.monotonic() - start < 15
    assert capfd.readouterr() == ("", "error: interrupted\n  fix: run the command again\n")
    assert sys.unraisablehook is sys.__unraisablehook__


def test_a_repeated_ctrl_c_does_not_outlive_its_command(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)

    def work():
        lost = Lost()
        del lost
        return 6  # before the Ctrl-C is repeated

    assert cli.run(work) == 6
    assert signal.setitimer(signal.ITIMER_REAL, 0) == (0, 0)


def test_other_exceptions_that_python_drops_are_still_printed(capfd, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)

    class Bad:
        def __del__(self):
            raise ValueError("in __del__")

    def work():
        bad = Bad()
        del bad
        return 0

    assert cli.run(work) == 0
    assert "ValueError: in __del__" in capfd.readouterr().err


def test_ctrl_c_inside_an_import_or_a_check_of_an_abstract_class(tmp_path, monkeypatch, capsys):
    """Python would keep the lock of the import, or drop the exception. A second Ctrl-C during the
    import interrupts it at once."""
    monkeypatch.syspath_prepend(tmp_path)
    press = "import signal; signal.raise_signal(signal.SIGINT)\n"
    (tmp_path / "pressed_once.py").write_text(press + "value = 1\n")
    (tmp_path / "pressed_twice.py").write_text(press + press + "value = 1\n")

    class Checked(abc.ABC):
        @abc.abstractmethod
        def method(self):
            """An abstract class needs one."""

        @classmethod
        def __subclasshook__(cls, other):
            signal.raise_signal(signal.SIGINT)
            return True

    def work(action):
        action()
        done.append(action)
        time.sleep(10)
        return 0

    def check():
        with suppress(KeyboardInterrupt):  # as a C extension drops exceptions of isinstance
            isinstance(3, Checked)

    alarm = signal.getsignal(signal.SIGALRM)
    for name, action, finished in [
        ("import", partial(importlib.import_module, "pressed_once"), True),
        ("second", partial(importlib.import_module, "pressed_twice"), False),
        ("check", check, True),
    ]:
        with case(name):
            done = []
            began = time.monotonic()
            assert cli.run(partial(work, action)) == 130
            assert len(done) == finished and time.monotonic() - began < 5
            assert capsys.readouterr().err == "error: interrupted\n  fix: run the command again\n"
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            assert signal.getsignal(signal.SIGALRM) is alarm
    assert sys.modules["pressed_once"].value == 1 and "pressed_twice" not in sys.modules
    monkeypatch.delitem(sys.modules, "pressed_once")


def test_ctrl_c_is_ignored_if_the_caller_ignores_it():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert cli.run(lambda: signal.raise_signal(signal.SIGINT) or 0) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_the_core_is_loaded_is_no_missing_core(monkeypatch):
    """pybind11 makes an ImportError of every exception in the initialisation of a module."""

    class Interrupted:
        def find_spec(self, name, path, target=None):
            if name == "runtime._core":
                raise ImportError("initialization failed") from KeyboardInterrupt()

    import runtime

    monkeypatch.delitem(sys.modules, "runtime._core", raising=False)
    monkeypatch.delattr(runtime, "_core", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(KeyboardInterrupt):
        module_of("cpu")


def test_progress_is_a_line_for_each_tenth_or_a_bar(capsys, monkeypatch):
    with cli.Bar() as bar:
        bar.say("first")
        for i in range(101):
            bar.progress("phase", i / 100)
        bar.say("second")
        bar.progress("phase", 1.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "first ..." and lines[12:] == ["second ...", "  100 % phase"]
    assert lines[1:12] == [f"  {10 * i:3d} % phase" for i in range(11)]

    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    with pytest.raises(KeyboardInterrupt), cli.Bar() as bar:
        bar.say("first")
        bar.progress("Optimizing graph", 0.5)
        raise KeyboardInterrupt
    assert "Optimizing graph" in screen.getvalue() and "50%" in screen.getvalue()
    with cli.Bar(quiet=True) as bar:
        bar.say("unheard")
        bar.progress("unheard", 0.5)
    assert "unheard" not in screen.getvalue()


def test_values_of_options():
    assert cli.capabilities("8.6, sm_89,120,8.6") == ("8.6", "8.9", "12.0")
    assert cli.capabilities("") == ()
    assert cli.workspace_bytes("auto") is None and cli.workspace_bytes("2") == 2**31
    assert cli.workspace_bytes("1.5GiB") == 3 * 2**29 and cli.workspace_bytes("64m") == 2**26
    assert cli.gpu_index("cuda:1") == cli.gpu_index("1") == 1
    with pytest.raises(InputError, match="compute-capability is '8'"):
        cli.capabilities("8")
    with pytest.raises(InputError, match="workspace is '-1'"):
        cli.workspace_bytes("-1")
    with pytest.raises(InputError, match="engines are built on a GPU"):
        cli.gpu_index("cpu")


def strict_terminal(encoding, screen):
    """A terminal on which a character that ``encoding`` does not have is an error."""
    terminal = io.TextIOWrapper(screen, encoding=encoding, errors="strict", write_through=True)
    terminal.isatty = lambda: True
    return terminal


def test_printing_never_fails(monkeypatch):
    """Whoever prints, and whatever the terminal's encoding: text, tqdm, logs, warnings, JSON."""
    name = "日本 é caf\udce9"

    def work():
        print(name)
        print(name, file=sys.stderr)
        with tqdm(total=2, desc=name) as bar:
            tqdm.write(name, file=sys.stderr)
            bar.update(1)
        library.warning(name)
        warnings.warn(name, stacklevel=1)
        with cli.Bar() as bar:
            bar.say(name)
            bar.progress(name, 0.5)
        say([name])
        print_json({"name": name})
        raise InputError(name, fix=name)

    library = logging.getLogger("of a library")
    # The report of pytest's workers must be UTF-8, so pytest's own handlers do not get the records.
    monkeypatch.setattr(library, "propagate", False)
    # pytest keeps warnings; Python prints them in this way.
    printed = lambda message, *_, **__: print(message, file=sys.stderr)  # noqa: E731
    monkeypatch.setattr(warnings, "showwarning", printed)
    for encoding, latin in [("ascii", b"\\xe9"), ("latin-1", b"\xe9"), ("utf-8", "é".encode())]:
        with case(encoding):
            out, err = io.BytesIO(), io.BytesIO()
            monkeypatch.setattr(sys, "stdout", strict_terminal(encoding, out))
            monkeypatch.setattr(sys, "stderr", strict_terminal(encoding, err))
            handler = logging.StreamHandler(sys.stderr)
            library.addHandler(handler)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("always")
                    assert cli.run(work) == 1
            finally:
                library.removeHandler(handler)
            assert latin + b" caf\\udce9" in out.getvalue()
            found = err.getvalue()
            assert found.count(latin + b" caf\\udce9") >= 8 and b"error: " in found
            assert b"Traceback" not in found and b"Logging error" not in found
            document = out.getvalue().split(b"\n", 2)[2]
            assert document.isascii() and json.loads(document) == {"name": name}
            with pytest.raises(SystemExit):
                main(["inspect", "x", f"--{name}"])
            with pytest.raises(SystemExit):
                main([name])
            parser = cli.Parser(name, description=name)
            with pytest.raises(SystemExit) as end:
                parser.parse_args(["--help"])
            assert end.value.code == 0 and out.getvalue().count(latin) == 4


def test_closed_streams_are_replaced(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.run(lambda: print("日本") or 0) == 0
    with pytest.raises(SystemExit) as end:
        main(["inspect"])
    assert end.value.code == 2
    sys.stdout.close()
    sys.stderr.close()


def test_errors_of_the_system_are_one_sentence(capsys):
    """And they have the path that the system names."""
    for error, message, fix in [
        (
            PermissionError(13, "Permission denied", "a"),
            "a cannot be used: Permission",
            "check its",
        ),
        (FileNotFoundError(2, "No such file", b"a\xe9"), "a\\udce9 cannot be used: No such", ""),
        (OSError(24, "Too many open files"), "cannot be used: Too many open files", "ulimit -n"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "unavailable", "ulimit -u"),
        (OSError("without a number"), "cannot be used: without a number", ""),
        (OSError(9, "Bad file descriptor", 5), "cannot be used: Bad file", ""),
        (FileNotFoundError(2, "No such file"), "the current folder was removed", "cd to"),
        (MemoryError(), "out of memory", "use a smaller size"),
        (RuntimeError("can't start new thread"), "the system starts no more threads", "ulimit -u"),
        (InputError("no rtsp://me:secret@cam", fix="rtsp://me:secret@cam"), "no rtsp://cam", ""),
    ]:
        with case(message):

            def fail(error=error):
                raise error

            assert cli.run(fail) == 1
            out, err = capsys.readouterr()
            assert out == "" and err.startswith("error: ") and message in err and fix in err
            assert len(err.splitlines()) == 2 and "\n  fix: " in err and "secret" not in err
            assert cli.run(fail, as_json=True) == 1
            out, err = capsys.readouterr()
            found = json.loads(out)
            assert err == "" and message in found["error"] and fix in found["fix"]
            assert "secret" not in out
    for mistake in (RuntimeError("a mistake"), RecursionError(), KeyError("a"), TypeError("a")):
        with pytest.raises(type(mistake)):
            cli.run(lambda mistake=mistake: fail(mistake))


def test_numbers_of_another_script_are_refused():
    for number in ("²", "٨.٦", "8.²"):
        with pytest.raises(InputError, match="compute-capability is"):
            cli.capabilities(number)
        with pytest.raises(InputError, match="workspace is"):
            cli.workspace_bytes(number)


def test_a_progress_bar_starts_no_thread(capsys):
    """tqdm starts its thread with the first bar of the process, which warns where it cannot."""
    tqdm.monitor, before = None, set(threading.enumerate())
    with cli.progress_bar(total=1) as bar:
        bar.update(1)
        assert set(threading.enumerate()) == before
    assert "1/1" in capsys.readouterr().err
