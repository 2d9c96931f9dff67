"""The best linear immunizers in closed form (docs/reference/methods.md §2.1, own result): one
decomposition each.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from immunize.kappa.trainer import immunization_row
from lab.core.condition import (
    condition_number,
    numerical_rank,
    outside_energy,
    range_basis,
    rir_bound,
)
from lab.core.config import Positive, Text, config
from lab.core.data import Case, Kind
from lab.core.errors import UserError
from lab.core.types import Checkpoint, FeatureModel, Immunizer, Log


@config
class KappaClosedForm(Immunizer):
    """θ = c·K_P^{-1/2} M^{s/2}, M = K_P^{-1/2} K_H K_P^{-1/2}: attains RIR* =
    κ(M)·κ(H_P(θ_0))/κ(H_H(θ_0)).

    Every s ≥ 0 attains it, since κ(H_P) = κ(M)^s and κ(H_H) = κ(M)^{1+s}: RIR alone does not say
    which task changes. s = 0 whitens the benign task, which then learns in one step, while the
    harmful one hardly changes. With ``benign_condition`` b, s is chosen such that κ(H_P) =
    b·κ(H_P(θ_0)): b = 1 leaves the benign conditioning as it was and the harmful side takes the
    whole of RIR*.

    One decomposition: K_P = W S² Wᵀ from the singular values of X_P, so that nothing is squared.
    The scalar c keeps the mean square of the benign features at θ_0's; κ does not see it.

    A singular K_P gives the ``range`` variant: data and θ are reduced to range(K_P) (θ = W S⁻¹ Wᵀ,
    the pseudo-inverse square root, features have rank r), and the share of harmful energy outside
    is logged as ``outside_energy``. RIR and its share of the bound are then those of the reduced
    data. With several harmful tasks K_H is the mean of theirs, each scaled to trace 1 (s = 0
    depends on K_P alone); logged is the least immunized one. Directions of M without harmful energy
    count as its smallest positive eigenvalue.

    Args:
        benign_condition: b > 0, or None for s = 0.
        rank_tolerance: relative to σ_max(X_P); None for max(n, d)·ε.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"linear"})

    name: Text = "kappa_closed_form"
    benign_condition: Positive | None = None
    rank_tolerance: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = None

    def __call__(
        self, model: FeatureModel, case: Case, *, seed: int, checkpoint: Checkpoint | None, log: Log
    ) -> FeatureModel:
        result = model.copy()
        weight = next(result.parameters())
        benign, *harmful = (model.inputs(task.train.x) for task in case.tasks)
        theta0 = weight.detach().clone()
        basis, s = range_basis(benign, self.rank_tolerance)
        if len(s) < 2:
            raise UserError(
                "scenario", case.name, f"the benign data have rank {len(s)}; κ needs at least 2"
            )
        theta = (basis / s) @ self._tilt(basis / s, benign @ theta0, harmful) @ basis.T
        theta *= (benign @ theta0).norm() / (benign @ theta).norm()
        outside = max(outside_energy(x, basis) for x in harmful)
        maps = [theta0, theta]
        if len(s) < benign.shape[1]:  # the reduced problem: X W and Wᵀθ
            benign, *harmful = (x @ basis for x in (benign, *harmful))
            maps = [basis.T @ theta0, basis.T @ theta]
        bounds = [rir_bound(benign, x, maps[0]).value for x in harmful]
        kappas = [[condition_number(x @ t) for x in (benign, *harmful)] for t in maps]
        for step, after in enumerate(kappas):
            log(step, outside_energy=outside, **immunization_row(after, kappas[0], bounds))
        with torch.no_grad():
            weight.copy_(theta)
        return result

    def _tilt(
        self, whitener: torch.Tensor, before: torch.Tensor, harmful: list[torch.Tensor]
    ) -> torch.Tensor:
        """M^{s/2} [r, r] in whitened coordinates, from the singular values of the whitened harmful
        data.
        """
        if self.benign_condition is None:
            return torch.eye(whitener.shape[1], dtype=whitener.dtype)
        whitened = torch.cat([x @ whitener / x.norm() for x in harmful])
        _, m, vt = torch.linalg.svd(whitened, full_matrices=True)
        rank = numerical_rank(m, whitened.shape)
        values = torch.full((vt.shape[0],), float(m[rank - 1]), dtype=m.dtype)
        values[:rank] = m[:rank]
        spread = 2 * math.log(float(values[0] / values[-1]))
        target = math.log(max(self.benign_condition * condition_number(before), 1.0))
        if spread < 1e-9:
            raise UserError(
                "scenario", "κ(M)", "is 1: no linear map can tell the two tasks apart (RIR* = 1)."
            )
        return (vt.T * (values / values[0]) ** (target / spread)) @ vt
