"""The quality of the labels whose latency is measured."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.quality import metrics
from runtime.bundle.open import starts_trained
from runtime.errors import InputError
from runtime.prior.kmeans import KMeansPrior
from sdk import Segmenter
from sdk.pipeline import Picture
from sdk.prior import open_bundle
from sdk.timing import Clock


def quality_of(
    seg: Segmenter, pictures: list[np.ndarray], truths: list[np.ndarray] | None
) -> dict[str, Any]:
    """mIoU on the labelled pictures; or for a bundle, the share of its golden picture with the
    labels that the float32 prior's recorded answer gets, refined by the float32 core."""
    if truths is not None:
        names = seg.prior.names
        if names is None:
            raise InputError("labels need a prior that names its classes; this one does not")
        counts: Any = 0
        for picture, truth in zip(pictures, truths, strict=True):
            counts = counts + metrics.confusion(seg(picture).labels, truth, len(names), ignore=255)
        value = metrics.miou(counts)
        if not np.isfinite(value):
            raise InputError("the labels have no pixel that counts: all are 255")
        return {"what": "mIoU", "value": value, "pictures": len(truths)}
    bundle = open_bundle(seg.info()["bundle"]) if "bundle" in seg.info() else None
    if bundle is None:
        return {"what": "not measured"}
    if seg.refine is not None and starts_trained(bundle, seg.refine):
        return {"what": "not measured (starts from trained weights)"}
    golden = bundle.tensors(bundle.manifest["golden"][0])
    picture, guide = golden["picture"], golden["guide"]
    low = np.asarray(seg.pipeline.prepare(picture, Clock()).working)
    if isinstance(seg.prior, KMeansPrior):  # has no file, and depends on the working size
        guide = seg.prior(picture, low)
    exact = float32_labels(seg, picture, low, guide)
    area, seg.pipeline.min_area = seg.min_area, 0
    same = exact == seg(picture).labels
    seg.pipeline.min_area = area
    return {"what": "agreement with float32 on the golden picture", "value": float(same.mean())}


def float32_labels(
    seg: Segmenter, picture: np.ndarray, low: np.ndarray, guide: np.ndarray
) -> np.ndarray:
    """(H, W) int32: what the float32 core makes of a recorded guide with the settings of ``seg``,
    at the working size of ``low``, which an engine may have fixed."""

    def prior(_: np.ndarray) -> np.ndarray:
        return guide

    prior.names = seg.prior.names  # type: ignore[attr-defined]
    run = Segmenter(prior, refine=seg.refine, filter=seg.filter, min_area=0).pipeline
    clock = Clock()
    forms = Picture(picture, picture, low)
    checked, semantic = run.guide(forms, clock)
    scored = run.scores(forms, checked, None)
    return run.finish(forms, scored, [], clock, semantic=semantic).labels
