"""The two thin factors of the merge, see `immunize.merge.closed_form`: two Cholesky factorisations
in float64, once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lab.core.errors import UserError
from lab.core.options import number


@dataclass(frozen=True)
class Inputs:
    """What a group of matrices reads: ``concepts`` C_n [m_n, d], one per concept, and
    ``regularizer`` C_reg [R, d].
    """

    concepts: tuple[Tensor, ...]
    regularizer: Tensor


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
        rights, lefts = (tuple(x.to(like) for x in xs) for xs in (self.rights, self.lefts))
        error = torch.cat(lefts) @ torch.cat(rights, 1)
        error.diagonal().sub_(1)
        return Factors(rights, lefts, error, self.report)


def _solve_regularizer(regularizer: Tensor, rows: Tensor, lam: float) -> tuple[Tensor, float]:
    """A Cᵀ [d, m] and cond(C_regᵀC_reg); by the R × R system (Woodbury) where C_reg has fewer rows
    than columns.
    """
    count, d = regularizer.shape
    wide = count < d
    if wide and lam == 0:
        raise UserError(
            "immunize.merge.lam",
            lam,
            f"{count} rows of regularisation cannot fix {d} dimensions; set it above 0 or "
            "take more captions.",
        )
    gram = regularizer @ regularizer.T if wide else regularizer.T @ regularizer
    spectrum = torch.linalg.eigvalsh(gram)
    condition = (
        float("inf") if wide or float(spectrum[0]) <= 0 else float(spectrum[-1] / spectrum[0])
    )
    gram.diagonal().add_(lam)
    low, failed = torch.linalg.cholesky_ex(gram)
    if int(failed) or (lam == 0 and condition > 1e15):
        raise UserError(
            "immunize.merge.lam",
            lam,
            f"C_regᵀC_reg is singular (condition {condition:.1e}); set it above 0 or take "
            "more varied captions.",
        )
    if not wide:
        return torch.cholesky_solve(rows.T, low), condition
    return (
        rows.T - regularizer.T @ torch.cholesky_solve(regularizer @ rows.T, low)
    ) / lam, condition


def factorize(inputs: Inputs, *, lam: float = 0.0, mu: float = 0.0) -> Factors:
    """The factors of the merge in float64, by two Cholesky factorisations.

    Args:
        lam: λ ≥ 0, Tikhonov term of the objective.
        mu: μ ≥ 0, softness of the constraint.

    Raises:
        UserError: C_regᵀC_reg + λI or C A Cᵀ + μI is singular.
    """
    number("immunize.merge.lam", lam, 0)
    number("immunize.merge.mu", mu, 0)
    concepts = [c.detach().double() for c in inputs.concepts]
    rows = torch.cat(concepts)
    solved, condition = _solve_regularizer(inputs.regularizer.detach().double(), rows, lam)
    inner = rows @ solved
    inner = (inner + inner.T) / 2
    spectrum = torch.linalg.eigvalsh(inner).clamp_min(0)
    tight = float(spectrum[-1] / spectrum[0]) if float(spectrum[0]) > 0 else float("inf")
    shares = spectrum[spectrum > 0] / spectrum.sum()
    inner.diagonal().add_(mu)
    low, failed = torch.linalg.cholesky_ex(inner)
    if int(failed) or (mu == 0 and tight > 1e13):
        raise UserError(
            "immunize.merge.mu",
            mu,
            f"C A Cᵀ is singular (condition {tight:.1e}, {len(rows)} rows in {rows.shape[1]} "
            "dimensions): the "
            "concepts' tokens contradict or repeat one another. A value above 0 asks for X "
            "Cᵀ = V only in the mean "
            "square, (1/μ)‖X Cᵀ − V‖²; or take fewer prompts.",
        )
    lefts = torch.cholesky_solve(solved.T, low)
    report = {
        "cond_regularizer": condition,
        "cond_constraint": tight,
        "effective_rank": float((-(shares * shares.log()).sum()).exp()),
        "rows": float(len(rows)),
    }
    parts = lefts.split([len(c) for c in concepts])
    unset = Factors(tuple(c.T.contiguous() for c in concepts), parts, inner, report)
    return unset.to(rows)
