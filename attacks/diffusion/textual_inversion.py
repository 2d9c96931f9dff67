"""Textual inversion (arXiv 2208.01618): one new word, every weight of the model stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attacks.diffusion.attack import ConceptAttack, Moving
from attacks.diffusion.tokens import LearnedToken, expression
from lab.core.captions import class_words
from lab.core.data import Concept
from lab.core.options import count
from lab.core.prompts import text
from lab.models.diffusion import DiffusionModel


def initial_text(initializer: str, task: Concept) -> str:
    """``auto``: the class noun, else ``style`` or ``object``; ``words``: the concept's own words;
    else the text.
    """
    if initializer == "auto":
        return class_words(task) or task.kind
    return task.words if initializer == "words" else initializer


@dataclass(eq=False)
class TextualInversion(ConceptAttack):
    """Trains the embeddings of a new token.

    Args:
        vectors: embeddings that the token stands for.
        initializer: where they start: ``auto`` (the class noun) | ``words`` (the concept's own
            words) | any text.

    Raises:
        UserError: see `ConceptAttack`; when called, a token that the tokenizer knows.
    """

    lr: float = 5e-3
    weight_decay: float = 0.0
    template: str = "token"
    token: str = "<concept>"
    vectors: int = 1
    initializer: str = "auto"

    templates: ClassVar[tuple[str, ...]] = ("token",)

    def __post_init__(self) -> None:
        super().__post_init__()
        count(f"{self.key}.vectors", self.vectors)
        self.initializer = text(f"{self.key}.initializer", self.initializer)

    def expression(self, task: Concept) -> str:
        return self.learns()

    def learns(self) -> str:
        return expression(self.token, self.vectors)

    def open(self, model: DiffusionModel, task: Concept, seed: int) -> Moving:
        like = initial_text(self.initializer, task)
        new = LearnedToken(self.key, model, self.token, self.vectors, like)
        info = {"vectors": self.vectors, "initial_text": like}
        return Moving({"rows": new.rows}, "delta", new.weights, new.close, text=True, info=info)
