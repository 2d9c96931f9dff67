"""The inner loop: what an attacker makes of the model in K steps, and the transpose of that; and
the families that attackers are drawn from, anew for every concept and step.

One recursion serves all inner optimizers. The inner variable φ is either a copy of the inner set
itself or LoRA factors, and the model sees ``place(θ, φ)``:

    m_{k+1} = β₁ m_k + (1 − β₁) ∇_φ ℓ_k(θ, φ_k)
    φ_{k+1} = φ_k − α (D_k m_{k+1} + w φ_k)

- ``sgd``: β₁ = w = 0, D_k = I.
- ``adamw`` (arXiv 1711.05101) from a zero state: D_k = diag(1/((√v̂_{k+1} + ε)(1 − β₁^{k+1}))),
  where v̂ is Adam's bias-corrected mean of squared gradients and w the weight decay. It is
  differentiated with every D_k frozen: without that one step is sign descent, whose Jacobian is 0
  almost everywhere. For K = 1 the transpose is v − αHDv − αwv with D = diag(1/(|∇ℓ| + ε)).
- a ``rank``: φ = (A, B), θ' = θ + BA per matrix of the inner set (other parameters of the set
  stay), A_0 ~ U(−1/√d, 1/√d) as peft draws, B_0 = 0. For K = 1 and ``sgd`` this is
  θ' = θ − α G A₀ᵀA₀ and the transpose v − α H(v A₀ᵀA₀).
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from torch import Tensor

from immunize.gradients import Params, compute_gradients, hessian_product, is_finite
from immunize.merge.build import Scope
from immunize.mima.sampling import WORDS, numbered
from lab.core.config import AsList, Count, Flag, NonNegative, Positive, config, options
from lab.core.errors import Diverged, UserError
from lab.core.seeding import generator

InnerLoss = Callable[[Params, int], Tensor]
BETAS = (0.9, 0.999)  # of adamw, PyTorch's defaults


@options
class InnerLoopOptions:
    """The attacker of the inner loop.

    Args:
        scope: Π_l. lr: α. steps: K. optimizer: ``sgd`` | ``adamw``.
        weight_decay: of ``adamw`` and of ``secondary_optimizer``. eps: ε of ``adamw``.
        rank: of LoRA factors (peft's lora_alpha = rank); null: the weights themselves.
        prior: add ``w_prior`` times the prior's loss to the inner loss (the released code does).
        secondary_optimizer: ``adamw``: with ``hypergradient.method=alternating``, the matrices of
            the cross-attention outside the inner scope follow the inner losses too, by AdamW at α
            (the released code does).
    """

    scope: Scope = "attn2"
    lr: Positive = 10.0
    steps: Count = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: NonNegative = 0.0
    eps: Positive = 1e-8
    rank: Count | None = None
    prior: Flag = False
    secondary_optimizer: Literal["none", "adamw"] = "none"

    @property
    def decay(self) -> float:
        return self.weight_decay if self.optimizer == "adamw" else 0.0


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
        families = list(self.families.values())
        ends = list(itertools.accumulate(family.share for family in families))
        f = families[bisect.bisect(ends, u[0] * ends[-1])]
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


def draw_factors(w: Tensor, rank: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return LoRA factors of a weight seen as a matrix [out, d]: A ~ U(−1/√d, 1/√d), as peft
    draws, and B = 0.
    """
    out, d = w.flatten(1).shape
    a = torch.rand(rank, d, generator=g, dtype=torch.float64) * 2 - 1
    return (a / math.sqrt(d)).to(w), w.new_zeros(out, rank)


@dataclass
class Trace:
    """What the transpose needs of an inner loop: φ_0 … φ_{K−1} and D_0 … D_{K−1} (empty dicts for
    ``sgd``).
    """

    loss: float  # ℓ_0 before the first step
    final: Params  # φ_K
    states: list[Params] = field(default_factory=list)
    preconditioners: list[Params] = field(default_factory=list)


class InnerLoop:
    """The inner loop of one concept.

    Args:
        settings: the attacker.
        theta: θ, all names that move in either loop.
        names: the inner set.
        loss: ``loss(params, k)``: loss on the k-th inner batch, always the same one for the same k.
        n: number of the concept (its own A₀). seed: of A₀.
        rho: weight ρ of the proximal term (ρ/2)‖φ − θ‖² (`immunize.mima.hypergradient`), whose
            steps all see batch 0; 0 for none.
    """

    def __init__(
        self,
        settings: InnerLoopOptions,
        theta: Params,
        names: Sequence[str],
        loss: InnerLoss,
        n: int,
        *,
        seed: int = 0,
        rho: float = 0.0,
    ) -> None:
        self.settings, self.theta, self.loss, self.n = settings, theta, loss, n
        self.seed, self.rho = seed, rho
        self.names = [x for x in names if settings.rank is None or theta[x].dim() == 2]
        if not self.names:
            reason = "selects no parameter; LoRA factors need a matrix in it."
            raise UserError("immunize.inner_loop.scope", settings.scope, reason)

    # φ

    def initial(self) -> Params:
        """Return φ_0: the inner set of θ, or (A₀, 0)."""
        rank = self.settings.rank
        if rank is None:
            return {name: self.theta[name] for name in self.names}
        factors: Params = {}
        for name in self.names:
            a, b = draw_factors(self.theta[name], rank, generator(self.seed, "lora", self.n, name))
            factors |= {f"{name}/A": a, f"{name}/B": b}
        return factors

    def place(self, theta: Params, phi: Params) -> Params:
        """Return what the model sees."""
        if self.settings.rank is None:
            return {**theta, **phi}
        return {**theta, **{x: theta[x] + phi[f"{x}/B"] @ phi[f"{x}/A"] for x in self.names}}

    def objective(self, k: int, theta: Params, phi: Params) -> Tensor:
        """Return ℓ_k(θ, φ); names that ``theta`` leaves out are constants."""
        return self.loss(self.place({**self.theta, **theta}, phi), k)

    def adapted(self, phi: Params) -> Params:
        """Return θ'_n, thin: the parameters that moved."""
        placed = self.place(self.theta, phi)
        return {name: placed[name] for name in self.names}

    # forwards

    def run(self, *, keep: bool) -> Trace:
        """Take K steps from φ_0; ``keep`` the iterates and preconditioners for the transpose.

        Raises:
            Diverged: a loss or gradient is not finite; carries the last good step.
        """
        s, phi, (b1, b2) = self.settings, self.initial(), BETAS
        m = {x: torch.zeros_like(y) for x, y in phi.items() if s.optimizer == "adamw"}
        square = dict(m)
        trace = Trace(float("nan"), phi)
        for k in range(s.steps):
            batch = 0 if self.rho else k
            loss, gradient = compute_gradients(partial(self.objective, batch, self.theta), phi)
            if not is_finite([loss, *gradient.values()]):
                message = f"the inner loop of concept {self.n} is not finite at step {k}"
                raise Diverged(message, max(k - 1, 0))
            if k == 0:
                trace.loss = float(loss)
            if self.rho:
                gradient = {x: g + self.rho * (phi[x] - self.theta[x]) for x, g in gradient.items()}
            d: Params = {}
            moves = gradient
            if s.optimizer == "adamw":
                for x, g in gradient.items():
                    square[x] = b2 * square[x] + (1 - b2) * g.square()
                    root = (square[x] / (1 - b2 ** (k + 1))).sqrt() + s.eps
                    d[x] = 1 / (root * (1 - b1 ** (k + 1)))
                    m[x] = b1 * m[x] + (1 - b1) * g
                moves = {x: d[x] * m[x] for x in d}
            if keep:
                trace.states.append(phi)
                trace.preconditioners.append(d)
            phi = {
                x: phi[x] - s.lr * (move + s.decay * phi[x] if s.decay else move)
                for x, move in moves.items()
            }
        trace.final = phi
        return trace

    # backwards

    def enter(self, v: Params, phi: Params) -> tuple[Params, Params]:
        """Return ∂⟨v, place(θ, φ)⟩ by (θ, φ)."""
        if self.settings.rank is None:
            return {x: y for x, y in v.items() if x not in phi}, {x: v[x] for x in phi}
        a: Params = {}
        for x in self.names:
            a[f"{x}/A"] = phi[f"{x}/B"].T @ v[x]
            a[f"{x}/B"] = v[x] @ phi[f"{x}/A"].T
        return dict(v), a

    def leave(self, outer: Params, a: Params, names: Sequence[str]) -> Params:
        """Return the transpose's result by θ, restricted to ``names``: φ_0 is a copy of θ, or a
        constant (LoRA).
        """
        both = {**outer, **a} if self.settings.rank is None else outer
        return {x: both[x] for x in names}

    def pull(self, trace: Trace, v: Params, names: Sequence[str], *, last: int) -> Params:
        """Return J_nᵀ v restricted to ``names``, by the recursion run backwards over the ``last``
        steps.

        Steps before them count as a constant displacement (truncated backpropagation, arXiv
        1810.10667).

        Args:
            trace: of `run(keep=True)`.
            v: by θ'_n, all names of θ.
        """
        s = self.settings
        outer, a = self.enter(v, trace.final)
        b = {x: torch.zeros_like(y) for x, y in a.items()}
        momentum = BETAS[0] if s.optimizer == "adamw" else 0.0
        gain = 1 - momentum if momentum else -s.lr
        wide = {x: self.theta[x] for x in names if x in outer}
        for k in reversed(range(max(s.steps - last, 0), s.steps)):
            d = trace.preconditioners[k]
            b = {x: b[x] - s.lr * (d[x] * a[x]) for x in a} if momentum else a
            # of φ_0 only what `leave` returns is needed
            wanted = [x for x in a if k > 0 or (s.rank is None and x in names)]
            by_theta, by_phi = hessian_product(
                partial(self.objective, k), wide, trace.states[k], b, wanted
            )
            for x, h in by_theta.items():
                outer[x] = outer[x] + gain * h
            if s.decay:
                a = {x: (1 - s.lr * s.decay) * y for x, y in a.items()}
            a = {x: y + gain * by_phi[x] if x in by_phi else y for x, y in a.items()}
            b = {x: momentum * y for x, y in b.items()}
        return self.leave(outer, a, names)
