"""Elementary quantities as `torchmetrics.Metric` subclasses: validated input, stated range, exact
empty-set error.

They accumulate in float64 on CPU, for whoever logs with torchmetrics. The run metrics of this
package call the same functions directly, since torchmetrics takes seconds to import.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from eval.features.formulas import rfd, sgrc
from lab.core.condition import (
    DEFINITIONS,
    Definition,
    condition_number,
    relative_immunization_ratio,
)


class _Mean(Metric):
    """Mean of the values that ``update`` adds; float64; a mean over nothing is an error."""

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _add(self, value: float) -> None:
        if not torch.isfinite(torch.tensor(value, dtype=torch.float64)):
            raise ValueError(f"{type(self).__name__} needs finite values, got {value}")
        self.total += value
        self.count += 1

    def compute(self) -> Tensor:
        if int(self.count) == 0:
            raise ValueError(f"{type(self).__name__}: a metric over an empty set")
        return self.total / self.count


class ConditionNumber(_Mean):
    """κ(XᵀX), averaged over the feature matrices given. Range [1, ∞).

    Higher or lower is better depending on the task's role, so ``higher_is_better`` is None.

    Args:
        definition: see `lab.core.condition.condition_number`.
        ridge: λ of the ``ridge`` definition.
    """

    higher_is_better = None

    def __init__(self, definition: Definition = "rank", ridge: float = 0.0) -> None:
        super().__init__()
        if definition not in DEFINITIONS:
            raise ValueError(
                f"definition must be one of {', '.join(DEFINITIONS)}, got {definition!r}"
            )
        self.definition: Definition = definition
        self.ridge = ridge

    def update(self, features: Tensor) -> None:
        """``features`` [n, d]."""
        self._add(condition_number(features, self.definition, ridge=self.ridge))


class RelativeImmunizationRatio(_Mean):
    """RIR = [κ_H(θ_I)/κ_H(θ_0)] / [κ_P(θ_I)/κ_P(θ_0)] (arXiv 2505.23760, Eq. 5), averaged. Range
    (0, ∞).
    """

    higher_is_better = True

    def update(
        self, harmful_after: float, harmful_before: float, benign_after: float, benign_before: float
    ) -> None:
        """Four condition numbers, each ≥ 1."""
        self._add(
            relative_immunization_ratio(harmful_after, harmful_before, benign_after, benign_before)
        )


class SGRC(_Mean):
    """`eval.features.formulas.sgrc`, averaged."""

    higher_is_better = None

    def update(self, baseline: float, immunized: float) -> None:
        """Two accuracies in [0, 1]; the baseline's must be above 0."""
        self._add(sgrc(baseline, immunized))


class RFD(_Mean):
    """`eval.features.formulas.rfd`, averaged over runs.

    Args:
        signed: drop the absolute value.
        smallest: points where the base performance lies below this are left out, as the quotient
            explodes.
    """

    higher_is_better = None

    def __init__(self, signed: bool = False, smallest: float = 0.05) -> None:
        super().__init__()
        if smallest <= 0:
            raise ValueError(f"smallest must be > 0, got {smallest}")
        self.signed = signed
        self.smallest = smallest

    def update(self, base: Tensor, immunized: Tensor) -> None:
        """Two performance curves (higher is better) on one grid of steps [E]."""
        self._add(rfd(base, immunized, self.signed, self.smallest))
