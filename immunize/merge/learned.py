"""Learned merging weights: Ŵ = W + Σ_n M_n ⊙ (W_n − W), all starting at the mean (M_n = 1/N).

Their parameters minimise Σ_n L(x_n; θ̂) on the inner loop's batches and are constants in the
hypergradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from immunize.gradients import Params, accumulate, gradient_at
from lab.core.errors import Diverged
from lab.core.seeding import generator

MapKind = Literal["sparse", "low_rank", "gate"]


def block_of(name: str) -> str:
    """Return ``down_blocks.1.attentions.0`` of a parameter's name; outside the blocks its first
    part.
    """
    parts = name.split(".")
    depth = {"down_blocks": 4, "up_blocks": 4, "mid_block": 3}.get(parts[0], 1)
    return ".".join(parts[:depth])


class LearnedWeights:
    """Parameters of the rules ``masked`` and ``gated``.

    Args:
        shapes: parameter name → a tensor of its shape, dtype and device.
        concepts: N.
        kind: ``sparse``, an entry in [0, 1] per weight with soft thresholding (exact zeros);
            ``low_rank``, M_n = U Vᵀ over the weight seen as a matrix; ``gate``, one number per
            block (learned averaging, in the manner of AdaMerging, arXiv 2310.02575).
        rank, seed: of ``low_rank``.
    """

    def __init__(
        self,
        shapes: Mapping[str, Tensor],
        concepts: int,
        kind: MapKind = "gate",
        rank: int = 4,
        seed: int = 0,
    ) -> None:
        self.kind, self.names = kind, frozenset(shapes)
        self.parameters: Params = {}
        for name, like in shapes.items():
            for n in range(concepts):
                key = f"{n}/{block_of(name) if kind == 'gate' else name}"
                if kind == "gate":
                    self.parameters.setdefault(key, like.new_full((), 1 / concepts))
                elif kind == "sparse":
                    self.parameters[key] = torch.full_like(like, 1 / concepts)
                else:
                    rows, columns = like.flatten(1).shape
                    u = torch.randn(rows, rank, generator=generator(seed, "mask", key)).to(like)
                    v = like.new_zeros(columns, rank)
                    u[:, 0], v[:, 0] = 1, 1 / concepts
                    self.parameters |= {f"{key}/u": u, f"{key}/v": v}

    def weight(self, name: str, n: int) -> Tensor:
        """Return M_n of ``name``; a number for ``gate``, a matrix for ``low_rank`` kernels too."""
        if self.kind == "gate":
            return self.parameters[f"{n}/{block_of(name)}"]
        if self.kind == "sparse":
            return self.parameters[f"{n}/{name}"]
        return self.parameters[f"{n}/{name}/u"] @ self.parameters[f"{n}/{name}/v"].T

    def density(self) -> float:
        """Return the share of mask entries that are not 0."""
        sizes = sum(x.numel() for x in self.parameters.values())
        return sum(int((x != 0).sum()) for x in self.parameters.values()) / max(sizes, 1)


def learn(
    learned: LearnedWeights,
    merge: Callable[[Params, Sequence[Params]], Params],
    base: Params,
    adapted: Sequence[Params],
    losses: Sequence[Callable[[Params], Tensor]],
    *,
    steps: int = 1,
    lr: float = 1e-2,
    sparsity: float = 0.0,
) -> None:
    """Minimise Σ_n losses[n](θ̂) by proximal Adam (zero state at each call), in place.

    Args:
        merge: the merge whose weights ``learned`` are.
        base, adapted: θ and θ'_n, as `merge` takes them.
        losses: of each concept at θ̂, the same batch at every call.
        sparsity: weight of the L1 norm of sparse masks, which stay within [0, 1].

    Raises:
        Diverged: a loss is not finite.
    """
    leaves = {key: x.clone().requires_grad_() for key, x in learned.parameters.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=lr)
    for step in range(steps):
        learned.parameters = leaves
        with torch.enable_grad():
            total, gradient = _gradient(leaves, merge(base, adapted), losses)
        learned.parameters = {key: x.detach() for key, x in leaves.items()}
        if not math.isfinite(total):
            raise Diverged(f"the merging weights diverged at step {step}", max(step - 1, 0))
        for leaf, slope in zip(leaves.values(), gradient, strict=True):
            leaf.grad = slope
        optimizer.step()
        if learned.kind == "sparse":
            for weights in learned.parameters.values():
                weights.sub_(lr * sparsity).clamp_(0, 1)


def _gradient(
    leaves: Params, merged: Params, losses: Sequence[Callable[[Params], Tensor]]
) -> tuple[float, tuple[Tensor, ...]]:
    """Return Σ_n losses[n](θ̂) and its gradient by the learned weights.

    One backward pass per concept down to θ̂, then one through the merge: memory of one concept.
    """
    names = [name for name, x in merged.items() if x.requires_grad]
    total, v = 0.0, Params()
    for loss in losses:
        value, slopes = gradient_at(loss, merged, merged, names)
        total += value
        accumulate(v, slopes)
    outputs = [merged[name] for name in names]
    return total, torch.autograd.grad(
        outputs, list(leaves.values()), list(v.values()), materialize_grads=True
    )
