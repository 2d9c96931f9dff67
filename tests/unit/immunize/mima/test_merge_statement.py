"""When does the gradient through the merge raise the loss after adaptation? The statements of
docs/questions_mima.md, checked numerically.

A(θ) = mean_n L_n(θ'_n) is the loss of attackers who adapt alone and never merge. The outer loop
ascends J(θ) = mean_n L_n(θ̂) instead.
"""

import pytest
import torch

from immunize.merge.closed_form import Merge, factorize
from immunize.mima.hypergradient import HypergradientOptions, hypergradient
from immunize.mima.inner_loop import InnerLoop, InnerLoopOptions

D = 6


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


THETA, GOALS = rows(3, 1), [rows(3, 2), rows(3, 3)]
CONCEPTS = [rows(2, 4), rows(2, 5)]


def quadratic(n: int, weights: torch.Tensor) -> torch.Tensor:
    return 0.5 * ((weights - GOALS[n]) @ CONCEPTS[n].T).square().sum()


def saturating(n: int, weights: torch.Tensor) -> torch.Tensor:
    return (torch.tanh(weights @ CONCEPTS[n].T) - GOALS[n] @ CONCEPTS[n].T).square().mean()


def ascent(loss, merge, steps=3, lr=0.02, theta=THETA):
    """Return ∇J, by the project's hypergradient."""
    inner = [
        InnerLoop(
            InnerLoopOptions(lr=lr, steps=steps),
            {"w": theta},
            ["w"],
            lambda params, k, n=n: loss(n, params["w"]),
            n,
        )
        for n in range(2)
    ]
    options = HypergradientOptions(method="exact")
    outer = lambda params, n: -loss(n, params["w"])  # noqa: E731
    return -hypergradient({"w": theta}, inner, outer, merge, ["w"], options).gradient["w"]


def after_adaptation(loss, theta, steps=3, lr=0.02):
    """Return A(θ), differentiable."""
    total = torch.zeros((), dtype=torch.float64)
    for n in range(2):
        adapted = theta
        for _ in range(steps):
            value = loss(n, adapted)
            adapted = adapted - lr * torch.autograd.grad(value, adapted, create_graph=True)[0]
        total = total + loss(n, adapted) / 2
    return total


def slope(loss, theta=THETA, **options):
    """Return ∇A."""
    at = theta.clone().requires_grad_()
    return torch.autograd.grad(after_adaptation(loss, at, **options), at)[0]


def closed_form(concepts=CONCEPTS, mu=0.0):
    return Merge(2, {"text": factorize(concepts, rows(20, 6), lam=1.0, mu=mu)}, {"w": "text"})


@pytest.mark.parametrize("loss", [quadratic, saturating])
def test_where_losses_see_only_the_concepts_rows_the_merge_changes_nothing(loss):
    """Statement 1: Ŵ C_nᵀ = W'_n C_nᵀ, so J = A, and the step raises A."""
    torch.testing.assert_close(ascent(loss, closed_form()), slope(loss), rtol=1e-9, atol=1e-9)


def test_a_step_of_any_size_raises_a_quadratic_loss_after_adaptation():
    """A is convex in θ, so it rises along its gradient for every step size."""
    gradient = ascent(quadratic, closed_form())
    start = after_adaptation(quadratic, THETA.clone().requires_grad_())
    for size in (1e-3, 1.0, 1e3):
        assert after_adaptation(quadratic, (THETA + size * gradient).requires_grad_()) > start


def test_with_equal_curvature_the_mean_merge_changes_nothing(monkeypatch):
    """Statement 2: H_n = H and Merge = mean give ∇J = ∇A."""
    monkeypatch.setattr(__name__ + ".CONCEPTS", [rows(2, 4)] * 2)
    torch.testing.assert_close(ascent(quadratic, Merge(2)), slope(quadratic), rtol=1e-9, atol=1e-9)


def test_with_unequal_curvature_the_step_through_the_mean_can_help_the_attacker():
    """Concept 1 is learned in one step wherever θ is; concept 2 hardly. The gradient through the
    mean follows concept 1, and moves θ towards what concept 2 wants.
    """
    curvature, goals = (1.0, 0.1), (0.0, 2.0)

    def loss(n, weights):
        return 0.5 * curvature[n] * (weights - goals[n]).square().sum()

    one = {"steps": 1, "lr": 1.0, "theta": torch.ones(1, dtype=torch.float64)}
    assert float(ascent(loss, Merge(2), **one) * slope(loss, **one)) < 0


@pytest.mark.parametrize(
    "merge",
    [closed_form([rows(1, 4)[:1], rows(1, 5)[:1]]), closed_form(mu=10.0)],
    ids=["a row of each caption is missing", "μ > 0"],
)
def test_without_the_exact_constraint_the_gradients_differ(merge):
    ours, theirs = ascent(quadratic, merge), slope(quadratic)
    assert (ours - theirs).norm() > 0.01 * theirs.norm()
