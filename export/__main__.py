"""The command dg-export, or python -m export: from a prior to a bundle."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from runtime.core.config import PRESETS, RefineConfig
from runtime.core.parameters import objective_of
from runtime.engines.named_files import shell_word, utf8_text
from runtime.engines.recipe import ENGINES, EngineRecipe
from runtime.errors import DeviceError, InputError, SdkError
from runtime.prior.reading import KINDS
from runtime.tools.cli import (
    Bar,
    Parser,
    capabilities,
    gpu_index,
    out_path,
    run,
    some_path,
    workspace_bytes,
)
from runtime.tools.output import say

_TARGETS = {"engine": "trt", "tensorrt": "trt", "ort": "onnx"}  # other tools' name -> our target
_KINDS = ", ".join(KINDS)


def main(argv: list[str] | None = None) -> int:
    """Export one bundle.

    Parameters
    ----------
    argv : words of the command line; those of the process when None.

    Returns
    -------
    A :class:`runtime.errors.ExitCode`.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["train"]:
        return run(lambda: _train(arguments[1:]), as_json="--json" in arguments)
    if arguments[:1] == ["guides"]:
        return run(lambda: _guides(arguments[1:]), as_json="--json" in arguments)
    # argparse takes "-0.5,-0.5,-0.5" for an option, but not what begins with a space.
    words = [f" {word}" if re.match(r"-[\d.]+,", word) else word for word in arguments]
    args = _parser().parse_args(words)
    return run(lambda: _export(args, arguments), as_json=args.json)


def _train(words: list[str]) -> int:
    """Run a command of the trainer, and return the exit code. Ctrl-C ends its imports, too."""
    from export.train.__main__ import command

    return command(words)


def _guides(words: list[str]) -> int:
    """Compute guides beforehand, and return the exit code. Ctrl-C ends its imports, too."""
    from export.guides.__main__ import command

    return command(words)


