"""Code that all command lines share: the parser, exit codes, values of options, progress bars."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from runtime.device.driver import parse_device
from runtime.errors import DeviceError, ExitCode, InputError, SdkError
from runtime.files import file_error, one_line
from runtime.urls import is_url, without_passwords

T = TypeVar("T")
_lost: dict[str, OSError] = {}  # why stdout or stderr could not be written during the command


class Parser(argparse.ArgumentParser):
    """A parser that suggests the nearest name for a misspelt option and accepts no abbreviation.

    A usage error ends the process with ExitCode.USAGE. With --json among the arguments, the error
    is one JSON document on stdout, else two lines on stderr.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})
        self._arguments: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments; an unknown one is a usage error.

        argparse calls this method for each subcommand too, so the message can suggest an option of
        that subcommand.
        """
        open_streams()
        self._arguments = list(sys.argv[1:] if args is None else args)
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            word = next((w for w in unknown if w.startswith("-")), unknown[0]).partition("=")[0]
            known = self._option_string_actions
            self._refuse(f"{self.prog} does not know '{one_line(word)}'", word, known)
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Print a usage error with a fix, and end the process with ExitCode.USAGE."""
        found = re.search(r"invalid choice: '?(.*?)'? \(choose from (.*?)\)", message)
        word, known = found.groups() if found else ("", "")
        self._refuse(message, word, re.findall(r"[^\s',]+", known))

    def _refuse(self, message: str, word: str, known: Any) -> NoReturn:
        near = difflib.get_close_matches(word, list(known), 1)
        fix = f"did you mean {near[0]}?" if near else f"see: {self.prog} --help"
        for name in self._arguments:
            if name.startswith("-") and os.path.lexists(name):
                fix = f"write ./{one_line(name)} for the file of this name"
        print_error(SdkError(message, fix=fix), "--json" in self._arguments)
        self.exit(ExitCode.USAGE)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End the process. The exit code is FAILURE if stdout cannot be written."""
        if message:
            print(message, file=sys.stderr)
        sys.exit(run(lambda: status))


def run(work: Callable[[], int], *, as_json: bool = False) -> int:
    """Run a command and print its error.

    Parameters
    ----------
    work : the command; returns its exit code.
    as_json : print an error as {"error", "fix"} on stdout instead of as text on stderr.

    Returns
    -------
    What ``work`` returns; the exit code of the error that :func:`problem_of` makes; INTERRUPTED
    after a KeyboardInterrupt; FAILURE if stdout or stderr cannot be written, for example because
    nobody reads it any more.
    """
    _lost.clear()
    try:
        open_streams()
        try:
            with _no_lost_interrupt():
                code = work()
        except KeyboardInterrupt:
            print_error(SdkError("interrupted", fix="run the command again"), as_json)
            code = ExitCode.INTERRUPTED
        except BrokenPipeError:
            raise
        except (SdkError, OSError, MemoryError, RuntimeError) as error:
            sys.stdout.flush()  # raises an OSError again if it is of this stream
            sys.stderr.flush()
            problem = problem_of(error)
            print_error(problem, as_json)
            code = problem.exit_code
        sys.stdout.flush()
        if _lost:
            raise next(iter(_lost.values()))
        return code
    except OSError as error:
        broken = [
            name
            for name in ("stdout", "stderr")
            if name in _lost or not _writes(getattr(sys, name))
        ]
        if not isinstance(error, BrokenPipeError):  # the reader has ended, as head does
            with suppress(OSError):
                print_error(file_error("written", " and ".join(broken) or "stdout", error))
            _writes(sys.stderr)
        return ExitCode.FAILURE


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a signal as Ctrl-C: raise KeyboardInterrupt, if Python can pass it on.

    Inside an import the exception can leave a lock that is never released, so that the next import
    waits for ever; inside a check of an abstract class it is dropped. There the signal is handled
    0.05 s later. A second Ctrl-C during this time raises KeyboardInterrupt at once.

    Parameters
    ----------
    number, frame : as the module signal passes them to a handler.

    Raises
    ------
    KeyboardInterrupt : unless it is raised later.

    Example
    -------
    >>> signal.signal(signal.SIGTERM, interrupt)
    """
    if not _is_waiting() and _loses_exceptions(frame):
        _interrupt_later()
    else:
        raise KeyboardInterrupt


