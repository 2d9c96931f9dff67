"""LoRA (arXiv 2106.09685) on a text-to-image model, through peft."""

from __future__ import annotations

import re
from typing import Literal

from torch import Tensor, nn

from attacks.adapters import adapters, inject
from attacks.diffusion.attack import ConceptAttack, Moving, check_layers, trained_parts
from lab.core.config import Count, Flag, Positive, Text, config
from lab.core.data import Concept
from lab.core.hashing import folder_hash
from lab.core.seeding import generator
from lab.models.diffusion import DiffusionModel
from lab.models.diffusion_backbone import load_folder, locate_folder

_PROJECTIONS = r"(to_q|to_k|to_v|to_out\.0)"
LAYERS = {
    "attn2": rf".*\.attn2\.{_PROJECTIONS}",
    "attention": rf".*\.attn[12]\.{_PROJECTIONS}",
    "all": r"(down_blocks|mid_block|up_blocks)\..*",
}  # of the U-Net, by targets
_TEXT = r".*(q_proj|k_proj|v_proj|out_proj)"


@config
class ConceptLora(ConceptAttack):
    """Trains low-rank adapters. B starts at zero, A Kaiming uniform as in the paper's code, from
    the attack's seed.

    The weights are those of `StableDiffusionPipeline.load_lora_weights`; the factor alpha/rank is
    multiplied into B, so that they mean the same in every version of diffusers.

    Args:
        rank: of the adapters.
        alpha: an adapter adds alpha/rank · BA; None = rank.
        targets: ``attn2`` (cross-attention) | ``attention`` (self-attention too) | ``all`` (every
            linear layer and convolution of the U-Net's blocks).
        text_encoder: adapters on the text encoders' attention as well.
        donor: folder or name of a model that the adapters are trained on; they are then loaded into
            the attacked model, which itself is not trained. None = the attacked model.
    """

    rank: Count = 4
    alpha: Positive | None = None
    targets: Literal["attn2", "attention", "all"] = "attn2"
    text_encoder: Flag = False
    donor: Text | None = None

    def fingerprint(self) -> str:
        known = super().fingerprint()
        if self.donor is None:
            return known
        return known + folder_hash(locate_folder(self.donor, f"{self.key}.donor"))

    @property
    def trains_own_weights(self) -> bool:
        return self.donor is None

    def trained_model(self, model: DiffusionModel) -> DiffusionModel:
        """See `ConceptAttack.trained_model`.

        Raises:
            UserError: no such model.
        """
        if self.donor is None:
            return model
        return load_folder(self.donor, f"{self.key}.donor").to(model.device)

    def dry_open(self, model: DiffusionModel, task: Concept) -> None:
        """Raises `UserError` also where the donor's layers are not those of ``model``."""
        own = self.open(model.copy(), task, 0).check(self.key).parameters
        if self.donor is not None:
            other = self.open(self.trained_model(model), task, 0).parameters
            check_layers(own, other, f"{self.key}.donor", self.donor)

    def open(self, model: DiffusionModel, task: Concept, seed: int) -> Moving:
        alpha = self.rank if self.alpha is None else self.alpha
        tuners, parameters = [], dict[str, nn.Parameter]()
        for part, net in trained_parts(model).items():
            if part == "unet" or self.text_encoder:
                pattern = LAYERS[self.targets] if part == "unet" else _TEXT
                layers = [
                    name
                    for name, module in net.named_modules()
                    if re.fullmatch(pattern, name) and isinstance(module, nn.Linear | nn.Conv2d)
                ]
                tuners.append(inject(net, layers, self.rank, alpha, generator(seed, "lora", part)))
                parameters |= {f"{part}.{name}": p for name, p in adapters(net).items()}

        def scaled(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
            return {
                name.replace(".default.weight", ".weight"): p * (alpha / self.rank)
                if ".lora_B." in name
                else p
                for name, p in parameters.items()
            }

        def close() -> None:
            for tuner in tuners:
                tuner.merge_and_unload()

        info = {
            "rank": self.rank,
            "alpha": alpha,
            "targets": self.targets,
            "text_encoder": self.text_encoder,
        }
        return Moving(parameters, scaled, close, text=self.text_encoder, info=info)