def _parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(
        "dg-export",
        description="Export a prior and the refinement step as a bundle, and verify them first.",
        epilog="Sizes are HEIGHT first: 480x640, 480 640, or one number for a square. "
        "A prior is trained on a folder of pictures by: python -m export train --help. Guides are "
        "computed beforehand by: python -m export guides --help",
    )
    what = parser.add_argument_group("what")
    what.add_argument(
        "--model",
        default="kmeans",
        help="kmeans, segformer, PATH.onnx, a folder RUN of python -m export train, or "
        "module:function of your own (%(default)s)",
    )
    what.add_argument(
        "--weights",
        type=some_path,
        help="SegFormer checkpoint folder (Hugging Face's); or the place of a RUN's backbone or "
        "prior, if it was moved",
    )
    what.add_argument(
        "--flip",
        action="store_true",
        help="average with the mirror image, for a RUN of segunify or boosting",
    )
    what.add_argument(
        "--mask",
        choices=["fine", "coarse"],
        help="mask of a RUN of boosting: fine, or the faster coarse one (fine)",
    )
    for name, example in (("mean", "0.485,0.456,0.406"), ("std", "0.229,0.224,0.225")):
        what.add_argument(
            f"--{name}",
            nargs="+",
            metavar="N",
            help=f"{name} of the colours in training, for an .onnx file without it: {example}",
        )
    what.add_argument(
        "--names", help="classes of an .onnx file: a,b,c, a JSON list, or a file with one per line"
    )
    what.add_argument(
        "--output", type=_kind, metavar="KIND", help=f"what an .onnx file returns: {_KINDS}"
    )
    what.add_argument("--output-name", help="the output to take, of an .onnx file with several")
    what.add_argument(
        "--target",
        "--format",
        default="onnx",
        metavar="LIST",
        help="onnx, rtx (built here, no GPU needed), trt (built on its GPU), or several: onnx,rtx",
    )
    what.add_argument("-o", "--out", type=out_path, help="bundle folder (NAME.bundle)")
    what.add_argument(
        "--imgsz", nargs="+", metavar="N", help="input size; by default the model's own"
    )
    what.add_argument(
        "--batch", type=int, default=1, choices=[1], help="number of pictures in one run; 1 only"
    )
    what.add_argument(
        "--opset", type=int, help="version of the ONNX operators, for PyTorch modules (18)"
    )
    what.add_argument(
        "--simplify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="simplify the graph with onnxslim",
    )

    refine = parser.add_argument_group("refinement")
    refine.add_argument(
        "--refine",
        choices=[n for n in PRESETS if objective_of(RefineConfig.preset(n)).takes_guide],
        help="refinement whose step is exported (residual, or that of a RUN of refine)",
    )
    refine.add_argument(
        "--steps",
        type=int,
        help="SGD steps that the bundle runs by default (10; 0 for a RUN of refine)",
    )
    refine.add_argument("--seed", type=int, help="seed of the initial weights")
    refine.add_argument("--lr", type=float, help="learning rate")
    refine.add_argument("--scale", type=float, help="working size divided by picture size")
    refine.add_argument(
        "--init",
        type=some_path,
        help="safetensors file with trained weights; cnn.onnx is written, too",
    )

    precision = parser.add_argument_group("precision of the prior")
    precision.add_argument("--half", "--fp16", action="store_true", help="FP16")
    precision.add_argument(
        "--int8",
        action="store_true",
        help="INT8 by Q/DQ nodes; with --half the rest is FP16 (needs --data)",
    )
    precision.add_argument("--data", type=some_path, nargs="+", help="pictures to calibrate with")
    precision.add_argument(
        "--fraction", type=float, default=1.0, help="share of --data to use, above 0, at most 1"
    )

    shapes = parser.add_argument_group("shapes")
    shapes.add_argument("--dynamic", action="store_true", help="leave the input size free")
    for end in ("min", "opt", "max"):
        shapes.add_argument(
            f"--{end}-shape", nargs="+", metavar="N", help=f"{end} input size of engines"
        )

    build = parser.add_argument_group("engines")
    build.add_argument(
        "--engines",
        choices=list(ENGINES),
        default="all",
        help="graphs to build engines for; the others run as ONNX or natively (%(default)s)",
    )
    build.add_argument(
        "--compute-capability", metavar="LIST", help="GPUs to build for, with rtx: 8.6,8.9,12.0"
    )
    build.add_argument(
        "--workspace", default="auto", help="scratch memory: GiB (2), MiB (2048M), or auto"
    )
    build.add_argument("--opt-level", type=int, choices=range(6), help="effort of the builder")
    build.add_argument(
        "--timing-cache",
        type=some_path,
        help="file with the kernels' times, read and written (trt)",
    )
    build.add_argument("--device", default="0", help="GPU to build on: 0, cuda:0")

    check = parser.add_argument_group("verification")
    check.add_argument(
        "--pictures",
        type=some_path,
        nargs="+",
        help="pictures to verify with; by default some of --data, else the demo photo",
    )
    check.add_argument(
        "--min-agreement", type=float, help="least share of equal labels, above 0, at most 1"
    )
    check.add_argument(
        "--allow-one-class",
        action="store_true",
        help="write the bundle although the network finds only one class in each picture",
    )

    out = parser.add_argument_group("output")
    out.add_argument(
        "--triton", type=out_path, metavar="DIR", help="write a Triton model repository, too"
    )
    out.add_argument("--json", action="store_true", help="one JSON document on stdout")
    out.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return parser


def _kind(text: str) -> str:
    """The text of --output. ArgumentTypeError for another text than those of KINDS."""
    if text in KINDS:
        return text
    hint = "; -o names the bundle" if re.search(r"[./\\]", text) else ""
    raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {_KINDS}){hint}")


