"""Segmenter: picture -> prior -> refinement -> guided filter -> result."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import runtime
from runtime.backend import backend, default_threads
from runtime.checks import check_count, check_guide
from runtime.config import FilterConfig, RefineConfig
from runtime.errors import InputError
from runtime.prior import as_probabilities
from runtime.resize import resize
from sdk.image import load_image
from sdk.prior import make_prior
from sdk.result import Result


class Segmenter:
    """Segments pictures, each with its own refinement. Keeps no state between pictures.

    Parameters
    ----------
    prior : "kmeans" (embedded default: no model file), an .onnx file, or a callable
        (H, W, 3) uint8 RGB -> probabilities (h, w, C) or integer labels (h, w), -1 = unknown.
    refine : a RefineConfig, the name of one ("residual", "fast", "dynaguide", "dynaguide_code",
        "dynaseg_fsf", "dynaseg_scf"), or None: the prior is only lifted.
    filter : a FilterConfig, or None: scores are lifted bilinearly.
    min_area : regions under this many pixels join a neighbour. None: 0 when the prior names its
        classes, 0.2 % of the picture when it does not.
    imgsz : the ONNX prior's input size, (height, width) or the long side; None: its metadata's.
    device : "cpu".
    threads : most threads; all processors when None, and never more than those. The labels do not
        depend on it.

    Raises
    ------
    InputError, BundleError, MissingBackend : each names what was wrong, and the fix.
    """

    def __init__(
        self,
        prior: str | os.PathLike[str] | Callable[[np.ndarray], np.ndarray] = "kmeans",
        *,
        refine: RefineConfig | str | None = "residual",
        filter: FilterConfig | None = FilterConfig(),  # noqa: B008 (frozen)
        min_area: int | None = None,
        imgsz: int | tuple[int, int] | None = None,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
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
        backend(device)
        self.refine, self.filter, self.min_area = refine, filter, min_area
        processors = default_threads()
        self.device, self.threads = device, min(threads or processors, processors)
        self.prior = make_prior(prior, imgsz=imgsz, threads=self.threads)

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
        clock = _Clock()
        picture, warnings = load_image(source, color=color)
        clock.lap("decode")

        height, width = picture.shape[:2]
        h, w = (self.refine or RefineConfig()).working_size(height, width)
        low = resize(picture, h, w).astype(np.float32) / 255
        clock.lap("preprocess")

        guide = np.asarray(self.prior(picture, low))
        if guide.ndim not in (2, 3) or guide.size == 0:
            raise InputError(
                f"the prior gave an array of shape {guide.shape}; "
                "wanted (h, w, C) probabilities or (h, w) integer labels"
            )
        guide = as_probabilities(check_guide(guide, *guide.shape[:2]), h, w)
        names = self.prior.names
        count = guide.shape[2] if guide.ndim == 3 else int(guide.max()) + 1
        if names is not None and count > len(names):
            raise InputError(f"the prior gave {count} classes, but names only {len(names)}")
        clock.lap("prior")

        scores, classes, stats = self._scores(low, guide, progress)
        if stats["stop_reason"] == "diverged":
            warnings.append("The refinement diverged; the last finite map was kept. Lower lr.")
        if names is not None or (classes >= 0).all():
            scores, classes = _merge_columns(scores, classes)
        clock.lap("refine")

        present = np.unique(scores.argmax(-1))  # the others cannot win anywhere that matters
        scores, classes = np.ascontiguousarray(scores[..., present]), classes[present]
        low_image, radius, eps = None, 1, 3e-4
        if self.filter is not None:
            low_image, eps = low, self.filter.eps
            radius = max(1, round(self.filter.radius * (h * w / (height * width)) ** 0.5))
        columns, confidence = runtime.lift(
            picture,
            scores,
            low_image=low_image,
            radius=radius,
            eps=eps,
            device=self.device,
            threads=self.threads,
        )
        clock.lap("filter")

        labels = classes[columns] if (classes >= 0).all() else columns
        min_area = self.min_area
        if min_area is None:
            min_area = 0 if names is not None else height * width // 500
        regions, labels = runtime.connected_regions(labels, min_area=min_area)
        stats |= {"objective": self.refine.objective if self.refine else None}
        stats |= {"working_size": [h, w], "clusters": len(np.unique(labels))}
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
            backend=f"{self.prior.backend} + {self.device}-{runtime.target()}",
            warnings=warnings,
        )

    def _scores(
        self, low: np.ndarray, guide: np.ndarray, progress: Callable[[int, int], None] | None
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Scores at working size, the guide class of each column (-1 = none), and stats."""
        if self.refine is None:
            soft = guide
            if guide.ndim == 2:
                soft = np.eye(guide.max() + 2, guide.max() + 1, dtype=np.float32)[guide]
            stats = {"steps": 0, "stop_reason": "no refinement"}
            classes = np.flatnonzero(soft.any((0, 1))).astype(np.int32)
            return soft[..., classes], classes, stats
        result = runtime.refine(
            low,
            None if self.refine.objective == "dynaseg" else guide,
            device=self.device,
            threads=self.threads,
            progress=progress,
            **self.refine.options(),
        )
        classes = result.classes
        if self.prior.names is not None and self.refine.objective != "residual":
            classes = runtime.majority_classes(result.labels, guide, result.scores.shape[2])
        elif self.refine.objective != "residual":
            classes = np.full(result.scores.shape[2], -1, np.int32)  # clusters keep their own ids
        return result.scores, classes, result.stats


def _merge_columns(scores: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns of one class added up; columns without a class (clusters that lie in unknown pixels
    only) dropped."""
    kept = np.unique(classes[classes >= 0])
    if len(kept) == len(classes):
        return scores, classes
    table = (classes[:, None] == kept[None]).astype(np.float32)
    return scores @ table, kept


class _Clock:
    """Wall time by stage, in milliseconds."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = (now - self.last) * 1e3
        self.last = now

    def timings(self) -> dict[str, float]:
        total = (time.perf_counter() - self.start) * 1e3
        return self.laps | {"unaccounted": total - sum(self.laps.values()), "total": total}
