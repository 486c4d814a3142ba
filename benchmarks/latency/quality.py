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
    """Measure the quality of a segmenter: "what" it is, and, if measured, its "value" in [0, 1].

    With ``truths`` the quality is the mIoU of the pictures. Without truths, for a bundle, it is the
    share of the golden picture's pixels whose labels equal those that the float32 core computes
    from the recorded guide. Otherwise, and for a bundle that starts from trained weights, it is not
    measured.

    Parameters
    ----------
    pictures : (H, W, 3) uint8 RGB.
    truths : the true class numbers of each picture, (H, W); 255 stands for any class.

    Raises
    ------
    InputError : there are truths, but the prior does not name its classes, or a true class is not
        among them, or all pixels are 255.
    """
    if truths is not None:
        names = seg.prior.names
        if names is None:
            raise InputError(
                "--labels need a prior that names its classes; this prior does not",
                fix="use a bundle or a model with class names, or leave --labels out",
            )
        counts: Any = 0
        for picture, truth in zip(pictures, truths, strict=True):
            counts = counts + metrics.confusion(seg(picture).labels, truth, len(names), ignore=255)
        value = metrics.miou(counts)
        if not np.isfinite(value):
            raise InputError(
                "all pixels of the labels are 255, which stands for any class",
                fix="give labels with class numbers, or leave --labels out",
            )
        return {"what": "mIoU", "value": value, "pictures": len(truths)}
    bundle = open_bundle(seg.info()["bundle"]) if "bundle" in seg.info() else None
    if bundle is None:
        return {"what": "not measured"}
    if seg.refine is not None and starts_trained(bundle, seg.refine):
        return {"what": "not measured (starts from trained weights)"}
    golden = bundle.tensors(bundle.manifest["golden"][0])
    picture, guide = golden["picture"], golden["guide"]
    low = np.asarray(seg.pipeline.prepare(picture, Clock()).working)
    if isinstance(seg.prior, KMeansPrior):  # its guide depends on the working size
        guide = seg.prior(picture, low)
    exact = float32_labels(seg, picture, low, guide)
    area, seg.pipeline.min_area = seg.min_area, 0
    try:
        same = exact == seg(picture).labels
    finally:
        seg.pipeline.min_area = area
    return {"what": "agreement with float32 on the golden picture", "value": float(same.mean())}


def float32_labels(
    seg: Segmenter, picture: np.ndarray, low: np.ndarray, guide: np.ndarray
) -> np.ndarray:
    """The labels, (H, W) int32, that the float32 core computes from a recorded guide.

    Parameters
    ----------
    seg : its settings are used, but not its prior.
    picture : (H, W, 3) uint8 RGB.
    low : (h, w, 3) float32, the picture at the working size, which may be fixed by an engine.
    guide : the recorded output of the prior.
    """

    def prior(_: np.ndarray) -> np.ndarray:
        return guide

    prior.names = seg.prior.names  # type: ignore[attr-defined]
    run = Segmenter(prior, refine=seg.refine, filter=seg.filter, min_area=0).pipeline
    clock = Clock()
    forms = Picture(picture, picture, low)
    checked, semantic = run.guide(forms, clock)
    scored = run.scores(forms, checked, None)
    return run.finish(forms, scored, [], clock, semantic=semantic).labels
