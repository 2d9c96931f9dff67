import itertools
import math

import numpy as np
import pytest
from assertions import assert_values
from fake_run import (
    STEPS,
    classes,
    decay,
    fake,
    rates,
)

from eval.features.convergence import Convergence, rfd
from eval.features.probe_accuracy import ProbeAccuracy
from eval.features.trajectories import Measurement, counted, read, target_of
from lab.core.types import BASELINE, Trajectory


def test_the_mean_over_a_diverged_attack_holds_its_last_value() -> None:
    broken = Trajectory([0, 10], {"norm_ratio": [1.0, 0.5]}, "diverged")
    assert read(broken, "norm_ratio", None, 100) == pytest.approx((0.75 * 10 + 0.5 * 90) / 100)


def test_a_benign_cost_may_be_higher_where_one_attack_gives_a_lower_limit_only() -> None:
    limit, exact = Measurement(5.0, "lower"), Measurement(5.5)
    assert counted("benign", [limit, exact]) == Measurement(5.5, "lower")
    assert counted("harmful", [limit, exact]) == limit


def test_norm_ratio_and_slowdown_by_hand() -> None:
    metrics = Convergence()(fake(trajectories=rates(0.8**0.5, 0.8))).metrics
    assert_values(
        metrics,
        {
            "norm_ratio_harmful_probe_baseline": 0.8**20,
            "norm_ratio_harmful_probe": 0.8**10,
            "norm_ratio_harmful_probe_ratio": 0.8**-10,
            "norm_ratio_harmful_probe_5x": 0.8**50,
        },
    )
    area = sum((b - a) * (0.8**a + 0.8**b) / 2 for a, b in itertools.pairwise(STEPS))
    assert metrics["norm_ratio_harmful_probe_mean_baseline"].value == pytest.approx(area / 100)
    assert metrics["norm_ratio_harmful_probe_mean"].value > area / 100
    slow = metrics["slowdown_harmful_probe"]
    assert slow.value == pytest.approx(
        2, rel=0.05
    )  # linear between snapshots: close to the true factor of two
    assert (slow.low, slow.high) == (pytest.approx(slow.value), pytest.approx(slow.value))
    assert metrics["slowdown_relative_probe"].value == pytest.approx(slow.value)


def test_divergence_is_said_and_is_no_protection() -> None:
    def make(model_name: str, attack: str, role: str, seed: int) -> Trajectory:
        if model_name == BASELINE:
            return decay(0.8, STEPS)
        return decay(0.99, STEPS[:4], status="diverged")

    metrics = Convergence()(fake(trajectories=make)).metrics
    assert "6 of 6 trajectories diverged" in str(metrics["norm_ratio_harmful_probe"].note)
    assert metrics["slowdown_harmful_probe"].value < 1  # censored where it broke off
    assert metrics["slowdown_benign_probe"].value == pytest.approx(5)


def test_targets_have_floors_by_hand() -> None:
    # an attacker that reaches the optimum in one step and then sits on rounding noise
    noise = [1e-20] * (len(STEPS) - 1)
    values = {"norm_ratio": [1.0, *noise], "train_loss": [3.0, *(2 + 1e4 * n for n in noise)]}
    result = Trajectory(list(STEPS), values, info={"optimum": 2.0})
    assert target_of(result, "norm_ratio", 20) == 1e-12
    assert target_of(result, "train_loss", 20) == pytest.approx(2 + 1e-9, abs=1e-12)
    tuned = Trajectory([0, 20], {"train_loss": [3.0, 1.0], "test_accuracy": [0.1, 0.8]})
    assert target_of(tuned, "train_loss", 20) == pytest.approx(1 + 2e-6, abs=1e-12)
    assert target_of(tuned, "test_accuracy", 20, 0.5) == pytest.approx(0.4)
    slow = Trajectory([0, 20], {"train_loss": [3.0, 2.5]}, info={"optimum": 2.0})
    assert target_of(slow, "train_loss", 20) == 2.5  # far above rounding: nothing changes


@pytest.mark.parametrize(
    ("harmful", "benign", "value", "told"),
    [
        (0.9999, 0.8**0.5, 2.5, "the harmful target was not met in 6 of 6 cases"),
        (0.8**0.5, 0.9999, 0.4, "the benign target was not met in 6 of 6 cases"),
        (0.9999, 0.9999, None, "neither the harmful nor the benign target was met"),
    ],
)
def test_a_quotient_of_limits_is_one_or_is_not_known(
    harmful: float, benign: float, value: float | None, told: str
) -> None:
    result = Convergence()(fake(trajectories=rates(harmful, benign))).metrics[
        "slowdown_relative_worst"
    ]
    assert result.value == (None if value is None else pytest.approx(value, rel=0.05))
    assert told in str(result.note)
    assert result.bound == {2.5: "lower", 0.4: "upper", None: None}[value]


# accuracy


def test_accuracies_and_sgrc_by_hand() -> None:
    run = fake(cases=classes(), trajectories=rates(0.8, 0.8, harmful_accuracy=0.6))
    metrics = ProbeAccuracy()(run).metrics
    assert_values(
        metrics,
        {"accuracy_harmful_probe_5x_baseline": 0.8, "accuracy_harmful_probe_5x": 0.6},
        abs=1e-06,
    )
    area = sum((b - a) * 0.8 * (2 - 0.8**a - 0.8**b) / 2 for a, b in itertools.pairwise(STEPS))
    assert metrics["accuracy_harmful_probe_mean_baseline"].value == pytest.approx(area / 100)
    steps = metrics["steps_to_accuracy_harmful_probe_baseline"]
    assert (
        9 < steps.value < 12
    )  # 0.9 of the accuracy after 20 steps: 1 − 0.8**s = 0.9 (1 − 0.8**20), s = 9.9
    unmet = metrics["steps_to_accuracy_harmful_probe"]
    assert (unmet.value, unmet.bound) == (100, "lower")
    assert metrics["sgrc_harmful_probe_5x"].value == pytest.approx(0.25, abs=1e-6)


def test_rfd_and_its_signed_twin_by_hand() -> None:
    base, faster = np.array([0.0, 0.5, 1.0]), np.array([0.2, 0.75, 1.0])
    # step 0 is left out: base is 0 there
    assert rfd(base, faster) == pytest.approx(100 * 0.5 / 2)
    assert rfd(base, faster, signed=True) == pytest.approx(-100 * 0.5 / 2)
    assert math.isnan(rfd(base * 0.01, faster))
