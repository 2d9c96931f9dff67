"""Options of KAPPA on small linear problems: one option, one stated effect; and what cannot
work.
"""

import math

import pytest
import torch
from small_cases import immunize, linear_case, linear_task, randn

from immunize.kappa.method import Kappa, KappaImma
from immunize.kappa.spectral import diagonal_preconditioner
from immunize.kappa.trainer import Trainer
from lab.core.condition import condition_number
from lab.core.data import Case, Split, Task
from lab.core.errors import Diverged, UserError
from lab.core.types import same_weights
from lab.models.linear import LinearBackbone

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


# options


def scaled(case, factor):
    def bigger(task):
        split = Split(factor * task.train.x, task.train.y)
        return Task(task.name, task.role, task.kind, split, split)

    return Case(case.name, bigger(case.benign), tuple(bigger(h) for h in case.harmful))


@pytest.mark.parametrize("scale", ["initial", "current"])
def test_scale_makes_lambda_free_of_units(scale):
    case = linear_case()
    a, b = run(case, scale=scale)[0], run(scaled(case, 100.0), scale=scale)[0]
    assert torch.allclose(a.theta, b.theta, rtol=1e-8)
    small = dict(scale="none", lr=1e-8)
    a, b = run(case, **small)[0], run(scaled(case, 100.0), **small)[0]
    assert not torch.allclose(a.theta, b.theta, rtol=1e-8)


def test_current_scale_goes_on_where_initial_stalls():
    logs = {
        s: run(scale=s, lambda_h=0.0, steps=800, spectrum="full")[1] for s in ("initial", "current")
    }
    assert last(logs["current"], "kappa_benign") < last(logs["initial"], "kappa_benign")


def test_preconditioner_ridge_and_side():
    case = linear_case()
    start = torch.eye(6, dtype=torch.float64)
    plain, ridge, stronger = (
        run(case, ridge_benign=r, ridge_harmful=r, steps=5)[0].theta.detach() - start
        for r in (0.0, 0.1, 10.0)
    )
    assert plain.norm() > ridge.norm() > stronger.norm()
    one, other = (
        run(case, steps=5, **{key: 0.1})[0].theta for key in ("ridge_benign", "ridge_harmful")
    )
    assert not torch.allclose(one, other)
    assert not torch.allclose(run(case, preconditioned=False, steps=5)[0].theta - start, plain)
    both = dict(ridge_benign=0.1, ridge_harmful=0.1, steps=5)
    assert not torch.allclose(run(case, **both, solve_side="right")[0].theta - start, ridge)


def test_adam_moves_every_entry_by_eta_at_first():
    theta = run(optimizer="adam", steps=1, lr=1e-3)[0].theta.detach() - torch.eye(
        6, dtype=torch.float64
    )
    assert torch.allclose(theta.abs(), torch.full((6, 6), 1e-3, dtype=torch.float64), rtol=1e-3)


def test_cosine_schedule_settles():
    case = linear_case()
    rough, smooth = (
        run(case, lr=0.2, lambda_h=0.0, steps=400, lr_schedule=s)[1] for s in ("constant", "cosine")
    )
    assert last(smooth, "kappa_benign") < last(rough, "kappa_benign")


def test_rank_rule_and_tolerance_change_p():
    case = linear_case(d=20)
    base = run(case, steps=5)[0].theta
    assert not torch.allclose(base, run(case, steps=5, rank_rule="dimension")[0].theta)
    assert not torch.allclose(base, run(case, steps=5, rank_tolerance=0.1)[0].theta)


def test_cluster_average_spreads_over_near_multiple_directions():
    case = linear_case()
    one, many = (
        run(case, steps=1, cluster_tolerance=c, lambda_h=0.0, spectrum="full")[0]
        for c in (0.0, 0.9)
    )
    change = [
        torch.linalg.svdvals(m.theta - torch.eye(6, dtype=torch.float64)) for m in (one, many)
    ]
    assert change[1][0] / change[1][1] < change[0][0] / change[0][1]


