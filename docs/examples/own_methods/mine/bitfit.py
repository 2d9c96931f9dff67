"""An attacker on text-to-image models: BitFit (arXiv 2106.10199), which trains the biases of the
U-Net alone.
"""

from attacks.diffusion.attack import ConceptAttack, Moving
from lab.core.config import Positive, config


@config
class BitFit(ConceptAttack):
    """Options as in `attacks.diffusion.attack.ConceptAttack`."""

    lr: Positive = 3e-3

    def open(self, model, task, seed):
        """What moves on ``model``, a copy of the attacker's own: parameters by name, and what a
        user would load.
        """
        biases = {
            f"unet.{name}": p for name, p in model.unet.named_parameters() if name.endswith(".bias")
        }
        return Moving(biases, form="delta", weights=lambda: dict(biases))
