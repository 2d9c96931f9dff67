"""The outer loop of the concept immunizers: rates, divergence, clipping, the check after the last
step.
"""

import pytest
import torch
from hydra.errors import InstantiationException
from mima_examples import case, preset, rows_of
from tiny_diffusion import tiny_diffusion

from immunize.mima.outer_loop import Objective, OuterLoop, OuterLoopOptions
from lab.core.errors import Diverged
from lab.core.training import train


class Falling(Objective):
    outer_names = moves = ("w",)

    def __init__(self, bad=None, how="raise", sound=True):
        self.bad, self.how, self.sound = bad, how, sound

    def has_finite_losses(self):
        return self.sound

    def gradient(self, theta, step):
        if step == self.bad and self.how == "raise":
            raise FloatingPointError("inner loop")
        value = float("nan") if step == self.bad else 1.0
        return {"w": torch.full_like(theta["w"], value if self.how == "gradient" else 1.0)}, {
            "outer_loss": value
        }


def trained(objective=None, start=None, **options):
    """Train from 0 by SGD; return what the run ended with and its rows."""
    theta = {"w": torch.zeros(3) if start is None else start}
    chosen = OuterLoopOptions(**{"steps": 10, "lr": 1.0, "optimizer": "sgd", **options})
    loop = OuterLoop(chosen, theta, lambda run: objective or Falling())
    rows = train(loop, chosen.steps, label=None)
    return loop.done[0]["w"], rows


@pytest.mark.parametrize("how", ["raise", "gradient", "loss"])
def test_divergence_keeps_the_last_good_weights(how):
    weights, rows = trained(Falling(4, how))
    assert torch.equal(weights, torch.full((3,), -3.0))  # at step 4 θ is −4: seen, and bad
    assert rows[-1] == {"step": 4, "diverged": 1.0}
    for bad in (0, 1):  # before the second step the last good weights are the original ones
        with pytest.raises(Diverged, match="before a second step"):
            trained(Falling(bad, how))
    with pytest.raises(Diverged, match="losses after the last step"):
        trained(Falling(sound=False), steps=1)


def test_no_update_changes_kept_directions():
    """Ten steps along a matrix of ones; what acts on (1, 0, 0) stays."""
    theta, fixed = {"w": torch.zeros(2, 3)}, {"w": torch.tensor([[1.0], [0.0], [0.0]])}
    options = OuterLoopOptions(steps=10, lr=1.0, optimizer="sgd")
    loop = OuterLoop(options, theta, lambda run: Falling(), fixed=fixed)
    train(loop, 10, label=None)
    assert loop.done[0]["w"].tolist() == [[0.0, -10.0, -10.0]] * 2


def test_kept_directions_are_those_of_unrelated_inputs():
    """The text of unrelated captions hardly changes what the trained keys make of it."""
    model = tiny_diffusion(dtype=torch.float64)
    changes = []
    for share in (None, 0.999):
        method = preset("mima_first_order", steps=2, scope="kv", null_space=share)
        trained, rows = rows_of(method, of=model)
        name = next(n for n, _ in model.unet.named_parameters() if n.endswith("attn2.to_k.weight"))
        moved = trained.unet.get_parameter(name) - model.unet.get_parameter(name)
        text = model.text(case().keep.prompts).hidden.flatten(0, 1)
        changes.append(float((text @ moved.T).norm() / moved.norm()))
        assert ("kept_rank" in rows[0][1]) == (share is not None)
    assert changes[1] < 0.1 * changes[0]


@pytest.mark.parametrize("options", [{"concepts": "composed"}, {"hypergradient": "alternating"}])
def test_kept_directions_need_an_outer_loop_that_does_it_all(options):
    if "hypergradient" in options:
        options = {"hypergradient": {"method": options["hypergradient"]}}
    with pytest.raises(InstantiationException, match="null_space must be null"):
        preset("mima", null_space=0.9, **options)


def test_kept_directions_of_a_model_in_half_precision():
    method = preset("mima_first_order", steps=1, scope="kv", null_space=0.9)
    assert "kept_rank" in rows_of(method, of=tiny_diffusion(dtype=torch.bfloat16))[1][0][1]


def test_clipping_bounds_the_gradient():
    weights, _ = trained(start=torch.zeros(4), steps=1, clip=0.5)
    assert float(weights.norm()) == pytest.approx(0.5)


@pytest.mark.parametrize(("name", "total"), [("constant", 2.4), ("cosine", 1.35)])
def test_a_run_steps_by_its_rates(name, total):
    """A gradient of 1 moves θ by the sum of the rates: βn, and β(n + 1)/2 for β/2 · (1 + cos
    πk/n).
    """
    start = torch.zeros(3, dtype=torch.float64)
    weights, _ = trained(start=start, steps=8, lr=0.3, lr_schedule=name)
    expected = torch.full((3,), -total, dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sound", [True, False])
def test_weights_whose_losses_are_not_finite_are_not_kept(sound):
    """No gradient sees what the last update made."""
    weights, rows = trained(Falling(sound=sound), steps=3)
    assert torch.equal(weights, torch.full((3,), -3.0 if sound else -2.0))
    assert ("diverged" in rows[-1]) is not sound
