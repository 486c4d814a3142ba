"""Quality, latency and memory of streams, with and without the warm start from the frame before.

    python -m benchmarks stream [--frames 36] [--paced 300] [--memory 10000] [-o results.json]

Quality: the first frames of three DAVIS sequences. Foreground is every class except the prior's
background. The prior runs once for each frame, and all rows use its output. "flicker" is the share
of pixels whose label changes from one frame to the next, among the pixels that hardly change in the
picture (after a 3x3 mean no colour changes by more than 8 of 255).

Latency: a clip at the rate of a camera, with old frames dropped. The prior's outputs are computed
in advance, so its time is not included.

Memory: the memory of the process after all small frames minus its memory after the first tenth.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment, table
from benchmarks.files import video_frames
from benchmarks.quality import datasets, metrics
from benchmarks.speed.workloads import memory
from runtime.errors import InputError
from runtime.files import shown
from runtime.opencv import cv2
from runtime.prior.network import NetworkPrior
from runtime.tools.cli import Parser, out_path, progress_bar
from sdk import RefineConfig, Result, Segmenter

STILL = 8  # of 255: a pixel whose colour changes by at most this counts as unchanged
SEQUENCES = ("blackswan", "car-shadow", "dog")


class Replay:
    """A prior that returns guides that were computed in advance.

    Parameters
    ----------
    frames : (H, W, 3) uint8 pictures.
    guides : the prior's output for each frame, (h, w, C) float32.
    names : the class names, or None.
    """

    def __init__(
        self, frames: list[np.ndarray], guides: list[np.ndarray], names: list[str] | None
    ) -> None:
        keys = [f.tobytes() for f in frames]
        self.names, self.guides = names, dict(zip(keys, guides, strict=True))

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """Return the guide of one of the frames."""
        return self.guides[picture.tobytes()]


def still(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return (H, W) bool: where two (H, W, 3) uint8 pictures differ by at most STILL after a 3x3
    mean."""
    change = np.abs(cv2.blur(a, (3, 3)).astype(int) - cv2.blur(b, (3, 3)))
    return np.asarray(change.max(-1) <= STILL)


def flicker(results: list[Result]) -> list[float]:
    """Return, for each frame but the first, the share of changed labels among the unchanged pixels.

    A frame without unchanged pixels is left out.
    """
    shares = []
    for before, after in pairwise(results):
        unchanged = still(before.image, after.image)
        if unchanged.any():
            shares.append(float((before.labels != after.labels)[unchanged].mean()))
    return shares


def methods(scale: float) -> dict[str, Callable[[Any, list[np.ndarray]], list[Result]]]:
    """Return the compared methods by name: functions of (prior, frames) that return the results.

    Parameters
    ----------
    scale : of the refinement's working size.
    """

    def cold(steps: int) -> Callable[[Any, list[np.ndarray]], list[Result]]:
        config = RefineConfig(scale=scale, steps=steps)
        return lambda prior, frames: list(map(Segmenter(prior, refine=config), frames))

    def warm(steps: int) -> Callable[[Any, list[np.ndarray]], list[Result]]:
        config = RefineConfig(scale=scale)
        return lambda prior, frames: list(
            Segmenter(prior, refine=config).stream(frames, warm_steps=steps)
        )

    return {
        "prior": lambda p, frames: list(map(Segmenter(p, refine=None, filter=None), frames)),
        "prior + guided filter": lambda p, frames: list(map(Segmenter(p, refine=None), frames)),
        "cold, 2 steps": cold(2),
        "cold, 10 steps": cold(10),
        "warm, 1 step": warm(1),
        "warm, 2 steps": warm(2),
        "warm, 4 steps": warm(4),
    }


def quality(count: int, scale: float) -> list[dict[str, Any]]:
    """Score all methods; returns a row of means over all frames for each method.

    Parameters
    ----------
    count : number of frames of each sequence.
    scale : of the refinement's working size.

    Raises
    ------
    InputError : the developer data set is missing.
    """
    network = NetworkPrior.from_onnx(
        datasets.prior_path("espnetv2_s2.0_voc_384x384.onnx"), imgsz=(480, 848)
    )
    clips = {}
    for name in SEQUENCES:
        items = [f for f in datasets.davis(1) if f.sequence == name][:count]
        frames = [item.image() for item in items]
        bar = progress_bar(iterable=frames, desc=f"{name}: prior", disable=None, leave=False)
        clips[name] = (items, frames, [datasets.guide_of(network, f) for f in bar])
    rows = []
    for title, method in methods(scale).items():
        print(f"  {title} ...", file=sys.stderr)
        scores: dict[str, list[float]] = {"IoU": [], "F": [], "flicker": []}
        by_clip = {}
        for name, (items, frames, guides) in clips.items():
            results = method(Replay(frames, guides, network.names), frames)
            own = []
            for item, result in zip(items, results, strict=True):
                predicted, mask = result.labels != 0, item.mask()
                own.append(metrics.binary_iou(predicted, mask))
                scores["F"].append(
                    metrics.boundary_f(predicted.astype(np.int32), mask.astype(np.int32))
                )
            by_clip[name] = round(float(np.mean(own)), 3)
            scores["IoU"] += own
            scores["flicker"] += flicker(results)
        means = {k: float(np.mean(v)) for k, v in scores.items()}
        rows.append(
            {"row": title, "IoU": round(means["IoU"], 3), "F": round(means["F"], 3)}
            | {"flicker": f"{means['flicker']:.2%}"}
            | by_clip
        )
    return rows


