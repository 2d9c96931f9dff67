"""What immunizers, attackers and metrics return is checked before anything is claimed from it."""

import math

import pytest
import torch

from lab.core.errors import UserError
from lab.core.types import Budget, Score, Scores, Trajectory
from lab.runner.pipeline import check_immunized, check_scores, check_trajectory

LOSSES = {"train_loss": [1.0, 0.5], "test_loss": [1.0, 0.6]}
BUDGET = Budget(horizon=5, multiple=1, at=(0, 5))


def images(points=2, side=8):
    return {"name": torch.zeros(points, 4, 3, side, side, dtype=torch.uint8)}


def test_a_trajectory_at_the_snapshots_passes_and_a_diverged_one_may_end_earlier():
    check_trajectory(Trajectory([0, 5], LOSSES, samples=images()), "mine", BUDGET, 8)
    first = {name: values[:1] for name, values in LOSSES.items()}
    check_trajectory(Trajectory([0], first, "diverged"), "mine", BUDGET)
    early = Budget(5, 1, at=(0, 2, 5), unit="images")  # an update of five images passes over it
    check_trajectory(Trajectory([0, 5], LOSSES), "mine", early)
    with pytest.raises(UserError, match="not the snapshots"):
        check_trajectory(Trajectory([0, 5], LOSSES), "mine", Budget(5, 1, at=(0, 2, 5)))


def test_updates_of_several_images_keep_to_snapshots_that_the_budget_has():
    budget = Budget(16, 1, unit="images")
    steps = [8 * update for update in budget.in_updates(8).snapshots()]
    losses = {name: [1.0] * len(steps) for name in LOSSES}
    check_trajectory(Trajectory(steps, losses), "mine", budget)
    assert set(steps) <= set(budget.snapshots())


@pytest.mark.parametrize(
    "trajectory",
    [
        None,
        Trajectory([5, 10], LOSSES),
        Trajectory([], {}, "diverged"),
        Trajectory([0], {k: v[:1] for k, v in LOSSES.items()}),
        Trajectory([0, 5], LOSSES | {"test_loss": [1.0, math.nan]}),
        Trajectory([0, 5], {"train_loss": [1.0, 0.5]}),
        Trajectory([0, 5], LOSSES, samples=images(side=4)),
    ],
)
def test_a_trajectory_that_would_be_read_wrongly_is_refused(trajectory):
    with pytest.raises(UserError, match=r"attacks\.mine"):
        check_trajectory(trajectory, "mine", BUDGET, 8)


def test_a_model_of_other_parameters_is_refused():
    before = torch.nn.Linear(2, 2).state_dict()
    check_immunized(torch.nn.Linear(2, 2), before, "mine")
    for after in (None, torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(3, 2)):
        with pytest.raises(UserError, match="immunize=mine"):
            check_immunized(after, before, "mine")


def test_scores_that_no_record_can_hold_are_refused():
    curve = {"step": [0, 1], "mine": [1.0, None], "x": "steps", "y": "loss", "log": ""}
    check_scores(Scores({"x": Score(1.0), "y": Score(None, note="no case")}, {"c": curve}), "m")
    wrong = [
        {"x": 1.0},
        Scores({"Theta norm": Score(1.0)}),
        Scores({"x": Score(None)}),
        Scores({"x": Score(math.inf)}),
        Scores(curves={"c": {"step": [0, 1], "mine": [1.0]}}),
    ]
    for scores in wrong:
        with pytest.raises(ValueError, match=r"eval\.norms"):
            check_scores(scores, "norms")
