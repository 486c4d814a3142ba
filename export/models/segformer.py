"""SegFormer from a checkpoint folder of Hugging Face's transformers, or untrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.checkpoint_folder import (
    checkpoint_name,
    import_error,
    load_network,
    read_config,
    read_normalisation,
    read_object,
    setting_error,
)
from export.models.base import PriorModel
from export.models.stated import Stated
from runtime.errors import InputError
from runtime.files import here, stat_of
from runtime.prior.names import class_names
from runtime.prior.preprocess import Preprocess, are_sides

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_OTHER_NETWORK = "export that network to ONNX and pass --model PATH.onnx"
_OTHER_WEIGHTS = "take a checkpoint fine-tuned for semantic segmentation, with its own config.json"
_BILINEAR = 2  # PIL's number, in preprocessor_config.json
_SEGFORMER_LICENCE = (
    "the checkpoint's own; NVIDIA's SegFormer checkpoints are for research and evaluation only"
)


def segformer(
    weights: Path | None = None,
    imgsz: tuple[int, int] | None = None,
    stated: Stated | None = None,
) -> PriorModel:
    """SegFormer (Xie et al., 2021) from a checkpoint folder in Hugging Face's format.

    The folder contains config.json (which says B0 to B5), preprocessor_config.json, and the weights
    as model.safetensors, sharded safetensors or a weights-only pytorch_model.bin. ``transformers``
    reads it; nothing is downloaded and no code in it is run.

    Parameters
    ----------
    weights : the folder; None makes a B0 of 150 classes with random weights (``trained`` is False).
    imgsz : (height, width) in pixels to freeze for, instead of the checkpoint's.
    stated : mean and std of a checkpoint without preprocessor_config.json; nothing else.

    Raises
    ------
    InputError : no such folder, a missing file, or a setting that this program does not support.
    BundleError : weights that are broken, unsafe, or not those of the network in config.json.
    MissingBackend : torch or transformers is not installed, or cannot be imported.

    Example
    -------
    >>> segformer(imgsz=(256, 512)).trained  # random weights, to try the export
    False
    """
    if here() == "(removed)":  # MKL, a library of torch, would end the process
        raise InputError("the current folder was removed; torch needs one", fix="cd to another")
    try:
        import torch
        from transformers import SegformerConfig, SegformerForSemanticSegmentation
    except (ImportError, RuntimeError, OSError) as error:
        raise import_error(error, "SegFormer", "export") from error

    class Logits(torch.nn.Module):
        """The network with one tensor as output."""

        def __init__(self, network: Any) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Any) -> Any:
            return self.network(images).logits

    stated = stated or Stated()
    if stated.names or stated.output or (weights is None and stated.options):
        raise InputError(
            f"{', '.join(stated.options)}: SegFormer states these in its own files",
            fix="leave them out, or change these files: config.json, preprocessor_config.json",
        )
    if weights is None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            untrained = SegformerConfig()
            untrained.num_labels = 150
            network = SegformerForSemanticSegmentation(untrained)
        settings, names, name = {}, None, "segformer-b0-untrained"
    else:
        config = read_config(weights, "weights", ("segformer",), _OTHER_NETWORK)
        settings = _read_settings(weights, stated)
        names = _class_names(config, weights)
        network = load_network(SegformerForSemanticSegmentation, weights, _OTHER_WEIGHTS)
        name = checkpoint_name(weights)
    preprocess = _segformer_preprocess(settings, imgsz, weights)
    return PriorModel(
        name=name,
        module=Logits(network.float().eval().requires_grad_(False)),
        preprocess=preprocess,
        names=names,
        output="logits",
        licence="none: random weights" if weights is None else _SEGFORMER_LICENCE,
        trained=weights is not None,
    )


def _class_names(config: dict[str, Any], folder: Path) -> list[str] | None:
    """The names of the classes; None if the checkpoint has none. InputError if config.json numbers
    them otherwise than 0, 1, 2 and so on."""
    names, where = config.get("id2label"), f"{folder / 'config.json'}: id2label"
    if names is None:
        return None
    if not isinstance(names, dict):
        raise InputError(
            f"{where} is a {type(names).__name__}; wanted an object of class numbers and names",
            fix='write {"0": "road", "1": "sky"}, or remove id2label',
        )
    return class_names(names, where)


def _read_settings(folder: Path, stated: Stated) -> dict[str, Any]:
    """The contents of preprocessor_config.json; without that file, the mean and std that the user
    stated. InputError if it is missing and nothing is stated, or the other way round."""
    path = folder / "preprocessor_config.json"
    if stat_of(path) is not None:
        if stated.options:
            raise InputError(
                f"{', '.join(stated.options)}: {path} states these",
                fix="leave them out, or change that file",
            )
        return read_object(path)
    if stated.mean is None or stated.std is None:
        raise InputError(
            f"{path} is missing; it says how pictures are normalised",
            fix="copy it from the checkpoint that was fine-tuned; or state what it would say, as "
            "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225",
        )
    return {"image_mean": stated.mean, "image_std": stated.std}


def _segformer_preprocess(
    settings: dict[str, Any], imgsz: tuple[int, int] | None, folder: Path | None
) -> Preprocess:
    """The Preprocess that preprocessor_config.json describes; InputError for a setting that this
    program does not support. ``settings`` are the contents of that file in ``folder``.

    Hugging Face resizes by Pillow's anti-aliased triangle filter, this project by averaging: on six
    COCO photographs at 384 x 384 the normalised values differ by 0.02 on average and 0.58 at most,
    and 98.6 % of a trained ESPNetv2's labels are equal, 92.7 % on the worst photograph
    (transformers 5.23).
    """

    where = (folder or Path()) / "preprocessor_config.json"

    def refuse(key: str, wanted: str, fix: str = "") -> InputError:
        """The error to raise for the value of a key."""
        return setting_error(where, key, settings.get(key), wanted, fix)

    known = {"do_resize": True, "do_normalize": True, "do_rescale": True}
    ignored = {"do_reduce_labels", "do_convert_rgb"}  # without effect on RGB pictures
    for key, value in settings.items():
        if key in known and not isinstance(value, bool):
            raise refuse(key, "true or false")
        if key.startswith("do_") and key not in known and key not in ignored and value:
            raise refuse(
                key,
                "false: this step is not supported",
                f'set "{key}": false in that file; whole pictures are stretched to the input size',
            )
    flags = known | {key: settings[key] for key in known if key in settings}
    if not flags["do_resize"]:
        raise refuse("do_resize", "true: a frozen network has one input size")
    if settings.get("resample", _BILINEAR) != _BILINEAR:
        raise refuse(
            "resample",
            f"{_BILINEAR} (bilinear)",
            f'set "resample": {_BILINEAR} in that file; a few labels change, because pictures are '
            "then reduced by averaging",
        )
    size = settings.get("size", 512)
    if imgsz is not None:
        sides = [*imgsz]
    elif isinstance(size, dict) and set(size) == {"height", "width"}:
        sides = [size["height"], size["width"]]
    else:  # a number or {"shortest_edge": number}: a square of that side
        square = isinstance(size, dict) and set(size) == {"shortest_edge"}
        sides = [size["shortest_edge"] if square else size] * 2
    if not are_sides(sides):
        raise refuse(
            "size",
            'a number, {"height", "width"} or {"shortest_edge"}',
            "state the size of the input: --imgsz HEIGHT WIDTH",
        )

    normalise: Any = read_normalisation(settings, where, _IMAGENET)
    height, width = sides
    own = Preprocess(**normalise, height=height, width=width, multiple=32, minimum=32)
    if min(height, width) < own.minimum:
        raise InputError(
            f"imgsz is {(height, width)}; SegFormer wants at least {own.minimum} x {own.minimum}",
            fix=f"--imgsz {own.minimum}",
        )
    return own
