"""An immunization method for text-to-image models: noise on the weights of the U-Net."""

import torch

from lab.core.config import Positive, Text, config
from lab.core.seeding import generator
from lab.core.types import Immunizer


@config
class Noise(Immunizer):
    """Add Gaussian noise to every weight: the simplest method to compare with.

    Args:
        name: what records call the method.
        scale: standard deviation of the noise ÷ mean absolute weight of each tensor.
    """

    accepts = frozenset({"diffusion"})

    name: Text = "noise"
    scale: Positive = 0.05

    def __call__(self, model, case, *, seed, checkpoint, log):
        """Return a noisy copy; ``model`` is left untouched."""
        result = model.copy()
        draw = generator(seed, "noise")
        with torch.no_grad():
            for weight in result.unet.parameters():
                noise = torch.randn(weight.shape, generator=draw)
                weight += self.scale * weight.abs().mean() * noise
        return result
