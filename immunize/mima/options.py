"""Option groups of the concept immunizers, checked where a config is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from immunize.merge.rows import MergeOptions
from immunize.mima.attackers import Attackers
from immunize.mima.hypergradient import METHODS, Method
from immunize.mima.implicit import Implicit
from immunize.mima.inner_loop import Adapter, Lower
from immunize.mima.products import Product
from immunize.mima.scopes import SCOPES
from lab.core.errors import UserError, nearest
from lab.core.options import choice, count, flag, number, unread


def group(key: str, given: Any, known: Sequence[str]) -> dict[str, Any]:
    """A group of options as a dict.

    Raises:
        UserError: no group, or an option that does not exist.
    """
    if not isinstance(given, Mapping):
        raise UserError(key, given, f"must be a group of options; set {key}.OPTION=VALUE.")
    for name, value in given.items():
        if name not in known:
            raise UserError(
                f"{key}.{name}", value, f"there is no such option; {nearest(str(name), known)}"
            )
    return {str(name): value for name, value in given.items()}


@dataclass(frozen=True)
class LowerOptions:
    """The attacker of the lower level.

    Attributes:
        scope: Π_l. lr: α. steps: K. optimizer: ``sgd`` | ``adamw``. weight_decay: of ``adamw``.
        rank: of LoRA factors; null: the weights themselves.
        prior: add ``w_prior`` times the prior's loss to the lower loss (the released code does).
        rest: ``adamw``: with ``hypergradient.method=alternating``, the matrices of the
            cross-attention outside the lower scope follow the lower losses too, by AdamW at α (the
            released code does).
    """

    scope: str = "attn2"
    lr: float = 10.0
    steps: int = 1
    optimizer: str = "sgd"
    weight_decay: float = 0.0
    rank: int | None = None
    prior: bool = False
    rest: str = "none"

    def __post_init__(self) -> None:
        choice("immunize.inner_loop.scope", self.scope, SCOPES)
        flag("immunize.inner_loop.prior", self.prior)
        choice("immunize.inner_loop.rest", self.rest, ("none", "adamw"))
        if self.rank is not None:
            Adapter(self.rank)
        decays, needs = (
            "adamw" in (self.optimizer, self.rest),
            "immunize.inner_loop.optimizer=adamw",
        )
        unread("immunize.inner_loop.weight_decay", self.weight_decay, 0.0, decays, needs)
        self.settings()

    def settings(self) -> Lower:
        """Without LoRA factors, whose first values are drawn anew at every step."""
        optimizer: Any = self.optimizer
        return Lower(self.lr, self.steps, optimizer, weight_decay=self.weight_decay)

    @staticmethod
    def read(given: Any) -> LowerOptions:
        return LowerOptions(
            **group("immunize.inner_loop", given, [f.name for f in fields(LowerOptions)])
        )


_READERS: dict[str, tuple[Method, ...]] = {  # methods that read an option
    "last": ("truncated",),
    "product": ("exact", "truncated", "implicit"),
    "recompute": ("exact", "truncated"),
    "rho": ("implicit",),
    "solver": ("implicit",),
    "iterations": ("implicit",),
}


@dataclass(frozen=True)
class GradientOptions:
    """How the gradient passes the lower level: see `immunize.mima.hypergradient.hypergradient`."""

    method: Method = "exact"
    last: int = 1
    product: Product = "reverse"
    recompute: bool = False
    rho: float = 0.05
    solver: Any = "cg"
    iterations: int = 10

    def __post_init__(self) -> None:
        choice("immunize.hypergradient.method", self.method, METHODS)
        count("immunize.hypergradient.last", self.last)
        choice("immunize.hypergradient.product", self.product, ("forward", "reverse"))
        choice("immunize.hypergradient.solver", self.solver, ("cg", "neumann"))
        flag("immunize.hypergradient.recompute", self.recompute)
        self.implicit()
        default = {f.name: f.default for f in fields(self)}
        for option, methods in _READERS.items():
            key, needs = (
                f"immunize.hypergradient.{option}",
                f"immunize.hypergradient.method={' or '.join(methods)}",
            )
            unread(key, getattr(self, option), default[option], self.method in methods, needs)

    def implicit(self) -> Implicit:
        return Implicit(self.rho, self.solver, self.iterations)

    @staticmethod
    def read(given: Any) -> GradientOptions:
        return GradientOptions(
            **group("immunize.hypergradient", given, [f.name for f in fields(GradientOptions)])
        )


def check_lower(lower: LowerOptions, gradient: GradientOptions, drawn: Attackers | None) -> None:
    """Whether the gradient can pass this lower level, or the attackers that are ``drawn`` in its
    place.

    Raises:
        UserError: what cannot work, by its config key.
    """
    implicit = gradient.method == "implicit"
    if drawn is None:
        if implicit and lower.rank is not None:
            told = (
                "must be null with immunize.hypergradient.method=implicit, whose lower "
                "level moves weights."
            )
            raise UserError("immunize.inner_loop.rank", lower.rank, told)
        if implicit and lower.optimizer == "adamw" and lower.weight_decay:
            told = (
                "must be 0 with immunize.hypergradient.method=implicit: the proximal term "
                "is its decay, towards θ."
            )
            raise UserError("immunize.inner_loop.weight_decay", lower.weight_decay, told)
        if implicit and lower.optimizer == "sgd" and lower.lr * gradient.rho >= 2:
            told = (
                f"gradient steps of size immunize.inner_loop.lr={lower.lr} on "
                "(ρ/2)‖θ'−θ‖² diverge: take ρ < 2/α."
            )
            raise UserError("immunize.hypergradient.rho", gradient.rho, told)
        return
    for f in fields(lower):
        if f.name in (
            "steps",
            "optimizer",
            "rank",
            *(() if lower.rest == "adamw" else ("lr", "weight_decay")),
        ):
            unread(
                f"immunize.inner_loop.{f.name}",
                getattr(lower, f.name),
                f.default,
                False,
                "immunize.attackers=null",
            )
    for key, found in drawn.families.items():
        if found.scopes != (lower.scope,):
            told = (
                f"must be [{lower.scope}], the scope of the lower level "
                "(immunize.inner_loop.scope)."
            )
            raise UserError(f"{key}.scopes", list(found.scopes), told)
        if implicit and found.kind == "lora":
            told = (
                "immunize.hypergradient.method=implicit needs attackers that move "
                "weights: kind=weights."
            )
            raise UserError(f"{key}.kind", found.kind, told)
        if implicit and found.optimizer == "sgd" and found.lr[1] * gradient.rho >= 2:
            told = (
                f"gradient steps of up to {found.lr[1]} on (ρ/2)‖θ'−θ‖² diverge: take ρ < "
                f"2 ÷ {key}.lr."
            )
            raise UserError("immunize.hypergradient.rho", gradient.rho, told)


@dataclass(frozen=True)
class MergeGroup:
    """How concepts are merged: `immunize.merge.rows.MergeOptions`, its numbers of rows excepted,
    and

    Attributes:
        prompts: at most so many prompts that name the concept give the rows of C_n.
        sparsity: of learned weights (`immunize.merge.learned.learn`).
    """

    options: MergeOptions
    prompts: int = 4
    sparsity: float = 0.0

    @staticmethod
    def read(given: Any) -> MergeGroup:
        known = [
            f.name for f in fields(MergeOptions) if f.name not in ("seed", "rows", "regular_rows")
        ]
        found = group("immunize.merge", given, [*known, "prompts", "sparsity"])
        count("immunize.merge.prompts", found.get("prompts", 4))
        number("immunize.merge.sparsity", found.get("sparsity", 0.0), 0)
        own = {name: found.pop(name) for name in ("prompts", "sparsity") if name in found}
        options, needs = MergeOptions(**found), "immunize.merge.rule=masked"
        masked = options.rule == "masked"
        unread("immunize.merge.mask", options.mask, MergeOptions.mask, masked, needs)
        unread(
            "immunize.merge.sparsity",
            own.get("sparsity", 0.0),
            0.0,
            masked and options.mask == "sparse",
            needs,
        )
        return MergeGroup(options, **own)
