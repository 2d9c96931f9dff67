"""What the merge is built from: token rows of concepts, rows of captions, recorded inputs of other
layers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from immunize.merge.closed_form import Merge
from immunize.merge.factors import Factors, Inputs, factorize
from immunize.merge.inputs import TEXT, Batch, group_of, layer_inputs, suffixes
from immunize.merge.learned import Learned, Mask
from lab.core.errors import UserError
from lab.core.options import choice, number
from lab.models.diffusion import DiffusionModel

logger = logging.getLogger(__name__)
Scope = Literal["kv", "qkv", "attention", "down", "up", "all"]
Rule = Literal["closed_form", "mean", "masked", "gated"]
SCOPES: tuple[Scope, ...] = ("kv", "qkv", "attention", "down", "up", "all")
RULES: tuple[Rule, ...] = ("closed_form", "mean", "masked", "gated")
TIMED = (
    "time_emb",
    "add_embedding",
)  # layers that see the timestep only, the same for all concepts: averaged


@dataclass(frozen=True)
class MergeOptions:
    """How concepts are merged.

    Attributes:
        scope: matrices that the rule covers: ``kv`` keys and values of cross-attention (the paper),
            ``qkv`` its queries too, ``attention`` all projections of self- and cross-attention,
            ``down`` and ``up`` all matrices and kernels of those blocks, ``all`` of the U-Net.
            Everything else is averaged.
        rule: ``closed_form``; ``mean`` of all; ``masked``: closed form on key/value, learned masks
            on the rest of the scope; ``gated``: one learned weight per block and concept throughout
            the scope.
        lam, mu: λ, μ of `immunize.merge.closed_form.factorize`. The paper has λ = 0; rows of an
            untrained text encoder end in a plain layer norm, sum to 0 and leave C_regᵀC_reg
            singular then.
        rows: input rows per concept of a layer whose input is not text; a kernel's rows are its
            patches. At most d/2N are taken, so that N concepts never pin down a whole matrix of
            input width d.
        regular_rows: rows of C_reg of such a layer; λ must be positive where they are fewer than
            its input is wide.
        mask: ``sparse`` | ``low_rank``, of rank 4.
        seed: of the choice of rows and of the masks.
    """

    scope: Scope = "kv"
    rule: Rule = "closed_form"
    lam: float = 1e-2
    mu: float = 0.0
    rows: int = 16
    regular_rows: int = 1024
    mask: Mask = "sparse"
    seed: int = 0

    def __post_init__(self) -> None:
        choice("immunize.merge.scope", self.scope, SCOPES)
        choice("immunize.merge.rule", self.rule, RULES)
        choice("immunize.merge.mask", self.mask, ("sparse", "low_rank"))
        number("immunize.merge.lam", self.lam, 0)
        number("immunize.merge.mu", self.mu, 0)
        if self.rule == "masked" and self.scope == "kv":
            raise UserError(
                "immunize.merge.scope",
                "kv",
                "rule=masked learns masks beyond kv; take a larger scope.",
            )


@dataclass(frozen=True)
class Rows:
    """Rows [m, d] of the text encoder and the token that each stands for."""

    rows: Tensor
    tokens: tuple[str, ...]


def scope_names(unet: nn.Module, scope: Scope) -> list[str]:
    """Names of the U-Net's matrices and kernels in ``scope``, in the order of the U-Net."""
    choice("immunize.merge.scope", scope, SCOPES)
    names = [name for name, p in unet.named_parameters() if p.dim() >= 2]
    if scope in ("down", "up"):
        return [name for name in names if name.startswith(f"{scope}_blocks.")]
    if scope == "all":
        return names
    ends = suffixes("attn2", "kv")
    if scope != "kv":
        ends += suffixes("attn2", "q")
    if scope == "attention":
        ends += (*suffixes("attn1", "qkv"), "attn1.to_out.0.weight", "attn2.to_out.0.weight")
    return [name for name in names if name.endswith(ends)]


# text


def word_positions(model: DiffusionModel, prompt: str, words: str) -> list[int]:
    """Positions of the tokens of ``words`` in the encoded ``prompt``, first occurrence; empty if it
    is not there.
    """
    tokenizer = model.tokenizers[0]
    asked = tokenizer(words, add_special_tokens=False).input_ids
    ids = model.tokens([prompt])[0].tolist()
    if asked:
        for i in range(len(ids) - len(asked) + 1):
            if ids[i : i + len(asked)] == asked:
                return list(range(i, i + len(asked)))
    return []


@torch.no_grad()
def concept_rows(model: DiffusionModel, prompts: Sequence[str], words: str) -> Rows:
    """Text-encoder rows of the tokens of ``words`` in each of ``prompts``, equal rows once.

    Raises:
        UserError: no prompt, or one in which the words do not occur (within the context).
    """
    if not prompts:
        raise UserError("scenario", words, "the concept needs at least one prompt that names it.")
    rows: list[Tensor] = []
    tokens: list[str] = []
    for prompt in prompts:
        places = word_positions(model, prompt, words)
        if not places:
            context = model.tokenizers[0].model_max_length
            raise UserError(
                "scenario",
                words,
                f"the words must occur in the first {context} tokens of {prompt!r}.",
            )
        hidden = model.text([prompt]).hidden[0]
        names = model.tokenizers[0].convert_ids_to_tokens(
            model.tokens([prompt])[0, places].tolist()
        )
        for i, name in zip(places, names, strict=True):
            if not _known(hidden[i], rows):
                rows.append(hidden[i])
                tokens.append(name)
    return Rows(torch.stack(rows), tuple(tokens))


