"""An attack on text-to-image models: BitFit (arXiv 2106.10199) trains the biases of the U-Net."""

from attacks.diffusion.attack import ConceptAttack, Moving
from lab.core.config import Positive, config


@config
class BitFit(ConceptAttack):
    """Options as in `ConceptAttack`."""

    lr: Positive = 3e-3

    def open(self, model, task, seed):
        """Return the parameters that move in ``model``, a copy, and the weights to keep."""
        parameters = model.unet.named_parameters()
        biases = {f"unet.{name}": p for name, p in parameters if name.endswith(".bias")}
        return Moving(biases, form="delta", weights=lambda: dict(biases))
