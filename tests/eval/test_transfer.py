"""Rank correlation of RIR and measured slowdown over cases whose RIR is known by construction."""

from dataclasses import dataclass, field

import pytest
import torch
from fake_run import decay, linear, task

from eval.transfer import Transfer
from lab.errors import UserError
from lab.types import CONTROL, Budget, Case

BUDGET = Budget(20, 5, 20)
STEPS = BUDGET.snapshots()
SCALES = [1.1 + 0.08 * i for i in range(10)]  # θ = diag(1, 1/s): RIR = s^-4 on the data below


@dataclass
class Run:
    """Benign data with K_P = 2 I, harmful data twice as long in the second column."""

    factor: float = 1.0  # sign and strength of the effect of RIR on the attacker's rate
    scales: list[float] = field(default_factory=lambda: list(SCALES))
    immunizer = "kappa"
    arms = (CONTROL, "kappa")
    attacks = ("probe",)
    seeds = (0, 1, 2)
    scenario = "fake"
    budget = BUDGET

    def cases(self, seed):
        eye = torch.eye(2, dtype=torch.float64)
        benign, harmful = torch.cat([eye, -eye]), torch.cat([eye, -eye]) * torch.tensor([1.0, 2.0]).double()
        return tuple(
            Case(str(i), task(benign, "good", "benign"), (task(harmful, "harm", "harmful"),))
            for i in range(len(self.scales))
        )

    def model(self, arm, case, seed):
        scale = 1.0 if arm == CONTROL else self.scales[int(case.name)]
        return linear(torch.diag(torch.tensor([1.0, 1 / scale], dtype=torch.float64)))

    def history(self, case, seed):
        return {"step": []}

    def trajectory(self, arm, attack, case, task, seed):
        if arm == CONTROL or task.role == "benign":
            return decay(0.8, STEPS)
        rir = self.scales[int(case.name)] ** -4
        return decay(0.8 ** (1 - self.factor * 0.5 * rir), STEPS)


@pytest.mark.parametrize(("factor", "rho"), [(1.0, 1.0), (-1.0, -1.0)])
def test_slowdown_that_follows_rir_has_rho_one_and_its_reverse_minus_one(factor, rho):
    scores = Transfer()(Run(factor))
    found = scores.metrics["transfer_probe"]
    assert found.value == pytest.approx(rho)
    assert found.interval == "across_seeds"
    assert found.low == pytest.approx(rho)
    assert scores.tables["transfer"][0]["cases"] == 30
    assert scores.tables["transfer"][0]["censored"] == 0


def test_no_effect_has_no_correlation_and_says_why():
    found = Transfer()(Run(0.0)).metrics["transfer_probe"]
    assert found.value is None
    assert "no rank correlation" in found.note


def test_a_constant_angle_cannot_predict():
    assert Transfer()(Run()).metrics["angle_predicts_rir"].value is None


def test_bad_input():
    with pytest.raises(UserError, match="at least 8 cases"):
        Transfer()(Run(scales=SCALES[:7]))
    with pytest.raises(UserError, match=r"eval\.transfer\.draws"):
        Transfer(draws=10)
