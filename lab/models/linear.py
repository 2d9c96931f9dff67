"""The linear feature extractor of KAPPA (arXiv 2505.23760 §3): features = x θ, θ [d, d] float64."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lab.core.config import Text, config
from lab.core.data import Case, Kind
from lab.core.errors import UserError
from lab.core.seeding import generator
from lab.core.types import Backbone, FeatureModel


class LinearMap(nn.Module):
    """x ↦ x θ with ``weight`` θ [d, e]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.weight.dtype) @ self.weight


class LinearExtractor(FeatureModel):
    """θ as a `FeatureModel` of one block; H(θ) = θᵀXᵀXθ."""

    kind: ClassVar[Kind] = "linear"

    def __init__(self, weight: Tensor) -> None:
        super().__init__(
            [("theta", LinearMap(weight.to(torch.float64)))], feature_dim=int(weight.shape[1])
        )

    def inputs(self, x: Tensor) -> Tensor:
        return x.to(torch.float64).flatten(1)

    @property
    def theta(self) -> Tensor:
        """θ [d, d] (the parameter itself)."""
        return next(self.blocks[0].parameters())


@config
class LinearBackbone(Backbone[LinearExtractor, Case]):
    """Builds θ_0 as wide as the case's inputs.

    Args:
        init: ``identity`` (the paper's RIR is against θ_0 = I) or ``random``, uniform in ±1/√d as
            the released code starts its layer. The release's layer also has a bias; left out here,
            since with a bias H is no longer θᵀXᵀXθ and neither the gradients of Alg. 1 nor the
            bound apply.
    """

    kind: ClassVar[Kind] = "linear"
    name: Text = "linear"
    init: Literal["identity", "random"] = "identity"

    def build(self, case: Case, seed: int) -> LinearExtractor:
        """Return θ_0 [d, d]; raises `UserError` for images."""
        x = case.benign.train.x
        if not x.is_floating_point() and x.ndim > 2:
            fix = f"needs rows of numbers; the scenario gives images {list(x.shape)}."
            raise UserError("backbone", self.name, fix)
        d = x[0].numel()
        if self.init == "identity":
            return LinearExtractor(torch.eye(d, dtype=torch.float64))
        rng = generator(seed, "linear-init", case.name)
        return LinearExtractor(
            (2 * torch.rand(d, d, dtype=torch.float64, generator=rng) - 1) / d**0.5
        )
