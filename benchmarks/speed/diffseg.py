"""Time and memory of DiffSeg beside the network: attention maps, distances and merging.

    python -m benchmarks diffseg [--grid 64x64] [--heads 8] [--threads 2] [--repeats 5] [-o JSON]

The queries, keys and values of the 16 self-attention layers of Stable Diffusion 1.x are made at
random; neighbours are alike, so that there is something to merge. The network itself is not run,
and random maps say nothing of the quality. "peak MiB" is the largest memory of the process so far,
minus its memory when the queries, keys and values were made; it grows from row to row. "of matmul"
is the rate of a row's matrix products divided by that of the machine's matrix product, the last
row. The attention without maps is that of torch, as the network computes it otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import environment, table
from benchmarks.speed.workloads import MATRIX, memory
from runtime.checks import check_count
from runtime.device.choose import default_threads
from runtime.errors import InputError, VerificationFailed
from runtime.tools.cli import Parser, option, out_path

LAYERS = ((1, 40, 5), (2, 80, 5), (4, 160, 5), (8, 160, 1))  # factor, channels of a head, blocks
THRESHOLD, ROUNDS, ANCHORS = 0.9, 3, 16  # the defaults of DiffSeg
PIXELS = 8  # of the labels, for one cell on each axis


def made_layers(height: int, width: int, heads: int) -> list[Any]:
    """Make the queries, which are the keys as well, of one block of each level.

    Returns
    -------
    (heads, n, d) float32 for each row of LAYERS: smooth random features of the cells.
    """
    import torch

    random = torch.Generator().manual_seed(0)
    made = []
    for factor, channels, _ in LAYERS:
        size = (height // factor, width // factor)
        coarse = torch.randn(heads, channels, 4, 4, generator=random)
        smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
        made.append((3 * smooth).flatten(2).transpose(1, 2).contiguous())
    return made


def measure(height: int, width: int, heads: int, repeats: int) -> list[dict[str, Any]]:
    """Measure each stage ``repeats`` times, after one run that warms up.

    Returns
    -------
    A row for each stage, with all samples in seconds, and one for the machine's matrix product.

    Raises
    ------
    VerificationFailed : the aggregate is no attention map.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from export.guides.attention import AttentionSum, attend
    from export.guides.merging import anchors, distances, mean_maps, merge, refine, suppress

    layers, cells = made_layers(height, width, heads), height * width
    starts = anchors(height, width, ANCHORS)
    pairs = sum(
        blocks * heads * channels * (cells // factor**2) ** 2 for factor, channels, blocks in LAYERS
    )
    least = len(starts) * cells**2  # multiply-accumulates of one product of anchors and maps
    rows: list[dict[str, Any]] = []
    before = memory("VmRSS")

    def stage(name: str, work: Callable[[], Any], macs: int = 0) -> Any:
        result, seconds = work(), []
        for _ in range(repeats):
            result = None  # memory of an old result is not counted
            start = time.perf_counter()
            result = work()
            seconds.append(time.perf_counter() - start)
        row: dict[str, Any] = {"stage": name, "ms": round(1e3 * float(np.median(seconds)), 1)}
        row |= {"min": round(1e3 * min(seconds), 1), "max": round(1e3 * max(seconds), 1)}
        row |= {"GMAC": round(macs / 1e9, 1), "peak MiB": round(memory("VmHWM") - before)}
        rows.append(row | {"seconds": seconds})
        return result

    def without_maps() -> None:
        for (_, _, blocks), query in zip(LAYERS, layers, strict=True):
            for _ in range(blocks):
                scaled_dot_product_attention(query[None], query[None], query[None])

    def with_maps() -> Any:
        total = AttentionSum(height, width)
        for (_, channels, blocks), query in zip(LAYERS, layers, strict=True):
            for _ in range(blocks):
                attend(query, query, query, channels**-0.5, total)
        return total

    stage("attention without maps", without_maps, 2 * pairs)
    total = stage("attention and its sums", with_maps, 2 * pairs)
    maps = stage("aggregation", total.aggregate)
    del total
    error = float((maps.sum(1) - 1).abs().max())
    if not error < 1e-4:
        raise VerificationFailed(
            f"the rows of the aggregate sum to 1 up to {error:g}; wanted 1e-4", fix="report this"
        )
    far = stage("distances of the anchors", lambda: distances(maps[starts], maps), 2 * least)
    near = far < THRESHOLD
    stage("a merging mean", lambda: mean_maps(near, maps), least)
    proposals = stage(
        "the whole merging", lambda: merge(maps, starts, (THRESHOLD,) * ROUNDS), 3 * least
    )
    rows[-1]["segments"] = len(proposals)
    stage("k-means", lambda: refine(maps, proposals))
    size = (PIXELS * height, PIXELS * width)
    stage("labels", lambda: suppress(proposals, (height, width), size))
    one, other = torch.rand(2, MATRIX, MATRIX)
    stage("matmul of the machine", lambda: one @ other, MATRIX**3)
    rate = rows[-1]["GMAC"] / rows[-1]["ms"]
    for row in rows:
        row["of matmul"] = round(row["GMAC"] / row["ms"] / rate, 2) if row["GMAC"] else ""
    return rows


def grid_size(text: str) -> tuple[int, int]:
    """Read "64x64": height and width of the latent grid in cells.

    Raises
    ------
    InputError : it is no such text, or a side is no multiple of 8 from 8 to 256.
    """
    words = text.split("x")
    if len(words) != 2 or not all(word.isdecimal() and len(word) < 4 for word in words):
        raise InputError(f"grid is {text!r}; wanted two numbers, such as 64x64")
    height, width = (check_count("grid", int(word), 8, 256) for word in words)
    if height % 8 or width % 8:
        raise InputError(f"grid is {text}; wanted multiples of 8", fix="--grid 64x64")
    return height, width


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code.

    Raises
    ------
    SdkError : options are wrong, or PyTorch is missing; the caller prints it.
    """
    parser = Parser("python -m benchmarks diffseg", description=__doc__)
    parser.add_argument(
        "--grid",
        type=option(grid_size),
        default="64x64",
        help="cells, for 512 pixels (%(default)s)",
    )
    parser.add_argument("--heads", type=int, default=8, help="of each block (%(default)s)")
    parser.add_argument("--threads", type=int, default=default_threads(), help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of each stage (%(default)s)")
    parser.add_argument("-o", "--out", type=out_path, help="JSON file")
    args = parser.parse_args(argv)
    table.check_out(args.out)
    check_count("heads", args.heads, 1, 64)
    check_count("threads", args.threads, 1, 1024)
    check_count("repeats", args.repeats, 1, 10**6)

    from export.backbones.load import check_torch

    check_torch()
    import torch

    torch.set_num_threads(args.threads)
    with torch.no_grad():
        height, width = args.grid
        rows = measure(height, width, args.heads, args.repeats)
    print(table.as_markdown([{k: v for k, v in row.items() if k != "seconds"} for row in rows]))
    if args.out:
        document = {"environment": environment.describe(), "grid": list(args.grid)}
        table.write_json(
            args.out, document | {"heads": args.heads, "threads": args.threads, "rows": rows}
        )
    return 0
