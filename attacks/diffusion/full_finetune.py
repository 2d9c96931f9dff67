"""Fine-tuning of the whole U-Net on plain captions."""

from __future__ import annotations

from attacks.diffusion.attack import ConceptAttack, Moving, open_unet
from lab.core.config import Positive, config
from lab.core.data import Concept
from lab.models.diffusion import DiffusionModel


@config
class ConceptFullFinetune(ConceptAttack):
    """Trains every parameter of the U-Net. Options as in `ConceptAttack`."""

    lr: Positive = 3e-4

    def open(self, model: DiffusionModel, task: Concept, seed: int) -> Moving:
        return open_unet(model)
