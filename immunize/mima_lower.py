"""The deep lower level: an attacker, drawn anew for every concept and step, fine-tunes a copy of the weights.

Attackers keep no adapters: a low-rank one is the *effective* weight W + s·BA (LoRA, arXiv 2106.09685; A uniform in
±1/√in, B = 0 as in peft), so that whatever an attacker moves is comparable with θ and can be merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from immunize.mima_sampling import TEMPLATES, Batch, Pool
from immunize.mima_scopes import SCOPES, matrices
from lab.errors import UserError
from lab.options import choice, count, names, number
from lab.seeding import generator

Loss = Callable[[Batch, Mapping[str, Tensor]], Tensor]
_FIELDS = ("kind", "share", "scopes", "ranks", "lr", "optimizer")


@dataclass(frozen=True)
class Attack:
    """One drawn attacker.

    Attributes:
        kind: ``lora`` or ``weights``. scope: what it moves. rank: of LoRA, 0 otherwise. lr: its learning rate.
        optimizer: ``adamw`` (no weight decay) or ``sgd``. template: which captions it trains on.
        steps: K.
    """

    kind: str
    scope: str
    rank: int
    lr: float
    optimizer: str
    template: str
    steps: int


@dataclass(frozen=True)
class Family:
    """Attackers of one kind. ``share``: how often, relative to the others; ``ranks`` and ``lr``: smallest and
    largest, drawn uniformly and log-uniformly."""

    kind: str
    share: float
    scopes: tuple[str, ...]
    ranks: tuple[int, int]
    lr: tuple[float, float]
    optimizer: str


def _range(key: str, value: Any) -> list[Any]:
    pair = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value, value]
    if len(pair) != 2:
        raise UserError(key, value, "must be one number or [smallest, largest].")
    return pair


def family(key: str, given: Any) -> Family:
    """A family from its options; ``key`` is its config key.

    Raises:
        UserError: unknown options, learning rates ≤ 0, ranks < 1, a range that is the wrong way round.
    """
    if not isinstance(given, Mapping):
        raise UserError(key, given, f"must be a group with {', '.join(_FIELDS)}.")
    for name in given:
        choice(f"{key}.{name}", name, _FIELDS)
    kind = choice(f"{key}.kind", given.get("kind", "lora"), ("lora", "weights"))
    scopes = tuple(choice(f"{key}.scopes", s, SCOPES) for s in names(f"{key}.scopes", given.get("scopes", "attn2")))
    ranks = [count(f"{key}.ranks", r) for r in _range(f"{key}.ranks", given.get("ranks", 4))]
    lr = [number(f"{key}.lr", r, above=0) for r in _range(f"{key}.lr", given.get("lr"))]
    for name, pair in (("ranks", ranks), ("lr", lr)):
        if pair[0] > pair[1]:
            raise UserError(f"{key}.{name}", pair, "must be [smallest, largest].")
    if not scopes:
        raise UserError(f"{key}.scopes", scopes, f"needs at least one of {', '.join(SCOPES)}.")
    optimizer = choice(f"{key}.optimizer", given.get("optimizer", "adamw"), ("adamw", "sgd"))
    share = number(f"{key}.share", given.get("share", 1.0), 0)
    return Family(kind, share, scopes, (ranks[0], ranks[1]), (lr[0], lr[1]), optimizer)


class Attackers:
    """Draws attackers.

    Args:
        families: name → options, see `family`; the first one is what the curriculum begins with.
        k_min, k_max: K is uniform between them.
        templates: of `immunize.mima_sampling.TEMPLATES`, equally often.
        curriculum: share of the upper steps, from the first, that see only the narrow end: the first family, its
            first scope, smallest rank, learning rates up to the geometric mean, own captions, K in the upper half.
    """

    def __init__(
        self, families: Any, k_min: int, k_max: int, templates: Any = ("captions",), curriculum: float = 0.0
    ) -> None:
        if not isinstance(families, Mapping):
            raise UserError("immunize.attackers", families, "must be a group of attackers.")
        # null takes a family out of a preset
        given = {str(name): options for name, options in families.items() if options is not None}
        found = [family(f"immunize.attackers.{name}", options) for name, options in given.items()]
        self.families = [f for f in found if f.share > 0]
        if not self.families:
            raise UserError("immunize.attackers", list(given), "needs at least one attacker with share > 0.")
        self.k_min, self.k_max = count("immunize.k_min", k_min), count("immunize.k_max", k_max)
        if k_min > k_max:
            raise UserError("immunize.k_min", k_min, f"must be at most immunize.k_max={k_max}.")
        self.templates = tuple(
            choice("immunize.templates", t, TEMPLATES) for t in names("immunize.templates", templates)
        )
        if not self.templates:
            raise UserError("immunize.templates", templates, f"needs at least one of {', '.join(TEMPLATES)}.")
        self.curriculum = number("immunize.curriculum", curriculum, 0, 1)

    def draw(self, progress: float, seed: int, *labels: object) -> Attack:
        """The attacker of the stream ``labels``. ``progress``: 0 at the first upper step, 1 after the last."""
        g = generator(seed, "mima", "attacker", *labels)
        u = torch.rand(6, generator=g, dtype=torch.float64).tolist()
        k_min = self.k_min
        if progress < self.curriculum:
            f = self.families[0]
            f = Family(
                f.kind, 1.0, f.scopes[:1], (f.ranks[0],) * 2, (f.lr[0], math.sqrt(f.lr[0] * f.lr[1])), f.optimizer
            )
            templates: tuple[str, ...] = ("captions",)
            k_min = max(k_min, self.k_max // 2)
        else:
            f, templates = self._family(u[0]), self.templates
        rank = f.ranks[0] + int(u[2] * (f.ranks[1] - f.ranks[0] + 1))
        return Attack(
            f.kind,
            f.scopes[int(u[1] * len(f.scopes))],
            rank if f.kind == "lora" else 0,
            f.lr[0] * (f.lr[1] / f.lr[0]) ** u[3],
            f.optimizer,
            templates[int(u[4] * len(templates))],
            k_min + int(u[5] * (self.k_max - k_min + 1)),
        )

    def _family(self, u: float) -> Family:
        left = u * sum(f.share for f in self.families)
        for f in self.families:
            if left < f.share:
                return f
            left -= f.share
        return self.families[-1]


class _Adapted:
    """Trainable leaves and the effective weights that they make."""

    def __init__(self, theta: Mapping[str, Tensor], moves: Sequence[str], attack: Attack, g: torch.Generator) -> None:
        self.lora = attack.kind == "lora"
        self.base = {n: theta[n].detach() for n in (matrices(theta, moves) if self.lora else moves)}
        self.leaves: list[Tensor] = []
        for w in self.base.values():
            if not self.lora:
                self.leaves.append(w.clone().requires_grad_())
                continue
            out, inside = w.shape[0], w[0].numel()
            a = torch.rand(attack.rank, inside, generator=g, dtype=torch.float64) * 2 - 1
            self.leaves.append((a / math.sqrt(inside)).to(w).requires_grad_())
            self.leaves.append(torch.zeros(out, attack.rank).to(w).requires_grad_())

    def weights(self) -> dict[str, Tensor]:
        if not self.lora:
            return dict(zip(self.base, self.leaves, strict=True))
        pairs = zip(self.leaves[::2], self.leaves[1::2], strict=True)
        return {n: w + (b @ a).view_as(w) for (n, w), (a, b) in zip(self.base.items(), pairs, strict=True)}


def marks(steps: int, fractions: Sequence[float]) -> tuple[int, ...]:
    """Step numbers at ``fractions`` of ``steps``, each at least 1, without repetition."""
    return tuple(sorted({max(1, round(fraction * steps)) for fraction in fractions}))


@dataclass(frozen=True)
class Mark:
    """After ``step`` steps: the weights that the attacker moved, and the loss of its first batch before and now
    (now: only at the last mark, NaN before)."""

    step: int
    weights: dict[str, Tensor]
    first: float
    now: float


def adapt(
    loss: Loss, theta: Mapping[str, Tensor], moves: Sequence[str], attack: Attack, pool: Pool, size: int,
    at: Sequence[int], seed: int, *labels: object,
) -> Iterator[Mark]:  # fmt: skip
    """Run ``attack`` from θ on batches of ``size`` of ``pool``; a `Mark` after each step number in ``at``.

    Args:
        loss: of a batch under named weights; names that are missing are those of θ.
        moves: names in the attacker's scope.

    Raises:
        FloatingPointError: the attacker's loss left the finite numbers; says at which step, and of which attacker.
    """
    pool = pool.template(attack.template)
    adapted = _Adapted(theta, moves, attack, generator(seed, "mima", "factors", *labels))
    optimizer: torch.optim.Optimizer
    if attack.optimizer == "sgd":
        optimizer = torch.optim.SGD(adapted.leaves, lr=attack.lr)
    else:
        # measured on the CPU at MiniSD's size: a quarter of the time of the unfused one, which costs a third of a step
        optimizer = torch.optim.AdamW(adapted.leaves, lr=attack.lr, weight_decay=0.0, fused=True)
    first = math.nan
    for step in range(1, at[-1] + 1):
        value = loss(pool.batch(size, seed, *labels, "lower", step - 1), adapted.weights())
        given = torch.autograd.grad(value, adapted.leaves)
        here = float(value.detach())
        if not math.isfinite(here):
            raise FloatingPointError(f"loss {here} in lower step {step} under {attack}")
        first = here if step == 1 else first
        for leaf, grad in zip(adapted.leaves, given, strict=True):
            leaf.grad = grad
        optimizer.step()
        if step in at:
            with torch.no_grad():
                weights = {n: w.detach().clone() for n, w in adapted.weights().items()}
                now = math.nan
                if step == at[-1]:
                    now = float(loss(pool.batch(size, seed, *labels, "lower", 0), weights))
            yield Mark(step, weights, first, now)
