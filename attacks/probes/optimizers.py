"""Optimizers of a linear probe. Each is built once for a problem; `step` is a pure function of its
arguments.

State is a dict of tensors, so that an attack can be saved and continued. No optimizer decomposes a
matrix of the size of the features in a step: `Whitening`, `Newton` and `KFAC` use the singular
vectors that the problem has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.probes.problem import Problem, Squared, softmax_curvature

State = dict[str, Tensor]
_HISTORY = 10  # pairs that L-BFGS keeps (torch.optim.LBFGS keeps 100, scipy 10)
_MOMENTUM = 0.9
_BETAS = (0.9, 0.999)
_CG_STEPS = 20
# a gradient this small beside the first is rounding: line searches stop, rather than follow it
_ROUNDING = 1e-14


@dataclass(frozen=True)
class Settings:
    """``damping`` is of `KFAC`; ``tolerance`` of `Whitening` and `Newton`: relative singular value,
    None = rank.
    """

    damping: float = 1e-3
    tolerance: float | None = None


class Optimizer:
    """Base: ``uses_rate`` optimizers take a learning rate and mini-batches, the others a line
    search over all rows.
    """

    uses_rate: ClassVar[bool] = False
    gram: ClassVar[bool] = True  # ZᵀZ may stand in for Z; not where small eigenvalues matter
    uses: ClassVar[frozenset[str]] = frozenset()  # names of `Settings` that it reads

    def __init__(self, problem: Problem, settings: Settings) -> None:
        self.problem = problem
        self.first = float(problem.gradient(problem.start()).norm())

    def init(self, w: Tensor) -> State:
        """State before the first step."""
        return {}

    def step(
        self, w: Tensor, state: State, rate: float, rows: Tensor | None
    ) -> tuple[Tensor, State]:
        """One update of ``w`` [d, c]: new weights and new state."""
        g = self.problem.gradient(w)
        if float(g.norm()) <= _ROUNDING * self.first:
            return w, state
        p, state = self.direction(w, g, state)
        return w + self.problem.line_minimum(w, g, p) * p, state

    def direction(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        """Where the line search goes."""
        raise NotImplementedError  # abstract: each line-search method below has its own


class GradientDescent(Optimizer):
    """Steepest descent with exact line search: the attacker of the theory (arXiv 2505.23760)."""

    def direction(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        return -g, state


class SGD(Optimizer):
    """w ← w − η g on a mini-batch."""

    uses_rate = True

    def step(
        self, w: Tensor, state: State, rate: float, rows: Tensor | None
    ) -> tuple[Tensor, State]:
        return w - rate * self.problem.gradient(w, rows), state


class Momentum(Optimizer):
    """Heavy ball as in torch: v ← 0.9 v + g, w ← w − η v."""

    uses_rate = True

    def init(self, w: Tensor) -> State:
        return {"velocity": torch.zeros_like(w)}

    def step(
        self, w: Tensor, state: State, rate: float, rows: Tensor | None
    ) -> tuple[Tensor, State]:
        velocity = _MOMENTUM * state["velocity"] + self.problem.gradient(w, rows)
        return w - rate * velocity, {"velocity": velocity}


class Adam(Optimizer):
    """Adam (arXiv 1412.6980) with the defaults of torch: β = (0.9, 0.999), ε = 1e-8."""

    uses_rate = True

    def init(self, w: Tensor) -> State:
        zero = torch.zeros_like(w)
        return {"first": zero, "second": zero.clone(), "count": torch.zeros(1, dtype=torch.float64)}

    def step(
        self, w: Tensor, state: State, rate: float, rows: Tensor | None
    ) -> tuple[Tensor, State]:
        g, (a, b) = self.problem.gradient(w, rows), _BETAS
        first = a * state["first"] + (1 - a) * g
        second = b * state["second"] + (1 - b) * g.square()
        count = state["count"] + 1
        k = float(count)
        scale = rate / (1 - a**k)
        w = w - scale * first / (second.sqrt() / math.sqrt(1 - b**k) + 1e-8)
        return w, {"first": first, "second": second, "count": count}


class Adagrad(Optimizer):
    """Adagrad with the defaults of torch: a ← a + g², w ← w − η g/(√a + 1e-10)."""

    uses_rate = True

    def init(self, w: Tensor) -> State:
        return {"sum": torch.zeros_like(w)}

    def step(
        self, w: Tensor, state: State, rate: float, rows: Tensor | None
    ) -> tuple[Tensor, State]:
        g = self.problem.gradient(w, rows)
        total = state["sum"] + g.square()
        return w - rate * g / (total.sqrt() + 1e-10), {"sum": total}


class LBFGS(Optimizer):
    """L-BFGS with ten pairs and exact line search (on a quadratic: the iterates of conjugate
    gradients).
    """

    def init(self, w: Tensor) -> State:
        empty = w.new_zeros((0, *w.shape))
        return {
            "s": empty,
            "y": empty.clone(),
            "w": w.new_zeros((0, *w.shape)),
            "g": w.new_zeros((0, *w.shape)),
        }

    def direction(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        s, y = state["s"], state["y"]
        if len(state["w"]):
            move, change = w - state["w"][0], g - state["g"][0]
            if float((move * change).sum()) > 1e-14 * float(move.norm() * change.norm()):
                s = torch.cat([s, move[None]])[-_HISTORY:]
                y = torch.cat([y, change[None]])[-_HISTORY:]
        state = {"s": s, "y": y, "w": w[None].clone(), "g": g[None].clone()}
        return -_two_loop(g, s, y), state


def _two_loop(g: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """Inverse-Hessian product of L-BFGS (Nocedal & Wright, Algorithm 7.4); s, y [k, d, c], oldest
    first.
    """
    q, alphas = g.clone(), []
    for i in reversed(range(len(s))):
        alpha = float((s[i] * q).sum()) / float((s[i] * y[i]).sum())
        alphas.append(alpha)
        q = q - alpha * y[i]
    if len(s):
        q = q * (float((s[-1] * y[-1]).sum()) / float(y[-1].square().sum()))
    for i, alpha in zip(range(len(s)), reversed(alphas), strict=True):
        q = q + (alpha - float((y[i] * q).sum()) / float((s[i] * y[i]).sum())) * s[i]
    return q


class Whitening(Optimizer):
    """Gradient descent with exact line search on whitened features Z V diag(√n/s), written in the
    coordinates of w.

    Directions below the tolerance are dropped. With squared loss and no ridge one step reaches the
    optimum.
    """

    gram = False
    uses = frozenset({"tolerance"})

    def __init__(self, problem: Problem, settings: Settings) -> None:
        super().__init__(problem, settings)
        f = problem.spectrum.cut(settings.tolerance)
        self.map = f.v * (math.sqrt(problem.n) / f.s)

    def direction(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        return -self.map @ (self.map.T @ g), state


class Newton(Optimizer):
    """Newton with exact line search. Squared loss: one step, by the pseudo-inverse of the Hessian.

    Cross entropy: the (d·c)² Hessian is not formed. The Newton system is solved by at most 20
    conjugate gradients in the coordinates in which ZᵀZ/n + λI is the identity; their number then
    depends on the class probabilities, not on the conditioning of the features (inexact Newton,
    tolerance min(0.1, √(‖g‖/‖g_0‖))).
    """

    gram = False
    uses = frozenset({"tolerance"})

    def __init__(self, problem: Problem, settings: Settings) -> None:
        super().__init__(problem, settings)
        f = problem.spectrum.cut(settings.tolerance)
        self.scale = 1 / (f.s**2 / problem.n + problem.ridge).sqrt()
        self.map = f.v * self.scale
        self.white = None if isinstance(problem, Squared) else f.u * (f.s * self.scale)

    def init(self, w: Tensor) -> State:
        first = float((self.map.T @ self.problem.gradient(w)).norm())
        return {"first": torch.tensor([first], dtype=torch.float64)}

    def direction(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        b = -(self.map.T @ g)
        if self.white is None:
            return self.map @ b, state
        white, n, penalty = (
            self.white,
            self.problem.n,
            self.problem.ridge * self.scale.square()[:, None],
        )
        prob = torch.softmax(self.problem.z @ w, 1)

        def product(q: Tensor) -> Tensor:
            return white.T @ softmax_curvature(prob, white @ q) / n + penalty * q

        start = max(float(state["first"]), torch.finfo(torch.float64).tiny)
        return self.map @ _conjugate_gradients(
            product, b, min(0.1, math.sqrt(float(b.norm()) / start))
        ), state


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, tolerance: float
) -> Tensor:
    """Solves product(x) = b to a relative residual of ``tolerance``, or as far as 20 steps lead."""
    x, r = torch.zeros_like(b), b.clone()
    p, square = r.clone(), float(r.square().sum())
    target = tolerance**2 * square
    for _ in range(_CG_STEPS):
        q = product(p)
        curvature = float((p * q).sum())
        if square <= target or curvature <= 0:
            break
        alpha = square / curvature
        x, r = x + alpha * p, r - alpha * q
        new = float(r.square().sum())
        p, square = r + (new / square) * p, new
    return x if bool(x.any()) else b


class KFAC(Optimizer):
    """Kronecker-factored preconditioner (arXiv 1503.05671) of one linear layer, with exact line
    search.

    A = ZᵀZ/n and S = E[δδᵀ], δ the gradient at the outputs under the model's own distribution
    (squared loss: S = I;
    softmax: the mean of diag(p) − ppᵀ). Direction −(A + π√ε I)⁻¹ g (S + √ε/π I)⁻¹ (§6.3) with π² =
    t_A/t_S, the ratio of the factors' mean eigenvalues, and ε = ``damping``·t_A·t_S + λ:
    independent of the scale of features and loss. Differs from the paper: a line search replaces
    its rescaling and its adaptive damping, and there is no momentum.
    """

    gram = False
    uses = frozenset({"damping"})

    def __init__(self, problem: Problem, settings: Settings) -> None:
        super().__init__(problem, settings)
        self.damping, self.v = settings.damping, problem.spectrum.v
        self.eigenvalues = problem.spectrum.s**2 / problem.n

    def direction(self, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
        tiny = torch.finfo(torch.float64).tiny
        factor = self.problem.output_factor(w)
        input_mean = max(float(self.eigenvalues.sum()) / self.problem.d, tiny)
        output_mean = max(float(torch.trace(factor)) / len(factor), tiny)
        tilt = math.sqrt(input_mean / output_mean)
        root = max(math.sqrt(self.damping * input_mean * output_mean + self.problem.ridge), tiny)
        inner = self.v @ ((self.v.T @ g) / (self.eigenvalues + root * tilt)[:, None])
        damped = factor + max(root / tilt, tiny) * torch.eye(len(factor), dtype=g.dtype)
        return -torch.linalg.solve(damped, inner.T).T, state


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "gd_exact_line_search": GradientDescent,
    "sgd": SGD,
    "momentum": Momentum,
    "adam": Adam,
    "adagrad": Adagrad,
    "lbfgs": LBFGS,
    "newton": Newton,
    "whitening": Whitening,
    "kfac": KFAC,
}
