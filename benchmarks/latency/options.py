"""The options of `python -m benchmarks latency`, and their values."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable

from benchmarks.latency.document import MODES
from benchmarks.latency.inputs import FRAMES
from benchmarks.latency.modes import WARM_STEPS
from benchmarks.speed import peers
from benchmarks.speed.harness import thread_counts
from runtime.bundle.engines import BACKENDS
from runtime.core.config import PRESETS
from runtime.device.choose import default_threads
from runtime.device.driver import parse_device
from runtime.errors import InputError
from runtime.tools.cli import Parser, option, out_path

DESCRIPTION = """Latency of the whole pipeline, from the picture to its labels.

    python -m benchmarks latency [BUNDLE|PRIOR] [--picture P ...|--video V] [--refine 0,4,8]
        [--mode back-to-back,paced,stream] [--rate 30] [--duration 10] [--threads 1,2] [-o DIR]

The clock is end-to-end wall time, from the uint8 picture on the host to the int32 labels on the
host. In the mode "back-to-back" a call begins when the call before it has ended. In "paced" a
picture is due every 1 / rate seconds, and its latency begins when it is due, so that waiting is
included. In "stream" the refinement of a frame starts from the weights of the frame before. No
sample is left out. Without -o no file is written; --export chooses the files in DIR.
"""

EXPORTS = {
    "json": "latency.json",
    "csv": "latency.csv",
    "md": "latency.md",
    "trace": "trace.json",
    "html": "latency.html",
}


def positive(text: str) -> float:
    """Read a number above 0.

    Raises
    ------
    InputError : the text is no finite number above 0.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise InputError(f"it is {text!r}; wanted a number above 0")
    return value


def scale_of(text: str) -> float:
    """Read a scale.

    Raises
    ------
    InputError : the text is no number above 0 and at most 1.
    """
    value = positive(text)
    if value > 1:
        raise InputError(f"it is {text!r}; wanted a number above 0, at most 1")
    return value


def numbers(text: str, what: str, low: float, high: float) -> list[float]:
    """Read different numbers: [50, 99] from "50,99,50". ``what`` is their name in the message.

    Raises
    ------
    InputError : a part is no number in [low, high].
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(low <= v <= high for v in values):
        raise InputError(f"{what} is {text!r}; wanted numbers from {low:g} to {high:g}, as 1,2")
    return list(dict.fromkeys(values))


def words(text: str, what: str, known: Iterable[str]) -> list[str]:
    """Read words from "a,b", and return them in the order of ``known``. ``what`` is their name in
    the message.

    Raises
    ------
    InputError : a word is not in ``known``.
    """
    asked = text.split(",")
    for word in asked:
        if word not in known:
            raise InputError(f"{what} is {word!r}; wanted some of {', '.join(known)}")
    return [word for word in known if word in asked]


def size_of(text: str) -> tuple[int, int]:
    """Read height and width in pixels: (480, 640) from "480x640".

    Raises
    ------
    InputError : the text is no HEIGHTxWIDTH, or a side is not from 1 to 16384.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(
        re.fullmatch("[0-9]{1,5}", p) and 0 < int(p) <= 16384 for p in parts
    ):
        raise InputError(f"imgsz is {text!r}; wanted HEIGHTxWIDTH up to 16384, as 480x640")
    return int(parts[0]), int(parts[1])


def device_of(text: str) -> str:
    """Return the text unchanged, if it is the name of a device. Whether the device exists is not
    checked.

    Raises
    ------
    InputError : the text names no device.
    """
    parse_device(text)
    return text


def percentiles(text: str) -> list[float]:
    """Read percentiles in per cent: [50, 99] from "50,99".

    Raises
    ------
    InputError : a part is no number from 1 to 99.99.
    """
    return numbers(text, "percentile", 1, 99.99)


