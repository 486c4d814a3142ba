"""python -m benchmarks latency | compare | report | quality | ops | step | photo | stream | gpu"""

from __future__ import annotations

import sys

from runtime.errors import SdkError

COMMANDS = ("latency", "compare", "report", "quality", "ops", "step", "photo", "stream", "gpu")


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        asked = argv and argv[0] in ("-h", "--help")
        print(f"usage: python -m benchmarks {{{','.join(COMMANDS)}}} [--help]",
              file=sys.stdout if asked else sys.stderr)  # fmt: skip
        return 0 if asked else 2
    try:
        if argv[0] == "latency":
            from benchmarks.latency import main as run
        elif argv[0] == "compare":
            from benchmarks.compare import main as run
        elif argv[0] == "report":
            from benchmarks.page import main as run
        elif argv[0] == "quality":
            from benchmarks.quality import main as run
        elif argv[0] == "ops":
            from benchmarks.ops import main as run
        elif argv[0] == "photo":
            from benchmarks.photo import main as run
        elif argv[0] == "stream":
            from benchmarks.stream import main as run
        elif argv[0] == "gpu":
            from benchmarks.gpu import main as run
        else:
            from benchmarks.step import main as run
        return run(argv[1:])
    except SdkError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
