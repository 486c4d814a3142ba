"""Code that all command lines share: the parser, exit codes, values of options, progress bars."""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from runtime.device.driver import parse_device
from runtime.errors import ExitCode, InputError, SdkError

T = TypeVar("T")


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
        self._arguments = list(sys.argv[1:] if args is None else args)
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            word = next((w for w in unknown if w.startswith("-")), unknown[0]).partition("=")[0]
            self._refuse(f"{self.prog} does not know {word!r}", word, self._option_string_actions)
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Print a usage error with a fix, and end the process with ExitCode.USAGE."""
        found = re.search(r"invalid choice: '?(.*?)'? \(choose from (.*?)\)", message)
        word, known = found.groups() if found else ("", "")
        self._refuse(message, word, re.findall(r"[^\s',]+", known))

    def _refuse(self, message: str, word: str, known: Any) -> NoReturn:
        near = difflib.get_close_matches(word, list(known), 1)
        fix = f"did you mean {near[0]}?" if near else f"see: {self.prog} --help"
        _print_error(SdkError(message, fix=fix), "--json" in self._arguments)
        self.exit(ExitCode.USAGE)


def run(work: Callable[[], int], *, as_json: bool = False) -> int:
    """Run a command and print its error.

    Parameters
    ----------
    work : the command; returns its exit code.
    as_json : print an error as {"error", "fix"} on stdout instead of as text on stderr.

    Returns
    -------
    What ``work`` returns; the exit code of its SdkError; INTERRUPTED after a KeyboardInterrupt;
    FAILURE after a MemoryError, with a full disk, or if nobody reads stdout any more.

    Raises
    ------
    OSError : ``work`` raised it, and the disk is not full.
    """
    if sys.stdout is None or sys.stderr is None:  # The caller closed it, as >&- does in a shell.
        sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))
    try:
        try:
            code = work()
        except SdkError as error:
            _print_error(error, as_json)
            code = error.exit_code
        except MemoryError:
            fix = "close other programs, or use a smaller size"
            _print_error(SdkError("out of memory", fix=fix), as_json)
            code = ExitCode.FAILURE
        except KeyboardInterrupt:
            _print_error(SdkError("interrupted", fix="run the command again"), as_json)
            code = ExitCode.INTERRUPTED
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # The reader of stdout ended, as head does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILURE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _print_error(SdkError("the disk is full", fix="free some space"), as_json=False)
        return ExitCode.FAILURE


def end(error: SdkError) -> NoReturn:
    """Print an error that an import raised, and end the process with the error's exit code."""
    sys.exit(run(lambda: _raise(error)))


def _raise(error: SdkError) -> NoReturn:
    raise error


def _print_error(error: SdkError, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": error.message, "fix": error.fix}))
    else:
        print(f"error: {error}", file=sys.stderr)


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
                print(f"  {10 * tenth:3d} % {phase}", file=sys.stderr)
                self.shown = tenth
            return
        if self.bar is None:
            from tqdm import tqdm

            form = "  {l_bar}{bar}| {elapsed}"
            self.bar = tqdm(total=100, bar_format=form, leave=False, mininterval=0)
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
    a usage error."""

    def typed(text: str) -> T:
        try:
            return read(text)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

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


def capabilities(text: str) -> tuple[str, ...]:
    """Read a list of compute capabilities: ("8.6", "12.0") from "8.6,12.0" or "86,sm_120".

    Raises
    ------
    InputError : a word of the list is not a compute capability.
    """
    out = []
    for word in filter(None, text.replace(" ", "").lower().split(",")):
        found = re.fullmatch(r"(?:sm_?)?(\d{1,2})[.]?(\d)", word)
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
    found = re.fullmatch(r"(\d{1,9}(?:[.]\d+)?)(g|gib|gb|m|mib|mb)?", text.lower())
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
