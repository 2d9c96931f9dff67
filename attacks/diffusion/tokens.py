"""A new word for a text-to-image model: learned input embeddings of the text encoder (arXiv
2208.01618).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lab.core.errors import UserError
from lab.models.diffusion import DiffusionModel


class LearnedToken:
    """Adds ``token`` to a copy of the tokenizer and trains its embedding alone.

    The rows are a parameter of their own that a hook puts in the place of the embedding layer's
    output: no other row can move, not even by weight decay. Several vectors are named as diffusers
        names them: t, t_1, t_2, …

    Args:
        key: config key of the attacker, for messages.
        model: a copy; its tokenizer list and text encoder are changed.
        token: a word that the tokenizer does not know yet.
        vectors: embeddings it stands for, ≥ 1.
        like: text whose mean embedding every row starts from.

    Raises:
        UserError: a model with two text encoders, or a token that is known already or is split by
            the tokenizer.
    """

    def __init__(
        self, key: str, model: DiffusionModel, token: str, vectors: int, like: str
    ) -> None:
        if model.xl:
            raise UserError(
                "backbone",
                model.pipeline_class,
                f"{key} learns tokens of models with one text encoder.",
            )
        encoder: Any = model.text_encoders[0]
        tokenizer = copy.deepcopy(model.tokenizers[0])
        self.token = token
        self.names = [token, *(f"{token}_{i}" for i in range(1, vectors))]
        old = encoder.get_input_embeddings().weight.detach()
        like_ids = tokenizer(like, add_special_tokens=False).input_ids or [tokenizer.unk_token_id]
        whole = [tokenizer(name, add_special_tokens=False).input_ids for name in self.names]
        known = any(len(ids) == 1 and ids != [tokenizer.unk_token_id] for ids in whole)
        size, added = len(tokenizer), 0 if known else tokenizer.add_tokens(self.names)
        self.ids = [int(tokenizer.convert_tokens_to_ids(name)) for name in self.names]
        if (
            added != vectors or min(self.ids) < size
        ):  # add_tokens takes a piece such as "fox</w>" for a new word
            raise UserError(
                f"{key}.token", token, "the tokenizer knows this word; choose another, e.g. <new1>."
            )
        if tokenizer(self.expression, add_special_tokens=False).input_ids != self.ids:
            raise UserError(
                f"{key}.token",
                token,
                "the tokenizer splits this word; use small letters in <>, e.g. <new1>.",
            )
        model.tokenizers[0] = tokenizer
        rows = old[like_ids].mean(0).repeat(vectors, 1).clone()
        with torch.random.fork_rng(
            devices=[]
        ):  # transformers draws the new rows from the global stream
            encoder.resize_token_embeddings(max(len(tokenizer), len(old)), mean_resizing=False)
        self.layer: nn.Embedding = encoder.get_input_embeddings().requires_grad_(False)
        self.rows = nn.Parameter(rows)
        self._write()
        self.hook = self.layer.register_forward_hook(self._replace)

    @property
    def expression(self) -> str:
        """What stands for the concept in a prompt."""
        return " ".join(self.names)

    def _replace(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        for row, index in zip(self.rows, self.ids, strict=True):
            output = torch.where((args[0] == index)[..., None], row.to(output.dtype), output)
        return output

    @torch.no_grad()
    def _write(self) -> None:
        self.layer.weight[self.ids] = self.rows.to(self.layer.weight)

    def close(self) -> None:
        """Put the rows into the embedding layer."""
        self.hook.remove()
        self._write()

    def weights(self) -> dict[str, Tensor]:
        return {f"embedding.{self.token}": self.rows.detach()}


def expression(token: str, vectors: int) -> str:
    """What `LearnedToken` puts into prompts."""
    return " ".join([token, *(f"{token}_{i}" for i in range(1, vectors))])
