"""python -m benchmarks COMMAND, one of COMMANDS below; each has --help."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable

from runtime.errors import ExitCode
from runtime.files import shown
from runtime.tools import cli

COMMANDS = (
    "latency", "compare", "report", "quality", "training", "boosting", "adapt", "backbone", "cache",
    "ops", "step", "photo", "stream", "protocol", "published", "dynaseg_fpn", "diffseg", "gpu",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return cli.run(lambda: _run(words))


def _run(argv: list[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        asked = argv and argv[0] in ("-h", "--help")
        usage = f"usage: python -m benchmarks {{{','.join(COMMANDS)}}} [--help]"
        if asked:
            print(usage)
            return ExitCode.DONE
        what = f"there is no benchmark '{shown(argv[0])}'" if argv else "no benchmark is named"
        near = difflib.get_close_matches(argv[0], COMMANDS, 1) if argv else []
        fix = f"did you mean {near[0]}?" if near else "see: python -m benchmarks --help"
        print(f"{usage}\nerror: {what}\n  fix: {fix}", file=sys.stderr)
        return ExitCode.USAGE
    return _command(argv[0])(argv[1:])


def _command(name: str) -> Callable[[list[str]], int]:
    if name == "latency":
        from benchmarks.latency.run import main
    elif name == "compare":
        from benchmarks.latency.compare import main
    elif name == "report":
        from benchmarks.latency.page import main
    elif name == "quality":
        from benchmarks.quality.run import main
    elif name == "training":
        from benchmarks.quality.training import main
    elif name == "boosting":
        from benchmarks.quality.boosting import main
    elif name == "adapt":
        from benchmarks.quality.adapt import main
    elif name == "ops":
        from benchmarks.speed.ops import main
    elif name == "photo":
        from benchmarks.speed.photo import main
    elif name == "stream":
        from benchmarks.quality.stream import main
    elif name == "protocol":
        from benchmarks.quality.protocols import main
    elif name == "published":
        from benchmarks.quality.published import main
    elif name == "backbone":
        from benchmarks.quality.backbone import main
    elif name == "dynaseg_fpn":
        from benchmarks.quality.dynaseg_fpn import main
    elif name == "cache":
        from benchmarks.speed.feature_cache import main
    elif name == "diffseg":
        from benchmarks.speed.diffseg import main
    elif name == "gpu":
        from benchmarks.speed.gpu.run import main
    else:
        from benchmarks.speed.step import main
    return main


if __name__ == "__main__":
    sys.exit(main())
