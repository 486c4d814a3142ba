"""Segmenter: picture -> prior -> refinement -> guided filter -> result."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

import runtime
from runtime.bundle.engines import BACKENDS
from runtime.bundle.read import Bundle
from runtime.checks import check_count, check_guide, check_positive, on_gpu
from runtime.core.classes import known_shares
from runtime.core.classes_cuda import merge, take, winners
from runtime.core.config import FilterConfig, RefineConfig
from runtime.core.refiner import check_precision, refine_with
from runtime.core.resize import working_picture
from runtime.device.choose import default_threads
from runtime.device.driver import parse_device
from runtime.device.transfer import mark, upload
from runtime.errors import BundleError, EngineMismatch, InputError
from runtime.prior.network import NetworkPrior, as_probabilities
from sdk.image import load_image
from sdk.prior import Prior, make_prior, open_bundle
from sdk.result import FrameInfo, Result

if TYPE_CHECKING:
    from runtime.bundle.open import Refinement
    from sdk.stream import StreamState


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
    min_area : regions under this many pixels join a neighbour. None: 0 when the prior names its
        classes, 0.2 % of the picture when it does not.
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
        bundle = open_bundle(prior)
        if refine == "default":
            refine = bundle.refine() if bundle else RefineConfig()
        if isinstance(refine, str):
            refine = RefineConfig.preset(refine)
        if refine is not None and not isinstance(refine, RefineConfig):
            raise InputError(
                f"refine is a {type(refine).__name__}; wanted a RefineConfig or a name"
            )
        if filter is not None and not isinstance(filter, FilterConfig):
            raise InputError(f"filter is a {type(filter).__name__}; wanted a FilterConfig or None")
        if min_area is not None:
            check_count("min_area", min_area, 0, 2**31)
        if threads is not None:
            check_count("threads", threads, 1, 1024)
        self.refine, self.filter, self.min_area = refine, filter, min_area
        processors = default_threads()
        self.device, self.threads = device, min(threads or processors, processors)
        kind, _ = parse_device(device)
        self._core = device if refine_backend == "native" else "cpu"  # of refinement and filter
        network_only = (
            refine is None and kind == "cuda" and "cuda" not in runtime.device.choose.devices()
        )
        if network_only:
            self._core = "cpu"
        self._precision = precision
        if kind == "cuda" and refine_backend != "native" and precision == "fp16":
            raise InputError(
                "precision 'fp16' is of the native refinement, and none runs here",
                fix="precision='fp32'",
            )
        check_precision(device if network_only else self._core, precision)
        runtime.device.choose.backend(self._core)  # says why it cannot be had
        self._pool: ThreadPoolExecutor | None = None
        self._places, self._pool_lock = threading.BoundedSemaphore(WAITING), threading.Lock()
        self._info: dict[str, Any] = {"device": device, "self_test": None}
        self._refinement: Refinement | None = None
        self._kept = threading.local()
        if bundle is not None:
            self._open(bundle, imgsz, backend, refine_backend, self_test)
        elif backend != "onnx" or refine_backend != "native":
            raise InputError(
                f"backend {backend!r} and refine_backend {refine_backend!r} need a bundle, which "
                "holds the graphs and engines",
                fix="python -m export --model kmeans|segformer|PATH.onnx -o NAME.bundle",
            )
        else:
            self.prior: Prior = make_prior(prior, imgsz=imgsz, threads=self.threads, device=device)
            self._info |= {"prior": self.prior.backend, "refine": self._core_text()}
        if network_only and not isinstance(self.prior, NetworkPrior):
            runtime.device.choose.backend(device)  # nothing runs on the GPU: says why

    def _open(
        self, bundle: Bundle, imgsz: Any, backend: str, refine_backend: str, self_test: str
    ) -> None:
        """Load what was asked for from the bundle, and nothing else."""
        from runtime.bundle import open

        if imgsz is not None:
            raise InputError("imgsz is fixed by the bundle", fix="leave it out, or export again")
        self.prior, loaded = open.open_prior(
            bundle, backend=backend, device=self.device, threads=self.threads
        )
        if refine_backend not in ("native", *BACKENDS):
            raise InputError(
                f"refine_backend is {refine_backend!r}; wanted 'native' or one of {BACKENDS}"
            )
        self._refinement = open.open_refinement(
            bundle,
            backend=refine_backend,
            device=self._core if refine_backend == "native" else self.device,
            threads=self.threads,
            new=self._refiner,
        )
        self._trained = self.refine is not None and open.starts_trained(bundle, self.refine)
        refine_text = self._refinement.text or self._core_text()
        self._info |= {
            "bundle": str(bundle.path),
            "prior": self.prior.backend,
            "engine": loaded.key if loaded else None,
            "precision": bundle.manifest["graphs"].get("prior", {}).get("precision", "fp32"),
            "refine": refine_text,
        }
        run_by = (runtime.__version__, self.device, self.prior.backend, refine_text)
        try:
            self._info["self_test"] = open.self_test(
                bundle, self.prior, self._refinement, when=self_test, run_by=run_by
            )
        except BundleError as error:
            if backend == "onnx" and refine_backend in ("native", "onnx"):
                raise
            raise EngineMismatch(
                str(error), fix="python -m runtime build --force BUNDLE"
            ) from error

    def info(self) -> dict[str, Any]:
        """What runs where: device, prior, refine (backends in words), and for a bundle its path,
        the prior's engine key and precision, and the golden self-test if it ran just now."""
        return dict(self._info)

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
        clock = Clock()
        picture, warnings = load_image(source, color=color)
        clock.lap("decode")
        there, low = self.prepare(picture, clock)
        guide = self.guide(picture, there, low, clock)
        scores, classes, stats = self._scores(low, guide, progress)
        clock.lap("refine")
        return self.finish(picture, there, low, scores, classes, stats, warnings, clock)

    def prepare(self, picture: np.ndarray, clock: Clock) -> tuple[Any, Any]:
        """The picture where refinement and filter run (itself, or a copy on the GPU), and at
        working size, there: (h, w, 3) float32 in [0, 1]."""
        height, width = picture.shape[:2]
        h, w = (self.refine or RefineConfig()).working_size(height, width)
        if self._refinement is not None and self._refinement.size is not None:
            h, w = self._refinement.size
        begin = mark(self._core)
        there = upload(picture, self._core)
        low = working_picture(there, h, w)
        clock.device("preprocess", begin, mark(self._core))
        clock.lap("preprocess")
        return there, low

    def guide(self, picture: np.ndarray, there: Any, low: Any, clock: Clock) -> Any:
        """What the prior says at working size: (h, w, C) float32 probabilities or (h, w) int32
        labels, -1 = unknown. A network on the uploaded picture's GPU takes that, and what it says
        stays there."""
        try:
            kind, index = parse_device(self._core)
            if kind == "cuda" and getattr(self.prior, "gpu", None) == index:
                begin = mark(self._core)
                guide = self.prior.on_gpu(there, low.shape[:2])  # type: ignore[attr-defined]
                clock.device("prior", begin, mark(self._core))
                if on_gpu(guide):
                    return guide
            else:
                guide = self.prior(picture, np.asarray(low))
            return self._checked_guide(np.asarray(guide), low)
        finally:
            clock.lap("prior")

    def _checked_guide(self, guide: np.ndarray, low: Any) -> np.ndarray:
        if guide.ndim not in (2, 3) or guide.size == 0:
            raise InputError(
                f"the prior gave an array of shape {guide.shape}; "
                "wanted (h, w, C) probabilities or (h, w) integer labels"
            )
        guide = as_probabilities(check_guide(guide, *guide.shape[:2]), *low.shape[:2])
        names = self.prior.names
        count = guide.shape[2] if guide.ndim == 3 else int(guide.max()) + 1
        if names is not None and count > len(names):
            raise InputError(f"the prior gave {count} classes, but names only {len(names)}")
        return guide

    def finish(
        self,
        picture: np.ndarray,
        there: Any,
        low: Any,
        scores: Any,
        classes: np.ndarray,
        stats: dict[str, Any],
        warnings: list[str],
        clock: Clock,
        frame: FrameInfo | None = None,
    ) -> Result:
        """Scores at working size to the result: merge columns of a class, lift the rest to the
        uploaded picture, regions."""
        (height, width), (h, w), names = picture.shape[:2], low.shape[:2], self.prior.names
        warnings += [f"{w.output}: {w.message}" for w in _drained(self.prior)]
        if stats["stop_reason"] == "diverged":
            warnings.append("The refinement diverged; the last finite map was kept. Lower lr.")
        scores, classes = _present(scores, classes, names is not None)
        low_image, radius, eps = None, 1, 3e-4
        if self.filter is not None:
            low_image, eps = low, self.filter.eps
            radius = max(1, round(self.filter.radius * (h * w / (height * width)) ** 0.5))
        begin = mark(self._core)
        columns, confidence = runtime.lift(
            there,
            scores,
            low_image=low_image,
            radius=radius,
            eps=eps,
            device=self._core,
            threads=self.threads,
        )
        if self._core != "cpu":
            columns, confidence = np.asarray(columns), np.asarray(confidence)
        clock.device("filter", begin, mark(self._core))
        clock.lap("filter")
        if self._core != "cpu":  # the steps have told theirs
            own = {"refine": stats["device_ms"]} if "device_ms" in stats else {}
            stats["device_ms"] = clock.device_ms | own

        labels = classes.take(columns) if (classes >= 0).all() else columns
        min_area = self.min_area
        if min_area is None:
            min_area = 0 if names is not None else height * width // 500
        regions, labels = runtime.connected_regions(labels, min_area=min_area)
        stats |= {"objective": self.refine.objective if self.refine else None}
        stats |= {"working_size": [h, w], "clusters": len(_distinct(labels))}
        clock.lap("postprocess")
        return Result(
            image=picture,
            labels=labels,
            names=names,
            confidence=confidence,
            regions=regions,
            stats=stats,
            timings=clock.timings(),
            device=self.device,
            backend=f"{self.prior.backend} + {self._refine_text()}",
            warnings=warnings,
            frame=frame,
        )

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
        from sdk.stream import StreamState, segment_stream

        capture = Capture(source, drop=drop, rate=rate, color=color, timeout=timeout)
        check_count("warm_steps", warm_steps, 0, 10**6)
        check_count("cold_steps", cold_steps, 0, 10**6)
        if budget_ms is not None:
            check_positive("budget_ms", budget_ms)
        if state is not None and not isinstance(state, StreamState):
            raise InputError(f"state is a {type(state).__name__}; wanted a StreamState or None")
        return segment_stream(
            self,
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
        own = self._refinement.engines if self._refinement else ()
        engines = (getattr(self.prior, "engine", None), *own)
        if any(getattr(e, "backend", "").startswith("tensorrt") for e in engines):
            raise InputError(
                "a TensorRT engine runs one picture at a time and cannot be shared",
                fix="open the bundle once more: Segmenter(...)",
            )
        other = copy.copy(self)
        other._info, other._pool = dict(self._info), None
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

    def most_classes(self) -> int | None:
        """How many classes a residual refinement can take, where an engine fixes that."""
        for engine in self._refinement.engines if self._refinement else ():
            for port in engine.inputs:
                if port.name == "guide" and isinstance(port.shape[1], int) and port.shape[1] > 0:
                    return int(port.shape[1])
        return None

    def make_refiner(self, height: int, width: int, classes: np.ndarray | None) -> Any:
        """A refiner for pictures of this working size, with the weights that a cold start has."""
        assert self.refine is not None
        self._kept.refiner = None  # the next one is the caller's alone
        if self._refinement is not None:
            made = self._refinement.make(self.refine)(height, width, classes)
        else:
            made = self._make(height, width, classes)
        self._kept.refiner = None
        return made

    def _refiner(
        self, config: RefineConfig, height: int, width: int, classes: int | None
    ) -> runtime.Refiner:
        """A refiner in any state. On a GPU it is this thread's last one, where that fits: a new one
        takes memory and records its steps anew."""
        key = (config, height, width, classes)
        kept = getattr(self._kept, "refiner", None)
        if kept is not None and kept[0] == key:
            return kept[1]
        self._kept.refiner = kept = None  # its memory first
        made = runtime.Refiner(
            height,
            width,
            classes=classes,
            device=self._core,
            precision=self._precision,
            threads=self.threads,
            **config.options(),
        )
        if self._core != "cpu":
            self._kept.refiner = (key, made)
        return made

    def _make(self, height: int, width: int, classes: np.ndarray | None) -> runtime.Refiner:
        assert self.refine is not None
        count = None if classes is None else len(classes)
        return self._refiner(self.refine, height, width, count)

    def _core_text(self) -> str:
        """What computes the native parts, in words."""
        if self._core == "cpu":
            return f"cpu-{runtime.target()}"
        return f"cuda:{parse_device(self._core)[1]} {self._precision}"

    def _refine_text(self) -> str:
        core = self._core_text()
        if self._refinement is None or self._refinement.text is None or self.refine is None:
            return core
        return f"{self._refinement.text} step + {core}"

    def _scores(
        self, low: Any, guide: Any, progress: Callable[[int, int], None] | None
    ) -> tuple[Any, np.ndarray, dict[str, Any]]:
        """Scores at working size, the guide class of each column (-1 = none), and stats."""
        if self.refine is None:
            return *prior_scores(guide), {"steps": 0, "stop_reason": "no refinement"}
        wanted = None if self.refine.objective == "dynaseg" else guide
        make, config, warm = self._make, self.refine, False
        if self._refinement is not None:
            make, warm = self._refinement.make(config), self._trained
        on = self._core != "cpu"
        result = refine_with(make, config, low, wanted, warm=warm, progress=progress, gpu=on)
        classes = result.classes
        if self.prior.names is not None and self.refine.objective != "residual":
            classes = runtime.majority_classes(result.labels, guide, result.scores.shape[2])
        elif self.refine.objective != "residual":
            classes = np.full(result.scores.shape[2], -1, np.int32)  # clusters keep their own ids
        return result.scores, classes, result.stats


def prior_scores(guide: Any) -> tuple[Any, np.ndarray]:
    """The guide's own classes that occur at all: (h, w, K) float32 probabilities, where the guide
    lies, and (K,) int32. UnknownGuide: one on a GPU is zero everywhere, or has NaN."""
    if on_gpu(guide):
        classes = np.flatnonzero(known_shares(guide)).astype(np.int32)
        return take(guide, classes, False), classes
    soft = guide
    if guide.ndim == 2:
        soft = np.eye(guide.max() + 2, guide.max() + 1, dtype=np.float32)[guide]
    classes = np.flatnonzero(soft.any((0, 1))).astype(np.int32)
    return soft[..., classes], classes


def _present(scores: Any, classes: np.ndarray, named: bool) -> tuple[Any, np.ndarray]:
    """The columns that are the best of some pixel; the others cannot win anywhere that matters."""
    if named or (classes >= 0).all():
        scores, classes = _merge_columns(scores, classes)
    if on_gpu(scores):
        found = winners(scores)
        if len(found) < len(classes):
            scores = take(scores, found, False)
        return scores, classes[found]
    found = _distinct(scores.argmax(-1))
    return np.ascontiguousarray(scores[..., found]), classes[found]


def _distinct(labels: np.ndarray) -> np.ndarray:
    """The labels that occur, ascending; they are small, so counting is far faster than sorting."""
    return np.flatnonzero(np.bincount(labels.ravel()))


def _drained(prior: Any) -> list[Any]:
    """Warnings that the prior's engine has noted since the last picture."""
    noted = getattr(getattr(prior, "engine", None), "warnings", None)
    out = list(noted or ())
    if noted:
        noted.clear()
    return out


def _merge_columns(scores: Any, classes: np.ndarray) -> tuple[Any, np.ndarray]:
    """Columns of one class added up; columns without a class (clusters that lie in unknown pixels
    only) dropped."""
    kept = np.unique(classes[classes >= 0])
    if len(kept) == len(classes):
        return scores, classes
    if on_gpu(scores):
        to = np.where(classes >= 0, np.searchsorted(kept, classes), -1)
        return merge(scores, to, len(kept)), kept
    table = (classes[:, None] == kept[None]).astype(np.float32)
    return scores @ table, kept


class Clock:
    """Time by stage, in milliseconds: the wall's, and a GPU's own."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}
        self.device_ms: dict[str, float] = {}

    def device(self, stage: str, begin: Any, end: Any) -> None:
        """``begin`` and ``end`` mark the stage on a GPU's stream; they are None on the CPU."""
        if begin is not None:
            self.device_ms[stage] = begin.until(end)

    def lap(self, stage: str) -> None:
        """The stage is over."""
        now = time.perf_counter()
        self.laps[stage] = (now - self.last) * 1e3
        self.last = now

    def timings(self) -> dict[str, float]:
        total = (time.perf_counter() - self.start) * 1e3
        return self.laps | {"unaccounted": total - sum(self.laps.values()), "total": total}
