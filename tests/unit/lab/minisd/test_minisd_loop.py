"""MiniSD's training loop against hand-written AdamW and averages; a killed training is the unbroken
one.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lab.core.cache import StageCheckpoint
from lab.core.errors import Diverged
from lab.core.types import same_weights
from lab.minisd.train import training
from lab.minisd.train.training import Schedule, train

SHORT = Schedule(steps=12, batch=1, lr=0.1, warmup=3, weight_decay=0.5, ema=0.9, clip=1.0)


class Killed(Exception):
    pass


class Disk(StageCheckpoint):
    """The checkpoint of the stage cache; raises right after the state of step ``kill`` was
    written.
    """

    def __init__(self, path, kill=None) -> None:
        super().__init__(path)
        self.kill = kill

    def save(self, tensors, values) -> None:
        super().save(tensors, values)
        if values["step"] == self.kill:
            raise Killed


class Two(nn.Module):
    """One parameter that decays (a matrix) and one that does not (a scalar)."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
        self.scalar = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

    def loss(self) -> torch.Tensor:
        return 3 * (self.matrix.sum() - 1).square() + (self.scalar - 2).square()


def by_hand(schedule: Schedule) -> tuple[list[list[float]], list[list[float]]]:
    """Live and averaged weights after every step, in plain floats (AdamW: arXiv 1711.05101,
    Algorithm 2).
    """
    w, average = [2.0, -1.0], [2.0, -1.0]
    m, v = [0.0, 0.0], [0.0, 0.0]
    live, averaged = [], []
    for t in range(schedule.steps):
        g = [6 * (w[0] - 1), 2 * (w[1] - 2)]
        g = [x * min(1.0, schedule.clip / (math.hypot(*g) + 1e-6)) for x in g]
        for i, decay in enumerate((schedule.weight_decay, 0.0)):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g[i], 0.999 * v[i] + 0.001 * g[i] ** 2
            rise, fall = m[i] / (1 - 0.9 ** (t + 1)), v[i] / (1 - 0.999 ** (t + 1))
            w[i] -= schedule.rate(t) * (decay * w[i] + rise / (math.sqrt(fall) + 1e-8))
        keep = min(schedule.ema, (1 + t) / (10 + t))
        average = [keep * a + (1 - keep) * x for a, x in zip(average, w, strict=True)]
        live.append(list(w))
        averaged.append(average)
    return live, averaged


def weights(model: Two) -> list[float]:
    return [model.matrix.item(), model.scalar.item()]


@pytest.mark.parametrize("ema", [0.0, 0.3, 0.9])
def test_weights_and_average_by_hand(ema) -> None:
    """Live weights at every step, and the average that the model ends with; without EMA these are
    the last ones.
    """
    schedule = replace(SHORT, ema=ema)
    live, averaged = by_hand(schedule)
    model, seen = Two(), []

    def step(number, g):
        seen.append(weights(model))
        return model.loss()

    train(model, step, schedule, seed=0, label="two")
    for here, expected in zip(seen[1:], live[:-1], strict=True):
        assert here == pytest.approx(expected, rel=1e-6)
    assert weights(model) == pytest.approx(averaged[-1], rel=1e-6)
    assert not model.training
    if ema == 0:
        assert averaged[-1] == live[-1]


@pytest.fixture
def often(monkeypatch) -> None:
    """Validate every five steps and save every step."""
    monkeypatch.setattr(training, "_VALIDATE_EVERY", 5)
    monkeypatch.setattr(training, "_SAVE_SECONDS", 0.0)


def test_validation_sees_the_average_and_gives_the_live_weights_back(often) -> None:
    live, averaged = by_hand(SHORT)
    model, seen = Two(), []

    def step(number, g):
        assert model.training
        seen.append(weights(model))
        return model.loss()

    def validate():
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"matrix": model.matrix.item()}

    rows = train(model, step, SHORT, seed=0, label="two", validate=validate)
    assert [row["step"] for row in rows] == [5, 10, 12]
    for row in rows:
        assert row["matrix"] == pytest.approx(averaged[int(row["step"]) - 1][0], rel=1e-6)
    assert seen[5] == pytest.approx(live[4], rel=1e-6)
    assert seen[10] == pytest.approx(live[9], rel=1e-6)


def picture_model() -> nn.Module:
    """Channels last, as the trained networks are, with buffers of both types (batch norm)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 2, 3))
    return model.to(memory_format=torch.channels_last)


def fit(checkpoint=None) -> tuple[nn.Module, list[float], list[dict[str, float]]]:
    model, drawn = picture_model(), []
    schedule = Schedule(steps=60, batch=2, lr=1e-2, warmup=5, ema=0.9)

    def step(number, g):
        x = torch.randn(2, 3, 8, 8, generator=g)
        drawn.append(x.sum().item())
        return (model(x) - 1).square().mean()

    def validate():
        return {"bias": model[0].bias.mean().item()}

    rows = train(
        model, step, schedule, seed=3, label="fit", checkpoint=checkpoint, validate=validate
    )
    return model, drawn, rows


@pytest.mark.parametrize("kill", [1, 20, 51])
def test_killed_training_is_the_unbroken_one(tmp_path, often, kill) -> None:
    """Weights, buffers, drawn data and every row of the log, through the files of the stage
    cache.
    """
    unbroken, drawn, rows = fit()
    path = tmp_path / "state.ckpt"
    with pytest.raises(Killed):
        fit(Disk(path, kill))
    resumed, rest, resumed_rows = fit(Disk(path))
    assert rest == drawn[kill:]
    assert same_weights(resumed, unbroken)
    assert resumed[1].num_batches_tracked.item() == 60
    assert resumed_rows == rows


def test_parameter_without_a_gradient_survives_a_resume(tmp_path, often) -> None:
    def go(checkpoint) -> nn.Module:
        model = nn.ModuleDict({"used": Two(), "idle": Two()})
        loss = model["used"].loss
        train(model, lambda n, g: loss(), SHORT, seed=0, label="x", checkpoint=checkpoint)
        return model

    with pytest.raises(Killed):
        go(Disk(tmp_path / "state", 4))
    resumed = go(Disk(tmp_path / "state"))
    assert same_weights(resumed, go(None))
    assert weights(resumed["idle"]) == [2.0, -1.0]


def test_rate() -> None:
    """Linear over the warm-up, then half a cosine to 0."""
    schedule = Schedule(steps=110, batch=1, lr=2.0, warmup=10)
    assert [schedule.rate(i) for i in range(10)] == pytest.approx(
        [0.2 * (i + 1) for i in range(10)]
    )
    assert schedule.rate(60) == pytest.approx(1.0)
    assert schedule.rate(110) == pytest.approx(0.0)


def test_diverged() -> None:
    model = Two()
    with pytest.raises(Diverged, match="two: the loss is") as caught:
        train(
            model,
            lambda n, g: model.loss() * (math.nan if n == 3 else 1),
            SHORT,
            seed=0,
            label="two",
        )
    assert caught.value.step == 3
