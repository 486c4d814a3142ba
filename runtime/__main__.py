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
    parser = Parser(
        "python -m runtime", description="Inspect this machine and a bundle, and build engines."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    doctor = commands.add_parser("doctor", help="show what is installed, and its problems")
    inspect = commands.add_parser("inspect", help="show a bundle's content; needs no TensorRT")
    check = commands.add_parser("check", help="compare a bundle's outputs with its golden vectors")
    build = commands.add_parser("build", help="build the engines that a bundle lacks")
    for command, function in (
        (doctor, _run_doctor),
        (inspect, run_inspect),
        (check, run_check),
        (build, run_build),
    ):
        command.set_defaults(run=function)
        command.add_argument("--json", action="store_true", help="print one JSON document")
        if command is not doctor:
            command.add_argument("bundle", metavar="BUNDLE", type=some_path, help="bundle folder")
    check.add_argument(
        "--device", default="cpu", help="where ONNX graphs run: cpu, cuda, cuda:1 (%(default)s)"
    )
    check.add_argument(
        "--engines", action="store_true", help="fail unless every engine runs on this machine"
    )
    build.add_argument(
        "--target",
        choices=["trt", "rtx"],
        help="build for this target only (all targets of the bundle)",
    )
    build.add_argument("--device", default="0", help="build on this GPU: 0, cuda:0 (%(default)s)")
    build.add_argument(
        "--compute-capability",
        metavar="LIST",
        help="build rtx engines for these values: 8.6,8.9,12.0",
    )
    build.add_argument(
        "--workspace",
        help="most scratch memory of a layer: 2 for 2 GiB, 2048M, or auto (as at the export)",
    )
    build.add_argument(
        "--timing-cache",
        type=some_path,
        metavar="FILE",
        help="read and write TensorRT's timing cache (trt only)",
    )
    build.add_argument(
        "--force", action="store_true", help="also build engines that are up to date"
    )
    build.add_argument(
        "--dry-run", action="store_true", help="list the engines to build, and build none"
    )
    return parser


def _run_doctor(args: argparse.Namespace) -> int:
    """Print the report; return 1 if one of its problems is of the kind "broken", else 0."""
    from runtime.tools.doctor import render, report

    found = report()
    if args.json:
        print_json(found)
    else:
        say(render(found).splitlines())
    return int(any(problem["kind"] == "broken" for problem in found["problems"]))


if __name__ == "__main__":
    sys.exit(main())
