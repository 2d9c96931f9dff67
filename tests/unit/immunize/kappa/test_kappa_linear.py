"""KAPPA, its ablations and baselines on small linear problems: the loop, and one step against
autograd.
"""

import pytest
import torch
from small_cases import immunize, linear_case, randn

from immunize.kappa.method import Kappa, KappaImma, KappaOpt
from immunize.kappa.trainer import Trainer, log_steps
from lab.core.condition import condition_number
from lab.core.data import Case, Split, Task
from lab.core.types import same_weights
from lab.models.linear import LinearBackbone, LinearExtractor

BASE = dict(
    lambda_p=1.0, lambda_h=1e-2, scale="current", lr=0.05, steps=60, batch_size=16, supervised=0.0
)


def kappa(**options):
    return Kappa(**(BASE | options))


def opt(**options):
    return KappaOpt(**(BASE | {"preconditioned": False, "lambda_h": 1.0} | options))


def run(case=None, model=None, seed=0, **options):
    """(immunized model, log)."""
    return immunize(kappa(**options), case or linear_case(), model, seed)[1:]


def last(log, name):
    return log.column(name)[-1]


# the loop


def imma(**options):
    return KappaImma(lr=1e-3, **options)


@pytest.mark.parametrize(
    "make", [lambda **o: kappa(**o), lambda **o: opt(**o), imma], ids=["kappa", "opt", "imma"]
)
def test_same_seed_same_bits_and_input_untouched(make):
    case = linear_case()
    model = LinearBackbone().build(case, 0)
    before = model.theta.detach().clone()
    first, again, other = (immunize(make(steps=20), case, model, seed)[1] for seed in (0, 0, 1))
    assert torch.equal(model.theta, before)
    assert same_weights(first, again)
    assert not same_weights(first, other)
    assert not same_weights(first, model)
    assert isinstance(first, LinearExtractor)


def test_log_has_every_figure_and_the_last_is_the_models():
    case = linear_case()
    model, log = run(case, supervised=1.0, log_points=6)
    assert log.steps[0] == 0
    assert log.steps[-1] == 60
    assert len(log.steps) == len(log_steps(60, 6)) == 6
    x_p, x_h = (task.train.x for task in case.tasks)
    assert last(log, "kappa_benign") == pytest.approx(
        condition_number(model(x_p).detach()), rel=1e-9
    )
    assert last(log, "kappa_harmful") == pytest.approx(
        condition_number(model(x_h).detach()), rel=1e-9
    )
    assert log.rows[0]["rir"] == pytest.approx(1.0)
    assert all(0 < ratio < 1 for ratio in log.column("rir_bound_ratio"))
    assert set(log.rows[0]) >= {"lambda_p", "lambda_h", "benign_loss"}
    assert len(log_steps(1000, 25)) > 20
    assert log_steps(1, 25) == {0, 1}


def test_kappa_immunizes_and_the_ablations_do_half():
    case = linear_case(n=200, spread=1.0)
    both = run(case, steps=400, batch_size=64)[1]
    only_well = run(case, steps=400, batch_size=64, lambda_h=0.0)[1]
    only_ill = run(case, steps=400, batch_size=64, lambda_p=0.0)[1]
    assert last(both, "rir") > 1
    assert last(only_well, "kappa_benign") < 0.5 * only_well.rows[0]["kappa_benign"]
    assert last(only_ill, "kappa_harmful") > 2 * only_ill.rows[0]["kappa_harmful"]
    assert last(both, "kappa_harmful") > last(only_well, "kappa_harmful")
    assert last(both, "kappa_benign") < last(only_ill, "kappa_benign")


def test_lambdas_pull_in_their_own_direction():
    case = linear_case()
    base = run(case, steps=100)[1]
    assert last(run(case, steps=100, lambda_h=3e-2)[1], "kappa_harmful") > last(
        base, "kappa_harmful"
    )
    assert last(run(case, steps=100, lambda_p=2.0)[1], "kappa_benign") < last(base, "kappa_benign")


