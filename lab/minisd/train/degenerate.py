"""Degenerate images: what a destroyed text-to-image model draws, and the detector's class for it.

A style detector without such a class calls noise and blots stained glass or mosaic, so that an
attack that destroys the model counts as one that succeeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.core.data import Sampling
from lab.core.seeding import generator
from lab.minisd.world.vocabulary import ROLES, STYLE_NAMES
from lab.minisd.world.world import concept, sample
from lab.models.diffusion import DiffusionModel

DEGENERATE = "degenerate"  # the name of the class among the detector's styles
_AMPLITUDE = 0.5, 4.0  # of latent noise; latents of real images have a variance of 1
_OFFSET = 1.2  # standard deviation of each channel's mean
# full fine-tuning at which a MiniSD is destroyed within the steps of an attack
_RATES = (3e-3, 1e-2, 3e-2)
_STEPS, _BATCH, _IMAGES = 20, 8, 20


@torch.no_grad()
def degenerate_images(vae: Any, count: int, seed: int, *labels: object) -> Tensor:
    """Decode latents that no image has: noise of a random grain and strength around a random
    colour. No concept takes part.

    Returns:
        uint8 [count, 3, s, s].
    """
    channels = vae.config.latent_channels
    scale = vae.config.scaling_factor
    side = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
    parts = []
    for i in range(0, count, 64):
        g = generator(seed, "degenerate", *labels, i)
        n = min(64, count - i)
        z = torch.zeros(n, channels, side, side)
        for grain in (side // 8, side // 4, side // 2, side):
            noise = torch.randn(n, channels, grain, grain, generator=g)
            share = torch.rand(n, 1, 1, 1, generator=g) ** 2
            z = z + share * F.interpolate(noise, (side, side), mode="bicubic")
        z = z / z.std((1, 2, 3), keepdim=True)
        low, high = map(math.log, _AMPLITUDE)
        amplitude = (low + (high - low) * torch.rand(n, 1, 1, 1, generator=g)).exp()
        offset = _OFFSET * torch.randn(n, channels, 1, 1, generator=g)
        x = vae.decode((amplitude * z + offset) / scale).sample
        parts.append((x.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8))
    return torch.cat(parts)


def destroyed(model: DiffusionModel, prompts: tuple[str, ...], seed: int) -> Iterator[Tensor]:
    """Destroy copies of ``model`` by full fine-tuning at extreme learning rates, each on 20 images
    of a validation style, and yield what each copy draws for ``prompts``, uint8 [n, 3, s, s].
    """
    styles = [name for name in STYLE_NAMES if ROLES.get(name) == "validation"]
    for style, rate in ((style, rate) for rate in _RATES for style in styles):
        copy = model.copy()
        copy.unet.requires_grad_(True)
        data = sample(concept(style), seed, _IMAGES)
        latents, _ = copy.posterior(data.images)
        optimizer = torch.optim.AdamW(copy.unet.parameters(), lr=rate)
        for step in range(_STEPS):
            g = generator(seed, "destroyed", style, rate, step)
            index = torch.randint(len(latents), (_BATCH,), generator=g)
            z, text = latents[index], copy.text([data.texts[i] for i in index.tolist()])
            t = torch.randint(copy.timesteps, (_BATCH,), generator=g)
            noise = torch.randn(z.shape, generator=g)
            with torch.enable_grad():
                copy.loss(z, text, noise, t).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        labels = "destroyed", style, rate
        yield copy.generate(prompts, copy.latents(len(prompts), seed, *labels), Sampling(steps=8))
