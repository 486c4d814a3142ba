"""One peer of a benchmark in a process of its own, which :mod:`benchmarks.speed.harness` starts.

    python -m benchmarks.speed.worker '{"peer": "copy", "case": "residual 180x240", "threads": 1}'

Prints one JSON line when ready (with its first loss, or samples of an operation's output), one for
each line on stdin (seconds of a run), and one at the end of stdin (peak memory). No module imports
this one.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.speed.workloads import (
    CLASSES,
    COPY,
    MATRIX,
    Case,
    Inputs,
    find_case,
    memory,
    picture,
    refiner,
)
from runtime.core.parameters import objective_of

Run = Callable[[], float | None]  # the seconds, where it measures them itself


def ours(case: Case, threads: int, isa: str, inputs: Inputs) -> tuple[Run, float]:
    """The core on one instruction set. A run ends with one more forward pass, as users' runs do."""
    image, labels, soft = inputs
    made = refiner(case, threads=threads, isa=isa)
    guide = soft if objective_of(made.options).takes_soft_guide else labels
    first = made.run(image, guide, steps=1).stats["losses"]["total"][0]
    return lambda: made.run(image, guide, steps=case.steps), first


def onnx(case: Case, threads: int, _: str, inputs: Inputs) -> tuple[Run, float]:
    """The step as one ONNX graph, on ONNX Runtime's CPU provider."""
    from export.refine_step import build_map, build_step
    from runtime.engines.graph_refiner import GraphRefiner
    from runtime.engines.onnx import OnnxEngine

    image, labels, soft = inputs
    o = refiner(case).options
    graphs = (build_step(o).SerializeToString(), build_map(o).SerializeToString())
    step, final = (OnnxEngine(g, name="graph", threads=threads, awake=True) for g in graphs)
    follows = objective_of(o).channels_follow_classes
    made = GraphRefiner(
        step, final, o, height=case.height, width=case.width, classes=CLASSES if follows else None
    )
    guide = soft if follows else labels
    first = made.run(image, guide, steps=1).stats["losses"]["total"][0]
    return lambda: made.run(image, guide, steps=case.steps), first


def torch(case: Case, threads: int, how: str, inputs: Inputs) -> tuple[Run, float]:
    """The twin in torch_twin.py, float32: "eager", "channels-last" or "compiled"; "eager
    steps" leaves the last forward pass of a run out."""
    import torch as pytorch

    from benchmarks.speed.torch_twin import Twin

    pytorch.set_num_threads(threads)
    image, labels, soft = inputs
    plain = refiner(case)
    follows = objective_of(plain.options).channels_follow_classes
    twin = Twin(
        plain.options,
        plain.state_dict(),
        image,
        soft if follows else labels,
        pytorch.float32,
        channels_last=not how.startswith("eager"),
    )
    first = twin.step()[0][0]
    twin.step_count = 10  # the mapping is frozen: solving it is SciPy's time, not PyTorch's
    if how == "compiled":
        twin.net = pytorch.compile(twin.net)
        twin.losses = pytorch.compile(twin.losses)

    def run() -> None:
        for _ in range(case.steps):
            twin.step()
        if how != "eager steps":
            twin.labels()

    return run, first


def matmul(case: Case, threads: int, _: str, inputs: Inputs) -> tuple[Run, float]:
    """NumPy's float32 matrix product; the caller has set its threads."""
    a = np.random.default_rng(0).random((MATRIX, MATRIX), np.float32)
    out = np.empty_like(a)
    return lambda: np.matmul(a, a, out=out), float("nan")


def copy(case: Case, threads: int, _: str, inputs: Inputs) -> tuple[Run, float]:
    """NumPy's copy, an equal share on each thread."""
    source = np.ones(COPY // 4, np.float32)
    parts = zip(*(np.array_split(a, threads) for a in (np.empty_like(source), source)), strict=True)
    pairs = list(parts)

    def run() -> None:
        workers = [threading.Thread(target=np.copyto, args=pair) for pair in pairs]
        for w in workers:
            w.start()
        for w in workers:
            w.join()

    return run, float("nan")


PEERS = {"ours": ours, "torch": torch, "onnx": onnx, "matmul": matmul, "copy": copy}


def timed(run: Run) -> float:
    """Seconds of a run, whose result is gone before the next one."""
    start = time.perf_counter()
    measured = run()
    return measured if isinstance(measured, float) else time.perf_counter() - start


def main() -> int:
    """Serve one peer until stdin ends."""
    what = json.loads(sys.argv[1])
    out = sys.stdout
    sys.stdout = sys.stderr  # a library's chatter is no answer

    def tell(**document: Any) -> None:
        print(json.dumps(document), file=out, flush=True)

    name, _, variant = what["peer"].partition(" ")
    if name == "ours":  # libraries are no part of a run's memory
        import runtime  # noqa: F401
    if name == "onnx":
        import onnxruntime  # noqa: F401
    if name == "torch":
        import torch  # noqa: F401
    case = find_case(what["case"])
    inputs = picture(case.height, case.width)
    before = memory("VmRSS")
    if what["op"] and name not in ("matmul", "copy"):
        from benchmarks.speed.ops import peer

        run, first = peer(what["op"], name.rstrip(","), what["threads"])
    else:
        run, first = PEERS[name](case, what["threads"], variant.split(",")[0], inputs)
    run()  # warm: caches, compilers, pools
    run()
    tell(first=first)
    for _ in sys.stdin:
        tell(seconds=timed(run))
    tell(peak=memory("VmHWM") - before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
