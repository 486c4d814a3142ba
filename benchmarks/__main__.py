"""python -m benchmarks latency | compare | report | quality | ops | step | photo | stream | gpu"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

from runtime.tools import cli

COMMANDS = {  # the module whose main() runs each
    "latency": "benchmarks.latency.run",
    "compare": "benchmarks.latency.compare",
    "report": "benchmarks.latency.page",
    "quality": "benchmarks.quality.run",
    "ops": "benchmarks.speed.ops",
    "step": "benchmarks.speed.step",
    "photo": "benchmarks.speed.photo",
    "stream": "benchmarks.quality.stream",
    "gpu": "benchmarks.speed.gpu.run",
}


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        asked = argv and argv[0] in ("-h", "--help")
        print(f"usage: python -m benchmarks {{{','.join(COMMANDS)}}} [--help]",
              file=sys.stdout if asked else sys.stderr)  # fmt: skip
        return 0 if asked else 2
    return cli.run(lambda: _command(argv[0])(argv[1:]))


def _command(name: str) -> Callable[[list[str]], int]:
    return importlib.import_module(COMMANDS[name]).main


if __name__ == "__main__":
    sys.exit(main())
