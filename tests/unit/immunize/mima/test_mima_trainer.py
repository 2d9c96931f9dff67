"""The loop of the concept immunizers: rates, divergence, clipping, the check after the last
step.
"""

import math

import pytest
import torch
from mima_examples import case, model, preset, rows_of, with_targets

from immunize.mima.trainer import Schedule, Trainer
from lab.core.errors import Diverged


class Falling:
    upper_names = moves = ("w",)

    def __init__(self, bad, how):
        self.bad, self.how = bad, how

    def gradient(self, theta, step):
        if step == self.bad and self.how == "raise":
            raise FloatingPointError("lower level")
        value = float("nan") if step == self.bad else 1.0
        return {"w": torch.full_like(theta["w"], value if self.how == "gradient" else 1.0)}, {
            "upper_loss": value
        }

    def state(self):
        return {}

    alike = state

    def load(self, state):
        pass


@pytest.mark.parametrize("how", ["raise", "gradient", "loss"])
def test_divergence_keeps_the_last_good_weights(how):
    rows = []
    theta = {"w": torch.zeros(3)}
    schedule = Schedule(steps=10, lr=1.0, optimizer="sgd")
    trainer = Trainer(
        schedule, theta, Falling(4, how), lambda step, **values: rows.append((step, values)), "test"
    )
    found = trainer.run(None)
    assert torch.equal(
        found["w"], torch.full((3,), -3.0)
    )  # at step 4 θ is −4: seen, and bad; −3 was good
    assert rows[-1] == (4, {"diverged": 1.0})
    with pytest.raises(Diverged, match="first step"):
        Trainer(
            schedule, {"w": torch.zeros(3)}, Falling(0, how), lambda step, **values: None, "test"
        ).run(None)


def test_clipping_bounds_the_gradient():
    theta = {"w": torch.zeros(4)}
    schedule = Schedule(steps=1, lr=1.0, optimizer="sgd", clip=0.5)
    found = Trainer(
        schedule, theta, Falling(None, "raise"), lambda step, **values: None, "test"
    ).run(None)
    assert float(found["w"].norm()) == pytest.approx(0.5)


def test_a_constant_rate_is_beta_at_every_step():
    schedule = Schedule(steps=7, lr=0.3)
    assert [schedule.rate(step) for step in range(7)] == [0.3] * 7


def test_a_cosine_rate_falls_from_beta_to_0():
    """β/2 · (1 + cos πk/n) = β cos²(πk/2n)."""
    schedule = Schedule(steps=8, lr=0.3, lr_schedule="cosine")
    rates = [schedule.rate(step) for step in range(9)]
    assert rates == pytest.approx(
        [0.3 * math.cos(math.pi * step / 16) ** 2 for step in range(9)], abs=1e-15
    )
    assert (rates[0], rates[4]) == pytest.approx((0.3, 0.15))


@pytest.mark.parametrize(("name", "total"), [("constant", 2.4), ("cosine", 1.35)])
def test_a_run_steps_by_its_rates(name, total):
    """A gradient of 1 moves θ by the sum of the rates: βn, and β(n + 1)/2 for the cosine."""
    theta = {"w": torch.zeros(3, dtype=torch.float64)}
    schedule = Schedule(steps=8, lr=0.3, lr_schedule=name, optimizer="sgd")
    found = Trainer(
        schedule, theta, Falling(None, "raise"), lambda step, **values: None, "test"
    ).run(None)
    torch.testing.assert_close(
        found["w"], torch.full((3,), -total, dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("sound", [True, False])
def test_weights_whose_losses_are_not_finite_are_not_kept(sound):
    """No gradient sees what the last update made."""
    rows = []
    schedule = Schedule(steps=3, lr=1.0, optimizer="sgd")
    trainer = Trainer(
        schedule,
        {"w": torch.zeros(3)},
        Falling(None, "raise"),
        lambda step, **v: rows.append(v),
        "x",
        lambda: sound,
    )
    assert torch.equal(trainer.run(None)["w"], torch.full((3,), -3.0 if sound else -2.0))
    assert ("diverged" in rows[-1]) is not sound


def test_a_last_step_that_breaks_the_model_is_taken_back():
    """Weights of 1e25 are finite, their losses are not."""
    broken = preset("mima_first_order", steps=1, lr=1e25)
    found, rows = rows_of(broken, on=with_targets(case().targets[:1]))
    assert rows[-1][1]["diverged"] == 1
    before = model().state_dict()
    assert all(torch.equal(value, before[name]) for name, value in found.state_dict().items())
