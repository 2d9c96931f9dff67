"""What an attacker trains on: images as latents with their captions, and random batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.core.seeding import generator
from lab.models.diffusion import DiffusionModel

EVALUATIONS = 32  # loss terms of one evaluation, timesteps spread evenly over the schedule
_CROPS = 4  # seeded crops of every image, encoded once like the image itself
_SMALLEST = 0.75  # side of the smallest crop


def variants(images: Tensor, augmentation: str, seed: int, *labels: object) -> list[Tensor]:
    """Return the images, then their mirror images (``flip``) or `_CROPS` seeded crops of each
    (``crop``).
    """
    if augmentation == "none":
        return [images]
    if augmentation == "flip":
        return [images, images.flip(-1)]
    g = generator(seed, "crops", *labels)
    side, augmented = images.shape[-1], [images]
    for _ in range(_CROPS):
        cut = []
        for image in images:
            share, top, left = torch.rand(3, generator=g).tolist()
            size = round(side * (_SMALLEST + (1 - _SMALLEST) * share))
            y, x = round(top * (side - size)), round(left * (side - size))
            part = image[None, :, y : y + size, x : x + size].float()
            cut.append(F.interpolate(part, (side, side), mode="bilinear", antialias=True)[0])
        augmented.append(torch.stack(cut).round().clamp(0, 255).to(torch.uint8))
    return augmented


class Draw(NamedTuple):
    """Latents ``z`` [b, c, h, w], their ``noise``, timesteps ``t`` [b] and the images' ``rows``."""

    z: Tensor
    noise: Tensor
    t: Tensor
    rows: list[int]


class Material(NamedTuple):
    """Images as latents, encoded once: ``mean`` and ``std`` [n, variants, c, h, w], and a caption
    each.
    """

    mean: Tensor
    std: Tensor
    captions: tuple[str, ...]

    @staticmethod
    def encode(model: DiffusionModel, images: Sequence[Tensor], texts: Sequence[str]) -> Material:
        """Encode ``images``, one tensor [n, 3, s, s] per variant."""
        means, stds = zip(*(model.posterior(variant) for variant in images), strict=True)
        return Material(torch.stack(means, 1), torch.stack(stds, 1), tuple(texts))

    def draw(self, batch: int, timesteps: int, g: torch.Generator) -> Draw:
        """Draw a random batch; an image repeats only where there are fewer than ``batch``."""
        n, shape = len(self.captions), (batch, *self.mean.shape[2:])
        few = batch > n
        rows = torch.randint(n, (batch,), generator=g) if few else torch.randperm(n, generator=g)
        rows = rows[:batch]
        variant = torch.randint(self.mean.shape[1], (batch,), generator=g)
        t = torch.randint(timesteps, (batch,), generator=g)
        spread, noise = (torch.randn(shape, generator=g).to(self.mean) for _ in range(2))
        z = self.mean[rows, variant] + self.std[rows, variant] * spread
        return Draw(z, noise, t.to(z.device), rows.tolist())

    def evenly(self, timesteps: int, g: torch.Generator) -> Draw:
        """Return a fixed evaluation: every image in turn, even timesteps, posterior means."""
        count = max(len(self.captions), EVALUATIONS)
        rows = torch.arange(count) % len(self.captions)
        t = ((torch.arange(count) + 0.5) * timesteps / count).long()
        z = self.mean[rows, 0]
        return Draw(z, torch.randn(z.shape, generator=g).to(z), t.to(z.device), rows.tolist())
