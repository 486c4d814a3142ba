"""Make the prior that the text of --model names. Each family of priors has a module of its own."""

from __future__ import annotations

import difflib
import stat
from pathlib import Path

from export.models.base import PriorModel
from export.models.kmeans import kmeans
from export.models.onnx_file import onnx_file
from export.models.segformer import segformer
from export.models.stated import Stated
from export.models.trained import trained
from export.models.user import users_own
from export.train.naming import METHOD
from export.train.run import read_entry
from runtime.engines.named_files import missing, shell_word
from runtime.errors import InputError
from runtime.files import shown, stat_of
from runtime.pictures.files import SUFFIXES
from runtime.prior.network import check_imgsz

BUILT_IN = ("segformer", "kmeans")


def load_model(
    text: str,
    weights: str | Path | None = None,
    imgsz: tuple[int, int] | int | None = None,
    stated: Stated | None = None,
    flip: bool = False,
    mask: str | None = None,
) -> PriorModel:
    """The prior that ``--model`` names.

    Parameters
    ----------
    text : "segformer", "kmeans", a path ending in .onnx, the folder of a run of python -m export
        train, or "module:function" of the user's own; the function is called with ``imgsz`` and
        returns a :class:`PriorModel`.
    weights : for "segformer" the folder of a checkpoint, and None leaves the network untrained; for
        a run the place of its backbone or prior, if that was moved since the training.
    imgsz : input size to freeze for in pixels, (height, width) or one side of a square; None takes
        the model's own.
    stated : facts about an .onnx file that replace its metadata; for a SegFormer checkpoint without
        preprocessor_config.json, its mean and std.
    flip : for a run with a backbone alone: average the output for a picture with that for its
        mirror image.
    mask : for a run of "boosting" alone: "fine" or "coarse"; None: "fine".

    Raises
    ------
    InputError : no such model, folder or function, or settings that this program does not support.
    BundleError : an .onnx file or checkpoint that is broken or does not fit.
    MissingBackend : a package that the model needs is not installed.

    Example
    -------
    >>> load_model("prior.onnx", imgsz=(360, 480)).fixed_size
    (360, 480)
    """
    if imgsz is not None:
        check_imgsz(imgsz)
    if isinstance(imgsz, int):
        imgsz = (imgsz, imgsz)
    stated = stated or Stated()
    is_run = text not in BUILT_IN and Path(text).suffix.lower() != ".onnx" and _is_folder(text)
    if weights is not None and text != "segformer" and not is_run:
        raise InputError(
            f"weights are for segformer and runs of the trainer; model is {text!r}",
            fix="leave them out",
        )
    for option, is_set in (("flip", flip), ("mask", mask is not None)):
        if is_set and not is_run:
            raise InputError(
                f"{option} is for runs of the trainer only; model is {text!r}", fix="leave it out"
            )
    if is_run:
        folder = _run(Path(text), stated)
        return trained(folder, None if weights is None else Path(weights), imgsz, flip, mask)
    if text == "segformer":
        return segformer(None if weights is None else Path(weights), imgsz, stated)
    if stated.options and Path(text).suffix.lower() != ".onnx":
        words = ", ".join(stated.options)
        if text == "kmeans":
            raise InputError(f"{words}: kmeans has no such settings", fix="leave them out")
        raise InputError(
            f"{words}: these describe .onnx files; {text} returns its own",
            fix="set them in the PriorModel that the function returns",
        )
    if text == "kmeans":
        if imgsz is not None:
            raise InputError("imgsz is for networks; kmeans has none", fix="leave it out")
        return kmeans()
    if Path(text).suffix.lower() == ".onnx":
        return onnx_file(Path(text), imgsz, stated)
    if "://" in text:
        raise missing(text)
    if ":" in text:
        return users_own(text, imgsz)
    near = difflib.get_close_matches(text.lower(), BUILT_IN, 1, 0.5)
    fix = "export the network to ONNX and pass --model NAME.onnx"
    if near:
        fix = f"did you mean --model {near[0]}?"
    elif Path(text).suffix.lower() in SUFFIXES:
        fix = "pass pictures by --pictures or --data"
    raise InputError(
        f"model is {text!r}; wanted {', '.join(BUILT_IN)}, a path ending in .onnx, the folder RUN "
        "of python -m export train, or module:function",
        fix=fix,
    )


def _is_folder(text: str) -> bool:
    """Whether a text names a folder."""
    found = None if "://" in text else stat_of(text)
    return found is not None and stat.S_ISDIR(found.st_mode)


def _run(folder: Path, stated: Stated) -> Path:
    """The folder of a run. InputError for another folder, and for facts that a run states
    itself."""
    if stat_of(folder / "run.json") is None:
        fix = "name a folder that python -m export train has written"
        if stat_of(folder / "manifest.json") is not None:
            fix = "it is a bundle, which is exported already"
        elif stat_of(folder / "config.json") is not None:
            fix = f"--model segformer --weights {shown(folder)}, if it is a SegFormer checkpoint"
        raise InputError(f"model is the folder {shown(folder)}, which has no run.json", fix=fix)
    if stated.options:
        words = ", ".join(stated.options)
        fix = "leave them out"
        if stated.names and read_entry(folder)["method"] == METHOD:
            run = shell_word(str(folder))
            fix += f"; python -m export train name {run} --labels DIR --classes FILE names clusters"
        raise InputError(f"{words}: the run {shown(folder)} states these itself", fix=fix)
    return folder
