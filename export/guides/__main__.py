"""The command python -m export guides: a folder of masks from a prior and a folder of pictures."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from export.guides import diffseg, dynaseg_fpn, kmeans, network
from export.guides.write import GuideModel, write_guides
from runtime.checks import check_count
from runtime.errors import ExitCode, InputError
from runtime.files import here, one_line, shown, stat_of
from runtime.tools.cli import Bar, Parser, out_path, print_error, printing, run, some_path
from runtime.tools.inspect import picture_words

NETWORK = "PATH.onnx"
# The model of a name, and those that a path names: a module with add_options(parser), which adds
# the model's own options, and from_arguments(args), which makes the GuideModel. Importing a module
# imports neither torch nor another package of its model.
MODELS: dict[str, Any] = {
    NETWORK: network,
    "diffseg": diffseg,
    "dynaseg_fpn": dynaseg_fpn,
    "kmeans": kmeans,
}


def command(words: list[str]) -> int:
    """Run ``python -m export guides``, whose errors are raised.

    Parameters
    ----------
    words : of the command line after "guides".

    Returns
    -------
    A :class:`runtime.errors.ExitCode`: FAILURE if a picture has no guide.
    """
    args = _parser(words).parse_args(words)
    check_count("workers", args.workers, 1, 256)
    with Bar(args.quiet) as bar:
        bar.say(f"open {one_line(args.model)}")
        source = _model(args)
        bar.say("compute guides")
        done = write_guides(
            source,
            args.data,
            args.out,
            soft=args.soft,
            workers=args.workers,
            progress=lambda count, of: bar.progress(f"{count} of {of}", count / of),
        )
    warned = [f"{picture_words(sorted(names))}: {text}" for text, names in done.warnings.items()]
    for text in warned + done.notes:
        with printing():
            print(f"warning: {text}", file=sys.stderr)
    for name in sorted(done.broken):
        print_error(done.broken[name])
    new = done.pictures - done.skipped - len(done.broken)
    if args.json:
        broken = {name: str(done.broken[name]) for name in sorted(done.broken)}
        counts = {"pictures": done.pictures, "written": new, "unchanged": done.skipped}
        more = {"broken": broken, "warnings": warned + done.notes}
        print(json.dumps({"masks": one_line(args.out)} | counts | more, indent=1))
        return ExitCode.FAILURE if done.broken else ExitCode.DONE
    print(
        f"{new} guides written, {done.skipped} unchanged, {len(done.broken)} pictures broken "
        f"-> {one_line(args.out)}"
    )
    return ExitCode.FAILURE if done.broken else ExitCode.DONE


def _model(args: argparse.Namespace) -> GuideModel:
    """The model that the options name."""
    if args.model in MODELS:
        return MODELS[args.model].from_arguments(args)
    if not Path(args.model).suffix and stat_of(args.model) is None:
        raise InputError(
            f"model is {shown(args.model)!r}, which is no model's name and no path that exists; "
            f"wanted {', '.join(MODELS)}, a bundle, a checkpoint folder or a RUN",
            fix=f"--model with one of these; the current folder is {here()}",
        )
    return network.from_arguments(args)


class _Options(argparse.ArgumentParser):
    """The options of one model."""

    def __init__(self, name: str, module: Any) -> None:
        super().__init__(add_help=False)
        module.add_options(self.add_argument_group(f"--model {name}"))

    def has(self, word: str) -> bool:
        """Whether a word of the command line is one of these options."""
        return word.partition("=")[0] in self._option_string_actions


def _parser(words: list[str]) -> Parser:
    """The parser of the command line, with the options of the model that the words name.

    Raises
    ------
    InputError : a word is an option of another model.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", nargs="?")
    model = first.parse_known_args(words)[0].model
    others = {name: _Options(name, module) for name, module in MODELS.items()}
    own = others.pop(model if model in MODELS else NETWORK)
    for word in words:
        owners = [name for name, options in others.items() if options.has(word)]
        if owners and not own.has(word):
            raise InputError(
                f"{word.partition('=')[0]} is an option of --model {' and '.join(owners)}; "
                f"--model is {'not given' if model is None else shown(model)}",
                fix="leave it out; python -m export guides --model MODEL --help lists its options",
            )
    parser = Parser(
        "python -m export guides",
        parents=[own],
        description="Compute the guide of each picture of a folder with a frozen prior, and write "
        "them as a folder of masks. A command that was interrupted continues when it is repeated.",
        epilog="The options of a model: python -m export guides --model MODEL --help. "
        "Then: python -m sdk predict PICTURE --prior MASKS",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="PATH.onnx, a bundle, a SegFormer checkpoint folder, a RUN of python -m export train "
        f"segunify or boosting, or one of: {', '.join(list(MODELS)[1:])}",
    )
    parser.add_argument(
        "--data", type=some_path, required=True, help="folder of pictures, with its folders"
    )
    parser.add_argument("-o", "--out", type=out_path, required=True, help="folder for the masks")
    parser.add_argument(
        "--soft", action="store_true", help="write probabilities (float16), not labels"
    )
    parser.add_argument("--workers", type=int, default=1, help="threads, 1 to 256 (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return parser


if __name__ == "__main__":
    sys.exit(run(lambda: command(sys.argv[1:]), as_json="--json" in sys.argv))
