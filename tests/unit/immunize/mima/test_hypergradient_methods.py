"""Methods and bad input of the hypergradient, in float64 on tiny problems."""

import math
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from bilevel_cases import Problem, distance, evaluate, naive, problem
from mima_examples import kept
from torch.nn import functional as F

from immunize.gradients import (
    checkpointed,
    compute_gradients,
)
from immunize.merge.closed_form import Merge
from immunize.mima.hypergradient import (
    HypergradientResult,
    neumann_series,
)
from immunize.mima.inner_loop import InnerLoopOptions
from lab.core.errors import Diverged
from lab.core.seeding import generator
from lab.core.solvers import conjugate_gradients

SGD3 = InnerLoopOptions(lr=0.3, steps=3)


def same(left: HypergradientResult, right: HypergradientResult) -> bool:
    return all(torch.equal(left.gradient[x], right.gradient[x]) for x in right.gradient)


def regression(count: int = 2) -> Problem:
    """Not a U-Net: a two-layer network whose dense Hessian can be written down; the inner set is
    the second layer and half of the first.
    """
    draw = partial(torch.randn, generator=generator(0, "regression"), dtype=torch.float64)
    theta = {"a": draw(3, 3) / 2, "b": draw(3, 3) / 2, "c": draw(2, 6) / 2, "d": draw(2) / 2}
    data = [[(draw(8, 3), draw(8, 2)) for _ in range(2)] for _ in range(count)]

    class Plain(Problem):
        def inner(self):
            return [lambda p, k, n=n: self.cost(p, n, 0) for n in range(count)]

        def outer(self, params, n):
            return -self.cost(params, n, 1)

        def cost(self, p, n, part):
            x, y = data[n][part]
            hidden = torch.tanh(torch.cat([x @ p["a"].T, x @ p["b"].T], 1))
            return F.mse_loss(hidden @ p["c"].T + p["d"], y)

    return Plain(None, theta, ["a", "b", "c"], ["b", "c", "d"], Merge(count), count, [])  # type: ignore[arg-type]


# methods


def test_inner_steps_are_pytorchs_optimizers():
    p = regression(1)
    for settings, kind in (
        (InnerLoopOptions(lr=0.1, steps=4), torch.optim.SGD),
        (
            InnerLoopOptions(lr=0.01, steps=4, optimizer="adamw", weight_decay=0.1),
            partial(torch.optim.AdamW, weight_decay=0.1),
        ),
    ):
        found = p.problems(settings)[0].run(keep=False).final
        leaves = {x: y.clone().requires_grad_(x in p.inner_names) for x, y in p.theta.items()}
        optimizer = kind([leaves[x] for x in p.inner_names], lr=settings.lr)
        for _ in range(4):
            optimizer.zero_grad()
            p.inner()[0](leaves, 0).backward()
            optimizer.step()
        moved = {x: leaves[x].detach() for x in found}
        torch.testing.assert_close(found, moved, rtol=1e-12, atol=1e-14)


def test_truncated_becomes_exact_as_it_takes_in_all_steps():
    p = problem("kv")
    settings = replace(SGD3, lr=0.03)
    exact = evaluate(p, settings).gradient
    gaps = [
        distance(evaluate(p, settings, method="truncated", last=t).gradient, exact)
        for t in (1, 2, 3)
    ]
    assert gaps[0] > gaps[1] > gaps[2] == 0


def test_first_order_is_the_outer_gradient_and_alternating_continues_from_the_merge():
    p = problem("kv")
    first = evaluate(p, SGD3, method="first_order")
    other = evaluate(p, SGD3, method="alternating")
    assert same(first, other)
    assert math.isnan(first.cosine)  # no gradient is compared with itself
    merged = p.merge(
        p.theta, [level.adapted(level.run(keep=False).final) for level in p.problems(SGD3)]
    )
    assert all(torch.equal(merged[x], other.merged[x]) for x in merged)
    _, v = compute_gradients(lambda q: sum(p.outer(q, n) for n in range(2)) / 2, merged)  # type: ignore[arg-type,return-value]
    assert distance(first.gradient, {x: v[x] for x in p.outer_names}) < 1e-12
    direct = p.merge.adjoint_direct(v)
    parts = [p.merge.adjoint_part(v, n) for n in range(2)]
    total = {x: direct[x] + sum(part[x] for part in parts) for x in p.outer_names}
    assert distance(total, first.gradient) < 1e-12  # what a transpose without Hessian leaves


