"""One harmful task against the benign task of its case: κ in both models, RIR and its bound."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lab.core.condition import Bound, numerical_rank, rank_tolerance, singular_values
from lab.core.types import BASELINE


@dataclass
class Kappa:
    """κ of one feature matrix: mean over groups of rows, their relative spread and the numerical
    rank.
    """

    value: float
    spread: float = 0.0
    rank: int = 0


def kappa_of(x: Tensor) -> Kappa:
    """κ(XᵀX) over the numerical rank and that rank, of features [n, d] by one decomposition.

    Raises:
        ValueError: numbers that are not finite, or a zero matrix.
    """
    s = singular_values(x)
    rank = (
        numerical_rank(s, x.shape, rank_tolerance(x.shape, x.dtype))
        if bool(s.isfinite().all())
        else 0
    )
    if rank == 0:
        raise ValueError("κ needs finite features that are not all zero")
    return Kappa(float((s[0] / s[rank - 1]) ** 2), rank=rank)


@dataclass
class Pair:
    """One harmful task against the benign task of its case, in one seed; κ per model."""

    case: str
    seed: int
    benign: str
    task: str
    kappa_benign: dict[str, Kappa]
    kappa_harmful: dict[str, Kappa]
    rir: float | None = None
    reason: str | None = None  # why there is no RIR although both models were run
    bound: Bound | None = None

    def rank_moves(self) -> list[str]:
        """Per Hessian whose numerical rank differs between the models, its role and ranks before
        and after.
        """
        out = []
        for role, kappa in (("benign", self.kappa_benign), ("harmful", self.kappa_harmful)):
            before, after = (
                kappa[BASELINE].rank,
                next((k.rank for a, k in kappa.items() if a != BASELINE), None),
            )
            if after is not None and before != after:
                out.append(f"{role} {before} → {after}")
        return out

    def ratio(self, role: str) -> float:
        """κ after ÷ κ before."""
        kappa: dict[str, Kappa] = self.kappa_benign if role == "benign" else self.kappa_harmful
        before, after = (
            kappa[BASELINE].value,
            next(k.value for model_name, k in kappa.items() if model_name != BASELINE),
        )
        return after / before

    @property
    def bound_ratio(self) -> float | None:
        if self.rir is None or self.bound is None or self.bound.value is None:
            return None
        return self.rir / self.bound.value
