"""One harmful task against the benign task of its case: κ in both arms, RIR and its bound."""

from __future__ import annotations

from dataclasses import dataclass

from lab.condition import Bound
from lab.types import CONTROL


@dataclass
class Kappa:
    """κ of one feature matrix: mean over groups of rows, their relative spread and the numerical rank."""

    value: float
    spread: float = 0.0
    rank: int = 0


@dataclass
class Pair:
    """One harmful task against the benign task of its case, in one seed; κ per arm."""

    case: str
    seed: int
    benign: str
    task: str
    kappa_benign: dict[str, Kappa]
    kappa_harmful: dict[str, Kappa]
    rir: float | None = None
    bound: Bound | None = None

    def ratio(self, role: str) -> float:
        """κ after ÷ κ before."""
        kappa: dict[str, Kappa] = self.kappa_benign if role == "benign" else self.kappa_harmful
        before, after = kappa[CONTROL].value, next(k.value for arm, k in kappa.items() if arm != CONTROL)
        return after / before

    @property
    def bound_ratio(self) -> float | None:
        if self.rir is None or self.bound is None or self.bound.value is None:
            return None
        return self.rir / self.bound.value
