"""The lower level: what an attacker makes of the model in K steps, and the transpose of that.

One recursion serves all lower optimizers. The lower variable φ is either a copy of the lower set
itself or LoRA factors, and the model sees ``place(θ, φ)``:

    m_{k+1} = β₁ m_k + (1 − β₁) ∇_φ ℓ_k(θ, φ_k)
    φ_{k+1} = φ_k − α (D_k m_{k+1} + w φ_k)

- ``sgd``: β₁ = w = 0, D_k = I.
- ``adamw`` (arXiv 1711.05101) from a zero state: D_k = diag(1/((√v̂_{k+1} + ε)(1 − β₁^{k+1}))),
  where v̂ is Adam's bias-corrected mean of squared gradients and w the weight decay. It is
  differentiated with every D_k frozen: without that one step is sign descent, whose Jacobian is 0
  almost everywhere. For K = 1 the transpose is v − αHDv − αwv with D = diag(1/(|∇ℓ| + ε)).
- an `Adapter`: φ = (A, B), θ' = θ + BA per matrix of the lower set (other parameters of the set
  stay), B_0 = 0. For K = 1 and ``sgd`` this is θ' = θ − α G A₀ᵀA₀ and the transpose v − α H(v
  A₀ᵀA₀).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from immunize.merge.closed_form import Params
from immunize.mima.products import Product, finite, gradients, product
from lab.core.errors import Diverged, UserError
from lab.core.options import choice, count, number
from lab.core.seeding import generator

LowerLoss = Callable[[Params, int], Tensor]


@dataclass(frozen=True)
class Adapter:
    """LoRA factors: ``rank`` r (peft's lora_alpha = r), ``seed`` of A₀ ~ U(−1/√d, 1/√d), as peft
    draws.
    """

    rank: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        count("immunize.inner_loop.rank", self.rank)


@dataclass(frozen=True)
class Lower:
    """K steps of an attacker.

    Attributes:
        lr: α > 0, learning rate.
        steps: K ≥ 1.
        optimizer: ``sgd`` | ``adamw``.
        adapter: None moves the lower set itself, an `Adapter` its LoRA factors.
        betas, eps, weight_decay: of ``adamw`` (PyTorch's defaults).

    Raises:
        UserError: α ≤ 0, K = 0 and other values outside their range.
    """

    lr: float
    steps: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    adapter: Adapter | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        number("immunize.inner_loop.lr", self.lr, above=0)
        count("immunize.inner_loop.steps", self.steps)
        choice("immunize.inner_loop.optimizer", self.optimizer, ("sgd", "adamw"))
        for decay in self.betas:
            number("immunize.inner_loop.betas", decay, 0, below=1)
        number("immunize.inner_loop.eps", self.eps, above=0)
        number("immunize.inner_loop.weight_decay", self.weight_decay, 0)

    @property
    def momentum(self) -> float:
        return self.betas[0] if self.optimizer == "adamw" else 0.0

    @property
    def decay(self) -> float:
        return self.weight_decay if self.optimizer == "adamw" else 0.0


@dataclass
class Trace:
    """What the transpose needs of a lower run: φ_0 … φ_{K−1} and D_0 … D_{K−1} (empty dicts for
    ``sgd``).
    """

    loss: float  # ℓ_0 before the first step
    final: Params  # φ_K
    states: list[Params] = field(default_factory=list)
    preconditioners: list[Params] = field(default_factory=list)


class LowerLevel:
    """The lower level of one concept.

    Args:
        settings: the attacker.
        theta: θ, all names that move on either level.
        names: the lower set.
        loss: ``loss(params, k)``: loss on the k-th inner batch, always the same one for the same k.
        n: number of the concept (its own A₀).
        rho: weight ρ of the proximal term (ρ/2)‖φ − θ‖² (`implicit`), whose steps all see batch 0;
            0 for none.
    """

    def __init__(
        self,
        settings: Lower,
        theta: Params,
        names: Sequence[str],
        loss: LowerLoss,
        n: int,
        rho: float = 0.0,
    ) -> None:
        self.settings, self.theta, self.loss, self.n, self.rho = settings, theta, loss, n, rho
        adapter = settings.adapter
        self.names = [x for x in names if adapter is None or theta[x].dim() == 2]
        if not self.names:
            raise UserError(
                "immunize.inner_loop",
                list(names),
                "the lower set is empty; LoRA factors need a matrix in it.",
            )

    # φ

    def initial(self) -> Params:
        """φ_0: the lower set of θ, or (A₀, 0)."""
        adapter = self.settings.adapter
        if adapter is None:
            return {name: self.theta[name] for name in self.names}
        found: Params = {}
        for name in self.names:
            out, d = self.theta[name].shape
            g = generator(adapter.seed, "lora", self.n, name)
            down = (torch.rand(adapter.rank, d, generator=g, dtype=torch.float64) * 2 - 1) / d**0.5
            found[f"{name}/A"] = down.to(self.theta[name])
            found[f"{name}/B"] = self.theta[name].new_zeros(out, adapter.rank)
        return found

    def place(self, theta: Params, phi: Params) -> Params:
        """What the model sees."""
        adapter = self.settings.adapter
        if adapter is None:
            return {**theta, **phi}
        return {**theta, **{x: theta[x] + phi[f"{x}/B"] @ phi[f"{x}/A"] for x in self.names}}

    def objective(self, k: int, theta: Params, phi: Params) -> Tensor:
        """ℓ_k(θ, φ); names that ``theta`` leaves out are constants."""
        return self.loss(self.place({**self.theta, **theta}, phi), k)

    def adapted(self, phi: Params) -> Params:
        """θ'_n, thin: the parameters that moved."""
        placed = self.place(self.theta, phi)
        return {name: placed[name] for name in self.names}

    # forwards

    def run(self, *, keep: bool) -> Trace:
        """K steps from φ_0; ``keep`` the iterates and preconditioners for the transpose.

        Raises:
            Diverged: a loss or gradient is not finite; carries the last good step.
        """
        s = self.settings
        phi = self.initial()
        m = {k: torch.zeros_like(x) for k, x in phi.items()} if s.momentum else {}
        square = {k: torch.zeros_like(x) for k, x in phi.items()} if s.optimizer == "adamw" else {}
        trace = Trace(float("nan"), phi)
        for k in range(s.steps):
            batch = 0 if self.rho else k
            loss, gradient = gradients(partial(self.objective, batch, self.theta), phi)
            if not finite([loss, *gradient.values()]):
                raise Diverged(
                    f"the lower level of concept {self.n} is not finite at step {k}", max(k - 1, 0)
                )
            if k == 0:
                trace.loss = float(loss)
            if self.rho:
                gradient = {x: g + self.rho * (phi[x] - self.theta[x]) for x, g in gradient.items()}
            d: Params = {}
            if s.optimizer == "adamw":
                b1, b2 = s.betas
                for x, g in gradient.items():
                    square[x] = b2 * square[x] + (1 - b2) * g.square()
                    root = (square[x] / (1 - b2 ** (k + 1))).sqrt() + s.eps
                    d[x] = 1 / (root * (1 - b1 ** (k + 1)))
            if keep:
                trace.states.append(phi)
                trace.preconditioners.append(d)
            m = (
                {x: s.momentum * m[x] + (1 - s.momentum) * g for x, g in gradient.items()}
                if m
                else gradient
            )
            phi = {x: self._step(phi[x], m[x], d.get(x)) for x in phi}
        trace.final = phi
        return trace

    def _step(self, phi: Tensor, m: Tensor, d: Tensor | None) -> Tensor:
        s = self.settings
        move = m if d is None else d * m
        return phi - s.lr * (move + s.decay * phi if s.decay else move)

    def loss_at(self, phi: Params, k: int = 0) -> float:
        """ℓ_k at ``phi``, without gradient."""
        with torch.no_grad():
            return float(self.objective(k, {}, phi))

    # backwards

    def enter(self, v: Params, phi: Params) -> tuple[Params, Params]:
        """∂⟨v, place(θ, φ)⟩ by (θ, φ)."""
        adapter = self.settings.adapter
        if adapter is None:
            return {x: y for x, y in v.items() if x not in phi}, {x: v[x] for x in phi}
        a: Params = {}
        for x in self.names:
            a[f"{x}/A"] = phi[f"{x}/B"].T @ v[x]
            a[f"{x}/B"] = v[x] @ phi[f"{x}/A"].T
        return dict(v), a

    def leave(self, outer: Params, a: Params, names: Sequence[str]) -> Params:
        """The transpose's result by θ, restricted to ``names``: φ_0 is a copy of θ, or a constant
        (LoRA).
        """
        both = {**outer, **a} if self.settings.adapter is None else outer
        return {x: both[x] for x in names}

    def pull(
        self, trace: Trace, v: Params, names: Sequence[str], *, last: int, how: Product
    ) -> Params:
        """J_nᵀ v restricted to ``names``, by the recursion run backwards over the ``last`` steps.

        Steps before them count as a constant displacement (truncated backpropagation, arXiv
        1810.10667).

        Args:
            trace: of `run(keep=True)`.
            v: by θ'_n, all names of θ.
        """
        s = self.settings
        outer, a = self.enter(v, trace.final)
        b = {x: torch.zeros_like(y) for x, y in a.items()}
        for k in reversed(range(max(s.steps - last, 0), s.steps)):
            d = trace.preconditioners[k]
            b = {x: b[x] - s.lr * (d[x] * a[x] if d else a[x]) for x in a} if s.momentum else a
            gain = 1 - s.momentum if s.momentum else -s.lr
            direction = b if s.momentum or not d else {x: d[x] * y for x, y in b.items()}
            first = k == 0  # then only what `leave` returns is needed
            want = [x for x in a if not first or (s.adapter is None and x in names)]
            wide = [x for x in names if x in outer]
            by_theta, by_phi = product(
                partial(self.objective, k),
                {x: self.theta[x] for x in wide},
                trace.states[k],
                direction,
                want,
                how,
            )
            for x, h in by_theta.items():
                outer[x] = outer[x] + gain * h
            keep = 1 - s.lr * s.decay
            a = {
                x: (keep * y if s.decay else y) + (gain * by_phi[x] if x in by_phi else 0)
                for x, y in a.items()
            }
            b = {x: s.momentum * y for x, y in b.items()} if s.momentum else b
        return self.leave(outer, a, names)
