"""Optimizers of a linear probe.

No optimizer decomposes a matrix of the size of the features in a step: `Whitening`, `Newton` and
`KFAC` use the singular vectors that the problem has.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from attacks.probes.problem import Problem, Squared, softmax_curvature
from lab.core.solvers import Tensors, conjugate_gradients
from lab.core.training import restore_state, state_tensors

_HISTORY = 10  # pairs that L-BFGS keeps (torch.optim.LBFGS keeps 100, scipy 10)
_CG_STEPS = 20
_REFERENCE_STEPS = 40  # Newton steps towards the optimum of cross entropy
# a gradient this small beside the first is rounding: line searches stop, rather than follow it
_ROUNDING = 1e-14


class Optimizer(ABC):
    """Moves ``w`` [d, c] from 0 on; ``tensors`` are its whole state.

    Args:
        damping: of `KFAC`.
        tolerance: of `Whitening` and `Newton`: relative singular value, None = numerical rank.
        rank: of `LowRank`: leading eigendirections that it preconditions.
    """

    uses_rate: ClassVar[bool] = False  # takes a learning rate and mini-batches
    gram: ClassVar[bool] = True  # ZᵀZ may stand in for Z; not where small eigenvalues matter

    def __init__(
        self,
        problem: Problem,
        *,
        damping: float = 1e-3,
        tolerance: float | None = None,
        rank: int = 10,
    ) -> None:
        self.problem, self.damping = problem, damping
        self.tolerance, self.rank = tolerance, rank
        self.reset()

    def reset(self) -> None:
        """Go back to w = 0."""
        self.w = torch.zeros(self.problem.d, self.problem.c, dtype=torch.float64)

    @abstractmethod
    def step(self, rate: float = 0.0, rows: Tensor | None = None) -> None:
        """Update ``w``."""

    def centre(self) -> float:
        """Return where the search for a rate starts: 1/L."""
        bound = self.problem.smoothness()
        return 1 / bound if bound > 0 else 1.0

    def tensors(self) -> dict[str, Tensor]:
        return {"w": self.w}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor.clone())


class FirstOrder(Optimizer):
    """An optimizer of torch, with its defaults, on mini-batches."""

    uses_rate = True
    build: ClassVar[Callable[..., torch.optim.Optimizer]]

    def reset(self) -> None:
        super().reset()
        self.optimizer = type(self).build([self.w])

    def step(self, rate: float = 0.0, rows: Tensor | None = None) -> None:
        self.w.grad = self.problem.gradient(self.w, rows)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        return state_tensors([self.w], self.optimizer)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        restore_state([self.w], self.optimizer, tensors)


class SGD(FirstOrder):
    """w ← w − η g."""

    build = torch.optim.SGD


class Momentum(FirstOrder):
    """Heavy ball as in torch: v ← 0.9 v + g, w ← w − η v."""

    build = partial(torch.optim.SGD, momentum=0.9)


class Adaptive(FirstOrder):
    """Moves every weight by about the rate itself."""

    def centre(self) -> float:
        """Return the largest entry of one exact step of steepest descent: it scales with the
        features as the weights do.
        """
        g = self.problem.gradient(self.w)
        size = self.problem.line_minimum(self.w, g, -g) * float(g.abs().max())
        return size if size > 0 else 1.0


class Adam(Adaptive):
    """Adam (arXiv 1412.6980): β = (0.9, 0.999), ε = 1e-8."""

    build = torch.optim.Adam


class Adagrad(Adaptive):
    """Adagrad: a ← a + g², w ← w − η g/(√a + 1e-10)."""

    build = torch.optim.Adagrad


class LineSearch(Optimizer):
    """A direction and an exact line search, over all rows."""

    def step(self, rate: float = 0.0, rows: Tensor | None = None) -> None:
        g = self.problem.gradient(self.w)
        if float(g.norm()) <= _ROUNDING * self.first_norm:
            return
        p = self.direction(g)
        self.w = self.w + self.problem.line_minimum(self.w, g, p) * p

    def reset(self) -> None:
        super().reset()
        self.first_norm = float(self.problem.gradient(self.w).norm())

    @abstractmethod
    def direction(self, g: Tensor) -> Tensor:
        """Return where the line search goes from ``w``; ``g`` is the gradient there."""


class GradientDescent(LineSearch):
    """Steepest descent with exact line search: the attacker of the theory (arXiv 2505.23760)."""

    def direction(self, g: Tensor) -> Tensor:
        return -g


class LBFGS(LineSearch):
    """L-BFGS with ten pairs and exact line search (on a quadratic: the iterates of conjugate
    gradients).
    """

    def reset(self) -> None:
        super().reset()
        self.pairs = self.w.new_zeros((2, 0, *self.w.shape))  # moves, changes of gradient
        self.last = self.w.new_zeros((0, *self.w.shape))  # weights and gradient before

    def direction(self, g: Tensor) -> Tensor:
        now = torch.stack([self.w, g])
        if len(self.last):
            move, change = now - self.last
            if float((move * change).sum()) > 1e-14 * float(move.norm() * change.norm()):
                pair = torch.stack([move, change])[:, None]
                self.pairs = torch.cat([self.pairs, pair], 1)[:, -_HISTORY:]
        self.last = now
        return -_two_loop(g, *self.pairs)

    def tensors(self) -> dict[str, Tensor]:
        return {"w": self.w, "pairs": self.pairs, "last": self.last}


def _two_loop(g: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """Return the inverse-Hessian product of L-BFGS (Nocedal & Wright, Algorithm 7.4).

    Args:
        s, y: moves and changes of the gradient [k, d, c], oldest first.
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


