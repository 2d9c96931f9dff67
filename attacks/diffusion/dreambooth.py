"""DreamBooth (arXiv 2208.12242): the whole U-Net, a rare identifier with a class noun, prior
preservation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attacks.diffusion.attack import ConceptAttack, Moving
from attacks.diffusion.full_finetune import open_unet
from lab.core.captions import class_words
from lab.core.data import Concept
from lab.core.prompts import text
from lab.models.diffusion import DiffusionModel


@dataclass(eq=False)
class DreamBooth(ConceptAttack):
    """Trains every parameter of the U-Net; with ``template=token`` the concept is called "``token``
    ``class_word``".

    Deviates from the paper: prior pictures are the scenario's real ones instead of the model's own
    generations, so that every model preserves the same thing.

    Args:
        class_word: ``auto`` (what all captions of the prior pictures share, if anything) or a text;
            "" for none.

    Raises:
        UserError: see `ConceptAttack`; a class word that is no text.
    """

    lr: float = 1e-4
    template: str = "token"
    prior_weight: float = 1.0
    class_word: str = "auto"

    by_token: ClassVar[tuple[str, ...]] = ("token", "class_word")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.class_word = text(f"{self.key}.class_word", self.class_word, empty=True)

    def texts(self) -> dict[str, str]:
        return {**super().texts(), f"{self.key}.class_word": self.class_word}

    def expression(self, task: Concept) -> str:
        noun = class_words(task) if self.class_word == "auto" else self.class_word
        return f"{self.token} {noun}".strip()

    def open(self, model: DiffusionModel, task: Concept, seed: int) -> Moving:
        return open_unet(model)
