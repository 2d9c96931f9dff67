"""The gradient of the outer loop through merge and inner loop (MIMA, arXiv 2412.15320), streamed
over concepts.

    J(θ) = mean_n outer_n(θ̂),    θ̂ = Merge(θ, θ'_1 … θ'_N)
    g = Π_u [ v_dir + Σ_n J_nᵀ v_n ],    (v_dir, v_1 … v_N) = Mergeᵀ v,    v = ∇_θ̂ J

where θ'_n is what the inner loop of concept n makes of θ, and J_n its derivative by θ.

Three sweeps over the concepts: inner loop, ∇J at θ̂, transpose of the inner loop on the same
batches. Time is linear in N; memory is that of one concept (plus N thin traces where K > 1 and
``recompute`` is off).

``implicit`` differentiates a proximal inner loop (iMAML, arXiv 1909.04630):
θ' = argmin_φ L(φ) + (ρ/2)‖φ − θ‖² on the inner set, the rest of the parameters staying at θ:

    ∂⟨v, θ'⟩ by the inner set = a,    (I + ∇²_ll L(θ')/ρ) a = v_l
    ∂⟨v, θ'⟩ by the rest = v_o − ∇²_ol L(θ') a / ρ

Nothing here knows of diffusion: losses are callables over named parameters. Parameters are masters
in float32 or float64; a loss that computes in another dtype casts them itself
(`immunize.mima.outer_loop.Denoiser`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from immunize.gradients import Params, accumulate, compute_gradients, hessian_product, is_finite
from immunize.merge.closed_form import Merge, MergeAccumulator
from immunize.mima.inner_loop import InnerLoop, Trace
from lab.core.config import Count, Flag, Positive, options
from lab.core.distributed import ALONE, Team
from lab.core.errors import Diverged
from lab.core.solvers import Solution, axpy, conjugate_gradients, dot

OuterLoss = Callable[[Params, int], Tensor]


@options
class HypergradientOptions:
    """How the gradient passes the inner loop.

    Args:
        method: ``exact``; ``truncated`` differentiates the ``last`` steps; ``implicit`` puts
            (ρ/2)‖θ'−θ‖² into the inner loop and solves (I + ∇²L(θ'_n)/ρ) a = v_n; ``first_order``
            drops the Hessian, which leaves v, since the transpose of the merge sums to the
            identity; ``alternating`` (the released behaviour) has the same v, but the merged
            weights replace θ without gradient, see `HypergradientResult.merged`.
        recompute: run the inner loop again for the transpose in place of keeping N traces.
        rho: ρ. The inner loop has one solution where ρ exceeds the negative curvature of L.
        solver: ``cg`` | ``neumann`` (converges where ‖∇²L‖ < ρ).
        iterations: at most; each costs one Hessian-vector product, and one more ends the solution.
        tolerance: at which the solver stops, ‖residual‖ ÷ ‖v‖.
        compare_own: log ``cosine_own``, between this gradient and that of mean_n outer_n(θ'_n), the
            loss of attackers who adapt alone and never merge. Takes half as long again.
    """

    method: Literal["exact", "truncated", "implicit", "first_order", "alternating"] = "exact"
    last: Count = 1
    recompute: Flag = False
    rho: Positive = 0.05
    solver: Literal["cg", "neumann"] = "cg"
    iterations: Count = 10
    tolerance: Positive = 1e-6
    compare_own: Flag = False

    @model_validator(mode="after")
    def _check_comparison(self) -> HypergradientOptions:
        if self.compare_own and (self.method != "exact" or self.recompute):
            raise ValueError("compare_own needs method=exact and recompute=false")
        return self


@dataclass(frozen=True)
class HypergradientResult:
    """One evaluation.

    Attributes:
        gradient: ∇J on the outer set; an optimizer *descends* it.
        merged: θ̂ (all names of θ). ``alternating`` continues from it: θ ← θ̂ first, then the step.
        inner_loop_drop: 1 − ℓ_0(θ'_n)/ℓ_0(θ) of each concept; nan where ℓ_0(θ) is 0.
        cosine: between this gradient and that of ``first_order``; nan if either is 0, or if they
            are one.
        info: ``constraint_residual`` of the merge; ``cosine_own`` on request; for ``implicit`` the
            solver's ``iterations``, ``residual`` and ``negative_curvature``, and the inner loop's
            ``stationarity``, one per concept.
    """

    gradient: Params
    merged: Params
    inner_loop_drop: list[float]
    cosine: float
    info: dict[str, Any] = field(default_factory=dict)


def hypergradient(
    theta: Params,
    inner: Sequence[InnerLoop],
    outer: OuterLoss,
    merge: Merge,
    outer_names: Sequence[str],
    options: HypergradientOptions,
    *,
    team: Team = ALONE,
) -> HypergradientResult:
    """Compute ∇J at θ.

    Args:
        theta: masters of the outer and the inner set, name → tensor, without gradient; left
            untouched.
        inner: the inner loop of each concept, from ``theta``; those of ``implicit`` have its ρ.
        outer: ``outer(params, n)``: the n-th term of J, e.g. −L + w·prior, capped or not.
        merge: of as many concepts.
        outer_names: the outer set.
        team: processes that share the concepts; all of them call this with equal arguments and get
            equal results.

    Raises:
        Diverged: a loss or gradient is not finite.
    """
    method = options.method
    keep = method in ("exact", "truncated") and not options.recompute
    traces, merged, drop = _adapt(theta, inner, merge, team, keep, keep_final=options.compare_own)
    own: Params = {}
    if options.compare_own:  # before J, whose losses `outer` may note
        own = _own_gradient(inner, traces, outer, outer_names, team)
    v = _outer_gradient(outer, merged, len(inner), team)
    first = gradient = {x: v[x] for x in outer_names}
    info, cosine = dict[str, Any](merge.residual()), float("nan")
    if method not in ("first_order", "alternating"):
        gradient, facts = _transpose(inner, traces, v, outer_names, merge, options, team)
        info |= {key: [facts[n][key] for n in range(len(inner))] for key in facts[0]}
        cosine = compute_cosine(gradient, first)
    if options.compare_own:
        info["cosine_own"] = compute_cosine(gradient, own)
    if not is_finite(gradient.values()):
        raise Diverged("the hypergradient is not finite", 0)
    return HypergradientResult(gradient, merged, drop, cosine, info)


def compute_cosine(left: Params, right: Params) -> float:
    """Return the cosine of the angle between two sets of tensors with equal names; nan if either is
    0.
    """
    size = (dot(left, left) * dot(right, right)) ** 0.5
    return dot(left, right) / size if size > 0 else float("nan")


def _adapt(
    theta: Params,
    inner: Sequence[InnerLoop],
    merge: Merge,
    team: Team,
    keep: bool,
    *,
    keep_final: bool = False,
) -> tuple[dict[int, Trace], Params, list[float]]:
    """First sweep: run every inner loop, merged as it ends. Return what the transpose needs, θ̂ and
    the drops of the losses.
    """
    traces: dict[int, Trace] = {}
    losses: dict[int, tuple[float, float]] = {}
    accumulator = MergeAccumulator(merge, theta)

    def compute(n: int) -> Params:
        problem = inner[n]
        trace = traces[n] = problem.run(keep=keep)
        with torch.no_grad():
            losses[n] = trace.loss, float(problem.objective(0, {}, trace.final))
        part = accumulator.contribution(n, problem.adapted(trace.final))
        if not (problem.rho or keep_final) and problem.settings.rank is None:
            # the transpose needs its names only
            trace.final = dict.fromkeys(trace.final, torch.empty(0))
        return part

    team.reduce_in_order(len(inner), compute, accumulator.add)
    pairs = [pair for _, pair in sorted(team.gather(losses).items())]
    drop = [1 - after / before if before else float("nan") for before, after in pairs]
    return traces, accumulator.finish(), drop


def _outer_gradient(outer: OuterLoss, merged: Params, count: int, team: Team) -> Params:
    """Second sweep: v = ∇J at θ̂, one backward pass per concept."""
    v: Params = {}

    def compute(n: int) -> Params:
        value, gradient = compute_gradients(lambda params: outer(params, n), merged)
        if not is_finite([value, *gradient.values()]):
            raise Diverged(f"the outer loss of concept {n} is not finite", 0)
        return {x: g / count for x, g in gradient.items()}

    team.reduce_in_order(count, compute, lambda _, part: accumulate(v, part))
    return v


def _own_gradient(
    inner: Sequence[InnerLoop],
    traces: dict[int, Trace],
    outer: OuterLoss,
    names: Sequence[str],
    team: Team,
) -> Params:
    """Return the gradient of Σ_n outer_n(θ'_n) on the outer set."""
    total: Params = {}

    def compute(n: int) -> Params:
        problem, trace = inner[n], traces[n]
        own = {**problem.theta, **problem.adapted(trace.final)}
        _, v = compute_gradients(lambda params: outer(params, n), own)
        return problem.pull(trace, v, names, last=problem.settings.steps)

    team.reduce_in_order(len(inner), compute, lambda _, part: accumulate(total, part))
    return total


def _transpose(
    inner: Sequence[InnerLoop],
    traces: dict[int, Trace],
    v: Params,
    names: Sequence[str],
    merge: Merge,
    options: HypergradientOptions,
    team: Team,
) -> tuple[Params, dict[int, dict[str, Any]]]:
    """Third sweep: v_dir + Σ_n J_nᵀ v_n on the outer set, and the facts of each concept."""
    direct = merge.adjoint_direct(v)
    gradient = {x: direct[x].clone() for x in names}
    facts: dict[int, dict[str, Any]] = {}

    def compute(n: int) -> Params:
        part = merge.adjoint_part(v, n)
        if options.method == "implicit":
            pulled, facts[n] = solve_implicit(inner[n], traces[n].final, part, names, options)
            return pulled
        facts[n] = {}
        trace = inner[n].run(keep=True) if options.recompute else traces[n]
        last = options.last if options.method == "truncated" else inner[n].settings.steps
        return inner[n].pull(trace, part, names, last=last)

    team.reduce_in_order(len(inner), compute, lambda _, pulled: accumulate(gradient, pulled))
    return gradient, team.gather(facts)


# ── implicit differentiation


def neumann_series(
    apply: Callable[[Params], Params], v: Params, iterations: int, tolerance: float
) -> Solution:
    """Return Σ_j (−H/ρ)^j v up to ``iterations`` terms after the first; ``residual`` is the norm of
    the next one ÷ ‖v‖.
    """
    norm = dot(v, v)
    a, term, size = dict(v), dict(v), norm
    done = 0
    while done < iterations and size > tolerance**2 * norm:
        term = axpy(-1.0, apply(term), term)  # −H/ρ term
        size = dot(term, term)
        a = axpy(1.0, term, a)
        done += 1
    residual = (size / norm) ** 0.5 if norm > 0 else 0.0
    return a, {"iterations": done, "residual": residual, "negative_curvature": False}


def solve_implicit(
    problem: InnerLoop,
    phi: Params,
    v: Params,
    names: Sequence[str],
    options: HypergradientOptions,
) -> Solution:
    """Return the transpose of the proximal inner loop at its solution ``phi``, restricted to
    ``names``, and the facts.

    ``stationarity``, ‖∇L + ρ(φ − θ)‖ ÷ ‖∇L‖, says how far ``phi`` is from a solution: the formula
    holds at 0 only, however small the linear system's ``residual`` is.
    """
    outer, inner = problem.enter(v, phi)
    theta = {x: problem.theta[x] for x in names if x in outer}
    loss, rho = partial(problem.objective, 0), problem.rho

    def apply(d: Params) -> Params:
        return axpy(1 / rho, hessian_product(loss, {}, phi, d, list(phi))[1], d)

    method = conjugate_gradients if options.solver == "cg" else neumann_series
    a, facts = method(apply, inner, options.iterations, options.tolerance)
    _, slope = compute_gradients(partial(loss, {}), phi)
    left = axpy(rho, {x: phi[x] - problem.theta[x] for x in phi}, slope)
    facts["stationarity"] = (dot(left, left) / max(dot(slope, slope), 1e-300)) ** 0.5
    if theta:
        by_theta, _ = hessian_product(loss, theta, phi, a, [])
        outer |= {x: outer[x] - h / rho for x, h in by_theta.items()}
    return problem.leave(outer, a, names), facts
