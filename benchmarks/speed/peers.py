"""Peers of the latency benchmark: other programs that do the same work in this process, in turns
with ours."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

import runtime
from runtime.core.classes import frequent_classes, restricted
from runtime.core.parameters import objective_of
from runtime.core.refiner import prepared
from runtime.errors import MissingBackend, VerificationFailed
from runtime.opencv import cv2
from sdk.timing import Clock

TURNS = 3  # fewest turns
PAUSE = 0.02  # seconds before each run, in which busy-waiting threads fall asleep


def in_turns(ours: Callable[[], Any], theirs: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """Measure two functions in turns. In every second turn ours runs first, in the others theirs.

    Parameters
    ----------
    ours, theirs : the functions.
    seconds : the least time of the measurement.

    Returns
    -------
    A row: the median times in milliseconds (nearest rank); the median over the turns of their time
    divided by ours, with a 95 % interval if the turns suffice; the number of turns; all samples in
    milliseconds.
    """
    from benchmarks.latency import samples

    times: list[tuple[float, float]] = []
    ours(), theirs()
    begin = time.perf_counter()
    while len(times) < TURNS or time.perf_counter() - begin < seconds:
        spent = []
        for run in (ours, theirs) if len(times) % 2 else (theirs, ours):
            time.sleep(PAUSE)
            start = time.perf_counter()
            run()
            spent.append(1e3 * (time.perf_counter() - start))
        first, second = spent
        times.append((first, second) if len(times) % 2 else (second, first))
    mine, other = np.array(times).T
    found = samples.estimate(other / mine, 0.5)
    ratio = f"{samples.percentile(other / mine, 0.5):.2f}"
    return {
        "ours p50 ms": round(samples.percentile(mine, 0.5), 2),
        "peer p50 ms": round(samples.percentile(other, 0.5), 2),
        "peer / ours, median of the turns": f"{ratio} [{found.low:.2f}, {found.high:.2f}]"
        if found
        else ratio,
        "turns": len(times),
        "samples": {"ours_ms": mine.tolist(), "peer_ms": other.tolist()},
    }


def check(peer: str) -> None:
    """Check that the package of a peer is installed, before anything is measured.

    Raises
    ------
    MissingBackend : it is not.
    """
    if peer == "torch-eager":
        try:
            import torch  # noqa: F401
        except ImportError as error:
            raise MissingBackend(
                "the peer torch-eager needs PyTorch", fix="pip install 'dynaguide-edge[export]'"
            ) from error
    elif not hasattr(cv2, "ximgproc"):
        raise MissingBackend(
            "this OpenCV has no ximgproc.guidedFilter",
            fix="pip uninstall opencv-python; pip install opencv-contrib-python",
        )


def torch_eager(seg: Any, picture: np.ndarray, seconds: float) -> dict[str, Any]:
    """Compare the refinement alone with eager PyTorch: both have the same objective, steps, guide
    and size.

    Parameters
    ----------
    seg : an sdk.Segmenter that refines.
    picture : (H, W, 3) uint8 RGB.
    seconds : the least time of the measurement.

    Raises
    ------
    VerificationFailed : the first losses of both differ.
    """
    import torch

    from benchmarks.speed.torch_twin import Twin

    config = seg.refine
    torch.set_num_threads(seg.threads)
    run = seg.pipeline
    prepared_picture = run.prepare(picture, Clock())
    guide = np.asarray(run.guide(prepared_picture, Clock())[0].array)
    low = np.asarray(prepared_picture.working)
    classes = None
    objective = objective_of(config)
    if objective.channels_follow_classes:
        classes = frequent_classes(guide)
        guide = restricted(guide, classes)
    wanted = guide if objective.takes_guide else None
    made = run.make_refiner(*low.shape[:2], classes)
    plain = runtime.Refiner(
        *low.shape[:2], classes=None if classes is None else len(classes), **config.options()
    )
    soft, _ = prepared(plain.options, low, wanted, plain.classes)
    twin = Twin(plain.options, plain.state_dict(), low, soft, torch.float32)
    first, other = made.run(low, wanted, steps=1).stats["losses"]["total"][0], twin.step()[0][0]
    if not abs(first - other) <= 1e-3 * max(1.0, abs(first)):
        raise VerificationFailed(
            f"the first losses differ: ours {first:.6g}, PyTorch's {other:.6g}",
            fix="report this with the picture and the options",
        )
    # From step 10 on the mapping of the classes is not solved again: that would be SciPy's time.
    twin.step_count = 10
    steps = int(config.steps)

    def theirs() -> None:
        for _ in range(steps):
            twin.step()
        twin.labels()

    what = f"{config.objective}, {steps} steps at {low.shape[0]}x{low.shape[1]}"
    row = {"peer": f"torch-eager {torch.__version__}", "what": what, "threads": seg.threads}
    return row | in_turns(lambda: made.run(low, wanted, steps=steps), theirs, seconds)


def opencv_guided_filter(seg: Any, picture: np.ndarray, seconds: float) -> dict[str, Any]:
    """Compare the guided filter alone with OpenCV's: colour guidance, radius 8, one map.

    Parameters
    ----------
    seg : an sdk.Segmenter; the filtered map is its confidence for the picture.
    picture : (H, W, 3) uint8 RGB.
    seconds : the least time of the measurement.
    """
    image, values = picture.astype(np.float32) / 255, seg(picture).confidence
    assert hasattr(cv2, "ximgproc")  # see check
    theirs = cv2.ximgproc.guidedFilter
    cv2.setNumThreads(seg.threads)
    height, width = picture.shape[:2]
    row = {"peer": f"opencv-guided-filter {cv2.__version__}", "threads": seg.threads}
    row |= {"what": f"colour guidance, radius 8, 1 plane, {height}x{width}"}
    return row | in_turns(
        lambda: runtime.guided_filter(image, values, radius=8, eps=1e-3, threads=seg.threads),
        lambda: theirs(image, values, 8, 1e-3),
        seconds,
    )


PEERS = {"torch-eager": torch_eager, "opencv-guided-filter": opencv_guided_filter}