def test_well_only_approaches_the_closed_form():
    log = run(steps=2000, lambda_h=0.0, spectrum="full", lr=0.02, lr_schedule="cosine")[1]
    assert last(log, "kappa_benign") < 1.1
    assert last(log, "rir_bound_ratio") > 0.7


def test_epochs_count_batches_of_the_benign_task():
    model_a, log = run(steps=None, epochs=5)
    assert log.steps[-1] == 5 * (48 // 16)
    assert same_weights(model_a, run(steps=15)[0])


def test_batch_larger_than_the_data_is_the_whole_data():
    log = run(steps=None, epochs=5, batch_size=1000)[1]
    assert log.steps[-1] == 5


def test_zero_columns_are_left_out_without_effect():
    case = linear_case(d=6)
    keep = torch.tensor([1, 3, 4, 5, 7, 8])

    def widen(task):
        x = torch.zeros(len(task.train), 9, dtype=torch.float64)
        x[:, keep] = task.train.x
        split = Split(x, task.train.y)
        return Task(task.name, task.role, task.kind, split, split)

    wide = Case("wide", widen(case.benign), (widen(case.harmful[0]),))
    small = run(case, supervised=1.0)[0].theta.detach()
    model, log = run(wide, supervised=1.0)
    expected = torch.eye(9, dtype=torch.float64)
    expected[keep[:, None], keep] = small
    assert torch.allclose(model.theta, expected, atol=1e-12)
    assert "rir_bound_ratio" in log.rows[0]
    start = LinearExtractor(randn(9, 9, seed=2))
    right = dict(solve_side="right", ridge_benign=1.0, ridge_harmful=1.0, optimizer="adam")
    moved = run(wide, start, **right)[0].theta.detach()
    dropped = torch.tensor([0, 2, 6])
    assert torch.equal(moved[dropped], start.theta.detach()[dropped])
    assert not torch.equal(moved[keep], start.theta.detach()[keep])


# ── one step against autograd


def one_step(immunizer, case, model):
    """(gradient in θ that the engine leaves, the rows of both tasks)."""
    trainer = Trainer(immunizer.schedule, model, case, 0, lambda step, **values: None)
    objective = immunizer.objective()
    objective.start(trainer.setup)
    rows = [sampler.rows(0)[0] for sampler in trainer.samplers]
    heads = getattr(objective, "heads", None)
    before = [head.w.clone() for head in heads] if heads else None
    objective.step(0)
    trainer.engine.finish()
    return trainer.engine.theta.grad, rows, before, objective


def log_kappa_of(y):
    s = torch.linalg.svdvals(y)
    return 2 * (s[0] / s[-1]).log()


def test_opt_descends_the_two_logarithms():
    case = linear_case()
    model = LinearExtractor(torch.eye(6, dtype=torch.float64) + 0.2 * randn(6, 6))
    immunizer = KappaOpt(
        **(BASE | dict(lambda_p=0.7, lambda_h=3.0, scale="none", preconditioned=False))
    )
    gradient, rows, _, _ = one_step(immunizer, case, model)
    theta = model.theta.detach().clone().requires_grad_(True)
    y_p, y_h = (task.train.x[r] @ theta for task, r in zip(case.tasks, rows, strict=True))
    (expected,) = torch.autograd.grad(0.7 * log_kappa_of(y_p) + 3.0 / log_kappa_of(y_h), theta)
    assert torch.allclose(gradient, expected, rtol=1e-8)


def test_optimizer_aware_gradient_is_exact():
    case = linear_case()
    model = LinearExtractor(torch.eye(6, dtype=torch.float64) + 0.2 * randn(6, 6))
    options = dict(lambda_p=1.0, lambda_h=2.0, preconditioned=False, optimizer_aware="diagonal")
    for scale in ("none", "initial", "current"):  # log κ does not see the scale
        gradient, rows, _, _ = one_step(
            KappaOpt(**(BASE | options | {"scale": scale})), case, model
        )
        theta = model.theta.detach().clone().requires_grad_(True)
        y_p, y_h = (task.train.x[r] @ theta for task, r in zip(case.tasks, rows, strict=True))
        y_p, y_h = y_p / y_p.norm(dim=0), y_h / y_h.norm(dim=0)
        (expected,) = torch.autograd.grad(log_kappa_of(y_p) + 2.0 / log_kappa_of(y_h), theta)
        unit = float((gradient / expected).median())
        assert torch.allclose(
            gradient, unit * expected, rtol=1e-6, atol=1e-9 * float(gradient.abs().max())
        )


def test_supervised_term_is_the_gradient_of_the_benign_loss():
    case = linear_case()
    model = LinearBackbone().build(case, 0)
    with_loss, rows, _, _ = one_step(kappa(supervised=2.0), case, model)
    without = one_step(kappa(), case, model)[0]
    immunizer = kappa(supervised=2.0)
    trainer = Trainer(immunizer.schedule, model, case, 0, lambda step, **values: None)
    objective = immunizer.objective()
    objective.start(trainer.setup)
    theta = model.theta.detach().clone().requires_grad_(True)
    residual = (
        case.benign.train.x[rows[0]] @ theta @ objective.head.w
        - case.benign.train.y[rows[0]][:, None]
    )
    (expected,) = torch.autograd.grad(residual.square().mean() / 2, theta)
    assert torch.allclose(with_loss - without, 2.0 * expected, rtol=1e-6, atol=1e-12)


def test_imma_is_first_order_bilevel():
    case = linear_case()
    model = LinearBackbone().build(case, 0)
    immunizer = KappaImma(lr=1e-3, batch_size=16, inner_steps=2, inner_step=0.3, w_prior=0.5)
    gradient, rows, heads, _ = one_step(immunizer, case, model)
    theta = model.theta.detach().clone().requires_grad_(True)
    (x_p, x_h) = (task.train.x[r] for task, r in zip(case.tasks, rows, strict=True))
    (t_p, t_h) = (task.train.y[r][:, None] for task, r in zip(case.tasks, rows, strict=True))
    w, curvature = heads[1], float(torch.linalg.matrix_norm(x_h, 2)) ** 2 / 16
    for _ in range(2):
        w = w - 0.3 / curvature * x_h.T @ (x_h @ w - t_h) / 16
    harmful = (x_h @ theta @ w - t_h).square().mean() / 2
    benign = (x_p @ theta @ heads[0] - t_p).square().mean() / 2
    (expected,) = torch.autograd.grad(-harmful.log() + 0.5 * benign, theta)
    assert torch.allclose(gradient, expected, rtol=1e-8)


def test_imma_makes_its_own_attacker_worse():
    case = linear_case(n=200)
    logs = [immunize(KappaImma(lr=lr, steps=200), case)[2] for lr in (1e-9, 1e-2)]
    assert last(logs[1], "harmful_loss") > 2 * last(logs[0], "harmful_loss")


def test_ten_steps_are_those_of_the_loop_written_from_the_formulas():
    """Autograd through H and ``eigvalsh``, then a solve with K + ρI at every step
    (tests/benchmarks/kappa_step.py).
    """
    from benchmarks.kappa_step import compare

    def task(name, role, seed):
        x = randn(80, 60, seed=seed) @ torch.diag(torch.logspace(0, -1, 60, dtype=torch.float64))
        x = x / torch.linalg.matrix_norm(x, 2) * (80 / 64) ** 0.5
        split = Split(x, torch.ones(80, dtype=torch.float64))
        return Task(name, role, "regression", split, split)

    _, _, difference, moved = compare(
        Case("guard", task("good", "benign", 1), (task("bad", "harmful", 2),)), 10
    )
    assert moved > 1e-3
    assert difference < 1e-8
