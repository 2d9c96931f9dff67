"""Condition numbers of Gram matrices, the ratio built from them, and its limit.

Everything is float64. ``X`` is a data or feature matrix [n, d] and H = XᵀX its Hessian (squared
loss, linear probe), so κ(H) = σ_max(X)²/σ_min(X)²: taken from the singular values of X itself,
never from the eigenvalues of H, whose small ones are lost to rounding beyond κ ≈ 1e16. Source:
arXiv 2505.23760 (KAPPA).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from lab.core.seeding import generator

Preconditioner = Literal["jacobi", "adam", "kfac"]
PRECONDITIONERS: tuple[Preconditioner, ...] = get_args(Preconditioner)
Definition = Literal["rank", "ridge", "release", "jacobi", "adam", "kfac"]
KFAC_DAMPING = 1e-3  # as conf/attacks/probe_kfac.yaml
RESOLUTION = 1e-6  # a bound whose estimated relative error exceeds this is not reported
# the released `condition_number` adds this to H and drops eigenvalues at or below it
RELEASE_SHIFT = 1e-6


def singular_values(x: Tensor) -> Tensor:
    """Return the singular values of ``x`` [n, d], descending float64 [min(n, d)]."""
    return torch.linalg.svdvals(x.detach().to(torch.float64))


def rank_tolerance(
    shape: tuple[int, int] | torch.Size, dtype: torch.dtype = torch.float64
) -> float:
    """Return max(n, d)·ε, relative to the largest singular value, as
    ``numpy.linalg.matrix_rank`` does.
    """
    eps = torch.finfo(dtype if dtype.is_floating_point else torch.float64).eps
    return max(shape) * eps


def numerical_rank(
    s: Tensor, shape: tuple[int, int] | torch.Size, tolerance: float | None = None
) -> int:
    """Return the number of singular values of a matrix of ``shape`` that stand out of rounding.

    Args:
        s: singular values, descending.
        tolerance: relative to ``s[0]``; default `rank_tolerance`, as ``numpy.linalg.matrix_rank``.
    """
    relative = rank_tolerance(shape) if tolerance is None else tolerance
    return int((s > relative * s[:1]).sum())


def condition_number(x: Tensor, definition: Definition = "rank", *, ridge: float = 0.0) -> float:
    """Return the κ of `kappa_and_rank`."""
    return kappa_and_rank(x, definition, ridge)[0]


def kappa_and_rank(
    x: Tensor, definition: Definition = "rank", ridge: float = 0.0
) -> tuple[float, int]:
    """Return κ(XᵀX) of ``x`` [n, d] and the numerical rank.

    Args:
        x: data or features. Integers and float32 are converted; float32 keeps its own rounding in
            the default tolerance, so that noise of a float32 network does not count as rank.
        definition: ``rank`` σ_1²/σ_r² with r the numerical rank (pseudo-inverse, Eq. 1 of arXiv
            2505.23760); ``ridge`` κ(XᵀX + ``ridge``·I), what a probe with weight decay sees,
            infinite only for a singular XᵀX with ``ridge`` = 0; ``release`` the released function's
            rule: largest over smallest eigenvalue above 1e-6 of XᵀX + 1e-6·I, which on
            rank-deficient data measures rounding noise (for comparison); ``jacobi``, ``adam`` and
            ``kfac`` what is left of ``rank`` after an optimizer's own preconditioner
            (`precondition`).
        ridge: λ ≥ 0 of ``ridge``.

    Raises:
        ValueError: an empty or all-zero matrix, or numbers that are not finite.
    """
    if not bool(torch.isfinite(x).all()):
        raise ValueError("a condition number needs finite numbers")
    if definition in PRECONDITIONERS:
        x = precondition(x, definition)[0]
        definition = "rank"
    s = singular_values(x)
    rank = numerical_rank(s, x.shape, rank_tolerance(x.shape, x.dtype))
    if rank == 0:
        raise ValueError("the condition number of a zero matrix is undefined")
    if definition == "rank":
        return float((s[0] / s[rank - 1]) ** 2), rank
    if definition == "release":
        return _release_condition_number(x), rank
    smallest = (float(s[-1]) ** 2 if rank == x.shape[1] else 0.0) + ridge
    return (float(s[0]) ** 2 + ridge) / smallest if smallest > 0 else math.inf, rank


def precondition(y: Tensor, optimizer: Preconditioner) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return Ỹ = Y P^(−1/2) [n, d], so that ỸᵀỸ is the Hessian that an attacker with the
    preconditioner P sees, and the pullback of gradients from ∂f/∂Ỹ to ∂f/∂Y.

    Args:
        y: features [n, d].
        optimizer: ``jacobi``: P_jj = ‖Y_·j‖², the diagonal of H. ``adam``: P_jj = ‖Y_·j‖, since
            Adam divides by the root of E[g_j²], which is ∝ ‖Y_·j‖² where residuals do not depend
            on the features (Adagrad likewise). ``kfac``: P = H + ρI with ρ = √1e-3 times the mean
            eigenvalue of H (arXiv 1503.05671 §6.3 with S = I, the damping of
            `attacks.probes.optimizers.KFAC`); its pullback holds for functions of the spectrum,
            with ρ held constant. Zero columns are left alone.
    """
    if optimizer == "kfac":
        u, s, vt = torch.linalg.svd(y.to(torch.float64), full_matrices=False)
        shifted = s.square() + math.sqrt(KFAC_DAMPING) * s.square().sum() / y.shape[1]
        shifted = shifted.clamp_min(torch.finfo(torch.float64).tiny)
        slope = (shifted - s.square()) / shifted**1.5  # of s/√(s² + ρ)

        def pull_back(gradient: Tensor) -> Tensor:
            return (u * (slope * ((u.T @ gradient) * vt).sum(1))) @ vt

        return ((u * (s / shifted.sqrt())) @ vt).to(y.dtype), pull_back
    norms = y.norm(dim=0)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    unit, power = y / norms, 1.0 if optimizer == "jacobi" else 0.5

    def pull(gradient: Tensor) -> Tensor:
        return (gradient - power * unit * (unit * gradient).sum(0)) / norms**power

    return y / norms**power, pull


