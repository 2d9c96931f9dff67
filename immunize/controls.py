"""Controls of a table: weights that no method made, for which a verdict must fail."""

from __future__ import annotations

from typing import ClassVar

import torch

from lab.core.config import Positive, Text, config
from lab.core.data import ConceptCase, Kind
from lab.core.seeding import generator
from lab.core.types import Checkpoint, Immunizer, Log
from lab.models.diffusion import DiffusionModel


@config
class WeightNoise(Immunizer):
    """Adds noise to every matrix and kernel of the U-Net: a negative control, which damages the
    model and protects no concept in particular.

    Args:
        relative: standard deviation of the noise, as a multiple of the root mean square of each
            tensor. Vectors stay as they are.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    name: Text = "weight_noise"
    relative: Positive = 0.05

    def __call__(
        self,
        model: DiffusionModel,
        case: ConceptCase,
        *,
        seed: int,
        checkpoint: Checkpoint | None,
        log: Log,
    ) -> DiffusionModel:
        noisy = model.copy()
        with torch.no_grad():
            for name, weight in noisy.unet.named_parameters():
                if weight.ndim > 1:
                    g = generator(seed, "weight noise", name)
                    noise = torch.randn(weight.shape, generator=g).to(weight)
                    weight += self.relative * weight.square().mean().sqrt() * noise
        return noisy
