"""Objectives and optimizers of the linear probe against autograd, torch.optim, scipy and brute
force.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse.linalg
import torch
from attack_examples import classification, spread

from attacks.probes.optimizers import OPTIMIZERS
from attacks.probes.problem import CrossEntropy, Squared
from lab.core.seeding import generator


def problem(kind, n=40, d=6, kappa=50.0, ridge=0.0, gram=False):
    z = spread(n, d, kappa) + 0.1
    if kind == "squared":
        y = torch.randn(n, 2, dtype=torch.float64, generator=generator(0, "y"))
        return Squared(z, y, ridge=ridge, gram=gram)
    labels = torch.cat([classification(z).train.y, classification(z).test.y])
    return CrossEntropy(z, torch.nn.functional.one_hot(labels, 3).double(), ridge=ridge, gram=gram)


def point(p, label="w"):
    return torch.randn(p.d, p.c, dtype=torch.float64, generator=generator(1, label))


def objective(p, w):
    """The loss written with torch's own functions."""
    scores = p.z @ w
    if isinstance(p, Squared):
        data = 0.5 * torch.nn.functional.mse_loss(scores, p.y, reduction="sum") / p.n
    else:
        data = torch.nn.functional.cross_entropy(scores, p.y.argmax(1))
    return data + 0.5 * p.ridge * w.square().sum()


def descend(p, name, steps, rate=0.0, **settings):
    optimizer, path = OPTIMIZERS[name](p, **settings), []
    for _ in range(steps):
        optimizer.step(rate)
        path.append(optimizer.w.clone())
    return path


KINDS = ("squared", "cross_entropy")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gram", [False, True])
def test_loss_and_gradient_are_those_of_autograd(kind, gram):
    p = problem(kind, ridge=0.3, gram=gram)
    w = point(p)
    leaf = w.clone().requires_grad_()
    loss = objective(p, leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert p.loss(w) == pytest.approx(loss.item(), rel=1e-13)
    torch.testing.assert_close(p.gradient(w), gradient, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_line_search_is_exact(kind, ridge):
    p = problem(kind, ridge=ridge)
    w = point(p)
    g = p.gradient(w)
    t = p.line_minimum(w, g, -g)
    brent = scipy.optimize.minimize_scalar(
        lambda t: p.loss(w - t * g), bracket=(0.0, 1.0), tol=1e-12
    )
    assert t == pytest.approx(brent.x, rel=1e-6)
    assert abs(float((p.gradient(w - t * g) * g).sum())) < 1e-8 * float(g.square().sum())


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if not kind.uses_rate])
def test_separable_data_is_not_fitted_to_rounding(name):
    z = spread(40, 40, 100)[:30]
    y = torch.nn.functional.one_hot(torch.arange(30) % 3, 3).double()
    path = descend(CrossEntropy(z, y), name, 60)
    assert float(path[-1].norm()) < 1e4 * float(path[0].norm())
    shift = path[-1].mean(
        1, keepdim=True
    )  # adding the same vector to all classes changes no probability
    assert float(shift.norm()) < 0.05 * float(path[-1].norm())


def test_lbfgs_on_a_quadratic_gives_the_iterates_of_conjugate_gradients():
    p = problem("squared", kappa=300)
    hessian, path = (p.z.T @ p.z / p.n).numpy(), descend(p, "lbfgs", 6)
    # one column: with several, the shared step length makes it CG on the block-diagonal system
    system = scipy.sparse.linalg.aslinearoperator(np.kron(hessian, np.eye(p.c)))
    seen = []
    scipy.sparse.linalg.cg(
        system,
        p.moment.numpy().ravel(),
        rtol=0,
        maxiter=6,
        callback=lambda x: seen.append(x.copy()),
    )
    for w, x in zip(path, seen, strict=True):
        np.testing.assert_allclose(w.numpy().ravel(), x, rtol=1e-7, atol=1e-9)


