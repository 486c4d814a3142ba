"""SegFormer from a checkpoint folder of Hugging Face's transformers, or untrained."""

from __future__ import annotations

import io
import os
import stat
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from export.models.base import PriorModel, read_object
from export.models.stated import Stated
from runtime.checks import is_number
from runtime.engines.named_files import other_file
from runtime.errors import BundleError, InputError, MissingBackend, first_line
from runtime.files import here, stat_of, utf8_name
from runtime.prior.names import class_names
from runtime.prior.preprocess import Preprocess, are_sides

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_BELOW = ("*", "snapshots/*", "*/snapshots/*")  # where a hub's cache has checkpoints
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
    """
    if here() == "(removed)":  # MKL, a library of torch, would end the process
        raise InputError("the current folder was removed; torch needs one", fix="cd to another")
    try:
        import torch
        from transformers import SegformerConfig, SegformerForSemanticSegmentation
    except (ImportError, RuntimeError, OSError) as error:
        raise _import_error(error) from error

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
            network = SegformerForSemanticSegmentation(SegformerConfig(num_labels=150))
        settings, names, name = {}, None, "segformer-b0-untrained"
    else:
        config = _read_config(weights)
        settings = _read_settings(weights, stated)
        names = _class_names(config, weights)
        network, name = _load_segformer(weights), _name(weights)
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


def _read_config(folder: Path) -> dict[str, Any]:
    """The contents of config.json. InputError unless ``folder`` is a SegFormer checkpoint."""
    found = stat_of(folder)
    if found is None or not stat.S_ISDIR(found.st_mode):
        raise InputError(
            f"weights is {str(folder)!r}, which is no folder here; nothing is downloaded",
            fix="on a machine with internet run: hf download "
            f"{folder if len(folder.parts) == 2 else 'NAME/OF-MODEL'} --local-dir DIR; "
            "then copy DIR here and pass --weights DIR",
        )
    if stat_of(folder / "config.json") is None:
        below = [p for depth in _BELOW for p in folder.glob(f"{depth}/config.json")]
        if below:
            newest = max(below, key=lambda path: path.parent.stat().st_mtime).parent
            raise InputError(
                f"{folder} is no checkpoint; it contains checkpoints in folders",
                fix=f"--weights {newest}",
            )
    config = read_object(folder / "config.json")
    if config.get("model_type") != "segformer":
        raise InputError(
            f"{folder / 'config.json'} is for {config.get('model_type')!r}; wanted 'segformer'",
            fix="export that network to ONNX and pass --model PATH.onnx",
        )
    return config


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


def _name(folder: Path) -> str:
    """What the bundle calls the network: the name of the folder; or in a hub's cache, where
    folders are called by hashes (models--OWNER--NAME/snapshots/HASH), the name of the model."""
    whole = Path(os.path.realpath(folder))
    if whole.parent.name == "snapshots" and whole.parents[1].name.startswith("models--"):
        return whole.parents[1].name.rpartition("--")[2]
    return whole.name


def _import_error(error: Exception) -> MissingBackend:
    """The error to raise if torch or transformers cannot be imported: not installed, or installed
    in versions that do not fit."""
    if isinstance(error, ModuleNotFoundError) and error.name in ("torch", "transformers"):
        return MissingBackend(
            f"torch and transformers are needed for SegFormer, but {error}",
            fix="pip install 'dynaguide-edge[export]'",
        )
    cause: BaseException = error  # transformers hides the reason in a chain of errors
    while cause.__cause__ is not None:
        cause = cause.__cause__
    fix = "install versions that fit: pip install --upgrade torch transformers"
    if "torchvision" in f"{error} {cause}":
        fix = (
            "torchvision does not fit torch: pip install --upgrade torch torchvision, or "
            "pip uninstall torchvision, which is not needed here"
        )
    return MissingBackend(
        f"torch and transformers are installed, but cannot be imported: {first_line(cause)}",
        fix=fix,
    )


def _load_segformer(folder: Path) -> Any:
    """The network with the weights from the folder's file.

    BundleError if the file is broken or contains code, or if weights are missing, unexpected or of
    another shape.
    """
    import pickle

    import huggingface_hub.errors
    import torch
    from safetensors import SafetensorError
    from transformers import SegformerForSemanticSegmentation

    # Newer versions check the types in config.json, and raise an error of their own.
    wrong_type = getattr(huggingface_hub.errors, "StrictDataclassError", ValueError)
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        if other := other_file(file):
            raise BundleError(f"{file} is {other[0]}", fix=other[1])
    try:
        # redirect_stderr hides a progress bar
        with redirect_stderr(io.StringIO()), utf8_name(folder) as name:
            network, info = SegformerForSemanticSegmentation.from_pretrained(
                name,
                local_files_only=True,
                weights_only=True,
                ignore_mismatched_sizes=True,  # the error below lists them by name
                output_loading_info=True,
                dtype=torch.float32,
            )
    except pickle.UnpicklingError as error:
        raise BundleError(
            f"the weights in {folder} are no plain weights: loading them would run code in them",
            fix="save them again as safetensors where you trust them: "
            "model.save_pretrained(DIR, safe_serialization=True)",
        ) from error
    except (
        OSError,
        ValueError,
        LookupError,
        ArithmeticError,
        AttributeError,
        TypeError,
        RuntimeError,
        EOFError,
        ImportError,
        SafetensorError,
        wrong_type,
    ) as error:
        reason = first_line((isinstance(error, wrong_type) and error.__cause__) or error)
        raise BundleError(
            f"the checkpoint in {folder} cannot be loaded: {reason}",
            fix="copy the folder again",
        ) from error
    wrong = []
    for what in ("missing", "unexpected", "mismatched"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in info[f"{what}_keys"])
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            wrong.append(f"{what}: {', '.join(keys[:5])}{more}")
    if wrong:
        raise BundleError(
            f"the weights in {folder} are not those of the network in config.json; "
            + "; ".join(wrong),
            fix="take a checkpoint fine-tuned for semantic segmentation, with its own config.json",
        )
    return network


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

    def refuse(key: str, wanted: str, fix: str = "") -> InputError:
        """The error to raise for the value of a key."""
        where = f"{folder}/preprocessor_config.json"
        return InputError(
            f"{where}: {key} is {settings.get(key)!r}; wanted {wanted}",
            fix=fix
            or "change that file if the network was trained so, or export it to ONNX yourself",
        )

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

    factor = settings.get("rescale_factor", 1 / 255) if flags["do_rescale"] else 1.0
    if not is_number(factor) or factor <= 0:
        raise refuse("rescale_factor", "a number above 0")
    gain = 255 * factor  # Hugging Face computes (gain * v - mean) / std for v in [0, 1]
    if abs(gain - 1) < 1e-6:
        gain = 1.0
    normalise: dict[str, Any] = {}
    for key, default in (("mean", 0.0), ("std", 1.0)):
        given: Any = (default,) * 3
        if flags["do_normalize"]:
            given = settings.get(f"image_{key}", _IMAGENET[key])
        if not isinstance(given, (list, tuple)) or len(given) != 3:
            raise refuse(f"image_{key}", "three numbers")
        try:
            normalise[key] = tuple(float(n) / gain for n in given)
        except (TypeError, ValueError) as error:
            raise refuse(f"image_{key}", "three numbers") from error
    height, width = sides
    own = Preprocess(**normalise, height=height, width=width, multiple=32, minimum=32)
    if min(height, width) < own.minimum:
        raise InputError(
            f"imgsz is {(height, width)}; SegFormer wants at least {own.minimum} x {own.minimum}",
            fix=f"--imgsz {own.minimum}",
        )
    return own
