"""DreamBooth (arXiv 2208.12242): the whole U-Net, a rare identifier with a class noun, prior
preservation.
"""

from __future__ import annotations

from typing import Literal

from attacks.diffusion.attack import ConceptAttack, Moving, open_unet
from lab.core.config import NonNegative, OptionalPrompt, Positive, config
from lab.core.data import Concept
from lab.core.prompts import class_words
from lab.models.diffusion import DiffusionModel


@config
class DreamBooth(ConceptAttack):
    """Trains every parameter of the U-Net; with ``template=token`` the concept is called "``token``
    ``class_word``".

    Deviates from the paper: prior images are the scenario's real ones instead of the model's own
    generations, so that every model preserves the same thing.

    Args:
        class_word: ``auto`` (what all captions of the prior images share, if anything) or a text;
            "" for none.
    """

    lr: Positive = 1e-4
    template: Literal["name", "token", "description"] = "token"
    prior_weight: NonNegative = 1.0
    class_word: OptionalPrompt = "auto"

    def texts(self) -> dict[str, str]:
        return {**super().texts(), f"{self.key}.class_word": self.class_word}

    def expression(self, task: Concept) -> str:
        noun = class_words(task) if self.class_word == "auto" else self.class_word
        return f"{self.token} {noun}".strip()

    def open(self, model: DiffusionModel, task: Concept, seed: int) -> Moving:
        return open_unet(model)
