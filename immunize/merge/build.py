"""Build the merge of a U-Net: the layers that a scope covers, token rows of concepts, rows of
captions, recorded inputs of layers without text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from immunize.merge.closed_form import Factors, Merge, factorize
from immunize.merge.learned import LearnedWeights
from lab.core.config import Count, NonNegative, options
from lab.core.errors import UserError
from lab.core.seeding import generator
from lab.models.diffusion import DiffusionModel, Text, encoded, word_positions

logger = logging.getLogger(__name__)
TEXT = "text"  # the group of the matrices that read the text encoder
Scope = Literal["kv", "qkv", "attn2", "attention", "down", "up", "all"]
# latents, text, noise, timesteps, as `DiffusionModel.loss` takes them
ModelInputs = tuple[Tensor, Text, Tensor, Tensor]
# layers that see the timestep only, the same for all concepts: averaged
TIMED = ("time_emb", "add_embedding")


@options
class MergeOptions:
    """How concepts are merged.

    Args:
        scope: the parameters (`scope_names`) whose matrices and kernels the
            rule covers: ``kv`` keys and values of cross-attention (the paper). Everything else is
            averaged.
        rule: ``closed_form``; ``mean`` of all; ``masked``: closed form on key/value, learned masks
            on the rest of the scope; ``gated``: one learned weight per block and concept throughout
            the scope.
        prompts: at most so many prompts that name the concept give the rows of C_n.
        lam, mu: λ, μ of `immunize.merge.closed_form.factorize`. The paper has λ = 0; rows of an
            untrained text encoder end in a plain layer norm, sum to 0 and leave C_regᵀC_reg
            singular then.
        mask: ``sparse`` | ``low_rank``, of rank 4.
        sparsity: L1 weight of sparse masks (`immunize.merge.learned.learn`).
    """

    scope: Scope = "kv"
    rule: Literal["closed_form", "mean", "masked", "gated"] = "closed_form"
    prompts: Count = 4
    lam: NonNegative = 1e-2
    mu: NonNegative = 0.0
    mask: Literal["sparse", "low_rank"] = "sparse"
    sparsity: NonNegative = 0.0

    @property
    def is_learned(self) -> bool:
        return self.rule in ("masked", "gated")

    @model_validator(mode="after")
    def _check(self) -> MergeOptions:
        if self.rule == "masked" and self.scope == "kv":
            raise ValueError("rule=masked learns masks beyond scope=kv: take a larger scope")
        if self.mask == "low_rank" and self.rule != "masked":
            raise ValueError("mask=low_rank is read by rule=masked only")
        if self.sparsity > 0 and (self.rule, self.mask) != ("masked", "sparse"):
            raise ValueError("sparsity is read by rule=masked with mask=sparse only")
        return self


# layers


_SCOPES: dict[Scope, str] = {
    "kv": r"\.attn2\.to_[kv]\.weight$",
    "qkv": r"\.attn2\.to_[qkv]\.weight$",
    "attn2": r"\.attn2\.",
    "attention": r"\.attn[12]\.",
    "down": r"^down_blocks\.",
    "up": r"^up_blocks\.",
    "all": "",
}


def scope_names(unet: nn.Module, scope: Scope, key: str = "immunize.scope") -> tuple[str, ...]:
    """Return the names of the parameters in ``scope``, in the U-Net's order.

    ``kv``: key and value matrices of the cross-attention; ``qkv``: its queries too; ``attn2``: all
        of the cross-attention (the S of arXiv 2412.15320); ``attention``: self-attention too;
        ``down`` and ``up``: those blocks; ``all``: every parameter.

    Raises:
        UserError: the U-Net has none of them; names the config key ``key``.
    """
    names = tuple(n for n, _ in unet.named_parameters() if re.search(_SCOPES[scope], n))
    if not names:
        reason = "selects no parameter of this U-Net; choose all or a U-Net with cross-attention."
        raise UserError(key, scope, reason)
    return names


def group_of(name: str) -> str:
    """Return the group of a matrix. Matrices of one group read the same input: the text, or a
    self-attention's, or the layer's own.
    """
    if re.search(r"attn2\.to_[kv]\.weight$", name):
        return TEXT
    if re.search(r"attn1\.to_[qkv]\.weight$", name):
        return name.rsplit(".", 2)[0]
    return name.rsplit(".", 1)[0]


def _matrix_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Return what the module's weight, seen as a matrix, multiplies: [rows, d]."""
    if isinstance(module, nn.Conv2d):
        kernel: Any = module.kernel_size
        padding: Any = module.padding
        patches = nn.functional.unfold(
            x, kernel, dilation=module.dilation, padding=padding, stride=module.stride
        )
        return patches.transpose(1, 2).flatten(0, 1)
    return x.flatten(0, -2)


