"""Learning-rate search, schedules, mini-batches and the driver of an attack."""

from __future__ import annotations

import math

import pytest
import torch
from attack_examples import Interrupted, MemoryCheckpoint
from torch import Tensor

from attacks import trajectory
from attacks.trajectory import batch_rows, run
from attacks.tuning import Rate, search
from lab.core.errors import Diverged, UserError
from lab.core.types import Budget


def bowl(best: float, calls: list[float]):
    def trial(lr: float) -> float:
        calls.append(lr)
        return math.inf if lr > 30 * best else abs(math.log10(lr / best))

    return trial


@pytest.mark.parametrize("best", [2e-6, 0.02, 1.0, 4e3])
@pytest.mark.parametrize("trials", [1, 3, 7, 12])
def test_search_spends_exactly_its_trials(best: float, trials: int) -> None:
    calls: list[float] = []
    table: dict[float, float] = {}
    lr = search(bowl(best, calls), 0.01, trials, table)
    assert len(calls) == len(set(calls)) == len(table) == trials
    assert lr == min(calls, key=lambda lr: (bowl(best, [])(lr), lr))


def test_search_finds_a_rate_far_from_its_centre_and_refines_a_near_one() -> None:
    assert abs(math.log10(search(bowl(2e-5, []), 1.0, 9, {}) / 2e-5)) < 0.5
    assert abs(math.log10(search(bowl(0.02, []), 0.01, 7, {}) / 0.02)) < 0.13


def test_search_goes_down_where_everything_diverges_and_prefers_the_smaller_of_equals() -> None:
    assert search(lambda lr: math.inf, 1.0, 5, {}) == pytest.approx(1e-3)
    assert search(lambda lr: math.nan, 1.0, 1, {}) == 1.0
    assert search(lambda lr: 1.0, 1.0, 3, {}) == pytest.approx(0.1)


def test_schedules() -> None:
    constant, cosine, linear = (Rate(1.0, 1, name) for name in ("constant", "cosine", "linear"))
    assert [constant.factor(t, 4) for t in range(4)] == [1, 1, 1, 1]
    assert [linear.factor(t, 4) for t in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [cosine.factor(t, 4) for t in range(4)] == pytest.approx(
        [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]
    )


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"lr": 0}, "lr"),
        ({"lr": -1.0}, "lr"),
        ({"lr": "fast"}, "lr"),
        ({"lr": math.inf}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"trials": 0}, "lr_trials"),
        ({"trials": 2.5}, "lr_trials"),
        ({"lr": 0.1, "trials": 3}, "lr_trials"),  # a fixed rate is not searched for
        ({"schedule": "cosin"}, "schedule"),
    ],
)
def test_bad_rates_name_the_key(options: dict[str, object], key: str) -> None:
    given = {"lr": "auto", "trials": 7, "schedule": "constant"} | dict(
        options if isinstance(options, dict) else [options]
    )
    with pytest.raises(UserError) as error:
        Rate.parse("probe", given["lr"], given["trials"], given["schedule"], usual=7)
    assert error.value.key == f"attacks.probe.{key}"
    assert key != "schedule" or "cosine" in error.value.fix


def test_batches_are_permutations_of_full_batches_and_depend_on_the_seed_alone() -> None:
    assert batch_rows(0, 10, None, 0, "t") is None
    assert batch_rows(0, 10, 10, 0, "t") is None
    epoch = torch.cat([batch_rows(step, 10, 3, 0, "t") for step in range(3)])  # type: ignore[misc]
    assert len(epoch.unique()) == 9
    again = [batch_rows(step, 10, 3, 0, "t") for step in (4, 3)]
    assert torch.equal(again[1], batch_rows(3, 10, 3, 0, "t"))
    assert not torch.equal(batch_rows(0, 1000, 500, 0, "t"), batch_rows(0, 1000, 500, 1, "t"))  # type: ignore[arg-type]
    assert not torch.equal(batch_rows(0, 1000, 500, 0, "t"), batch_rows(2, 1000, 500, 0, "t"))  # type: ignore[arg-type]


