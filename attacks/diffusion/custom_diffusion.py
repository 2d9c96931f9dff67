"""Custom Diffusion (arXiv 2212.04488): key and value matrices of cross-attention and a modifier
token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attacks.diffusion.attack import ConceptAttack, Moving
from attacks.diffusion.textual_inversion import initial_text
from attacks.diffusion.tokens import LearnedToken
from lab.core.captions import class_words
from lab.core.data import Concept
from lab.core.prompts import text
from lab.models.diffusion import DiffusionModel


@dataclass(eq=False)
class CustomDiffusion(ConceptAttack):
    """Trains ``attn2.to_k`` and ``attn2.to_v`` and, with ``template=token``, the embedding of a new
    token.

    The concept is then called "``token`` noun", where the noun is what all captions of the prior
    pictures share. Deviates from the paper as `attacks.diffusion.dreambooth` does: the scenario's
    prior pictures, not retrieved ones.

    Args:
        initializer: what the token starts from: ``auto`` | ``words`` | any text
            (`attacks.diffusion.textual_inversion.initial_text`). The paper takes a rare token.

    Raises:
        UserError: see `ConceptAttack`; when called, a token that the tokenizer knows.
    """

    template: str = "token"
    token: str = "<new1>"
    prior_weight: float = 1.0
    initializer: str = "ktn"

    by_token: ClassVar[tuple[str, ...]] = ("token", "initializer")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.initializer = text(f"{self.key}.initializer", self.initializer)

    def expression(self, task: Concept) -> str:
        return f"{self.token} {class_words(task)}".strip()

    def learns(self) -> str | None:
        return self.token if self.template == "token" else None

    def open(self, model: DiffusionModel, task: Concept, seed: int) -> Moving:
        chosen = {
            n: p
            for n, p in model.unet.named_parameters()
            if ".attn2.to_k." in n or ".attn2.to_v." in n
        }
        parameters = {f"unet.{name}": parameter for name, parameter in chosen.items()}
        if self.template != "token":
            return Moving(parameters, "delta", lambda: dict(parameters))
        new = LearnedToken(self.key, model, self.token, 1, initial_text(self.initializer, task))
        moves = {**parameters, "rows": new.rows}
        return Moving(moves, "delta", lambda: {**parameters, **new.weights()}, new.close, text=True)
