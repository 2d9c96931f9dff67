"""Objectives of a linear probe on frozen features, with everything that its optimizers need.

Z [n, d] are features, Y [n, c] targets (one-hot for classification), w [d, c] the head; all
float64, no bias.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
from scipy.optimize import brentq
from torch import Tensor

from lab.core.condition import numerical_rank, rank_tolerance
from lab.core.hashing import digest

# doublings of a line search before it takes what it has: 2^60 times the first guess
_BRACKET_STEPS = 60
_SEARCH_TOLERANCE = 1e-10  # of the first directional derivative


@dataclass(frozen=True)
class Spectrum:
    """Thin factors of Z = U diag(s) Vᵀ up to the numerical rank r: ``u`` [n, r], ``s`` [r], ``v``
    [d, r].
    """

    u: Tensor
    s: Tensor
    v: Tensor

    def cut(self, tolerance: float | None) -> Spectrum:
        """Without directions whose singular value is at most ``tolerance`` times the largest."""
        if tolerance is None or not len(self.s):
            return self
        keep = int((self.s > tolerance * self.s[0]).sum())
        return Spectrum(self.u[:, :keep], self.s[:keep], self.v[:, :keep])


@dataclass(frozen=True)
class _Content:
    """A matrix that is equal to another one with the same ``digest``."""

    digest: str
    matrix: Tensor = field(compare=False)


@lru_cache(maxsize=3)
def _factorize(z: _Content, relative: float) -> Spectrum:
    """Return the `Spectrum` of a matrix; the last three are kept, as several attackers share them.

    Args:
        z: finite float64 features [n, d].
        relative: rank tolerance, a share of the largest singular value.
    """
    u, s, vh = torch.linalg.svd(z.matrix, full_matrices=False)
    rank = numerical_rank(s, z.matrix.shape, relative)
    return Spectrum(u[:, :rank].contiguous(), s[:rank].contiguous(), vh[:rank].T.contiguous())


class Problem(ABC):
    """L(w) = data term + λ/2 ‖w‖²_F, with λ = ``ridge`` × the mean eigenvalue of ZᵀZ/n.

    A relative λ shrinks with the features, so an immunizer gains nothing by scaling them.

    Args:
        z: features [n, d], float64.
        y: targets [n, c], float64.
        ridge: relative ridge ≥ 0.
        gram: use ZᵀZ where that is cheaper (n > d). Optimizers that divide by small eigenvalues
            turn it off.
        dtype: type that the features were computed in; its rounding sets the rank tolerance.
    """

    curvature: ClassVar[float]  # the largest of the loss in its scores

    def __init__(
        self,
        z: Tensor,
        y: Tensor,
        *,
        ridge: float = 0.0,
        gram: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.z, self.y = z, y
        self.n, self.d, self.c = z.shape[0], z.shape[1], y.shape[1]
        self.ridge = ridge * float(z.square().sum()) / (self.n * self.d)
        self.spectrum = _factorize(_Content(digest(z), z), rank_tolerance(z.shape, dtype))
        self.gram = z.T @ z / self.n if gram and self.n > self.d else None
        self.moment = z.T @ y / self.n

    def loss(self, w: Tensor) -> float:
        """Return the objective over all rows, penalty included."""
        return self.data_loss(self.z, self.y, w) + 0.5 * self.ridge * float(w.square().sum())

    @staticmethod
    @abstractmethod
    def data_loss(z: Tensor, y: Tensor, w: Tensor) -> float:
        """Return the data term alone, on other rows ``z``, ``y``."""

    @abstractmethod
    def gradient(self, w: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return ∇L(w) [d, c]; the data term over ``rows`` only, where these are set."""

    @abstractmethod
    def line_minimum(self, w: Tensor, g: Tensor, p: Tensor) -> float:
        """Return the t ≥ 0 that minimises L(w + t p); ``g`` = ∇L(w)."""

    @abstractmethod
    def output_factor(self, w: Tensor) -> Tensor:
        """Return S [c, c]: second moment of output gradients under the model's own distribution
        (Fisher).
        """

    def excess(self, w: Tensor, optimum: Tensor) -> float:
        """Return L(w) − L(w*), not below zero."""
        return max(self.loss(w) - self.loss(optimum), 0.0)

    def smoothness(self) -> float:
        """Return a bound on the largest eigenvalue of ∇²L: ``curvature`` λ_max(ZᵀZ/n) + λ."""
        s = self.spectrum.s
        return (self.curvature * (float(s[0]) ** 2 / self.n) if len(s) else 0.0) + self.ridge


