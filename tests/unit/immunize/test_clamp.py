"""CLAMP's terms against a quadratic loss, whose gain, contraction and curvature are known."""

import math

import pytest
import torch
import torch.nn.functional as F
from mima_examples import objective, preset, rows_of
from pydantic import ValidationError
from tiny import linear_case, linear_classes
from tiny_diffusion import tiny_diffusion

from immunize.clamp import Clamp, ClampOptions, ClampTrainer, KappaClamp, predicted_gain
from immunize.gradients import math_attention
from immunize.kappa.trainer import Head
from immunize.mima.inner_loop import InnerLoopOptions
from lab.models.linear import LinearBackbone

LR, STEPS = 0.1, 3


def terms(scale, **options):
    """Those of L(ω) = ½ scale ‖ω‖², attacked from ω = (3, 4); ``scale`` is θ."""
    theta = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    total, first, row, _ = predicted_gain(
        lambda omega: theta / 2 * omega["w"].square().sum(),
        {"w": torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)},
        LR,
        STEPS,
        ClampOptions(**options),
    )
    assert float(first.detach()) == pytest.approx(scale / 2 * 25)
    (slope,) = torch.autograd.grad(total, [theta])
    return total, row | {"slope": float(slope)}


def by_hand(scale, options):
    factor = 1 - LR * scale
    last = 5 * factor**STEPS  # ‖ω_K‖
    tail = LR * scale * last / (1 - min(abs(factor), options.max_contraction))
    gain = scale / 2 * (25 - last**2) + scale * last * tail + scale / 2 * tail**2
    loss = options.w_long * max(gain - options.slack, 0)
    loss += options.w_contraction * math.log1p(math.exp(abs(factor) - options.max_contraction))
    flat = float(F.softplus(torch.tensor(options.min_curvature - LR * scale)))
    return loss + options.w_curvature * (STEPS + 1) * flat


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_every_term_agrees_with_a_quadratic(scale):
    options = ClampOptions(slack=1.0)
    total, row = terms(scale, slack=1.0)
    assert float(total.detach()) == pytest.approx(by_hand(scale, options), rel=1e-6)
    assert (row["contraction"], row["curvature"]) == (
        pytest.approx(1 - LR * scale),
        pytest.approx(LR * scale),
    )
    difference = (by_hand(scale + 1e-5, options) - by_hand(scale - 1e-5, options)) / 2e-5
    assert row["slope"] == pytest.approx(difference, rel=1e-4)


def test_a_gain_within_the_slack_costs_nothing():
    total, row = terms(4.0, slack=1e6, w_contraction=0.0, w_curvature=0.0)
    assert float(total.detach()) == 0
    assert row["predicted_gain"] > 0


@pytest.mark.parametrize("rank", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_the_gradient_for_a_denoiser_agrees_with_differences(rank):
    """Along a random direction of Π_u, with every term acting."""
    inner = {"steps": 2, "lr": 0.5, "rank": rank}
    method = preset("clamp", inner_loop=inner, w_prior=0.0, w_contraction=1.0, w_curvature=1.0)
    made, theta = objective(method, tiny_diffusion(dtype=torch.float64))
    start = {name: theta[name].detach().clone() for name in made.outer_names}
    g = torch.Generator().manual_seed(0)
    way = {name: torch.randn(x.shape, generator=g, dtype=x.dtype) for name, x in start.items()}

    def value(shift):
        moved = {**theta, **{name: x + shift * way[name] for name, x in start.items()}}
        with math_attention():
            terms = [made.terms(moved, n, 0)[0] for n in range(len(made.concepts))]
        return sum(float(term.detach()) for term in terms) / len(terms)

    gradient, _ = made.gradient(theta, 0)
    slope = sum(float((gradient[name] * way[name]).sum()) for name in way)
    assert slope == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("case", [linear_case(), linear_classes()], ids=["squared", "entropy"])
def test_the_gradient_for_features_agrees_with_differences(case, monkeypatch):
    monkeypatch.setattr(Head, "lipschitz", staticmethod(lambda y: 20.0))  # η is a constant
    trainer = ClampTrainer(
        KappaClamp(w_start=1.0, batch_size=8, steps=2), LinearBackbone().build(case, 0), case, 0
    )
    rows = trainer.batch(1, 0)
    y = trainer.engine.view(1, rows)
    way = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    head = trainer.heads[1]
    head.w = torch.full_like(head.w, 0.1)
    after, before = (float(trainer.terms(1, y + s * way, rows)[0].detach()) for s in (1e-6, -1e-6))
    assert float(head.value(y, rows, head.w)) == pytest.approx(head.loss(y, rows)[0])
    slope = float((trainer._of_task(1, rows)[0] * way).sum())
    assert slope == pytest.approx((after - before) / 2e-6, rel=1e-4)


@pytest.mark.slow
def test_concepts_that_are_immunized_alone_are_merged():
    rows = rows_of(preset("clamp", concepts="composed", steps=1))[1]
    assert [row["concept"] for _, row in rows if "concept" in row] == [0.0, 1.0]


def test_an_attack_that_is_no_gradient_descent_is_refused():
    with pytest.raises(ValidationError, match="gradient descent"):
        Clamp(inner_loop=InnerLoopOptions(optimizer="adamw"))
    with pytest.raises(ValidationError, match="max_contraction"):
        ClampOptions(max_contraction=1.0)
