"""What immunizers, attackers and metrics of one's own return is checked before figures are made of
it.
"""

import math
from typing import Any

import pytest
import torch

from lab.core.errors import UserError
from lab.core.types import Budget, Score, Scores, Trajectory
from lab.runner.returned import check_immunized, check_scores, check_trajectory

LOSSES = {"train_loss": [1.0, 0.5], "test_loss": [1.0, 0.6]}
BUDGET = Budget(horizon=5, multiple=1, at=(0, 5))


def pictures(
    points: int = 2, dtype: torch.dtype = torch.uint8, side: int = 8
) -> dict[str, torch.Tensor]:
    return {"name": torch.zeros(points, 4, 3, side, side, dtype=dtype)}


def test_what_the_contract_says_passes() -> None:
    check_trajectory(Trajectory([0, 5], LOSSES, samples=pictures()), "mine", BUDGET, 8)
    check_trajectory(
        Trajectory([0], {k: v[:1] for k, v in LOSSES.items()}, "diverged"), "mine", BUDGET
    )


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (
            Trajectory([5, 10], LOSSES),
            "must be the snapshots",
        ),  # the last picture would count as "before any attack"
        (Trajectory([0, 0], LOSSES), "must be the snapshots"),
        (Trajectory([], {}), "must be the snapshots"),
        (
            Trajectory([0], {k: v[:1] for k, v in LOSSES.items()}),
            "only one that diverged may end before",
        ),
        (Trajectory([0, 4], LOSSES, "diverged"), "must be the snapshots"),
        (Trajectory([0, 5], LOSSES, "exploded"), "must be ok or diverged"),  # type: ignore[arg-type]
        (Trajectory([0, 5], LOSSES | {"test_loss": [1.0, math.nan]}), "no finite number"),
        (Trajectory([0, 5], {"train_loss": [1.0, 0.5]}), "lack test_loss"),
        (Trajectory([0, 5], LOSSES | {"norm_ratio": [1.0]}), "1 values at 2 steps"),
        (Trajectory([0, 5], LOSSES, samples=pictures(1)), "not of torch.uint8"),
        (Trajectory([0, 5], LOSSES, samples=pictures(dtype=torch.float32)), "torch.float32"),
        (Trajectory([0, 5], LOSSES, samples=pictures(side=4)), "[2, pictures, 3, 8, 8]"),
        (Trajectory([0, 5], LOSSES, info={"lr": torch.ones(1)}), "not JSON serializable"),
        (None, "not a lab.core.types.Trajectory"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(found: Any, told: str) -> None:
    with pytest.raises(UserError, match=r"attacks\.mine") as error:
        check_trajectory(found, "mine", BUDGET, 8)
    assert told in str(error.value)


def test_a_model_of_other_parameters_is_refused() -> None:
    before = torch.nn.Linear(2, 2).state_dict()
    assert check_immunized(torch.nn.Linear(2, 2), before, "mine").keys() == before.keys()
    for after, told in (
        (None, "returned NoneType, not a model"),
        (torch.nn.Linear(2, 2, bias=False), "whose bias is not as in"),
        (torch.nn.Linear(3, 2), "whose weight is not as in"),
    ):
        with pytest.raises(UserError, match=f"immunize=mine: .*{told}"):
            check_immunized(after, before, "mine")


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"x": 1.0}, "returned dict, not Scores"),
        (Scores({"x": 1.0}), "gives x as float, not as a Score"),  # type: ignore[dict-item]
        (Scores({"Theta norm": Score(1.0)}), "snake case"),
        (Scores({"x": Score(1.0, better="up")}), "better='up'"),  # type: ignore[arg-type]
        (Scores({"x": Score(None)}), "no note with the reason"),
        (Scores({"x": Score(math.inf)}), "no finite number"),
        (Scores({"x": Score(1.0, low=math.nan, high=2.0)}), "the low nan"),
        (Scores(curves={"c": {"step": [0, 1], "mine": [1.0]}}), "1 values of mine at 2 steps"),
        (Scores(curves={"c": {"mine": [1.0]}}), "the curve c no step"),
        (Scores(tables={"t": [1]}), "a row that is no mapping"),  # type: ignore[list-item]
    ],
)
def test_scores_that_no_record_can_hold_are_refused(found: Any, told: str) -> None:
    with pytest.raises(ValueError, match=r"eval\.norms") as error:
        check_scores(found, "norms")
    assert told in str(error.value)


def test_scores_of_a_record_pass() -> None:
    curve = {"step": [0, 1], "mine": [1.0, None], "x": "steps", "y": "loss", "log": ""}
    check_scores(
        Scores(
            {"x": Score(1.0), "y": Score(None, note="no case")}, {"c": curve}, {"t": [{"a": 1}]}
        ),
        "norms",
    )