class Scalar:
    """w ← w − rate·w on L = w²/2: stable for rates below 2, best at 1."""

    uses_rate, centre = True, 0.1

    def __init__(self, start: float = 1.0) -> None:
        self.start, self.updates = start, 0
        self.reset()

    def reset(self) -> None:
        self.w = torch.tensor([self.start], dtype=torch.float64)

    def advance(self, step: int, rate: float) -> None:
        self.updates += 1
        self.w = self.w - rate * self.w

    def loss(self) -> float:
        return float(self.w) ** 2 / 2

    def measure(self) -> dict[str, float]:
        return {"train_loss": self.loss(), "test_loss": self.loss()}

    def tensors(self) -> dict[str, Tensor]:
        return {"w": self.w}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.w = tensors["w"].clone()

    weights = tensors


BUDGET = Budget(horizon=5, multiple=4, points=6)


def test_run_tunes_then_measures_at_the_snapshots() -> None:
    learner = Scalar()
    result = run(learner, Rate(None, 4, "constant"), BUDGET, None, {"a": 1})
    assert result.steps == list(BUDGET.snapshots())
    assert result.info["lr"] == pytest.approx(1.0)
    assert [row["lr"] for row in result.info["lr_trials"]] == pytest.approx(
        [0.1, 1.0, 10.0, 0.1 * 10**1.5]
    )
    assert learner.updates == 5 * BUDGET.steps
    assert result.info["a"] == 1
    assert float(result.weights["w"]) == 0.0


def test_the_run_repeats_the_winning_trial() -> None:
    result = run(Scalar(), Rate(None, 7, "cosine"), BUDGET, None, {})
    scored = (result.at("train_loss", BUDGET.horizon) + result.values["train_loss"][-1]) / 2
    assert scored == min(row["loss"] for row in result.info["lr_trials"])


def test_a_rate_that_is_best_at_the_horizon_but_collapses_later_is_not_chosen() -> None:
    class Delayed(Scalar):
        """Best at rate 1 up to the horizon, where rates above one half begin to drift."""

        def advance(self, step: int, rate: float) -> None:
            super().advance(step, rate)
            self.w = self.w + float(rate > 0.5 and step >= BUDGET.horizon)

    result = run(Delayed(), Rate(None, 7, "constant"), BUDGET, None, {})
    assert result.info["lr"] <= 0.5
    assert result.values["train_loss"][-1] < 1e-3


def test_divergence_keeps_the_points_before_it() -> None:
    result = run(Scalar(), Rate(10.0, 1, "constant"), BUDGET, None, {})
    assert result.status == "diverged"
    assert result.steps == [s for s in BUDGET.snapshots() if 81.0**s <= trajectory.BLOW_UP]
    assert all(
        len(v) == len(result.steps) and all(map(math.isfinite, v)) for v in result.values.values()
    )
    assert result.weights == {}


def test_numbers_that_are_not_finite_at_the_start_raise() -> None:
    with pytest.raises(Diverged):
        run(Scalar(math.nan), Rate(0.1, 1, "constant"), BUDGET, None, {})


@pytest.mark.parametrize("fail_at", [1, 3, 5, 9, 23])
def test_resume_is_bit_for_bit_in_the_search_and_in_the_run(
    fail_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectory, "SAVE_SECONDS", 0.0)
    rate = Rate(None, 4, "cosine")
    whole = run(Scalar(), rate, BUDGET, None, {})
    checkpoint = MemoryCheckpoint(fail_at)
    with pytest.raises(Interrupted):
        run(Scalar(), rate, BUDGET, checkpoint, {})
    learner = Scalar()
    resumed = run(learner, rate, BUDGET, checkpoint, {})
    assert resumed == whole
    assert learner.updates == 5 * BUDGET.steps - (
        min(fail_at, 4) * BUDGET.steps + max(fail_at - 4, 0)
    )


def test_nothing_is_saved_within_the_saving_interval() -> None:
    checkpoint = MemoryCheckpoint()
    run(Scalar(), Rate(0.5, 1, "constant"), BUDGET, checkpoint, {})
    assert checkpoint.saves == 0
