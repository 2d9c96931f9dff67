"""What is taken out of a model before the experiment starts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from lab.core.config import Index, NonNegative, Positive, Prompt, Text, config
from lab.core.data import ConceptCase, Erasure, Kind
from lab.core.errors import UserError, nearest
from lab.core.types import Eraser, Model
from lab.models.diffusion import DiffusionModel, encoded, word_positions

KEY = "scenario"  # what is erased comes with its cases
_log = logging.getLogger(__name__)


@config
class NoErasure(Eraser):
    """``erase=none``: the model stays as the backbone built it."""

    name: Text = "none"

    accepts: ClassVar[frozenset[Kind]] = frozenset({"linear", "deep", "diffusion"})

    def __call__(self, model: Model, case: ConceptCase, *, seed: int) -> Model:
        return model


@config
class Uce(Eraser):
    """``erase=uce``: the closed-form edit of every cross-attention key and value matrix (arXiv
    2308.14761 eq. 7).

        W' = (Σ_e W c*_e c_eᵀ + p Σ_k W c_k c_kᵀ + λW)(Σ_e c_e c_eᵀ + p Σ_k c_k c_kᵀ + λI)⁻¹

    over text-encoder rows: c of the erased concepts, c* of their anchors, c_k of what must stay.
    All concepts of the case are erased at once. The text encoder stays as it is, and so does XL's
    pooled text.

    Deviates from the released code, which edits from a concept's last token on: rows run from the
    concept's *first* word to the end of the context, padding included, since every later row
    carries the concept (`aligned`).

    Args:
        preserve_weight: p ≥ 0.
        ridge: λ > 0.
        anchor: a text that every erased prompt shall mean instead; None: the scenario's anchors,
            one for each prompt.
        preserve: so many of the scenario's preserved prompts at most, spread evenly over them;
            None: all.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    name: Text = "uce"
    preserve_weight: NonNegative = 0.3
    ridge: Positive = 0.5
    anchor: Prompt | None = None
    preserve: Index | None = None

    def texts(self) -> dict[str, str]:
        """Return what becomes a part of prompts, by config key."""
        return {} if self.anchor is None else {"erase.anchor": self.anchor}

    @torch.no_grad()
    def __call__(self, model: DiffusionModel, case: ConceptCase, *, seed: int) -> DiffusionModel:
        """An independent copy of ``model`` without ``case.erased``.

        Raises:
            UserError: nothing to erase, words that a prompt does not contain.
        """
        if not case.erased:
            reason = f"case {case.name} has no concept to erase; use erase=none, or relearn_styles."
            raise UserError("erase", self.name, reason)
        encode = cache(lambda prompts: encoded(model, prompts))  # styles share their anchors
        erased = case.erased
        if self.anchor is not None:
            erased = tuple(
                dataclasses.replace(e, anchors=(self.anchor,) * len(e.prompts)) for e in erased
            )
        pairs = [rows(model, erasure, encode) for erasure in erased]
        old, new = (torch.cat(part) for part in zip(*pairs, strict=True))
        preserved, keep = self._preserved(case.erased), old[:0]
        if preserved:
            keep = encoded(model, preserved).flatten(0, 1)
        edited = model.copy()
        matrices = keys_and_values(edited.unet)
        # Apple's GPUs have no float64
        device = "cpu" if model.device.type == "mps" else model.device
        old, new, keep = (part.to(device) for part in (old, new, keep))
        right = right_factor(old, new, keep, self.preserve_weight, self.ridge)
        for matrix in matrices.values():
            matrix.copy_((matrix.to(device).double() @ right).to(matrix.dtype))
        names = ", ".join(erasure.name for erasure in case.erased)
        _log.info(
            "erased %s: %d rows, %d kept, %d matrices", names, len(old), len(keep), len(matrices)
        )
        return edited

    def _preserved(self, erased: Sequence[Erasure]) -> tuple[str, ...]:
        prompts = tuple(dict.fromkeys(prompt for erasure in erased for prompt in erasure.preserve))
        n = len(prompts) if self.preserve is None else min(self.preserve, len(prompts))
        return tuple(prompts[i * len(prompts) // n] for i in range(n))


def keys_and_values(unet: nn.Module) -> dict[str, Tensor]:
    """Return the weights [out, d] of the key and value matrices of cross-attention
    (``…attn2.to_k``, ``…attn2.to_v``), by path.
    """
    ends = ("attn2.to_k.weight", "attn2.to_v.weight")
    return {
        name.removesuffix(".weight"): weight
        for name, weight in unet.named_parameters()
        if name.endswith(ends)
    }


def right_factor(
    old: Tensor, new: Tensor, keep: Tensor, preserve_weight: float, ridge: float
) -> Tensor:
    """Compute R [d, d] float64 with W' = W R, the same for every W (arXiv 2308.14761 eq. 7), by one
    Cholesky solve.

    With G = Σ c cᵀ + p Σ c_k c_kᵀ + λI the formula reads W' = W (G + Σ (c* − c) cᵀ) G⁻¹, so R = I +
    Σ (c* − c) cᵀ G⁻¹.

    Args:
        old, new: rows c and c* [n, d]; n = 0 gives R = I.
        keep: rows c_k [m, d].
    """
    c, target, k = old.double(), new.double(), keep.double()
    eye = torch.eye(c.shape[1], dtype=torch.float64, device=c.device)
    gram = c.T @ c + preserve_weight * (k.T @ k) + ridge * eye
    move = (target - c).T @ c
    return eye + torch.cholesky_solve(move.T, torch.linalg.cholesky(gram)).T


def rows(
    model: DiffusionModel,
    erasure: Erasure,
    encode: Callable[[tuple[str, ...]], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the rows c and c* [n, d] of one concept: every prompt from the concept's first word
    to the end of the context.

    Args:
        encode: `encoded` of the model, where the caller caches it.

    Raises:
        UserError: words that are not in a prompt or beyond its context.
    """
    pair = (erasure.prompts, erasure.anchors)
    ids = [model.tokens(texts).tolist() for texts in pair]
    hidden = [encode(texts) if encode else encoded(model, texts) for texts in pair]
    old, new = [], []
    for i, prompt in enumerate(erasure.prompts):
        places = word_positions(model, prompt, erasure.words)
        if not places:
            close = nearest(erasure.words.lower(), prompt.lower().replace(",", " ").split())
            fix = f"is not in the first {len(ids[0][i])} tokens of the prompt {prompt!r}; {close}"
            raise UserError(KEY, erasure.words, fix)
        start = places[0]
        ends = [line[i][1:].index(model.tokenizers[0].eos_token_id) + 1 for line in ids]
        old.append(hidden[0][i, start:])
        new.append(hidden[1][i, aligned(start, ends[0], ends[1], len(ids[0][i]))])
    return torch.cat(old), torch.cat(new)


def aligned(start: int, end: int, anchor_end: int, context: int) -> list[int]:
    """Return the anchor's position for every position ``start`` … ``context`` - 1 of a prompt; the
    anchor may be longer or shorter.

    Words and the end token are aligned at the end token (``end``, ``anchor_end``), because causal
    attention makes the last rows say what the whole prompt says; positions before the anchor's
    first word take its first word. Padding is aligned with padding at the same place, as both carry
    the position; where the anchor still has words there, its first padding (or, without any, its
    end) is taken.
    """
    words = [max(i + anchor_end - end, 1) for i in range(start, end + 1)]
    padding = [max(i, min(anchor_end + 1, context - 1)) for i in range(end + 1, context)]
    return words + padding
