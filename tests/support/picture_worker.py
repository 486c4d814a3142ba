"""Load pictures in another process, because a damaged file may end the process that decodes it."""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60  # until a worker counts as hanging
PIXELS = 2**22  # a header that states more is not decoded, to save time


class Worker:
    """A process that loads one picture after another; a new one starts after a crash."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def load(self, data: bytes) -> dict:
        """The answer of the process: {"shape"}, {"refused"}, {"raised"} or {"crashed"}."""
        if self.process is None:
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        process = self.process
        try:
            process.stdin.write(len(data).to_bytes(8, "little") + data)
            process.stdin.flush()
            if not select.select([process.stdout], [], [], SECONDS)[0]:
                process.kill()
                return {"crashed": f"no answer in {SECONDS} s"}
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            self.process = None
            return {"crashed": f"exit code {process.wait()}"}
        return json.loads(line)

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()
            self.process = None


def answer(data: bytes) -> dict:
    """Load a picture in this process."""
    from runtime.errors import InputError
    from runtime.pictures.header import read_header
    from runtime.pictures.load import load_image

    try:
        header = read_header(data, "x")
        if header.height * header.width > PIXELS:
            return {"refused": "large"}
        picture, notes = load_image(data)
    except InputError as error:
        return {"refused": str(error)}
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}
    form = picture.dtype == "uint8" and picture.ndim == 3 and picture.flags.c_contiguous
    if not form or not all(isinstance(note, str) for note in notes):
        return {"raised": f"{picture.dtype} {picture.shape} {notes}"}
    return {"shape": picture.shape, "header": [header.height, header.width]}


def _serve() -> None:
    """Answer on stdout, one line of JSON for each picture, until stdin ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    while size := sys.stdin.buffer.read(8):
        data = sys.stdin.buffer.read(int.from_bytes(size, "little"))
        out.write(json.dumps(answer(data)).encode() + b"\n")
        out.flush()


if __name__ == "__main__":
    _serve()
