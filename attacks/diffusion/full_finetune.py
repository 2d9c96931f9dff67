"""Fine-tuning of the whole U-Net on plain captions."""

from __future__ import annotations

import json
from dataclasses import dataclass

from attacks.diffusion.attack import ConceptAttack, Moving
from lab.core.data import Concept
from lab.models.diffusion import DiffusionModel


def open_unet(model: DiffusionModel) -> Moving:
    """All of the U-Net moves. Weights: ``unet.NAME``, complete; ``info`` carries the config they
    load with.
    """
    parameters = {f"unet.{name}": parameter for name, parameter in model.unet.named_parameters()}
    config = json.loads(model.unet.to_json_string())
    return Moving(
        parameters,
        "unet",
        lambda: {f"unet.{k}": v for k, v in model.unet.state_dict().items()},
        info={"unet_config": config},
    )


@dataclass(eq=False)
class ConceptFullFinetune(ConceptAttack):
    """Trains every parameter of the U-Net. Options as in
    `attacks.diffusion.attack.ConceptAttack`.
    """

    lr: float = 3e-4

    def open(self, model: DiffusionModel, task: Concept, seed: int) -> Moving:
        return open_unet(model)
