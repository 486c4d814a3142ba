"""The command python -m export guides: a folder of masks from a prior and a folder of pictures."""

from __future__ import annotations

import sys

from export.guides.write import open_source, write_guides
from export.models.stated import Stated
from runtime.checks import check_count
from runtime.errors import ExitCode
from runtime.files import one_line
from runtime.tools.cli import Bar, Parser, out_path, print_error, printing, run, some_path
from runtime.tools.inspect import picture_words

_STATED = ("mean", "std", "names", "output", "output_name")


def command(words: list[str]) -> int:
    """Run ``python -m export guides``, whose errors are raised.

    Parameters
    ----------
    words : of the command line after "guides".

    Returns
    -------
    A :class:`runtime.errors.ExitCode`: FAILURE if a picture has no guide.
    """
    args = _parser().parse_args(words)
    check_count("workers", args.workers, 1, 256)
    with Bar(args.quiet) as bar:
        bar.say(f"open {one_line(args.model)}")
        source = open_source(
            args.model, Stated.from_words(**{name: getattr(args, name) for name in _STATED})
        )
        bar.say("compute guides")
        done = write_guides(
            source,
            args.data,
            args.out,
            soft=args.soft,
            workers=args.workers,
            progress=lambda count, of: bar.progress(f"{count} of {of}", count / of),
        )
    words = [f"{picture_words(sorted(names))}: {text}" for text, names in done.warnings.items()]
    for text in words + done.notes:
        with printing():
            print(f"warning: {text}", file=sys.stderr)
    for name in sorted(done.broken):
        print_error(done.broken[name])
    new = done.pictures - done.skipped - len(done.broken)
    print(
        f"{new} guides written, {done.skipped} there already, {len(done.broken)} pictures broken "
        f"-> {one_line(args.out)}"
    )
    return ExitCode.FAILURE if done.broken else ExitCode.DONE


def _parser() -> Parser:
    parser = Parser(
        "python -m export guides",
        description="Compute the guide of each picture of a folder with a frozen prior, and write "
        "them as a folder of masks. A command that was interrupted continues when it is repeated.",
        epilog="then: python -m sdk predict PICTURE --prior MASKS",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="PATH.onnx, a bundle, a SegFormer checkpoint folder, or a RUN of python -m export "
        "train with a head",
    )
    parser.add_argument(
        "--data", type=some_path, required=True, help="folder of pictures, with its folders"
    )
    parser.add_argument("-o", "--out", type=out_path, required=True, help="folder for the masks")
    parser.add_argument(
        "--soft", action="store_true", help="write probabilities (float16), not labels"
    )
    parser.add_argument("--workers", type=int, default=1, help="threads, 1 to 256 (%(default)s)")
    for name in _STATED:
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            help="of an .onnx file, as for python -m export",
            nargs="+" if name in ("mean", "std") else None,
        )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return parser


if __name__ == "__main__":
    sys.exit(run(lambda: command(sys.argv[1:])))
