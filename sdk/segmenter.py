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
    """Segments pictures, each with a refinement of its own. It keeps no state between pictures.

    Parameters
    ----------
    prior : "kmeans" (embedded default: no model file), a bundle folder, an .onnx file, or a
        callable (H, W, 3) uint8 RGB -> probabilities (h, w, C) or integer labels (h, w),
        -1 = unknown.
    refine : a RefineConfig, the name of one ("residual", "fast", "dynaguide", "dynaguide_code",
        "dynaseg_fsf", "dynaseg_scf"), None: the prior is only upsampled, or "default": the
        bundle's own, else "residual".
    filter : a FilterConfig, or None: scores are upsampled bilinearly.
    min_area : regions under this many pixels join a neighbour. None: 0.2 % of the picture where
        labels have no meaning as classes (k-means, label maps without names, the published
        objectives without names), else 0, so that poles and pedestrians remain.
    imgsz : the ONNX prior's input size, (height, width) or the long side; None: its metadata's.
    device : "cpu", or "cuda", "cuda:1": all stages but k-means, callables and regions run on it.
        With a ``refine_backend`` other than "native", or refine=None where the CUDA module cannot
        be used, only networks and step graphs run on the GPU: :meth:`info` says what runs where.
    precision : of the native refinement on a GPU: "fp32", or "fp16" (tensor cores, compute
        capability 7.5): faster, and some labels differ.
    backend : which library runs the prior's network: "onnx" (ONNX Runtime), or with the bundle's
        engine TensorRT ("trt") or TensorRT for RTX ("rtx"). No other one is tried.
    refine_backend : "native" (the C++ core), or the bundle's step graph on "onnx", "trt" or "rtx".
    self_test : run a bundle's golden vectors "once" per bundle and device, "always" or "never".
    threads : most threads; all processors when None, and never more than those. The labels do not
        depend on it.

    Raises
    ------
    InputError : an argument is wrong, or arguments do not fit together.
    BundleError : the bundle or .onnx file is damaged, or fails its golden vectors.
    MissingBackend : a library, driver or GPU is missing.
    DeviceError : the GPU cannot be used.
    EngineMismatch : no engine of the bundle fits this device.

    Example
    -------
    >>> result = Segmenter("kmeans", refine="fast")("street.jpg")
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
        """The prior, which makes the first segmentation."""
        return self.pipeline.prior

    @property
    def refine(self) -> RefineConfig | None:
        """The settings of the refinement; None: the prior is only upsampled."""
        return self.pipeline.refine

    @property
    def filter(self) -> FilterConfig | None:
        """The guided filter; None: scores are interpolated bilinearly."""
        return self.pipeline.filter

    @property
    def min_area(self) -> int | None:
        """Regions under this many pixels join a neighbour; None: see the argument."""
        return self.pipeline.min_area

    @property
    def device(self) -> str:
        """The argument: "cpu", "cuda", "cuda:1"."""
        return self.pipeline.device

    @property
    def threads(self) -> int:
        """Most threads of the CPU."""
        return self.pipeline.threads

    def info(self) -> dict[str, Any]:
        """What runs where, as a dict: device, prior and refine (backends in words), self_test (the
        results of the golden vectors if they ran now, else None), and for a bundle its path and the
        prior's engine key and precision."""
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

        Returns
        -------
        A :class:`Result`: labels (H, W) int32, confidence (H, W) float32, segments, timings in ms.

        Raises
        ------
        InputError : a file that cannot be read or is no picture, an array of another shape or
            dtype, or a prior that returned something else than a guide.
        BundleError : the network's output is not what its file promises.
        DeviceError : the GPU fails, or its memory is full.

        Example
        -------
        >>> labels = Segmenter()("street.jpg").labels
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
        """Segment the frames of a stream. The refinement of a frame starts from the weights of the
        frame before.

        Parameters
        ----------
        source : a video file, a camera's number, a folder of pictures, a URL or GStreamer pipeline
            that OpenCV opens, or an iterable of pictures (paths, bytes, (H, W, 3) uint8 arrays),
            which a thread of the stream reads.
        warm_steps : refinement steps of a frame.
        cold_steps : refinement steps of the first frame, and of a frame after a cut.
        budget_ms : milliseconds for a frame, from the start of its segmentation to its result.
            Fewer steps are computed where the time is too short. It is exceeded by at most one step
            (or more where prior, filter and regions alone take longer). Cold steps that do not fit
            are computed in the next frames.
        rate : frames a second: files are played at this rate, and of a camera's frames some are
            left out.
        drop : "oldest" keeps only the newest frame while one is being segmented, "none" makes the
            source wait. None: "oldest" for cameras, URLs and pipelines, and where rate is given.
        color : channel order of an iterable's arrays: "rgb", or "bgr" for OpenCV frames.
        timeout : seconds without a frame after which the source counts as stalled.
        state : a StreamState to continue from, which each frame updates; a new one when None.

        Returns
        -------
        A generator of results. ``frame`` of a result has index, time, dropped frames, cold or warm
        start, and events; ``stats`` has the steps and the reason why they ended. Closing the
        generator releases the source.

        Raises
        ------
        InputError : an option out of range, or later: a source that cannot be opened, stalls, or
            has ten unreadable frames in a row.

        Example
        -------
        >>> for result in Segmenter().stream("cam.mp4", budget_ms=33): ...
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
        """A Segmenter for another thread or stream, which shares the loaded prior.

        Raises
        ------
        InputError : an engine of TensorRT, which runs one picture at a time.

        Example
        -------
        >>> worker = Segmenter("prior.onnx").clone()
        """
        other = copy.copy(self)
        other.pipeline, other._pool = self.pipeline.clone(), None
        other._places, other._pool_lock = threading.BoundedSemaphore(WAITING), threading.Lock()
        return other

    def submit(self, source: Any, *, color: str = "rgb") -> Future[Result]:
        """Segment in another thread, two pictures at a time.

        The call waits while four pictures are queued or being segmented. An array must not change
        before its result is complete.

        Returns
        -------
        A Future of the result of ``self(source, color=color)``.

        Raises
        ------
        InputError : an engine of TensorRT, which runs one picture at a time.

        Example
        -------
        >>> labels = Segmenter().submit("street.jpg").result().labels
        """
        worker = self.clone()
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
        """Wait for the submitted pictures, and end the threads."""
        with self._pool_lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