def latency(path: Path, count: int, rate: float, threads: int) -> list[dict[str, Any]]:
    """Measure the milliseconds per frame at the rate of a camera.

    Parameters
    ----------
    path : a video; its first 40 frames, or all if it has fewer, are played forwards and backwards.
    count : number of frames.
    rate : frames per second.
    threads : number of threads.

    Returns
    -------
    A row for each scale and number of warm steps.

    Raises
    ------
    InputError : the video cannot be read or has one frame only, or no frame started warm.
    """
    frames = video_frames(path, 40)
    if len(frames) < 2:
        raise InputError(
            f"{shown(path)} has one frame; wanted at least 2", fix="copy the data set again"
        )
    frames = [cv2.resize(f, (854, 480), interpolation=cv2.INTER_AREA) for f in frames]
    network = NetworkPrior.from_onnx(datasets.prior_path("espnetv2_s0.5_voc_256x256.onnx"))
    guides = [datasets.guide_of(network, f) for f in frames]

    def camera() -> Iterator[np.ndarray]:
        for i in range(count):
            at = i % (2 * len(frames) - 2)  # forwards and backwards
            yield frames[min(at, 2 * len(frames) - 2 - at)]

    rows = []
    for scale in (0.25, 0.5):
        for steps in (1, 2):
            seg = Segmenter(
                Replay(frames, guides, network.names),
                refine=RefineConfig(scale=scale),
                threads=threads,
            )
            done, times, last = 0, [], None
            for result in seg.stream(camera(), warm_steps=steps, rate=rate):
                done, last = done + 1, result.frame  # keep no pictures, as with a camera
                if last and last.start == "warm":
                    times.append(result.timings)
            if last is None or not times:
                raise InputError(
                    f"paced is {count}, and only the first frame, which starts cold, was not "
                    "dropped; wanted more frames",
                    fix="--paced 300, or a lower --rate",
                )
            core = [t["refine"] + t["filter"] + t["postprocess"] for t in times]
            total = [t["total"] for t in times]
            row = {"scale": scale, "warm steps": steps, "threads": threads, "rate": rate}
            row |= {"frames": done, "dropped": last.dropped}
            for name, values in (("refine + filter + post", core), ("total", total)):
                p50, p99 = np.percentile(values, (50, 99))
                row |= {f"{name} p50 ms": round(p50, 1), f"{name} p99 ms": round(p99, 1)}
            rows.append(row | {"frames/s": round(done / (last.time or np.nan), 1)})
    return rows


def held(count: int) -> dict[str, Any]:
    """Measure the memory of a stream.

    Parameters
    ----------
    count : number of small frames.

    Returns
    -------
    A row: the memory of the process in MiB after every tenth of the frames, and its growth from the
    first tenth to the last.
    """
    rng = np.random.default_rng(0)
    base = cv2.resize(rng.integers(0, 256, (9, 16, 3), np.uint8), (320, 180))
    maps = rng.random((40, 5, 9, 16)).astype(np.float32)
    soft = [np.moveaxis(m / m.sum(0), 0, -1) for m in maps]
    frames = [np.roll(base, i, 1) for i in range(40)]

    def camera() -> Iterator[np.ndarray]:
        for i in range(count):
            yield frames[i % 40]

    seg = Segmenter(Replay(frames, soft, list("abcde")), refine=RefineConfig(scale=0.25))
    sizes = []
    results = seg.stream(camera(), warm_steps=1)
    for i, _ in enumerate(progress_bar(iterable=results, total=count, disable=None)):
        if (i + 1) % max(1, count // 10) == 0:
            gc.collect()
            sizes.append(memory("VmRSS"))
    gained = round(sizes[-1] - sizes[0], 2)
    return {"frames": count, "MiB by tenths": [round(s, 2) for s in sizes], "gained MiB": gained}


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code.

    Raises
    ------
    SdkError : options, libraries or pictures are wrong or missing; the caller prints it.
    """
    parser = Parser("python -m benchmarks stream", description=__doc__)
    parser.add_argument(
        "--frames", type=int, default=36, help="quality: frames of each sequence (%(default)s)"
    )
    parser.add_argument(
        "--scale", type=float, default=0.25, help="quality: scale of the working size (%(default)s)"
    )
    parser.add_argument(
        "--paced", type=int, default=300, help="latency: number of frames (%(default)s)"
    )
    parser.add_argument(
        "--rate", type=float, default=25.0, help="latency: frames per second (%(default)s)"
    )
    parser.add_argument(
        "--memory", type=int, default=10_000, help="memory: number of frames (%(default)s)"
    )
    parser.add_argument("-o", "--out", type=out_path, help="JSON file")
    args = parser.parse_args(argv)
    if min(args.frames, args.paced, args.memory) < 0:
        raise InputError(
            f"frames, paced and memory are {args.frames}, {args.paced} and {args.memory}; wanted "
            "numbers of frames, 0 or more",
            fix="use 0 to leave a part out",
        )
    table.check_out(args.out)
    document: dict[str, Any] = {"environment": environment.describe()}
    if args.frames:
        document["quality"] = quality(args.frames, args.scale)
        print(table.as_markdown(document["quality"]))
    if args.paced:
        clip = datasets.clip_path("sam2_bedroom.mp4")
        document["latency"] = [
            row
            for threads in (1, document["environment"]["threads"])
            for row in latency(clip, args.paced, args.rate, threads)
        ]
        print(table.as_markdown(document["latency"]))
    if args.memory:
        document["memory"] = held(args.memory)
        print(table.as_markdown([document["memory"]]))
    if args.out:
        table.write_json(args.out, document)
    return 0
