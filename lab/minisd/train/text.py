"""MiniSD's text encoder, trained by contrast with images, as Stable Diffusion's is (CLIP, arXiv
2103.00020).

The denoiser then reads a frozen encoder. Measured: trained with the denoiser instead, as the first
MiniSD was, the encoder distinguishes objects several times later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.core.seeding import derive
from lab.core.types import Checkpoint
from lab.minisd.train.networks import Rows, Schedule, device_of, tokenize, tokenize_all, train
from lab.minisd.train.scorers import (
    contrastive_loss,
    draw_rows,
    prototypes,
    to_unit,
    zero_shot,
)
from lab.minisd.world.captions import noun, prompts
from lab.minisd.world.vocabulary import PHOTO
from lab.minisd.world.world import Sample
from lab.scorers.detector import DetectorNetwork

_IMAGE_WIDTH = 24  # channels of the image tower at 32 × 32; it is dropped after training
_LARGEST_SCALE = 100.0  # of the similarities (arXiv 2103.00020 §2.5)


class TextImageNetwork(nn.Module):
    """A text encoder and an image tower with a common space; only the first is kept."""

    def __init__(self, text_encoder: Any, seed: int) -> None:
        super().__init__()
        torch.manual_seed(derive(seed, "text", "images"))
        width = text_encoder.config.hidden_size
        self.text_encoder = text_encoder
        self.trunk = DetectorNetwork(1, 1, _IMAGE_WIDTH).trunk
        self.from_images = nn.Linear(8 * _IMAGE_WIDTH, width, bias=False)
        self.from_texts = nn.Linear(width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(16.0).log())

    def images(self, pixels: Tensor) -> Tensor:
        """Return unit vectors [n, d] of float images [n, 3, 64, 64] in [0, 1]."""
        maps = self.trunk((pixels - 0.5) / 0.25)
        pooled = torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)
        return F.normalize(self.from_images(pooled), dim=1)

    def texts(self, tokens: Tensor) -> Tensor:
        """Return unit vectors [n, d] of token ids [n, CONTEXT]."""
        return F.normalize(self.from_texts(self.text_encoder(tokens).pooler_output), dim=1)


def train_text(
    model: TextImageNetwork,
    tokenizer: Any,
    data: Sample,
    captions: Sequence[Sequence[str]],
    held_out: Sample,
    schedule: Schedule,
    *,
    seed: int,
    checkpoint: Checkpoint | None = None,
) -> Rows:
    """Train both towers in place by CLIP's contrastive loss.

    Args:
        captions: several for each image of ``data``; one is drawn at every visit.
        held_out: images for validation: zero-shot top-1 among the objects and styles of all images,
            where an image with two objects counts for the first of them.
    """
    tokens, device = tokenize_all(tokenizer, captions), device_of(model)
    shown = [(p.objects, p.style) for p in data.pictures]
    kinds = {pair: i for i, pair in enumerate(dict.fromkeys(shown))}
    kind = torch.tensor([kinds[pair] for pair in shown])
    every = (*data.pictures, *held_out.pictures)
    names = list(dict.fromkeys(p.style for p in every))
    style = torch.tensor([names.index(p.style) for p in data.pictures])

    def pixels(images: Tensor) -> Tensor:
        return to_unit(images).to(device).contiguous(memory_format=torch.channels_last)

    def step(number: int, g: torch.Generator) -> Tensor:
        index = draw_rows(number, style, schedule.batch, g)
        which = torch.randint(tokens.shape[1], (len(index),), generator=g)
        texts = model.texts(tokens[index, which].to(device))
        images = model.images(pixels(data.images[index]))
        same = (kind[index][:, None] == kind[index][None]).to(device)
        scale = model.log_scale.exp().clamp(max=_LARGEST_SCALE)
        return contrastive_loss(images, texts, scale, same)

    objects = list(dict.fromkeys(p.objects[0] for p in every))
    classes = {
        "object": {name: list(prompts(noun(name))) for name in objects},
        "style": {
            name: [t for by in ("name", "description") for t in prompts("a thing", name, by)]
            for name in names
        },
    }
    wanted = {
        "object": torch.tensor([objects.index(p.objects[0]) for p in held_out.pictures]),
        "style": torch.tensor([names.index(p.style) for p in held_out.pictures]),
    }
    photos = torch.tensor([p.style == PHOTO for p in held_out.pictures])

    def validate(average: TextImageNetwork) -> dict[str, float]:
        def encode(texts: list[str]) -> Tensor:
            parts = tokenize(tokenizer, texts).to(device).split(256)
            return torch.cat([average.texts(part) for part in parts])

        parts = [average.images(pixels(part)) for part in held_out.images.split(256)]
        vectors = torch.cat(parts)
        hits = {
            head: (zero_shot(vectors, prototypes(encode, table)).cpu() == wanted[head]).float()
            for head, table in classes.items()
        }
        values = {head: hit.mean().item() for head, hit in hits.items()}
        if photos.any():
            values["photo_object"] = hits["object"][photos].mean().item()
        return values

    model.trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return train(
        model, step, schedule, seed=seed, label="text", checkpoint=checkpoint, validate=validate
    )
