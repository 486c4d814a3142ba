"""Vision transformers from checkpoint folders of Hugging Face: ViT, DINO and DINOv2."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from export.backbones.base import Backbone
from export.checkpoint_folder import (
    checkpoint_name,
    import_error,
    load_network,
    read_config,
    read_normalisation,
    read_object,
)
from runtime.checks import is_count, shown_value
from runtime.engines.named_files import read_regular
from runtime.errors import BundleError, InputError, MissingBackend

FEATURES = ("tokens", "keys")
KINDS = {  # model_type in config.json -> the class of transformers; DINO's are of type "vit"
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}
# Where the key projection of block n is: in transformers 4.50 to 5.0 for all kinds; in 5.24 for
# DINOv2; in 5.24 for ViT.
KEYS = (
    "encoder.layer.{}.attention.attention.key",
    "encoder.layer.{}.attention.k_proj",
    "layers.{}.attention.k_proj",
)
_COUNTS = {  # the largest whole numbers in config.json, of which the smallest is 1
    "hidden_size": 16384,
    "num_hidden_layers": 256,
    "num_attention_heads": 1024,
    "patch_size": 256,
}
_IGNORED = ("pooler.", "classifier.", "vit.pooler.")  # heads, which are behind the features


class VisionTransformer(nn.Module):
    """A network of transformers that returns the features of its patches as a picture.

    Parameters
    ----------
    network : a ViTModel, Dinov2Model or Dinov2WithRegistersModel.
    features : "tokens", after the last normalisation, or "keys", of the last block.
    """

    def __init__(self, network: Any, features: str) -> None:
        super().__init__()
        self.network = network
        self.patch = network.config.patch_size
        # The class token and the registers are in front of the patches.
        self.skipped = 1 + getattr(network.config, "num_register_tokens", 0)
        self.options = (
            {"interpolate_pos_encoding": True} if network.config.model_type == "vit" else {}
        )
        self.keys = None
        if features == "keys":
            self.keys = key_projection(network, network.config.num_hidden_layers - 1)

    def forward(self, images: Tensor) -> Tensor:
        """Features, (N, C, h / patch, w / patch), of images (N, 3, h, w) float32, normalised.

        Raises
        ------
        InputError : a side is no multiple of the patch.
        """
        height, width = images.shape[2:]
        if height % self.patch or width % self.patch:
            near = [max(1, round(n / self.patch)) * self.patch for n in (height, width)]
            raise InputError(
                f"the input is {height} x {width} pixels; wanted multiples of {self.patch}, the "
                "side of this network's patches",
                fix=f"choose {near[0]} x {near[1]}, the nearest size: --imgsz {near[0]}",
            )
        kept: list[Tensor] = []
        hook = None
        if self.keys is not None:
            projection = self.network.get_submodule(self.keys)
            hook = projection.register_forward_hook(lambda _module, _x, y: kept.append(y))
        try:
            found = self.network(pixel_values=images, **self.options).last_hidden_state
        finally:
            if hook is not None:
                hook.remove()
        patches = (kept[0] if hook is not None else found)[:, self.skipped :]
        rows, columns = height // self.patch, width // self.patch
        return patches.transpose(1, 2).reshape(images.shape[0], -1, rows, columns)


def key_projection(network: Any, block: int) -> str:
    """The name of the module that projects the tokens of a block to keys.

    Raises
    ------
    MissingBackend : this version of transformers calls it otherwise.
    """
    names = [name.format(block) for name in KEYS]
    modules = dict(network.named_modules())
    for name in names:
        if name in modules:
            return name
    raise MissingBackend(
        f"the key projection of {type(network).__name__} is at none of {', '.join(names)} in this "
        "version of transformers",
        fix="pip install 'transformers>=4.50,<=5.24', or choose --features tokens",
    )


def vision_transformer(folder: Path, features: str = "tokens") -> Backbone:
    """ViT (Dosovitskiy et al., 2020), DINO (Caron et al., 2021) or DINOv2 (Oquab et al., 2023).

    Parameters
    ----------
    folder : config.json, preprocessor_config.json, which states mean and std, and the weights.
    features : "tokens" or "keys", as of :class:`VisionTransformer`.

    Raises
    ------
    InputError : no such folder or features, another kind of network, a size of it that is out of
        range, or no mean and std.
    BundleError : weights that are broken, unsafe, or not those of the network in config.json.
    MissingBackend : transformers cannot be imported, or has another layout.
    """
    if features not in FEATURES:
        raise InputError(
            f"features is {features!r}; a vision transformer has {', '.join(FEATURES)}",
            fix="--features tokens",
        )
    config = read_config(
        folder,
        "backbone",
        tuple(KINDS),
        "supported are efficientnet-lite0, a folder of one of these kinds, and a file of "
        "ResNet-18 or -50",
    )
    _check_counts(config, folder / "config.json")
    settings = folder / "preprocessor_config.json"
    normalisation: Any = read_normalisation(read_object(settings), settings, {})
    try:
        import transformers
    except (ImportError, RuntimeError, OSError) as error:
        raise import_error(error, "vision transformers", "train") from error
    kind = config["model_type"]
    try:
        network_class = getattr(transformers, KINDS[kind])
    except (AttributeError, ImportError, RuntimeError, OSError) as error:
        raise import_error(error, KINDS[kind], "train") from error
    options = {"add_pooling_layer": False} if kind == "vit" else {}
    network = load_network(
        network_class, folder, "copy the whole folder of the checkpoint", _IGNORED, **options
    )
    network = network.float().eval().requires_grad_(False)
    module = VisionTransformer(network, features).eval()
    channels = network.config.hidden_size
    if module.keys is not None:
        channels = network.get_submodule(module.keys).out_features
    return Backbone(
        name=checkpoint_name(folder),
        module=module,
        channels=channels,
        stride=module.patch,
        **normalisation,
        source=os.path.abspath(folder),
        features=features,
        sha256=_sha256(folder, config),
        licence="the checkpoint's own",
        library=f"transformers {transformers.__version__}",
    )


def _check_counts(config: dict[str, Any], where: Path) -> None:
    """InputError if a size of the network is no whole number or out of range."""
    for key, most in _COUNTS.items():
        if key in config and not is_count(config[key], 1, most):
            raise InputError(
                f"{where}: {key} is {shown_value(config[key])}; wanted a whole number, 1 to {most}",
                fix="copy config.json again, or take another checkpoint",
            )
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if width and heads and width % heads:
        raise InputError(
            f"{where}: hidden_size is {width}, and num_attention_heads {heads}; wanted a multiple",
            fix="copy config.json again, or take another checkpoint",
        )


def _sha256(folder: Path, config: dict[str, Any]) -> str:
    """The sha256 of the hashes of config.json and of each file of weights, in the order of their
    names. Of config.json, which can change the features too, the fields count, not their order."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise BundleError(f"{folder} contains no weights", fix="copy the folder again")
    parts = [json.dumps(config, sort_keys=True).encode()]
    parts += [read_regular(file, "a file of weights") for file in files]
    hashes = "".join(hashlib.sha256(part).hexdigest() for part in parts)
    return hashlib.sha256(hashes.encode()).hexdigest()
