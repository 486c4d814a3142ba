"""The priors that can be frozen, one function each; a user's own is a function of the same kind."""

from __future__ import annotations

import difflib
import inspect
import io
import json
import pkgutil
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.engines.onnx import OnnxEngine
from runtime.errors import BundleError, InputError, MissingBackend
from runtime.prior.network import check_imgsz, fixed_size
from runtime.prior.preprocess import Preprocess, are_sides, read_json

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch.nn import Module

OPSET = 18
BUILT_IN = ("segformer", "kmeans")
OUTPUTS = ("logits", "probabilities", "labels")
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_BILINEAR = 2  # PIL's number, in preprocessor_config.json
_SEGFORMER_LICENCE = (
    "the checkpoint's own; NVIDIA's SegFormer checkpoints are for research and evaluation only"
)


@dataclass(frozen=True, kw_only=True)
class PriorModel:
    """A prior before freezing; exactly one of ``module`` and ``onnx``, or neither for K-means.

    Parameters
    ----------
    name : short, for the manifest.
    module : takes (1, 3, h, w) float32, gives (1, C, h', w') scores or (1, h', w') integer labels.
    onnx : the same as a serialised model without external data.
    preprocess : from picture to input, with resize "stretch": its height and width are those the
        prior is frozen for. None for K-means.
    names : by class, or None.
    output : "logits", "probabilities" (the soft-max is inside) or "labels".
    licence : of the weights, in words.
    trained : False when the weights are random.
    opset : that ``module`` is exported with.
    """

    name: str
    module: Module | None = None
    onnx: bytes | None = None
    preprocess: Preprocess | None = None
    names: list[str] | None = None
    output: str = "logits"
    licence: str = "not stated"
    trained: bool = True
    opset: int = OPSET

    def __post_init__(self) -> None:
        network = (self.module is not None) + (self.onnx is not None)
        if network > 1 or (network == 1) != (self.preprocess is not None):
            raise InputError(
                f"prior {self.name}: wanted a module or onnx, not both, and its preprocess; "
                "neither for K-means"
            )
        if self.preprocess is not None and self.preprocess.resize != "stretch":
            raise InputError(
                f"prior {self.name}: preprocess resizes by {self.preprocess.resize!r}; "
                "wanted 'stretch' with the height and width to freeze for"
            )
        if self.output not in OUTPUTS:
            raise InputError(
                f"prior {self.name}: output is {self.output!r}; wanted {', '.join(OUTPUTS)}"
            )


def load_model(
    text: str, weights: str | Path | None = None, imgsz: tuple[int, int] | int | None = None
) -> PriorModel:
    """The prior that ``--model`` names.

    Parameters
    ----------
    text : "segformer", "kmeans", a path ending in .onnx, or "module:function", the user's own: it
        is called with ``imgsz`` and returns a :class:`PriorModel`.
    weights : for "segformer" alone: a checkpoint's folder; None leaves the network untrained.
    imgsz : input size to freeze for, (height, width) or one side of a square; None takes the
        model's own.

    Raises
    ------
    InputError : no such model, folder or function, or settings that this program does not know.
    BundleError : an .onnx file or checkpoint that is broken or does not fit.
    """
    if imgsz is not None:
        check_imgsz(imgsz)
    if isinstance(imgsz, int):
        imgsz = (imgsz, imgsz)
    if weights is not None and text != "segformer":
        raise InputError(f"weights are for segformer only; model is {text!r}", fix="leave them out")
    if text == "segformer":
        return segformer(None if weights is None else Path(weights), imgsz)
    if text == "kmeans":
        if imgsz is not None:
            raise InputError("imgsz is for networks; kmeans has none", fix="leave it out")
        return kmeans()
    if Path(text).suffix.lower() == ".onnx":
        return onnx_file(Path(text), imgsz)
    if ":" in text:
        return _users_own(text, imgsz)
    near = difflib.get_close_matches(text.lower(), BUILT_IN, 1, 0.5)
    raise InputError(
        f"model is {text!r}; wanted {', '.join(BUILT_IN)}, a path ending in .onnx, or "
        "module:function",
        fix=f"did you mean --model {near[0]}?" if near else "",
    )


