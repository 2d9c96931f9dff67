"""KAPPA, its ablations and baselines on small linear problems: the loop, one step against
autograd, and what each option changes.
"""

import math

import pytest
import torch
from pydantic import ValidationError
from small_cases import immunize, linear_case, linear_task, randn

from immunize.kappa.method import Kappa, KappaImma, KappaOpt
from lab.core.condition import condition_number
from lab.core.config import user_error
from lab.core.data import Case, Split, Task
from lab.core.errors import Diverged, UserError
from lab.models.linear import LinearBackbone, LinearExtractor

BASE = dict(
    lambda_p=1.0, lambda_h=1e-2, scale="current", lr=0.05, steps=60, batch_size=16, supervised=0.0
)


def kappa(**options):
    return Kappa(**(BASE | options))


def run(case=None, model=None, seed=0, **options):
    """(immunized model, log)."""
    return immunize(kappa(**options), case or linear_case(), model, seed)[1:]


def last(log, name):
    return log.column(name)[-1]


# the loop


def test_log_has_every_figure_and_the_last_is_the_models():
    case = linear_case()
    model, log = run(case, supervised=1.0, log_points=6)
    assert (log.steps[0], log.steps[-1], len(log.steps)) == (0, 60, 6)
    x_p, x_h = (task.train.x for task in case.tasks)
    assert last(log, "kappa_benign") == pytest.approx(
        condition_number(model(x_p).detach()), rel=1e-9
    )
    assert last(log, "kappa_harmful") == pytest.approx(
        condition_number(model(x_h).detach()), rel=1e-9
    )
    assert log.rows[0]["rir"] == pytest.approx(1.0)
    assert all(0 < ratio < 1 for ratio in log.column("rir_bound_ratio"))


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
    model = run(wide, supervised=1.0)[0]
    expected = torch.eye(9, dtype=torch.float64)
    expected[keep[:, None], keep] = small
    assert torch.allclose(model.theta, expected, atol=1e-12)


# one step against autograd


def one_step(immunizer, case, model):
    """(gradient in θ that the engine holds, the rows of both tasks, heads before the step)."""
    trainer = immunizer.trainer(model, case, 0)
    rows = [trainer.batch(task, 0) for task in (0, 1)]
    before = {task: head.w.clone() for task, head in trainer.heads.items()}
    trainer.descend(0)
    return trainer.engine.theta.grad, rows, before


def log_kappa_of(y):
    s = torch.linalg.svdvals(y)
    return 2 * (s[0] / s[-1]).log()


def test_optimizer_aware_gradient_is_exact():
    case = linear_case()
    model = LinearExtractor(torch.eye(6, dtype=torch.float64) + 0.2 * randn(6, 6))
    options = dict(lambda_p=1.0, lambda_h=2.0, preconditioned=False)
    for aware, power in (("jacobi", 1.0), ("adam", 0.5)):
        for scale in ("none", "initial", "current"):  # log κ does not see the scale
            options |= {"optimizer_aware": aware, "scale": scale}
            gradient, rows, _ = one_step(KappaOpt(**(BASE | options)), case, model)
            theta = model.theta.detach().clone().requires_grad_(True)
            y_p, y_h = (t.train.x[r] @ theta for t, r in zip(case.tasks, rows, strict=True))
            y_p, y_h = y_p / y_p.norm(dim=0) ** power, y_h / y_h.norm(dim=0) ** power
            (expected,) = torch.autograd.grad(log_kappa_of(y_p) + 2.0 / log_kappa_of(y_h), theta)
            assert torch.allclose(
                gradient, expected, rtol=1e-6, atol=1e-9 * float(gradient.abs().max())
            )


@pytest.mark.parametrize("aware", ["none", "jacobi", "adam", "kfac"])
def test_a_batch_has_about_the_unit_that_was_computed_from_all_rows(aware):
    options = {"optimizer_aware": aware, "scale": "initial", "batch_size": 100}
    case = linear_case(n=400)
    trainer = KappaOpt(**(BASE | options)).trainer(LinearBackbone().build(case, 0), case, 0)
    assert float(trainer._estimate(0, 0).factor.s[0]) == pytest.approx(1, abs=0.15)


def test_mean_over_rows_scales_both_terms_as_their_formulas_do():
    case = linear_case()
    model = LinearBackbone().build(case, 0)
    m = BASE["batch_size"]  # H/m: K⁻¹∇R_well is ∝ σ, K⁻¹∇R_ill ∝ σ⁻³
    for lambdas, factor in ((dict(lambda_h=0.0), 1 / m), (dict(lambda_p=0.0), m**3)):
        summed, mean = (
            one_step(kappa(scale=scale, **lambdas), case, model)[0] for scale in ("none", "rows")
        )
        assert torch.allclose(mean, factor * summed, rtol=1e-9)


