"""StableDiffusion: one pass of the U-Net of a local diffusers folder, for its self-attention."""

from __future__ import annotations

import hashlib
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.checkpoint_folder import load_network, read_object
from export.guides.attention import AttentionSum, attend
from runtime.engines.named_files import check_regular, shell_word
from runtime.errors import BundleError, DeviceError, InputError, MissingBackend, first_line
from runtime.files import file_error, shown, stat_of

_DOWN = "CrossAttnDownBlock2D"
_UP = "CrossAttnUpBlock2D"
# What the U-Nets of Stable Diffusion 1.x and 2.x have in common; others lack these keys or differ.
_UNET = {
    "in_channels": 4,
    "down_block_types": [_DOWN, _DOWN, _DOWN, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", _UP, _UP, _UP],
    "layers_per_block": 2,
}
_PLAIN = {  # keys that newer files have, and the value that says the same as no key
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "transformer_layers_per_block": 1,
    "attention_type": "default",
    "addition_embed_type": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim": None,
    "only_cross_attention": False,
    "dual_cross_attention": False,
}
_LEVELS = threading.Lock()
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_FILES = {  # of each part: those that must exist. A tokenizer has others, too.
    "unet": ("config.json", _WEIGHTS),
    "vae": ("config.json", _WEIGHTS),
    "text_encoder": ("config.json", "model.safetensors"),
    "tokenizer": ("tokenizer_config.json",),
}
_COPY = "copy the whole folder again; of weights the .safetensors files are read"
_POSITIONS = ("text_model.embeddings.position_ids", "embeddings.position_ids")  # of old files


class StableDiffusion:
    """The U-Net, the encoder of pictures and the encoded empty prompt of Stable Diffusion 1.x or
    2.x, from a folder that ``StableDiffusionPipeline.save_pretrained`` of diffusers wrote.

    Nothing is downloaded, and no code in the folder is run.

    Parameters
    ----------
    folder : contains unet, vae, text_encoder and tokenizer, with weights as safetensors.
    device : "cpu", or a GPU such as "cuda:0".
    dtype : of the networks: "float32", "float16" or "bfloat16".

    Raises
    ------
    InputError : no such folder, a part of it is missing, or it is of another kind of network.
    BundleError : a damaged part.
    MissingBackend : diffusers or transformers cannot be imported, or torch finds no GPU.
    DeviceError : there is no GPU of this number.
    """

    def __init__(self, folder: Path, *, device: str = "cpu", dtype: str = "float32") -> None:
        check_folder(folder)
        kinds = _import()
        _check_device(device)
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        with _silent():
            self.prompt = self._encode_empty_prompt(folder, kinds)
            options: Any = {"use_safetensors": True, "low_cpu_mem_usage": False}
            self.unet = self._moved(load_network(kinds["unet"], folder / "unet", _COPY, **options))
            self.vae = self._moved(load_network(kinds["vae"], folder / "vae", _COPY, **options))
        self._check_fit(folder)
        del self.vae.decoder  # only pictures are encoded
        self.processors = dict(self.unet.attn_processors)

    def _moved(self, network: Any) -> Any:
        return network.to(self.device, self.dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def _encode_empty_prompt(self, folder: Path, kinds: dict[str, Any]) -> Tensor:
        """The text encoder's output for the empty prompt, (1, tokens, channels)."""
        place = folder / "tokenizer"
        with _TokenizerErrors(place):
            tokenizer = kinds["tokenizer"].from_pretrained(str(place), local_files_only=True)
            words = tokenizer(
                "", padding="max_length", max_length=tokenizer.model_max_length, truncation=True
            )
            tokens = torch.tensor([words["input_ids"]])
        place = folder / "text_encoder"
        encoder = load_network(
            kinds["text_encoder"], place, _COPY, _POSITIONS, use_safetensors=True
        )
        most, length = encoder.config.vocab_size, encoder.config.max_position_embeddings
        if tokens.shape[1] != length or int(tokens.max()) >= most:
            raise BundleError(
                f"the tokenizer in {shown(folder / 'tokenizer')} makes {tokens.shape[1]} tokens up "
                f"to {int(tokens.max())}; the text encoder takes {length} below {most}",
                fix=_COPY,
            )
        return self._moved(encoder)(tokens.to(self.device))[0]

    def _check_fit(self, folder: Path) -> None:
        """BundleError if the parts do not fit each other."""
        wanted, found = self.unet.config.cross_attention_dim, self.prompt.shape[-1]
        if wanted != found:
            raise BundleError(
                f"the text encoder in {shown(folder)} returns {found} channels; the U-Net takes "
                f"{wanted}",
                fix=_COPY,
            )
        channels, levels = self.vae.config.latent_channels, len(self.vae.config.block_out_channels)
        if channels != 4 or levels != 4:
            raise BundleError(
                f"the VAE in {shown(folder)} makes latents of {channels} channels on {levels} "
                "levels; wanted 4 and 4, as Stable Diffusion 1.x and 2.x have",
                fix=_COPY,
            )

    def attention(self, picture: np.ndarray, timestep: int) -> AttentionSum:
        """The self-attention of one pass of the U-Net: the clean latent of the picture, the empty
        prompt, and no noise. One thread at a time may call it, because the U-Net is shared.

        Parameters
        ----------
        picture : (h, w, 3) uint8 RGB; h and w are multiples of 64.
        timestep : of the diffusion, 0 to 999.

        Returns
        -------
        The maps of the 16 self-attention layers, on the latent grid of h / 8 x w / 8 cells.
        """
        height, width = picture.shape[:2]
        pixels = torch.from_numpy(picture).to(self.device).permute(2, 0, 1)[None]
        found = AttentionSum(height // 8, width // 8)
        with torch.no_grad():
            scaled = (pixels.to(torch.float32) / 127.5 - 1).to(self.dtype)
            latent = self.vae.encode(scaled).latent_dist.mode() * self.vae.config.scaling_factor
            processor = SelfAttention(found)
            self.unet.set_attn_processor(
                {
                    name: processor if name.endswith(".attn1.processor") else own
                    for name, own in self.processors.items()
                }
            )
            try:
                self.unet(latent, timestep, encoder_hidden_states=self.prompt)
            finally:
                self.unet.set_attn_processor(dict(self.processors))
        return found


class SelfAttention:
    """A processor of diffusers for the self-attention of these U-Nets, which has no mask, no group
    norm and no residual connection of its own. Its output is that of the default processor, up to
    rounding, and it adds the softmax of each head to an AttentionSum."""

    def __init__(self, found: AttentionSum) -> None:
        self.found = found

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        query, key, value = (
            attn.head_to_batch_dim(project(hidden_states))  # (heads, n, channels of a head)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        out = attend(query, key, value, attn.scale, self.found)
        projection, dropout = attn.to_out
        return dropout(projection(attn.batch_to_head_dim(out)))


def check_folder(folder: Path) -> None:
    """Check that a folder contains the parts of Stable Diffusion 1.x or 2.x. No network is loaded.

    Raises
    ------
    InputError : no such folder, a part of it is missing, or it is of another kind of network.
    """
    found = stat_of(folder)
    if found is None:
        raise InputError(
            f"weights is {shown(folder)!r}, which does not exist; nothing is downloaded",
            fix="on a machine with internet run: hf download OWNER/MODEL --local-dir DIR with a "
            "Stable Diffusion 1.x or 2.x; then copy DIR here and pass --weights DIR",
        )
    if not stat.S_ISDIR(found.st_mode):
        raise InputError(
            f"weights is {shown(folder)}, a file; wanted a folder of diffusers",
            fix="convert it where diffusers is: StableDiffusionPipeline.from_single_file(FILE)"
            ".save_pretrained(DIR); then pass --weights DIR",
        )
    if stat_of(folder / "unet") is None:
        below = [*folder.glob("snapshots/*/unet"), *folder.glob("*/snapshots/*/unet")]
        newest = max(below, key=lambda path: path.stat().st_mtime).parent if below else None
        raise InputError(
            f"{shown(folder)} contains no folder unet, so it is no folder of diffusers",
            fix=f"--weights {shell_word(str(newest))}"
            if newest
            else "name the folder that contains unet and vae",
        )
    for part, names in _FILES.items():
        for name in names:
            if stat_of(folder / part / name) is None:
                raise InputError(f"{shown(folder / part / name)} is missing", fix=_COPY)
            check_regular(folder / part / name, "a file")
    config = read_object(folder / "unet" / "config.json")
    differs = [key for key, value in _UNET.items() if config.get(key) != value]
    differs += [key for key, value in _PLAIN.items() if config.get(key, value) != value]
    if differs:
        words = ", ".join(f"{key} {config.get(key)!r}" for key in differs)
        raise InputError(
            f"{shown(folder / 'unet' / 'config.json')} is of no Stable Diffusion 1.x or 2.x for "
            f"pictures from text: {words}"[:500],
            fix="take the folder of another model, such as Stable Diffusion 1.5 or 2.1",
        )


def sha256_of(folder: Path) -> str:
    """The sha256 of the hashes of all files that decide the attention: configs, weights and the
    tokenizer's files.

    Raises
    ------
    InputError : a file cannot be read.
    """
    paths = [
        folder / part / name for part in ("text_encoder", "unet", "vae") for name in _FILES[part]
    ]
    try:
        words = sorted(path for path in (folder / "tokenizer").iterdir() if path.is_file())
        state = hashlib.sha256()
        for path in paths + words:
            own = hashlib.sha256()
            with path.open("rb") as file:
                while part := file.read(2**20):
                    own.update(part)
            state.update(own.digest())
    except OSError as error:
        raise file_error("read", error.filename or folder, error) from error
    return state.hexdigest()


def _import() -> dict[str, Any]:
    """The classes of the parts. MissingBackend if a package cannot be imported."""
    try:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer
    except (ImportError, RuntimeError, OSError) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "diffusers"
        what = "is not installed" if absent else f"cannot be imported: {first_line(error)}"
        raise MissingBackend(
            f"DiffSeg runs Stable Diffusion with diffusers, which {what}",
            fix="pip install 'dynaguide-edge[diffseg]'",
        ) from error
    return {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
    }


class _TokenizerErrors:
    """Makes BundleErrors of the errors for a damaged tokenizer: a ``with`` block. Some of them are
    plain Exceptions, because the library tokenizers raises no other ones."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: Any, _: object) -> None:
        damaged = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError)
        if kind is Exception or (kind is not None and issubclass(kind, damaged)):
            raise BundleError(
                f"the tokenizer in {shown(self.place)} cannot be loaded: {first_line(error)}",
                fix=_COPY,
            ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Hide the reports and the progress bars of diffusers and transformers: a ``with`` block. One
    thread at a time is inside, because the libraries have one level for the whole process."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    with _LEVELS:
        levels = [(library, library.get_verbosity()) for library in (diffusers, transformers)]
        for library, _ in levels:
            library.set_verbosity_error()
        try:
            yield
        finally:
            for library, level in levels:
                library.set_verbosity(level)


def _check_device(device: str) -> None:
    """MissingBackend if torch finds no GPU, DeviceError if it finds none of this number."""
    if device == "cpu":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise MissingBackend(
            f"device is {device}, but torch finds no GPU that it can use", fix="--device cpu"
        )
    if int(device.removeprefix("cuda:")) >= count:
        raise DeviceError(f"device is {device}, but torch finds {count} GPUs", fix="--device cpu")