def test_spectra_reduce_variance():
    case = linear_case(n=400)
    x = case.benign.train.x
    errors = {}
    for spectrum in ("batch", "running", "full"):
        more = {"running_window": 5} if spectrum == "running" else {}
        schedule = kappa(spectrum=spectrum, **more).schedule
        sampler = Trainer(
            schedule, LinearBackbone().build(case, 0), case, 0, lambda step, **v: None
        ).samplers[0]
        grams = []
        for step in range(10, 60):
            rows, roots = sampler.rows(step)
            grams.append((x[rows] * roots).T @ (x[rows] * roots))
        exact = x.T @ x * 16 / 400
        errors[spectrum] = float(torch.stack([(g - exact).square().sum() for g in grams]).mean())
        assert torch.allclose(
            torch.stack(grams).mean(0), exact, atol=0.15 * float(exact.abs().max())
        )
    assert errors["running"] < 0.4 * errors["batch"]
    assert errors["full"] < 1e-20


def test_more_rows_per_estimate_whiten_better():
    case = linear_case(n=200)
    logs = {
        s: run(case, spectrum=s, batch_size=8, steps=400, lambda_h=0.0)[1]
        for s in ("batch", "running", "full")
    }
    assert last(logs["batch"], "rir") < last(logs["running"], "rir") < last(logs["full"], "rir")
    a, b = (
        run(case, spectrum="running", **o)[0]
        for o in ({"running_decay": 0.5}, {"running_window": 2})
    )
    assert not same_weights(a, b)


def shared_case():
    """Both tasks load on the same directions, so that R_ill hurts the benign task too."""
    case = linear_case(n=120, spread=1.0)
    x = case.benign.train.x + 0.02 * randn(120, 6, seed=50)
    split = Split(x, case.benign.train.y)
    return Case("shared", case.benign, (Task("h", "harmful", "regression", split, split),))


def test_corridor_keeps_the_benign_kappa_inside():
    options = dict(lambda_p=0.05, lambda_h=2e-2, spectrum="full", steps=400)
    fixed = run(shared_case(), **options)[1]
    start = fixed.rows[0]["kappa_benign"]
    assert last(fixed, "kappa_benign") > 3 * start
    options |= dict(lambda_schedule="corridor", corridor_rate=0.5)
    corridor = run(shared_case(), **options, corridor_benign=1.2)[1]
    assert abs(math.log(last(corridor, "kappa_benign") / start)) < math.log(1.3)
    assert max(corridor.column("lambda_p")) > 0.07
    wider = run(shared_case(), **options, corridor_benign=2.0)[1]
    assert last(wider, "kappa_benign") > last(corridor, "kappa_benign")
    higher = run(shared_case(), **options, corridor_benign=50.0, corridor_harmful=20.0)[1]
    assert last(higher, "kappa_harmful") > last(wider, "kappa_harmful")


def test_worst_case_weights_move_to_the_worst_task():
    """One harmful task is the benign one in disguise and cannot be immunized, the other can."""
    case = shared_case()
    case = Case("two", case.benign, (case.harmful[0], linear_task("free", "harmful", 60, 6, 900)))
    equal = run(case, steps=300, spectrum="full")[1]
    robust = run(case, steps=300, spectrum="full", worst_case=True)[1]
    sharp = run(case, steps=300, spectrum="full", worst_case=True, worst_case_temperature=5.0)[1]
    assert last(equal, "weight_0") == last(equal, "weight_1") == 0.5
    assert last(robust, "weight_0") > 0.6
    assert last(sharp, "weight_0") > last(robust, "weight_0")
    assert last(robust, "weight_0") + last(robust, "weight_1") == pytest.approx(1.0)
    assert robust.rows[0]["weight_0"] == pytest.approx(0.5)


def aligned_task(name, role, n, seed):
    """Spread along the axes, which a diagonal preconditioner undoes."""
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    x = randn(n, 6, seed=seed) * torch.logspace(0, -1, 6, dtype=torch.float64)[order]
    split = Split(x, x[:, 0])
    return Task(name, role, "regression", split, split)