def _loses_exceptions(frame: FrameType | None) -> bool:
    """Whether a frame, or one that has called it, is of Python's import or of abstract classes."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(("<frozen importlib", "<frozen abc")):
            return True
        frame = frame.f_back
    return False


def _interrupt_later() -> None:
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)


def _is_waiting() -> bool:
    """Whether a KeyboardInterrupt will be raised later."""
    left, _ = signal.getitimer(signal.ITIMER_REAL)
    return signal.getsignal(signal.SIGALRM) is interrupt and left > 0


@contextmanager
def _no_lost_interrupt() -> Iterator[None]:
    """A block in which Ctrl-C calls :func:`interrupt`, and is repeated if Python has lost it.

    Python drops an exception that is raised inside ``__del__`` or the callback of a weak reference.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return
    hook, handler = sys.unraisablehook, signal.getsignal(signal.SIGINT)
    alarm = signal.getsignal(signal.SIGALRM)

    def repeat(lost: sys.UnraisableHookArgs) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            return hook(lost)
        _interrupt_later()

    sys.unraisablehook = repeat
    if handler is signal.default_int_handler:  # nobody has set another one, such as SIG_IGN
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, handler)
        if signal.getsignal(signal.SIGALRM) is interrupt:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)


def open_streams() -> None:
    """Make stdout and stderr able to print every character: one that the terminal's encoding does
    not have is printed as its number. A stream that the caller closed, as ``>&-`` does in a shell,
    is replaced by os.devnull."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def printing(name: str = "stderr") -> Iterator[None]:
    """Let a command continue if a message cannot be printed, for example on a full disk.

    The stream is connected to os.devnull, and :func:`run` returns FAILURE at the end. A pipe of
    stdout that nobody reads any more ends the command.

    Parameters
    ----------
    name : the stream that the with block prints to, "stdout" or "stderr".

    Example
    -------
    >>> with printing(): print("warning: the picture is empty", file=sys.stderr)
    """
    try:
        yield
        getattr(sys, name).flush()
    except OSError as error:
        if name == "stdout" and isinstance(error, BrokenPipeError):
            raise
        _lost[name] = error
        _discard(getattr(sys, name))


def _writes(stream: Any) -> bool:
    """Whether a stream can be flushed. If not, it is connected to os.devnull, because Python
    flushes it again at the end of the process."""
    try:
        stream.flush()
    except OSError:
        _discard(stream)
        return False
    return True


def _discard(stream: Any) -> None:
    """Connect a stream to os.devnull."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def problem_of(error: Exception, name: str | None = None) -> SdkError:
    """Return the SdkError for an exception that the operating system or a lack of memory causes.

    Parameters
    ----------
    error : an SdkError, which is returned as it is, an OSError, a MemoryError or a RuntimeError.
    name : the file that is processed, for an error that names none.

    Raises
    ------
    RuntimeError : ``error`` itself, if it is a mistake in the program.
    """
    if isinstance(error, SdkError):
        return error
    start = "" if name is None else f"{one_line(name)}: "
    if isinstance(error, MemoryError):
        fix = "close other programs, or use a smaller size"
        return DeviceError(f"{start}out of memory", fix=fix)
    if isinstance(error, OSError):
        path = error.filename if isinstance(error.filename, (str, bytes)) else name
        if path is None and isinstance(error, FileNotFoundError):  # os.getcwd raises it
            return InputError("the current folder was removed", fix="cd to another folder")
        return file_error("used", os.fsdecode(path or "stdout or a resource of the system"), error)
    if str(error) == "can't start new thread":
        fix = "end other programs, or raise the limit: ulimit -u"
        return DeviceError(f"{start}the system starts no more threads", fix=fix)
    raise error


def end(error: SdkError) -> NoReturn:
    """Print an error that an import raised, and end the process with the error's exit code."""
    sys.exit(run(lambda: _raise(error)))


def _raise(error: SdkError) -> NoReturn:
    raise error


def print_error(error: SdkError, as_json: bool = False) -> None:
    """Print an error without the passwords of URLs: as text on stderr, or as {"error", "fix"} on
    stdout."""
    if as_json:
        texts = {"error": error.message, "fix": error.fix}
        print(json.dumps({key: without_passwords(text) for key, text in texts.items()}))
    else:
        with printing():
            print(f"error: {without_passwords(str(error))}", file=sys.stderr)


def progress_bar(**options: Any) -> Any:
    """Return a tqdm bar. tqdm starts no thread that watches the bar.

    Parameters
    ----------
    options : the arguments of tqdm.
    """
    from tqdm import tqdm

    tqdm.monitor_interval = 0
    return tqdm(**options)


