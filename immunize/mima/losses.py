"""Terms of the upper and the lower level as functions of named weights, and their first-order
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from immunize.mima.sampling import Batch, cast
from lab.models.diffusion import DiffusionModel

Params = dict[str, Tensor]
Weights = Mapping[str, Tensor]
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Denoiser:
    """The U-Net that is being immunized, and θ, the masters of its weights in float32 or float64.

    In the masters' own precision ``theta`` are the U-Net's parameters themselves. In ``bfloat16``
    the U-Net is a copy of θ that `sync` refreshes; weights are cast on the way in, gradients and
    losses are the masters'. (Not autocast: forward-mode products do not work under it.)
    """

    model: DiffusionModel
    theta: Params

    def sync(self, names: Sequence[str]) -> None:
        """Give the U-Net the current values of ``names``, which later losses use where they are not
        told others.
        """
        own = dict(self.model.unet.named_parameters())
        with torch.no_grad():
            for name in names:
                if own[name] is not self.theta[name]:
                    own[name].copy_(self.theta[name])

    def predict(self, batch: Batch, weights: Weights) -> tuple[Tensor, Tensor]:
        """The prediction for a batch and what it should have been. Names missing in ``weights``:
        the U-Net's own.
        """
        noisy, target = self.model.noised(batch.z, batch.noise, batch.t)
        dtype = self.model.dtype
        here = {name: w.to(dtype) for name, w in weights.items()}
        return self.model.predict(noisy.to(dtype), batch.t, cast(batch.text, dtype), here).to(
            noisy.dtype
        ), target

    def loss(self, batch: Batch, weights: Weights) -> Tensor:
        """Mean diffusion loss L(x, c; weights), a scalar."""
        guess, target = self.predict(batch, weights)
        return (guess - target).square().mean()


def capped(loss: Tensor, cap: float | None) -> Tensor:
    """min(loss, cap): once the concept is as badly denoised as ``cap`` says, its term has no
    gradient any more.

    Without the cap the upper loss runs away and takes unrelated concepts along.
    """
    return loss if cap is None else loss.clamp(max=cap)


def gradient_at(
    function: Callable[[Weights], Tensor], theta: Params, point: Weights, names: Sequence[str]
) -> tuple[float, Params]:
    """Value and first-order gradient for ``names`` at θ with ``point``'s entries in its place."""
    weights = {name: value.detach() for name, value in point.items()}
    leaves = {
        name: weights.get(name, theta[name]).detach().clone().requires_grad_() for name in names
    }
    value = function({**weights, **leaves})
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return float(value.detach()), {
        n: torch.zeros_like(w) if g is None else g for (n, w), g in pairs
    }


def accumulate(total: Params, gradient: Weights, factor: float) -> None:
    """total += factor · gradient, in place; names that ``total`` lacks are added."""
    for name, value in gradient.items():
        if name in total:
            total[name].add_(value, alpha=factor)
        else:
            total[name] = value * factor