class Whitening(LineSearch):
    """Gradient descent with exact line search on whitened features Z V diag(√n/s), written in the
    coordinates of w.

    Directions below the tolerance are dropped. With squared loss and no ridge one step reaches the
    optimum.
    """

    gram = False

    def direction(self, g: Tensor) -> Tensor:
        f = self.problem.spectrum.cut(self.tolerance)
        whitener = f.v * (math.sqrt(self.problem.n) / f.s)
        return -whitener @ (whitener.T @ g)


class Newton(LineSearch):
    """Newton with exact line search. Squared loss: one step, by the pseudo-inverse of the Hessian.

    Cross entropy: the (d·c)² Hessian is not formed. The Newton system is solved by at most 20
    conjugate gradients in the coordinates in which ZᵀZ/n + λI is the identity; their number then
    depends on the class probabilities, not on the conditioning of the features (inexact Newton,
    tolerance min(0.1, √(‖g‖/‖g_0‖))).
    """

    gram = False

    def reset(self) -> None:
        super().reset()
        f = self.problem.spectrum.cut(self.tolerance)
        self.scale = 1 / (f.s**2 / self.problem.n + self.problem.ridge).sqrt()
        self.map = f.v * self.scale
        self.white = f.u * (f.s * self.scale)
        start = float((self.map.T @ self.problem.gradient(self.w)).norm())
        self.start = max(start, torch.finfo(torch.float64).tiny)

    def direction(self, g: Tensor) -> Tensor:
        b = -(self.map.T @ g)
        if isinstance(self.problem, Squared):
            return self.map @ b
        penalty = self.problem.ridge * self.scale.square()[:, None]
        prob = torch.softmax(self.problem.z @ self.w, 1)

        def product(x: Tensors) -> Tensors:
            curvature = softmax_curvature(prob, self.white @ x["q"])
            return {"q": self.white.T @ curvature / self.problem.n + penalty * x["q"]}

        tolerance = min(0.1, math.sqrt(float(b.norm()) / self.start))
        return self.map @ conjugate_gradients(product, {"q": b}, _CG_STEPS, tolerance)[0]["q"]


class LowRank(LineSearch):
    """Newton in the ``rank`` leading eigendirections of ZᵀZ/n, steepest descent at the scale of the
    next one elsewhere, with exact line search: a second-order attacker that stores few directions
    (deflation; cf. Frangella et al., randomized Nyström preconditioning, arXiv 2110.02820).
    """

    gram = False

    def direction(self, g: Tensor) -> Tensor:
        f, rank = self.problem.spectrum, min(self.rank, len(self.problem.spectrum.s) - 1)
        eigenvalues = f.s**2 / self.problem.n + self.problem.ridge
        gain = eigenvalues[rank] / eigenvalues[:rank] - 1  # of the leading directions, above 1
        v = f.v[:, :rank]
        return -(g + v @ (gain[:, None] * (v.T @ g)))


def newton_optimum(problem: Problem) -> Tensor:
    """Return weights near the infimum of cross entropy: Newton until the gradient is 1e-10 of the
    first, or 40 steps.
    """
    newton = Newton(problem)
    for _ in range(_REFERENCE_STEPS):
        if float(problem.gradient(newton.w).norm()) <= 1e-10 * newton.first_norm:
            break
        newton.step()
    return newton.w


class KFAC(LineSearch):
    """Kronecker-factored preconditioner (arXiv 1503.05671) of one linear layer, with exact line
    search.

    A = ZᵀZ/n and S = E[δδᵀ], δ the gradient at the outputs under the model's own distribution
    (squared loss: S = I; softmax: the mean of diag(p) − ppᵀ). Direction
    −(A + π√ε I)⁻¹ g (S + √ε/π I)⁻¹ (§6.3) with π² =
    t_A/t_S, the ratio of the factors' mean eigenvalues, and ε = ``damping``·t_A·t_S + λ:
    independent of the scale of features and loss. Differs from the paper: a line search replaces
    its rescaling and its adaptive damping, and there is no momentum.
    """

    gram = False

    def direction(self, g: Tensor) -> Tensor:
        f, n = self.problem.spectrum, self.problem.n
        eigenvalues = f.s**2 / n
        tiny = torch.finfo(torch.float64).tiny
        factor = self.problem.output_factor(self.w)
        input_mean = max(float(eigenvalues.sum()) / self.problem.d, tiny)
        output_mean = max(float(torch.trace(factor)) / len(factor), tiny)
        tilt = math.sqrt(input_mean / output_mean)
        root = max(math.sqrt(self.damping * input_mean * output_mean + self.problem.ridge), tiny)
        inner = f.v @ ((f.v.T @ g) / (eigenvalues + root * tilt)[:, None])
        damped = factor + max(root / tilt, tiny) * torch.eye(len(factor), dtype=g.dtype)
        return -torch.linalg.solve(damped, inner.T).T


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
    "low_rank": LowRank,
}
