"""The stages of a picture: working size, prior, refinement, joint upsampling, regions, result."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import runtime
from runtime.bundle.engines import BACKENDS
from runtime.bundle.read import Bundle
from runtime.checks import check_count, check_guide
from runtime.core.classes import (
    majority_classes,
    merge_columns,
    prior_scores,
    winning_columns,
)
from runtime.core.config import CrfConfig, FilterConfig, RefineConfig
from runtime.core.guide import Guide
from runtime.core.parameters import objective_of
from runtime.core.refiner import check_precision, refine_with
from runtime.core.resize import working_picture
from runtime.device import choose
from runtime.device.driver import parse_device
from runtime.device.transfer import record_event, upload
from runtime.errors import BundleError, DeviceError, EngineMismatch, InputError, MissingBackend
from runtime.prior.kmeans import KMeansPrior
from runtime.prior.masks import MasksPrior
from runtime.prior.network import NetworkPrior, as_probabilities
from sdk.crf import crf_upsample
from sdk.prior import CallablePrior, Prior, make_prior, open_bundle
from sdk.result import FrameInfo, Result
from sdk.timing import Clock

if TYPE_CHECKING:
    from runtime.bundle.open import BundleRefinement


@dataclass(frozen=True)
class Picture:
    """One picture in the three forms that the stages take.

    Attributes
    ----------
    pixels : (H, W, 3) uint8 RGB on the host.
    uploaded : the same on the device of refinement and filter: on the CPU ``pixels`` itself, on a
        GPU an array of the CUDA module.
    working : (h, w, 3) float32 RGB in [0, 1], the picture at working size, on the same device.
    path : of the picture's file; None if it has none. A folder of masks is searched for it.
    notes : sentences for the warnings of the result, which the stages append.
    """

    pixels: np.ndarray
    uploaded: Any
    working: Any
    path: Path | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Scored:
    """The scores at working size, of a refinement or of the prior alone.

    Attributes
    ----------
    scores : (h, w, K) float32 probabilities, on the host or on a GPU.
    classes : (K,) int32, the class of each column; -1 = a cluster without a class.
    stats : of the refinement, see :class:`runtime.Refinement`.
    labels : (h, w) int32, the arg max of ``scores`` where it has been computed, else None.
    """

    scores: Any
    classes: np.ndarray
    stats: dict[str, Any]
    labels: Any = None

    def columns(self, *, merge: bool) -> tuple[Any, np.ndarray]:
        """Return the scores and the class of each column. With ``merge``, or if all columns have a
        class, the columns of the same class are added up."""
        if merge or (self.classes >= 0).all():
            return merge_columns(self.scores, self.classes)
        return self.scores, self.classes

    def winning_columns(self, *, merge: bool) -> tuple[Any, np.ndarray]:
        """Return those of :meth:`columns` that are the largest at some pixel."""
        scores, classes = self.columns(merge=merge)
        return winning_columns(scores, classes, self.labels if scores is self.scores else None)


class Pipeline:
    """The stages of a segmentation, with the networks and the bundle that they need. A pipeline
    keeps no state between pictures. Arguments: see :class:`sdk.Segmenter`, which has the defaults.

    Raises
    ------
    InputError, BundleError, MissingBackend, DeviceError, EngineMismatch : as for Segmenter.
    """

    def __init__(
        self,
        prior: str | os.PathLike[str] | Bundle | Callable[[np.ndarray], np.ndarray],
        *,
        refine: RefineConfig | str | None,
        filter: FilterConfig | CrfConfig | None,
        min_area: int | None,
        imgsz: Any,
        device: str,
        precision: str,
        backend: str,
        refine_backend: str,
        self_test: str,
        threads: int | None,
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
        if filter is not None and not isinstance(filter, (FilterConfig, CrfConfig)):
            raise InputError(
                f"filter is a {type(filter).__name__}; wanted a FilterConfig, a CrfConfig or None"
            )
        if min_area is not None:
            min_area = check_count("min_area", min_area, 0, 2**31)
        if threads is not None:
            threads = check_count("threads", threads, 1, 1024)
        self.refine, self.filter, self.min_area = refine, filter, min_area
        processors = choose.default_threads()
        self.device, self.threads = device, min(threads or processors, processors)
        kind, _ = parse_device(device)
        self._core = device if refine_backend == "native" else "cpu"
        # Without the CUDA module, a GPU can run only the prior's network, on ONNX Runtime or
        # TensorRT.
        network_only = refine is None and kind == "cuda" and "cuda" not in choose.devices()
        if network_only:
            self._core = "cpu"
        where, number = parse_device(self._core)
        self._gpu = number if where == "cuda" else None  # runs refinement and filter; None: the CPU
        self._precision = precision
        if kind == "cuda" and refine_backend != "native" and precision == "fp16":
            raise InputError(
                "precision 'fp16' is an option of the native refinement, which does not run here",
                fix="precision='fp32'",
            )
        check_precision(device if network_only else self._core, precision)
        choose.module_of(self._core)  # raises if the device cannot be used
        self.info: dict[str, Any] = {"device": device, "self_test": None}
        self._refinement: BundleRefinement | None = None
        self.trained = False  # whether a refinement starts from weights in the bundle
        self.trained_sha256: str | None = None  # of the file with these weights
        self.settings_note = ""  # how the settings differ from those of the training
        self._kept = threading.local()  # its ``refiner``: the last refiner of each thread
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
            self.info |= {"prior": self.prior.backend, "refine": self._core_text()}
            self.info["start"] = self.first_start if self.refine else None
        if network_only and not isinstance(self.prior, NetworkPrior):
            choose.module_of(device)  # no stage can run on the GPU: raises with the reason
        self._on_cpu_because = ""  # why the filter runs on the CPU although ``device`` is a GPU
        self.info["filter"] = self._filter_text()
        if network_only and not isinstance(filter, CrfConfig):  # the CRF never runs on a GPU
            self._on_cpu_because = _why_not(device)
            self.info["refine"] = f"{self.info['refine']} ({self._on_cpu_because})"

    def _open(
        self, bundle: Bundle, imgsz: Any, backend: str, refine_backend: str, when: str
    ) -> None:
        """Load the prior and the refinement from the bundle, and run its golden vectors.

        ``when`` is the argument ``self_test`` of Segmenter.
        """
        from runtime.bundle.open import open_prior, open_refinement, self_test, starts_trained

        if imgsz is not None:
            raise InputError("imgsz is fixed by the bundle", fix="leave it out, or export again")
        self.prior, loaded = open_prior(
            bundle, backend=backend, device=self.device, threads=self.threads
        )
        if refine_backend not in ("native", *BACKENDS):
            raise InputError(
                f"refine_backend is {refine_backend!r}; wanted 'native' or one of {BACKENDS}"
            )
        self._refinement = open_refinement(
            bundle,
            backend=refine_backend,
            device=self._core if refine_backend == "native" else self.device,
            threads=self.threads,
            new=self._refiner,
        )
        self.trained = self.refine is not None and starts_trained(bundle, self.refine)
        if self.trained and self.refine and self.refine.seed != bundle.refine().seed:
            raise InputError(
                f"seed is {self.refine.seed}, but the refinement starts from the weights of "
                f"{bundle.name}, which were trained beforehand",
                fix="leave seed out",
            )
        if self.trained and self.refine:
            self.trained_sha256 = bundle.manifest["init"]["sha256"]
            self.settings_note = _other_settings(self.refine, bundle)
        refine_text = self._refinement.text or self._core_text()
        self.info |= {
            "bundle": str(bundle.path),
            "prior": self.prior.backend,
            "engine": loaded.key if loaded else None,
            "precision": bundle.manifest["graphs"].get("prior", {}).get("precision", "fp32"),
            "refine": refine_text,
            "start": self.first_start if self.refine else None,
        }
        run_by = (runtime.__version__, self.device, self.prior.backend, refine_text)
        try:
            self.info["self_test"] = self_test(
                bundle, self.prior, self._refinement, when=when, run_by=run_by
            )
        except BundleError as error:
            if backend == "onnx" and refine_backend in ("native", "onnx"):
                raise
            raise EngineMismatch(
                error.message, fix="python -m runtime build --force BUNDLE"
            ) from error

    @property
    def first_start(self) -> str:
        """How a refinement starts that does not continue another one: "trained", from weights that
        the bundle contains, or "cold", from the initial weights of the option ``seed``."""
        return "trained" if self.trained else "cold"

    def prepare(self, pixels: np.ndarray, clock: Clock, path: Path | None = None) -> Picture:
        """Return the forms of a picture, (H, W, 3) uint8 RGB, that the stages take; ``path`` is of
        its file."""
        height, width = pixels.shape[:2]
        h, w = (self.refine or RefineConfig()).working_size(height, width)
        if self._refinement is not None and self._refinement.size is not None:
            h, w = self._refinement.size
        begin = record_event(self._core)
        uploaded = upload(pixels, self._core)
        working = working_picture(uploaded, h, w)
        clock.device("preprocess", begin, record_event(self._core))
        clock.lap("preprocess")
        return Picture(pixels, uploaded, working, path)

    def guide(self, picture: Picture, clock: Clock) -> tuple[Guide, bool]:
        """Return the prior's checked guide at working size, and whether its classes have a meaning.

        Raises
        ------
        InputError, BundleError : the result of the prior is no guide.
        UnknownGuide : the guide is unknown everywhere.
        DeviceError : the device of the prior fails, or its memory is full.
        """
        try:
            if self.prior.gpu is not None and self.prior.gpu == self._gpu:
                begin = record_event(self._core)
                guide = self.prior(picture.uploaded, picture.working)
                clock.device("prior", begin, record_event(self._core))
            elif isinstance(self.prior, MasksPrior):
                guide = self.prior(picture.pixels, picture.path)
            else:
                guide = self.prior(picture.pixels, np.asarray(picture.working))
            if isinstance(guide, Guide):  # a network's probabilities, which it has checked
                return guide, True
            guide = np.asarray(guide)
            height, width = picture.working.shape[:2]
            checked = self._checked_guide(guide, height, width, picture.notes)
            return checked, self._has_meaning(guide)
        finally:
            clock.lap("prior")

    def _has_meaning(self, guide: np.ndarray) -> bool:
        """Whether the classes of a guide have a meaning. They do if they have names, and if the
        guide is probabilities of a callable or a network. K-means clusters, and label maps without
        names, have none."""
        if self.prior.names is not None:
            return True
        return guide.ndim == 3 and not isinstance(self.prior, KMeansPrior)

    def _unknown_fix(self, guide: np.ndarray) -> str:
        """Return the fix if 255 is the largest label of a callable's or mask's guide and probably
        means unknown, as in many data sets, although the prior has no label ``unknown``; else "".
        With a label 254, the labels are probably numbered up to 255."""
        prior = self.prior
        if not isinstance(prior, (CallablePrior, MasksPrior)) or prior.unknown is not None:
            return ""
        seems = guide.ndim == 2 and guide.max() == 255 and not (guide == 254).any()
        return f"if it means unknown, {prior.unknown_fix}" if seems else ""

    def _checked_guide(self, guide: np.ndarray, height: int, width: int, notes: list[str]) -> Guide:
        """Check the prior's array, which may have any size, and return a Guide at working size.
        Warnings are appended to ``notes``."""
        if guide.ndim not in (2, 3) or guide.size == 0:
            raise InputError(
                f"the prior returned an array of shape {guide.shape}; "
                "wanted (h, w, C) probabilities or (h, w) integer labels"
            )
        unknown = self._unknown_fix(guide)
        guide = as_probabilities(check_guide(guide, *guide.shape[:2]), height, width)
        names = self.prior.names
        count = guide.shape[2] if guide.ndim == 3 else int(guide.max()) + 1
        if names is not None and count > len(names):
            raise InputError(
                f"the prior returned {count} classes, but has only {len(names)} names: "
                + ", ".join(names)[:200],
                fix="name each class once, from number 0 on: metadata 'classes' of an .onnx file, "
                "or the attribute names of a callable" + (f"; {unknown}" if unknown else ""),
            )
        if unknown and names is None:
            notes.append(f"The label 255 of the prior is a class here; {unknown}.")
        return Guide(guide)

    def scores(
        self, picture: Picture, guide: Guide, progress: Callable[[int, int], None] | None
    ) -> Scored:
        """Refine one picture from the initial or trained weights. Without a refinement, return the
        prior's scores.

        Raises
        ------
        UnknownGuide : the guide is unknown everywhere.
        DeviceError : the device fails, or its memory is full.
        """
        if self.refine is None:
            scores, classes = prior_scores(guide.array)
            return Scored(scores, classes, {"steps": 0, "stop_reason": "no refinement"})
        if self.settings_note:
            picture.notes.append(self.settings_note)
        objective = objective_of(self.refine)
        wanted = guide if objective.takes_guide else None
        make, warm = self._make, False
        if self._refinement is not None:
            make, warm = self._refinement.make(self.refine), self.trained
        gpu = self._gpu is not None
        result = refine_with(
            make, self.refine, picture.working, wanted, warm=warm, progress=progress, gpu=gpu
        )
        classes = result.classes
        if not objective.channels_follow_classes:
            count = result.scores.shape[2]
            if self.prior.names is None:
                classes = np.full(count, -1, np.int32)  # clusters keep their own numbers
            elif wanted is None:
                classes = majority_classes(result.labels, guide.array, count)
        return Scored(result.scores, classes, result.stats, result.labels)

    def finish(
        self,
        picture: Picture,
        scored: Scored,
        warnings: list[str],
        clock: Clock,
        *,
        semantic: bool,
        frame: FrameInfo | None = None,
    ) -> Result:
        """Make the result from scores at working size: add up the columns of the same class,
        compute labels at the picture's size by joint upsampling or by the dense CRF, and merge
        small regions.

        Parameters
        ----------
        warnings : for the result; this method appends its own warnings to the list.
        semantic : whether the prior's classes have a meaning; see :meth:`guide`.
        frame : the position in a stream; None for a single picture.
        """
        (height, width), (h, w) = picture.pixels.shape[:2], picture.working.shape[:2]
        names, stats = self.prior.names, scored.stats
        warnings += picture.notes
        warnings += [f"{note.output}: {note.message}" for note in self._engine_warnings()]
        if stats["stop_reason"] == "diverged":
            warnings.append("The refinement diverged; the last finite map was kept. Lower lr.")
        if self._on_cpu_because:
            warnings.append(self._on_cpu_because)
        if isinstance(self.filter, CrfConfig):
            scores, classes = scored.columns(merge=names is not None)
            columns, confidence = crf_upsample(
                picture.pixels, np.asarray(scores), self.filter, threads=self.threads
            )
        else:
            scores, classes = scored.winning_columns(merge=names is not None)
            columns, confidence = self._joint_upsample(picture, scores, clock)
        clock.lap("filter")
        if self._gpu is not None:  # the refinement has measured the time of its steps
            own = {"refine": stats["device_ms"]} if "device_ms" in stats else {}
            stats["device_ms"] = clock.device_ms | own

        labels = classes.take(columns) if (classes >= 0).all() else columns
        min_area = self.min_area
        if min_area is None:
            min_area = 0 if self._keeps_small_regions(semantic) else height * width // 500
        regions, labels = runtime.connected_regions(labels, min_area=min_area)
        stats |= {
            "objective": self.refine.objective if self.refine else None,
            "start": (frame.start if frame else self.first_start) if self.refine else None,
            "filter": self._filter_name(),
            "working_size": [h, w],
            "clusters": int(np.count_nonzero(np.bincount(labels.ravel()))),
        }
        clock.lap("postprocess")
        backend = f"{self.prior.backend} + {self._refine_text()}"
        if isinstance(self.filter, CrfConfig):
            backend += f" + {self._filter_text()}"
        return Result(
            image=picture.pixels,
            labels=labels,
            names=names,
            confidence=confidence,
            regions=regions,
            stats=stats,
            timings=clock.timings(),
            device=self.device,
            backend=backend,
            warnings=warnings,
            frame=frame,
        )

    def _joint_upsample(
        self, picture: Picture, scores: Any, clock: Clock
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the columns (H, W) int32 and the confidence (H, W) float32 at the picture's size,
        by the guided filter, or bilinearly without a filter."""
        (height, width), (h, w) = picture.pixels.shape[:2], picture.working.shape[:2]
        low_image, radius, eps = None, 1, 3e-4
        if isinstance(self.filter, FilterConfig):
            low_image, eps = picture.working, self.filter.eps
            radius = max(1, round(self.filter.radius * (h * w / (height * width)) ** 0.5))
        begin = record_event(self._core)
        columns, confidence = runtime.joint_upsample(
            picture.uploaded,
            scores,
            low_image=low_image,
            radius=radius,
            eps=eps,
            device=self._core,
            threads=self.threads,
        )
        columns, confidence = np.asarray(columns), np.asarray(confidence)
        clock.device("filter", begin, record_event(self._core))
        return columns, confidence

    def _engine_warnings(self) -> list[Any]:
        """Return the warnings of the prior's engine since the last picture, and clear its list."""
        engine = self.prior.engine
        if engine is None or not engine.warnings:
            return []
        noted = list(engine.warnings)
        engine.warnings.clear()
        return noted

    def _keeps_small_regions(self, semantic: bool) -> bool:
        """Whether ``min_area`` None keeps small regions. It does if labels are classes with a
        meaning, because a small region may be a pole or a pedestrian."""
        if self.refine is not None and not objective_of(self.refine).channels_follow_classes:
            return self.prior.names is not None  # else the labels are clusters
        return semantic

    def most_classes(self) -> int | None:
        """Return the most classes of a residual refinement if an engine limits them, else None."""
        for engine in self._refinement.engines if self._refinement else ():
            for port in engine.inputs:
                if port.name == "guide" and isinstance(port.shape[1], int) and port.shape[1] > 0:
                    return int(port.shape[1])
        return None

    def make_refiner(self, height: int, width: int, classes: np.ndarray | None) -> Any:
        """Make a refiner for this working size, with the weights of a first frame. No other call
        uses this refiner, so the caller may keep it."""
        assert self.refine is not None
        self._kept.refiner = None
        if self._refinement is not None:
            made = self._refinement.make(self.refine)(height, width, classes)
        else:
            made = self._make(height, width, classes)
        self._kept.refiner = None
        return made

    def _refiner(
        self, config: RefineConfig, height: int, width: int, classes: int | None
    ) -> runtime.Refiner:
        """Return a refiner with any weights. On a GPU it is the last refiner of this thread if the
        settings are equal, because a new one allocates memory and records its steps again."""
        key = (config, height, width, classes)
        kept = getattr(self._kept, "refiner", None)
        if kept is not None and kept[0] == key:
            return kept[1]
        self._kept.refiner = kept = None  # frees its memory before the next one allocates
        made = runtime.Refiner(
            height,
            width,
            classes=classes,
            device=self._core,
            precision=self._precision,
            threads=self.threads,
            **config.options(),
        )
        if self._gpu is not None:
            self._kept.refiner = (key, made)
        return made

    def _make(self, height: int, width: int, classes: np.ndarray | None) -> runtime.Refiner:
        """Return a refiner with any weights; the argument ``make`` of :func:`refine_with`."""
        assert self.refine is not None
        count = None if classes is None else len(classes)
        return self._refiner(self.refine, height, width, count)

    def _core_text(self) -> str:
        """Describe what runs the native module: the CPU's instruction set, or GPU and precision."""
        if self._core == "cpu":
            return f"cpu-{runtime.isa()}"
        return f"cuda:{parse_device(self._core)[1]} {self._precision}"

    def _refine_text(self) -> str:
        """Describe what runs the refinement: a bundle's step graph, and the native module."""
        core = self._core_text()
        if self._refinement is None or self._refinement.text is None or self.refine is None:
            return core
        return f"{self._refinement.text} step + {core}"

    def _filter_name(self) -> str | None:
        """Return the function that filters the scores; None: bilinear upsampling."""
        if isinstance(self.filter, CrfConfig):
            return "dense_crf"
        return None if self.filter is None else "guided_filter"

    def _filter_text(self) -> str:
        """Describe the filter and what runs it; the dense CRF always runs on the CPU."""
        on_gpu = self._gpu is not None and not isinstance(self.filter, CrfConfig)
        where = f"cuda:{self._gpu}" if on_gpu else f"cpu-{runtime.isa()}"
        return f"{self._filter_name() or 'bilinear'} on {where}"

    def clone(self) -> Pipeline:
        """Return a pipeline for another thread, with the same prior.

        Raises
        ------
        InputError : an engine of TensorRT, which runs one picture at a time.
        """
        own = self._refinement.engines if self._refinement else ()
        engines = [engine for engine in (self.prior.engine, *own) if engine is not None]
        if any(engine.backend.startswith("tensorrt") for engine in engines):
            raise InputError(
                "a TensorRT engine runs one picture at a time and cannot be shared",
                fix="open the bundle once more: Segmenter(...)",
            )
        other = copy.copy(self)
        other.info = dict(self.info)
        return other


def _other_settings(config: RefineConfig, bundle: Bundle) -> str:
    """Return a sentence that names the settings that differ from those of the bundle, for which its
    weights were trained, or "". Only the number of steps may differ, as at the export."""
    own = bundle.refine()
    names = [f.name for f in fields(config) if f.name != "steps"]
    other = [
        f"{name} is {getattr(config, name)}, not {getattr(own, name)}"
        for name in names
        if getattr(config, name) != getattr(own, name)
    ]
    if not other:
        return ""
    return (
        f"The refinement starts from the weights of {bundle.name}, which were trained with other "
        f"settings: {', '.join(other)}. Leave these settings out; the number of steps may differ."
    )


def _why_not(device: str) -> str:
    """Return a sentence that says why the CUDA module cannot be used on ``device``, or ""."""
    try:
        choose.module_of(device)
    except (MissingBackend, DeviceError) as error:
        return (
            "The guided filter runs on the CPU, because the CUDA module cannot be used: "
            f"{error.message}"
        )
    return ""
