"""Attackers that train the extractor: last blocks, all blocks, LoRA."""

import copy

import pytest
import torch
from attack_examples import (
    ConvModel,
    classification,
    dense_model,
    images,
    interrupted,
    regression,
    spread,
)
from pydantic import ValidationError
from torch import nn

from attacks import feature_attack
from attacks.finetune.full import FullFinetune, LastBlockFinetune
from attacks.finetune.lora import Lora
from lab.core.config import user_error
from lab.core.errors import UserError
from lab.core.types import Budget
from lab.models.activations import features
from lab.models.linear import LinearExtractor

BUDGET = Budget(horizon=6, multiple=3, points=6)
ATTACKS = [LastBlockFinetune, FullFinetune, Lora]


def vectors():
    return classification(torch.randn(80, 6, generator=torch.Generator().manual_seed(1)), noise=0.3)


def launch(attacker, model, task, seed=0):
    return attacker(model, task, seed=seed, budget=BUDGET, checkpoint=None)


def loaded(model, weights):
    copied = copy.deepcopy(model)
    copied.load_state_dict(weights, strict=False)
    return copied


def test_saved_weights_reproduce_the_last_snapshot():
    model, task = dense_model(), vectors()
    result = launch(LastBlockFinetune(blocks=2), model, task)
    assert {name.rsplit(".", 1)[0] for name in result.weights} == {"blocks.4", "blocks.2", "head"}
    head = result.weights.pop("head")
    scores = features(loaded(model, result.weights), task.test.x) @ head
    assert float(nn.functional.cross_entropy(scores, task.test.y)) == pytest.approx(
        result.values["test_loss"][-1], rel=1e-5
    )


def test_saved_adapters_reproduce_the_last_snapshot():
    model, task = dense_model(), vectors()
    result = launch(Lora(rank=2, alpha=6), model, task)
    merged = {}
    for name, weight in model.state_dict().items():
        base = name.removesuffix(".weight")
        if f"{base}.lora_A.default.weight" in result.weights:
            a, b = (result.weights[f"{base}.lora_{x}.default.weight"] for x in "AB")
            assert a.shape[0] == b.shape[1] == 2
            merged[name] = weight + 3.0 * b @ a
    assert len(merged) == 3
    scores = features(loaded(model, merged), task.test.x) @ result.weights["head"]
    assert float(nn.functional.cross_entropy(scores, task.test.y)) == pytest.approx(
        result.values["test_loss"][-1], rel=1e-5
    )


def test_lora_takes_the_layers_that_fit():
    task = classification(images(), noise=0.3)
    adapted = [launch(Lora(rank=r), ConvModel(), task).info["adapted"] for r in (2, 4)]
    # rank 2 does not fit the depthwise layer's four groups
    assert adapted[0] == ["blocks.0.0", "blocks.2.2"]
    assert adapted[1] == ["blocks.0.0", "blocks.1.0", "blocks.2.2"]
    assert launch(Lora(rank=2, blocks=1), ConvModel(), task).info["adapted"] == ["blocks.2.2"]


def test_linear_extractor_full_finetune_moves_theta_and_head():
    task, model = regression(spread(80, 5, 10)), LinearExtractor(torch.eye(5))
    result = launch(FullFinetune(batch_size=None, optimizer="sgd", lr=0.05), model, task)
    theta = torch.eye(5, dtype=torch.float64).requires_grad_()
    w = torch.zeros(5, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.SGD([theta, w], lr=0.05, momentum=0.9)
    for _ in range(BUDGET.steps):
        optimizer.zero_grad()
        ((task.train.x @ theta @ w - task.train.y).square().mean() / 2).backward()
        optimizer.step()
    torch.testing.assert_close(
        result.weights["blocks.0.weight"], theta.detach(), rtol=1e-9, atol=1e-11
    )
    torch.testing.assert_close(result.weights["head"][:, 0], w.detach(), rtol=1e-9, atol=1e-11)


def test_gauss_newton_step_is_the_pseudo_inverse_of_the_jacobian():
    task = regression(spread(12, 3, 4))
    theta, w = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for _ in range(2):  # at w = 0 only the head moves; then both do
        x, y = task.train.x, task.train.y
        jacobian = torch.cat([x @ theta, (x[:, :, None] * w).flatten(1)], 1)
        kernel = jacobian @ jacobian.T
        kernel += 1e-3 * kernel.diagonal().mean() * torch.eye(len(x))
        step = jacobian.T @ torch.linalg.solve(kernel, x @ theta @ w - y)
        w, theta = w - step[:3], theta - step[3:].view(3, 3)
    attacker = FullFinetune(batch_size=None, optimizer="gauss_newton", loss="squared", lr=1.0)
    budget = Budget(horizon=2, multiple=1, points=2)
    result = attacker(LinearExtractor(torch.eye(3)), task, seed=0, budget=budget, checkpoint=None)
    torch.testing.assert_close(result.weights["blocks.0.weight"], theta)
    torch.testing.assert_close(result.weights["head"][:, 0], w)
    with pytest.raises(UserError, match="squared"):
        FullFinetune(optimizer="gauss_newton")


@pytest.mark.parametrize("build", ATTACKS)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("fail_at", [3, 15])
def test_resume_equals_an_uninterrupted_attack(build, optimizer, fail_at, monkeypatch):
    monkeypatch.setattr(feature_attack, "SAVE_SECONDS", 0.0)
    attacker = build(optimizer=optimizer, batch_size=16, schedule="cosine")
    model, task = dense_model(), vectors()
    whole = launch(attacker, model, task)
    resumed = interrupted(
        lambda kept: attacker(model, task, seed=0, budget=BUDGET, checkpoint=kept), fail_at
    )
    assert (resumed.steps, resumed.values, resumed.info) == (whole.steps, whole.values, whole.info)
    assert all(torch.equal(w, resumed.weights[k]) for k, w in whole.weights.items())


@pytest.mark.parametrize("build", ATTACKS)
def test_wrong_options_name_the_key(build):
    with pytest.raises(ValidationError) as error:
        build(optimizer="adamw")
    assert user_error(error.value, "attacks.x", build).key == "attacks.x.optimizer"
