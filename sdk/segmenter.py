"""Segmenter: picture -> prior -> refinement -> guided filter or dense CRF -> result."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.bundle.read import Bundle
from runtime.checks import check_count, check_positive
from runtime.core.config import CrfConfig, FilterConfig, RefineConfig
from runtime.errors import DeviceError, InputError
from runtime.pictures.load import load_image, path_of
from sdk.pipeline import Pipeline
from sdk.prior import Prior
from sdk.result import Result
from sdk.timing import Clock

if TYPE_CHECKING:
    from sdk.stream_state import StreamState


WORKERS, WAITING = 2, 4  # threads of submit(); unfinished pictures at which submit() waits


class Segmenter:
    """Segments pictures, and refines each of them. A Segmenter keeps no state between pictures.

    pickle and copy.deepcopy make a new Segmenter from the arguments, which opens the files of the
    prior again; the pictures of ``submit`` remain with the old one. A relative path is stored as an
    absolute one, because another process may have another current folder. A callable prior must be
    picklable: pickle refuses a lambda and a function that is defined inside another; cloudpickle,
    which Ray uses, accepts both. Only the same version of this package can load a pickle.

    Numbers may be Python's or NumPy's, and a size may be a tuple, a list or an array of NumPy. A
    float is not a whole number, not even 512.0; True and False are not numbers.

    Parameters
    ----------
    prior : "kmeans", which needs no model file; a bundle folder; an .onnx file; a folder of masks,
        for pictures with paths only (see :class:`MasksPrior`); or a callable (H, W, 3) uint8 RGB ->
        probabilities (h, w, C) or integer labels (h, w) with -1 = unknown.
        The callable gets a copy of the picture. It may have two attributes: ``names`` lists the
        names of the classes, and ``unknown`` is a label that means unknown, such as 255.
    refine : a RefineConfig, or the name of one: "residual", "fast", "dynaguide", "dynaguide_code",
        "dynaseg_fsf" or "dynaseg_scf". "default" is the bundle's setting, or "residual" without a
        bundle. None: no refinement, the prior's scores are only upsampled.
    filter : a FilterConfig, the guided filter; a CrfConfig, the dense CRF, to which the scores at
        working size are passed as probabilities: the refinement's soft-max for every objective, or
        the prior's probabilities without a refinement, without classes that are the most probable
        at no pixel and above 0.1 at none; None: scores are upsampled bilinearly.
    min_area : regions of fewer pixels are merged into a neighbour. None is 0.2 % of the picture if
        labels have no meaning as classes (k-means, label maps without names, dynaguide and dynaseg
        without names), else 0, so that poles and pedestrians remain.
    imgsz : the ONNX prior's input size, (height, width) or the long side; None: its metadata's.
    device : "cpu"; or "cuda", "cuda:1": all stages but decoding, k-means, callables, the dense CRF
        and regions run on this GPU. With another ``refine_backend`` than "native", or with
        refine=None if the CUDA module cannot be used, only networks and step graphs run on the GPU;
        see :meth:`info`.
    precision : of the native refinement on a GPU: "fp32", or "fp16" (tensor cores of compute
        capability 7.5 or later), which is faster and changes some labels.
    backend : what runs the prior's network: "onnx" (ONNX Runtime), or for a bundle that has an
        engine for this GPU "trt" (TensorRT) or "rtx" (TensorRT for RTX). No other one is tried.
    refine_backend : "native" (our own code), or the bundle's step graph on "onnx", "trt" or "rtx".
    self_test : run a bundle's golden vectors "once" for each bundle, device and backend, "always"
        or "never".
    threads : most threads of the CPU; None, or a larger number, is all processors. The labels do
        not depend on it.

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
        filter: FilterConfig | CrfConfig | None = FilterConfig(),  # noqa: B008 (frozen)
        min_area: int | None = None,
        imgsz: int | Sequence[int] | np.ndarray | None = None,
        device: str = "cpu",
        precision: str = "fp32",
        backend: str = "onnx",
        refine_backend: str = "native",
        self_test: str = "once",
        threads: int | None = None,
    ) -> None:
        options: dict[str, Any] = {
            "refine": refine,
            "filter": filter,
            "min_area": min_area,
            "imgsz": imgsz,
            "device": device,
            "precision": precision,
            "backend": backend,
            "refine_backend": refine_backend,
            "self_test": self_test,
            "threads": threads,
        }
        self.pipeline = Pipeline(prior, **options)
        self._arguments = _absolute(prior), options
        self._pool: ThreadPoolExecutor | None = None
        self._places, self._pool_lock = threading.BoundedSemaphore(WAITING), threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how pickle and copy.deepcopy make a Segmenter: from the arguments of this one."""
        prior, options = self._arguments
        return partial(type(self), **options), (prior,)

    def __copy__(self) -> Segmenter:
        return self.clone()

    @property
    def prior(self) -> Prior:
        """The prior, which computes the first segmentation."""
        return self.pipeline.prior

    @property
    def refine(self) -> RefineConfig | None:
        """The settings of the refinement; None: no refinement."""
        return self.pipeline.refine

    @property
    def filter(self) -> FilterConfig | CrfConfig | None:
        """The settings of the guided filter or the dense CRF; None: scores are upsampled
        bilinearly."""
        return self.pipeline.filter

    @property
    def min_area(self) -> int | None:
        """The argument: regions of fewer pixels are merged into a neighbour."""
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
        """Return what runs where, as a dict.

        Returns
        -------
        "device"; "prior", "refine" and "filter", the backends in words; "start", the weights that a
        refinement starts from: "cold", the initial ones, or "trained", a bundle's, or None without
        a refinement; "self_test", what the golden vectors measured if they ran for this Segmenter,
        else None. For a bundle also "bundle", its path, and "engine" and "precision", the prior's
        engine key and precision.
        """
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
        source : a path; the bytes of an encoded picture, or a file object that returns them; a
            picture of PIL, as PIL shows it, without its EXIF orientation; or an array, (H, W, 3)
            uint8, or grey (H, W) or (H, W, 1) uint8, which is copied to the three channels. A
            tensor on the CPU is an array.
        color : channel order of an array: "rgb", or "bgr" for OpenCV frames.
        progress : called as progress(done, steps) after each refinement step.

        Returns
        -------
        A :class:`Result`: labels (H, W) int32, confidence (H, W) float32, segments, timings in ms.

        Raises
        ------
        InputError : the file cannot be read or is no picture, the array has another shape or dtype,
            or the result of the prior is no guide.
        BundleError : the output of the prior's network has another form than its file states, or is
            not finite.
        DeviceError : the GPU fails, or its memory is full.

        Example
        -------
        >>> labels = Segmenter()("street.jpg").labels
        """
        run, clock = self.pipeline, Clock()
        pixels, warnings = load_image(source, color=color)
        clock.lap("decode")
        picture = run.prepare(pixels, clock, path_of(source))
        guide, semantic = run.guide(picture, clock)
        scored = run.scores(picture, guide, progress)
        clock.lap("refine")
        return run.finish(picture, scored, warnings, clock, semantic=semantic)

    def stream(
        self,
        source: Any,
        *,
        warm_steps: int | None = None,
        cold_steps: int | None = None,
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
            that OpenCV opens, or an iterable of pictures, each of which may be any ``source`` of a
            call, such as a path or an array. A thread of the stream reads it.
        warm_steps : refinement steps of a frame that starts from the weights of the frame before.
            None: 2; with trained weights of a bundle at most the steps of the Segmenter's
            ``refine``.
        cold_steps : refinement steps of a frame that starts anew: the first one, and one after a
            cut or a change of size. None: 10; if the frame starts from trained weights of a bundle,
            the steps of the Segmenter's ``refine``, which may be 0.
        budget_ms : milliseconds for a frame, from the start of its segmentation to its result. If
            the time is too short, fewer steps are computed; a frame exceeds the budget by at most
            one step, or by more if prior, filter and regions alone need more. Cold steps that do
            not fit are computed in the next frames.
        rate : frames per second. Files are played at this rate; of a camera, URL or pipeline,
            surplus frames are left out.
        drop : "oldest" keeps only the newest frame while one is being segmented, "none" makes the
            source wait. None: "oldest" for cameras, URLs and pipelines, and with ``rate``.
        color : channel order of an iterable's arrays: "rgb", or "bgr" for OpenCV frames.
        timeout : seconds without a frame after which the source counts as stalled.
        state : a StreamState to continue from, which each frame updates; a new one when None.

        Returns
        -------
        A generator of results, whose ``frame`` is a :class:`FrameInfo`. Closing the generator
        releases the source.

        Raises
        ------
        InputError : an option is out of range, or the source does not exist. In the iteration:
            another stream uses the state, or the state is of another prior or network or continues
            other trained weights; the source cannot be opened, stalls, or has ten unreadable frames
            in a row.
        BundleError, DeviceError : in the iteration, as for a single picture.

        Example
        -------
        >>> for result in Segmenter().stream("cam.mp4", budget_ms=33): ...
        """
        from sdk.capture import Capture
        from sdk.stream import segment_stream
        from sdk.stream_state import StreamState

        capture = Capture(source, drop=drop, rate=rate, color=color, timeout=timeout)
        for name, steps in (("warm_steps", warm_steps), ("cold_steps", cold_steps)):
            if steps is not None:
                check_count(name, steps, 0, 10**6)
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
        """Return a Segmenter for another thread or stream, which shares the loaded prior. copy.copy
        does the same.

        Raises
        ------
        InputError : this Segmenter has an engine of TensorRT, which runs one picture at a time.

        Example
        -------
        >>> worker = Segmenter("prior.onnx").clone()
        """
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other.pipeline, other._pool = self.pipeline.clone(), None
        other._places, other._pool_lock = threading.BoundedSemaphore(WAITING), threading.Lock()
        return other

    def submit(self, source: Any, *, color: str = "rgb") -> Future[Result]:
        """Segment in another thread, two pictures at a time.

        The call waits while four pictures are queued or being segmented. Do not change an array
        before its result is complete.

        Returns
        -------
        A Future of the result of ``self(source, color=color)``.

        Raises
        ------
        InputError : this Segmenter has an engine of TensorRT, which runs one picture at a time.
        DeviceError : the operating system starts no further thread, or Python is about to end. All
            other exceptions are raised by ``result()`` of the Future.

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
        except RuntimeError as error:
            raise DeviceError(
                f"no thread can be started for the picture: {error}",
                fix="segment it in this thread, seg(picture); or allow more threads: ulimit -u",
            ) from error
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


def _absolute(prior: Any) -> Any:
    """Return the argument ``prior`` with an absolute path, if it is or contains a path."""
    if isinstance(prior, Bundle):
        return prior._replace(path=prior.path.absolute())
    if isinstance(prior, (str, os.PathLike)) and prior != "kmeans":
        return Path(prior).absolute()
    return prior
