"""Segmenter: picture -> prior -> refinement -> guided filter -> result."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.bundle.read import Bundle
from runtime.checks import check_count, check_positive
from runtime.core.config import FilterConfig, RefineConfig
from runtime.errors import InputError
from runtime.pictures import load_image
from sdk.pipeline import Pipeline
from sdk.prior import Prior
from sdk.result import Result
from sdk.timing import Clock

if TYPE_CHECKING:
    from sdk.stream_state import StreamState


WORKERS, WAITING = 2, 4  # threads of submit(), and pictures that it takes before it waits


class Segmenter:
    """Segments pictures, each with its own refinement. Keeps no state between pictures.

    Parameters
    ----------
    prior : "kmeans" (embedded default: no model file), a bundle folder, an .onnx file, or a
        callable (H, W, 3) uint8 RGB -> probabilities (h, w, C) or integer labels (h, w),
        -1 = unknown.
    refine : a RefineConfig, the name of one ("residual", "fast", "dynaguide", "dynaguide_code",
        "dynaseg_fsf", "dynaseg_scf"), None: the prior is only lifted, or "default": the bundle's
        own, else "residual".
    filter : a FilterConfig, or None: scores are lifted bilinearly.
    min_area : regions under this many pixels join a neighbour. None: 0.2 % of the picture where
        labels have no meaning as classes (k-means, label maps without names, the published
        objectives without names), else 0, so that poles and pedestrians remain.
    imgsz : the ONNX prior's input size, (height, width) or the long side; None: its metadata's.
    device : "cpu", or "cuda", "cuda:1": where everything runs but k-means, callables and regions.
        With a ``refine_backend`` other than "native", or refine=None where the CUDA module cannot
        be used, only networks and step graphs run on the GPU: :meth:`info` says what runs where.
    precision : of the native refinement on a GPU: "fp32", or "fp16" (tensor cores, compute
        capability 7.5): faster, and labels that differ here and there.
    backend : what runs the prior's network: "onnx" (ONNX Runtime), or the bundle's engine of
        TensorRT ("trt") or TensorRT for RTX ("rtx"). Nothing else is tried.
    refine_backend : "native" (the C++ core), or the bundle's step graph on "onnx", "trt" or "rtx".
    self_test : run a bundle's golden vectors "once" per bundle and device, "always" or "never".
    threads : most threads; all processors when None, and never more than those. The labels do not
        depend on it.

    Raises
    ------
    InputError, BundleError, MissingBackend, DeviceError, EngineMismatch : each names what was
        wrong, and the fix.
    """

    def __init__(
        self,
        prior: str | os.PathLike[str] | Bundle | Callable[[np.ndarray], np.ndarray] = "kmeans",
        *,
        refine: RefineConfig | str | None = "default",
        filter: FilterConfig | None = FilterConfig(),  # noqa: B008 (frozen)
        min_area: int | None = None,
        imgsz: int | tuple[int, int] | None = None,
        device: str = "cpu",
        precision: str = "fp32",
        backend: str = "onnx",
        refine_backend: str = "native",
        self_test: str = "once",
        threads: int | None = None,
    ) -> None:
        self.pipeline = Pipeline(
            prior,
            refine=refine,
            filter=filter,
            min_area=min_area,
            imgsz=imgsz,
            device=device,
            precision=precision,
            backend=backend,
            refine_backend=refine_backend,
            self_test=self_test,
            threads=threads,
        )
        self._pool: ThreadPoolExecutor | None = None
        self._places, self._pool_lock = threading.BoundedSemaphore(WAITING), threading.Lock()

    @property
    def prior(self) -> Prior:
        """What gives the first segmentation."""
        return self.pipeline.prior

    @property
    def refine(self) -> RefineConfig | None:
        """How pictures are refined."""
        return self.pipeline.refine

    @property
    def filter(self) -> FilterConfig | None:
        """The guided filter; None: scores are interpolated bilinearly."""
        return self.pipeline.filter

    @property
    def min_area(self) -> int | None:
        """Regions under this many pixels join a neighbour."""
        return self.pipeline.min_area

    @property
    def device(self) -> str:
        """What was asked for: "cpu", "cuda", "cuda:1"."""
        return self.pipeline.device

    @property
    def threads(self) -> int:
        """Most threads of the CPU."""
        return self.pipeline.threads

    def info(self) -> dict[str, Any]:
        """What runs where: device, prior, refine (backends in words), and for a bundle its path,
        the prior's engine key and precision, and the golden self-test if it ran just now."""
        return dict(self.pipeline.info)

    def __call__(
        self,
        source: Any,
        *,
        color: str = "rgb",
        progress: Callable[[int, int], None] | None = None,
    ) -> Result:
        """Segment one picture.

        Parameters
        ----------
        source : path, bytes of an encoded picture, or (H, W, 3) uint8 array.
        color : channel order of an array: "rgb", or "bgr" for OpenCV frames.
        progress : called as progress(done, steps) after each refinement step.
        """
        run, clock = self.pipeline, Clock()
        pixels, warnings = load_image(source, color=color)
        clock.lap("decode")
        picture = run.prepare(pixels, clock)
        guide, semantic = run.guide(picture, clock)
        scored = run.scores(picture, guide, progress)
        clock.lap("refine")
        return run.finish(picture, scored, warnings, clock, semantic=semantic)

    def stream(
        self,
        source: Any,
        *,
        warm_steps: int = 2,
        cold_steps: int = 10,
        budget_ms: float | None = None,
        rate: float | None = None,
        drop: str | None = None,
        color: str = "rgb",
        timeout: float = 10.0,
        state: StreamState | None = None,
    ) -> Generator[Result, None, None]:
        """Segment the frames of a stream; each one's refinement starts where the last one's ended.

        Parameters
        ----------
        source : a video file, a camera's number, a folder of pictures, a URL or GStreamer pipeline
            that OpenCV opens, or an iterable of pictures (paths, bytes, (H, W, 3) uint8 arrays);
            an iterable is advanced by a thread of the stream's.
        warm_steps : refinement steps of a frame.
        cold_steps : of the first frame, and after a cut.
        budget_ms : of a frame, from when it is taken up to its result. Fewer steps are made where
            the time does not suffice; it is exceeded by at most one step (and by a prior, a filter
            and regions that take longer by themselves). Cold steps that do not fit are made up for
            in the next frames.
        rate : frames a second: files are played at it, cameras thinned out to it.
        drop : "oldest" keeps only the newest frame while one is being segmented, "none" makes the
            source wait. None: "oldest" for cameras, URLs, pipelines, and where rate is given.
        color : channel order of an iterable's arrays: "rgb", or "bgr" for OpenCV frames.
        timeout : seconds without a frame after which the source counts as stalled.
        state : to go on from, and updated with each frame; a new one when None.

        Returns
        -------
        A generator of results whose ``frame`` says index, time, dropped frames, cold or warm start,
        and events; ``stats`` has the steps done and why they ended. Closing it releases the source.

        Raises
        ------
        InputError : an option out of range, or later: a source that cannot be opened, stalls, or
            has ten unreadable frames in a row.
        """
        from sdk.capture import Capture
        from sdk.stream import segment_stream
        from sdk.stream_state import StreamState

        capture = Capture(source, drop=drop, rate=rate, color=color, timeout=timeout)
        check_count("warm_steps", warm_steps, 0, 10**6)
        check_count("cold_steps", cold_steps, 0, 10**6)
        if budget_ms is not None:
            check_positive("budget_ms", budget_ms)
        if state is not None and not isinstance(state, StreamState):
            raise InputError(f"state is a {type(state).__name__}; wanted a StreamState or None")
        return segment_stream(
            self.pipeline,
            capture,
            StreamState() if state is None else state,
            warm_steps=warm_steps,
            cold_steps=cold_steps,
            budget_ms=budget_ms,
        )

    def clone(self) -> Segmenter:
        """An independent worker for another thread or stream: it shares the loaded prior.

        Raises
        ------
        InputError : an engine of TensorRT, which runs one picture at a time.
        """
        other = copy.copy(self)
        other.pipeline, other._pool = self.pipeline.clone(), None
        other._places, other._pool_lock = threading.BoundedSemaphore(WAITING), threading.Lock()
        return other

    def submit(self, source: Any, *, color: str = "rgb") -> Future[Result]:
        """Segment in another thread: a future of what ``self(source, color=color)`` gives. Waits
        while WAITING pictures are on their way; an array must not change before the result is
        there. Two pictures are worked on at a time."""
        worker = self.clone()  # says what cannot be shared
        self._places.acquire()
        future = None
        try:
            with self._pool_lock:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="segment")
                future = self._pool.submit(worker, source, color=color)
        finally:
            if future is None:
                self._places.release()
        future.add_done_callback(lambda _: self._places.release())
        return future

    def close(self) -> None:
        """Wait for the pictures submitted, and end the threads."""
        with self._pool_lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
