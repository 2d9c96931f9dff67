"""Merging concepts that were adapted separately: a fixed linear map in two thin factors per
concept.

For every matrix W ∈ R^{out×d} with input rows C_n (concept n) and C_reg (regularisation),

    Ŵ = argmin_X ‖X C_regᵀ − W C_regᵀ‖²_F + λ‖X − W‖²_F   s.t.  X Cᵀ = V,   V = [W_1 C_1ᵀ, …, W_N
      C_Nᵀ] = W + Σ_n (W_n − W) C_nᵀ B_n,    B = (C A Cᵀ + μI)⁻¹ C A,    A = (C_regᵀ C_reg + λI)⁻¹

(MIMA, arXiv 2412.15320; the constrained least squares of Custom Diffusion, arXiv 2212.04488,
written as an update). μ > 0 replaces the constraint by (1/μ)‖X Cᵀ − V‖²_F. The inputs are frozen,
so B is factored once, in float64, and a merge costs two thin products per matrix. Deviates from the
released code, which factors C_regᵀC_reg again for every layer at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from immunize.merge.factors import Factors
from lab.core.errors import UserError

Params = dict[str, Tensor]


class Weights(Protocol):
    """Learned merging weights of matrices (`immunize.merge.learned`): Ŵ = W + Σ_n M_n ⊙ (W_n −
    W).
    """

    def __contains__(self, name: object) -> bool: ...

    def weight(self, name: str, n: int) -> Tensor:
        """M_n, broadcastable to the parameter ``name``."""


class Merge:
    """θ̂ = Merge(θ, θ'_1 … θ'_N), affine in all its arguments.

    Matrices in ``members`` are merged in closed form, those that ``learned`` holds by learned
    weights, and everything else is the mean of the θ'_n. A name that an adapted dict leaves out did
    not move. Differentiable.

    Args:
        count: N ≥ 1 concepts.
        factors: group → factors of the matrices that read the same input.
        members: parameter name → group. Kernels [out, in, h, w] count as matrices [out, in·h·w].
        learned: weights of the rules ``masked`` and ``gated``, else None.

    Attributes:
        report: worst over groups of the figures of `Factors.report`, and after each merge
            ``constraint_residual``, ‖ŴCᵀ − V‖ ÷ ‖V − WCᵀ‖ over all matrices (0 where nothing
            moved).
    """

    def __init__(
        self,
        count: int,
        factors: Mapping[str, Factors] | None = None,
        members: Mapping[str, str] | None = None,
        learned: Weights | None = None,
    ) -> None:
        self.count, self.learned = count, learned
        self.factors, self.members = dict(factors or {}), dict(members or {})
        self._cast: dict[tuple[str, torch.dtype, torch.device], Factors] = {}
        self.report: dict[str, float] = {}
        for found in self.factors.values():
            for key, value in found.report.items():
                worst = min if key == "effective_rank" else max
                self.report[key] = worst(self.report.get(key, value), value)

    def residual(self) -> dict[str, float]:
        """``constraint_residual`` of the last merge, as something to log; empty without a closed
        form.
        """
        return {key: value for key, value in self.report.items() if key == "constraint_residual"}

    def factors_of(self, name: str, like: Tensor) -> Factors | None:
        """The factors that merge ``name``, in the dtype and on the device of ``like``; None outside
        the closed form.
        """
        group = self.members.get(name)
        if group is None:
            return None
        key = (group, like.dtype, like.device)
        if key not in self._cast:
            self._cast[key] = self.factors[group].to(like)
        return self._cast[key]

    def __call__(self, base: Params, adapted: Sequence[Params]) -> Params:
        """θ̂, with the names of ``base``."""
        running = self.start(base)
        for n, some in enumerate(adapted):
            running.add(n, some)
        return running.finish()

    def start(self, base: Params) -> Running:
        """A merge that takes the concepts one after the other, so that no two θ'_n need be kept."""
        return Running(self, base)

    # the transpose

    def adjoint(self, v: Params) -> tuple[Params, list[Params]]:
        """The transpose of the linear part: (∂/∂θ direct, [∂/∂θ'_n]) of ⟨v, Merge(θ, θ'_1 … θ'_N)⟩.

        The parts sum to ``v`` name by name, since the merge of N equal θ' and θ is θ itself.
        """
        return self.adjoint_direct(v), [self.adjoint_part(v, n) for n in range(self.count)]

    def adjoint_part(self, v: Params, n: int) -> Params:
        """v_n: v P_nᵀ in closed form, M_n ⊙ v for learned weights, v/N elsewhere."""
        return {name: self._part(name, x, n) for name, x in v.items()}

    def adjoint_direct(self, v: Params) -> Params:
        """v_dir = v − Σ_n v_n; exactly 0 where the merge is the mean."""
        direct: Params = {}
        for name, x in v.items():
            if name in self.members or (self.learned is not None and name in self.learned):
                direct[name] = x - sum(self._part(name, x, n) for n in range(self.count))
            else:
                direct[name] = torch.zeros_like(x)
        return direct

    def _part(self, name: str, x: Tensor, n: int) -> Tensor:
        factors = self.factors_of(name, x)
        if factors is not None:
            return ((x.flatten(1) @ factors.lefts[n].T) @ factors.rights[n].T).view_as(x)
        if self.learned is not None and name in self.learned:
            weight = self.learned.weight(name, n).to(x)
            return (
                weight * x if weight.dim() == 0 else (weight.flatten(1) * x.flatten(1)).view_as(x)
            )
        return x / self.count

    # adapters

    def adapters(
        self, adapters: Sequence[Mapping[str, tuple[Tensor, Tensor]]], scale: float = 1.0
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """LoRA adapters θ'_n = θ + s·B_n A_n merged into one of rank ≤ N r, without forming any
        product.

        Args:
            adapters: per concept, name → (A_n [r, d], B_n [out, r]).
            scale: s of all of them; the merged one has scale 1.

        Returns:
            name → (A [N r, d], B [out, N r]) with B A = Merge(0, s·B_n A_n).

        Raises:
            UserError: a matrix whose learned mask is no number: mask ⊙ BA has no low rank.
        """
        merged: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for n, some in enumerate(adapters):
            for name, (down, up) in some.items():
                factors = self.factors_of(name, down)
                if factors is not None:
                    down = (down @ factors.rights[n]) @ factors.lefts[n]
                elif self.learned is not None and name in self.learned:
                    weight = self.learned.weight(name, n)
                    if weight.numel() > 1:
                        raise UserError(
                            "immunize.merge.rule",
                            "masked",
                            "adapters merge by closed_form, mean or gated.",
                        )
                    down = down * weight.to(down).reshape(())
                else:
                    down = down / self.count
                merged.setdefault(name, []).append((scale * down, up))
        return {
            k: (torch.cat([d for d, _ in p]), torch.cat([u for _, u in p], 1))
            for k, p in merged.items()
        }


class Running:
    """A merge under way: thin U_n = (W_n − W) C_nᵀ [out, m_n] in closed form, a running sum
    elsewhere.
    """

    def __init__(self, merge: Merge, base: Params) -> None:
        self.merge, self.base = merge, base
        self.sums: Params = {}
        self.thin: dict[str, dict[int, Tensor]] = {}

    def add(self, n: int, adapted: Params) -> None:
        self.put(n, self.part(n, adapted))

    def part(self, n: int, adapted: Params) -> Params:
        """What concept n contributes: U_n in closed form, P_n (θ'_n − θ) elsewhere. Changes
        nothing.
        """
        found: Params = {}
        for name, value in adapted.items():
            change = value - self.base[name]
            factors = self.merge.factors_of(name, change)
            thin = None if factors is None else change.flatten(1) @ factors.rights[n]
            found[name] = self.merge._part(name, change, n) if thin is None else thin
        return found

    def put(self, n: int, part: Params) -> None:
        """Add what `part` gave for concept n, here or in another process."""
        for name, value in part.items():
            if self.merge.factors_of(name, self.base[name]) is not None:
                self.thin.setdefault(name, {})[n] = value
            else:
                self.sums[name] = self.sums[name] + value if name in self.sums else value

    def finish(self) -> Params:
        """θ̂; also writes ``constraint_residual`` into the merge's report."""
        merged: Params = {}
        missed = moved = torch.zeros(())
        for name, base in self.base.items():
            if name in self.thin:
                factors = self.merge.factors_of(name, base)
                assert factors is not None
                known = self.thin[name]
                empty = base.new_zeros(len(base), 0)
                parts = [
                    known[n] if n in known else empty.new_zeros(len(base), r.shape[1])
                    for n, r in enumerate(factors.rights)
                ]
                u = torch.cat(parts, 1)
                merged[name] = torch.addmm(base.flatten(1), u, torch.cat(factors.lefts)).view_as(
                    base
                )
                gap = u.detach() @ factors.error
                missed = missed + gap.double().square().sum().cpu()
                moved = moved + u.detach().double().square().sum().cpu()
            else:
                merged[name] = base + self.sums[name] if name in self.sums else base
        if self.thin:
            self.merge.report["constraint_residual"] = float(
                (missed / moved.clamp_min(1e-300)).sqrt()
            )
        return merged