def step_counts(text: str) -> list[int]:
    """Read numbers of steps: [0, 4, 8] from "0,4,8".

    Raises
    ------
    InputError : a part is no whole number from 0 to 100000.
    """
    counts = numbers(text, "refine", 0, 100_000)
    if any(n % 1 for n in counts):
        raise InputError(f"refine is {text!r}; wanted whole numbers of steps")
    return [int(n) for n in counts]


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the options of the command line. A wrong option ends the process with exit code 2."""
    parser = Parser(
        "python -m benchmarks latency",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prior", nargs="?", default="kmeans", help="a bundle, an .onnx file, or kmeans (default)")
    add("--picture", nargs="+", help="pictures, shown in turn (default: a photo of scikit-image)")
    add("--labels", nargs="+", help="true classes, as the prior numbers them (255: any)")
    add("--video", help=f"a video: its first {FRAMES} frames, then backwards")
    add(
        "--imgsz",
        type=option(size_of),
        help="HEIGHTxWIDTH to which pictures are resized first (default: not resized)",
    )
    add(
        "--refine",
        type=option(step_counts),
        help="numbers of steps, as 0,4,8; 0 is the prior alone, or the map of a bundle's "
        f"trained weights (default: the preset's; {WARM_STEPS} for a frame of a stream)",
    )
    add(
        "--scale",
        type=option(scale_of),
        help="working size divided by the picture's size, up to 1 (default: the preset's)",
    )
    presets = ("default", *PRESETS)
    add("--preset", default="default", choices=presets, help="refinement (%(default)s)")
    add(
        "--mode",
        type=option(lambda text: words(text, "mode", MODES)),
        help="some of back-to-back,paced,stream (default: all, paced only with --rate)",
    )
    add("--rate", type=option(positive), help="pictures per second in the mode paced")
    add(
        "--duration", type=option(positive), default=10.0, help="seconds for each row (%(default)g)"
    )
    usual = "50,90,95,99"
    add("--percentile", type=option(percentiles), default=usual, help="to report (%(default)s)")
    add(
        "--threads",
        type=option(thread_counts),
        default=str(default_threads()),
        help="numbers of threads, as 1,2 (%(default)s)",
    )
    add("--device", type=option(device_of), default="cpu", help="cpu, cuda, cuda:1 (%(default)s)")
    precisions = ("fp32", "fp16")
    add("--precision", default="fp32", choices=precisions, help="of the native refinement on a GPU")
    add("--backend", default="onnx", choices=BACKENDS, help="what executes the prior (%(default)s)")
    backends = ("native", *BACKENDS)
    add(
        "--refine-backend",
        default="native",
        choices=backends,
        help="what executes the refinement (%(default)s)",
    )
    add(
        "--peer",
        type=option(lambda text: words(text, "peer", peers.PEERS)),
        default=[],
        help=f"also measure, in turns with ours: {', '.join(peers.PEERS)}",
    )
    add("--memory", action="store_true", help="also measure peak memory, in other processes")
    add("--power", action="store_true", help="also measure joules for each picture, in another run")
    add(
        "--export",
        type=option(lambda text: words(text, "export", EXPORTS)),
        help=f"files to write to DIR ({','.join(EXPORTS)})",
    )
    add(
        "-o",
        "--out",
        type=out_path,
        help="the folder DIR; its files of the same names are replaced",
    )
    add("--json", action="store_true", help="print the document instead of the tables")
    args = parser.parse_args(argv)
    if args.picture and args.video:
        parser.error("--picture and --video are both given; wanted one of them")
    if args.labels and not args.picture:
        parser.error("--labels needs --picture, the pictures of the labels")
    if args.mode and "paced" in args.mode and args.rate is None:
        parser.error("--mode paced needs a rate, as --rate 30")
    if args.mode and "paced" not in args.mode and args.rate is not None:
        parser.error("--rate is for --mode paced")
    if args.export and args.out is None:
        parser.error("--export needs a folder, as -o DIR")
    if "torch-eager" in args.peer and args.refine == [0]:
        parser.error("--peer torch-eager is for refinements; wanted --refine with a number above 0")
    if args.scale is not None and (args.refine == [0] or args.refine_backend != "native"):
        parser.error("--scale is for the native refinement: step graphs and 0 steps do not use it")
    args.export = args.export or list(EXPORTS)
    return args
