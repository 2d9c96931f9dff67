"""Attackers of the inner loop: one is drawn anew for every concept and step, and fine-tunes a copy
of the weights.

Attackers keep no adapters: a low-rank one is the *effective* weight W + s·BA (LoRA, arXiv
2106.09685; A uniform in ±1/√in, B = 0 as in peft), so that whatever an attacker moves is comparable
with θ and can be merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from torch import Tensor

from immunize.merge.build import Scope
from immunize.mima.inner_loop import InnerLoopOptions, draw_factors
from immunize.mima.sampling import WORDS, Batch, Pool, numbered
from lab.core.config import AsList, Count, NonNegative, Positive, config, options
from lab.core.seeding import generator
from lab.core.training import restore_state, state_tensors

Loss = Callable[[Batch, Mapping[str, Tensor]], Tensor]


def _check_order(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    if pair[0] > pair[1]:
        raise ValueError("must be one number or [smallest, largest]")
    return pair


_OneOrPair = BeforeValidator(lambda v: (v, v) if isinstance(v, int | float) else v)
_Ordered = AfterValidator(_check_order)


@options
class AttackerFamily:
    """Attackers of one kind.

    Args:
        kind: ``lora`` or ``weights``.
        share: how often, relative to the other families.
        scopes: what is moved (`immunize.merge.build.scope_names`), equally likely; one that stands
            twice is twice as likely.
        ranks, lr: one value, or smallest and largest, drawn uniformly and log-uniformly.
        optimizer: ``adamw`` (no weight decay) or ``sgd``.
        templates: captions that the attacker writes (`lab.core.prompts`), as likely as scopes.
        words: how many rare words ``token`` writes, equally likely.
    """

    lr: Annotated[tuple[Positive, Positive], _OneOrPair, _Ordered]
    kind: Literal["lora", "weights"] = "lora"
    share: NonNegative = 1.0
    scopes: Annotated[tuple[Scope, ...], AsList, Field(min_length=1)] = ("attn2",)
    ranks: Annotated[tuple[Count, Count], _OneOrPair, _Ordered] = (4, 4)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    templates: Annotated[
        tuple[Literal["name", "token", "description"], ...], AsList, Field(min_length=1)
    ] = ("name",)
    words: Annotated[int, Field(strict=True, ge=1, le=len(WORDS))] = 1


@dataclass(frozen=True)
class DrawnAttacker:
    """One drawn attacker.

    Attributes:
        settings: what it moves, and how.
        template: which captions it trains on, with the number of the rare word
            (`immunize.mima.sampling.numbered`).
    """

    settings: InnerLoopOptions
    template: str


@config
class AttackerOptions:
    """Which attackers are drawn.

    Args:
        attackers: name → family; null in place of a family takes it out of a preset.
        k_min, k_max: K is uniform between them.
    """

    attackers: dict[str, AttackerFamily | None] | None = None
    k_min: Count = 1
    k_max: Count = 1

    @model_validator(mode="after")
    def _check_attackers(self) -> Any:
        if self.k_min > self.k_max:
            raise ValueError(f"k_min={self.k_min} must be at most k_max={self.k_max}")
        if self.attackers is not None and not self.families:
            raise ValueError("attackers needs at least one family with share > 0")
        return self

    @property
    def families(self) -> dict[str, AttackerFamily]:
        """Those that are drawn, by name."""
        return {k: f for k, f in (self.attackers or {}).items() if f is not None and f.share > 0}

    @property
    def templates(self) -> tuple[str, ...]:
        """All templates that a family writes, ``token`` once for each of its words."""
        return tuple(
            dict.fromkeys(
                numbered(template, word)
                for family in self.families.values()
                for template in family.templates
                for word in range(family.words if template == "token" else 1)
            )
        )

    def draw(self, seed: int, *labels: object) -> DrawnAttacker:
        """Draw the attacker of the stream ``labels``."""
        g = generator(seed, "mima", "attacker", *labels)
        u = torch.rand(7, generator=g, dtype=torch.float64).tolist()
        left = u[0] * sum(family.share for family in self.families.values())
        for f in self.families.values():
            if left < f.share:
                break
            left -= f.share
        rank = f.ranks[0] + int(u[2] * (f.ranks[1] - f.ranks[0] + 1))
        settings = InnerLoopOptions(
            scope=f.scopes[int(u[1] * len(f.scopes))],
            rank=rank if f.kind == "lora" else None,
            lr=f.lr[0] * (f.lr[1] / f.lr[0]) ** u[3],
            optimizer=f.optimizer,
            steps=self.k_min + int(u[5] * (self.k_max - self.k_min + 1)),
        )
        template = f.templates[int(u[4] * len(f.templates))]
        return DrawnAttacker(settings, numbered(template, int(u[6] * f.words)))


@dataclass(frozen=True)
class Snapshot:
    """After ``step`` steps: the weights that the attacker moved, and, after its last step, the
    share by which the loss of its first batch has fallen (NaN before).
    """

    step: int
    weights: dict[str, Tensor]
    drop: float


class InnerAttack:
    """An attack in progress on batches of ``size`` of ``pool``, from θ on.

    Args:
        loss: of a batch under named weights; names that are missing are those of θ.
        theta: read at every step: where it moves in between, the attack stays added to it.
        names: the parameters in the attacker's scope.
        labels: of its stream of random numbers.
    """

    def __init__(
        self,
        loss: Loss,
        theta: Mapping[str, Tensor],
        names: Sequence[str],
        attacker: DrawnAttacker,
        pool: Pool,
        size: int,
        seed: int,
        *labels: object,
    ) -> None:
        self.loss, self.attacker, self.size = loss, attacker, size
        self.seed, self.labels = seed, labels
        self.pool = pool.template(attacker.template)
        settings = attacker.settings
        rank = settings.rank or 0
        self.is_lora = rank > 0
        # an adapter needs a weight with an input and an output dimension
        names = [n for n in names if theta[n].ndim >= 2] if self.is_lora else names
        self.base = {name: theta[name].detach() for name in names}
        self.leaves: list[Tensor] = []
        self.seen: list[Tensor] = []  # θ as the leaves know it; low-rank factors add to θ itself
        g = generator(seed, "mima", "factors", *labels)
        for w in self.base.values():
            if not self.is_lora:
                self.leaves.append(w.clone().requires_grad_())
                self.seen.append(w.clone())
                continue
            self.leaves += [x.requires_grad_() for x in draw_factors(w, rank, g)]
        self.optimizer: torch.optim.Optimizer
        if settings.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.leaves, lr=settings.lr)
        else:
            # measured on the CPU at MiniSD's size: a quarter of the time of the unfused one, a
            # third of a step
            self.optimizer = torch.optim.AdamW(
                self.leaves, lr=settings.lr, weight_decay=0.0, fused=True
            )
        self.step, self.first = 0, math.nan

    def weights(self) -> dict[str, Tensor]:
        """Return the effective weights that the leaves make."""
        if not self.is_lora:
            return dict(zip(self.base, self.leaves, strict=True))
        factors = zip(self.leaves[::2], self.leaves[1::2], strict=True)
        return {
            name: w + (b @ a).view_as(w)
            for (name, w), (a, b) in zip(self.base.items(), factors, strict=True)
        }

    def _batch(self, step: int) -> Batch:
        return self.pool.batch(self.size, self.seed, *self.labels, "lower", step)

    @torch.no_grad()
    def _follow_theta(self) -> None:
        """Keep what the attack has added to θ while θ moves."""
        for leaf, seen, w in zip(self.leaves, self.seen, self.base.values(), strict=False):
            leaf.add_(w - seen)
            seen.copy_(w)

    def advance(self, until: int) -> Snapshot:
        """Take steps up to number ``until``.

        Raises:
            FloatingPointError: the loss left the finite numbers; says at which step, and of which
                attacker.
        """
        self._follow_theta()
        while self.step < until:
            loss = self.loss(self._batch(self.step), self.weights())
            slopes = torch.autograd.grad(loss, self.leaves)
            value = float(loss.detach())
            self.step += 1
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"loss {value} in inner step {self.step} under {self.attacker}"
                )
            self.first = value if self.step == 1 else self.first
            for leaf, slope in zip(self.leaves, slopes, strict=True):
                leaf.grad = slope
            self.optimizer.step()
        with torch.no_grad():
            weights = {name: w.detach().clone() for name, w in self.weights().items()}
            drop = math.nan
            if self.step == self.attacker.settings.steps:
                drop = 1 - float(self.loss(self._batch(0), weights)) / self.first
        return Snapshot(self.step, weights, drop)

    def state(self) -> dict[str, Tensor]:
        """Return all that a resumed attack needs besides θ, the attack and its labels."""
        state = state_tensors(self.leaves, self.optimizer)
        state |= {f"seen.{i}": w for i, w in enumerate(self.seen)}
        state["progress"] = torch.tensor([float(self.step), self.first], dtype=torch.float64)
        return {key: value.detach().clone() for key, value in state.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        restore_state(self.leaves, self.optimizer, state)
        for i, tensor in enumerate(self.seen):
            tensor.copy_(state[f"seen.{i}"])
        self.step, self.first = int(state["progress"][0]), float(state["progress"][1])