def kmeans() -> PriorModel:
    """The embedded default: K-means on colours. No network, nothing to freeze."""
    return PriorModel(name="kmeans", licence="none: no weights")


def onnx_file(path: Path, imgsz: tuple[int, int] | None = None) -> PriorModel:
    """An existing ONNX segmentation network; its metadata_props say how to feed it.

    Metadata: what :meth:`Preprocess.from_metadata` reads, ``classes`` (JSON list of names), ``output``
    (starts with "probabilities" or "labels"), ``licence``.

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
        _check_size(size, preprocess, path.name)
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


def segformer(weights: Path | None = None, imgsz: tuple[int, int] | None = None) -> PriorModel:
    """SegFormer (Xie et al., 2021) from a checkpoint folder in Hugging Face's format.

    The folder holds config.json (which says B0 to B5), preprocessor_config.json and the weights as
    model.safetensors, sharded safetensors or a weights-only pytorch_model.bin. It is read by
    ``transformers``; nothing is downloaded and no code in it is run.

    Parameters
    ----------
    weights : the folder; None makes a B0 of 150 classes with random weights (``trained`` is False).
    imgsz : (height, width) to freeze for, instead of the checkpoint's.

    Raises
    ------
    InputError : no such folder, a file missing, or a setting that this program does not know.
    BundleError : weights that are broken, unsafe, or not those of the network in config.json.
    MissingBackend : torch or transformers is not installed.
    """
    try:
        import torch
        from transformers import SegformerConfig, SegformerForSemanticSegmentation
    except ImportError as error:
        raise MissingBackend(
            f"torch and transformers are needed for SegFormer, but {error}",
            fix="pip install 'dynaguide-edge[export]'",
        ) from error

    class Logits(torch.nn.Module):
        """The network with one tensor as output."""

        def __init__(self, network: Any) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Any) -> Any:
            return self.network(images).logits

    if weights is None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = SegformerForSemanticSegmentation(SegformerConfig(num_labels=150))
        settings, names, name = {}, None, "segformer-b0-untrained"
    else:
        config = _read_config(weights)
        settings = _read_object(weights / "preprocessor_config.json")
        names = _class_names(config, weights)
        network, name = _load_segformer(weights), weights.resolve().name
    preprocess = _segformer_preprocess(settings, imgsz, weights)
    return PriorModel(
        name=name,
        module=Logits(network.float().eval().requires_grad_(False)),
        preprocess=preprocess,
        names=names,
        licence="none: random weights" if weights is None else _SEGFORMER_LICENCE,
        trained=weights is not None,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json, when ``folder`` is a SegFormer checkpoint."""
    if not folder.is_dir():
        raise InputError(
            f"weights is {str(folder)!r}, which is no folder here; nothing is downloaded",
            fix="on a machine with internet run: hf download "
            f"{folder if len(folder.parts) == 2 else 'NAME/OF-MODEL'} --local-dir DIR; "
            "then copy DIR here and pass --weights DIR",
        )
    config = _read_object(folder / "config.json")
    if config.get("model_type") != "segformer":
        raise InputError(
            f"{folder / 'config.json'} is for {config.get('model_type')!r}; wanted 'segformer'",
            fix="export that network to ONNX and pass --model PATH.onnx",
        )
    return config


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing; it is part of a checkpoint in Hugging Face's format",
            fix="copy the whole folder of the checkpoint",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}", fix="copy it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}; wanted a JSON object")
    return value


def _class_names(config: dict[str, Any], folder: Path) -> list[str] | None:
    """Names in index order; None when the checkpoint does not name its classes."""
    names = config.get("id2label")
    if names is None:
        return None
    wanted = [str(i) for i in range(len(names))]
    if not isinstance(names, dict) or set(names) != set(wanted):
        raise InputError(f"{folder / 'config.json'}: id2label has other keys than 0, 1, 2, ...")
    return [str(names[i]) for i in wanted]


