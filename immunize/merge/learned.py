"""Learned merging weights: Ŵ = W + Σ_n M_n ⊙ (W_n − W), all starting at the mean (M_n = 1/N).

Their parameters minimise Σ_n L(x_n; θ̂) on the lower level's batches and are constants in the
hypergradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from immunize.merge.closed_form import Merge, Params
from lab.core.errors import Diverged
from lab.core.seeding import generator

Mask = Literal["sparse", "low_rank"]
Kind = Literal["sparse", "low_rank", "gate"]


def block_of(name: str) -> str:
    """``down_blocks.1.attentions.0`` of a parameter's name; outside the blocks its first part."""
    parts = name.split(".")
    depth = {"down_blocks": 4, "up_blocks": 4, "mid_block": 3}.get(parts[0], 1)
    return ".".join(parts[:depth])


class Learned:
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
        kind: Kind = "gate",
        rank: int = 4,
        seed: int = 0,
    ) -> None:
        self.kind, self.names = kind, frozenset(shapes)
        self.parameters: dict[str, Tensor] = {}
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
        self.parameters = {key: x.detach() for key, x in self.parameters.items()}

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def weight(self, name: str, n: int) -> Tensor:
        """M_n of ``name``; a number for ``gate``. ``low_rank`` gives a matrix for kernels too."""
        if self.kind == "gate":
            return self.parameters[f"{n}/{block_of(name)}"]
        if self.kind == "sparse":
            return self.parameters[f"{n}/{name}"]
        return self.parameters[f"{n}/{name}/u"] @ self.parameters[f"{n}/{name}/v"].T

    def density(self) -> float:
        """Share of mask entries that are not 0."""
        sizes = sum(x.numel() for x in self.parameters.values())
        return sum(int((x != 0).sum()) for x in self.parameters.values()) / max(sizes, 1)

    def shrink(self, threshold: float) -> None:
        """The proximal step of ``threshold``·‖M‖₁ within [0, 1]; of ``sparse`` only."""
        if self.kind == "sparse":
            self.parameters = {
                key: (x - threshold).clamp(0, 1) for key, x in self.parameters.items()
            }


def learn(
    merge: Merge,
    base: Params,
    adapted: Sequence[Params],
    losses: Sequence[Callable[[Params], Tensor]],
    *,
    steps: int = 1,
    rate: float = 1e-2,
    sparsity: float = 0.0,
) -> list[float]:
    """Proximal Adam (zero state at each call) on ``Σ_n losses[n](θ̂)``, by the learned weights of
    ``merge``, in place.

    Args:
        base, adapted: θ and θ'_n, as `Merge` takes them.
        losses: of each concept at θ̂, the same batch at every call.
        sparsity: weight of the L1 norm of sparse masks.

    Returns:
        The sum of losses before each step and after the last.

    Raises:
        Diverged: a loss is not finite.
    """
    learned = merge.learned
    if not isinstance(learned, Learned):
        raise ValueError("the merge has no learned weights: rule must be masked or gated")
    history: list[float] = []
    m = {key: torch.zeros_like(x) for key, x in learned.parameters.items()}
    square = {key: torch.zeros_like(x) for key, x in learned.parameters.items()}
    for step in range(steps + 1):
        total, slope = _slope(merge, learned, base, adapted, losses)
        if total != total or total in (float("inf"), float("-inf")):
            raise Diverged(f"the merging weights diverged at step {step}", max(step - 1, 0))
        history.append(total)
        if step == steps:
            break
        for key, g in slope.items():
            m[key] = 0.9 * m[key] + 0.1 * g
            square[key] = 0.999 * square[key] + 0.001 * g.square()
            root = (square[key] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            learned.parameters[key] = (
                learned.parameters[key] - rate * m[key] / (1 - 0.9 ** (step + 1)) / root
            )
        learned.shrink(rate * sparsity)
    return history


def _slope(
    merge: Merge,
    learned: Learned,
    base: Params,
    adapted: Sequence[Params],
    losses: Sequence[Callable[[Params], Tensor]],
) -> tuple[float, Params]:
    """``Σ_n losses[n](θ̂)`` and its gradient by the learned weights."""
    fixed = learned.parameters
    with torch.enable_grad():
        learned.parameters = {key: x.detach().requires_grad_(True) for key, x in fixed.items()}
        leaves = learned.parameters
        try:
            merged = merge(base, adapted)
            # one backward per concept down to θ̂, then one through the merge: memory of one concept
            names = [name for name in merged if merged[name].requires_grad]
            total, v = 0.0, {name: torch.zeros_like(merged[name]) for name in names}
            for loss in losses:
                leaf = {
                    **merged,
                    **{name: merged[name].detach().requires_grad_(True) for name in names},
                }
                value = loss(leaf)
                found = torch.autograd.grad(
                    value, [leaf[x] for x in names], allow_unused=True, materialize_grads=True
                )
                total += float(value.detach())
                v = {x: v[x] + g for x, g in zip(names, found, strict=True)}
            pairing = torch.stack([(merged[x] * v[x]).sum() for x in names]).sum()
            slope = torch.autograd.grad(
                pairing, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
        finally:
            learned.parameters = fixed
    return total, dict(zip(leaves, slope, strict=True))
