"""Options of KAPPA whose direction the other tests do not show: what a larger value does."""

import pytest
import torch
from small_cases import immunize, linear_case, randn

from immunize.kappa.method import Kappa, KappaOpt
from immunize.kappa.sampling import RowSampler
from lab.core.errors import UserError

BASE = dict(
    lambda_p=1.0, lambda_h=1e-2, scale="current", lr=0.05, steps=60, batch_size=16, supervised=0.0
)


def run(case, **options):
    """(immunized model, log)."""
    return immunize(Kappa(**(BASE | options)), case)[1:]


def test_rank_tolerance_leaves_directions_below_it_alone():
    case = linear_case()
    _, s, vt = torch.linalg.svd(case.benign.train.x, full_matrices=False)
    below = vt[s < 0.2 * s[0]].T
    assert 0 < below.shape[1] < 5
    moved = []
    for tolerance in (None, 0.2):
        model = run(case, lambda_h=0.0, steps=1, spectrum="full", rank_tolerance=tolerance)[0]
        update = model.theta.detach() - torch.eye(6, dtype=torch.float64)
        moved.append(float((update @ below).norm() / update.norm()))
    assert moved[0] > 1e-3
    assert moved[1] < 1e-9


def spread_of_estimates(window, decay):
    """Mean squared distance between 50 running estimates of a Gram matrix and the exact one."""
    x = randn(400, 6)
    sampler = RowSampler(400, 16, "running", decay, window, 0, "t")
    exact, errors = x.T @ x * 16 / 400, []
    for step in range(20, 70):
        rows, roots = sampler.rows(step)
        part = x[rows] * roots
        errors.append((part.T @ part - exact).square().sum())
    return float(torch.stack(errors).mean())


def test_a_longer_window_and_a_slower_decay_reduce_the_variance():
    windows = [spread_of_estimates(window, 1.0) for window in (1, 2, 8)]
    assert windows[0] > 1.5 * windows[1] > 3 * windows[2]
    decays = [spread_of_estimates(8, decay) for decay in (0.1, 0.5, 1.0)]
    assert decays[0] > 1.5 * decays[1] > 2 * decays[2]


def test_corridor_rate_sets_how_fast_the_weights_move():
    pulls = []
    for rate in (0.0, 0.05, 0.5):
        options = dict(
            lambda_schedule="corridor", corridor_rate=rate, corridor_benign=0.1, spectrum="full"
        )
        pulls.append(
            run(linear_case(), lambda_p=0.05, steps=20, **options)[1].column("lambda_p")[-1]
        )
    assert pulls[0] == 0.05
    assert pulls[2] > 2 * pulls[1] > 2.5 * pulls[0]


@pytest.mark.parametrize(
    ("kind", "options", "key"),
    [
        (Kappa, {"preconditioned": False, "ridge_benign": 5.0}, "immunize.ridge_benign"),
        (Kappa, {"corridor_benign": 9.0}, "immunize.corridor_benign"),
        (
            Kappa,
            {"lambda_schedule": "corridor", "lambda_p": 0.0, "corridor_benign": 9.0},
            "immunize.corridor_benign",
        ),
        (Kappa, {"worst_case_temperature": 7.0}, "immunize.worst_case_temperature"),
        (Kappa, {"running_window": 9}, "immunize.running_window"),
        (KappaOpt, {"rank_rule": "dimension"}, "immunize.rank_rule"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(kind, options, key):
    with pytest.raises(UserError) as told:
        kind(**(BASE | options))
    assert told.value.key == key


def test_worst_case_weights_need_several_harmful_tasks():
    with pytest.raises(UserError, match="mnist_harm_set"):
        Kappa(**BASE, worst_case=True).check((linear_case(),))