@pytest.mark.parametrize("solver", ["cg", "neumann"])
def test_implicit_is_its_fixed_point(solver):
    """Against the dense (I + ∇²L/ρ)⁻¹ at the solution, and against autograd through 80 proximal
    steps.
    """
    p, rho = regression(), 3.0
    settings = InnerLoopOptions(lr=0.2, steps=80)
    options = {
        "method": "implicit",
        "rho": rho,
        "solver": solver,
        "iterations": 200,
        "tolerance": 1e-13,
    }
    found = evaluate(p, settings, **options)
    assert distance(found.gradient, naive(p, settings, rho)) < 1e-8
    sizes = [p.theta[x].numel() for x in p.theta]
    names = list(p.theta)
    inside = torch.cat(
        [torch.full((k,), x in p.inner_names) for x, k in zip(names, sizes, strict=True)]
    )

    def unflat(vector):
        return {x: y.view_as(p.theta[x]) for x, y in zip(names, vector.split(sizes), strict=True)}

    v = compute_gradients(lambda q: sum(p.outer(q, n) for n in range(2)) / 2, found.merged)[1]  # type: ignore[arg-type,return-value]
    total = torch.zeros(sum(sizes), dtype=torch.float64)
    for level in p.problems(settings, rho=rho):
        loss = level.loss
        at = {**p.theta, **level.run(keep=False).final}
        flat = torch.cat([at[x].flatten() for x in names])
        h = torch.autograd.functional.hessian(lambda y, loss=loss: loss(unflat(y), 0), flat)
        v_n = torch.cat([v[x].flatten() for x in names]) / 2
        a = torch.linalg.solve(
            torch.eye(int(inside.sum())) + h[inside][:, inside] / rho, v_n[inside]
        )
        total[inside] += a
        total[~inside] += v_n[~inside] - h[~inside][:, inside] @ a / rho
    assert distance(found.gradient, {x: unflat(total)[x] for x in p.outer_names}) < 1e-8
    assert found.info["negative_curvature"] == [False, False]
    assert max(found.info["residual"]) < 1e-12
    assert max(found.info["stationarity"]) < 1e-9
    early = evaluate(p, InnerLoopOptions(lr=0.2), **options)  # solved well, at no solution
    assert max(early.info["residual"]) < 1e-12
    assert min(early.info["stationarity"]) > 0.1
    assert distance(early.gradient, found.gradient) > 0.01


def test_cg_stops_on_negative_curvature_and_says_so():
    v = {"x": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    a, facts = conjugate_gradients(lambda d: {"x": d["x"] * torch.tensor([1.0, -1.0])}, v, 10, 1e-9)
    assert facts["negative_curvature"]
    assert torch.equal(a["x"], v["x"])
    _, facts = neumann_series(lambda d: {"x": 3.0 * d["x"]}, v, 5, 1e-9)
    assert facts["residual"] > 1  # ‖H‖ > ρ: the series grows, and shows it


# ── how it is computed


def test_repeats_bit_for_bit_and_recomputed_iterates_change_nothing():
    p = problem("kv")
    kept = evaluate(p, SGD3)
    assert same(kept, evaluate(p, SGD3))
    assert same(kept, evaluate(p, SGD3, recompute=True))
    assert all(drop > 0 for drop in kept.inner_loop_drop)
    assert kept.info["constraint_residual"] < 1e-10


@pytest.mark.slow
def test_checkpointing_gives_the_same_gradient():
    """At weights other than the module's own, where diffusers' checkpointing differentiates at the
    wrong ones.
    """
    p = problem("kv")
    moved = replace(p, theta={x: 1.1 * y for x, y in p.theta.items()})
    with kept() as whole:
        plain = evaluate(moved, InnerLoopOptions(lr=0.5, steps=2))
    with checkpointed(p.model.unet), kept() as less:
        found = evaluate(moved, InnerLoopOptions(lr=0.5, steps=2))
    assert distance(found.gradient, plain.gradient) < 1e-12
    assert 0 < sum(less) < 0.8 * sum(whole)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in p.model.unet.modules())


# bad input


def test_nan_in_an_inner_step_is_divergence():
    class Broken(type(regression())):
        def inner(self):
            first, second = super().inner()
            return [first, lambda p, k: second(p, k) * (math.nan if k == 2 else 1.0)]

    p = regression()
    broken = Broken(**{f.name: getattr(p, f.name) for f in fields(p)})
    with pytest.raises(Diverged, match="concept 1") as caught:
        evaluate(broken, SGD3)
    assert caught.value.step == 1
