"""The deep lower level: an attacker, drawn anew for every concept and step, fine-tunes a copy of
the weights.

Attackers keep no adapters: a low-rank one is the *effective* weight W + s·BA (LoRA, arXiv
2106.09685; A uniform in ±1/√in, B = 0 as in peft), so that whatever an attacker moves is comparable
with θ and can be merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from immunize.mima.sampling import WORDS, Batch, Pool, worded
from immunize.mima.scopes import SCOPES, matrices
from lab.core.captions import TEMPLATES
from lab.core.errors import UserError
from lab.core.optimizer_state import restore_state, state_tensors
from lab.core.options import choice, count, names, number
from lab.core.seeding import generator

Loss = Callable[[Batch, Mapping[str, Tensor]], Tensor]
_FIELDS = ("kind", "share", "scopes", "ranks", "lr", "optimizer", "templates", "words")


@dataclass(frozen=True)
class Attack:
    """One drawn attacker.

    Attributes:
        kind: ``lora`` or ``weights``. scope: what it moves. rank: of LoRA, 0 otherwise. lr: its
            learning rate.
        optimizer: ``adamw`` (no weight decay) or ``sgd``. template: which captions it trains on,
            with the number of the rare word (`immunize.mima.sampling.worded`).
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
    """Attackers of one kind. ``share``: how often, relative to the others; ``ranks`` and ``lr``:
    smallest and largest, drawn uniformly and log-uniformly; ``scopes`` and ``templates`` (of
    `lab.core.captions.TEMPLATES`, the captions that the attacker writes) are equally likely, one
    that stands twice twice as often; by ``token`` it writes one of ``words`` rare words, equally
    likely too.
    """

    kind: str
    share: float
    scopes: tuple[str, ...]
    ranks: tuple[int, int]
    lr: tuple[float, float]
    optimizer: str
    templates: tuple[str, ...] = ("name",)
    words: int = 1

    @property
    def written(self) -> tuple[str, ...]:
        """The templates, ``token`` once for each of its words."""
        words = {
            template: range(self.words if template == "token" else 1) for template in self.templates
        }
        return tuple(
            worded(template, word) for template, numbers in words.items() for word in numbers
        )


def _range(key: str, value: Any) -> list[Any]:
    pair = (
        list(value)
        if isinstance(value, Sequence) and not isinstance(value, str)
        else [value, value]
    )
    if len(pair) != 2:
        raise UserError(key, value, "must be one number or [smallest, largest].")
    return pair


def family(key: str, given: Any) -> Family:
    """A family from its options; ``key`` is its config key.

    Raises:
        UserError: unknown options, scopes or templates, learning rates ≤ 0, ranks < 1, a range that
            is the wrong way round, more words than there are.
    """
    if not isinstance(given, Mapping):
        raise UserError(key, given, f"must be a group with {', '.join(_FIELDS)}.")
    for name in given:
        choice(f"{key}.{name}", name, _FIELDS)
    kind = choice(f"{key}.kind", given.get("kind", "lora"), ("lora", "weights"))
    scopes = tuple(
        choice(f"{key}.scopes", s, SCOPES)
        for s in names(f"{key}.scopes", given.get("scopes", "attn2"))
    )
    ranks = [count(f"{key}.ranks", r) for r in _range(f"{key}.ranks", given.get("ranks", 4))]
    lr = [number(f"{key}.lr", r, above=0) for r in _range(f"{key}.lr", given.get("lr"))]
    for name, pair in (("ranks", ranks), ("lr", lr)):
        if pair[0] > pair[1]:
            raise UserError(f"{key}.{name}", pair, "must be [smallest, largest].")
    if not scopes:
        raise UserError(f"{key}.scopes", scopes, f"needs at least one of {', '.join(SCOPES)}.")
    asked = names(f"{key}.templates", given.get("templates", "name"))
    templates = tuple(choice(f"{key}.templates", t, TEMPLATES) for t in asked)
    if not templates:
        raise UserError(
            f"{key}.templates", templates, f"needs at least one of {', '.join(TEMPLATES)}."
        )
    optimizer = choice(f"{key}.optimizer", given.get("optimizer", "adamw"), ("adamw", "sgd"))
    share = number(f"{key}.share", given.get("share", 1.0), 0)
    words = count(f"{key}.words", given.get("words", 1))
    if words > len(WORDS):
        raise UserError(f"{key}.words", words, f"there are {len(WORDS)} rare words.")
    return Family(
        kind, share, scopes, (ranks[0], ranks[1]), (lr[0], lr[1]), optimizer, templates, words
    )


