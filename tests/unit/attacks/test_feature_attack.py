"""Schedules, mini-batches and the driver of an attack on a feature extractor."""

import math

import pytest
import torch
from attack_examples import interrupted

from attacks import feature_attack
from attacks.feature_attack import FeatureAttack, run
from lab.core.config import Text, config
from lab.core.errors import Diverged
from lab.core.seeding import batch_rows
from lab.core.training import schedule_factor
from lab.core.types import Budget


@config
class Options(FeatureAttack):
    name: Text = "scalar"

    def learner(self, *_):
        """Tests call `run` themselves."""


def test_schedules():
    linear, cosine = ([schedule_factor(s, t, 4) for t in range(4)] for s in ("linear", "cosine"))
    assert linear == [1, 0.75, 0.5, 0.25]
    assert cosine == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])


def test_batches_are_permutations_of_full_batches_and_depend_on_the_seed_alone():
    assert len(torch.cat([batch_rows(step, 10, 3, 0, "t") for step in range(3)]).unique()) == 9
    assert not torch.equal(batch_rows(0, 1000, 500, 0, "t"), batch_rows(0, 1000, 500, 1, "t"))


class Scalar:
    """w ← w − rate·w on L = w²/2: stable for rates below 2, best at 1."""

    uses_rate, centre = True, 0.1

    def __init__(self, start=1.0):
        self.start, self.updates = start, 0
        self.reset()

    def reset(self):
        self.w = torch.tensor([self.start], dtype=torch.float64)

    def advance(self, step, rate):
        self.updates += 1
        self.w = self.w - rate * self.w

    def loss(self):
        return float(self.w) ** 2 / 2

    def measure(self):
        return {"train_loss": self.loss(), "test_loss": self.loss()}

    def info(self):
        return {}

    def tensors(self):
        return {"w": self.w}

    def restore(self, tensors):
        self.w = tensors["w"].clone()

    weights = tensors


BUDGET = Budget(horizon=5, multiple=4, points=6)


def test_run_tunes_then_measures_at_the_snapshots():
    learner = Scalar()
    result = run(learner, Options(lr_trials=4, schedule="constant"), "t", BUDGET, None)
    assert (result.steps, result.info["lr"]) == (list(BUDGET.snapshots()), pytest.approx(1.0))
    assert [row["lr"] for row in result.info["lr_trials"]] == pytest.approx(
        [0.1, 1.0, 10.0, 0.1 * 10**1.5]
    )
    assert learner.updates == 5 * BUDGET.steps


def test_a_rate_that_is_best_at_the_horizon_but_collapses_later_is_not_chosen():
    class Delayed(Scalar):
        """Best at rate 1 up to the horizon, where rates above one half begin to drift."""

        def advance(self, step, rate):
            super().advance(step, rate)
            self.w = self.w + float(rate > 0.5 and step >= BUDGET.horizon)

    result = run(Delayed(), Options(lr_trials=7, schedule="constant"), "t", BUDGET, None)
    assert result.info["lr"] <= 0.5
    assert result.values["train_loss"][-1] < 1e-3


def test_divergence_keeps_the_points_before_it():
    result = run(Scalar(), Options(lr=10.0), "t", BUDGET, None)
    assert result.status == "diverged"
    assert result.steps == [s for s in BUDGET.snapshots() if 81.0**s <= feature_attack.BLOW_UP]
    assert all(
        len(v) == len(result.steps) and all(map(math.isfinite, v)) for v in result.values.values()
    )
    assert result.weights == {}


def test_numbers_that_are_not_finite_at_the_start_raise():
    with pytest.raises(Diverged):
        run(Scalar(math.nan), Options(lr=0.1), "t", BUDGET, None)


@pytest.mark.parametrize("fail_at", [1, 4, 5, 20])
def test_resume_is_bit_for_bit_in_the_search_and_in_the_run(fail_at, monkeypatch):
    monkeypatch.setattr(feature_attack, "SAVE_SECONDS", 0.0)
    options = Options(lr_trials=4, schedule="cosine")
    whole, learner = run(Scalar(), options, "t", BUDGET, None), Scalar()
    assert interrupted(lambda kept: run(learner, options, "t", BUDGET, kept), fail_at) == whole
    assert learner.updates == 5 * BUDGET.steps  # no finished trial or step is repeated
