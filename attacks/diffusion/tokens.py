"""A new word for a text-to-image model: learned input embeddings of the text encoder (arXiv
2208.01618).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.core.data import Concept
from lab.core.errors import UserError
from lab.core.prompts import class_words
from lab.models.diffusion import DiffusionModel


def token_names(token: str, vectors: int) -> list[str]:
    """Return the words that stand for ``vectors`` embeddings, as diffusers names them: t, t_1, …"""
    return [token, *(f"{token}_{i}" for i in range(1, vectors))]


def initial_text(initializer: str, task: Concept) -> str:
    """Return the text that a new word starts from.

    ``auto``: the class noun, else ``style`` or ``object``; ``words``: the concept's own words; else
    the text itself.
    """
    if initializer == "auto":
        return class_words(task) or task.kind
    return task.words if initializer == "words" else initializer


class LearnedToken:
    """Adds ``token`` to a copy of the tokenizer and trains its embedding alone.

    The rows are a parameter of their own that a hook puts in the place of the embedding layer's
    output: no other row can move, not even by weight decay. `token_names` names several vectors.

    Args:
        key: config key of the attacker, for messages.
        model: a copy; its tokenizer list and text encoder are changed.
        token: a word that the tokenizer does not know yet.
        vectors: embeddings it stands for, ≥ 1.
        like: text whose mean embedding every row starts from.
        nearest: whether every row acts as the row of the vocabulary that has the largest cosine to
            it, as gradients pass straight through (arXiv 2302.03668); ``nearest_words`` are these.

    Raises:
        UserError: a model with two text encoders, or a token that is known already or is split by
            the tokenizer.
    """

    def __init__(
        self,
        key: str,
        model: DiffusionModel,
        token: str,
        vectors: int,
        like: str,
        nearest: bool = False,
    ) -> None:
        if model.xl:
            raise UserError(
                "backbone",
                model.pipeline_class,
                f"{key} learns tokens of models with one text encoder.",
            )
        encoder: Any = model.text_encoders[0]
        tokenizer = copy.deepcopy(model.tokenizers[0])
        self.token, names = token, token_names(token, vectors)
        self.expression = " ".join(names)  # what stands for the concept in a prompt
        old = encoder.get_input_embeddings().weight.detach()
        like_ids = tokenizer(like, add_special_tokens=False).input_ids or [tokenizer.unk_token_id]
        whole = [tokenizer(name, add_special_tokens=False).input_ids for name in names]
        known = any(len(ids) == 1 and ids != [tokenizer.unk_token_id] for ids in whole)
        size, added = len(tokenizer), 0 if known else tokenizer.add_tokens(names)
        self.ids = [int(tokenizer.convert_tokens_to_ids(name)) for name in names]
        reason = ""
        # add_tokens takes a piece such as "fox</w>" for a new word
        if added != vectors or min(self.ids) < size:
            reason = "the tokenizer knows this word; choose another, e.g. <new1>."
        elif tokenizer(self.expression, add_special_tokens=False).input_ids != self.ids:
            reason = "the tokenizer splits this word; use small letters in <>, e.g. <new1>."
        if reason:
            raise UserError(f"{key}.token", token, reason)
        special = set(tokenizer.all_special_ids)
        self.vocabulary = [i for i in range(size) if i not in special] if nearest else []
        self.table, self.tokenizer = old[self.vocabulary], tokenizer  # table [V, d]
        self.directions = F.normalize(self.table, dim=1)
        model.tokenizers[0] = tokenizer
        rows = old[like_ids].mean(0).repeat(vectors, 1).clone()
        with torch.random.fork_rng(devices=[]):  # transformers draws rows from the global stream
            encoder.resize_token_embeddings(max(len(tokenizer), len(old)), mean_resizing=False)
        self.layer: nn.Embedding = encoder.get_input_embeddings().requires_grad_(False)
        self.rows = nn.Parameter(rows)
        self._write()
        self.hook = self.layer.register_forward_hook(self._replace)

    def _best(self) -> Tensor:
        """Return the rows of ``table`` with the largest cosine: int64 [vectors]."""
        return (F.normalize(self.rows.detach(), dim=1) @ self.directions.T).argmax(1)

    def current(self) -> Tensor:
        """Return what the rows act as: [vectors, d]."""
        if not self.vocabulary:
            return self.rows
        return self.rows + (self.table[self._best()] - self.rows).detach()

    def nearest_words(self) -> str:
        """Return the text that the rows act as, with ``nearest``."""
        return str(self.tokenizer.decode([self.vocabulary[i] for i in self._best()]))

    def _replace(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        for row, index in zip(self.current(), self.ids, strict=True):
            output = torch.where((args[0] == index)[..., None], row.to(output.dtype), output)
        return output

    @torch.no_grad()
    def _write(self) -> None:
        self.layer.weight[self.ids] = self.current().to(self.layer.weight)

    def close(self) -> None:
        """Put the rows into the embedding layer."""
        self.hook.remove()
        self._write()

    def weights(self) -> dict[str, nn.Parameter]:
        """Return the rows by the name that `attacks.diffusion.export` gives them."""
        return {f"embedding.{self.token}": self.rows}