class Attackers:
    """Draws attackers.

    Args:
        families: name → options, see `family`.
        k_min, k_max: K is uniform between them.
    """

    families: dict[str, Family]  # config key → family, those with a share

    def __init__(self, families: Any, k_min: int, k_max: int) -> None:
        if not isinstance(families, Mapping):
            raise UserError("immunize.attackers", families, "must be a group of attackers.")
        # null takes a family out of a preset
        given = {str(name): options for name, options in families.items() if options is not None}
        found = {
            (key := f"immunize.attackers.{name}"): family(key, options)
            for name, options in given.items()
        }
        self.families = {key: f for key, f in found.items() if f.share > 0}
        if not self.families:
            raise UserError(
                "immunize.attackers", list(given), "needs at least one attacker with share > 0."
            )
        self.k_min, self.k_max = count("immunize.k_min", k_min), count("immunize.k_max", k_max)
        if k_min > k_max:
            raise UserError("immunize.k_min", k_min, f"must be at most immunize.k_max={k_max}.")

    @property
    def templates(self) -> tuple[str, ...]:
        """All that any family writes."""
        return tuple(
            dict.fromkeys(template for f in self.families.values() for template in f.written)
        )

    def draw(self, seed: int, *labels: object) -> Attack:
        """The attacker of the stream ``labels``."""
        g = generator(seed, "mima", "attacker", *labels)
        u = torch.rand(7, generator=g, dtype=torch.float64).tolist()
        f = self._family(u[0])
        rank = f.ranks[0] + int(u[2] * (f.ranks[1] - f.ranks[0] + 1))
        return Attack(
            f.kind,
            f.scopes[int(u[1] * len(f.scopes))],
            rank if f.kind == "lora" else 0,
            f.lr[0] * (f.lr[1] / f.lr[0]) ** u[3],
            f.optimizer,
            worded(f.templates[int(u[4] * len(f.templates))], int(u[6] * f.words)),
            self.k_min + int(u[5] * (self.k_max - self.k_min + 1)),
        )

    def _family(self, u: float) -> Family:
        left = u * sum(f.share for f in self.families.values())
        for f in self.families.values():
            if left < f.share:
                return f
            left -= f.share
        return f


class _Adapted:
    """Trainable leaves and the effective weights that they make. θ may move in between, see
    `follow`.
    """

    def __init__(
        self, theta: Mapping[str, Tensor], moves: Sequence[str], attack: Attack, g: torch.Generator
    ) -> None:
        self.lora = attack.kind == "lora"
        self.base = {n: theta[n].detach() for n in (matrices(theta, moves) if self.lora else moves)}
        self.leaves: list[Tensor] = []
        self.seen: list[Tensor] = []  # θ as the leaves know it; low-rank factors add to θ itself
        for w in self.base.values():
            if not self.lora:
                self.leaves.append(w.clone().requires_grad_())
                self.seen.append(w.clone())
                continue
            out, inside = w.shape[0], w[0].numel()
            a = torch.rand(attack.rank, inside, generator=g, dtype=torch.float64) * 2 - 1
            self.leaves.append((a / math.sqrt(inside)).to(w).requires_grad_())
            self.leaves.append(torch.zeros(out, attack.rank).to(w).requires_grad_())

    def follow(self) -> None:
        """Keep what the attack has added to θ while θ moves."""
        with torch.no_grad():
            for leaf, seen, w in zip(self.leaves, self.seen, self.base.values(), strict=False):
                leaf.add_(w - seen)
                seen.copy_(w)

    def weights(self) -> dict[str, Tensor]:
        if not self.lora:
            return dict(zip(self.base, self.leaves, strict=True))
        pairs = zip(self.leaves[::2], self.leaves[1::2], strict=True)
        return {
            n: w + (b @ a).view_as(w)
            for (n, w), (a, b) in zip(self.base.items(), pairs, strict=True)
        }