def _load_segformer(folder: Path) -> Any:
    """The network with every weight from the folder's file; never a random one among them."""
    import pickle

    import torch
    from safetensors import SafetensorError
    from transformers import SegformerForSemanticSegmentation

    try:
        with redirect_stderr(io.StringIO()):  # a progress bar
            network, info = SegformerForSemanticSegmentation.from_pretrained(
                folder,
                local_files_only=True,
                weights_only=True,
                ignore_mismatched_sizes=True,  # they are told below, by name
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
        KeyError,
        TypeError,
        RuntimeError,
        EOFError,
        ImportError,
        SafetensorError,
    ) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BundleError(
            f"the checkpoint in {folder} cannot be loaded: {reason}", fix="copy the folder again"
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
    """preprocessor_config.json in our words.

    Hugging Face resizes by Pillow's anti-aliased triangle filter, this project by averaging: on six
    COCO photographs at 384 x 384 the normalised values differ by 0.02 on average and 0.58 at most,
    and a trained ESPNetv2 gives 98.6 % equal labels, 92.7 % on the worst (transformers 5.23).
    """

    def refuse(key: str, wanted: str) -> InputError:
        where = f"{folder}/preprocessor_config.json"
        return InputError(f"{where}: {key} is {settings.get(key)!r}; wanted {wanted}")

    known = {"do_resize": True, "do_normalize": True, "do_rescale": True}
    ours = {"do_reduce_labels", "do_convert_rgb"}  # of no effect on RGB pictures
    for key, value in settings.items():
        if key in known and not isinstance(value, bool):
            raise refuse(key, "true or false")
        if key.startswith("do_") and key not in known and key not in ours and value:
            raise refuse(key, "false: this step is not supported")
    flags = known | {key: settings[key] for key in known if key in settings}
    if not flags["do_resize"]:
        raise refuse("do_resize", "true: a frozen network has one input size")
    if settings.get("resample", _BILINEAR) != _BILINEAR:
        raise refuse("resample", f"{_BILINEAR} (bilinear)")
    size = settings.get("size", 512)
    if isinstance(size, dict) and set(size) == {"height", "width"}:
        sides = [size["height"], size["width"]]
    else:  # a number, or {"shortest_edge"}: the square that has it
        square = isinstance(size, dict) and set(size) == {"shortest_edge"}
        sides = [size["shortest_edge"] if square else size] * 2
    if not are_sides(sides):
        raise refuse("size", 'a number, {"height", "width"} or {"shortest_edge"}')

    factor = settings.get("rescale_factor", 1 / 255) if flags["do_rescale"] else 1.0
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor > 0:
        raise refuse("rescale_factor", "a number above 0")
    gain = 255 * factor  # their value is gain * v for v in [0, 1]: (gain v - mean) / std
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
    height, width = imgsz or sides
    own = Preprocess(**normalise, height=height, width=width, multiple=32, minimum=32)
    if min(height, width) < own.minimum:
        raise InputError(
            f"imgsz is {(height, width)}; SegFormer wants at least {own.minimum} x {own.minimum}"
        )
    return own


def _check_size(size: tuple[int, int], preprocess: Preprocess, name: str) -> None:
    multiple, minimum = preprocess.multiple, preprocess.minimum
    if any(n % multiple or n < minimum for n in size):
        least = -(-minimum // multiple) * multiple
        near = [max(least, round(n / multiple) * multiple) for n in size]
        raise InputError(
            f"imgsz is {size}; {name} wants multiples of {multiple}, at least {minimum}",
            fix=f"--imgsz {near[0]} {near[1]}",
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


def _users_own(text: str, imgsz: tuple[int, int] | None) -> PriorModel:
    try:
        function = pkgutil.resolve_name(text)
    except AttributeError as error:
        raise InputError(
            f"model is {text!r}: {error}", fix="name a function that the module defines"
        ) from error
    except (ImportError, ValueError) as error:
        raise InputError(
            f"model is {text!r}, which cannot be imported: {error}",
            fix="run from the folder of the module, or add that folder to PYTHONPATH",
        ) from error
    if not callable(function):
        raise InputError(f"model {text!r} is a {type(function).__name__}; wanted a function")
    try:
        inspect.signature(function).bind(imgsz)
    except TypeError as error:
        raise InputError(
            f"{text} cannot be called with the input size: {error}",
            fix="def NAME(imgsz): it gets (height, width) or None",
        ) from error
    model = function(imgsz)
    if not isinstance(model, PriorModel):
        raise InputError(
            f"{text} returned a {type(model).__name__}; wanted an export.models.PriorModel"
        )
    return model
