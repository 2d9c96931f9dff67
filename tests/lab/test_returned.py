"""What an attacker of one's own returns is checked before figures are made of it."""

import pytest
import torch

from lab.errors import UserError
from lab.returned import check_trajectory
from lab.types import Trajectory

LOSSES = {"train_loss": [1.0, 0.5], "test_loss": [1.0, 0.6]}


def pictures(points: int = 2, dtype: torch.dtype = torch.uint8) -> dict[str, torch.Tensor]:
    return {"name": torch.zeros(points, 4, 3, 8, 8, dtype=dtype)}


def test_what_the_contract_says_passes() -> None:
    check_trajectory(Trajectory([0, 5], LOSSES, samples=pictures()), "mine")
    check_trajectory(Trajectory([0], {k: v[:1] for k, v in LOSSES.items()}, "diverged"), "mine")


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (Trajectory([5, 10], LOSSES), "must increase from 0"),  # the last picture would count as "before any attack"
        (Trajectory([0, 0], LOSSES), "must increase from 0"),
        (Trajectory([], {}), "must increase from 0"),
        (Trajectory([0, 5], {"train_loss": [1.0, 0.5]}), "lack test_loss"),
        (Trajectory([0, 5], LOSSES | {"norm_ratio": [1.0]}), "1 values at 2 steps"),
        (Trajectory([0, 5], LOSSES, samples=pictures(1)), "not of torch.uint8"),
        (Trajectory([0, 5], LOSSES, samples=pictures(dtype=torch.float32)), "torch.float32"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(found: Trajectory, told: str) -> None:
    with pytest.raises(UserError, match=r"attacks\.mine") as error:
        check_trajectory(found, "mine")
    assert told in str(error.value)
