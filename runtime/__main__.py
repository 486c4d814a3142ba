"""python -m runtime: doctor | inspect BUNDLE | check BUNDLE | build BUNDLE."""

from __future__ import annotations

import argparse
import sys

from runtime.tools.build import run_build
from runtime.tools.check import run_check
from runtime.tools.cli import Parser, run, some_path
from runtime.tools.inspect import run_inspect
from runtime.tools.output import print_json, say


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its :class:`runtime.errors.ExitCode`."""
    args = _parser().parse_args(argv)
    return run(lambda: int(args.run(args)), as_json=args.json)


def _parser() -> Parser:
    parser = Parser("python -m runtime", description="What this machine and a bundle can do.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    doctor = commands.add_parser("doctor", help="what is installed here, and what is wrong with it")
    inspect = commands.add_parser("inspect", help="what is in a bundle; needs no TensorRT")
    check = commands.add_parser("check", help="whether a bundle gives its golden answers here")
    build = commands.add_parser("build", help="build the engines that a bundle lacks here")
    for command, work in (
        (doctor, _run_doctor),
        (inspect, run_inspect),
        (check, run_check),
        (build, run_build),
    ):
        command.set_defaults(run=work)
        command.add_argument("--json", action="store_true", help="one JSON document on stdout")
        if command is not doctor:
            command.add_argument("bundle", metavar="BUNDLE", type=some_path, help="its folder")
    check.add_argument("--device", default="cpu", help="where graphs run: cpu, cuda, cuda:1")
    check.add_argument("--engines", action="store_true", help="fail unless every engine runs here")
    build.add_argument("--target", choices=["trt", "rtx"], help="the bundle's own by default")
    build.add_argument("--device", default="0", help="GPU to build on: 0, cuda:0")
    build.add_argument("--compute-capability", metavar="LIST", help="for rtx: 8.6,8.9,12.0")
    build.add_argument("--workspace", help="GiB (2), MiB (2048M) or auto; the bundle's own")
    build.add_argument(
        "--timing-cache", type=some_path, metavar="FILE", help="read and written (trt)"
    )
    build.add_argument("--force", action="store_true", help="also what is up to date")
    build.add_argument("--dry-run", action="store_true", help="only say what would be built")
    return parser


def _run_doctor(args: argparse.Namespace) -> int:
    from runtime.tools.doctor import render, report

    found = report()
    if args.json:
        print_json(found)
    else:
        say(render(found).splitlines())
    return int(any(problem["kind"] == "broken" for problem in found["problems"]))


if __name__ == "__main__":
    sys.exit(main())
