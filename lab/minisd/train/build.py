"""MiniSD's parts, made from configs: the classes of Stable Diffusion v1, only smaller.

Sizes are those of the throw-away prototype behind the project's plan, measured on two cores: no
attention where the latent is 16 × 16 (it would double the time of a step and buy nothing there).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from pydantic import Field
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lab.core.config import Count, options
from lab.core.seeding import derive

CONTEXT = 32  # tokens; the longest caption of the world has 24
SOS, EOS = "<|startoftext|>", "<|endoftext|>"


@options
class Widths:
    """What makes a MiniSD larger or smaller; tests take tiny ones.

    Attributes:
        vae: channels of the autoencoder from 64 × 64 down to 16 × 16; multiples of ``groups``.
        unet: channels of the U-Net at 16 × 16, 8 × 8 and 4 × 4; multiples of ``groups``.
        text: width of the text encoder (cross-attention width of the U-Net); a multiple of 32.
        layers: transformer layers of the text encoder.
        groups: groups of every group norm.
    """

    vae: tuple[Count, Count, Count] = (24, 48, 64)
    unet: tuple[Count, Count, Count] = (48, 96, 128)
    text: Annotated[int, Field(strict=True, ge=32, multiple_of=32)] = 128
    layers: Count = 3
    groups: Count = 8


def train_tokenizer(texts: Iterable[str], folder: Path, vocabulary: int) -> CLIPTokenizer:
    """Learn a byte-level BPE in CLIP's format from ``texts``; write ``vocab.json``, ``merges.txt``
    and configs to ``folder``, and return the tokenizer that they hold.

    Words outside ``texts`` fall into pieces, as new words do in CLIP. Same texts, same files.

    Args:
        vocabulary: tokens at most, 514 of which are bytes (each inside and at the end of a word),
            start and end.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=EOS))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    final = [f"{letter}</w>" for letter in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,  # start and end come last
        min_frequency=2,
        show_progress=False,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        # otherwise numbered as a hash map gives them, and the numbers break ties of merges
        special_tokens=final,
    )
    bpe.train_from_iterator(sorted(set(texts)), trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    pairs = [m if isinstance(m, str) else " ".join(m) for m in merges]
    tokens = [*alphabet, *final, *(p.replace(" ", "") for p in pairs), SOS, EOS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False)
    )
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8"
    )
    special = {"bos_token": SOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    facts = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts | special, indent=1))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1))
    return CLIPTokenizer.from_pretrained(str(folder))


def tokenize(tokenizer: Any, texts: Iterable[str]) -> torch.Tensor:
    """Return token ids [n, CONTEXT], padded with the end token and cut at the context, as Stable
    Diffusion does.
    """
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return tokenizer(list(texts), max_length=tokenizer.model_max_length, **options).input_ids


def tokenize_all(tokenizer: Any, captions: Sequence[Sequence[str]]) -> torch.Tensor:
    """Return token ids [n, k, CONTEXT] of k captions for each of n images."""
    flat = tokenize(tokenizer, [text for texts in captions for text in texts])
    return flat.view(len(captions), len(captions[0]), -1)


def vae(widths: Widths, seed: int) -> Any:
    """Build the autoencoder: 64 × 64 pixels to 16 × 16 × 4 latents."""
    torch.manual_seed(derive(seed, "vae", "init"))
    depth = len(widths.vae)
    return AutoencoderKL(
        block_out_channels=widths.vae,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=widths.groups,
        mid_block_add_attention=False,
        sample_size=64,
    )


def unet(widths: Widths, seed: int) -> Any:
    torch.manual_seed(derive(seed, "unet", "init"))
    lower = len(widths.unet) - 1
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=widths.unet,
        layers_per_block=1,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * lower),
        up_block_types=(*("CrossAttnUpBlock2D",) * lower, "UpBlock2D"),
        cross_attention_dim=widths.text,
        # four heads: diffusers reads this key as their number, as it does for SD v1
        attention_head_dim=4,
        norm_num_groups=widths.groups,
    )


def text_encoder(widths: Widths, vocabulary: int, seed: int) -> Any:
    """Build a `CLIPTextModel` whose last two token ids are start and end."""
    torch.manual_seed(derive(seed, "text", "init"))
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=widths.text,
        intermediate_size=4 * widths.text,
        num_hidden_layers=widths.layers,
        num_attention_heads=widths.text // 32,
        max_position_embeddings=CONTEXT,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config)


def scheduler() -> Any:
    """Build DDIM with the noise schedule of Stable Diffusion v1 (scaled linear, 0.00085 to 0.012,
    1,000 steps).
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
