"""dg, or python -m sdk: demo [PICTURE] | predict PICTURE... | stream SOURCE"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from tqdm import tqdm

from runtime.bundle.engines import BACKENDS
from runtime.checks import check_count
from runtime.core.config import PRESETS
from runtime.errors import ExitCode, InputError, MissingBackend, SdkError, first_line
from runtime.files import check_place, one_line, real_path, shown, stat_of, write_atomic
from runtime.prior.names import names_in_option
from runtime.tools.cli import (
    Parser,
    end,
    interrupt,
    out_path,
    print_error,
    printing,
    problem_of,
    progress_bar,
    run,
)  # fmt: skip
from runtime.urls import is_url

try:
    from runtime.pictures.files import demo_photo
    from runtime.prior.masks import is_mask_folder
    from sdk import CrfConfig, FilterConfig, MasksPrior, RefineConfig, Result, Segmenter
    from sdk.prior import open_bundle
    from sdk.source import shown_name
    from sdk.stream_state import StreamState
    from sdk.video_writer import Video, Window, frame_rate, label_name
except MissingBackend as error:  # OpenCV: no command works without it
    end(error)

# These end a stream. systemd and docker send SIGTERM, a terminal that closes sends SIGHUP.
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its :class:`runtime.errors.ExitCode`."""
    args = _parser().parse_args(argv)
    return run(lambda: args.run(args))