@pytest.mark.parametrize("scale", ["initial", "current"])
def test_optimizer_aware_hurts_the_preconditioned_attacker_more(scale):
    case = Case(
        "aligned", aligned_task("b", "benign", 200, 1), (aligned_task("h", "harmful", 150, 11),)
    )
    options = dict(steps=300, batch_size=64, scale=scale)
    models = [run(case, **options, optimizer_aware=aware)[0] for aware in ("none", "diagonal")]

    def seen(model, task):
        return condition_number(diagonal_preconditioner(model(task.train.x).detach())[0])

    ratios = [seen(m, case.harmful[0]) / seen(m, case.benign) for m in models]
    assert ratios[1] > 2 * ratios[0]


# what cannot work


def test_divergence_carries_the_last_good_step():
    with pytest.raises(Diverged, match="kappa left the finite numbers at step") as error:
        run(lr=1e6, steps=50, scale="none")
    assert 0 <= error.value.step < 50
    with pytest.raises(Diverged, match="kappa_imma"):
        immunize(KappaImma(lr=1e300, steps=50), linear_case())


def test_kappa_beyond_float64_is_not_reported_as_small():
    with pytest.raises(Diverged, match=r"rank"):
        run(lambda_p=0.0, lambda_h=1.0, lr=0.02, steps=4000, spectrum="full", log_points=200)


def test_rank_one_batches_cannot_move_kappa():
    x = torch.ones(20, 3, dtype=torch.float64)
    split = Split(x, x[:, 0])
    case = Case(
        "flat",
        linear_task("b", "benign", 20, 3, 0),
        (Task("h", "harmful", "regression", split, split),),
    )
    with pytest.raises(Diverged, match="rank below 2"):
        run(case)


BAD = {
    "lambda_p": -1,
    "lambda_h": -1,
    "ridge_benign": -1,
    "ridge_harmful": -1,
    "cluster_tolerance": 1.0,
    "supervised": -0.1,
    "corridor_rate": -1,
    "corridor_benign": 0,
    "corridor_harmful": 0,
    "rank_tolerance": 0,
    "worst_case_temperature": 0,
    "scale": "curent",
    "solve_side": "right",
    "rank_rule": "x",
    "optimizer_aware": "adam",
    "lambda_schedule": "x",
    "lr": 0,
    "epochs": 0,
    "steps": 0,
    "batch_size": 1,
    "optimizer": "sgd",
    "spectrum": "x",
    "running_decay": 0,
    "running_window": 0,
    "log_points": 1,
    "checkpoint_every": 0,
    "lr_schedule": "x",
}


@pytest.mark.parametrize("key", BAD)
def test_bad_options_name_the_key(key):
    with pytest.raises(UserError) as error:
        kappa(**{key: BAD[key]})
    assert error.value.key == f"immunize.{key}"
    assert error.value.fix


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 1.5),
        ("epochs", True),
        ("batch_size", 2.5),
        ("steps", "many"),
        ("log_points", None),
        ("lambda_h", "abc"),
        ("lambda_p", True),
        ("lambda_h", None),
        ("lr", math.nan),
        ("ridge_benign", math.inf),
        ("preconditioned", "yes"),
        ("worst_case", 1),
        ("layers", 1.5),
        ("layers", True),
        ("layers", [True]),
        ("rank_tolerance", 1.0),
        ("running_decay", "slow"),
        ("checkpoint_every", 0.5),
        ("scale", 3),
    ],
)
def test_values_of_a_wrong_type_name_the_key(key, value):
    with pytest.raises(UserError) as error:
        kappa(**{key: value})
    assert error.value.key == f"immunize.{key}"
    assert error.value.value is value
    assert error.value.fix


def test_other_bad_options():
    with pytest.raises(UserError, match="both 0"):
        kappa(lambda_p=0.0, lambda_h=0.0)
    for key, value in (("inner_steps", 0), ("inner_step", 0), ("w_prior", -1)):
        with pytest.raises(UserError, match=rf"immunize\.{key}"):
            KappaImma(**{key: value})
    with pytest.raises(UserError, match=r"immunize\.layers"):
        run(layers=["thetta"])
