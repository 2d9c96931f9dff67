"""Closed-form gradients and preconditioned steps against autograd and dense solves, float64."""

import pytest
import torch
from small_cases import randn

from immunize.kappa import spectral

OBJECTIVES = ["well", "ill", "log_kappa", "inverse_log_kappa"]


def eye(d):
    return torch.eye(d, dtype=torch.float64)


def dense(name, h, size):
    """The objective from its formula, on the eigenvalues of H."""
    values = torch.linalg.eigvalsh(h)
    rank = int((values > 1e-10 * values[-1]).sum())
    top, low = values[-1], values[-rank]
    mean = h.square().sum() / (2 * (size or rank))
    return {
        "well": top**2 / 2 - mean,
        "ill": 1 / (mean - low**2 / 2),
        "log_kappa": (top / low).log(),
        "inverse_log_kappa": 1 / (top / low).log(),
    }[name]


def slope_of(name, factor, size=None):
    return getattr(spectral, name)(factor.sigma, size or len(factor.s), 0.0)


def problem(n, d, seed=0):
    x = randn(n, d, seed=seed) * torch.logspace(0, -1, d, dtype=torch.float64)
    return x, (torch.eye(d, dtype=torch.float64) + 0.3 * randn(d, d, seed=seed + 1))


def autograd_gradient(name, x, theta, size=None):
    theta = theta.clone().requires_grad_(True)
    value = dense(name, theta.T @ x.T @ x @ theta, size)
    return value.item(), torch.autograd.grad(value, theta)[0]


def close(a, b, tolerance=1e-8):
    assert float((a - b).norm() / b.norm()) < tolerance


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [
        *((name, shape, None) for name in OBJECTIVES for shape in ((30, 7), (5, 12))),
        ("well", (5, 12), 12),  # the release divides by the dimension
        ("ill", (5, 12), 12),
    ],
)
def test_gradient_against_autograd(name, shape, size):
    x, theta = problem(*shape)
    expected_value, expected = autograd_gradient(name, x, theta, size)
    factor = spectral.thin_factor(x @ theta)
    value, slope = slope_of(name, factor, size)
    assert value == pytest.approx(expected_value, rel=1e-8)
    close(x.T @ spectral.feature_gradient(factor, slope), expected)


@pytest.mark.parametrize("name", ["well", "ill", "log_kappa"])
@pytest.mark.parametrize(
    ("shape", "ridge"),
    [((30, 7), 0.0), ((5, 12), 0.0), ((30, 7), 0.3), ((5, 12), 0.3)],
    ids=["full-rank", "batch", "ridge-tall", "ridge-batch"],
)
def test_preconditioned_step_against_autograd_and_solve(name, shape, ridge):
    x, theta = problem(*shape)
    _, gradient = autograd_gradient(name, x, theta)
    k = x.T @ x
    d = shape[1]
    inverse = torch.linalg.pinv(k, hermitian=True, rtol=1e-12)
    expected = (
        inverse @ gradient if ridge == 0 else torch.linalg.solve(k + ridge * eye(d), gradient)
    )
    factor = spectral.thin_factor(x @ theta)
    ours = spectral.preconditioned_step(
        x, spectral.feature_gradient(factor, slope_of(name, factor)[1]), ridge
    )
    close(ours, expected)


def test_rank_deficient_batch_falls_back_to_the_pseudo_inverse():
    x, theta = problem(6, 12)
    x[5] = x[0]
    _, gradient = autograd_gradient("well", x, theta)
    factor = spectral.thin_factor(x @ theta)
    assert len(factor.s) == 5
    step = spectral.preconditioned_step(
        x, spectral.feature_gradient(factor, spectral.well(factor.sigma, 5)[1])
    )
    close(step, torch.linalg.pinv(x.T @ x, hermitian=True, rtol=1e-12) @ gradient)


def test_ridge_below_rounding():
    x = randn(5, 12) * torch.tensor([1, 1, 1e-9, 1e-9, 1e-9], dtype=torch.float64)[:, None]
    g = randn(5, 12, seed=3)
    u, s, wt = torch.linalg.svd(x, full_matrices=False)
    expected = wt.T @ ((s / (s**2 + 1e-25))[:, None] * (u.T @ g))
    close(spectral.preconditioned_step(x, g, 1e-25), expected, 1e-6)


@pytest.mark.parametrize("shape", [(30, 7), (5, 12)])
@pytest.mark.parametrize("ridge", [0.0, 0.2])
def test_right_solve_of_features(shape, ridge):
    y, _ = problem(*shape)
    g = randn(shape[0], shape[1], seed=9)
    inverse = torch.linalg.pinv(y.T @ y + ridge * eye(shape[1]), hermitian=True, rtol=1e-12)
    close(spectral.right_solve(y, g, ridge), g @ inverse)


def test_infinite_objectives_say_so():
    flat = torch.ones(4, dtype=torch.float64)
    for function in (spectral.ill, spectral.inverse_log_kappa):
        value, slope = function(flat, 4)
        assert value == float("inf")
        assert bool(slope.isnan().all())


def test_near_multiplicity_is_averaged():
    """Two eigenvalues that swap places: the plain gradient jumps, the averaged one does not."""
    v = torch.linalg.qr(randn(5, 5))[0]
    for function, position in ((spectral.well, 0), (spectral.ill, 3)):
        gradients = {}
        for cluster in (0.0, 0.01):
            for order in (1.0, -1.0):
                s = torch.tensor([2.0, 1.9, 1.0, 0.55, 0.5], dtype=torch.float64)
                s[position + 1] = s[position]
                s[position] *= 1 + order * 1e-9
                factor = spectral.thin_factor(s[:, None] * v.T)
                slope = function(factor.sigma, 5, cluster)[1]
                gradients[cluster, order] = spectral.feature_gradient(factor, slope)
        scale = gradients[0.0, 1.0].norm()
        assert float((gradients[0.0, 1.0] - gradients[0.0, -1.0]).norm() / scale) > 0.1
        assert float((gradients[0.01, 1.0] - gradients[0.01, -1.0]).norm() / scale) < 1e-7