class Bar:
    """Progress on stderr: one line for each stage, and how much of the stage is done.

    On a terminal the fraction is drawn as a bar, otherwise a line is printed for every 10 %. Use it
    in a with statement: the end of the block removes the bar, also after an exception.

    Parameters
    ----------
    quiet : print nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet, self.shown = quiet, -1
        self.bar: Any = None

    def say(self, line: str) -> None:
        """Print the name of a new stage."""
        self._finish()
        if not self.quiet:
            with printing():
                print(f"{line} ...", file=sys.stderr)

    def progress(self, phase: str, fraction: float) -> None:
        """Show how much of the stage is done.

        Parameters
        ----------
        phase : the name of the part that runs now.
        fraction : the part of the stage that is done, in [0, 1].
        """
        if self.quiet:
            return
        if not sys.stderr.isatty():
            tenth = int(10 * fraction)
            if tenth > self.shown:
                with printing():
                    print(f"  {10 * tenth:3d} % {phase}", file=sys.stderr)
                self.shown = tenth
            return
        if self.bar is None:
            form = "  {l_bar}{bar}| {elapsed}"
            self.bar = progress_bar(total=100, bar_format=form, leave=False, mininterval=0)
        self.bar.set_description_str(phase[:40], refresh=False)
        self.bar.update(100 * fraction - self.bar.n)

    def _finish(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar, self.shown = None, -1

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()


def option(read: Callable[[str], T]) -> Callable[[str], T]:
    """Make argparse's ``type`` from a function that reads a text. The function's InputError becomes
    a usage error, whose fix is that of usage errors."""

    def typed(text: str) -> T:
        try:
            return read(text)
        except InputError as error:
            raise argparse.ArgumentTypeError(error.message) from None

    return typed


def some_path(text: str) -> Path:
    """Return a path; "" is refused because it would name the current folder.

    Raises
    ------
    argparse.ArgumentTypeError : ``text`` is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("it is empty; wanted a path")
    return Path(text)


def out_path(text: str) -> Path:
    """Return the path of an output.

    Raises
    ------
    argparse.ArgumentTypeError : ``text`` is empty, or a URL.
    """
    if is_url(text):
        raise argparse.ArgumentTypeError("it is a URL; wanted a path: outputs are files")
    return some_path(text)


class Paths(argparse.Action):
    """Collects the paths of an option with ``nargs="+"`` as a tuple of absolute texts.

    Commas separate paths too, unless the whole word is an existing path. An option that is repeated
    adds its paths to those before.

    Example
    -------
    >>> parser.add_argument("--data", nargs="+", action=Paths)
    >>> parser.parse_args(["--data", "a,b", "c"]).data
    ('/home/user/a', '/home/user/b', '/home/user/c')
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Store the paths. An empty one is a usage error."""
        parts = [p for w in values for p in ([w] if os.path.lexists(w) else w.split(","))]
        if not all(parts):
            parser.error(f"argument {option_string}: a path is empty; wanted paths")
        before = getattr(namespace, self.dest)
        named = () if before is self.default else before  # a default is replaced
        setattr(namespace, self.dest, (*named, *map(os.path.abspath, parts)))


def capabilities(text: str) -> tuple[str, ...]:
    """Read a list of compute capabilities: ("8.6", "12.0") from "8.6,12.0" or "86,sm_120".

    Raises
    ------
    InputError : a word of the list is not a compute capability.
    """
    out = []
    for word in filter(None, text.replace(" ", "").lower().split(",")):
        found = re.fullmatch(r"(?:sm_?)?([0-9]{1,2})[.]?([0-9])", word)
        if found is None:
            raise InputError(
                f"compute-capability is {word!r}; wanted a list such as 8.6,8.9,12.0",
                fix="nvidia-smi --query-gpu=compute_cap --format=csv prints a GPU's",
            )
        out.append(f"{found[1]}.{found[2]}")
    return tuple(dict.fromkeys(out))


def workspace_bytes(text: str) -> int | None:
    """Read a memory size as bytes: "2", "1.5" and "2G" are GiB, "2048M" is MiB; None for "auto".

    Raises
    ------
    InputError : ``text`` is something else, or the size is not from 1 MiB to 32 TiB.
    """
    if text.lower() == "auto":
        return None
    found = re.fullmatch(r"([0-9]{1,9}(?:[.][0-9]+)?)(g|gib|gb|m|mib|mb)?", text.lower())
    size = 0
    if found is not None:
        size = int(float(found[1]) * (2**20 if (found[2] or "g").startswith("m") else 2**30))
    if not 2**20 <= size <= 2**45:
        raise InputError(
            f"workspace is {text!r}; wanted GiB (2), MiB (2048M) or auto", fix="--workspace auto"
        )
    return size


def gpu_index(text: str) -> int:
    """Read the number of a GPU: 1 from "cuda:1" or "1".

    Raises
    ------
    InputError : ``text`` is "cpu", or is not the name of a device.
    """
    kind, index = parse_device(text)
    if kind != "cuda":
        raise InputError(
            f"device is {text!r}; engines are built on a GPU",
            fix="--device 0, or leave --device out",
        )
    return index
