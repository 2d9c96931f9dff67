"""The gradient of the upper level through merge and lower level (MIMA, arXiv 2412.15320), streamed
over concepts.

    J(θ) = mean_n upper_n(θ̂),    θ̂ = Merge(θ, θ'_1 … θ'_N),    θ'_n = lower level of concept n
    from θ g = Π_u [ v_dir + Σ_n J_nᵀ v_n ],    (v_dir, v_1 … v_N) = Mergeᵀ v,    v = ∇_θ̂ J

Three sweeps over the concepts: lower level, ∇J at θ̂, transpose of the lower level on the same
batches. Time is linear in N; memory is that of one concept (plus N thin traces where K > 1 and
``recompute`` is off).

Nothing here knows of diffusion: losses are callables over named parameters. Parameters are masters
in float32 or float64; a loss that computes in another dtype casts them itself
(`immunize.mima.losses.Denoiser`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from immunize.merge.closed_form import Merge, Params
from immunize.mima.implicit import Implicit, solve
from immunize.mima.inner_loop import Lower, LowerLevel, LowerLoss, Trace
from immunize.mima.products import Product, finite, gradients
from lab.core.distributed import ALONE, Team
from lab.core.errors import Diverged, UserError
from lab.core.options import choice, count

Method = Literal["exact", "truncated", "implicit", "first_order", "alternating"]
METHODS: tuple[Method, ...] = ("exact", "truncated", "implicit", "first_order", "alternating")
UpperLoss = Callable[[Params, int], Tensor]


@dataclass(frozen=True)
class Hypergradient:
    """One evaluation.

    Attributes:
        gradient: ∇J on the upper set; an optimizer *descends* it.
        merged: θ̂ (all names of θ). ``alternating`` continues from it: θ ← θ̂ first, then the step.
        upper_loss: J(θ̂).
        lower_drop: 1 − ℓ_0(θ'_n)/ℓ_0(θ) of each concept; nan where it was not measured.
        cosine: between this gradient and that of ``first_order``; nan if either is 0, or if they
            are one.
        info: ``constraint_residual`` of the merge; for ``implicit`` the solver's ``iterations``,
            ``residual`` and ``negative_curvature``, and the lower level's ``stationarity``, one per
            concept.
    """

    gradient: Params
    merged: Params
    upper_loss: float
    lower_drop: list[float]
    cosine: float
    info: dict[str, Any] = field(default_factory=dict)


def hypergradient(
    theta: Params,
    lower: Sequence[LowerLoss],
    upper: UpperLoss,
    merge: Merge,
    *,
    settings: Lower | Sequence[Lower],
    upper_names: Sequence[str],
    lower_names: Sequence[str],
    method: Method = "exact",
    last: int = 1,
    implicit: Implicit | None = None,
    product: Product = "reverse",
    recompute: bool = False,
    measure: bool = True,
    team: Team = ALONE,
) -> Hypergradient:
    """∇J at θ.

    Args:
        theta: masters of the upper and the lower set, name → tensor; left untouched.
        lower: per concept n, ``lower[n](params, k)``: its loss on the k-th inner batch, which has
            to be the same batch, noise and timesteps whenever k is the same. ``params`` has the
            names of ``theta``.
        upper: ``upper(params, n)``: the n-th term of J, e.g. −L + w·prior, capped or not.
        merge: of as many concepts.
        settings: the attacker, or one per concept.
        method: ``exact``; ``truncated`` differentiates the ``last`` steps; ``implicit`` puts
            (ρ/2)‖θ'−θ‖² into the lower level and solves (I + ∇²L(θ'_n)/ρ) a = v_n; ``first_order``
            drops the Hessian, which leaves v, since the transpose of the merge sums to the
            identity; ``alternating`` (the released behaviour) has the same v, but the merged
            weights replace θ without gradient, see `Hypergradient.merged`.
        product: how Hessian-vector products are taken, see `immunize.mima.products.product`.
        recompute: run the lower level again for the transpose in place of keeping N traces.
        measure: evaluate each concept's loss after its lower level (a third of a forward-backward
            each).
        team: processes that share the concepts; all of them call this with equal arguments and get
            equal results.

    Raises:
        UserError: names outside θ, as many losses as concepts missing, or an option that cannot
            work.
        Diverged: a loss or gradient is not finite.
    """
    choice("immunize.hypergradient.method", method, METHODS)
    count("immunize.hypergradient.last", last)
    choice("immunize.hypergradient.product", product, ("forward", "reverse"))
    run = _Run(theta, lower, upper, merge, settings, upper_names, lower_names, team)
    solver = implicit or Implicit() if method == "implicit" else None
    levels = run.levels(solver)
    keep = method in ("exact", "truncated") and not recompute
    traces = run.adapt(levels, keep=keep, final=solver is not None, measure=measure)
    v, value = run.upper_gradient()
    first = {x: v[x] for x in run.upper_names}
    info: dict[str, Any] = merge.residual()
    if method in ("first_order", "alternating"):
        gradient = first
    else:

        def transpose(n: int, part: Params) -> tuple[Params, dict[str, Any]]:
            if solver is not None:
                return solve(levels[n], traces[n].final, part, run.upper_names, solver, product)
            trace = levels[n].run(keep=True) if recompute else traces[n]
            steps = last if method == "truncated" else levels[n].settings.steps
            return levels[n].pull(trace, part, run.upper_names, last=steps, how=product), {}

        gradient, facts = run.transposed(v, transpose)
        for n in range(run.count):
            for key, fact in facts[n].items():
                info.setdefault(key, []).append(fact)
    if not finite(gradient.values()):
        raise Diverged("the hypergradient is not finite", 0)
    alike = float("nan") if gradient is first else cosine(gradient, first)
    return Hypergradient(gradient, run.merged, value, run.drop, alike, info)


def cosine(left: Params, right: Params) -> float:
    """Cosine of the angle between two sets of tensors with equal names; nan if either is 0."""
    dot = ll = rr = 0.0
    for name, x in left.items():
        a, b = x.double().flatten(), right[name].double().flatten()
        dot, ll, rr = dot + float(a @ b), ll + float(a @ a), rr + float(b @ b)
    return dot / (ll * rr) ** 0.5 if ll > 0 and rr > 0 else float("nan")


def _at(loss: UpperLoss, n: int, params: Params) -> Tensor:
    return loss(params, n)


class _Run:
    """The parts of one evaluation."""

    def __init__(
        self,
        theta: Params,
        lower: Sequence[LowerLoss],
        upper: UpperLoss,
        merge: Merge,
        settings: Lower | Sequence[Lower],
        upper_names: Sequence[str],
        lower_names: Sequence[str],
        team: Team,
    ) -> None:
        self.theta = {name: x.detach() for name, x in theta.items()}
        self.count, self.merge, self.upper, self.team = len(lower), merge, upper, team
        self.settings = [settings] * self.count if isinstance(settings, Lower) else list(settings)
        if not (self.count == merge.count == len(self.settings)):
            raise ValueError(
                f"{self.count} losses, {len(self.settings)} attackers, a merge of "
                f"{merge.count} concepts"
            )
        for key, names in (
            ("immunize.scope", upper_names),
            ("immunize.inner_loop.scope", lower_names),
        ):
            missing = [x for x in names if x not in theta]
            if missing or not names:
                raise UserError(
                    key, missing, "the set is empty or names parameters that theta does not hold."
                )
        self.upper_names, self.lower_names = list(upper_names), list(lower_names)
        self.losses = list(lower)
        self.before: list[float] = []
        self.drop: list[float] = []
        self.merged: Params = {}

    def levels(self, solver: Implicit | None) -> list[LowerLevel]:
        adapters = [s.adapter for s in self.settings if s.adapter is not None]
        if solver is not None and adapters:
            raise UserError(
                "immunize.inner_loop.rank",
                adapters[0].rank,
                "implicit needs a lower level that moves weights.",
            )
        rho = solver.rho if solver is not None else 0.0
        some = zip(self.settings, self.losses, strict=True)
        return [
            LowerLevel(s, self.theta, self.lower_names, loss, n, rho)
            for n, (s, loss) in enumerate(some)
        ]

    def adapt(
        self, levels: Sequence[LowerLevel], *, keep: bool, final: bool, measure: bool
    ) -> dict[int, Trace]:
        """First sweep: every lower level, merged as it ends; only what the transpose needs is kept,
        where it is.
        """
        traces: dict[int, Trace] = {}
        losses: dict[int, tuple[float, float]] = {}
        running = self.merge.start(self.theta)

        def one(n: int) -> Params:
            level = levels[n]
            trace = traces[n] = level.run(keep=keep)
            found = running.part(n, level.adapted(trace.final))
            losses[n] = trace.loss, level.loss_at(trace.final) if measure else float("nan")
            if not final and level.settings.adapter is None:
                trace.final = dict.fromkeys(
                    trace.final, torch.empty(0)
                )  # the transpose needs its names only
            return found

        self.team.reduce_in_order(self.count, one, running.put)
        pairs = [pair for _, pair in sorted(self.team.gather(losses).items())]
        self.before = [before for before, _ in pairs]
        self.drop = [1 - after / before if before else float("nan") for before, after in pairs]
        self.merged = running.finish()
        return traces

    def upper_gradient(self) -> tuple[Params, float]:
        """Second sweep: v = ∇J at θ̂, one backward pass per concept, and J."""
        v: Params = {}
        values: dict[int, float] = {}

        def one(n: int) -> Params:
            value, gradient = gradients(partial(_at, self.upper, n), self.merged)
            if not finite([value, *gradient.values()]):
                raise Diverged(f"the upper loss of concept {n} is not finite", 0)
            values[n] = float(value) / self.count
            return {x: g / self.count for x, g in gradient.items()}

        def add(_: int, part: Params) -> None:
            for x, g in part.items():
                v[x] = v[x] + g if x in v else g

        self.team.reduce_in_order(self.count, one, add)
        return v, sum(value for _, value in sorted(self.team.gather(values).items()))

    def transposed(
        self, v: Params, transpose: Callable[[int, Params], tuple[Params, dict[str, Any]]]
    ) -> tuple[Params, dict[int, dict[str, Any]]]:
        """Third sweep: v_dir + Σ_n J_nᵀ v_n on the upper set, and what ``transpose`` tells of each
        concept.
        """
        direct = self.merge.adjoint_direct(v)
        gradient = {x: direct[x] for x in self.upper_names}
        facts: dict[int, dict[str, Any]] = {}

        def one(n: int) -> Params:
            pulled, facts[n] = transpose(n, self.merge.adjoint_part(v, n))
            return pulled

        def add(_: int, pulled: Params) -> None:
            for x in gradient:
                gradient[x] = gradient[x] + pulled[x]

        self.team.reduce_in_order(self.count, one, add)
        return gradient, self.team.gather(facts)
