"""Implicit differentiation of a proximal lower level (iMAML, arXiv 1909.04630).

θ' = argmin_φ L(φ) + (ρ/2)‖φ − θ‖² on the lower set, the rest of the parameters staying at θ:

    ∂⟨v, θ'⟩ by the lower set = a,  (I + ∇²_ll L(θ')/ρ) a = v_l;    by the rest = v_o − ∇²_ol L(θ')
    a / ρ
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from immunize.merge.closed_form import Params
from immunize.mima.inner_loop import LowerLevel
from immunize.mima.products import Product, gradients, product
from lab.core.options import choice, count, number


@dataclass(frozen=True)
class Implicit:
    """How the linear system is solved.

    Attributes:
        rho: ρ > 0. The lower level has one solution where ρ exceeds the negative curvature of L.
        solver: ``cg`` | ``neumann`` (converges where ‖∇²L‖ < ρ).
        iterations: at most; each costs one Hessian-vector product, and one more ends the solution.
        tolerance: of ``cg``, ‖residual‖ ÷ ‖v‖.
    """

    rho: float = 1.0
    solver: Literal["cg", "neumann"] = "cg"
    iterations: int = 10
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        number("immunize.hypergradient.rho", self.rho, above=0)
        choice("immunize.hypergradient.solver", self.solver, ("cg", "neumann"))
        count("immunize.hypergradient.iterations", self.iterations)


def _dot(left: Params, right: Params) -> float:
    return sum(float((x.double() * right[name].double()).sum()) for name, x in left.items())


def _axpy(a: float, x: Params, y: Params) -> Params:
    return {name: a * x[name] + y[name] for name in y}


def conjugate_gradients(
    apply: Callable[[Params], Params], v: Params, iterations: int, tolerance: float
) -> tuple[Params, dict[str, Any]]:
    """a with (I + H/ρ) a ≈ v; stops, and says so, at a direction of curvature ≤ 0, where the system
    is no minimum.
    """
    norm = _dot(v, v)
    a = {name: x.new_zeros(x.shape) for name, x in v.items()}
    r, p, rr = dict(v), dict(v), norm
    done, negative = 0, False
    while done < iterations and norm > 0 and rr > tolerance**2 * norm:
        q = apply(p)
        curvature = _dot(p, q)
        if curvature <= 0:
            negative = True
            if done == 0:  # no descent at all: the identity, that is the first-order gradient
                a = dict(v)
            break
        step = rr / curvature
        a, r = _axpy(step, p, a), _axpy(-step, q, r)
        before, rr = rr, _dot(r, r)
        p = _axpy(rr / before, p, r)
        done += 1
    residual = (rr / norm) ** 0.5 if norm > 0 else 0.0
    return a, {"iterations": done, "residual": residual, "negative_curvature": negative}


def neumann(
    apply: Callable[[Params], Params], v: Params, iterations: int, tolerance: float
) -> tuple[Params, dict[str, Any]]:
    """Σ_j (−H/ρ)^j v up to ``iterations`` terms after the first; ``residual`` is the norm of the
    next one ÷ ‖v‖.
    """
    norm = _dot(v, v)
    a, term, size = dict(v), dict(v), norm
    done = 0
    while done < iterations and norm > 0:
        term = _axpy(-1.0, apply(term), term)  # −H/ρ term
        size = _dot(term, term)
        a = _axpy(1.0, term, a)
        done += 1
        if size <= tolerance**2 * norm:
            break
    residual = (size / norm) ** 0.5 if norm > 0 else 0.0
    return a, {"iterations": done, "residual": residual, "negative_curvature": False}


def solve(
    level: LowerLevel, phi: Params, v: Params, names: Sequence[str], options: Implicit, how: Product
) -> tuple[Params, dict[str, Any]]:
    """The transpose of the proximal lower level at its solution ``phi``, restricted to ``names``,
    and the facts.

    ``stationarity``, ‖∇L + ρ(φ − θ)‖ ÷ ‖∇L‖, says how far ``phi`` is from a solution: the formula
    holds at 0 only, however small the linear system's ``residual`` is.
    """
    outer, inner = level.enter(v, phi)
    theta = {x: level.theta[x] for x in names if x in outer}

    def hessian(d: Params, theta: Params) -> tuple[Params, Params]:
        return product(partial(level.objective, 0), theta, phi, d, list(phi), how)

    def apply(d: Params) -> Params:
        return _axpy(1 / options.rho, hessian(d, {})[1], d)

    method = conjugate_gradients if options.solver == "cg" else neumann
    a, facts = method(apply, inner, options.iterations, options.tolerance)
    _, slope = gradients(partial(level.objective, 0, {}), phi)
    left = _axpy(options.rho, {x: phi[x] - level.theta[x] for x in phi}, slope)
    facts["stationarity"] = (_dot(left, left) / max(_dot(slope, slope), 1e-300)) ** 0.5
    if theta:
        by_theta, _ = hessian(a, theta)
        outer = {
            x: outer[x] - by_theta[x] / options.rho if x in by_theta else outer[x] for x in outer
        }
    return level.leave(outer, a, names), facts
