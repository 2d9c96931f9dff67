"""Custom Diffusion (arXiv 2212.04488): key and value matrices of cross-attention and a modifier
token.
"""

from __future__ import annotations

from typing import Literal

from attacks.diffusion.attack import ConceptAttack, Moving
from attacks.diffusion.tokens import LearnedToken, initial_text
from lab.core.config import NonNegative, Prompt, config
from lab.core.data import Concept
from lab.core.prompts import class_words
from lab.models.diffusion import DiffusionModel


@config
class CustomDiffusion(ConceptAttack):
    """Trains ``attn2.to_k`` and ``attn2.to_v`` and, with ``template=token``, the embedding of a new
    token.

    The concept is then called "``token`` noun", where the noun is what all captions of the prior
    images share. Deviates from the paper as `attacks.diffusion.dreambooth` does: the scenario's
    prior images, not retrieved ones.

    Args:
        initializer: what the token starts from: ``auto`` | ``words`` | any text
            (`attacks.diffusion.tokens.initial_text`). The paper takes a rare token.

    Raises:
        UserError: when called, a token that the tokenizer knows.
    """

    template: Literal["name", "token", "description"] = "token"
    token: Prompt = "<new1>"
    prior_weight: NonNegative = 1.0
    initializer: Prompt = "ktn"

    def expression(self, task: Concept) -> str:
        return f"{self.token} {class_words(task)}".strip()

    def learned_words(self) -> str | None:
        return self.token if self.template == "token" else None

    def open(self, model: DiffusionModel, task: Concept, seed: int) -> Moving:
        parameters = {
            f"unet.{name}": parameter
            for name, parameter in model.unet.named_parameters()
            if ".attn2.to_k." in name or ".attn2.to_v." in name
        }
        if self.template != "token":
            return Moving(parameters)
        new = LearnedToken(self.key, model, self.token, 1, initial_text(self.initializer, task))
        return Moving({**parameters, **new.weights()}, close=new.close, text=True)
