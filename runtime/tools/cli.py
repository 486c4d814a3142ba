"""What the command lines share: a parser that suggests, exit codes, values, progress."""

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
    """Takes options by their whole names, and names the nearest one for a wrong one.

    A usage error ends the process with ExitCode.USAGE; where the arguments have --json, it is one
    JSON document on stdout, too.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})
        self._given: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Nothing may be left over: subcommands come here, too, and know their own options."""
        self._given = list(sys.argv[1:] if args is None else args)
        parsed, left = super().parse_known_args(args, namespace)
        if left:
            word = next((w for w in left if w.startswith("-")), left[0]).partition("=")[0]
            self._refuse(f"{self.prog} does not know {word!r}", word, self._option_string_actions)
        return parsed, left

    def error(self, message: str) -> NoReturn:
        """End with ExitCode.USAGE, and print a fix."""
        found = re.search(r"invalid choice: '?(.*?)'? \(choose from (.*?)\)", message)
        word, known = found.groups() if found else ("", "")
        self._refuse(message, word, re.findall(r"[^\s',]+", known))

    def _refuse(self, what: str, word: str, known: Any) -> NoReturn:
        near = difflib.get_close_matches(word, list(known), 1)
        fix = f"did you mean {near[0]}?" if near else f"see: {self.prog} --help"
        _tell(what, fix, "--json" in self._given)
        self.exit(ExitCode.USAGE)


def run(work: Callable[[], int], *, as_json: bool = False) -> int:
    """The :class:`ExitCode` of ``work``; an error that it raises on purpose is printed and becomes
    its exit code. Errors go to stderr; ``as_json``: to stdout, as {"error", "fix"}.
    """
    if sys.stdout is None or sys.stderr is None:  # closed by the caller, as >&- does
        sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))
    try:
        try:
            code = work()
        except SdkError as error:
            _tell(error.message, error.fix, as_json)
            code = error.exit_code
        except MemoryError:
            _tell("out of memory", "close other programs, or use a smaller size", as_json)
            code = ExitCode.FAILURE
        except KeyboardInterrupt:
            _tell("interrupted", "run it again", as_json)
            code = ExitCode.INTERRUPTED
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of stdout has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILURE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("error: the disk is full\n  fix: free some space", file=sys.stderr)
        return ExitCode.FAILURE


def _tell(what: str, fix: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": what, "fix": fix}))
        return
    print(f"error: {what}" + (f"\n  fix: {fix}" if fix else ""), file=sys.stderr)


class Bar:
    """Progress on stderr: a line for each stage, and for its fraction a bar on a terminal, else a
    line for each 10 %. A context manager, so that an error leaves no half bar."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet, self.shown = quiet, -1
        self.bar: Any = None

    def say(self, line: str) -> None:
        """A new stage."""
        self._finish()
        if not self.quiet:
            print(f"{line} ...", file=sys.stderr)

    def progress(self, phase: str, fraction: float) -> None:
        """``fraction`` of the stage, in [0, 1], is done; ``phase`` says what comes now."""
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
    """``read`` as a type of argparse's: a word that it refuses is a usage error."""

    def typed(text: str) -> T:
        try:
            return read(text)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


def some_path(text: str) -> Path:
    """A path that is not "", which would be the current folder.

    Raises
    ------
    argparse.ArgumentTypeError : it is.
    """
    if not text:
        raise argparse.ArgumentTypeError("it is empty; wanted a path")
    return Path(text)


def capabilities(text: str) -> tuple[str, ...]:
    """("8.6", "12.0") of "8.6,12.0" or "86,sm_120".

    Raises
    ------
    InputError : a word that is none.
    """
    out = []
    for word in filter(None, text.replace(" ", "").lower().split(",")):
        found = re.fullmatch(r"(?:sm_?)?(\d{1,2})[.]?(\d)", word)
        if found is None:
            raise InputError(f"compute-capability is {word!r}; wanted a list such as 8.6,8.9,12.0")
        out.append(f"{found[1]}.{found[2]}")
    return tuple(dict.fromkeys(out))


def workspace_bytes(text: str) -> int | None:
    """Bytes of "2", "1.5", "2G", "2048M"; None for auto.

    Raises
    ------
    InputError : something else, or less than 1 MiB.
    """
    if text.lower() == "auto":
        return None
    found = re.fullmatch(r"(\d{1,9}(?:[.]\d+)?)(g|gib|gb|m|mib|mb)?", text.lower())
    size = 0
    if found is not None:
        size = int(float(found[1]) * (2**20 if (found[2] or "g").startswith("m") else 2**30))
    if not 2**20 <= size <= 2**45:
        raise InputError(f"workspace is {text!r}; wanted GiB (2), MiB (2048M) or auto")
    return size


def gpu_index(text: str) -> int:
    """1 of "cuda:1" or "1".

    Raises
    ------
    InputError : the CPU, or no device.
    """
    kind, index = parse_device(text)
    if kind != "cuda":
        raise InputError(
            f"device is {text!r}; engines are built on a GPU", fix="--device 0, or leave it out"
        )
    return index
