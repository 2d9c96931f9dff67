"""Interpolation towards a public model: an attack without training and without images."""

from __future__ import annotations

from dataclasses import replace

import torch

from attacks.diffusion.attack import ConceptAttack, Moving, check_layers, open_unet
from lab.core.config import Positive, Text, config
from lab.core.data import Concept
from lab.core.hashing import folder_hash
from lab.models.diffusion import DiffusionModel
from lab.models.diffusion_backbone import load_folder, locate_folder


@config
class Interpolation(ConceptAttack):
    """Moves the U-Net in a straight line to another one: θ_k = θ + reach·k/K (θ_base − θ) after
    k of K steps.

    An attacker has such a base where an immunized model was fine-tuned from a published one. The
    base may lack the concept; the question is whether immunity lies in the difference to it.

    Args:
        base: folder or name of the public model.
        reach: share of the way that the last step ends at; 1 is the base itself.

    Of the other options of `ConceptAttack` only those on prompts and images have a meaning.
    """

    base: Text = "minisd"
    reach: Positive = 0.5

    def fingerprint(self) -> str:
        return folder_hash(locate_folder(self.base, f"{self.key}.base"))

    def _base(self, model: DiffusionModel) -> dict[str, torch.Tensor]:
        """Return the U-Net's parameters of the base.

        Raises:
            UserError: the base has other layers than ``model``.
        """
        loaded = load_folder(self.base, f"{self.key}.base").to(model.device, model.dtype)
        base = dict(loaded.unet.named_parameters())
        check_layers(dict(model.unet.named_parameters()), base, f"{self.key}.base", self.base)
        return {f"unet.{name}": p.detach() for name, p in base.items()}

    def open(self, model: DiffusionModel, task: Concept, seed: int) -> Moving:
        moving, base = open_unet(model), self._base(model)
        start = {name: p.detach().clone() for name, p in moving.parameters.items()}

        @torch.no_grad()
        def move(step: int, steps: int) -> None:
            for name, parameter in moving.parameters.items():
                parameter.copy_(torch.lerp(start[name], base[name], self.reach * step / steps))

        return replace(moving, move=move, info=moving.info | {"base": self.base})
