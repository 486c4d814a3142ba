"""One peer of a benchmark, in a process of its own that :mod:`benchmarks.speed.harness` starts.

    python -m benchmarks.speed.worker '{"peer": "copy", "case": "residual 180x240", "op": "",
    "threads": 1}'

The process prints one JSON line when it is ready (its first loss, or samples of an operation's
output). For each line on stdin it makes one run and prints its seconds. At the end of stdin it
prints its peak memory. No other file imports this one.
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

Run = Callable[[], object]  # one run; if it returns a float, these are its seconds


def ours(case: Case, threads: int, isa: str, inputs: Inputs) -> tuple[Run, float]:
    """The core on one instruction set. A run ends with a forward pass, as every refinement does.

    Parameters, of all functions of PEERS
    ----------
    case : what is refined.
    threads : number of threads.
    isa : the variant that follows the peer's name: here the instruction set.
    inputs : from workloads.picture.

    Returns
    -------
    A function that makes one run, and the first loss (nan for the machine's rates).
    """
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
    step, final = (OnnxEngine(g, name="graph", threads=threads, spin=True) for g in graphs)
    follows = objective_of(o).channels_follow_classes
    made = GraphRefiner(
        step, final, o, height=case.height, width=case.width, classes=CLASSES if follows else None
    )
    guide = soft if follows else labels
    first = made.run(image, guide, steps=1).stats["losses"]["total"][0]
    return lambda: made.run(image, guide, steps=case.steps), first


def torch(case: Case, threads: int, how: str, inputs: Inputs) -> tuple[Run, float]:
    """The refinement of torch_twin.py in float32.

    Parameters
    ----------
    how : "eager", "channels-last" or "compiled", which is channels-last, too; a run of "eager
        steps" does not end with a forward pass.
    """
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
    # From step 10 on the mapping of the classes is not solved again: that would be SciPy's time.
    twin.step_count = 10
    if how == "compiled":
        # Compiled functions replace the module and the method in this object, and step calls them.
        twin.net = pytorch.compile(twin.net)  # type: ignore[assignment]
        twin.losses = pytorch.compile(twin.losses)  # type: ignore[method-assign]

    def run() -> None:
        for _ in range(case.steps):
            twin.step()
        if how != "eager steps":
            twin.labels()

    return run, first


def matmul(case: Case, threads: int, _: str, inputs: Inputs) -> tuple[Run, float]:
    """NumPy's float32 matrix product; the harness has set its threads with OMP_NUM_THREADS."""
    a = np.random.default_rng(0).random((MATRIX, MATRIX), np.float32)
    out = np.empty_like(a)
    return lambda: np.matmul(a, a, out=out), float("nan")


def copy(case: Case, threads: int, _: str, inputs: Inputs) -> tuple[Run, float]:
    """NumPy's copy of COPY bytes, of which each thread copies an equal share."""
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
    """Make one run, free its result and return its seconds."""
    start = time.perf_counter()
    measured = run()
    return measured if isinstance(measured, float) else time.perf_counter() - start


def main() -> int:
    """Make the runs of one peer until stdin ends."""
    order = json.loads(sys.argv[1])
    out = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not mix with the answers

    def answer(**document: Any) -> None:
        print(json.dumps(document), file=out, flush=True)

    name, _, variant = order["peer"].partition(" ")
    # Import the libraries before the memory is read: it is not part of a run's memory.
    if name == "ours":
        import runtime  # noqa: F401
    if name == "onnx":
        from runtime.engines.onnx_runtime import import_onnxruntime

        import_onnxruntime("measure it")
    if name == "torch":
        import torch  # noqa: F401
    case = find_case(order["case"])
    inputs = picture(case.height, case.width)
    before = memory("VmRSS")
    if order["op"] and name not in ("matmul", "copy"):
        from benchmarks.speed.ops import peer

        run: Run
        run, first = peer(order["op"], name.rstrip(","), order["threads"])
    else:
        run, first = PEERS[name](case, order["threads"], variant.split(",")[0], inputs)
    run()  # Two runs fill caches and memory pools, and let compilers finish.
    run()
    answer(first=first)
    for _ in sys.stdin:
        answer(seconds=timed(run))
    answer(peak=memory("VmHWM") - before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
