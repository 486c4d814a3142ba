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
from runtime.core.parameters import flatten
from runtime.errors import BundleError, InputError, SdkError
from runtime.files import one_line, shown

STEPS = 0  # of the refinement in the bundle: the trained network corrects the prior without a step


def refined(
    run: Run, place: Path | None = None, imgsz: tuple[int, int] | None = None
) -> PriorModel:
    """The prior of a run of refine, with the refinement that was trained for it.

    Parameters
    ----------
    run : of :func:`export.train.run.open_run`.
    place : where the prior is now, an .onnx file or a bundle; None: where it was at the training.
    imgsz : (height, width) in pixels to freeze for; None takes the size that most pictures of the
        training had as the prior's input. With it, the guides of such pictures are those that the
        network was trained on.

    Raises
    ------
    InputError : the prior is missing, or is another one than at the training; or its input has
        another size.
    BundleError : a file is damaged, or the trained weights do not fit the settings.
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
    sizes = [(height, width) for height, width in entry["prior"]["sizes"]]
    try:
        flatten(config, source.classes, state)
    except InputError as error:
        raise BundleError(
            f"the checkpoint of {shown(run.folder)} does not fit the settings in its run.json",
            fix="copy the run again, or train again with another -o",
        ) from error
    prior = _prior(source, imgsz or sizes[0])
    return replace(
        prior,
        warnings=prior.warnings + (_several(sizes) if imgsz is None else _other(imgsz, sizes)),
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


def _several(sizes: list[tuple[int, int]]) -> tuple[str, ...]:
    """The warning that pictures of the training had several input sizes; none for one size."""
    if len(sizes) == 1:
        return ()
    words = [f"{height}x{width}" for height, width in sizes]
    warning = SdkError(
        f"pictures of the training had {len(words)} input sizes ({', '.join(words[:3])}"
        f"{', ...' if len(words) > 3 else ''}); without --dynamic the bundle has {words[0]} alone",
        fix=f"--dynamic keeps all of them; or choose one: --imgsz {words[0]}",
    )
    return (str(warning),)


def _other(imgsz: tuple[int, int], sizes: list[tuple[int, int]]) -> tuple[str, ...]:
    """The warning that no picture of the training had the input size that the user chose."""
    if imgsz in sizes:
        return ()
    words = [f"{height}x{width}" for height, width in (imgsz, sizes[0])]
    warning = SdkError(
        f"imgsz is {words[0]}, and the guides of the training were computed at {words[1]}: the "
        "trained weights fit other guides less well",
        fix="leave --imgsz out",
    )
    return (str(warning),)


def _prior(source: GuideSource, imgsz: tuple[int, int]) -> PriorModel:
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