def _release_condition_number(x: Tensor) -> float:
    x64 = x.detach().to(torch.float64)
    gram = x64.T @ x64 + RELEASE_SHIFT * torch.eye(x64.shape[1], dtype=torch.float64)
    values = torch.linalg.eigvalsh(gram)
    positive = values[values > RELEASE_SHIFT]
    if positive.numel() == 0:
        raise ValueError("the condition number of a zero matrix is undefined")
    return float(positive.max() / positive.min())


def row_groups(n: int, groups: int = 20, size: int = 100, seed: int = 0) -> list[Tensor]:
    """Return seeded row indices: ``groups`` groups of min(``size``, n) rows, disjoint where n ≥
    groups·size (deep extractors, §5.2 of arXiv 2505.23760: 20 groups × 100).
    """
    rng = generator(seed, "row-groups", n, groups, size)
    size = min(size, n)
    if n >= groups * size:
        order = torch.randperm(n, generator=rng)
        return [order[g * size : (g + 1) * size] for g in range(groups)]
    return [torch.randperm(n, generator=rng)[:size] for _ in range(groups)]


def relative_immunization_ratio(
    harmful_after: float, harmful_before: float, benign_after: float, benign_before: float
) -> float:
    """Return RIR = [κ_H(θ_I)/κ_H(θ_0)] / [κ_P(θ_I)/κ_P(θ_0)]; above 1 the harmful task got
    relatively harder.

    Raises:
        ValueError: a condition number below 1.
    """
    values = (harmful_after, harmful_before, benign_after, benign_before)
    if any(v < 1 - 1e-9 for v in values):
        raise ValueError(f"condition numbers are at least 1, got {values}")
    return (harmful_after / harmful_before) / (benign_after / benign_before)


@dataclass
class Bound:
    """The largest RIR of any invertible linear extractor (docs/reference/methods.md §2.1).

    Attributes:
        value: RIR* = κ(M)·κ(H_P(θ_0))/κ(H_H(θ_0)); None when it is infinite or float64 cannot
            resolve it.
        reason: why ``value`` is None.
        pencil: eigenvalues of (K_H, K_P) on range(K_P), descending [rank of K_P].
        kappa_m: κ(M), largest over smallest positive pencil eigenvalue; None with ``value``.
        outside_energy: share of ‖X_H‖²_F that lies outside range(K_P).
    """

    value: float | None
    reason: str | None
    pencil: Tensor
    kappa_m: float | None
    outside_energy: float