def _export(args: argparse.Namespace, arguments: list[str]) -> int:
    """Export as ``args`` says, print the result, and return the exit code. ``arguments`` are the
    words of the command line, which the bundle's recipe stores."""
    targets = [t.strip().lower() for t in args.target.split(",") if t.strip()]
    targets = list(dict.fromkeys(_TARGETS.get(t, t) for t in targets))
    imgsz, opt = _size("imgsz", args.imgsz), _size("opt-shape", args.opt_shape)
    if imgsz and opt and imgsz != opt:
        raise InputError("imgsz and opt-shape differ", fix="leave one of them out")
    if opt and not args.dynamic:
        raise InputError("opt-shape is for dynamic shapes", fix="add --dynamic, or use --imgsz")
    if args.seed is not None and args.init:
        raise InputError(
            "seed draws the initial weights, and init reads them from a file",
            fix="leave --seed or --init out",
        )
    names = ("steps", "seed", "lr", "scale")
    changes = {n: getattr(args, n) for n in names if getattr(args, n) is not None}

    from export.models.load import load_model
    from export.models.stated import Stated
    from export.pack import ExportOptions, export_bundle
    from export.summary import summary, to_json
    from export.triton import repository_place, write_repository

    options = ExportOptions(
        targets=tuple(targets),
        refine=RefineConfig.preset(args.refine or "residual", **changes),
        imgsz=imgsz or opt,
        initial=args.init,
        half=args.half,
        int8=args.int8,
        data=tuple(args.data or ()),
        fraction=args.fraction,
        pictures=tuple(args.pictures or ()),
        dynamic=args.dynamic,
        min_shape=_size("min-shape", args.min_shape),
        max_shape=_size("max-shape", args.max_shape),
        opset=args.opset,
        simplify=args.simplify,
        engines=args.engines,
        engine=EngineRecipe(
            compute_capabilities=capabilities(args.compute_capability or ""),
            workspace=workspace_bytes(args.workspace),
            level=args.opt_level,
        ),
        timing_cache=args.timing_cache,
        device=gpu_index(args.device),
        min_agreement=args.min_agreement,
        allow_one_class=args.allow_one_class,
        command=_command(arguments),
    )
    network = args.model != "kmeans"
    if args.triton and not network:
        raise InputError("triton serves networks; kmeans has none", fix="leave --triton out")
    stated = Stated.from_words(
        mean=args.mean,
        std=args.std,
        names=args.names,
        output=args.output,
        output_name=args.output_name,
    )
    with _size_named("opt-shape" if opt else "imgsz"):
        size = options.imgsz if network else None
        model = load_model(args.model, args.weights, size, stated, args.flip, args.mask)
    if model.refine is not None and args.refine is None:  # only what was given replaces its own
        options = replace(options, refine=replace(model.refine, **changes))
    for text in model.warnings:
        print(f"WARNING: {text}", file=sys.stderr)
    if not model.trained:
        warning = SdkError(
            f"{model.name} has RANDOM weights: good for trying the tools, its labels mean nothing",
            fix="--weights DIR" if model.training is None else "train on a backbone with weights",
        )
        print(f"WARNING: {warning}", file=sys.stderr)
    out = args.out or Path(f"{model.name}.bundle")
    if args.triton:
        # An unusable folder is reported before the work.
        repository_place(args.triton, utf8_text(out.name), out)
    with Bar(args.quiet) as bar, _size_named("opt-shape" if opt else "imgsz"):
        exported = export_bundle(model, out, options, say=bar.say, progress=bar.progress)
    if args.triton:
        write_repository(args.triton, exported.bundle)
    if args.json:
        print(to_json(exported))
    else:
        say(summary(exported))
        if args.triton:
            say([f"triton   tritonserver --model-repository {shell_word(str(args.triton))}"])
    if exported.missing is None:
        return 0
    build = f"python -m runtime build {shell_word(str(out))}"
    fix = f"on the device: {build}"
    if isinstance(exported.missing, DeviceError):  # this machine may be the device
        fix = f"{exported.missing.fix}; then: {build}"
    error = SdkError(f"the engines are not built: {exported.missing.message}", fix=fix)
    print(f"error: {error}", file=sys.stderr)  # the bundle is written all the same
    return exported.missing.exit_code


@contextmanager
def _size_named(option: str) -> Iterator[None]:
    """A block whose errors name the option that has set the input size."""
    try:
        yield
    except InputError as error:
        if option == "imgsz" or "imgsz" not in error.message:
            raise
        message, fix = (text.replace("imgsz", option) for text in (error.message, error.fix))
        raise InputError(message, fix=fix) from error


def _command(arguments: list[str]) -> str:
    """The command line for the bundle's recipe. Of absolute paths only the last part is stored."""
    names = [re.sub(r"^(-[^=]*=)?/.*/(?=.)", r"\1", word.rstrip("/") or word) for word in arguments]
    return " ".join(map(shell_word, ["python", "-m", "export", *names]))


def _size(name: str, words: list[str] | None) -> tuple[int, int] | None:
    """(height, width) in pixels of "480x640", "480 640", "480,640" or "640"; None if ``words`` is
    None. InputError for another text; ``name`` is that of the option."""
    if words is None:
        return None
    numbers = re.split(r"[x, ]+", " ".join(words).lower().strip())
    if len(numbers) not in (1, 2) or not all(
        re.fullmatch("[0-9]{1,9}", n) and 0 < int(n) < 2**15 for n in numbers
    ):
        raise InputError(
            f"{name} is {' '.join(words)!r}; wanted HEIGHTxWIDTH in pixels",
            fix=f"--{name} 480x640",
        )
    return int(numbers[0]), int(numbers[-1])


if __name__ == "__main__":
    sys.exit(main())
