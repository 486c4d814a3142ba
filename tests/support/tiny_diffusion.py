"""A tiny random Stable Diffusion in a folder of diffusers, with all 16 self-attention layers."""

import json
from pathlib import Path

import torch


def save(folder, *, linear=False, heads=2, seed=0):
    """Write unet, vae, text_encoder and tokenizer, with random weights, to ``folder``.

    ``linear`` and a tuple of ``heads`` make it like Stable Diffusion 2.x. diffusers is needed.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = Path(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            block_out_channels=(8, 8, 16, 16),
            norm_num_groups=4,
            cross_attention_dim=12,
            attention_head_dim=heads,
            use_linear_projection=linear,
            sample_size=8,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            norm_num_groups=2,
            latent_channels=4,
            sample_size=64,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=20,
                hidden_size=12,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=9,
                bos_token_id=18,
                eos_token_id=19,
                pad_token_id=19,
            )
        )
        for name, weight in unet.named_parameters():  # random attention is flat without this
            if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
                weight.data *= 6
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    text.save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "tokenizer")
    return folder


def save_tokenizer(folder):
    """Write a CLIP tokenizer of 20 tokens in the files that Stable Diffusion 1.x has."""
    folder.mkdir()
    words = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {chr(97 + i): i for i in range(9)} | {
        f"{chr(97 + i)}</w>": 9 + i for i in range(9)
    }
    vocabulary |= {word: 18 + i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {
        "model_max_length": 9,
        "bos_token": words[0],
        "eos_token": words[1],
        "pad_token": words[1],
        "unk_token": words[1],
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
