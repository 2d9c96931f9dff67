"""Textual inversion (arXiv 2208.01618): one new word, every weight of the model stays. With
``nearest`` it is a search for a prompt of existing words (PEZ, arXiv 2302.03668).
"""

from __future__ import annotations

from typing import Literal

from attacks.diffusion.attack import ConceptAttack, Moving
from attacks.diffusion.tokens import LearnedToken, initial_text, token_names
from lab.core.config import Count, Flag, NonNegative, Positive, Prompt, config
from lab.core.data import Concept
from lab.models.diffusion import DiffusionModel


@config
class TextualInversion(ConceptAttack):
    """Trains the embeddings of a new token.

    Args:
        vectors: embeddings that the token stands for.
        initializer: where they start: ``auto`` (the class noun) | ``words`` (the concept's own
            words) | any text.
        nearest: whether every embedding acts as the nearest one of the vocabulary; the table
            ``attacks`` then has the ``nearest_words``.

    Raises:
        UserError: when called, a token that the tokenizer knows.
    """

    lr: Positive = 5e-3
    weight_decay: NonNegative = 0.0
    template: Literal["token"] = "token"
    token: Prompt = "<concept>"
    vectors: Count = 1
    initializer: Prompt = "auto"
    nearest: Flag = False

    def expression(self, task: Concept) -> str:
        return self.learned_words()

    def learned_words(self) -> str:
        return " ".join(token_names(self.token, self.vectors))

    def open(self, model: DiffusionModel, task: Concept, seed: int) -> Moving:
        start = initial_text(self.initializer, task)
        new = LearnedToken(self.key, model, self.token, self.vectors, start, self.nearest)
        (name,) = new.weights()
        return Moving(
            new.weights(),
            lambda _: {name: new.current()},
            close=new.close,
            text=True,
            info={"vectors": self.vectors, "initial_text": start},
            results=lambda: {"nearest_words": new.nearest_words()} if self.nearest else {},
        )