class Squared(Problem):
    """L(w) = 1/(2n) ‖Zw − Y‖²_F + λ/2 ‖w‖²_F."""

    curvature = 1.0

    @staticmethod
    def data_loss(z: Tensor, y: Tensor, w: Tensor) -> float:
        return float((z @ w - y).square().sum()) / (2 * len(z))

    def gradient(self, w: Tensor, rows: Tensor | None = None) -> Tensor:
        if rows is None and self.gram is not None:
            return self.gram @ w - self.moment + self.ridge * w
        z, y = (self.z, self.y) if rows is None else (self.z[rows], self.y[rows])
        return z.T @ (z @ w - y) / len(z) + self.ridge * w

    def line_minimum(self, w: Tensor, g: Tensor, p: Tensor) -> float:
        """Return −⟨g, p⟩ / ⟨p, ∇²L p⟩, 0 where there is no curvature along ``p``."""
        normal = self.gram @ p if self.gram is not None else self.z.T @ (self.z @ p) / self.n
        curvature = float((p * (normal + self.ridge * p)).sum())
        return max(-float((g * p).sum()) / curvature, 0.0) if curvature > 0 else 0.0

    def output_factor(self, w: Tensor) -> Tensor:
        return torch.eye(self.c, dtype=torch.float64)

    def optimum(self) -> Tensor:
        """Return the ridge solution, or with λ = 0 the least-squares solution of minimum norm."""
        f = self.spectrum
        return f.v @ ((f.s / (f.s**2 + self.n * self.ridge))[:, None] * (f.u.T @ self.y))

    def excess(self, w: Tensor, optimum: Tensor) -> float:
        """Return L(w) − L(w*) as ½⟨w − w*, ∇²L (w − w*)⟩: exact down to zero, where a difference of
        losses is not.
        """
        gap = w - optimum
        return float((self.z @ gap).square().sum()) / (2 * self.n) + 0.5 * self.ridge * float(
            gap.square().sum()
        )


class CrossEntropy(Problem):
    """L(w) = mean softmax cross entropy of Zw + λ/2 ‖w‖²_F."""

    curvature = 0.5  # Böhning's bound on the softmax Hessian

    @staticmethod
    def data_loss(z: Tensor, y: Tensor, w: Tensor) -> float:
        return -float((torch.log_softmax(z @ w, 1) * y).sum()) / len(z)

    def gradient(self, w: Tensor, rows: Tensor | None = None) -> Tensor:
        z, y = (self.z, self.y) if rows is None else (self.z[rows], self.y[rows])
        return z.T @ (torch.softmax(z @ w, 1) - y) / len(z) + self.ridge * w

    def line_minimum(self, w: Tensor, g: Tensor, p: Tensor) -> float:
        """Return a root of φ'(t) for the convex φ(t) = L(w + t p), by Brent's method in a bracket
        found by doubling.

        On separable data φ may fall for ever; the bracket ends after 60 doublings.
        """
        logits, slope, y = self.z @ w, self.z @ p, self.y
        wp, pp = self.ridge * float((w * p).sum()), self.ridge * float(p.square().sum())

        def derivative(t: float) -> float:
            prob = torch.softmax(logits + t * slope, 1)
            return float(((prob - y) * slope).sum()) / self.n + wp + t * pp

        first = derivative(0.0)
        if not first < 0:
            return 0.0
        curvature = softmax_curvature(torch.softmax(logits, 1), slope)
        second = float((slope * curvature).sum()) / self.n + pp
        high, small = -first / second if second > 0 else 1.0, _SEARCH_TOLERANCE * abs(first)
        for _ in range(_BRACKET_STEPS):
            if derivative(high) >= -small:
                break
            high *= 2
        if derivative(high) <= small:
            return high
        return float(brentq(derivative, 0.0, high, xtol=1e-15 * high))

    def output_factor(self, w: Tensor) -> Tensor:
        prob = torch.softmax(self.z @ w, 1)
        return torch.diag(prob.mean(0)) - prob.T @ prob / self.n


def softmax_curvature(prob: Tensor, p: Tensor) -> Tensor:
    """Return (diag(prob) − prob probᵀ) p, row by row; both [n, c]."""
    weighted = prob * p
    return weighted - prob * weighted.sum(1, keepdim=True)
