"""Condition-number immunization of the keys and values of cross-attention (ours, after arXiv
2505.23760): does an ill-conditioned Hessian slow adapters of a text-to-image model?

Every key and value matrix W is a linear extractor θ = Wᵀ of rows of the text encoder. X_H are the
rows of prompts that name a target. Queries that an adapter trains on keys X_Hθ, and output matrices
that it trains on values X_Hθ, meet the Hessian H = θᵀX_HᵀX_Hθ; adapters of W itself do not. W moves
uphill on the log of the largest eigenvalue over the mean one, κ̄ = σ_1/σ̄, by steps of equal length,

    θ ← θ + η ‖θ_0‖ · g/‖g‖,   g = (I − UUᵀ) ∇_θ mean_n log κ̄(H_n),

U the directions that hold most of the energy of X_P, the rows of unrelated captions, so that
unrelated prompts keep their keys and values. κ̄ and not κ: the smallest eigenvalue of keys is below
1e-6 of the largest to begin with, and steps of equal length jump across its zero.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from immunize.kappa.spectral import feature_gradient, thin_factor
from immunize.merge.build import regularizer_rows, scope_names
from immunize.mima.outer_loop import naming_prompts
from lab.core.condition import leading_directions, singular_values
from lab.core.config import Count, Positive, PositiveShare, Text, config
from lab.core.data import ConceptCase, Kind
from lab.core.errors import Diverged
from lab.core.types import Checkpoint, Immunizer, Log
from lab.models.diffusion import DiffusionModel

_ROUNDING = 1e-12  # share of a gradient, in float64, that is rounding


@config
class KappaAttention(Immunizer[DiffusionModel, ConceptCase]):
    """Raises κ of every key and value matrix of cross-attention on the prompts of the targets.

    Logs ``dominance_harmful_ratio`` and ``dominance_benign_ratio``: κ̄ after ÷ before, geometric
    means over the matrices.

    Args:
        lr: η, the length of a step relative to θ_0. steps: number of steps.
        null_space: share of the energy of X_P whose directions stay as they are.
        prompts: prompts per target that give X_H.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"diffusion"})

    name: Text = "kappa_attention"
    lr: Positive
    steps: Count
    null_space: PositiveShare
    prompts: Count

    def __call__(
        self,
        model: DiffusionModel,
        case: ConceptCase,
        *,
        seed: int,
        checkpoint: Checkpoint | None,
        log: Log,
    ) -> DiffusionModel:
        """See `lab.core.types.Immunizer`."""
        prompts = [naming_prompts(model, target, self.prompts) for target in case.targets]
        harmful = [_triangular(regularizer_rows(model, texts)) for texts in prompts]
        benign = _triangular(regularizer_rows(model, case.regularizers))
        directions = leading_directions(benign, self.null_space)
        immunized = model.copy()
        weights = dict(immunized.unet.named_parameters())
        growth: dict[str, list[float]] = {"benign": [], "harmful": []}
        for name in scope_names(model.unet, "kv"):
            before = weights[name].detach().double().cpu().T
            after = self._train(before, harmful, directions)
            for role, matrices in (("benign", [benign]), ("harmful", harmful)):
                for x in matrices:
                    growth[role].append(math.log(dominance(x @ after) / dominance(x @ before)))
            with torch.no_grad():
                weights[name].copy_(after.T)
        means = {f"dominance_{k}_ratio": math.exp(sum(v) / len(v)) for k, v in growth.items()}
        log(self.steps, **means)
        return immunized

    def _train(self, theta: Tensor, harmful: list[Tensor], directions: Tensor) -> Tensor:
        length = self.lr * theta.norm()
        for step in range(self.steps):
            gradient = torch.zeros_like(theta)
            for x in harmful:
                factor = thin_factor(x @ theta)
                slope = -torch.ones_like(factor.sigma) / factor.sigma.sum()
                slope[0] += 1 / factor.sigma[0]
                gradient += x.T @ feature_gradient(factor, slope)
            whole = gradient.norm()
            gradient -= directions @ (directions.T @ gradient)
            norm = gradient.norm()
            if not norm > _ROUNDING * whole:  # also where one is not finite
                reason = f"the gradient has the norm {whole:g}, and {norm:g} in the null space"
                raise Diverged(reason, max(step - 1, 0))
            theta = theta + length * gradient / norm
        return theta


def dominance(y: Tensor) -> float:
    """Return κ̄: the largest eigenvalue of YᵀY over the mean of its d eigenvalues."""
    s = singular_values(y)
    return float(s[0].square() * y.shape[1] / s.square().sum())


def _triangular(x: Tensor) -> Tensor:
    """Return R [min(n, d), d] of the QR factors of ``x`` [n, d]: the same Gram matrix."""
    return torch.linalg.qr(x.double().cpu()).R
