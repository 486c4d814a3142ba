"""An existing ONNX segmentation network as a prior."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from export.models.base import OUTPUTS, PriorModel, check_size
from runtime.engines.onnx import OnnxEngine
from runtime.errors import BundleError, InputError, MissingBackend
from runtime.prior.network import fixed_size
from runtime.prior.preprocess import Preprocess, are_sides, read_json

if TYPE_CHECKING:
    from onnx import ModelProto


def onnx_file(path: Path, imgsz: tuple[int, int] | None = None) -> PriorModel:
    """An existing ONNX segmentation network; its metadata_props say how to feed it.

    Metadata: what :meth:`Preprocess.from_metadata` reads, ``classes`` (JSON list of names),
    ``output`` (starts with "probabilities" or "labels"), ``licence``.

    Parameters
    ----------
    imgsz : (height, width) to freeze a network of free size for; the metadata's ``input_size`` when
        None.

    Raises
    ------
    BundleError : not ONNX, external data outside its folder, or metadata that does not fit.
    InputError : no such file, or ``imgsz`` is not the size that the file fixes.
    """
    with OnnxEngine(path) as engine:  # checks the file, and where it keeps its weights
        inputs, metadata = engine.inputs, engine.metadata
    shape = inputs[0].shape if inputs else ()
    if len(inputs) != 1 or len(shape) != 4 or inputs[0].dtype != "tensor(float)" or shape[1] != 3:
        came = ", ".join(f"{p.name} {p.shape} {p.dtype}" for p in inputs)
        raise BundleError(f"{path.name} wants inputs {came}; wanted one (1, 3, h, w) float32")
    fixed = fixed_size(inputs[0])
    if imgsz is not None and fixed is not None and imgsz != fixed:
        raise InputError(
            f"imgsz is {imgsz}, but {path.name} has a fixed input of {fixed}", fix="leave it out"
        )
    size = imgsz or fixed
    if size is None:
        stated = read_json(metadata, path.name, "input_size", {"width": 512, "height": 512})
        # Preprocess takes the long side alone, so a size of one side only is a square.
        sides = stated if isinstance(stated, dict) and are_sides([*stated.values()]) else {}
        default = max(sides.values(), default=512)
        size = (sides.get("height", default), sides.get("width", default))
    preprocess = Preprocess.from_metadata(metadata, path.name, size)
    if fixed is None:
        check_size(size, preprocess, path.name)
    names = read_json(metadata, path.name, "classes", None)
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise BundleError(f"{path.name}: metadata 'classes' is {names!r}; wanted a list of names")
    return PriorModel(
        name=path.stem,
        onnx=_self_contained(path),
        preprocess=preprocess,
        names=names,
        output=next((o for o in OUTPUTS if metadata.get("output", "").startswith(o)), "logits"),
        licence=metadata.get("licence", metadata.get("license", "not stated")),
    )


def _self_contained(path: Path) -> bytes:
    """The file with its external data inside; ``path`` was checked before."""
    try:
        import onnx
    except ImportError as error:
        raise MissingBackend(
            f"onnx is needed to freeze {path.name}, but {error}",
            fix="pip install 'dynaguide-edge[export]'",
        ) from error
    return serialised(onnx.load(path), path.name)


def serialised(model: ModelProto, name: str) -> bytes:
    """The bytes of a model that holds all of its weights; BundleError for more than fit."""
    from google.protobuf.message import EncodeError

    try:
        return model.SerializeToString(deterministic=True)
    except (EncodeError, ValueError) as error:
        raise BundleError(
            f"{name} has 2 GiB or more with its weights; ONNX files hold less"
        ) from error