def _known(row: Tensor, rows: Sequence[Tensor]) -> bool:
    """Equal up to the rounding of a batched encoder."""
    return any(bool((row - other).norm() <= 1e-5 * row.norm()) for other in rows)


def distinct_rows(concepts: Sequence[Rows], mu: float = 0.0) -> tuple[list[Tensor], list[str]]:
    """C_n without the rows that another concept has too, and the tokens that were dropped.

    A shared row would ask X c = W_1 c and X c = W_2 c at once (C A Cᵀ singular). It says nothing
    about either concept, so it goes from all of them. A concept that has no other row keeps its
    rows where μ > 0: the constraint is then (1/μ)‖X Cᵀ − V‖², whose solution averages what the
    concepts ask for.

    Raises:
        UserError: a concept shares all its rows and μ = 0; names the tokens.
    """
    found, dropped = [], []
    for n, concept in enumerate(concepts):
        others = [row for m, other in enumerate(concepts) if m != n for row in other.rows]
        shared = [_known(row, others) for row in concept.rows]
        tokens = [t for t, known in zip(concept.tokens, shared, strict=True) if known]
        if all(shared) and mu == 0:
            raise UserError(
                "immunize.merge.mu",
                mu,
                f"concept {n + 1} shares all its tokens ({', '.join(dict.fromkeys(tokens))}) "
                "with other concepts, "
                "which makes C A Cᵀ singular; a value above 0 replaces the constraint X Cᵀ = "
                "V by (1/μ)‖X Cᵀ − V‖², "
                "which averages them; or name the concepts by different words.",
            )
        if all(shared):
            told = (
                "concept %d shares all its tokens (%s) with others: immunize.merge.mu=%g "
                "averages what they ask for"
            )
            logger.warning(told, n + 1, ", ".join(dict.fromkeys(tokens)), mu)
        keep = [i for i, known in enumerate(shared) if all(shared) or not known]
        found.append(concept.rows[keep])
        dropped += tokens if not all(shared) else []
    if dropped:
        told = (
            "the merge leaves out the rows of %s, which several concepts share: they say "
            "nothing about either"
        )
        logger.warning(told, ", ".join(dict.fromkeys(dropped)))
    return found, list(dict.fromkeys(dropped))


@torch.no_grad()
def regularizer_rows(model: DiffusionModel, captions: Sequence[str], batch: int = 64) -> Tensor:
    """C_reg [captions · context, d]: all rows of the encoded captions, encoded once.

    Raises:
        UserError: no caption.
    """
    if not captions:
        raise UserError("scenario.regularizers", 0, "the merge needs captions of unrelated things.")
    parts = [model.text(captions[i : i + batch]).hidden for i in range(0, len(captions), batch)]
    return torch.cat(parts).flatten(0, 1)


# the whole


def build_merge(
    model: DiffusionModel,
    concepts: Sequence[tuple[Sequence[str], str]],
    captions: Sequence[str],
    options: MergeOptions,
    *,
    batches: Sequence[Sequence[Batch]] = (),
    regular_batches: Sequence[Batch] = (),
) -> Merge:
    """The merge of ``concepts`` at θ_0 = ``model``.

    Args:
        concepts: (prompts, words) of each.
        captions: of C_reg.
        batches: per concept, what layers without text input are recorded on (scopes beyond ``kv``).
        regular_batches: the same for C_reg.

    Raises:
        UserError: singular systems, shared tokens, or a scope without batches.
    """
    n, rule = len(concepts), options.rule
    if rule == "mean" or n == 0:
        return Merge(n)
    scope = scope_names(model.unet, options.scope)
    closed = [
        x
        for x in scope
        if group_of(x) == TEXT or (rule == "closed_form" and not any(t in x for t in TIMED))
    ]
    if rule == "gated":
        closed = []
    members = {name: group_of(name) for name in closed}
    factors: dict[str, Factors] = {}
    dropped: list[str] = []
    if TEXT in members.values():
        rows, dropped = distinct_rows([concept_rows(model, p, w) for p, w in concepts], options.mu)
        inputs = Inputs(tuple(rows), regularizer_rows(model, captions))
        factors[TEXT] = factorize(inputs, lam=options.lam, mu=options.mu)
    rest = [name for name in closed if members[name] != TEXT]
    if rest:
        if len(batches) != n or not all(batches) or not regular_batches:
            raise UserError(
                "immunize.merge.scope",
                options.scope,
                "needs pictures of every concept and of other things.",
            )
        seen = [
            layer_inputs(model, rest, some, options.rows, options.seed, i)
            for i, some in enumerate(batches)
        ]
        regular = layer_inputs(
            model, rest, regular_batches, options.regular_rows, options.seed, "regular"
        )
        for group, c in regular.items():
            most = max(c.shape[1] // (2 * n), 1)
            inputs = Inputs(tuple(some[group][:most] for some in seen), c)
            factors[group] = factorize(inputs, lam=options.lam, mu=options.mu)
    learned = None
    if rule in ("masked", "gated"):
        like = dict(model.unet.named_parameters())
        shapes = {name: like[name] for name in scope if name not in members}
        learned = Learned(shapes, n, "gate" if rule == "gated" else options.mask, seed=options.seed)
    merge = Merge(n, factors, members, learned)
    merge.report["dropped_tokens"] = float(len(dropped))
    return merge