def _parser() -> Parser:
    parser = Parser("dg", description="Segmentation that adapts to the picture.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="segment one picture and print the time of each stage")
    demo.add_argument("picture", nargs="?", help="a picture (a photo that scikit-image contains)")
    demo.set_defaults(run=_demo)

    predict = commands.add_parser("predict", help="segment pictures")
    predict.add_argument("pictures", nargs="+", metavar="PICTURE")
    predict.add_argument("--json", action="store_true", help="print one JSON document")
    predict.add_argument("--coco", action="store_true", help="also write OUT/annotations.json")
    predict.set_defaults(run=_predict)

    stream = commands.add_parser("stream", help="segment a video or a camera, frame by frame")
    stream.add_argument(
        "source", help="video, camera number, folder of pictures, URL, GStreamer pipeline"
    )
    stream.add_argument(
        "--save", type=out_path, help="write an annotated video: .mp4, .avi or .mkv"
    )
    stream.add_argument(
        "--labels", type=out_path, help="folder for label pictures, one for each frame"
    )
    stream.add_argument("--json", action="store_true", help="print a line of JSON for each frame")
    stream.add_argument("--show", action="store_true", help="show a live window; q ends the stream")
    stream.add_argument(
        "--warm-steps",
        type=int,
        help="SGD steps for a frame that continues the one before (2; with trained weights at most "
        "the steps of --refine)",
    )
    stream.add_argument(
        "--cold-steps",
        type=int,
        help="SGD steps for a frame that starts anew: the first, and one after a cut or a change "
        "of size (10; with trained weights the steps of --refine, by default the bundle's)",
    )
    stream.add_argument(
        "--budget-ms",
        type=float,
        help="most milliseconds for a frame; fewer steps are made if they would take longer",
    )
    stream.add_argument("--rate", type=float, help="frames per second (the source's own)")
    stream.add_argument(
        "--drop",
        choices=["oldest", "none"],
        help="frames to drop if they arrive too fast (oldest for live sources, else none)",
    )
    stream.add_argument("--frames", type=int, help="stop after this many frames")
    stream.add_argument(
        "--timeout",
        type=float,
        default=10.0,
        help="seconds without a frame that end the stream (%(default)s)",
    )
    stream.add_argument(
        "--state",
        type=out_path,
        help="load the state from this file if it exists, and save it to the file",
    )
    stream.set_defaults(run=_stream)

    for command in (demo, predict, stream):
        command.add_argument(
            "--prior",
            default="kmeans",
            help="kmeans, a bundle folder, an .onnx file, or a folder of masks",
        )
        command.add_argument(
            "--unknown", type=int, help="label of unknown pixels in a folder of masks, such as 255"
        )
        command.add_argument(
            "--names", help="classes of a folder of masks: a,b,c, or a file with one per line"
        )
        command.add_argument(
            "--refine",
            default="default",
            choices=["default", *PRESETS, "none"],
            help="refinement setting; default: the bundle's setting, or residual without a bundle",
        )
        if command is not stream:
            command.add_argument(
                "--steps", type=int, help="SGD steps of the refinement (those of --refine)"
            )
        command.add_argument("--seed", type=int, default=None, help="seed of the initial weights")
        filters = command.add_mutually_exclusive_group()
        filters.add_argument(
            "--no-filter",
            action="store_true",
            help="enlarge the scores bilinearly, without the guided filter",
        )
        filters.add_argument(
            "--crf",
            action="store_true",
            help="a dense CRF, on the CPU, instead of the guided filter: slower; see docs/crf.md",
        )
        command.add_argument(
            "--min-area", type=int, help="merge regions smaller than this many pixels"
        )
        command.add_argument(
            "--imgsz", type=_imgsz, help="input size of an ONNX prior: long side, or HEIGHTxWIDTH"
        )
        command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (%(default)s)")
        command.add_argument(
            "--precision",
            default="fp32",
            choices=["fp32", "fp16"],
            help="precision of the native refinement on a GPU (%(default)s)",
        )
        command.add_argument(
            "--backend",
            default="onnx",
            choices=BACKENDS,
            help="what executes the prior of a bundle (%(default)s)",
        )
        command.add_argument(
            "--refine-backend",
            default="native",
            choices=["native", *BACKENDS],
            help="what executes the refinement: native, or a bundle's step graph (%(default)s)",
        )
        command.add_argument("--threads", type=int, help="number of threads (all processors)")
        if command is not stream:
            command.add_argument(
                "-o",
                "--out",
                type=out_path,
                default=Path("out"),
                help="folder for the outputs (%(default)s)",
            )
    return parser


def _imgsz(text: str) -> int | tuple[int, int]:
    try:
        sides = [int(n) for n in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; wanted 512 or 384x512")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _check_option(name: str, value: int | None, low: int, high: int) -> None:
    """Check an option that is a whole number. None, an option that was left out, passes.

    Raises
    ------
    InputError : the value is out of range; the fix names a value in range.
    """
    if value is None:
        return
    try:
        check_count(name, value, low, high)
    except InputError as error:
        fix = f"--{name} {max(low, min(value, high))}, or leave --{name} out"
        raise InputError(error.message, fix=fix) from None


def _segmenter(args: argparse.Namespace) -> Segmenter:
    """Make the Segmenter that the options describe."""
    _check_option("steps", getattr(args, "steps", None), 0, 1_000_000)
    _check_option("threads", args.threads, 1, 1024)
    refine: RefineConfig | str | None = None
    changes = {k: v for k in ("steps", "seed") if (v := getattr(args, k, None)) is not None}
    bundle = open_bundle(args.prior)
    if args.refine == "default":
        own = bundle.refine() if bundle else RefineConfig()
        refine = replace(own, **changes)
    elif args.refine != "none":
        refine = RefineConfig.preset(args.refine, **changes)
    elif changes:
        raise InputError(
            f"--refine none takes no --{' or --'.join(changes)}",
            fix=f"leave --{' and --'.join(changes)} out",
        )
    prior = bundle or args.prior
    if args.names is not None or args.unknown is not None:
        names = None if args.names is None else names_in_option(args.names)
        if bundle or not is_mask_folder(Path(args.prior)):
            raise InputError(
                "--names and --unknown are for a folder of masks, and --prior is "
                f"{shown(args.prior)}",
                fix="--prior MASKS, or leave them out",
            )
        prior = MasksPrior(args.prior, names=names, unknown=args.unknown)
    return Segmenter(
        prior,
        refine=refine,
        filter=CrfConfig() if args.crf else None if args.no_filter else FilterConfig(),
        min_area=args.min_area,
        imgsz=args.imgsz,
        device=args.device,
        precision=args.precision,
        backend=args.backend,
        refine_backend=args.refine_backend,
        threads=args.threads,
    )


def _folder(path: Path) -> Path:
    """Make the output folder, and check that a file can be written in it.

    Raises
    ------
    InputError : the folder cannot be made, or a file cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:
        reason = first_line(error)
        if isinstance(error, FileExistsError):  # at this name, or at the name of a folder around it
            name = error.filename or path
            reason = f"{shown(name)} is not a folder"
            if stat_of(name, "created") is None:
                reason = f"{shown(name)} is a link whose target does not exist"
        raise InputError(
            f"folder {shown(path)} cannot be created or written: {reason}",
            fix="choose another folder",
        ) from error
    return path


def _segment(seg: Segmenter, source: Any, name: str) -> Result:
    """Segment one picture and show a progress bar over the steps on a terminal."""
    with progress_bar(
        total=seg.refine.steps if seg.refine else 0, desc=one_line(name), disable=None, leave=False
    ) as bar:
        return seg(source, progress=lambda done, _: bar.update(1))


def _outputs(folder: Path, stem: str) -> tuple[Path, Path]:
    """Return the paths of the overlay and of the labels."""
    return folder / f"{stem}_overlay.png", folder / f"{stem}_labels.png"


def _save(result: Result, folder: Path, stem: str) -> tuple[Path, Path]:
    """Write the overlay and the labels, and return their paths."""
    overlay, labels = _outputs(folder, stem)
    result.save(overlay)
    result.save_labels(labels)
    return overlay, labels


def _demo(args: argparse.Namespace) -> int:
    folder, seg = _folder(args.out), _segmenter(args)
    source, stem = args.picture, Path(args.picture or "demo").stem
    if source is None:
        source = demo_photo()
    result = _segment(seg, source, stem)
    if args.picture is None:  # Report the times of a second call: the first one loads libraries.
        result = _segment(seg, source, stem)
    for warning in result.warnings:
        with printing():
            print(f"warning: {warning}", file=sys.stderr)
    outputs = _save(result, folder, stem)
    overlay, labels = map(one_line, outputs)
    height, width = result.labels.shape
    h, w = result.stats["working_size"]
    print(f"{width} x {height} pixels, refined at {w} x {h}, {result.backend}")
    print(
        f"{result.stats['steps']} steps ({result.stats['stop_reason']}), "
        f"{result.stats['clusters']} labels, {len(result.segments)} regions"
    )
    print(timing_table(result.timings))
    print(f"overlay  {overlay}\nlabels   {labels}")
    return 0


def _predict(args: argparse.Namespace) -> int:
    folder, seg = _folder(args.out), _segmenter(args)
    stems = [Path(p).stem for p in args.pictures]
    if len(set(stems)) < len(stems):
        raise InputError(
            "two pictures have the same name; their outputs would overwrite each other",
            fix="run them one by one with different -o",
        )
    outputs = {real_path(path) for stem in stems for path in _outputs(folder, stem)}
    if args.coco:
        outputs.add(real_path(folder / "annotations.json"))
    for picture in args.pictures:
        if real_path(picture) in outputs:
            raise InputError(
                f"{shown(picture)} would be overwritten by an output", fix="choose another -o"
            )
    documents, coco, failed = [], [], 0
    for index, (picture, stem) in enumerate(zip(args.pictures, stems, strict=True), 1):
        document = {"picture": one_line(picture) if is_url(picture) else picture}
        try:
            result = _segment(seg, picture, stem)
            overlay, labels = _save(result, folder, stem)
        except MissingBackend:  # every picture would fail
            raise
        except (SdkError, OSError, MemoryError, RuntimeError) as error:
            problem = problem_of(error, picture)  # continue with the other pictures
            print_error(problem)
            documents.append(document | {"error": str(problem)})
            failed += 1
            continue
        name = one_line(picture)
        for warning in result.warnings:
            with printing():
                print(f"warning: {name}: {warning}", file=sys.stderr)
        documents.append(
            document
            | {"overlay": str(overlay), "labels": str(labels)}
            | json.loads(result.to_json())
        )
        if args.coco:
            coco.append(result.to_coco(index, picture))
        if not args.json:
            total = result.timings["total"]
            files = f"{one_line(overlay)}, {one_line(labels)}"
            with printing("stdout"):
                print(f"{name}: {len(result.segments)} regions, {total:.0f} ms -> {files}")
    if args.coco and coco:
        try:
            write_atomic(folder / "annotations.json", json.dumps(_merge_coco(coco)).encode())
        except InputError as error:
            print_error(error)
            failed += 1
    if args.json:
        print(json.dumps(documents, indent=1))
    return ExitCode.FAILURE if failed else ExitCode.DONE


def _stream(args: argparse.Namespace) -> int:
    title = shown_name(args.source)
    _check_option("frames", args.frames, 1, 2**62)
    _check_outputs(args)
    state = StreamState()
    if args.state and stat_of(args.state):
        state = StreamState.load(args.state)
    video = None
    if args.save:
        video = Video(args.save, args.rate or frame_rate(args.source) or 25.0)
    window = Window(title) if args.show else None
    seg = _segmenter(args)
    results = seg.stream(
        args.source, warm_steps=args.warm_steps, cold_steps=args.cold_steps,
        budget_ms=args.budget_ms, rate=args.rate, drop=args.drop, timeout=args.timeout, state=state,
    )  # fmt: skip
    if args.labels:
        _folder(args.labels)
        if older := len(list(args.labels.glob("*.png"))):
            with printing():
                text = f"warning: {one_line(args.labels)} already has {older} pictures"
                print(text, file=sys.stderr)
    bar = progress_bar(total=args.frames, unit=" frames", desc=title, disable=None)
    times: deque[float] = deque(maxlen=10_000)
    count, steps, last = 0, 0, None

    failed = False

    def log(text: str) -> None:
        with printing():
            tqdm.write(text, file=sys.stderr)

    def try_to(call: Callable[[], None]) -> None:
        """Call a function that finishes an output, and print its error."""
        nonlocal failed
        try:
            call()
        except (SdkError, OSError, MemoryError, RuntimeError) as error:
            print_error(problem_of(error))
            failed = True

    def save_state() -> None:
        if args.state and state.frames:
            state.save(args.state)

    def log_summary() -> None:
        if last is not None:
            p50, p99 = np.percentile(times, (50, 99))
            log(
                f"{count} frames, {last.dropped} dropped, {steps / count:.1f} steps a frame; "
                f"{p50:.1f} ms a frame (p50), {p99:.1f} ms (p99)"
            )

    with ExitStack() as finish, warnings.catch_warnings():
        # The calls are made in reverse order, each one even after an error or an interruption. The
        # error of an output is printed at once, so that the error of another one does not hide it.
        for number in ENDINGS:
            finish.callback(signal.signal, number, signal.getsignal(number))
        finish.callback(log_summary)
        finish.callback(try_to, save_state)
        if video:
            finish.callback(try_to, video.close)
        if window:
            finish.callback(window.close)
        finish.callback(bar.close)
        finish.callback(results.close)
        finish.callback(_ignore_endings)
        for number in ENDINGS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does
                signal.signal(number, _interrupt)
        warnings.showwarning = lambda message, *_, **__: log(f"warning: {message}")
        for result in results:
            info = result.frame
            assert info is not None  # every result of a stream has a frame
            for text in info.events + [f"warning: {w}" for w in result.warnings]:
                log(f"frame {info.index}: {text}")
            if video:
                video.write(result)
            if args.labels:
                result.save_labels(args.labels / label_name(info.index))
            if args.json:
                print(result.to_json(), flush=True)
            if window:
                window.show(result)
            times.append(result.timings["total"])
            count, steps, last = count + 1, steps + result.stats["steps"], info
            bar.update(1)
            if count == args.frames or (window and not window.open):
                break
    return ExitCode.FAILURE if failed else ExitCode.DONE


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM and SIGHUP in the same way as Ctrl-C, and ignore further signals, which would
    interrupt the finishing of the outputs."""
    _ignore_endings()
    interrupt(number, frame)


def _ignore_endings() -> None:
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)


def _check_outputs(args: argparse.Namespace) -> None:
    """Check that no output overwrites the source or another output, and that the file of --state
    can be written.

    Raises
    ------
    InputError : an output would overwrite the source or another output, or the file of --state
        cannot be written.
    """
    paths = [real_path(p) for p in (args.source, args.save, args.labels, args.state) if p]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise InputError(f"{shown(path)} would be overwritten", fix="choose another output")
    if args.state:
        check_place(args.state)


def _merge_coco(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge COCO documents into one and renumber the ids of the annotations from 1."""
    images = [image for d in documents for image in d["images"]]
    annotations = [a for d in documents for a in d["annotations"]]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    categories = {c["id"]: c for d in documents for c in d["categories"]}
    return {
        "images": images,
        "annotations": annotations,
        "categories": [categories[k] for k in sorted(categories)],
    }


def timing_table(timings: dict[str, float]) -> str:
    """Lay out the time of each stage, in milliseconds and in percent of "total", as text lines."""
    total = timings["total"]
    return "\n".join(
        f"  {stage:<12}{ms:>9.1f} ms{100 * ms / total:>7.1f} %" for stage, ms in timings.items()
    )


if __name__ == "__main__":
    sys.exit(main())
