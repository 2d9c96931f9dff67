"""The linear probe as an attacker: trajectories, options, errors, resume."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from attack_examples import (
    classification,
    interrupted,
    regression,
    spread,
)
from pydantic import ValidationError

from attacks import feature_attack
from attacks.probes.linear_probe import LinearProbe
from attacks.probes.optimizers import OPTIMIZERS
from lab.core.config import user_error
from lab.core.errors import Diverged, UserError
from lab.core.types import Budget
from lab.models.linear import LinearExtractor

BUDGET = Budget(horizon=8, multiple=3, points=8)
RATED = [name for name, kind in OPTIMIZERS.items() if kind.uses_rate]


def attack(task, model=None, seed=0, **options):
    model = model or LinearExtractor(torch.eye(task.train.x.shape[1]))
    return LinearProbe(**options)(model, task, seed=seed, budget=BUDGET, checkpoint=None)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_every_optimizer_lowers_both_losses(optimizer, loss):
    result = attack(classification(spread(100, 5, 20)), optimizer=optimizer, loss=loss)
    names = {"train_loss", "test_loss", "excess_loss", "train_accuracy", "test_accuracy"}
    assert result.values.keys() == names | ({"norm_ratio"} if loss == "squared" else set())
    assert result.values["train_accuracy"][-1] > 1.2 / 3
    assert result.values["excess_loss"][-1] < 0.2 * result.values["excess_loss"][0]
    assert ("lr" in result.info) == (optimizer in RATED)


def test_exact_line_search_is_the_brute_force_recursion():
    task = regression(spread(60, 5, 40))
    theta = torch.diag(torch.tensor([1.0, 2, 0.5, 1, 3])).double()
    result = attack(task, LinearExtractor(theta))
    z, y = task.train.x @ theta, task.train.y
    best = torch.from_numpy(np.linalg.lstsq(z.numpy(), y.numpy(), rcond=None)[0])
    w = torch.zeros(5, dtype=torch.float64)
    path = {0: w}
    for step in range(1, BUDGET.steps + 1):
        g = z.T @ (z @ w - y)
        w = w - g * (g @ g) / (z @ g).square().sum()
        path[step] = w
    for i, step in enumerate(result.steps):
        w = path[step]
        assert result.values["train_loss"][i] == pytest.approx(
            float((z @ w - y).square().sum()) / (2 * len(y))
        )
        test = float((task.test.x @ theta @ w - task.test.y).square().sum()) / (2 * len(task.test))
        assert result.values["test_loss"][i] == pytest.approx(test)
        ratio = float((w - best).square().sum() / best.square().sum())
        assert result.values["norm_ratio"][i] == pytest.approx(ratio, rel=1e-7, abs=1e-14)
    assert result.values["norm_ratio"][0] == 1.0
    s = np.linalg.svd(z.numpy(), compute_uv=False)
    assert result.info["condition_number"] == pytest.approx((s[0] / s[-1]) ** 2)


def test_scaling_the_features_changes_nothing_for_any_tuned_optimizer():
    task = regression(spread(80, 5, 30))
    for optimizer in OPTIMIZERS:
        for ridge in (0.0, 0.1):
            one, small = (
                attack(task, LinearExtractor(c * torch.eye(5)), optimizer=optimizer, ridge=ridge)
                for c in (1.0, 2.0**-10)
            )
            assert small.values["train_loss"] == pytest.approx(
                one.values["train_loss"], rel=1e-3
            ), optimizer


def test_fewer_rows_than_features_and_collapsed_features():
    few = attack(regression(spread(60, 60, 10)[:25], test=5))
    assert few.info["rank"] == 20
    assert few.values["norm_ratio"][-1] < few.values["norm_ratio"][0]
    for optimizer in OPTIMIZERS:
        flat = attack(
            regression(spread(30, 4, 10)), LinearExtractor(torch.zeros(4, 4)), optimizer=optimizer
        )
        assert flat.info["condition_number"] is None
        assert len(set(flat.values["train_loss"])) == 1, optimizer


def test_standardize_removes_the_columns_scale_from_the_conditioning():
    scale = torch.logspace(0, -2, 5, dtype=torch.float64)
    x = torch.randn(200, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1.0
    task = regression(x)
    raw, scaled = (
        attack(task, LinearExtractor(torch.diag(scale)), standardize=s) for s in (False, True)
    )
    assert scaled.info["condition_number"] < 3 < 1e3 < raw.info["condition_number"]
    z = (task.test.x * scale - scaled.weights["mean"]) / scaled.weights["deviation"]
    residual = z @ scaled.weights["head"][:, 0] - task.test.y
    assert scaled.values["test_loss"][-1] == pytest.approx(float(residual.square().mean()) / 2)


def test_rows_away_from_the_dominant_subspace_condition_the_hessian_better():
    x = torch.cat([spread(60, 5, 1), spread(60, 5, 1) * torch.tensor([100.0, 1, 1, 1, 1])])
    every, away = (attack(regression(x), rows=rows) for rows in ("all", "away"))
    assert away.info["condition_number"] < 0.1 * every.info["condition_number"]
    assert away.values["norm_ratio"][-1] < 0.1 * every.values["norm_ratio"][-1]


def test_drifting_rows_come_in_the_order_of_their_angle():
    x = spread(60, 5, 1) * torch.tensor([30.0, 1, 1, 1, 1])
    probe = LinearProbe(rows="drift", optimizer="sgd", batch_size=3)
    head = probe.learner(LinearExtractor(torch.eye(5)), regression(x), 0)
    epoch = len(head.task.train) // 3
    rows = torch.cat([head.problem.z[probe.batch(i, head.task, 0)] for i in range(epoch)])
    share = (rows[:, 0] / rows.norm(dim=1)).abs()  # cosine of the angle to the first axis
    assert float(share[: len(share) // 4].mean()) < 0.95 < float(share[-len(share) // 4 :].mean())
    assert probe.batch(epoch, head.task, 0).tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="batch_size"):
        LinearProbe(rows="drift")


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("fail_at", [9, 20])
def test_resume_equals_an_uninterrupted_attack(optimizer, fail_at, monkeypatch):
    monkeypatch.setattr(feature_attack, "SAVE_SECONDS", 0.0)
    task, model = classification(spread(60, 5, 20)), LinearExtractor(torch.eye(5))
    probe = LinearProbe(optimizer=optimizer, batch_size=16 if optimizer in RATED else None)
    whole = probe(model, task, seed=3, budget=BUDGET, checkpoint=None)
    resumed = interrupted(
        lambda kept: probe(model, task, seed=3, budget=BUDGET, checkpoint=kept), fail_at
    )
    assert (resumed.steps, resumed.values, resumed.info) == (whole.steps, whole.values, whole.info)
    assert torch.equal(resumed.weights["head"], whole.weights["head"])


def test_wrong_options_name_the_key():
    with pytest.raises(ValidationError) as error:
        LinearProbe(optimizer="adams")
    assert user_error(error.value, "attacks.probe", LinearProbe).key == "attacks.probe.optimizer"
    with pytest.raises(UserError, match=r"damping=0\.1: is read by optimizer=kfac only"):
        LinearProbe(optimizer="newton", damping=0.1)


def test_tasks_that_cannot_be_trained_on():
    task = classification(spread(30, 3, 5))
    one_class = replace(task, train=replace(task.train, y=torch.zeros_like(task.train.y)))
    with pytest.raises(UserError, match="one class only"):
        attack(one_class)
    with pytest.raises(Diverged, match="not finite"):
        attack(task, LinearExtractor(torch.full((3, 3), math.inf)))
