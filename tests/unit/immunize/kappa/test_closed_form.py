"""The baseline model and the closed form."""

import pytest
import torch
from pydantic import ValidationError
from small_cases import immunize, linear_case, randn

from immunize.kappa.closed_form import KappaClosedForm
from lab.core.condition import condition_number, outside_energy, range_basis, rir_bound
from lab.core.data import Case, Split, Task
from lab.core.errors import UserError
from lab.models.linear import LinearBackbone, LinearExtractor


@pytest.mark.parametrize("init", ["identity", "random"])
def test_attains_the_bound(init):
    case = linear_case(d=7, spread=1.5)
    start, after, log = immunize(KappaClosedForm(), case, LinearBackbone(init=init).build(case, 0))
    x_p, x_h = (task.train.x for task in case.tasks)
    assert condition_number(after(x_p).detach()) == pytest.approx(1.0, rel=1e-9)
    assert log.column("rir_bound_ratio")[-1] == pytest.approx(1.0, rel=1e-6)
    assert log.column("rir")[0] == pytest.approx(1.0)
    ratio = condition_number(after(x_h).detach()) / condition_number(start(x_h).detach())
    ratio /= condition_number(after(x_p).detach()) / condition_number(start(x_p).detach())
    assert ratio == pytest.approx(rir_bound(x_p, x_h, start.theta).value, rel=1e-6)
    assert float(after(x_p).detach().square().mean()) == pytest.approx(
        float(start(x_p).detach().square().mean())
    )


@pytest.mark.parametrize("allowance", [0.3, 1.0, 4.0])
def test_the_pencil_variant_attains_the_same_bound_at_any_benign_condition(allowance):
    case = linear_case(d=7, spread=1.5)
    start, after, log = immunize(KappaClosedForm(benign_condition=allowance), case)
    x_p, x_h = (task.train.x for task in case.tasks)
    before = condition_number(start(x_p).detach())
    assert condition_number(after(x_p).detach()) == pytest.approx(
        max(allowance * before, 1.0), rel=1e-6
    )
    assert log.column("rir_bound_ratio")[-1] == pytest.approx(1.0, rel=1e-6)
    harmful = condition_number(after(x_h).detach()) / condition_number(start(x_h).detach())
    assert harmful == pytest.approx(allowance * rir_bound(x_p, x_h, start.theta).value, rel=1e-6)


def test_two_tasks_that_are_alike_cannot_be_told_apart():
    case = linear_case(d=5)
    same = Case(
        case.name,
        case.benign,
        (Task("h", "harmful", "regression", case.benign.train, case.benign.test),),
    )
    with pytest.raises(UserError, match="no linear map"):
        immunize(KappaClosedForm(benign_condition=1.0), same)


def test_singular_benign_data_use_the_range_variant():
    case = linear_case(d=6)
    x = case.benign.train.x.clone()
    x[:, 3] = x[:, 0]
    split = Split(x, case.benign.train.y)
    case = Case(case.name, Task("b", "benign", "regression", split, split), case.harmful)
    _, after, log = immunize(KappaClosedForm(), case)
    x_p, x_h = (task.train.x for task in case.tasks)
    basis, _ = range_basis(x_p)
    assert basis.shape == (6, 5)
    assert condition_number(after(x_p).detach()) == pytest.approx(1.0, rel=1e-9)
    assert log.column("rir_bound_ratio")[-1] == pytest.approx(1.0, rel=1e-6)
    assert log.column("outside_energy")[-1] == pytest.approx(outside_energy(x_h, basis))
    assert log.column("outside_energy")[-1] > 1e-3
    null = torch.eye(6, dtype=torch.float64) - basis @ basis.T
    assert float((null @ after.theta).norm()) < 1e-12
    model = LinearExtractor(randn(6, 6, seed=4))
    assert immunize(KappaClosedForm(), case, model)[2].column("rir_bound_ratio")[
        -1
    ] == pytest.approx(1.0, rel=1e-6)


def test_wrong_options_and_flat_data_are_refused():
    with pytest.raises(ValidationError, match="benign_condition"):
        KappaClosedForm(benign_condition=0.0)
    flat = Split(torch.ones(9, 3, dtype=torch.float64), torch.zeros(9, dtype=torch.float64))
    case = Case("flat", Task("b", "benign", "regression", flat, flat), linear_case(d=3).harmful)
    with pytest.raises(UserError, match="rank 1"):
        immunize(KappaClosedForm(), case)