@torch.no_grad()
def record_inputs(
    model: DiffusionModel,
    names: Sequence[str],
    batches: Sequence[ModelInputs],
    rows: int,
    seed: int,
    *labels: object,
) -> dict[str, Tensor]:
    """Record the inputs of the layers of ``names`` on ``batches``: group → at most ``rows`` rows
    [·, d], float64 on the CPU.

    An equal share of each batch is chosen at random (stream ``labels`` of ``seed``).
    """
    owners = {group_of(name): name.rsplit(".", 1)[0] for name in names}
    recorded: dict[str, list[Tensor]] = {group: [] for group in owners}
    streams = {group: generator(seed, "merge", *labels, group) for group in owners}
    share = -(-rows // max(len(batches), 1))

    def record(group: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        every = _matrix_rows(module, arguments[0])
        chosen = torch.randperm(len(every), generator=streams[group])[:share]
        recorded[group].append(every[chosen.to(every.device)].double().cpu())

    handles = [
        model.unet.get_submodule(owner).register_forward_pre_hook(partial(record, group))
        for group, owner in owners.items()
    ]
    try:
        for z, text, noise, t in batches:
            model.predict(model.noised(z, noise, t)[0].to(z), t, text)
    finally:
        for handle in handles:
            handle.remove()
    return {group: torch.cat(parts)[:rows] for group, parts in recorded.items()}


# text


Rows = tuple[Tensor, list[str]]
"""Rows [m, d] of the text encoder and the token that each stands for."""


@torch.no_grad()
def concept_rows(model: DiffusionModel, prompts: Sequence[str], words: str) -> Rows:
    """Return text-encoder rows of the tokens of ``words`` in each of ``prompts``, equal rows once;
    the words stand in every prompt.
    """
    rows: list[Tensor] = []
    tokens: list[str] = []
    for prompt in prompts:
        places = word_positions(model, prompt, words)
        hidden = model.text([prompt]).hidden[0]
        ids = model.tokens([prompt])[0, places].tolist()
        names = model.tokenizers[0].convert_ids_to_tokens(ids)
        for i, name in zip(places, names, strict=True):
            if not _is_known(hidden[i], rows):
                rows.append(hidden[i])
                tokens.append(name)
    return torch.stack(rows), tokens


def _is_known(row: Tensor, rows: Sequence[Tensor]) -> bool:
    """Tell whether ``rows`` hold ``row``, up to the rounding of a batched encoder."""
    return any(bool((row - other).norm() <= 1e-5 * row.norm()) for other in rows)


def distinct_rows(concepts: Sequence[Rows], mu: float = 0.0) -> tuple[list[Tensor], list[str]]:
    """Return C_n without the rows that another concept has too, and the tokens that were dropped.

    A shared row would ask X c = W_1 c and X c = W_2 c at once (C A Cᵀ singular). It says nothing
    about either concept, so it goes from all of them. A concept that has no other row keeps its
    rows where μ > 0: the constraint is then (1/μ)‖X Cᵀ − V‖², whose solution averages what the
    concepts ask for.

    Raises:
        UserError: a concept shares all its rows and μ = 0; names the tokens.
    """
    distinct: list[Tensor] = []
    dropped: dict[str, None] = {}
    for n, (rows, tokens) in enumerate(concepts):
        others = [row for m, (other, _) in enumerate(concepts) if m != n for row in other]
        shared = [_is_known(row, others) for row in rows]
        if all(shared):
            reason = (
                f"concept {n + 1} shares all its tokens ({', '.join(dict.fromkeys(tokens))}"
                ") with other concepts, which makes C A Cᵀ singular. A value above 0 averages what "
                "they ask for; or name the concepts by different words."
            )
            if mu == 0:
                raise UserError("immunize.merge.mu", mu, reason)
            logger.warning("immunize.merge.mu=%g: %s", mu, reason)
            distinct.append(rows)
            continue
        distinct.append(rows[[i for i, known in enumerate(shared) if not known]])
        pairs = zip(tokens, shared, strict=True)
        dropped |= dict.fromkeys(token for token, known in pairs if known)
    if dropped:
        logger.warning(
            "the merge leaves out the rows of %s, which several concepts share", ", ".join(dropped)
        )
    return distinct, list(dropped)


def regularizer_rows(model: DiffusionModel, captions: Sequence[str]) -> Tensor:
    """Return C_reg [captions · context, d]: all rows of the encoded captions.

    Raises:
        UserError: no caption.
    """
    if not captions:
        raise UserError("scenario.regularizers", 0, "the merge needs captions of unrelated things.")
    return encoded(model, captions).flatten(0, 1)


def build_merge(
    model: DiffusionModel,
    concepts: Sequence[tuple[Sequence[str], str]],
    captions: Sequence[str],
    options: MergeOptions,
    *,
    batches: Sequence[Sequence[ModelInputs]] = (),
    regular_batches: Sequence[ModelInputs] = (),
    rows: int = 16,
    regular_rows: int = 1024,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Merge:
    """Build the merge of ``concepts`` at θ_0 = ``model``.

    Args:
        concepts: (prompts, words) of each.
        captions: of C_reg.
        batches: per concept, what layers without text input are recorded on (scopes beyond ``kv``).
        regular_batches: the same for C_reg.
        rows: input rows per concept of a layer whose input is not text; a kernel's rows are its
            patches. At most d/2N are taken, so that N concepts never pin down a whole matrix of
            input width d.
        regular_rows: rows of C_reg of such a layer; λ must be positive where they are fewer than
            its input is wide.
        seed: of the choice of rows and of the masks.
        dtype: of the weights that are merged; None for that of the model.

    Raises:
        UserError: singular systems or shared tokens.
    """
    n, rule, lam, mu = len(concepts), options.rule, options.lam, options.mu
    if rule == "mean" or n == 0:
        return Merge(n)
    parameters = dict(model.unet.named_parameters())
    names = scope_names(model.unet, options.scope, "immunize.merge.scope")
    scope = [name for name in names if parameters[name].dim() >= 2]
    members = {
        name: group_of(name)
        for name in (scope if rule != "gated" else ())
        if group_of(name) == TEXT
        or (rule == "closed_form" and not any(part in name for part in TIMED))
    }
    factors: dict[str, Factors] = {}
    dropped: list[str] = []
    if TEXT in members.values():
        text, dropped = distinct_rows([concept_rows(model, p, w) for p, w in concepts], mu)
        factors[TEXT] = factorize(text, regularizer_rows(model, captions), lam=lam, mu=mu)
    layers = [name for name, group in members.items() if group != TEXT]
    if layers:
        own = [record_inputs(model, layers, b, rows, seed, i) for i, b in enumerate(batches)]
        regular = record_inputs(model, layers, regular_batches, regular_rows, seed, "regular")
        for group, c in regular.items():
            most = max(c.shape[1] // (2 * n), 1)
            factors[group] = factorize([inputs[group][:most] for inputs in own], c, lam=lam, mu=mu)
    learned = None
    if options.is_learned:
        shapes = {name: parameters[name] for name in scope if name not in members}
        kind = "gate" if rule == "gated" else options.mask
        learned = LearnedWeights(shapes, n, kind, seed=seed)
    like = next(model.unet.parameters()).to(dtype or model.dtype)
    factors = {group: factor.to(like) for group, factor in factors.items()}
    merge = Merge(n, factors, members, learned)
    merge.report["dropped_tokens"] = float(len(dropped))
    return merge
