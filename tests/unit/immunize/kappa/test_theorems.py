"""The monotonicity theorems of arXiv 2505.23760 §4 with full batches."""

import itertools
import math

import pytest
import torch
from small_cases import immunize, randn

from immunize.kappa import spectral
from immunize.kappa.method import Kappa
from lab.core.data import Case, Split, Task

STEPS = 1000


def well_limit(sigma):
    """σ_1 ↦ σ_1(1 − 2ησ_1(1 − 1/p))² may not fall below σ_2 ↦ σ_2(1 + 2ησ_2/p)²: the order must
    survive.
    """
    p = len(sigma)
    a, b = float(sigma[0]), float(sigma[1])
    return 0.5 * (math.sqrt(a) - math.sqrt(b)) / (a**1.5 * (1 - 1 / p) + b**1.5 / p)


def ill_limit(sigma):
    """σ_k ↦ σ_k(1 − 2η′σ_k(1 − 1/k))² must not grow, η′ = η·R_ill²."""
    k = len(sigma)
    value, _ = spectral.ill(sigma, k)
    return 0.5 / (value**2 * float(sigma[-1]) * (1 - 1 / k))


@pytest.mark.parametrize(
    "lambda_p", [pytest.param(1.0, marks=pytest.mark.slow), 0.0], ids=["well", "ill"]
)
def test_the_immunizer_itself_keeps_the_theorems_at_one_fixed_rate(lambda_p):
    """`Kappa` as a user runs it: full batch, 1,000 plain steps at an η below the limit of the first
    step.
    """
    x = randn(40, 6) * torch.logspace(0, -1, 6, dtype=torch.float64)
    sigma = spectral.thin_factor(x).sigma
    ratio = float(sigma[-1] / sigma[0])
    lr = (
        min(0.9 * well_limit(sigma), 0.02 / float(sigma[0]))
        if lambda_p
        else 0.02 * ratio * ill_limit(sigma)
    )
    split = Split(x, torch.zeros(len(x), dtype=torch.float64))
    benign, harmful = (
        Task(role, role, "regression", split, split) for role in ("benign", "harmful")
    )
    kappa = Kappa(
        lambda_p=lambda_p,
        lambda_h=1 - lambda_p,
        scale="none",
        supervised=0.0,
        lr=lr,
        lr_schedule="constant",
        steps=STEPS,
        batch_size=len(x),
        log_points=300,
    )
    _, _, log = immunize(kappa, Case("theorem", benign, (harmful,)), None, 0)
    values = log.column("kappa_benign" if lambda_p else "kappa_harmful")
    assert len(values) > 150
    assert log.steps[-1] == STEPS
    moved = [after / before for before, after in itertools.pairwise(values)]
    assert all(m < 1 for m in moved) if lambda_p else all(m > 1 for m in moved)
    assert not 0.5 < values[-1] / values[0] < 2
