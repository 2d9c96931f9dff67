"""Rank correlation of RIR and measured slowdown over cases whose RIR is known by construction."""

from dataclasses import dataclass, field

import pytest
import torch
from fake_run import STEPS, FakeRun, decay, linear, task

from eval.features.transfer import Transfer
from lab.core.data import Case
from lab.core.errors import UserError
from lab.core.types import BASELINE

SCALES = [1.1 + 0.08 * i for i in range(10)]  # θ = diag(1, 1/s): RIR = s^-4 on the data below


@dataclass
class Run(FakeRun):
    """Benign data with K_P = 2 I, harmful data twice as long in the second column."""

    factor: float = 1.0  # sign and strength of the effect of RIR on the attacker's rate
    scales: list[float] = field(default_factory=lambda: list(SCALES))

    def cases(self, seed):
        eye = torch.eye(2, dtype=torch.float64)
        benign = torch.cat([eye, -eye])
        harmful = benign * torch.tensor([1.0, 2.0]).double()
        return tuple(
            Case(str(i), task(benign, "good", "benign"), (task(harmful, "harm", "harmful"),))
            for i in range(len(self.scales))
        )

    def model(self, model_name, case, seed):
        scale = 1.0 if model_name == BASELINE else self.scales[int(case.name)]
        return linear(torch.diag(torch.tensor([1.0, 1 / scale], dtype=torch.float64)))

    def trajectory(self, model_name, attack, case, task, seed):
        if model_name == BASELINE or task.role == "benign":
            return decay(0.8, STEPS)
        return decay(0.8 ** (1 - self.factor * 0.5 * self.scales[int(case.name)] ** -4), STEPS)


@pytest.mark.parametrize(
    ("factor", "rho"), [pytest.param(1.0, 1.0, marks=pytest.mark.slow), (-1.0, -1.0)]
)
def test_slowdown_that_follows_rir_has_rho_one_and_its_reverse_minus_one(factor, rho):
    scores = Transfer()(Run(factor=factor))
    result, row = scores.metrics["transfer_probe"], scores.tables["transfer"][0]
    assert (result.value, result.low) == (pytest.approx(rho), pytest.approx(rho))
    assert (row["cases"], row["censored"]) == (30, 0)


def test_bad_input():
    with pytest.raises(UserError, match="at least 8 cases"):
        Transfer().check(Run(scales=SCALES[:7]).cases(0))


@dataclass
class Cut(Run):
    """In the first two cases immunization removes a direction."""

    def model(self, model_name, case, seed):
        if model_name != BASELINE and case.name in ("0", "1"):
            return linear(torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)))
        return super().model(model_name, case, seed)


def test_cases_whose_rank_moved_are_left_out_of_kappa_and_counted():
    metrics = Transfer()(Cut()).metrics
    assert metrics["transfer_probe"].value == pytest.approx(1)
    assert "6 of 30 cases left out: the numerical rank moved" in metrics["transfer_probe"].note
    assert "left out" not in metrics["angle_predicts_slowdown_probe"].note


@dataclass
class Immediate(Run):
    """In the first case the immunized model meets the benign target before any step."""

    def trajectory(self, model_name, attack, case, task, seed):
        found = super().trajectory(model_name, attack, case, task, seed)
        if model_name != BASELINE and task.role == "benign" and case.name == "0":
            found.values = {name: [0.0] * len(STEPS) for name in found.values}
        return found


def test_a_task_that_is_met_at_once_counts_as_one_step():
    scores = Transfer()(Immediate())
    assert scores.tables["transfer"][0]["cases"] == 30
    (first, *_) = scores.tables["transfer_cases"]
    steps = Immediate().budget.steps
    assert first["relative_slowdown"] == pytest.approx(first["harmful_slowdown"] * steps)
