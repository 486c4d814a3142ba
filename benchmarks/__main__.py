"""python -m benchmarks latency | compare | report | quality | ops | step | photo | stream | gpu"""

from __future__ import annotations

import sys
from collections.abc import Callable

from runtime.tools import cli

COMMANDS = ("latency", "compare", "report", "quality", "ops", "step", "photo", "stream", "gpu")


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
    if name == "latency":
        from benchmarks.latency.run import main
    elif name == "compare":
        from benchmarks.latency.compare import main
    elif name == "report":
        from benchmarks.latency.page import main
    elif name == "quality":
        from benchmarks.quality.run import main
    elif name == "ops":
        from benchmarks.speed.ops import main
    elif name == "photo":
        from benchmarks.speed.photo import main
    elif name == "stream":
        from benchmarks.quality.stream import main
    elif name == "gpu":
        from benchmarks.speed.gpu.run import main
    else:
        from benchmarks.speed.step import main
    return main


if __name__ == "__main__":
    sys.exit(main())