def range_basis(x: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis W [d, r] of the row space of ``x`` [n, d] and the singular
    values [r] of ``x``.
    """
    _, s, wt = torch.linalg.svd(x.detach().to(torch.float64), full_matrices=False)
    rank = numerical_rank(
        s, x.shape, rank_tolerance(x.shape, x.dtype) if tolerance is None else tolerance
    )
    return wt[:rank].T.contiguous(), s[:rank]


def leading_directions(rows: Tensor, share: float) -> Tensor:
    """Return the eigenvectors [d, r] of rowsᵀ·rows with a share of its trace, at least one."""
    _, singular, vectors = torch.linalg.svd(rows, full_matrices=False)
    energy = singular.square().cumsum(0) / singular.square().sum()
    return vectors[: int((energy < share).sum()) + 1].T


def outside_energy(x: Tensor, basis: Tensor) -> float:
    """Return the share of ‖X‖²_F outside the span of orthonormal columns ``basis`` [d, r]."""
    x64 = x.detach().to(torch.float64)
    return float((x64 - (x64 @ basis) @ basis.T).square().sum() / x64.square().sum())


def rir_bound(x_benign: Tensor, x_harmful: Tensor, theta0: Tensor | None = None) -> Bound:
    """Return RIR* of a pair of tasks, by the generalised eigenvalues of (K_H, K_P) (own result,
    docs/reference/methods.md §2.1).

    H_H = BᵀMB and H_P = BᵀB with B = K_P^{1/2}θ give κ(H_H) ≤ κ(M)·κ(H_P) for every invertible θ,
    attained by θ = K_P^{-1/2}Q. A singular K_P is reduced to its range; when K_H has energy
    outside, shrinking θ there sends κ(H_H) to infinity at no cost to H_P, so there is no finite
    bound. A singular K_H keeps the bound, with κ(M) over the positive eigenvalues.

    Nothing in it takes singular values of X: the bound comes from eigenvalues of Gram matrices, the
    RIR from singular values of Xθ, so that a ratio of 1 proves something. (Ranks and the error
    estimate are taken from singular values.) Its relative error is about ε·max(κ(K_P)κ(M),
    κ(H(θ_0))) with equilibrated columns of X_P; a bound with an error above 1e-6 is not reported.

    Args:
        x_benign: [n_P, d]. x_harmful: [n_H, d]. theta0: [d, d] the extractor before immunization;
            identity if None.
    """
    benign, harmful = x_benign.detach().to(torch.float64), x_harmful.detach().to(torch.float64)
    d = benign.shape[1]
    basis, s = range_basis(x_benign)
    rank = len(s)
    outside = 0.0
    pairs = (benign, harmful)
    if rank < d:
        outside = outside_energy(harmful, basis)
        pairs = (benign @ basis, harmful @ basis)
    # a congruence: leaves the pencil as it is, lowers κ(K_P)
    scale = pairs[0].square().sum(0).sqrt()
    k_p, k_h = ((p / scale).T @ (p / scale) for p in pairs)
    values = scipy.linalg.eigh(k_h.numpy(), k_p.numpy(), eigvals_only=True)
    pencil = torch.from_numpy(values[::-1].copy())  # torch takes no negative stride
    if outside > 1e-12:  # squared relative size: directions beyond 1e-6 of X_H, far above rounding
        reason = (
            f"infinite: K_P has rank {rank} of {d} and {100 * outside:.3g} % of the harmful "
            "energy lies outside its"
            " range, where shrinking θ raises κ(H_H) at no cost to H_P"
        )
        return Bound(None, reason, pencil, None, outside)
    rank_m = numerical_rank(singular_values(pairs[1]), pairs[1].shape)
    kappa_m = float(values[-1] / values[-rank_m])  # eigenvalues ascend
    before = []
    for x in (benign, harmful):
        y = x if theta0 is None else x @ theta0.detach().to(torch.float64)
        gram = scipy.linalg.eigvalsh((y.T @ y).numpy())
        before.append(float(gram[-1] / gram[-numerical_rank(singular_values(y), y.shape)]))
    error = np.finfo(float).eps * max(
        *map(abs, before), condition_number(pairs[0] / scale) * abs(kappa_m)
    )
    if min(*before, kappa_m) <= 0 or error > RESOLUTION:
        reason = (
            "not resolved: eigenvalues of the Gram matrices carry a relative error of "
            f"{error:.1g} in float64"
        )
        return Bound(None, reason, pencil, None, outside)
    return Bound(kappa_m * before[0] / before[1], None, pencil, kappa_m, outside)


def principal_angles(
    x_benign: Tensor, x_harmful: Tensor, dim: int | None = None, energy: float = 0.9
) -> Tensor:
    """Return angles in radians, ascending, between the leading right-singular subspaces of both
    matrices.

    Args:
        dim: directions taken from each; by default as many as hold ``energy`` of ‖X‖²_F, per
            matrix.
        energy: share in (0, 1].
    """
    bases = []
    for x in (x_benign, x_harmful):
        basis, s = range_basis(x)
        share = s.square().cumsum(0) / s.square().sum()
        leading = int((share < energy - 1e-12).sum()) + 1
        bases.append(basis[:, : min(dim or leading, len(s))].numpy())
    angles = scipy.linalg.subspace_angles(*bases)
    return torch.from_numpy(np.ascontiguousarray(np.sort(angles)))
