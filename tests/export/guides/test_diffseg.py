"""DiffSeg on a tiny random Stable Diffusion. Random weights give segments without meaning: the
tests compare them with a slow version, and measure no quality."""

import argparse
import copy
import io
import json
import logging
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import diffseg_reference as reference
import numpy as np
import pytest
import tiny_diffusion
import torch
from cases import case

from export.guides.attention import AttentionSum
from export.guides.diffseg import (
    DiffSeg,
    DiffSegOptions,
    add_options,
    from_arguments,
    input_size,
)
from export.guides.stable_diffusion import SelfAttention, StableDiffusion, check_folder, sha256_of
from runtime.core.resize import resize
from runtime.errors import BundleError, InputError, MissingBackend
from sdk import Segmenter

SMALL = DiffSegOptions(size=128, grid=4, threshold=0.3)
PARTS = ("unet", "vae", "text_encoder", "tokenizer")


def picture(height, width, seed=0):
    blocks = np.random.default_rng(seed).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    return resize(blocks, height, width)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Stable Diffusion 1.x."""
    pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
    return tiny_diffusion.save(tmp_path_factory.mktemp("diffusion"))


@pytest.fixture(scope="module")
def model(folder):
    return DiffSeg(folder, SMALL)


def copied(folder, place):
    shutil.copytree(folder, place)
    return place


def variant(model, **changes):
    """The same network with other options."""
    other = copy.copy(model)
    other.options = replace(model.options, **changes)
    return other


def hooked_maps(network, pixels):
    """The self-attention of the U-Net with diffusers' own processors: the outputs of the layers for
    queries and keys, from which NumPy computes the soft-max in float64."""
    found, hooks = {}, []
    for name, module in network.unet.named_modules():
        if name.endswith((".attn1.to_q", ".attn1.to_k")):
            hooks.append(
                module.register_forward_hook(
                    lambda _, __, out, name=name: found.update({name: out[0].double().numpy()})
                )
            )
    values = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        latent = network.vae.encode(values).latent_dist.mean * network.vae.config.scaling_factor
        network.unet(latent, torch.tensor(300), encoder_hidden_states=network.prompt)
    for hook in hooks:
        hook.remove()
    maps = []
    for name in [name for name in found if name.endswith("to_q")]:
        heads = network.unet.get_submodule(name.removesuffix(".to_q")).heads
        query, key = (
            found[name.removesuffix("to_q") + part].reshape(len(found[name]), heads, -1)
            for part in ("to_q", "to_k")
        )
        scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(query.shape[2])
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        maps.append(scores / scores.sum(-1, keepdims=True))
    return maps


# The whole of it


@pytest.mark.parametrize("kind", ["1.x", "2.x"])
def test_segments_are_those_of_plain_loops(folder, model, tmp_path, kind):
    if kind == "2.x":  # linear projections, and a number of heads for each level
        place = tiny_diffusion.save(tmp_path / "two", linear=True, heads=(2, 1, 2, 4))
        model = DiffSeg(place, SMALL)
    image = picture(60, 100)
    height, width = input_size(60, 100, 128)
    assert (height, width) == (128, 192)
    pixels = resize(image, height, width)
    maps = hooked_maps(model.network, pixels)
    assert len(maps) == 16
    assert sorted(block.shape[1] for block in maps) == [6] + [24] * 5 + [96] * 5 + [384] * 5
    found = model.network.attention(pixels, 300).aggregate()
    wanted = reference.aggregate(maps, height // 8, width // 8)
    # A soft-max turns the rounding of scores of about 100 by 1e-6 of them into 1e-4 of a value.
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-9)
    starts = reference.anchors(16, 24, 4)
    proposals = reference.merge(wanted, starts, (0.3,) * 3)
    assert 1 < len(proposals) < len(starts)
    labels = reference.suppress(proposals, (16, 24), (99, 165))
    guide = model.own_guide(image)
    assert guide.shape == (99, 165) and guide.dtype == np.int32 and len(np.unique(labels)) > 1
    assert (guide == labels).mean() > 0.999  # a pixel between two segments is rounded


def test_the_processor_returns_what_the_default_one_returns(model):
    network = model.network
    latent = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = network.unet(latent, 300, encoder_hidden_states=network.prompt).sample
        processor = SelfAttention(AttentionSum(8, 16))
        network.unet.set_attn_processor(
            {
                name: processor if "attn1" in name else own
                for name, own in network.processors.items()
            }
        )
        found = network.unet(latent, 300, encoder_hidden_states=network.prompt).sample
        network.unet.set_attn_processor(dict(network.processors))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_the_prompt_is_the_empty_one(folder, model):
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    with torch.no_grad():
        wanted = encoder(torch.tensor([[18] + [19] * 8]))[0]
    np.testing.assert_allclose(model.network.prompt, wanted, rtol=1e-5, atol=1e-6)


def test_each_option_that_decides_values_has_an_effect(folder, model):
    image = picture(70, 100)
    base = model.own_guide(image)
    assert (model.own_guide(image) == base).all()  # the same bits
    for change in (
        *({"threshold": 1e-4}, {"threshold": (0.3, 1e-4, 1e-4)}, {"rounds": 1}, {"grid": 2}),
        *({"timestep": 999}, {"kmeans": True}, {"size": 64}, {"crop": "square"}),
        {"dtype": "bfloat16"},
    ):
        with case(str(change)):
            other = variant(model, **change)
            if "dtype" in change:
                other = DiffSeg(folder, other.options)
            found = other.own_guide(image)
            assert found.shape != base.shape or (found != base).any()
            assert other.entry() != model.entry()


def test_the_square_is_the_centre_and_the_rest_is_unknown(model):
    model = variant(model, crop="square")
    for size in ((60, 101), (101, 60), (80, 80), (130, 260)):
        with case(size):
            image = picture(*size)
            side = min(size)
            top, left = ((n - side) // 2 for n in size)
            guide = model.own_guide(image)
            assert guide.shape == tuple(round(n * 128 / side) for n in size)
            inside = guide >= 0
            assert inside.sum() == 128 * 128
            rows, columns = np.nonzero(inside)
            assert abs(rows[0] - (guide.shape[0] - 1 - rows[-1])) <= 1
            assert abs(columns[0] - (guide.shape[1] - 1 - columns[-1])) <= 1
            own = model.own_guide(image[top : top + side, left : left + side])
            assert (guide[inside].reshape(128, 128) == own).all()


def test_a_segmenter_takes_it(model):
    image = picture(60, 90)
    result = Segmenter(model)(image)
    assert result.labels.shape == (60, 90) and result.names is None


def test_the_entry_says_what_decides_the_values(folder, model, tmp_path):
    entry = json.loads(json.dumps(model.entry()))
    assert entry["kind"] == "diffseg" == model.name and entry["output"] == "labels" == model.output
    assert model.names is None
    assert entry["options"] == {
        "crop": "whole",
        "size": 128,
        "timestep": 300,
        "grid": 4,
        "threshold": 0.3,
        "rounds": 3,
        "kmeans": False,
        "dtype": "float32",
    }
    assert entry["sha256"] == sha256_of(folder) and len(entry["sha256"]) == 64
    for name in (
        *("unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        *("vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
        *("text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/vocab.json"),
    ):
        with case(name):
            place = copied(folder, tmp_path / name.replace("/", "-"))
            data = (place / name).read_bytes()
            (place / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            assert sha256_of(place) != entry["sha256"]


def test_nothing_is_printed_and_nothing_is_asked_from_the_network(
    folder, capfd, monkeypatch, recwarn
):
    from diffusers.utils import logging as diffusers_logging

    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    logged = logging.StreamHandler(io.StringIO())  # diffusers' own handler has an older stderr
    diffusers_logging.add_handler(logged)
    DiffSeg(folder, SMALL).own_guide(picture(40, 40))
    diffusers_logging.remove_handler(logged)
    assert not logged.stream.getvalue()
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_after_ctrl_c_the_model_is_as_before(model, monkeypatch):
    image = picture(40, 60)
    wanted = model.own_guide(image)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AttentionSum, "level", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.own_guide(image)
    assert {*map(type, model.network.unet.attn_processors.values())} == {
        *map(type, model.network.processors.values())
    }
    assert (model.own_guide(image) == wanted).all()


def test_pictures_that_cannot_be_segmented(model, monkeypatch):
    with pytest.raises(InputError, match="one is at most 64 times the other"):
        model.own_guide(np.zeros((2, 129, 3), np.uint8))
    with pytest.raises(InputError, match=r"wanted \(H, W, 3\) uint8"):
        model.own_guide(np.zeros((20, 20), np.uint8))
    assert model.own_guide(np.zeros((1, 64, 3), np.uint8)).shape == (16, 1024)

    def broken(self):
        return torch.full((64, 64), float("nan"))

    monkeypatch.setattr(AttentionSum, "aggregate", broken)
    with pytest.raises(InputError, match="the attention is not finite with float32 weights"):
        model.own_guide(picture(40, 40))


# Folders that are not Stable Diffusion


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_of_older_programs_is_the_same_network(folder, model, tmp_path):
    from safetensors.torch import load_file, save_file

    place = copied(folder, tmp_path / "old")
    for name, old in (
        ("vae/diffusion_pytorch_model.safetensors", old_name_in_vae),
        ("text_encoder/model.safetensors", lambda name: f"text_model.{name}"),
    ):
        state = {old(key): value for key, value in load_file(place / name).items()}
        assert state.keys() != load_file(place / name).keys()
        if name.startswith("text"):
            state["text_model.embeddings.position_ids"] = torch.arange(9)[None]
        save_file(state, place / name)
    config = json.loads((place / "vae" / "config.json").read_text())
    assert config.pop("scaling_factor") == 0.18215  # the first folders do not state it
    (place / "vae" / "config.json").write_text(json.dumps(config))
    pixels = picture(64, 128)
    found = StableDiffusion(place).attention(pixels, 300).aggregate()
    assert torch.equal(found, model.network.attention(pixels, 300).aggregate())


def old_name_in_vae(name):
    """The name of a weight in the VAE of Stable Diffusion 1.4."""
    pairs = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    for new, old in pairs:
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name


def test_damaged_parts_have_one_clear_error(folder, tmp_path):
    for name, damage, words in (
        ("unet/diffusion_pytorch_model.safetensors", b"x", "checkpoint in .*unet cannot be loaded"),
        ("vae/diffusion_pytorch_model.safetensors", b"", "checkpoint in .*vae cannot be loaded"),
        ("text_encoder/model.safetensors", b"version https://git-lfs\n", "a Git LFS pointer"),
        ("text_encoder/config.json", b"[]", "text_encoder"),
        ("vae/config.json", b"{", "vae cannot be loaded"),
        ("tokenizer/vocab.json", b"{", "tokenizer in .* cannot be loaded"),
        ("tokenizer/merges.txt", b"#version: 0.2\na b\n", "tokenizer in .* cannot be loaded"),
        ("tokenizer/tokenizer_config.json", b"{}", "tokenizer in .*tokenizer"),
    ):
        with case(name):
            place = copied(folder, tmp_path / name.replace("/", "-"))
            (place / name).write_bytes(damage)
            with pytest.raises((BundleError, InputError), match=words) as caught:
                StableDiffusion(place)
            assert "copy" in caught.value.fix or "git lfs" in caught.value.fix


def test_weights_of_another_network_are_refused(folder, tmp_path, capfd):
    from safetensors.torch import load_file, save_file

    name = "diffusion_pytorch_model.safetensors"
    for change, words in (
        *(("lost", "missing: conv_out.bias"), ("added", "unexpected: other.bias")),
        ("nan", "NaN or infinite values"),
    ):
        with case(change):
            place = copied(folder, tmp_path / change)
            state = load_file(place / "unet" / name)
            if change == "lost":
                del state["conv_out.bias"]
            elif change == "added":
                state["other.bias"] = torch.zeros(1)
            else:
                state["conv_out.bias"][0] = torch.nan
            save_file(state, place / "unet" / name)
            with pytest.raises(BundleError, match=words):
                StableDiffusion(place)
    assert capfd.readouterr() == ("", "")  # the errors say it all


def test_parts_that_do_not_fit_each_other_are_refused(folder, tmp_path):
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    place = copied(folder, tmp_path / "text")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 1, "vocab_size": 20, "max_position_embeddings": 9}
    CLIPTextModel(CLIPTextConfig(**sizes)).save_pretrained(place / "text_encoder")
    with pytest.raises(BundleError, match="returns 8 channels; the U-Net takes 12"):
        StableDiffusion(place)
    sizes |= {"hidden_size": 12, "vocab_size": 19}
    CLIPTextModel(CLIPTextConfig(**sizes)).save_pretrained(place / "text_encoder")
    with pytest.raises(
        BundleError, match="makes 9 tokens up to 19; the text encoder takes 9 below"
    ):
        StableDiffusion(place)
    place = copied(folder, tmp_path / "vae")
    AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
    ).save_pretrained(place / "vae")
    with pytest.raises(BundleError, match="latents of 4 channels on 2 levels; wanted 4 and 4"):
        StableDiffusion(place)


@pytest.fixture
def shell(tmp_path):
    """A folder with the files of Stable Diffusion 1.x, without weights in them."""
    place = tmp_path / "sd"
    for part in PARTS:
        (place / part).mkdir(parents=True)
        (place / part / "config.json").write_text("{}")
        for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
            (place / part / name).write_bytes(b"")
    (place / "tokenizer" / "tokenizer_config.json").write_text("{}")
    down, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    config = {
        "in_channels": 4,
        "layers_per_block": 2,
        "down_block_types": [down, down, down, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", up, up, up],
    }
    (place / "unet" / "config.json").write_text(json.dumps(config))
    check_folder(place)
    return place


def test_folders_of_other_networks_are_refused(shell):
    config = shell / "unet" / "config.json"
    right = config.read_text()
    for key, value in (
        ("in_channels", 9),  # inpainting
        ("down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D"]),  # XL
        ("addition_embed_type", "text_time"),
        ("layers_per_block", 1),  # distilled
        ("class_embed_type", "projection"),
    ):
        with case(key):
            edit(config, **{key: value})
            with pytest.raises(InputError, match=f"no Stable Diffusion 1.x or 2.x.*{key}"):
                check_folder(shell)
            config.write_text(right)


def test_folders_without_a_part_are_refused(shell, tmp_path):
    with pytest.raises(InputError, match="does not exist; nothing is downloaded"):
        DiffSeg(tmp_path / "no")
    single = tmp_path / "model.safetensors"
    single.write_bytes(b"")
    with pytest.raises(InputError, match="a file; wanted a folder") as caught:
        check_folder(single)
    assert "from_single_file" in caught.value.fix
    for name in ("unet/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer_config.json"):
        with case(name):
            moved = shell / "moved"
            (shell / name).rename(moved)
            with pytest.raises(InputError, match=f"{name} is missing"):
                check_folder(shell)
            moved.rename(shell / name)
    cache = tmp_path / "models--a--b" / "snapshots" / "0"
    cache.parent.mkdir(parents=True)
    shell.rename(cache)
    with pytest.raises(InputError, match="contains no folder unet") as caught:
        check_folder(tmp_path)
    assert caught.value.fix == f"--weights {cache}"


def test_without_diffusers_the_error_says_what_to_install(shell, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingBackend, match="diffusers, which is not installed") as caught:
        DiffSeg(shell)
    assert caught.value.fix == "pip install 'dynaguide-edge[diffseg]'"


def test_without_a_gpu_it_is_refused(folder):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(MissingBackend, match="device is cuda:0, but torch finds no GPU"):
        DiffSeg(folder, DiffSegOptions(device="cuda:0"))


# Options


def test_options_check_themselves():
    for options, words in (
        ({"crop": "centre"}, "crop is 'centre'; wanted whole, square"),
        ({"dtype": "float64"}, "dtype is 'float64'; wanted float32"),
        ({"size": 500}, "size is 500; wanted a multiple of 64"),
        ({"size": 2048}, "size is 2048; wanted 64 to 1024"),
        ({"timestep": 1000}, "timestep is 1000; wanted 0 to 999"),
        ({"grid": 0}, "grid is 0; wanted 1 to 64"),
        ({"rounds": 0}, "rounds is 0; wanted 1 to 20"),
        ({"rounds": 2.5}, "rounds is 2.5; wanted a whole number"),
        ({"threshold": 0}, "threshold is 0; wanted a number above 0"),
        ({"threshold": (1, -1, 1)}, "threshold is -1; wanted a number above 0"),
        ({"threshold": (0.9, 1.0)}, "threshold has 2 values, and there are 3 rounds"),
        ({"threshold": ()}, "threshold has 0 values"),
        ({"threshold": "high"}, "threshold is 'high'"),
        ({"kmeans": 1}, "kmeans is 1; wanted True or False"),
        ({"device": "gpu"}, "device is 'gpu'; wanted cpu"),
        ({"device": None}, "device is None"),
    ):
        with case(str(options)), pytest.raises(InputError, match=words):
            DiffSegOptions(**options)
    assert DiffSegOptions(threshold=1).thresholds == (1.0, 1.0, 1.0)
    assert DiffSegOptions(threshold=[1, 2.0, 3]).thresholds == (1.0, 2.0, 3.0)
    assert DiffSegOptions(threshold=np.array([1.0, 2]), rounds=2).thresholds == (1.0, 2.0)


def test_the_input_has_the_aspect_ratio_of_the_picture():
    for size, wanted in (
        *(((512, 512), (512, 512)), ((321, 481), (448, 640)), ((480, 640), (448, 576))),
        *(((1080, 1920), (384, 704)), ((9, 9), (512, 512)), ((10, 640), (64, 4096))),
    ):
        with case(size):
            assert input_size(*size, 512) == wanted
            assert input_size(*size[::-1], 512) == wanted[::-1]


def parsed(*words):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(words)


def test_the_command_line_has_the_defaults_of_the_options(monkeypatch):
    made = []
    monkeypatch.setattr("export.guides.diffseg.DiffSeg", lambda *words: made.append(words))
    from_arguments(parsed("--weights", "sd"))
    from_arguments(
        parsed(
            *("--weights", "sd", "--threshold", "1.1", "0.9", "--rounds", "2", "--kmeans"),
            *("--crop", "square", "--size", "256", "--grid", "8", "--timestep", "100"),
            *("--device", "cuda:0", "--dtype", "float16"),
        )
    )
    assert made == [
        (Path("sd"), DiffSegOptions()),
        (
            Path("sd"),
            DiffSegOptions(
                crop="square",
                size=256,
                timestep=100,
                grid=8,
                threshold=(1.1, 0.9),
                rounds=2,
                kmeans=True,
                device="cuda:0",
                dtype="float16",
            ),
        ),
    ]
    with pytest.raises(InputError, match="no folder is named") as caught:
        from_arguments(parsed())
    assert "--weights FOLDER" in caught.value.fix