def scipy_optimum(p):
    def both(x):
        w = torch.from_numpy(x.reshape(p.d, p.c))
        return p.loss(w), p.gradient(w).numpy().ravel()

    options = {"maxiter": 5000, "ftol": 1e-16, "gtol": 1e-11}
    return float(
        scipy.optimize.minimize(
            both, np.zeros(p.d * p.c), jac=True, method="L-BFGS-B", options=options
        ).fun
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ridge", [0.0, 0.2])
@pytest.mark.parametrize("name", ["lbfgs", "newton", "whitening", "kfac", "gd_exact_line_search"])
def test_line_search_optimizers_reach_the_optimum_of_scipy_and_never_rise(kind, ridge, name):
    p = problem(kind, kappa=20, ridge=ridge)
    losses = [p.loss(torch.zeros(p.d, p.c).double()), *(p.loss(w) for w in descend(p, name, 150))]
    assert all(b <= a + 1e-13 for a, b in pairwise(losses))
    assert losses[-1] == pytest.approx(scipy_optimum(p), abs=1e-7)


@pytest.mark.parametrize("shape", [(40, 6), (12, 20)])
def test_minimum_norm_optimum_and_one_newton_step_are_lstsq(shape):
    stream = generator(3, "z")
    z = torch.randn(*shape, dtype=torch.float64, generator=stream)
    z[:, 1] = z[:, 0]  # a repeated column: the solution is not unique
    y = torch.randn(shape[0], 1, dtype=torch.float64, generator=stream)
    p = Squared(z, y)
    expected = torch.from_numpy(np.linalg.lstsq(z.numpy(), y.numpy(), rcond=None)[0])
    torch.testing.assert_close(p.optimum(), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(descend(p, "newton", 1)[0], expected, rtol=1e-8, atol=1e-10)


def test_ridge_solution_and_excess():
    p = problem("squared", ridge=0.4)
    assert isinstance(p, Squared)
    assert p.ridge == pytest.approx(0.4 * float(torch.linalg.eigvalsh(p.z.T @ p.z / p.n).mean()))
    hessian = p.z.T @ p.z / p.n + p.ridge * torch.eye(p.d, dtype=torch.float64)
    torch.testing.assert_close(
        p.optimum(), torch.linalg.solve(hessian, p.moment), rtol=1e-10, atol=1e-12
    )
    assert p.excess(point(p), p.optimum()) == pytest.approx(
        p.loss(point(p)) - p.loss(p.optimum()), rel=1e-10
    )
    assert p.excess(p.optimum(), p.optimum()) == 0.0


def test_kfac_direction_is_the_kronecker_formula():
    for kind in KINDS:
        p, gamma = problem(kind, ridge=0.1), 1e-2
        w, g = point(p), p.gradient(point(p))
        prob = torch.softmax(p.z @ w, 1)
        a = p.z.T @ p.z / p.n
        s = (
            torch.eye(p.c).double()
            if kind == "squared"
            else (torch.diag_embed(prob) - prob[:, :, None] * prob[:, None]).mean(0)
        )
        eye_a, eye_s = torch.eye(p.d).double(), torch.eye(p.c).double()
        tilt = math.sqrt(
            (float(a.trace()) / p.d) / (float(s.trace()) / p.c)
        )  # π of arXiv 1503.05671 §6.3
        scale = gamma * float(a.trace()) / p.d * float(s.trace()) / p.c + p.ridge
        left, right = a + tilt * math.sqrt(scale) * eye_a, s + math.sqrt(scale) / tilt * eye_s
        expected = -torch.linalg.inv(left) @ g @ torch.linalg.inv(right)
        kfac = OPTIMIZERS["kfac"](p, damping=gamma)
        kfac.w = w
        kfac.step()
        moved = kfac.w - w
        expected *= float(moved.norm() / expected.norm())
        torch.testing.assert_close(moved, expected, rtol=1e-8, atol=1e-10)


def test_low_rank_direction_is_newton_in_the_leading_directions():
    p = problem("squared", ridge=0.1)
    g = p.gradient(point(p))
    values, v = torch.linalg.eigh(p.z.T @ p.z / p.n + p.ridge * torch.eye(p.d).double())
    inverse = 1 / torch.minimum(values, values[-3])  # ascending: the third largest and all below
    inverse[-2:] = 1 / values[-2:]
    inverse[:-2] = 1 / values[-3]
    expected = -(v * inverse) @ v.T @ g
    direction = OPTIMIZERS["low_rank"](p, rank=2).direction(g)
    scale = float(expected.norm() / direction.norm())
    torch.testing.assert_close(direction * scale, expected, rtol=1e-8, atol=1e-10)
