"""What the cache of features saves in training, on the CPU.

    python -m benchmarks cache [--data FOLDER] [--size 224] [--crops five] [--batch 32] [-o JSON]

The first table is the time to compute the features of one view: alone, as in training on the CPU,
and in a batch. The second one is the time of a step's features: without a cache, while the cache is
filled, and with a full cache, when the digests of the files are computed and later. Each step reads
other views. The least work is a matrix product with the same multiply-accumulates, and a copy of
the bytes of the features.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import environment, table
from benchmarks.quality.datasets import data_root
from runtime.checks import check_count
from runtime.device.choose import default_threads
from runtime.errors import InputError
from runtime.pictures.files import picture_files
from runtime.tools.cli import Parser, out_path, some_path

if TYPE_CHECKING:
    from export.backbones.base import Backbone
    from export.train.feature_cache import FeatureCache
    from export.train.views import ViewRule

SIDE = 1024  # of the matrices of the product
COPY = 2**26  # bytes of the copy


def multiply_accumulates(module: Any, size: int) -> int:
    """Count the multiply-accumulates of the convolutions for one (3, size, size) view."""
    import torch

    total = 0

    def count(layer: Any, _: Any, out: Any) -> None:
        nonlocal total
        total += out.numel() * layer.weight[0].numel()

    layers = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        module(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return total


def seconds_of(work: Any) -> float:
    """Run a function and return its seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def computing(backbone: Backbone, size: int, batch: int, repeats: int) -> list[dict[str, Any]]:
    """Measure the computation of features alone and together, and the rates of the machine, turn by
    turn. The rows contain medians and all samples."""
    import torch

    macs = multiply_accumulates(backbone.module, size)
    views = torch.rand(batch, 3, size, size)
    one, other = torch.rand(2, SIDE, SIDE)
    source, target = torch.ones(2, COPY // 4)
    works = {
        "alone": lambda: [backbone.module(view[None]) for view in views],
        "together": lambda: backbone.module(views),
        "matmul": lambda: one @ other,
        "copy": lambda: target.copy_(source),
    }
    samples: dict[str, list[float]] = {name: [] for name in works}
    with torch.no_grad():
        for turn in range(repeats + 1):
            for name, work in works.items():
                seconds = seconds_of(work)
                if turn:  # the first turn warms up
                    samples[name].append(seconds)
    medians = {name: float(np.median(values)) for name, values in samples.items()}
    rate = 2 * SIDE**3 / medians["matmul"]
    rows = []
    for name in ("alone", "together"):
        done = 2 * macs * batch / medians[name]
        rows.append(
            {
                "computed": f"alone ({batch} times)" if name == "alone" else f"{batch} together",
                "ms/view": round(1e3 * medians[name] / batch, 2),
                "min": round(1e3 * min(samples[name]) / batch, 2),
                "max": round(1e3 * max(samples[name]) / batch, 2),
                "MMAC/view": round(macs / 1e6),
                "GFLOP/s": round(done / 1e9, 1),
                "of matmul": round(done / rate, 2),
                "seconds": samples[name],
            }
        )
    rows.append({"computed": "matmul", "GFLOP/s": round(rate / 1e9, 1)})
    rows.append({"computed": "copy", "GB/s": round(COPY / medians["copy"] / 1e9, 1)})
    return rows


def steps(
    files: list[Path],
    rule: ViewRule,
    backbone: Backbone,
    batch: int,
    cache: FeatureCache | None,
    epochs: int,
) -> list[float]:
    """Return the seconds of each step; an epoch has as many whole batches as it has views for."""
    from export.train.features import FeatureBatches

    data = FeatureBatches(files, rule, backbone, batch=batch, seed=0, device="cpu", cache=cache)
    count = epochs * (data.views // batch)
    made = data.batches(0, count)
    return [seconds_of(lambda: next(made)) for _ in range(count)]


def caching(
    files: list[Path], rule: ViewRule, backbone: Backbone, batch: int
) -> tuple[list[dict[str, Any]], int]:
    """Measure the steps with and without a cache.

    Returns
    -------
    Rows with medians and all samples, and the bytes of one view in the cache.
    """
    from export.train.feature_cache import FeatureCache

    found = {"none": steps(files, rule, backbone, batch, None, 1)}
    with tempfile.TemporaryDirectory(prefix="dg-") as folder:
        cache = FeatureCache(Path(folder), 2**40)
        epochs = 3
        filled = steps(files, rule, backbone, batch, cache, 1)
        steps(files, rule, backbone, batch, cache, 2)  # the views that were in no whole batch
        warm = steps(files, rule, backbone, batch, cache, epochs)
        sizes = [path.stat().st_size for path in Path(folder).rglob("*.safetensors")]
    first = len(warm) // epochs
    found |= {"filled": filled, "full, first epoch": warm[:first], "full, later": warm[first:]}
    rows = []
    for name, samples in found.items():
        median = float(np.median(samples))
        rows.append(
            {
                "cache": name,
                "ms/batch": round(1e3 * median, 1),
                "min": round(1e3 * min(samples), 1),
                "max": round(1e3 * max(samples), 1),
                "x none": round(float(np.median(found["none"])) / median, 1),
                "seconds": samples,
            }
        )
    return rows, max(sizes)


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code.

    Raises
    ------
    SdkError : options, libraries or pictures are wrong or missing; the caller prints it.
    """
    parser = Parser("python -m benchmarks cache", description=__doc__)
    parser.add_argument("--data", type=some_path, help="pictures (coco_mini of the data set)")
    parser.add_argument("--backbone", default="efficientnet-lite0", help="(%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of a view (%(default)s)")
    parser.add_argument("--crops", default="five", help="centre or five (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="views of a step (%(default)s)")
    parser.add_argument("--threads", type=int, default=default_threads(), help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="number of turns (%(default)s)")
    parser.add_argument("-o", "--out", type=out_path, help="JSON file")
    args = parser.parse_args(argv)
    table.check_out(args.out)
    check_count("repeats", args.repeats, 1, 10**6)
    check_count("threads", args.threads, 1, 1024)
    data = args.data
    if data is None:
        root = data_root()
        if root is None:
            raise InputError("no pictures are named", fix="--data FOLDER, or set SEG_DATA")
        data = root / "coco_mini" / "images"
    files = picture_files([data])

    import torch

    from export.backbones.load import load_backbone
    from export.train.views import ViewRule

    torch.set_num_threads(args.threads)
    rule = ViewRule(size=args.size, crops=args.crops)
    views = len(files) * rule.count
    if not 1 <= args.batch <= views:
        raise InputError(f"batch is {args.batch}; wanted 1 to {views}, the number of views")
    backbone = load_backbone(args.backbone)
    computed = computing(backbone, args.size, args.batch, args.repeats)
    cached, size = caching(files, rule, backbone, args.batch)
    rate, copy = computed[-2]["GFLOP/s"], computed[-1]["GB/s"]
    least = 2e-3 * computed[0]["MMAC/view"] * args.batch / rate
    least_copy = size * args.batch / copy / 1e6
    for rows in (computed, cached):
        shown = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        print(table.as_markdown(shown), end="\n\n")
    print(
        f"{size} bytes per view. The least time of a batch of {args.batch}: {1e3 * least:.0f} ms "
        f"to compute, {least_copy:.1f} ms to copy."
    )
    if args.out:
        document = {"environment": environment.describe(), "computing": computed, "cache": cached}
        table.write_json(args.out, document | {"bytes_per_view": size, "threads": args.threads})
    return 0
