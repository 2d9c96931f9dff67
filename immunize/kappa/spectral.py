"""Spectral objectives of a Gram matrix, their gradients, and preconditioned steps, all on thin
factors.

H = YᵀY with Y = Xθ (linear) or features (deep), Y [n, d]. Objectives are functions of the positive
eigenvalues σ_1 ≥ … ≥ σ_r of H; each returns its value and ∂/∂σ_i, and `feature_gradient` turns
these into the gradient with respect to Y, ∂f/∂Y = U diag(2 s_i ∂f/∂σ_i) Vᵀ for Y = U diag(s) Vᵀ,
σ_i = s_i². No d × d matrix is formed while n < d. Source: arXiv 2505.23760 (KAPPA) §4, Alg. 1; the
three cases of the step are worked out in the docstrings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lab.core.condition import numerical_rank

Objective = Callable[[Tensor, int, float], tuple[float, Tensor]]


@dataclass
class Factor:
    """Y = U diag(s) Vᵀ cut to its numerical rank r: u [n, r], s [r] descending, vt [r, d]."""

    u: Tensor
    s: Tensor
    vt: Tensor

    @property
    def sigma(self) -> Tensor:
        """Eigenvalues of YᵀY, descending [r]."""
        return self.s.square()


def thin_factor(y: Tensor, tolerance: float | None = None) -> Factor:
    """Singular value decomposition of ``y`` [n, d] by QR of the long side, cut to the numerical
    rank.

    Args:
        tolerance: relative to the largest singular value; default
            `lab.core.condition.rank_tolerance`.
    """
    wide = y.shape[0] < y.shape[1]
    q, r = torch.linalg.qr(y.T if wide else y)
    if wide:
        u, s, w = torch.linalg.svd(r.T)
        vt = w @ q.T
    else:
        w, s, vt = torch.linalg.svd(r)
        u = q @ w
    rank = numerical_rank(s, y.shape, tolerance)
    return Factor(u[:, :rank], s[:rank], vt[:rank])


def _extremal(sigma: Tensor, cluster: float, top: bool) -> Tensor:
    """Averaging weights [r] over the eigenvalues within a relative ``cluster`` of the extremal one.

    Near-multiple eigenvalues have no stable singular vectors; ½σ² of the extremal one is replaced
    by its mean over the cluster. ``cluster`` = 0 takes the extremal one alone, as the formula says.
    """
    weights = torch.zeros_like(sigma)
    chosen = sigma >= sigma[0] * (1 - cluster) if top else sigma <= sigma[-1] * (1 + cluster)
    weights[chosen] = 1.0 / int(chosen.sum())
    return weights


def well(sigma: Tensor, size: int, cluster: float = 0.0) -> tuple[float, Tensor]:
    """R_well = ½σ_1² − ‖S‖²_F/(2p) and ∂/∂σ; ``size`` is p. Small where κ is small."""
    weights = _extremal(sigma, cluster, top=True)
    value = 0.5 * (weights * sigma.square()).sum() - sigma.square().sum() / (2 * size)
    return float(value), weights * sigma - sigma / size


def ill(sigma: Tensor, size: int, cluster: float = 0.0) -> tuple[float, Tensor]:
    """R_ill = 1/(‖S‖²_F/(2k) − ½σ_k²) and ∂/∂σ; ``size`` is k. Small where κ is large.

    Infinite for κ = 1 (all eigenvalues equal), where it has no descent direction.
    """
    weights = _extremal(sigma, cluster, top=False)
    gap = float(sigma.square().sum() / (2 * size) - 0.5 * (weights * sigma.square()).sum())
    if gap <= 0:
        return math.inf, torch.full_like(sigma, math.nan)
    return 1.0 / gap, (weights * sigma - sigma / size) / gap**2


def log_kappa(sigma: Tensor, size: int, cluster: float = 0.0) -> tuple[float, Tensor]:
    """log κ = log σ_1 − log σ_r and ∂/∂σ (``size`` is not used)."""
    top, low = _extremal(sigma, cluster, top=True), _extremal(sigma, cluster, top=False)
    logs = sigma.log()
    return float(((top - low) * logs).sum()), (top - low) / sigma


def inverse_log_kappa(sigma: Tensor, size: int, cluster: float = 0.0) -> tuple[float, Tensor]:
    """1/log κ and ∂/∂σ: what the released ``kappa_loss`` descends for the harmful task."""
    value, slope = log_kappa(sigma, size, cluster)
    if value <= 0:
        return math.inf, torch.full_like(sigma, math.nan)
    return 1.0 / value, -slope / value**2


def feature_gradient(factor: Factor, slope: Tensor) -> Tensor:
    """∂f/∂Y [n, d] from ``slope`` = ∂f/∂σ [r]."""
    return (factor.u * (2.0 * factor.s * slope)) @ factor.vt


def preconditioned_step(x: Tensor, gradient: Tensor, ridge: float = 0.0) -> Tensor:
    """Return (K + ρI)⁻¹XᵀG [d, e] for K = XᵀX and ``gradient`` G [n, e]; pseudo-inverse for ρ = 0.

    Three cases for a spectral gradient G = 2Y V diag(f′) Vᵀ, Y = Xθ:

    - full-rank K, ρ = 0: 2θ V diag(f′) Vᵀ, as K cancels (X has full column rank, X⁺X = I);
    - n < d, ρ = 0: X⁺G = 2Pθ V diag(f′) Vᵀ with P the projection on the rows of X;
    - ρ > 0: W diag(s²/(s²+ρ)) Wᵀθ·2V diag(f′) Vᵀ for X = U diag(s) Wᵀ, through Xᵀ(XXᵀ+ρI)⁻¹G
      where n < d.

    Cost O(n²d + nde) for n < d: a triangular or Cholesky solve of size n, never of size d.
    """
    n, d = x.shape
    if ridge > 0:
        gram = x @ x.T if n < d else x.T @ x
        gram.diagonal().add_(ridge)
        low, info = torch.linalg.cholesky_ex(gram)
        if int(info) == 0:
            if n < d:
                return x.T @ torch.cholesky_solve(gradient, low)
            return torch.cholesky_solve(x.T @ gradient, low)
        factor = thin_factor(x)  # a ridge below the rounding of XᵀX: take the spectrum of X itself
        return factor.vt.T @ (
            (factor.u.T @ gradient) * (factor.s / (factor.s.square() + ridge))[:, None]
        )
    q, r = torch.linalg.qr(x.T if n < d else x)
    diagonal = r.diagonal().abs()
    if float(diagonal.min()) <= 1e-10 * float(diagonal.max()):
        factor = thin_factor(x)
        return factor.vt.T @ ((factor.u.T @ gradient) / factor.s[:, None])
    if n < d:
        return q @ torch.linalg.solve_triangular(r.T, gradient, upper=False)
    return torch.linalg.solve_triangular(r, q.T @ gradient, upper=True)


def right_solve(y: Tensor, gradient: Tensor, ridge: float) -> Tensor:
    """Return G(YᵀY + ρI)⁻¹ for ``gradient`` G [n, d]; with ρ = 0 the pseudo-inverse."""
    n, d = y.shape
    if n >= d and ridge > 0:
        gram = y.T @ y
        gram.diagonal().add_(ridge)
        return torch.linalg.solve(gram, gradient, left=False)
    factor = thin_factor(y)
    inside = gradient @ factor.vt.T
    result = (inside / (factor.sigma + ridge)) @ factor.vt
    if ridge > 0:
        result = result + (gradient - inside @ factor.vt) / ridge
    return result