def test_supervised_term_is_the_gradient_of_the_benign_loss():
    case = linear_case()
    model = LinearBackbone().build(case, 0)
    with_loss, rows, heads = one_step(kappa(supervised=2.0), case, model)
    without = one_step(kappa(), case, model)[0]
    theta = model.theta.detach().clone().requires_grad_(True)
    benign = case.benign.train
    residual = benign.x[rows[0]] @ theta @ heads[0] - benign.y[rows[0]][:, None]
    (expected,) = torch.autograd.grad(residual.square().mean() / 2, theta)
    assert torch.allclose(with_loss - without, 2.0 * expected, rtol=1e-6, atol=1e-12)


def test_imma_is_first_order_bilevel():
    case = linear_case()
    model = LinearBackbone().build(case, 0)
    immunizer = KappaImma(lr=1e-3, batch_size=16, inner_steps=2, inner_step=0.3, w_prior=0.5)
    gradient, rows, heads = one_step(immunizer, case, model)
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


# options


def spread_of_estimates(**options):
    """Mean and mean squared distance between 50 estimates of a Gram matrix and the exact one."""
    case = linear_case(n=400)
    x = case.benign.train.x
    trainer = kappa(**options).trainer(LinearBackbone().build(case, 0), case, 0)
    grams = []
    for step in range(20, 70):
        rows, roots = trainer.rows(0, step)
        grams.append((x[rows] * roots).T @ (x[rows] * roots))
    exact = x.T @ x * 16 / 400
    assert torch.allclose(torch.stack(grams).mean(0), exact, atol=0.15 * float(exact.abs().max()))
    return float(torch.stack([(g - exact).square().sum() for g in grams]).mean())


def test_spectra_reduce_variance():
    assert spread_of_estimates(spectrum="full") < 1e-20
    windows = [
        spread_of_estimates(spectrum="running", running_decay=1.0, running_window=m) for m in (2, 8)
    ]
    assert spread_of_estimates() > 1.5 * windows[0] > 3 * windows[1]


def shared_case():
    """Both tasks load on the same directions, so that R_ill hurts the benign task too."""
    case = linear_case(n=120, spread=1.0)
    split = Split(case.benign.train.x + 0.02 * randn(120, 6, seed=50), case.benign.train.y)
    return Case("shared", case.benign, (Task("h", "harmful", "regression", split, split),))


def test_corridor_keeps_the_benign_kappa_inside():
    options = dict(lambda_p=0.05, lambda_h=2e-2, spectrum="full", steps=400)
    fixed = run(shared_case(), **options)[1]
    start = fixed.rows[0]["kappa_benign"]
    assert last(fixed, "kappa_benign") > 3 * start
    options |= dict(lambda_schedule="corridor", corridor_rate=0.5)
    corridor = run(shared_case(), **options, corridor_benign=1.2)[1]
    assert abs(math.log(last(corridor, "kappa_benign") / start)) < math.log(1.3)


def test_worst_case_weights_move_to_the_worst_task():
    """One harmful task is the benign one in disguise and cannot be immunized, the other can."""
    case = shared_case()
    case = Case("two", case.benign, (case.harmful[0], linear_task("free", "harmful", 60, 6, 900)))
    equal = run(case, steps=300, spectrum="full")[1]
    robust = run(case, steps=300, spectrum="full", worst_case=True)[1]
    assert last(equal, "weight_0") == last(equal, "weight_1") == 0.5
    assert last(robust, "weight_0") > 0.6
    assert last(robust, "weight_0") + last(robust, "weight_1") == pytest.approx(1.0)


# what cannot work


def test_divergence_carries_the_last_good_step():
    with pytest.raises(Diverged, match="kappa left the finite numbers at step") as error:
        run(lr=1e6, steps=50, scale="none")
    assert 0 <= error.value.step < 50


def test_kappa_beyond_float64_is_not_reported_as_small():
    with pytest.raises(Diverged, match=r"rank"):
        run(lambda_p=0.0, lambda_h=1.0, lr=0.02, steps=4000, spectrum="full", log_points=200)


@pytest.mark.parametrize(
    ("build", "options", "key"),
    [
        (Kappa, {"corridor_benign": 0}, "corridor_benign"),
        (KappaOpt, {"rank_rule": "dimension"}, "rank_rule"),
        (KappaImma, {"inner_steps": 0}, "inner_steps"),
    ],
)
def test_wrong_options_name_the_key(build, options, key):
    base = {} if build is KappaImma else BASE
    with pytest.raises(ValidationError) as error:
        build(**(base | options))
    assert user_error(error.value, "immunize", build).key == f"immunize.{key}"


def test_terms_that_cannot_work_together_are_refused():
    with pytest.raises(UserError, match=r"immunize\.lambda_h"):
        kappa(lambda_p=0.0, lambda_h=0.0)
