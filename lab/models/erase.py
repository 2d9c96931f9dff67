"""What is taken out of a model before the experiment starts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lab.core.data import ConceptCase, Erasure, Kind
from lab.core.errors import UserError, nearest
from lab.core.options import count, number
from lab.core.prompts import check_prompts, text
from lab.core.types import AnyCase, Eraser, Model
from lab.models.diffusion import DiffusionModel

KEY = "scenario"  # what is erased comes with its cases
_log = logging.getLogger(__name__)


class NoErasure(Eraser):
    """``erase=none``: the model stays as the backbone built it."""

    accepts: ClassVar[frozenset[Kind]] = frozenset({"linear", "deep", "diffusion"})

    def __init__(self, name: str = "none") -> None:
        self.name = name

    def __call__(self, model: Model, case: AnyCase, *, seed: int) -> Model:
        return model


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

    def __init__(
        self,
        *,
        name: str = "uce",
        preserve_weight: float = 0.3,
        ridge: float = 0.5,
        anchor: str | None = None,
        preserve: int | None = None,
    ) -> None:
        self.name = name
        self.anchor = None if anchor is None else text("erase.anchor", anchor)
        self.preserve = None if preserve is None else count("erase.preserve", preserve, 0)
        self.preserve_weight = number("erase.preserve_weight", preserve_weight, 0)
        self.ridge = number("erase.ridge", ridge, above=0)

    def texts(self) -> dict[str, str]:
        return {} if self.anchor is None else {"erase.anchor": self.anchor}

    @torch.no_grad()
    def __call__(self, model: DiffusionModel, case: ConceptCase, *, seed: int) -> DiffusionModel:
        """An independent copy of ``model`` without ``case.erased``.

        Raises:
            UserError: nothing to erase, words that a prompt does not contain, prompts without
                anchors.
        """
        if not case.erased:
            told = (
                f"case {case.name} has no concept to erase; use erase=none, or a scenario "
                "that erases"
            )
            raise UserError(
                "erase", self.name, f"{told} (relearn_styles; folder with erase: true)."
            )
        encode = cache(lambda prompts: encoded(model, prompts))  # styles share their anchors
        pairs = [rows(model, self._anchored(erasure), encode) for erasure in case.erased]
        kept = self._kept(case.erased)
        old, new = (torch.cat(part) for part in zip(*pairs, strict=True))
        keep = (
            encoded(model, check_prompts(KEY, kept, model.tokenizers[0])).flatten(0, 1)
            if kept
            else old[:0]
        )
        edited = model.copy()
        matrices = keys_and_values(edited.unet)
        where = (
            "cpu" if model.device.type == "mps" else model.device
        )  # Apple's GPUs have no float64
        right = right_factor(
            old.to(where), new.to(where), keep.to(where), self.preserve_weight, self.ridge
        )
        for name, matrix in matrices.items():
            if matrix.shape[1] != len(right):
                fix = (
                    f"{name} takes rows of {matrix.shape[1]} channels, the text encoders "
                    f"give {len(right)}."
                )
                raise UserError("backbone", type(model.unet).__name__, fix)
            matrix.copy_((matrix.to(where).double() @ right).to(matrix.dtype))
        names = ", ".join(erasure.name for erasure in case.erased)
        _log.info(
            "erased %s: %d rows, %d kept, %d matrices", names, len(old), len(keep), len(matrices)
        )
        return edited

    def _anchored(self, erasure: Erasure) -> Erasure:
        if self.anchor is None:
            return erasure
        return dataclasses.replace(erasure, anchors=(self.anchor,) * len(erasure.prompts))

    def _kept(self, erased: Sequence[Erasure]) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(prompt for erasure in erased for prompt in erasure.preserve))
        if self.preserve is None or self.preserve >= len(found):
            return found
        return tuple(found[i * len(found) // self.preserve] for i in range(self.preserve))


def keys_and_values(unet: nn.Module) -> dict[str, Tensor]:
    """Path → weight [out, d] of every key and value matrix of cross-attention (``…attn2.to_k``,
    ``…attn2.to_v``).
    """
    ends = ("attn2.to_k", "attn2.to_v")
    found: dict[str, Any] = {
        name: module.weight for name, module in unet.named_modules() if name.endswith(ends)
    }
    return found


def right_factor(
    old: Tensor, new: Tensor, keep: Tensor, preserve_weight: float, ridge: float
) -> Tensor:
    """R [d, d] float64 with W' = W R, the same for every W (arXiv 2308.14761 eq. 7); one Cholesky
    solve.

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
    """The rows c and c* [n, d] of one concept: every prompt from the concept's first word to the
    end of the context.

    Args:
        encode: `encoded` of the model, where the caller keeps what it gave; None: nobody does.

    Raises:
        UserError: no prompts, another number of anchors, words that are not in a prompt or beyond
            its context.
    """
    tokenizer = model.tokenizers[0]
    prompts = check_prompts(KEY, erasure.prompts, tokenizer)
    anchors = check_prompts(KEY, erasure.anchors, tokenizer)
    if len(prompts) != len(anchors):
        fix = (
            f"has {len(prompts)} prompts and {len(anchors)} anchors; each prompt needs the "
            "anchor it shall mean."
        )
        raise UserError(KEY, f"erasure of {erasure.name}", fix)
    ids = [model.tokens(texts).tolist() for texts in (prompts, anchors)]
    hidden = [encode(texts) if encode else encoded(model, texts) for texts in (prompts, anchors)]
    old, new = [], []
    for i, prompt in enumerate(prompts):
        start = position(prompt, erasure.words, ids[0][i], tokenizer)
        ends = [line[i][1:].index(tokenizer.eos_token_id) + 1 for line in ids]
        old.append(hidden[0][i, start:])
        new.append(hidden[1][i, aligned(start, ends[0], ends[1], len(ids[0][i]))])
    return torch.cat(old), torch.cat(new)


