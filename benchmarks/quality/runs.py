"""What the commands that train and score share: processes, files of results, options and cells."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.harness import last_error
from benchmarks.table import check_out, write_json
from runtime.errors import InputError, SdkError
from runtime.files import file_error, shown, stat_of
from runtime.tools.cli import out_path, printing, some_path

Document = dict[str, Any]


def _same(document: Document) -> Document:
    return document


@dataclass(frozen=True)
class Results:
    """The file of a command's results.

    Parameters
    ----------
    tables : returns the tables of a document in Markdown.
    compared : the key of what must be equal in a file that results are added to.
    pack, unpack : from a document to what is written, and the reverse.
    """

    tables: Callable[[Document], str]
    compared: str = "settings"
    pack: Callable[[Document], Document] = _same
    unpack: Callable[[Document], Document] = _same

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the options -o and --table."""
        parser.add_argument(
            "-o", "--out", type=out_path, metavar="FILE", help="JSON file of results"
        )
        parser.add_argument(
            "--table", type=some_path, metavar="FILE",
            help="print the tables of a JSON file, and end",
        )  # fmt: skip

    def read(self, path: Path) -> Document:
        """A document that the command has written.

        Raises
        ------
        InputError : the file cannot be read, or has another form.
        """
        try:
            document = self.unpack(json.loads(path.read_text(encoding="utf-8")))
            self.tables(document)
        except OSError as error:
            raise file_error("read", path, error) from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(
                f"{shown(path)} is no result of this command: {error!r}", fix="measure again"
            ) from error
        return document

    def start(self, out: Path | None, new: Document) -> Document:
        """The document of the file ``out`` if it exists, else ``new``.

        Raises
        ------
        InputError : the file cannot be written, or has results of other settings.
        """
        check_out(out)
        if out is None or stat_of(out) is None:
            return new
        known, key = self.read(out), self.compared
        if known[key] != new[key]:
            raise InputError(
                f"{shown(out)} has results of other {key}: {known[key]}",
                fix="choose another -o, or remove the file",
            )
        return known

    def collect(self, out: Path | None, document: Document, added: Iterable[str]) -> None:
        """Write the file each time that ``added`` names a part which it has added to the document,
        and print the tables at the end."""
        start = time.monotonic()
        for text in added:
            if out:
                write_json(out, self.pack(document))
            with printing():
                print(f"{time.monotonic() - start:5.0f} s  {text}", file=sys.stderr)
        print(self.tables(document))


def run_module(what: str, *words: Any, quiet: bool = True) -> int:
    """Run python -m with these words in a process of its own, which ends with this one's exception.

    Parameters
    ----------
    what : names the process in the error.
    quiet : False lets the process write its progress to stderr.

    Returns
    -------
    Its peak memory in MiB.

    Raises
    ------
    SdkError : the process has failed.
    """
    text = [sys.executable, "-m", *map(str, words)]
    root, null, peak = Path(__file__).parents[2], subprocess.DEVNULL, 0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(text, cwd=root, stdout=null, stderr=log if quiet else None)
        try:
            while process.poll() is None:
                peak = peak_mib(process.pid) or peak
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.05)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        said = f": {last_error(log.read().decode('utf-8', 'replace'))}"
    if process.returncode:
        raise SdkError(
            f"{what} ended with {process.returncode}{said if quiet else '; its error is above'}",
            fix=f"{'free memory' if quiet else 'read it'}, and run the command again",
        )
    return peak


def peak_mib(process: int) -> int:
    """The peak memory of a process that runs, in MiB; 0 if it has ended. The operating system's
    sum at its end (ru_maxrss) would contain the memory of this process, which started it."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s*(\d+) kB", text)
    return round(int(found[1]) / 1024) if found else 0


def spread(values: list[float], digits: int = 3) -> str:
    """The mean of values, and the lowest and the highest if they differ; "" without values.

    Example
    -------
    >>> spread([0.25, 0.75])
    '0.500 [0.250, 0.750]'
    """
    if not values:
        return ""
    mean, low, high = (f"{v:.{digits}f}" for v in (np.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} [{low}, {high}]"


def seed_list(text: str) -> list[int]:
    """Different whole numbers with commas between them.

    Raises
    ------
    InputError : another text.
    """
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() for word in words) or len({*words}) < len(words):
        raise InputError(f"{text!r} is no list of different seeds", fix="--seeds 0,1,2")
    return [int(word) for word in words]


def name_list(what: str, known: list[str], text: str) -> list[str]:
    """Names of ``known`` with commas between them, as the option ``--what`` has them.

    Raises
    ------
    InputError : another text.
    """
    found = text.split(",")
    if unknown := [name for name in found if name not in known]:
        raise InputError(
            f"{what} has {', '.join(map(repr, unknown))}; wanted some of {', '.join(known)}",
            fix=f"--{what} '{known[0]}'",
        )
    return found
