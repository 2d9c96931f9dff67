"""Merging concepts that were adapted separately: a fixed linear map in two thin factors per
concept.

For every matrix W ∈ R^{out×d} with input rows C_n (concept n) and C_reg (regularisation),

    Ŵ = argmin_X ‖X C_regᵀ − W C_regᵀ‖²_F + λ‖X − W‖²_F    s.t.  X Cᵀ = V
    Ŵ = W + Σ_n (W_n − W) C_nᵀ B_n
    V = [W_1 C_1ᵀ, …, W_N C_Nᵀ],    B = (C A Cᵀ + μI)⁻¹ C A,    A = (C_regᵀ C_reg + λI)⁻¹

where C has the rows of all C_n and B_n are those rows of B that belong to concept n (MIMA, arXiv
2412.15320; the constrained least squares of Custom Diffusion, arXiv 2212.04488, written as an
update). μ > 0 replaces the constraint by (1/μ)‖X Cᵀ − V‖²_F. The inputs are frozen, so B is
factored once, in float64, and a merge costs two thin products per matrix. Deviates from the
released code, which factors C_regᵀC_reg again for every layer at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from immunize.gradients import Params
from immunize.merge.learned import LearnedWeights
from lab.core.errors import UserError


@dataclass(frozen=True)
class Factors:
    """P_n = ``rights[n]`` @ ``lefts[n]``: C_nᵀ [d, m_n] and B_n [m_n, d]; all in one dtype.

    Attributes:
        error: B Cᵀ − I [m, m], what the constraint misses: ‖ŴCᵀ − V‖ = ‖U error‖ with U = [(W_n −
            W) C_nᵀ]_n. Zero up to rounding for μ = 0.
        report: ``cond_regularizer`` (C_regᵀC_reg), ``cond_constraint`` (C A Cᵀ), ``effective_rank``
            of C A Cᵀ (exponential of the entropy of its normalised spectrum) and ``rows`` (m).
    """

    rights: tuple[Tensor, ...]
    lefts: tuple[Tensor, ...]
    error: Tensor
    report: dict[str, float]

    def to(self, like: Tensor) -> Factors:
        """Convert the factors to the dtype and device of ``like``; compute ``error`` there."""
        rights, lefts = (tuple(x.to(like) for x in xs) for xs in (self.rights, self.lefts))
        error = torch.cat(lefts) @ torch.cat(rights, 1)
        error.diagonal().sub_(1)
        return Factors(rights, lefts, error, self.report)


def factorize(
    concepts: Sequence[Tensor], regularizer: Tensor, *, lam: float = 0.0, mu: float = 0.0
) -> Factors:
    """Compute the factors of the merge in float64, by two Cholesky factorisations.

    Args:
        concepts: C_n [m_n, d] of every concept.
        regularizer: C_reg [R, d].
        lam: λ ≥ 0, Tikhonov term of the objective.
        mu: μ ≥ 0, softness of the constraint.

    Raises:
        UserError: C_regᵀC_reg + λI or C A Cᵀ + μI is singular.
    """
    concepts = [c.detach().double() for c in concepts]
    rows = torch.cat(concepts)
    solved, condition = _solve_regularizer(regularizer.detach().double(), rows, lam)
    inner = rows @ solved
    inner = (inner + inner.T) / 2
    spectrum = torch.linalg.eigvalsh(inner).clamp_min(0)
    tight = float(spectrum[-1] / spectrum[0]) if float(spectrum[0]) > 0 else float("inf")
    shares = spectrum[spectrum > 0] / spectrum.sum()
    inner.diagonal().add_(mu)
    low, failed = torch.linalg.cholesky_ex(inner)
    if int(failed) or (mu == 0 and tight > 1e13):
        reason = (
            f"C A Cᵀ is singular (condition {tight:.1e}): the concepts' tokens contradict or "
            "repeat one another. Set it above 0, which asks for X Cᵀ = V in the mean square only, "
            "or take fewer prompts."
        )
        raise UserError("immunize.merge.mu", mu, reason)
    lefts = torch.cholesky_solve(solved.T, low)
    report = {
        "cond_regularizer": condition,
        "cond_constraint": tight,
        "effective_rank": float((-(shares * shares.log()).sum()).exp()),
        "rows": float(len(rows)),
    }
    parts = lefts.split([len(c) for c in concepts])
    rights = tuple(c.T.contiguous() for c in concepts)
    return Factors(rights, parts, inner, report).to(rows)


def _solve_regularizer(regularizer: Tensor, rows: Tensor, lam: float) -> tuple[Tensor, float]:
    """Return A Cᵀ [d, m] and cond(C_regᵀC_reg); by the R × R system (Woodbury) where C_reg has
    fewer rows than columns.
    """
    wide = regularizer.shape[0] < regularizer.shape[1]
    gram = regularizer @ regularizer.T if wide else regularizer.T @ regularizer
    spectrum = torch.linalg.eigvalsh(gram)
    singular = wide or float(spectrum[0]) <= 0
    condition = float("inf") if singular else float(spectrum[-1] / spectrum[0])
    gram.diagonal().add_(lam)
    low, failed = torch.linalg.cholesky_ex(gram)
    if int(failed) or (lam == 0 and condition > 1e15):
        reason = (
            f"C_regᵀC_reg is singular (condition {condition:.1e}); set it above 0 or take "
            "more and more varied captions."
        )
        raise UserError("immunize.merge.lam", lam, reason)
    if not wide:
        return torch.cholesky_solve(rows.T, low), condition
    solved = torch.cholesky_solve(regularizer @ rows.T, low)
    return (rows.T - regularizer.T @ solved) / lam, condition


class Merge:
    """θ̂ = Merge(θ, θ'_1 … θ'_N), affine in all its arguments.

    Matrices in ``members`` are merged in closed form, those that ``learned`` holds by learned
    weights, and everything else is the mean of the θ'_n. A name that an adapted dict leaves out did
    not move. Differentiable.

    Args:
        count: N ≥ 1 concepts.
        factors: group → factors of the matrices that read the same input, in the dtype and on the
            device of θ (`Factors.to`).
        members: parameter name → group. Kernels [out, in, h, w] count as matrices [out, in·h·w].
        learned: weights of the rules ``masked`` and ``gated``, else None.

    Attributes:
        report: worst over groups of the figures of `Factors.report`, and after each merge
            ``constraint_residual``, ‖ŴCᵀ − V‖ ÷ ‖V − WCᵀ‖ over all matrices (0 where nothing
            moved).
    """

    def __init__(
        self,
        count: int,
        factors: Mapping[str, Factors] | None = None,
        members: Mapping[str, str] | None = None,
        learned: LearnedWeights | None = None,
    ) -> None:
        self.count, self.learned = count, learned
        self.factors, self.members = dict(factors or {}), dict(members or {})
        reports = [group.report for group in self.factors.values()]
        self.report: dict[str, float] = {
            key: (min if key == "effective_rank" else max)(report[key] for report in reports)
            for key in (reports[0] if reports else ())
        }

    def residual(self) -> dict[str, float]:
        """Return ``constraint_residual`` of the last merge; empty without a closed form."""
        return {key: value for key, value in self.report.items() if key == "constraint_residual"}

    def factors_of(self, name: str) -> Factors | None:
        """Return the factors that merge ``name``; None outside the closed form."""
        return self.factors.get(self.members.get(name, ""))

    def __call__(self, base: Params, adapted: Sequence[Params]) -> Params:
        """Return θ̂, with the names of ``base``."""
        accumulator = MergeAccumulator(self, base)
        for n, weights in enumerate(adapted):
            accumulator.add(n, accumulator.contribution(n, weights))
        return accumulator.finish()

    # the transpose

    def adjoint_part(self, v: Params, n: int) -> Params:
        """Return v_n = ∂⟨v, Merge(θ, θ'_1 … θ'_N)⟩ by θ'_n: v P_nᵀ in closed form, M_n ⊙ v for
        learned weights, v/N elsewhere.
        """
        return {name: self.project(name, x, n) for name, x in v.items()}

    def adjoint_direct(self, v: Params) -> Params:
        """Return v_dir = v − Σ_n v_n, the direct part by θ; exactly 0 where the merge is the mean.

        The parts sum to ``v`` name by name, since the merge of N equal θ' and θ is θ itself.
        """
        own = {*self.members, *(self.learned.names if self.learned is not None else ())}
        return {
            name: x - sum(self.project(name, x, n) for n in range(self.count))
            if name in own
            else torch.zeros_like(x)
            for name, x in v.items()
        }

    def project(self, name: str, x: Tensor, n: int) -> Tensor:
        """Return x P_nᵀ, M_n ⊙ x or x/N, by what merges ``name``."""
        factors = self.factors_of(name)
        if factors is not None:
            return ((x.flatten(1) @ factors.lefts[n].T) @ factors.rights[n].T).view_as(x)
        if self.learned is not None and name in self.learned.names:
            weight = self.learned.weight(name, n).to(x)
            return (
                weight * x if weight.dim() == 0 else (weight.flatten(1) * x.flatten(1)).view_as(x)
            )
        return x / self.count


class MergeAccumulator:
    """A merge that takes the concepts one after the other, so that no two θ'_n need be kept.

    It holds thin U_n = (W_n − W) C_nᵀ [out, m_n] in closed form, a running sum elsewhere.
    """

    def __init__(self, merge: Merge, base: Params) -> None:
        self.merge, self.base = merge, base
        self.sums: Params = {}
        self.thin: dict[str, dict[int, Tensor]] = {}

    def contribution(self, n: int, adapted: Params) -> Params:
        """Return U_n in closed form, P_n (θ'_n − θ) elsewhere; change nothing."""
        parts: Params = {}
        for name, value in adapted.items():
            change = value - self.base[name]
            factors = self.merge.factors_of(name)
            if factors is None:
                parts[name] = self.merge.project(name, change, n)
            else:
                parts[name] = change.flatten(1) @ factors.rights[n]
        return parts

    def add(self, n: int, parts: Params) -> None:
        """Add what `contribution` gave for concept n, in this or in another process."""
        for name, value in parts.items():
            if name in self.merge.members:
                self.thin.setdefault(name, {})[n] = value
            else:
                self.sums[name] = self.sums[name] + value if name in self.sums else value

    def finish(self) -> Params:
        """Return θ̂; write ``constraint_residual`` into the merge's report."""
        merged: Params = {}
        missed = moved = torch.zeros(())
        for name, base in self.base.items():
            factors = self.merge.factors_of(name) if name in self.thin else None
            if factors is None:
                merged[name] = base + self.sums[name] if name in self.sums else base
                continue
            parts = [
                self.thin[name].get(n, base.new_zeros(len(base), right.shape[1]))
                for n, right in enumerate(factors.rights)
            ]
            u = torch.cat(parts, 1)
            merged[name] = torch.addmm(base.flatten(1), u, torch.cat(factors.lefts)).view_as(base)
            missed = missed + (u.detach() @ factors.error).double().square().sum().cpu()
            moved = moved + u.detach().double().square().sum().cpu()
        if self.thin:
            ratio = (missed / moved.clamp_min(1e-300)).sqrt()
            self.merge.report["constraint_residual"] = float(ratio)
        return merged
