"""A refinement network that python -m export train refine has trained, with its prior."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from export.models.base import PriorModel
from export.models.onnx_file import onnx_file
from export.train.guide_source import GuideSource, reopen
from export.train.refine import RefineTraining
from export.train.run import Run
from runtime.bundle.read import Bundle
from runtime.files import one_line

STEPS = 0  # of the refinement in the bundle: the trained network corrects the prior without a step


def refined(
    run: Run, place: Path | None = None, imgsz: tuple[int, int] | None = None
) -> PriorModel:
    """The prior of a run of refine, with the refinement that was trained for it.

    Parameters
    ----------
    run : of :func:`export.train.run.open_run`.
    place : where the prior is now, an .onnx file or a bundle; None: where it was at the training.
    imgsz : (height, width) in pixels to freeze for; None takes the prior's own.

    Raises
    ------
    InputError : the prior is missing, or is another one than at the training; its input has another
        size; or the trained weights do not fit the settings.
    BundleError : a file is damaged.
    MissingBackend : a package that the prior needs is not installed.

    Example
    -------
    >>> refined(open_run(Path("runs/camera"))).initial["conv3.bias"].shape
    (19,)
    """
    entry, (state, step) = run.entry, run.head()
    source = reopen(entry["prior"], None if place is None else str(place))
    settings, loop = entry["settings"], entry["loop"]
    # The seed of the training says nothing of the weights that the bundle starts from.
    config = replace(RefineTraining(**settings).refine, steps=STEPS, seed=0)
    prior = _prior(source, imgsz)
    return replace(
        prior,
        licence=f"{prior.licence}; refinement: trained by the user",
        refine=config,
        initial=state,
        refinement={
            "method": entry["method"],
            "step": step,
            "steps": loop["steps"],
            "select": loop["select"],
            "labels_used": ["training"] if settings["label_weight"] > 0 else [],
            "settings": settings,
            # The bundle contains no path of the machine that made it.
            "prior": {
                "kind": source.kind,
                "name": one_line(source.name),
                "sha256": source.sha256,
                "classes": source.classes,
            },
            "pictures": entry["files"],
            "seed": loop["seed"],
        },
    )


def _prior(source: GuideSource, imgsz: tuple[int, int] | None) -> PriorModel:
    """The prior of a run, as it is exported alone."""
    path = Path(source.source)
    if source.kind == "onnx":
        stated = replace(source.stated, output=source.output)
        return onnx_file(path, imgsz, stated)
    # The graph of a bundle contains what an .onnx file has to state.
    bundle = Bundle.open(path)
    model = onnx_file(path / bundle.manifest["graphs"]["prior"]["file"], imgsz)
    entry = bundle.manifest["model"]
    return replace(
        model,
        licence=bundle.manifest["licence"]["text"],
        trained=entry["trained"],
        training=entry.get("training"),
    )
