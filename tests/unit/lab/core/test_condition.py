"""Condition numbers, RIR and its bound against numpy, brute force and closed forms."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from small_cases import randn

from lab.core import condition
from lab.core.condition import condition_number, relative_immunization_ratio, rir_bound


def test_rank_definition_is_the_squared_ratio_of_singular_values():
    x = randn(30, 6)
    s = np.linalg.svd(x.numpy(), compute_uv=False)
    assert condition_number(x) == pytest.approx((s[0] / s[-1]) ** 2, rel=1e-12)
    singular = torch.cat([x, x[:, :1] + x[:, 1:2], torch.zeros(30, 1, dtype=torch.float64)], dim=1)
    s = np.linalg.svd(singular.numpy(), compute_uv=False)
    assert np.linalg.matrix_rank(singular.numpy()) == 6
    assert condition.numerical_rank(condition.singular_values(singular), singular.shape) == 6
    assert condition_number(singular) == pytest.approx((s[0] / s[5]) ** 2, rel=1e-9)


def test_far_beyond_what_a_gram_matrix_resolves():
    x = torch.linalg.qr(randn(8, 3))[0] * torch.tensor([1.0, 1e-3, 1e-11], dtype=torch.float64)
    assert condition_number(x) == pytest.approx(1e22, rel=1e-3)


def test_float32_rounding_is_no_rank():
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    double = torch.cat([x, (x[:, :1] / 3 + x[:, 1:2] / 7)], dim=1)
    assert double.dtype == torch.float32
    assert condition_number(double) < 1e3
    assert condition_number(double.to(torch.float64)) > 1e10


def test_ridge_definition():
    x = randn(30, 6)
    values = np.linalg.eigvalsh((x.T @ x).numpy()) + 0.5
    assert condition_number(x, "ridge", ridge=0.5) == pytest.approx(
        values[-1] / values[0], rel=1e-10
    )
    few = randn(3, 6)
    top = float(torch.linalg.matrix_norm(few, 2)) ** 2
    assert condition_number(few, "ridge", ridge=0.5) == pytest.approx((top + 0.5) / 0.5)
    assert condition_number(few, "ridge") == math.inf


def test_release_definition_is_the_formula():
    x = randn(30, 6)
    values = np.linalg.eigvalsh((x.T @ x + 1e-6 * torch.eye(6, dtype=torch.float64)).numpy())
    kept = values[values > 1e-6]
    assert condition_number(x, "release") == pytest.approx(kept.max() / kept.min(), rel=1e-10)


@pytest.mark.parametrize("x", [torch.zeros(3, 2), torch.full((3, 2), float("nan"))])
@pytest.mark.parametrize("definition", get_args(condition.Definition))
def test_undefined_numbers_are_errors(x, definition):
    with pytest.raises(ValueError, match=r"zero|finite"):
        condition_number(x, definition)


@pytest.mark.parametrize("optimizer", condition.PRECONDITIONERS)
def test_preconditioned_hessian_against_its_formula(optimizer):
    """κ of P^(−1/2) H P^(−1/2), and the pullback of a spectral gradient against autograd."""
    y = (randn(30, 5) @ randn(5, 5, seed=1)).requires_grad_(True)
    h = y.T @ y
    if optimizer == "kfac":
        shift = (h.trace() * 1e-3**0.5 / 5).detach()
        p = h + shift * torch.eye(5, dtype=torch.float64)
    else:
        p = torch.diag(h.diagonal() ** (1.0 if optimizer == "jacobi" else 0.5))
    values = torch.linalg.eigvalsh(
        torch.linalg.solve(torch.linalg.cholesky(p), h)
        @ torch.linalg.inv(torch.linalg.cholesky(p)).T
    )
    ratio = float((values[-1] / values[0]).detach())
    assert condition_number(y, optimizer) == pytest.approx(ratio, rel=1e-8)
    (expected,) = torch.autograd.grad((values[-1] / values[0]).log(), y)
    scaled, pull = condition.precondition(y.detach(), optimizer)
    seen = scaled.clone().requires_grad_(True)
    s = torch.linalg.svdvals(seen)
    (gradient,) = torch.autograd.grad(2 * (s[0] / s[-1]).log(), seen)
    torch.testing.assert_close(pull(gradient), expected, rtol=1e-7, atol=1e-10)


def test_groups_are_seeded_and_disjoint_where_possible():
    rows = condition.row_groups(100, groups=5, size=20, seed=3)
    assert sorted(torch.cat(rows).tolist()) == list(range(100))
    again = condition.row_groups(100, groups=5, size=20, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(rows, again, strict=True))
    assert not torch.equal(rows[0], condition.row_groups(100, groups=5, size=20, seed=4)[0])


def pair(d=4, seed=0):
    x_p = randn(40, d, seed=seed) @ randn(d, d, seed=seed + 1)
    return x_p, randn(30, d, seed=seed + 2) @ randn(d, d, seed=seed + 3)


def rir(x_p, x_h, theta, theta0=None):
    before = [x if theta0 is None else x @ theta0 for x in (x_h, x_p)]
    return relative_immunization_ratio(
        condition_number(x_h @ theta),
        condition_number(before[0]),
        condition_number(x_p @ theta),
        condition_number(before[1]),
    )


def test_bound_is_never_exceeded_by_ten_thousand_random_extractors():
    x_p, x_h = pair()
    bound = rir_bound(x_p, x_h)
    thetas = randn(10_000, 4, 4, seed=7)
    thetas[5000:] = torch.linalg.inv(torch.linalg.cholesky(x_p.T @ x_p)).T @ (
        torch.eye(4, dtype=torch.float64) + 0.1 * thetas[5000:]
    )  # near the optimum, where the bound is tight
    s_p, s_h = (torch.linalg.svdvals(x @ thetas) for x in (x_p, x_h))
    ratios = (s_h[:, 0] / s_h[:, -1]) ** 2 / condition_number(x_h)
    ratios /= (s_p[:, 0] / s_p[:, -1]) ** 2 / condition_number(x_p)
    assert float(ratios.max()) <= bound.value * (1 + 1e-9)
    assert float(ratios.max()) > 0.7 * bound.value


@pytest.mark.parametrize("start", [False, True])
def test_bound_is_attained_by_whitening_and_any_rotation(start):
    x_p, x_h = pair(d=9, seed=20)
    theta0 = randn(9, 9, seed=5) if start else None
    bound = rir_bound(x_p, x_h, theta0)
    _, s, wt = torch.linalg.svd(x_p, full_matrices=False)
    rotation = torch.linalg.qr(randn(9, 9, seed=8))[0]
    assert rir(x_p, x_h, (wt.T / s) @ wt @ rotation, theta0) == pytest.approx(bound.value, rel=1e-6)
    assert bound.kappa_m == pytest.approx(float(bound.pencil[0] / bound.pencil[-1]))


def test_singular_benign_task_has_no_finite_bound():
    x_p, x_h = pair()
    x_p[:, 3] = x_p[:, 0]
    bound = rir_bound(x_p, x_h)
    assert bound.value is None
    assert bound.kappa_m is None
    normal = torch.tensor([1.0, 0, 0, -1.0], dtype=torch.float64) / 2**0.5
    assert bound.outside_energy == pytest.approx(
        float((x_h @ normal).square().sum() / x_h.square().sum())
    )
    # and it is infinite: shrinking θ outside range(K_P) raises RIR without limit
    eye, outer = torch.eye(4, dtype=torch.float64), torch.outer(normal, normal)
    grown = [rir(x_p, x_h, eye - (1 - t) * outer) for t in (1e-2, 1e-4)]
    assert grown[1] > 1e3 * grown[0] > 1e3


def test_common_null_space_keeps_the_bound():
    x_p, x_h = pair()
    lift = randn(4, 6, seed=11)
    bound = rir_bound(x_p @ lift, x_h @ lift)
    assert bound.kappa_m == pytest.approx(rir_bound(x_p, x_h).kappa_m, rel=1e-6)
    basis, s = condition.range_basis(x_p @ lift)
    assert rir(x_p @ lift, x_h @ lift, (basis / s) @ basis.T) == pytest.approx(
        bound.value, rel=1e-6
    )


def test_singular_harmful_task_keeps_the_bound():
    x_p, x_h = pair()
    x_h[:, 3] = x_h[:, 0] + x_h[:, 1]
    bound = rir_bound(x_p, x_h)
    _, s, wt = torch.linalg.svd(x_p, full_matrices=False)
    assert rir(x_p, x_h, (wt.T / s) @ wt) == pytest.approx(bound.value, rel=1e-6)
    for seed in range(200):
        assert rir(x_p, x_h, randn(4, 4, seed=seed)) <= bound.value * (1 + 1e-9)


def test_bound_beyond_float64_is_not_reported():
    x_p, x_h = pair()
    bound = rir_bound(x_p, x_h @ torch.diag(torch.tensor([1, 1, 1, 1e-7], dtype=torch.float64)))
    assert bound.value is None


def test_principal_angles():
    eye = torch.eye(4, dtype=torch.float64)
    c, s = math.cos(0.3), math.sin(0.3)
    angles = condition.principal_angles(eye[:2], torch.stack([eye[0], c * eye[1] + s * eye[2]]))
    assert angles.tolist() == pytest.approx([0.0, 0.3], abs=1e-7)
    leading = torch.diag(torch.tensor([3.0, 1.0, 0.1, 0.0], dtype=torch.float64))
    for energy, held in ((0.89, 1), (0.9, 2), (0.9999, 3)):  # shares 9/10.01, 10/10.01, 1
        assert len(condition.principal_angles(leading, leading, energy=energy)) == held
    assert len(condition.principal_angles(leading, leading, dim=2)) == 2
