"""What a small autoencoder and a short sampler do to pictures, imitated: blur, lost resolution,
grain, colour casts.

Scorers look at generated pictures but learn from rendered ones; trained on these as well they do
not mistake softness for a missing object. No picture of MiniSD itself is used, so that the scorers
stay independent of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BLUR = (0.3, 1.1)  # standard deviation in pixels: the autoencoder's own softness is about 0.5
_SCALE = (0.5, 0.9)  # side of the picture before it is enlarged again
_NOISE = 0.05  # largest standard deviation, of a range of 1
_LEVELS = 16  # coarsest JPEG-like step, in levels of 255 per frequency
_COLOUR, _CONTRAST, _LIGHT = 0.06, 0.15, 0.06  # largest gain per channel, gain, offset


def _uniform(g: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=g)


def _one(g: torch.Generator, low: float, high: float) -> float:
    return float(_uniform(g, low, high, 1))


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [n, c, h, w], border repeated."""
    radius = max(1, round(3 * sigma))
    t = torch.arange(-radius, radius + 1, dtype=x.dtype)
    kernel = torch.exp(-(t**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    x = F.pad(x, (radius,) * 4, mode="replicate")
    x = F.conv2d(x, kernel.unsqueeze(2), groups=x.shape[1])
    return F.conv2d(x, kernel.unsqueeze(3), groups=x.shape[1])


def resample(x: Tensor, share: float) -> Tensor:
    """Down to ``share`` of the side and back, bilinear."""
    side = max(8, round(x.shape[-1] * share))
    small = F.interpolate(
        x, size=(side, side), mode="bilinear", antialias=True, align_corners=False
    )
    return F.interpolate(small, size=x.shape[-2:], mode="bilinear", align_corners=False)


def quantise(x: Tensor, step: float) -> Tensor:
    """Round the 8 × 8 cosine coefficients to steps that grow with frequency, as JPEG does. Sides:
    multiples of 8.
    """
    t = torch.arange(8, dtype=x.dtype)
    basis = torch.cos(torch.pi * (2 * t[None] + 1) * t[:, None] / 16) / 2
    basis[0] /= 2**0.5
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    steps = step * (1 + t[:, None] + t[None]) / 4
    found = torch.round(basis @ blocks @ basis.T / steps) * steps
    return (basis.T @ found @ basis).transpose(3, 4).reshape(n, c, h, w)


def degrade(images: Tensor, g: torch.Generator) -> Tensor:
    """Float images [n, 3, s, s] in [0, 1] with mild faults; a fifth stays as it is, faults differ
    by fifths.

    The batch must be in random order: which picture gets which fault depends on its place.
    """
    parts = list(torch.tensor_split(images, 5))
    parts[1] = blur(parts[1], _one(g, *_BLUR))
    parts[2] = resample(parts[2], _one(g, *_SCALE))
    parts[3] = quantise(parts[3], _one(g, 1, _LEVELS) / 255 * 4)
    parts[4] = resample(blur(parts[4], _one(g, *_BLUR)), _one(g, *_SCALE))
    n = len(images)
    noise = torch.randn(images.shape, generator=g) * (_uniform(g, 0, 1, n, 1, 1, 1) ** 2 * _NOISE)
    gain = _uniform(g, 1 - _COLOUR, 1 + _COLOUR, n, 3, 1, 1) * _uniform(
        g, 1 - _CONTRAST, 1 + _CONTRAST, n, 1, 1, 1
    )
    light = _uniform(g, -_LIGHT, _LIGHT, n, 1, 1, 1)
    gain[: len(parts[0])], light[: len(parts[0])], noise[: len(parts[0])] = 1, 0, 0
    out: Tensor = ((torch.cat(parts) - 0.5) * gain + 0.5 + light + noise).clamp_(0, 1)
    return out


def noise_pictures(number: int, side: int, g: torch.Generator) -> Tensor:
    """Coloured noise of one random grain, float [number, 3, side, side] in [0, 1]: pictures of
    nothing.
    """
    grain = min(side, 2 ** int(torch.randint(1, 7, (1,), generator=g)))
    if not number:
        return torch.zeros(0, 3, side, side)
    coarse = torch.rand(number, 3, grain, grain, generator=g)
    return F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
