"""CLAMP's terms against a quadratic loss, whose gain, contraction and curvature are known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from immunize.clamp import Clamp, ClampOptions, predicted_gain
from immunize.mima.inner_loop import InnerLoopOptions

LR, STEPS = 0.1, 3


def terms(scale: float, **options: float) -> tuple[torch.Tensor, dict[str, float]]:
    """Those of L(ω) = ½ scale ‖ω‖², attacked from ω = (3, 4); ``scale`` is θ."""
    theta = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    start = {"w": torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)}
    total, row, _ = predicted_gain(
        lambda omega: theta / 2 * omega["w"].square().sum(),
        start,
        LR,
        STEPS,
        ClampOptions(**options),
    )
    (slope,) = torch.autograd.grad(total, [theta])
    return total, row | {"slope": float(slope)}


def by_hand(scale: float, options: ClampOptions) -> float:
    factor = 1 - LR * scale
    last = 5 * factor**STEPS  # ‖ω_K‖
    tail = LR * scale * last / (1 - min(abs(factor), options.max_contraction))
    gain = scale / 2 * (25 - last**2) + scale * last * tail + scale / 2 * tail**2
    loss = options.w_long * max(gain - options.slack, 0)
    loss += options.w_contraction * math.log1p(math.exp(abs(factor) - options.max_contraction))
    flat = float(F.softplus(torch.tensor(options.min_curvature - LR * scale)))
    return loss + options.w_curvature * (STEPS + 1) * flat


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_every_term_agrees_with_a_quadratic(scale: float) -> None:
    options = ClampOptions(slack=1.0)
    total, row = terms(scale, slack=1.0)
    assert float(total.detach()) == pytest.approx(by_hand(scale, options), rel=1e-6)
    assert row["contraction"] == pytest.approx(1 - LR * scale)
    assert row["curvature"] == pytest.approx(LR * scale)
    difference = (by_hand(scale + 1e-5, options) - by_hand(scale - 1e-5, options)) / 2e-5
    assert row["slope"] == pytest.approx(difference, rel=1e-4)


def test_a_gain_within_the_slack_costs_nothing() -> None:
    total, row = terms(4.0, slack=1e6, w_contraction=0.0, w_curvature=0.0)
    assert float(total.detach()) == 0
    assert row["predicted_gain"] > 0


def test_an_attack_that_is_no_gradient_descent_is_refused() -> None:
    with pytest.raises(ValidationError, match="gradient descent"):
        Clamp(inner_loop=InnerLoopOptions(optimizer="adamw"))
    with pytest.raises(ValidationError, match="max_contraction"):
        ClampOptions(max_contraction=1.0)