def marks(steps: int, fractions: Sequence[float]) -> tuple[int, ...]:
    """Step numbers at ``fractions`` of ``steps``, each at least 1, without repetition."""
    return tuple(sorted({max(1, round(fraction * steps)) for fraction in fractions}))


@dataclass(frozen=True)
class Snapshot:
    """After ``step`` steps: the weights that the attacker moved, and the loss of its first batch
    before and now (now: only after its last step, NaN before).
    """

    step: int
    weights: dict[str, Tensor]
    first: float
    now: float


class Running:
    """An attack in progress on batches of ``size`` of ``pool``, from θ on.

    Args:
        loss: of a batch under named weights; names that are missing are those of θ.
        theta: read at every step: where it moves in between, the attack stays added to it.
        moves: names in the attacker's scope.
        labels: of its stream of random numbers.
    """

    def __init__(
        self,
        loss: Loss,
        theta: Mapping[str, Tensor],
        moves: Sequence[str],
        attack: Attack,
        pool: Pool,
        size: int,
        seed: int,
        *labels: object,
    ) -> None:
        self.loss, self.attack, self.size, self.seed, self.labels = loss, attack, size, seed, labels
        self.pool = pool.template(attack.template)
        self.adapted = _Adapted(theta, moves, attack, generator(seed, "mima", "factors", *labels))
        self.optimizer: torch.optim.Optimizer
        if attack.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.adapted.leaves, lr=attack.lr)
        else:
            # measured on the CPU at MiniSD's size: a quarter of the time of the unfused one, a
            # third of a step
            self.optimizer = torch.optim.AdamW(
                self.adapted.leaves, lr=attack.lr, weight_decay=0.0, fused=True
            )
        self.step, self.first = 0, math.nan

    def _batch(self, step: int) -> Batch:
        return self.pool.batch(self.size, self.seed, *self.labels, "lower", step)

    def advance(self, until: int) -> Snapshot:
        """Steps up to number ``until``.

        Raises:
            FloatingPointError: the loss left the finite numbers; says at which step, and of which
                attacker.
        """
        self.adapted.follow()
        while self.step < until:
            value = self.loss(self._batch(self.step), self.adapted.weights())
            given = torch.autograd.grad(value, self.adapted.leaves)
            here = float(value.detach())
            self.step += 1
            if not math.isfinite(here):
                raise FloatingPointError(
                    f"loss {here} in lower step {self.step} under {self.attack}"
                )
            self.first = here if self.step == 1 else self.first
            for leaf, grad in zip(self.adapted.leaves, given, strict=True):
                leaf.grad = grad
            self.optimizer.step()
        with torch.no_grad():
            weights = {n: w.detach().clone() for n, w in self.adapted.weights().items()}
            last = self.step == self.attack.steps
            now = float(self.loss(self._batch(0), weights)) if last else math.nan
        return Snapshot(self.step, weights, self.first, now)

    def state(self) -> dict[str, Tensor]:
        """All that a resumed attack needs besides θ, the attack and its labels."""
        found = state_tensors(self.adapted.leaves, self.optimizer)
        found |= {f"seen.{i}": w for i, w in enumerate(self.adapted.seen)}
        found["progress"] = torch.tensor([float(self.step), self.first], dtype=torch.float64)
        return {key: value.detach().clone() for key, value in found.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        restore_state(self.adapted.leaves, self.optimizer, state)
        for i, tensor in enumerate(self.adapted.seen):
            tensor.copy_(state[f"seen.{i}"])
        self.step, self.first = int(state["progress"][0]), float(state["progress"][1])