def aligned(start: int, end: int, anchor_end: int, context: int) -> list[int]:
    """The anchor's position for every position ``start`` … ``context`` - 1 of a prompt; an anchor
    may be longer or shorter.

    Words and the end token are aligned at the end token (``end``, ``anchor_end``), because causal
    attention makes the last rows say what the whole prompt says; positions before the anchor's
    first word take its first word. Padding is aligned with padding at the same place, as both carry
    the position; where the anchor still has words there, its first padding (or, without any, its
    end) is taken.
    """
    words = [max(i + anchor_end - end, 1) for i in range(start, end + 1)]
    padding = [max(i, min(anchor_end + 1, context - 1)) for i in range(end + 1, context)]
    return words + padding


def position(prompt: str, words: str, ids: Sequence[int], tokenizer: Any) -> int:
    """Where the tokens of ``words`` begin in the tokens ``ids`` of ``prompt``.

    Raises:
        UserError: nowhere; names the prompt's nearest words.
    """
    wanted: list[int] = tokenizer(words, add_special_tokens=False).input_ids
    found = _find(wanted, ids)
    if wanted and found is not None:
        return found
    if wanted and _find(wanted, tokenizer(prompt, verbose=False).input_ids) is not None:
        raise UserError(
            KEY,
            words,
            f"stands beyond the context of {len(ids)} tokens in the prompt {prompt!r}; shorten it.",
        )
    told = nearest(words.lower(), prompt.lower().replace(",", " ").split())
    raise UserError(KEY, words, f"is not in the prompt {prompt!r}; {told}")


def _find(wanted: Sequence[int], ids: Sequence[int]) -> int | None:
    last = len(ids) - len(wanted) + 1
    return next((i for i in range(last) if list(ids[i : i + len(wanted)]) == list(wanted)), None)


def encoded(model: DiffusionModel, prompts: Sequence[str], batch: int = 64) -> Tensor:
    """Text-encoder rows [n, context, d] without gradient."""
    parts = [model.text(prompts[i : i + batch]).hidden for i in range(0, len(prompts), batch)]
    return torch.cat(parts)
